"""Tiny random models and batches, and brute-force oracles, shared by all tests."""

import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import deepcopy
from functools import partial, wraps
from hashlib import sha256
from typing import Any, NamedTuple

import laplace
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from laplace_llm import ChoiceScoringHead, MultipleChoiceHead, SequenceClassificationHead
from laplace_llm.factors import FactorPair, LoraKron
from laplace_llm.rows import LowRankGGN
from laplace_llm.sketch import spectra

HAS_ELLA = hasattr(laplace, "ELLA")  # since laplace-torch 0.3
VOCABULARY = 50
HIDDEN = 16
CHOICE_TOKENS = (11, 23, 37, 41, 5)
LLAMA_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


# Models -------------------------------------------------------------------------------------------


class Architecture(NamedTuple):
    """A real model class, small: how to build it, and which of its layers usually get LoRA."""

    model: type[PreTrainedModel]
    config: type[PretrainedConfig]
    options: dict[str, Any]
    task: TaskType
    targets: tuple[str, ...] = ("q_proj", "v_proj")


ENCODER_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
NO_SPECIAL_TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
T5_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
}
GEMMA_SHAPE: dict[str, Any] = {**LLAMA_SHAPE, "head_dim": 4}
# The default way to run experts does not take float64.
EXPERTS: dict[str, Any] = {
    **LLAMA_SHAPE,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "experts_implementation": "eager",
}

CAUSAL_ARCHITECTURES: dict[str, Architecture] = {
    name: Architecture(model, config, options, TaskType.CAUSAL_LM, *targets)
    for name, (model, config, options, *targets) in {
        "llama": (LlamaForCausalLM, LlamaConfig, LLAMA_SHAPE),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config, LLAMA_SHAPE),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**LLAMA_SHAPE, "head_dim": 8}),
        "qwen3_moe": (
            Qwen3MoeForCausalLM,
            Qwen3MoeConfig,
            EXPERTS | {"head_dim": 8, "num_experts": 4},
        ),
        "mistral": (MistralForCausalLM, MistralConfig, LLAMA_SHAPE | {"sliding_window": 4}),
        "mixtral": (MixtralForCausalLM, MixtralConfig, EXPERTS | {"num_local_experts": 4}),
        "gemma": (GemmaForCausalLM, GemmaConfig, GEMMA_SHAPE),
        # Every second layer sees a window, and logits are capped.
        "gemma2": (
            Gemma2ForCausalLM,
            Gemma2Config,
            GEMMA_SHAPE | {"sliding_window": 4, "query_pre_attn_scalar": 4},
        ),
        "gemma3": (
            Gemma3ForCausalLM,
            Gemma3TextConfig,
            GEMMA_SHAPE | {"sliding_window": 4, "query_pre_attn_scalar": 4},
        ),
        "phi": (PhiForCausalLM, PhiConfig, LLAMA_SHAPE | {"num_key_value_heads": 4}),
        "phi3": (Phi3ForCausalLM, Phi3Config, LLAMA_SHAPE | NO_SPECIAL_TOKENS, ("qkv_proj",)),
        # LoRA sits on a Conv1D, and positions are absolute.
        "gpt2": (
            GPT2LMHeadModel,
            GPT2Config,
            {
                "vocab_size": VOCABULARY,
                "n_embd": HIDDEN,
                "n_layer": 2,
                "n_head": 2,
                "n_positions": 64,
                "initializer_range": 0.3,
                **NO_SPECIAL_TOKENS,
            },
            ("c_attn",),
        ),
        # Positions are learned, and offset.
        "opt": (
            OPTForCausalLM,
            OPTConfig,
            {
                "vocab_size": VOCABULARY,
                "hidden_size": HIDDEN,
                "word_embed_proj_dim": HIDDEN,
                "ffn_dim": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 64,
                "init_std": 0.3,
                "pad_token_id": 0,
                **NO_SPECIAL_TOKENS,
            },
        ),
        "gpt_neox": (
            GPTNeoXForCausalLM,
            GPTNeoXConfig,
            ENCODER_SHAPE | NO_SPECIAL_TOKENS,
            ("query_key_value",),
        ),
    }.items()
}
# Classifiers of (B, T), or of (B, C, T) for multiple choice. PEFT keeps a trainable copy of their
# classification layer.
CLASSIFIER_ARCHITECTURES: dict[str, Architecture] = {
    name: Architecture(model, config, options, TaskType.SEQ_CLS, targets)
    for name, (model, config, options, targets) in {
        "bert": (BertForSequenceClassification, BertConfig, ENCODER_SHAPE, ("query", "value")),
        "roberta": (
            RobertaForSequenceClassification,
            RobertaConfig,
            ENCODER_SHAPE,
            ("query", "value"),
        ),
        "bert_choices": (BertForMultipleChoice, BertConfig, ENCODER_SHAPE, ("query", "value")),
        "llama": (LlamaForSequenceClassification, LlamaConfig, LLAMA_SHAPE, ("q_proj", "v_proj")),
        "t5": (T5ForSequenceClassification, T5Config, T5_SHAPE, ("q", "v")),
    }.items()
}
SEQ2SEQ_ARCHITECTURES: dict[str, Architecture] = {
    name: Architecture(model, config, options, TaskType.SEQ_2_SEQ_LM, targets)
    for name, (model, config, options, targets) in {
        "t5": (T5ForConditionalGeneration, T5Config, T5_SHAPE, ("q", "v")),
        # As in T5 1.1 and FLAN-T5: gated, and without scaling before lm_head.
        "t5_1_1": (
            T5ForConditionalGeneration,
            T5Config,
            {**T5_SHAPE, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
            ("q", "v"),
        ),
        "bart": (
            BartForConditionalGeneration,
            BartConfig,
            {
                "vocab_size": VOCABULARY,
                "d_model": HIDDEN,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 24,
                "decoder_ffn_dim": 24,
                "max_position_embeddings": 64,
                "init_std": 0.3,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 2,
                "forced_eos_token_id": None,
            },
            ("q_proj", "v_proj"),
        ),
    }.items()
}


def copied(build: Callable[..., PeftModel]) -> Callable[..., PeftModel]:
    """Build each model once, and return copies of it."""
    built: dict[str, tuple[Any, PeftModel]] = {}

    @wraps(build)
    def copy(*args: Any, **kwargs: Any) -> PeftModel:
        if "ensure_weight_tying" in kwargs:  # its tied tensors are results, which have no copies
            return build(*args, **kwargs)
        key = repr((args, kwargs))
        if key not in built:
            built[key] = (args, kwargs), build(*args, **kwargs)  # so that no address is used twice
        return deepcopy(built[key][1])

    return copy


@copied
def tiny(
    architecture: Architecture,
    dtype: torch.dtype = torch.float64,
    targets: Sequence[str] | str | None = None,
    rank: int = 3,
    seed: int = 0,
    classes: int | None = None,
    **lora_kwargs: Any,
) -> PeftModel:
    """Return a small random model of a real class, with random LoRA on some of its layers."""

    def build() -> nn.Module:
        options = architecture.options | ({} if classes is None else {"num_labels": classes})
        return _with_exact_norms(architecture.model(architecture.config(**options)))

    if architecture.model is GPT2LMHeadModel:
        lora_kwargs = {"fan_in_fan_out": True, **lora_kwargs}
    lora_kwargs = {"task_type": architecture.task, **lora_kwargs}
    return _with_lora(build, dtype, targets or architecture.targets, rank, seed, **lora_kwargs)


tiny_llama = partial(tiny, CAUSAL_ARCHITECTURES["llama"])
tiny_gpt2 = partial(tiny, CAUSAL_ARCHITECTURES["gpt2"])
tiny_opt = partial(tiny, CAUSAL_ARCHITECTURES["opt"])
tiny_bert_classifier = partial(tiny, CLASSIFIER_ARCHITECTURES["bert"], classes=3)
tiny_bert_choices = partial(tiny, CLASSIFIER_ARCHITECTURES["bert_choices"])


class MLP(nn.Module):
    """Two linear layers on float features; no Hugging Face model."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def tiny_mlp(
    dtype: torch.dtype = torch.float64,
    targets: Sequence[str] = ("first", "second"),
    rank: int = 2,
    seed: int = 0,
    inputs: int = 4,
    hidden: int = 6,
    outputs: int = 3,
    **lora_kwargs: Any,
) -> PeftModel:
    """Return a model on (B, inputs) tensors, for ``(X, y)`` loaders and regression."""
    return _with_lora(
        lambda: MLP(inputs, hidden, outputs), dtype, targets, rank, seed, **lora_kwargs
    )


class Net(nn.Module):
    """A convolution over images (B, 2, 6, 6) or sequences (B, 2, 9), and a linear layer."""

    def __init__(self, dims: int, **conv_kwargs: Any) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
        self.conv = kind(2, 4, (3,) * dims, **conv_kwargs)
        self.out = nn.LazyLinear(3)
        self(torch.zeros(1, 2, *IMAGE[dims]))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.conv(x)).flatten(1))


IMAGE = {1: (9,), 2: (6, 6)}


def tiny_conv(
    dims: int = 2, dtype: torch.dtype = torch.float64, conv_kwargs: Any = None, **lora_kwargs: Any
) -> PeftModel:
    """Return a convolutional classifier of (B, 2, 9) or (B, 2, 6, 6) inputs."""
    return _with_lora(
        lambda: Net(dims, **(conv_kwargs or {})), dtype, ("conv", "out"), 2, 0, **lora_kwargs
    )


def conv_batch(n: int, seed: int = 0, dims: int = 2) -> tuple[Tensor, Tensor]:
    """Return images or sequences, and labels."""
    labels = torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed))
    return randn(n, 2, *IMAGE[dims], seed=seed), labels


def _with_lora(
    build: Callable[[], nn.Module],
    dtype: torch.dtype,
    targets: Sequence[str] | str,
    rank: int,
    seed: int,
    **lora_kwargs: Any,
) -> PeftModel:
    kwargs = {"lora_alpha": 2 * rank, "lora_dropout": 0.0, "init_lora_weights": False}
    kwargs.update(lora_kwargs)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        layers = targets if isinstance(targets, str) else list(targets)
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=layers, **kwargs))
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.ndim == 1:  # biases and magnitudes, as if trained
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def _with_exact_norms(model: nn.Module) -> nn.Module:
    """Replace Llama's norms, which round to float32 whatever the model's precision."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                setattr(module, name, norm)
    return model


class KeepingFloat64(TorchFunctionMode):
    """Round no float64 to float32 on the way: norms, softmax and rotary positions usually are."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


# Heads --------------------------------------------------------------------------------------------


def letter_head(model: nn.Module | None = None, classes: int = 3, **kwargs: Any):
    """Return a MultipleChoiceHead over `model`, or over ``tiny_llama(**kwargs)``."""
    model = tiny_llama(**kwargs) if model is None else model
    return MultipleChoiceHead(model, CHOICE_TOKENS[:classes])


def scoring_head(model: nn.Module | None = None, normalization: str = "sum", **kwargs: Any):
    """Return a ChoiceScoringHead over `model`, or over ``tiny_llama(**kwargs)``."""
    model = tiny_llama(**kwargs) if model is None else model
    return ChoiceScoringHead(model, normalization)


# Batches ------------------------------------------------------------------------------------------


def letter_batch(
    n: int,
    length: int = 8,
    seed: int = 0,
    pad: str | None = "right",
    classes: int = 3,
    extra: int = 0,
) -> dict[str, Tensor]:
    """Return n prompts of up to `length` tokens, with labels.

    The tokens depend on the seed alone: `pad` 'right' and 'left' place the same prompts, of
    different lengths, on either side, and `extra` adds columns of padding. With ``pad=None`` all
    prompts have `length` tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    rows = _rows(n, length, generator, ragged=pad is not None)
    ids, mask = _pad(rows, length + extra, pad)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def choice_batch(
    n: int,
    choices: int = 3,
    length: int = 8,
    seed: int = 0,
    pad: str | None = "right",
    extra: int = 0,
) -> dict[str, Tensor]:
    """Return n questions with one sequence a choice, (n, choices, T), as `letter_batch` does.

    The choice is the last one to three tokens of its sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(choices, (n,), generator=generator)
    sizes = torch.randint(1, 4, (n * choices,), generator=generator)
    rows = _rows(n * choices, length, generator, ragged=pad is not None)
    ids, mask = _pad(rows, length + extra, pad)
    chosen = [
        torch.arange(len(row)) >= len(row) - size for row, size in zip(rows, sizes, strict=True)
    ]
    chosen_mask, _ = _pad([c.long() for c in chosen], length + extra, pad)
    shape = (n, choices, length + extra)
    return {
        "input_ids": ids.view(shape),
        "attention_mask": mask.view(shape),
        "choice_mask": chosen_mask.bool().view(shape),
        "labels": labels,
    }


def packed_batch(n: int, choices: int = 3, seed: int = 0, pad: str = "right") -> dict[str, Tensor]:
    """Return n questions of two to five tokens, each packed with choices of one to three."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(choices, (n,), generator=generator)
    heads = torch.randint(2, 6, (n,), generator=generator).tolist()
    sizes = torch.randint(1, 4, (n, choices), generator=generator)
    rows, numbers, positions = [], [], []
    for head, tails in zip(heads, sizes, strict=True):
        own = torch.arange(choices).repeat_interleave(tails)
        rows.append(torch.randint(1, VOCABULARY, (head + len(own),), generator=generator))
        numbers.append(torch.cat([torch.full((head,), -1), own]))
        positions.append(torch.cat([torch.arange(head), *(head + torch.arange(k) for k in tails)]))
    width = max(map(len, rows))
    ids, mask = _pad(rows, width, pad)
    choice_ids = _pad(numbers, width, pad)[0].where(mask.bool(), -1)
    entries = {"input_ids": ids, "attention_mask": mask, "choice_ids": choice_ids}
    return {**entries, "position_ids": _pad(positions, width, pad)[0], "labels": labels}


def ragged_letters(n: int, seed: int = 0) -> dict[str, Tensor]:
    """Return `letter_batch` of four letters, of which each question has two to four."""
    batch = letter_batch(n, seed=seed, classes=4)
    present, labels = _ragged(batch["labels"], seed)
    return {**batch, "labels": labels, "choice_present": present}


def ragged_choices(n: int, seed: int = 0, pad: str = "left") -> dict[str, Tensor]:
    """Return `choice_batch` where each question has two to four choices; the others are padding."""
    batch = choice_batch(n, 4, seed=seed, pad=pad)
    present, labels = _ragged(batch["labels"], seed)
    parts = {
        key: batch[key] * present[..., None]
        for key in ("input_ids", "attention_mask", "choice_mask")
    }
    return {**parts, "labels": labels, "choice_present": present}


def _ragged(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    counts = 2 + (torch.arange(len(labels)) + seed) % 3
    return torch.arange(4) < counts[:, None], labels % counts


def by_size(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the rows of a ragged batch as batches of one row, without absent choices."""
    rows = []
    for index, present in enumerate(batch["choice_present"]):
        row = {key: value[index : index + 1] for key, value in batch.items()}
        del row["choice_present"]
        rows.append({k: v[:, present] if v.ndim == 3 else v for k, v in row.items()})
    return rows


def pair_batch(n: int, length: int = 8, seed: int = 0, **kwargs: Any) -> dict[str, Tensor]:
    """Return n pairs of sequences (n, 2, length) and which of them is preferred."""
    batch = choice_batch(n, 2, length, seed, **kwargs)
    kinds = batch.pop("choice_mask").long()
    return {**batch, "token_type_ids": kinds}


def mlp_batch(
    n: int, seed: int = 0, inputs: int = 4, outputs: int = 3, regression: bool = False
) -> tuple[Tensor, Tensor]:
    """Return float64 features and labels, or targets (n, outputs) for regression."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=generator, dtype=torch.float64)
    if regression:
        return x, torch.randn(n, outputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(outputs, (n,), generator=generator)


def _rows(n: int, length: int, generator: torch.Generator, ragged: bool) -> list[Tensor]:
    """Draw token sequences of 4 to `length` tokens; the first one has full length."""
    lengths = torch.randint(4, length + 1, (n,), generator=generator)
    lengths[0] = length
    tokens = torch.randint(1, VOCABULARY, (n, length), generator=generator)
    return [row[: int(k)] if ragged else row for row, k in zip(tokens, lengths, strict=True)]


def _pad(rows: list[Tensor], width: int, side: str | None) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return ids, mask


Labelled = MutableMapping[str, Tensor] | tuple[Tensor, Tensor]


def inputs_of(batch: Labelled) -> Any:
    """Return what the model is called with."""
    return batch if isinstance(batch, MutableMapping) else batch[0]


def labels_of(batch: Labelled) -> Tensor:
    return batch["labels"] if isinstance(batch, MutableMapping) else batch[1]


def select(batch: Labelled, index: Any) -> Labelled:
    """Return the examples of a batch that `index` (a slice or a list) chooses."""
    if isinstance(batch, MutableMapping):
        return {key: value[index] for key, value in batch.items()}
    return tuple(value[index] for value in batch)


def chunks(batch: Labelled, size: int) -> list[Labelled]:
    """Cut a batch into parts of at most `size` examples."""
    n = len(labels_of(batch))
    return [select(batch, slice(start, start + size)) for start in range(0, n, size)]


# What the contract suite runs over ----------------------------------------------------------------


class Setup(NamedTuple):
    """A model and how to make labelled batches for it: ``make_batch(n, seed)``."""

    model: nn.Module
    make_batch: Callable[..., Labelled]


HEADS: dict[str, Callable[[], Setup]] = {
    "letters": lambda: Setup(letter_head(), lambda n, seed=0: letter_batch(n, seed=seed)),
    "scored": lambda: Setup(
        scoring_head(tiny_llama(targets=("v_proj",))),
        lambda n, seed=0: packed_batch(n, 3, seed=seed, pad="left"),
    ),
    "classifier": lambda: Setup(
        SequenceClassificationHead(tiny_bert_classifier()),
        lambda n, seed=0: letter_batch(n, seed=seed),
    ),
    "bare": lambda: Setup(
        tiny_bert_classifier(targets=("value",)), lambda n, seed=0: letter_batch(n, seed=seed)
    ),
    "mlp": lambda: Setup(tiny_mlp(), mlp_batch),
    "ragged letters": lambda: Setup(letter_head(classes=4), ragged_letters),
    "ragged scored": lambda: Setup(scoring_head(tiny_llama(targets=("v_proj",))), ragged_choices),
    "pairs": lambda: Setup(SequenceClassificationHead(tiny_bert_classifier(classes=1)), pair_batch),
}


def tied_lm_head(**lora_kwargs: Any) -> PeftModel:
    """Return a model with an adapter on lm_head, whose base weight is the embedding's."""
    with warnings.catch_warnings():  # PEFT's advice on merging, and lm_head is no Conv1D
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True")
        return tiny_gpt2(targets=("c_attn", "lm_head"), **lora_kwargs)


def _letters(model: nn.Module) -> Setup:
    return Setup(letter_head(model), lambda n, seed=0: letter_batch(n, seed=seed))


def _conv(dims: int, **kwargs: Any) -> Setup:
    return Setup(tiny_conv(dims, **kwargs), lambda n, seed=0: conv_batch(n, seed, dims))


# Every kind of adapter weight that a posterior can be over.
KINDS: dict[str, Callable[[], Setup]] = {
    "rslora": lambda: _letters(tiny_llama(use_rslora=True)),
    "patterns": lambda: _letters(
        tiny_llama(rank_pattern={"v_proj": 5}, alpha_pattern={"q_proj": 3})
    ),
    "Conv1D": lambda: _letters(tiny_gpt2()),
    "dora": lambda: _letters(tiny_llama(use_dora=True)),
    "dora, Conv1D": lambda: _letters(tiny_gpt2(use_dora=True)),
    "dora, biases": lambda: Setup(
        tiny_bert_classifier(use_dora=True), lambda n, seed=0: letter_batch(n, seed=seed)
    ),
    "lora_bias": lambda: Setup(tiny_mlp(lora_bias=True), mlp_batch),
    "embedding": lambda: _letters(tiny_llama(targets=("embed_tokens", "v_proj"))),
    "lm_head": lambda: _letters(tiny_llama(targets=("v_proj", "lm_head"))),
    "tied lm_head": lambda: _letters(tied_lm_head()),
    "conv1d": lambda: _conv(1),
    "conv1d, stride and padding": lambda: _conv(1, conv_kwargs={"stride": 2, "padding": 1}),
    "conv2d": lambda: _conv(2, conv_kwargs={"stride": (2, 1), "padding": (0, 2)}),
    "conv2d, same": lambda: _conv(2, conv_kwargs={"padding": "same"}),
    "conv2d, lora_bias": lambda: _conv(2, lora_bias=True),
}


# Rows ---------------------------------------------------------------------------------------------


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return float64 noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying_rows(n: int, columns: int, decades: float = 4) -> Tensor:
    """Return rows in random order whose lengths fall over some decades."""
    lengths = 10 ** -torch.linspace(0, decades, n, dtype=torch.float64)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    return (lengths[:, None] * randn(n, columns))[order]


def gather(
    rows: Tensor,
    sizes: Sequence[int],
    max_rank: int | None = None,
    batch: int | None = None,
    place: Any = None,
) -> LowRankGGN:
    """Return the truncated GGN of rows that came in batches."""
    ggn = LowRankGGN(sizes, max_rank, rows.dtype, rows.device, place)
    for part in rows.split(batch or max(len(rows), 1)):
        ggn.add(part)
    ggn.truncate()
    return ggn


def kept(ggn: LowRankGGN) -> Tensor:
    """Return the dense matrix (P, P) that is left of a GGN."""
    rows = torch.cat(list(ggn.store.parts())).double()
    return rows.T @ rows


# Tokenizer ----------------------------------------------------------------------------------------

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = (
    *("Question", "Answer", ":", ".", "?", "A", "B", "C", "D", "what", "colour", "is", "the"),
    *("sky", "sea", "grass", "snow", "red", "blue", "green", "white", "and"),
)


def tiny_tokenizer(
    side: str = "right", pad: bool = True, bos: bool = False, eos: bool = False
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few words, all within VOCABULARY.

    `bos` and `eos` make it write the special token at the start and end of every text; without
    `pad` it has no padding token.
    """
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    template = ["<s>"] * bos + ["$A"] + ["</s>"] * eos
    backend.post_processor = TemplateProcessing(
        single=" ".join(template), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if pad:
        names["pad_token"] = "<pad>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=side, **names)


# What borrowing a model must not change -----------------------------------------------------------


def used_model(classifier: bool = False) -> nn.Module:
    """Return a model in the midst of training: mixed modes, flags, gradients and hooks."""
    if classifier:
        model = tiny_bert_classifier(lora_dropout=0.5)
    else:
        model = letter_head(tiny_llama(lora_dropout=0.5))
    model.train()
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 0
    for index, parameter in enumerate(model.parameters()):
        if index % 4 == 0:
            parameter.requires_grad_(not parameter.requires_grad)
        if index % 3 == 0:
            parameter.grad = torch.full_like(parameter, float(index + 1))
    model.register_buffer("counter", torch.arange(3))
    model.register_forward_hook(lambda module, args, output: None)
    model.register_forward_pre_hook(lambda module, args: None)
    model.output_size = 17
    return model


def contents(la: Any) -> Any:
    """Return a posterior's state, and what it predicts of letters."""
    generator = torch.Generator().manual_seed(0)
    state, prediction = la.state_dict(), la(letter_batch(2, seed=3))
    return frozen({**state, "prediction": prediction, "samples": la.sample(1, generator)})


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything about a model that using it must leave as it was.

    Compare two of them with ``==``: tensors are kept as digests of their bytes, and by identity.
    """
    state: dict[str, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[f"{name}: parameter"] = _tensor_state(parameter)
        grad = parameter.grad
        state[f"{name}: grad"] = None if grad is None else _tensor_state(grad)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        state[f"{name}: buffer"] = _tensor_state(buffer)
    for name, module in model.named_modules():
        state[f"{name}: class"] = type(module)
        # Modes, hooks of every kind, submodules and parametrizations are all attributes.
        state[f"{name}: attributes"] = _outline(vars(module))
    return state


def _tensor_state(tensor: Tensor) -> dict[str, Any]:
    """Return a tensor's identity, values and place, and what autograd knows of it."""
    return {
        "identity": id(tensor),
        "values": frozen(tensor.detach()),
        "place": (tensor.device, tensor.stride()),
        "autograd": (tensor.requires_grad, tensor.is_leaf, tensor.is_inference()),
        "writes": None if tensor.is_inference() else tensor._version,
        "hooks": _outline(
            [tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)]
        ),
    }


def _outline(value: Any, depth: int = 3) -> Any:
    """Return simple values as they are, containers of them, and anything else by identity."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    if depth and isinstance(value, Mapping):
        return [(key, _outline(entry, depth - 1)) for key, entry in value.items()]
    if depth and isinstance(value, (list, tuple)):
        return [_outline(entry, depth - 1) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, PretrainedConfig):
        return id(value), _outline(vars(value), depth - 1)
    return id(value)


def frozen(value: Any) -> Any:
    """Return a copy to compare with ``==``, bit for bit, of nested containers of tensors."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return value.dtype, value.shape, "meta"
        values = value.detach().contiguous().flatten()
        return value.dtype, value.shape, sha256(values.view(torch.uint8).numpy()).hexdigest()
    if isinstance(value, dict):
        return {key: frozen(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [frozen(entry) for entry in value]
    return value


# Oracles ------------------------------------------------------------------------------------------


def bruteforce_jacobians(model: nn.Module, batch: Any, tensors: Sequence[Any]) -> Tensor:
    """Return (B, C, P), one plain backward pass for each example and output.

    `model` maps `batch` to (B, C) logits; `tensors` are LoraTensors.
    """
    weights = [tensor.weight for tensor in tensors]
    flags = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    with torch.enable_grad():
        logits = model(batch)
        rows = []
        for value in logits.flatten():
            gradients = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
            parts = [
                _posterior_part(tensor, gradient)
                for tensor, gradient in zip(tensors, gradients, strict=True)
            ]
            rows.append(torch.cat(parts))
    for weight, flag in zip(weights, flags, strict=True):
        weight.requires_grad_(flag)
    return torch.stack(rows).view(*logits.shape, -1)


def _posterior_part(tensor: Any, gradient: Tensor | None) -> Tensor:
    """Return what the posterior is over of a parameter's gradient, as a vector."""
    gradient = torch.zeros_like(tensor.weight) if gradient is None else gradient
    return (gradient if tensor.rows is None else gradient[list(tensor.rows)]).flatten()


def diagonal_blocks(matrix: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Return the square blocks of these sizes on a matrix's diagonal."""
    rows = matrix.split(list(sizes), 0)
    return [row.split(list(sizes), 1)[index] for index, row in enumerate(rows)]


def eigenprojections(pair: FactorPair) -> list[Tensor]:
    """Return the projection on every product of an eigenspace of either Kronecker factor.

    Which eigenvectors span an eigenspace is arbitrary; its projection is not.
    """
    factors = []
    for moment in (pair.outputs, pair.inputs):
        values, vectors = torch.linalg.eigh(spectra([moment])[0].dense())
        groups = (values.diff(prepend=values[:1]) > 1e-10 * values[-1]).cumsum(0)
        parts = [vectors[:, groups == group] for group in groups.unique()]
        factors.append([part @ part.T for part in parts])
    return [torch.kron(left, right) for left in factors[0] for right in factors[1]]


def refitted_blocks(factors: LoraKron, curvature: Tensor) -> list[Tensor]:
    """Return each tensor's curvature averaged over every product of its factors' eigenspaces.

    `curvature` is that of all tensors, (P, P).
    """
    projections = [eigenprojections(pair) for pair in factors.pairs]
    exact = diagonal_blocks(curvature, [len(each[0]) for each in projections])
    return [
        sum((p @ block).trace() / p.trace() * p for p in each)
        for each, block in zip(projections, exact, strict=True)
    ]


def explicit_ggn(jacobians: Tensor, logits: Tensor | None) -> Tensor:
    """Return ``sum_n J_n^T H_n J_n``, (P, P); H is the identity where `logits` is None."""
    if logits is None:
        return torch.einsum("ncp,ncq->pq", jacobians, jacobians)
    p = torch.softmax(logits, -1)
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("ncp,ncd,ndq->pq", jacobians, hessians, jacobians)
