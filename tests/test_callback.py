"""The Trainer's callback: real training, which is the same with and without it."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from models import (
    CHOICE_TOKENS,
    frozen,
    letter_batch,
    snapshot,
    tiny_bert_classifier,
    tiny_llama,
)
from peft import PeftModel
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler, default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments

from laplace_llm import (
    DiagLoraLaplace,
    Laplace,
    LaplaceCallback,
    MultipleChoiceHead,
    from_pretrained,
)
from laplace_llm.errors import DataError, OptionError

# Its name in transformers 5.24 and later, and before.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
N = 11  # not a multiple of the batch size


def rows_of(batch):
    return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


ROWS = rows_of(letter_batch(N))
MISLABELLED = [{**row, "labels": (row["labels"] + 1) % 3} for row in ROWS]  # training harms these
QUESTIONS = [default_collate(ROWS[:6]), default_collate(ROWS[6:])]


def classifier():
    return tiny_bert_classifier(dtype=torch.float32, lora_dropout=0.1)


def language_model():
    return tiny_llama(dtype=torch.float32, lora_dropout=0.1)


def letters(model):
    return MultipleChoiceHead(model, CHOICE_TOKENS[:3])


def trainer_of(folder, *callbacks, model=None, rows=ROWS, held_out=None, cls=Trainer, **options):
    options = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "save_strategy": "no",
        "logging_strategy": "epoch",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }
    args = TrainingArguments(output_dir=str(folder), **options)
    return cls(
        classifier() if model is None else model,
        args,
        train_dataset=rows,
        eval_dataset=held_out,
        callbacks=list(callbacks),
    )


def next_token_rows():
    return [{key: row["input_ids"] if key == "labels" else row[key] for key in row} for row in ROWS]


class Watch(TrainerCallback):
    """Keep what the Trainer hands to those that report."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def evidence_logs(history):
    return [entry for entry in history if "laplace_log_marginal_likelihood" in entry]


def assert_same_predictions(la, other, batch=None):
    batch = QUESTIONS[0] if batch is None else batch
    torch.testing.assert_close(la(batch), other(batch), rtol=1e-4, atol=1e-6)


# What comes out -----------------------------------------------------------------------------------


def test_fit_at_the_end_is_the_fit_by_hand(tmp_path):
    callback = LaplaceCallback(save=False)
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    la = callback.la
    by_hand = Laplace(trainer.model)
    by_hand.fit(QUESTIONS)
    by_hand.optimize_prior_precision()
    assert la.n_data == N
    assert frozen(la.mean) == frozen(by_hand.mean)
    torch.testing.assert_close(la.loss, by_hand.loss)
    assert la.prior_precision == by_hand.prior_precision != 1
    assert_same_predictions(la, by_hand)
    assert not evidence_logs(trainer.state.log_history)


def test_a_language_model_has_a_head_and_its_own_loader(tmp_path):
    chosen = {"val_loader": QUESTIONS[1:], "grid_size": 5}
    callback = LaplaceCallback(
        letters, QUESTIONS, optimize=chosen, save=False, hessian_structure="diag"
    )
    trainer = trainer_of(tmp_path, callback, model=language_model(), rows=next_token_rows())
    trainer.train()
    assert type(callback.la) is DiagLoraLaplace
    by_hand = Laplace(letters(trainer.model), hessian_structure="diag")
    by_hand.fit(QUESTIONS)
    by_hand.optimize_prior_precision(**chosen)
    assert callback.la.prior_precision == by_hand.prior_precision
    assert_same_predictions(callback.la, by_hand)


def test_prior_precision_is_left_alone_without_optimize(tmp_path):
    callback = LaplaceCallback(every="epoch", optimize=False, save=False, prior_precision=7.0)
    trainer_of(tmp_path, callback).train()
    assert float(callback.la.prior_precision) == 7


def test_the_best_weights_are_the_ones_that_are_fitted(tmp_path):
    callback = LaplaceCallback(every="epoch", save=False)
    trainer = trainer_of(
        tmp_path, callback, held_out=MISLABELLED, num_train_epochs=3, learning_rate=0.05,
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step < trainer.state.global_step
    assert frozen(callback.la.mean) == frozen(callback.la._values())
    by_hand = Laplace(trainer.model)
    by_hand.fit(QUESTIONS)
    torch.testing.assert_close(callback.la.loss, by_hand.loss)
    assert not list(tmp_path.rglob("laplace*"))  # checkpoints have none


# Logs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "structure",
    ["kron", *(pytest.param(s, marks=pytest.mark.slow) for s in ("diag", "lowrank", "gp"))],
)
def test_the_evidence_of_each_epoch_is_logged(structure, tmp_path, recwarn):
    callback = LaplaceCallback(every="epoch", save=False, hessian_structure=structure)
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    logs = evidence_logs(trainer.state.log_history)
    assert [(entry["epoch"], entry["step"]) for entry in logs] == [(1, 3), (2, 6)]
    assert logs[0]["laplace_log_likelihood"] != logs[1]["laplace_log_likelihood"]
    by_hand = Laplace(trainer.model, hessian_structure=structure)
    by_hand.fit(QUESTIONS)
    by_hand.optimize_prior_precision(method="marglik")
    expected = {
        "laplace_log_marginal_likelihood": float(by_hand.log_marginal_likelihood()),
        "laplace_log_likelihood": float(by_hand.log_likelihood),
        "laplace_prior_precision": float(by_hand.prior_precision),
    }
    assert {key: logs[1][key] for key in expected} == pytest.approx(expected, rel=1e-3)
    assert not [w for w in recwarn if "marginal likelihood" in str(w.message)]
    json.dumps(trainer.state.log_history)


def test_logs_reach_other_callbacks_and_the_trainers_own_stay(tmp_path):
    watch = Watch()
    trainer = trainer_of(tmp_path, watch)
    trainer.add_callback(LaplaceCallback(every="epoch", save=False, trainer=trainer))
    trainer.train()
    seen = [(step, key) for step, logs in watch.logs for key in logs]
    for key in ("laplace_log_marginal_likelihood", "loss"):
        assert [step for step, name in seen if name == key] == [3, 6]
    assert len(evidence_logs(trainer.state.log_history)) == 2


def test_a_fit_after_the_last_epoch_is_not_done_twice(tmp_path):
    passes = []

    class Counted(list):
        def __iter__(self):
            passes.append(None)
            return super().__iter__()

    callback = LaplaceCallback(
        train_loader=Counted(QUESTIONS), every="epoch", optimize=False, save=False
    )
    trainer_of(tmp_path, callback).train()
    assert len(passes) == 1 + 2  # one is the try before training
    trainer_of(tmp_path, callback).train()
    assert len(passes) == 2 * (1 + 2)


# Training is the same -----------------------------------------------------------------------------


class Drawing(list):
    """A data set that draws random numbers of all kinds."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        drawn = random.random() + np.random.rand() + float(torch.rand(()))
        ids = row["input_ids"].clone()
        ids[0] = 1 + int(16 * drawn)
        return {**row, "input_ids": ids}


def trained(folder, callback, **options):
    """Return everything that training ends with, bit for bit."""
    random.seed(0)
    np.random.seed(0)
    modes = []

    class Modes(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            modes.append([module.training for module in model.modules()])

    trainer = trainer_of(
        folder, *([] if callback is None else [callback]), Modes(), rows=Drawing(ROWS), **options
    )
    trainer.train()
    history = [
        {
            key: value
            for key, value in entry.items()
            if not key.startswith(("train_", "laplace"))
            and not key.endswith(("runtime", "per_second"))
        }
        for entry in trainer.state.log_history
    ]
    model = trainer.model
    return {
        "weights": frozen(dict(model.state_dict())),
        "gradients": [p.grad is None or frozen(p.grad) for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
        "optimizer": frozen(trainer.optimizer.state_dict()["state"]),
        "random": [torch.rand(()).item(), random.random(), np.random.rand()],
        "modes": modes,
        "history": [entry for entry in history if len(entry) > 2],
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "eval_strategy": "epoch", "held_out": ROWS},
        pytest.param({"bf16": True, CHECKPOINTING: True}, marks=pytest.mark.slow),
        pytest.param(
            {"dataloader_drop_last": True, "neftune_noise_alpha": 5.0}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_training_is_the_same_with_and_without(options, tmp_path):
    callback, results = LaplaceCallback(every="epoch", save=False), []
    for each in (None, callback):
        torch.manual_seed(0)
        results.append(trained(tmp_path, each, **options))
    for key, value in results[0].items():
        assert results[1][key] == value, key
    assert callback.la.n_data == N


# Saved --------------------------------------------------------------------------------------------


def saved_and_loaded(folder, model, trainer):
    """Return the posterior as another process loads it: on a fresh base model."""
    trainer.train()
    trainer.save_model()
    assert {"adapter_model.safetensors", "laplace_model.safetensors", "laplace_config.json"} <= {
        path.name for path in Path(folder).iterdir()
    }
    again = PeftModel.from_pretrained(model.unload(), folder)
    return from_pretrained(again, folder)


@pytest.mark.parametrize("best", [False, True], ids=["last", "best"])
def test_adapter_and_posterior_are_loaded_from_one_folder(best, tmp_path):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    options = {**options, "held_out": MISLABELLED, "learning_rate": 0.05} if best else {}
    callback = LaplaceCallback()
    trainer = trainer_of(tmp_path, callback, **options)
    la = saved_and_loaded(tmp_path, classifier(), trainer)
    assert not list(tmp_path.glob("checkpoint-*/laplace*"))
    for batch in QUESTIONS:
        assert frozen(la(batch)) == frozen(callback.la(batch))


def test_the_head_comes_back_with_the_posterior(tmp_path):
    callback = LaplaceCallback(letters, QUESTIONS)
    trainer = trainer_of(tmp_path, callback, model=language_model(), rows=next_token_rows())
    la = saved_and_loaded(tmp_path, language_model(), trainer)
    assert type(la.model) is MultipleChoiceHead
    assert frozen(la(QUESTIONS[0])) == frozen(callback.la(QUESTIONS[0]))


# What is refused, before training -----------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


class Weighted(Trainer):
    def get_train_dataloader(self):
        sampler = WeightedRandomSampler([1.0] * N, N)
        return DataLoader(self.train_dataset, 4, sampler=sampler, collate_fn=self.data_collator)


REFUSED = {
    "a language model without a head": (
        dict(model=language_model), {}, OptionError, "LlamaForCausalLM is a language model.*head=",
    ),
    "tokens as labels": (
        dict(model=language_model, rows=next_token_rows()), dict(head=letters), DataError,
        r"one integer label.*train_loader=",
    ),
    "a wrong option": (
        {}, dict(hessian_structure="kfac"), OptionError, "hessian_structure",
    ),
    "a stream": (
        dict(rows=Stream(), max_steps=2), {}, DataError, "Stream.*train_loader=",
    ),
    "a sampler that draws": (
        dict(cls=Weighted), {}, DataError, "WeightedRandomSampler.*train_loader=",
    ),
    "no labels": ({}, dict(train_loader=[{"input_ids": 1}]), DataError, "labels"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_work_is_an_error_before_training(case, tmp_path):
    setting, arguments, error, message = REFUSED[case]
    setting = {key: value() if key == "model" else value for key, value in setting.items()}
    trainer = trainer_of(tmp_path, LaplaceCallback(save=False, **arguments), **setting)
    before = snapshot(trainer.model)
    with pytest.raises(error, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    after = snapshot(trainer.model)
    ours = [key for key in before if not key.endswith(("mode", "attributes"))]  # not the Trainer's
    assert [key for key in ours if before[key] != after[key]] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": "step"}, "every='end' or 'epoch', but got 'step'"),
        ({"train_loader": iter(QUESTIONS)}, "iterated over again"),
        ({"optimize": {"methode": "loo"}}, "methode"),
    ],
)
def test_wrong_options_are_errors_at_construction(arguments, message):
    with pytest.raises(OptionError, match=message):
        LaplaceCallback(**arguments)
