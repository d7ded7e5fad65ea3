"""Laplace where models are trained: a callback for the `transformers` Trainer.

Training itself is the same with and without it, to the last bit: the model is only borrowed, no
random number of the training is drawn, and the Trainer's own loader is never iterated over.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, SeedableRandomSampler
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.training_args import TrainingArguments

from laplace_llm._compat import parent_marglik
from laplace_llm.errors import DataError, OptionError
from laplace_llm.heads import unwrap
from laplace_llm.prediction import keeping_prior
from laplace_llm.shards import Shard
from laplace_llm.structures import Laplace
from laplace_llm.tuning import LoraTuned

if TYPE_CHECKING:
    from transformers import Trainer

# Those that yield every example of the data set once.
_WHOLE = (
    RandomSampler,
    SeedableRandomSampler,
    SequentialSampler,
    DistributedSampler,
    LengthGroupedSampler,
)


class LaplaceCallback(TrainerCallback):
    """Fit a posterior at the end of training, or also after each epoch.

    At the end of training means at the weights that training returns: with
    ``load_best_model_at_end``, the best ones. The posterior then is `la`, with its prior precision
    chosen, and is saved in ``args.output_dir``, where ``trainer.save_model()`` puts the adapter.
    Checkpoints have none: it takes one pass over the data to make it from their weights.

    When training begins, all of this is tried on one batch, so that a head, collator or option that
    does not work is an error then, and not after hours.

    Several processes (DistributedDataParallel) fit together, and the first one saves.

    Parameters
    ----------
    head : Callable, optional
        Makes the head from the Trainer's model: ``lambda model:
        MultipleChoiceHead.from_tokenizer(model, tokenizer, choices)``. Default: none, for sequence
        classifiers and models that return (B, C) logits themselves.
    train_loader : Iterable, optional
        What `fit` takes. Default: the Trainer's own training data and collator, in the data set's
        order; labels then must be class indices. When a language model is trained on its next
        tokens they are not, and it is to be given.
    every : {'end', 'epoch'}, default='end'
        ``'epoch'`` fits after each epoch too and logs ``laplace_log_marginal_likelihood``: the
        evidence, at the scalar prior precision where it is highest, which is logged as
        ``laplace_prior_precision``, beside the ``laplace_log_likelihood`` of the training data. It
        compares epochs and runs; predictions have the prior precision that `optimize` says.
    optimize : bool or dict, default=True
        Whether to choose the prior precision at the end, or the arguments of
        `optimize_prior_precision`, such as ``{"val_loader": val_loader}``.
    save : bool, default=True
        Whether to save the posterior at the end.
    trainer : transformers.Trainer, optional
        What logs. The Trainer does not show itself to callbacks; without it, logs come into
        ``state.log_history`` alone. For TensorBoard, Weights & Biases and the like:
        ``trainer.add_callback(LaplaceCallback(every="epoch", trainer=trainer))``.
    fit_kwargs : dict, optional
        Further arguments of `fit`, such as ``{"progress_bar": True}``.
    **laplace_kwargs
        Of `laplace_llm.Laplace`: ``likelihood``, ``hessian_structure``, ``dict_key_y``, ...

    Attributes
    ----------
    la : LoraLaplace or None
        The latest posterior. It belongs to the weights that it was fitted at.

    Raises
    ------
    OptionError
        If an option has a value that is not allowed; when training begins, if the model needs a
        head, or the posterior cannot be put over it.
    DataError
        When training begins, if the Trainer's data cannot be passed over a second time, or are not
        what `fit` takes.
    """

    def __init__(
        self,
        head: Callable[[Any], nn.Module] | None = None,
        train_loader: Iterable[Any] | None = None,
        every: Literal["end", "epoch"] = "end",
        optimize: bool | dict[str, Any] = True,
        save: bool = True,
        trainer: Trainer | None = None,
        fit_kwargs: dict[str, Any] | None = None,
        **laplace_kwargs: Any,
    ) -> None:
        if every not in ("end", "epoch"):
            raise OptionError(f"Expected every='end' or 'epoch', but got {every!r}.")
        if isinstance(train_loader, Iterator):
            raise OptionError(
                f"Expected a train_loader that can be iterated over again, but got a "
                f"{type(train_loader).__name__}. Pass a list of its batches, or a DataLoader."
            )
        self._options = dict(optimize) if isinstance(optimize, dict) else {}
        try:
            inspect.signature(LoraTuned.optimize_prior_precision).bind(None, **self._options)
        except TypeError as error:
            raise OptionError(
                f"Expected arguments of optimize_prior_precision in optimize, but {error}."
            ) from error
        self.head, self.train_loader, self.every = head, train_loader, every
        self.optimize, self.save, self.trainer = optimize is not False, save, trainer
        self.fit_kwargs, self.laplace_kwargs = dict(fit_kwargs or {}), laplace_kwargs
        self.la: Any = None
        self._fitted_at: int | None = None  # the step

    # What the Trainer calls ---------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Try it on a batch: what does not work is an error before training."""
        self.la = self._fitted_at = None
        loader = self._loader(args, kwargs["train_dataloader"])
        if isinstance(loader, (Shard, DataLoaderShard, DataLoaderDispatcher)):
            loader = ()  # half a pass over one of these is noticed by others
        with _randomness_kept(args.device):
            la = self._posterior(kwargs["model"])
            batches = list(islice(loader, 1))
            if not batches:
                return
            try:
                la.fit(batches)
            except DataError as error:
                if self.train_loader is not None:
                    raise
                raise DataError(
                    f"{error} The data are the Trainer's own: where their labels are no classes, "
                    "such as the tokens of a language model, pass batches for the head as "
                    "train_loader=..."
                ) from error
            if self.every == "epoch":
                _evidence(la)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Fit, and log the evidence, if that is to be done after each epoch."""
        if self.every != "epoch":
            return
        with _randomness_kept(args.device):
            self._fit(args, state, kwargs)
            logs = _evidence(self.la)
        if self.trainer is None:
            state.log_history.append({**logs, "epoch": state.epoch, "step": state.global_step})
            return
        due = control.should_log  # the Trainer's own numbers, which this would pass for
        self.trainer.log(logs)
        control.should_log = due

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Fit at the weights that training returns, choose the prior precision, and save."""
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        with _randomness_kept(args.device):
            if self._fitted_at != state.global_step or best:
                self._fit(args, state, kwargs)
            if self.optimize:
                self.la.optimize_prior_precision(**self._options)
        if self.save:
            self.la.save_pretrained(args.output_dir, is_main_process=args.should_save)

    # How ----------------------------------------------------------------------------------------

    def _fit(self, args: TrainingArguments, state: TrainerState, kwargs: dict[str, Any]) -> None:
        self.la = None  # its memory is free for the next one
        la = self._posterior(kwargs["model"])
        la.fit(self._loader(args, kwargs["train_dataloader"]), **self.fit_kwargs)
        self.la, self._fitted_at = la, state.global_step

    def _posterior(self, model: nn.Module) -> Any:
        if self.head is not None:
            return Laplace(self.head(model), **self.laplace_kwargs)
        inner = unwrap(model)
        if isinstance(inner, PreTrainedModel) and inner.get_output_embeddings() is not None:
            raise OptionError(
                f"Expected a head, as {type(inner).__name__} is a language model, whose logits are "
                "of tokens and not of choices. Pass head=lambda model: "
                "MultipleChoiceHead.from_tokenizer(model, tokenizer, choices), or another one, and "
                "train_loader=... where the Trainer's labels are tokens."
            )
        return Laplace(model, **self.laplace_kwargs)

    def _loader(self, args: TrainingArguments, trained_on: DataLoader) -> Iterable[Any]:
        return in_order(trained_on, args) if self.train_loader is None else self.train_loader


def in_order(loader: DataLoader, args: TrainingArguments) -> DataLoader:
    """Return a loader of the same data in the data set's order, a shard where there are processes.

    Iterating over the Trainer's own one would move its sampler's random state on. Nothing is
    dropped.

    Parameters
    ----------
    loader : DataLoader
        What the Trainer trains on, as accelerate prepared it.
    args : TrainingArguments
        The Trainer's, for the batch size and the processes.

    Raises
    ------
    DataError
        If the data cannot be had in another order, or it is not known that all are trained on.
    """
    sampler: Any = getattr(loader, "batch_sampler", None)
    while isinstance(sampler, BatchSampler):
        sampler = sampler.batch_sampler if hasattr(sampler, "batch_sampler") else sampler.sampler
    drawn = getattr(sampler, "replacement", False)
    if type(sampler) not in _WHOLE or drawn or getattr(sampler, "_num_samples", None) is not None:
        raise DataError(
            "Expected a Trainer whose data can be passed over once more, each example once, but "
            f"got a {type(loader.dataset).__name__} and a {type(sampler).__name__}. Pass the data "
            "as train_loader=..."
        )
    own: Any = None
    if args.world_size > 1:
        own = DistributedSampler(
            loader.dataset, num_replicas=args.world_size, rank=args.process_index, shuffle=False
        )
    return DataLoader(
        loader.dataset,
        batch_size=args.train_batch_size,
        sampler=own,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        multiprocessing_context=loader.multiprocessing_context,
    )


def _evidence(la: Any) -> dict[str, float]:
    """Return what is logged; the prior precision of the posterior stays what it is."""
    with keeping_prior(la):
        # Not `optimize_prior_precision`: its warning is about predictions under this value.
        parent_marglik(la, "glm", 100, 0.1, 1.0, "scalar", None, False)
        return {
            "laplace_log_marginal_likelihood": float(la.log_marginal_likelihood()),
            "laplace_log_likelihood": float(la.log_likelihood),
            "laplace_prior_precision": float(la.prior_precision),
        }


@contextmanager
def _randomness_kept(device: torch.device) -> Iterator[None]:
    """Leave the random states of Python, NumPy and torch as they were."""
    states = random.getstate(), np.random.get_state()
    kind = "cuda" if device.type == "cpu" else device.type
    devices = [] if device.type == "cpu" else range(torch.get_device_module(device).device_count())
    try:
        with torch.random.fork_rng(list(devices), device_type=kind):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
