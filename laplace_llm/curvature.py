"""Streaming curvature: taps and seeds in, Kronecker factors, diagonals and GGNs out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laplace_llm import taps
from laplace_llm._compat import CurvatureInterface, Kron
from laplace_llm.adapters import Sides, find_lora_tensors, lora_dtype
from laplace_llm.contrasts import choice_contrasts
from laplace_llm.data import check_labels
from laplace_llm.eigenbasis import EigenbasisMoments
from laplace_llm.errors import AdapterError, OptionError, OutputError
from laplace_llm.factors import LoraKron
from laplace_llm.options import check_optional_count
from laplace_llm.outputs import OutputRows
from laplace_llm.rows import LowRankGGN
from laplace_llm.sketch import DEFAULT_RANK
from laplace_llm.taps import Batch, Taps, gathered
from laplace_llm.tensors import LoraTensor


class BatchSummary(NamedTuple):
    """What a batch contributed besides its curvature.

    Attributes
    ----------
    loss : Tensor
        Negative log likelihood summed over the batch (without the regression normaliser).
    n_outputs : int
        C, the number of classes or regression outputs.
    """

    loss: Tensor
    n_outputs: int


class StreamingInterface(CurvatureInterface):
    """Curvature of LoRA tensors from forward hooks and ``autograd.grad``; no vmap, no Jacobian.

    One forward and one backward pass per seed cover a batch. The `accumulate_*` methods add a
    batch to running sums and are what the ``"lora"`` classes use; `kron`, `diag`, `full`,
    `jacobians` and `gradients` are `laplace-torch`'s interface, so the backends also work in its
    own classes, on a model whose only trainable parameters are LoRA's.

    Parameters
    ----------
    model : torch.nn.Module
        Maps one batch to (B, C) logits.
    likelihood : {'classification', 'regression'}
        Determines the seeds.
    last_layer : bool, default=False
        Not supported; part of the parent's signature.
    subnetwork_indices : Tensor, optional
        Columns to keep in `diag`, `full`, `jacobians` and `gradients`.
    dict_key_x, dict_key_y : str
        As in the parent.
    kfac_approx : {'reduce', 'expand'}, default='reduce'
        How tokens are summarised (Eschenhagen et al., *Kronecker-Factored Approximate Curvature
        for Modern Neural Network Architectures*, NeurIPS 2023). Padding is masked in both.
        'reduce': the mean input and the summed gradient of an example. 'expand': every token
        counts as an example, as in curvlinops.
    rank : int, optional
        Rank of the approximation of a factor's long side, by a sketch of 2 `rank` columns; sides
        of up to 2 `rank` are exact. Default: 64.
    adapter : str, optional
        Adapter's name; default: the active one.
    tensors : {'AB', 'B'} or Sequence[LoraTensor], default='AB'
        All of the adapter's LoRA tensors, ``lora_B`` alone, or the very tensors.

    Raises
    ------
    OptionError
        If an option has a value that is not allowed.
    AdapterError
        If the model's trainable parameters are not exactly one adapter's LoRA tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        kfac_approx: Literal["reduce", "expand"] = "reduce",
        rank: int | None = None,
        adapter: str | None = None,
        tensors: Sides | Sequence[LoraTensor] = "AB",
    ) -> None:
        if last_layer:
            raise OptionError(
                f"{type(self).__name__} works on LoRA tensors, not on a last layer. Use the "
                "parent's default backend with subset_of_weights='last_layer'."
            )
        if kfac_approx not in ("reduce", "expand"):
            raise OptionError(
                f"Expected kfac_approx 'reduce' or 'expand', but got {kfac_approx!r}."
            )
        check_optional_count("rank", rank)
        super().__init__(model, likelihood, False, subnetwork_indices, dict_key_x, dict_key_y)
        self.kfac_approx = kfac_approx
        self.rank = rank
        if isinstance(tensors, str):
            tensors = find_lora_tensors(model, adapter, tensors)
        self.tensors = list(tensors)
        self.dtype = lora_dtype(self.tensors)
        _check_trainable(self.params_dict, [tensor.name for tensor in self.tensors])

    def options(self) -> dict[str, Any]:
        """Return the constructor's options of the curvature, defaults worked out."""
        rank = DEFAULT_RANK if self.rank is None else self.rank
        return {"kfac_approx": self.kfac_approx, "rank": rank}

    @abstractmethod
    def _seeds(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return (B, C, K) seeds of the loss's curvature in logit space."""

    def _forward(self, x: Batch, y: Tensor) -> tuple[Taps, Tensor, BatchSummary]:
        """Return the taps, the seeds (B, C, K) and the summary of a batch."""
        run = taps.forward(self.model, self.tensors, x)
        logits = run.logits.detach().to(self.dtype)
        y = check_labels(y, logits, self.likelihood == "regression")
        loss = self.factor * self.lossfunc(logits, y)
        return run, self._seeds(logits, y), BatchSummary(loss, logits.shape[1])

    def _rows(self, run: Taps, seeds: Tensor) -> Iterator[Tensor]:
        """Yield the per-example gradients (B, P) of each seed."""
        for blocks in run.sweep(seeds, self._outer(run)):
            yield self._subnetwork(gathered(blocks, 1))

    def _outer(self, run: Taps) -> Callable[[int, Tensor], Tensor]:
        """Return what turns output gradients (B, S, out) into gradients (B, out * in)."""

        def outer(index: int, gradient: Tensor) -> Tensor:
            tensor, inputs = self.tensors[index], run.inputs(index)
            return tensor.outer(gradient.to(self.dtype), inputs).flatten(1)

        return outer

    def _subnetwork(self, values: Tensor) -> Tensor:
        if self.subnetwork_indices is None:
            return values
        return values[..., self.subnetwork_indices.to(values.device)]

    def accumulate_kron(self, state: LoraKron, x: Batch, y: Tensor) -> BatchSummary:
        """Add a batch to the factors in place."""
        run, columns, summary = self._forward(x, y)
        state.share_inputs(run.sources)
        for index in state.own_inputs():
            state.pairs[index].inputs.add(self._summarise_inputs(run, index))

        def add(index: int, gradient: Tensor) -> None:
            gradient = gradient.to(self.dtype)
            reduce = self.kfac_approx == "reduce"
            state.pairs[index].outputs.add(gradient.sum(1) if reduce else gradient.flatten(0, 1))

        for _ in run.sweep(columns, add):
            pass
        state.n_data += len(y)
        self._check_finite(torch.stack([pair.largest_trace.cpu() for pair in state.pairs]))
        return summary

    def _summarise_inputs(self, run: Taps, index: int) -> Tensor:
        """Return the rows (n, in) whose second moment is the input factor."""
        tensor, inputs, counts = self.tensors[index], run.inputs(index), run.token_counts(index)
        if self.kfac_approx == "reduce":
            return tensor.total(inputs, self.dtype) / counts
        inputs = tensor.dense(inputs, self.dtype)
        return (inputs / torch.as_tensor(counts).to(inputs).sqrt()[..., None]).flatten(0, 1)

    def accumulate_eigenvalues(self, state: EigenbasisMoments, x: Batch, y: Tensor) -> BatchSummary:
        """Add a batch's gradients along the axes of an eigenbasis in place."""
        run, columns, summary = self._forward(x, y)
        outer = self._outer(run)
        for _ in run.sweep(columns, lambda i, g: state.add(i, outer(i, g))):
            pass
        self._check_finite(torch.stack([total.sum().cpu() for total in state.totals]))
        return summary

    def accumulate_diag(self, state: Tensor, x: Batch, y: Tensor) -> BatchSummary:
        """Add a batch to the diagonal (P,) in place."""
        run, columns, summary = self._forward(x, y)
        outer = self._outer(run)
        squares = run.sweep(columns, lambda i, g: outer(i, g).square().sum(0))
        for parts in squares:
            state += self._subnetwork(gathered(parts))
        self._check_finite(state)
        return summary

    def accumulate_full(self, state: Tensor, x: Batch, y: Tensor) -> BatchSummary:
        """Add a batch to the dense curvature (P, P) in place."""
        run, columns, summary = self._forward(x, y)
        for rows in self._rows(run, columns):
            rows = rows.to(state)
            state.addmm_(rows.T, rows)
        self._check_finite(state.diagonal())
        return summary

    def accumulate_rows(self, state: LowRankGGN, x: Batch, y: Tensor) -> BatchSummary:
        """Add a batch's rows, whose second moment is its curvature, in place."""
        run, columns, summary = self._forward(x, y)
        for rows in self._finite_rows(run, columns):
            state.add(rows)
        return summary

    def accumulate_outputs(self, state: OutputRows, x: Batch, y: Tensor) -> BatchSummary:
        """Add the Jacobian rows of a batch's outputs in place, with the curvature of each."""
        run, seeds, summary = self._forward(x, y)
        residuals = torch.zeros_like(run.logits)
        if self.likelihood == "regression":
            residuals = check_labels(y, run.logits, True) - run.logits.detach()
        jacobian = self._finite_rows(run, torch.eye(summary.n_outputs).to(run.logits))
        state.add_outputs(jacobian, seeds.square().sum(-1), residuals)
        return summary

    def _finite_rows(self, run: Taps, seeds: Tensor) -> Iterator[Tensor]:
        for rows in self._rows(run, seeds):
            self._check_finite(rows.abs().amax(0))
            yield rows

    def _check_finite(self, values: Tensor) -> None:
        """Raise an error that names the first tensor with non-finite curvature.

        `values` holds one number a tensor, or one a weight; what is beyond the adapter's precision
        is not finite.
        """
        values = values.to(self.dtype)
        if bool(values.isfinite().all()):
            return
        position = int((~values.isfinite()).nonzero()[0])
        if len(values) != len(self.tensors) and self.subnetwork_indices is not None:
            position = int(self.subnetwork_indices[position])
        name = self.tensors[min(position, len(self.tensors) - 1)].name
        if len(values) != len(self.tensors):
            ends = torch.tensor([t.numel for t in self.tensors]).cumsum(0)
            name = self.tensors[int((ends <= position).sum())].name
        raise OutputError(
            f"Expected finite curvature, but NaN or inf came out of the activations or gradients "
            f"of {name!r}. Check the batch and the model's precision (float16 overflows)."
        )

    def jacobian_blocks(
        self, x: Batch, create_graph: bool = False, centred: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """Return the Jacobian of each tensor, (B, K, out * in), and the outputs (B, C).

        One forward and K backward passes. Every Jacobian is on its tensor's device, the outputs on
        that of the first tensor.

        Parameters
        ----------
        x : Batch
            Model inputs.
        create_graph : bool, default=False
            Whether the result is to be differentiated with respect to the inputs.
        centred : bool, default=False
            Whether to project the outputs on the K = C - 1 contrasts of the choices that each
            example has (`laplace_llm.contrasts`); else, or for a single output, K = C.
        """
        run = taps.forward(self.model, self.tensors, x, create_graph)
        directions = torch.eye(run.logits.shape[1])
        if centred and run.logits.shape[1] > 1:
            directions = choice_contrasts(run.logits.isfinite(), run.logits.detach())
        return self._blocks(run, directions, create_graph)

    def _blocks(
        self, run: Taps, directions: Tensor, create_graph: bool
    ) -> tuple[list[Tensor], Tensor]:
        columns = run.sweep(directions.to(run.logits), self._outer(run), create_graph)
        blocks = [list(block) for block in zip(*columns, strict=True)]
        outputs = run.logits if create_graph else run.logits.detach()
        jacobians = []
        while blocks:  # free each tensor's list as soon as it is stacked
            jacobians.append(torch.stack(blocks.pop(0), 1))
        return jacobians, outputs.to(self.tensors[0].weight.device, self.dtype)

    # laplace-torch's interface ------------------------------------------------------------------

    def jacobians(self, x: Batch, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Return Jacobians (B, C, P) and outputs (B, C)."""
        with torch.enable_grad():
            blocks, outputs = self.jacobian_blocks(x, create_graph=enable_backprop)
        return self._subnetwork(gathered(blocks, -1)), outputs

    def selected_output_jacobians(
        self, x: Batch, outputs: Tensor, enable_backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return Jacobians (B, S, P) of S outputs of each example, and all outputs (B, C).

        One forward and S backward passes.

        Parameters
        ----------
        x : Batch
            Model inputs.
        outputs : Tensor
            (B,) or (B, S), indices of outputs.
        enable_backprop : bool, default=False
            Whether the result is to be differentiated with respect to the inputs.
        """
        with torch.enable_grad():
            run = taps.forward(self.model, self.tensors, x, enable_backprop)
            chosen = outputs.to(run.logits.device).view(len(outputs), -1)
            directions = F.one_hot(chosen, run.logits.shape[1]).mT
            blocks, values = self._blocks(run, directions, enable_backprop)
        return self._subnetwork(torch.cat(blocks, -1)), values

    def gradients(self, x: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss's per-example gradients (B, P) and the summed loss."""
        with torch.enable_grad():
            run = taps.forward(self.model, self.tensors, x)
            y = check_labels(y, run.logits, self.likelihood == "regression")
            loss = self.lossfunc(run.logits.to(self.dtype), y)
            (cotangent,) = torch.autograd.grad(loss, run.logits, retain_graph=True)
            (rows,) = self._rows(run, cotangent[..., None])
            return rows, loss.detach()

    def kron(self, x: Batch, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Return the batch's loss and factors as the parent's dense `Kron`, scaled for N examples.

        The parent's own classes hold dense factors, so `rank` has no effect here.
        """
        longest = max(max(tensor.shape) for tensor in self.tensors)
        state = LoraKron.empty(self.tensors, longest, self.dtype)
        with torch.enable_grad():
            loss = self.accumulate_kron(state, x, y).loss
        factors: list[list[Any]] = []
        for tensor, pair in zip(self.tensors, state.pairs, strict=True):
            outputs, inputs = pair.outputs.matrix, pair.inputs.matrix / N  # type: ignore[union-attr]
            # The parent has one factor for what has one dimension.
            factors.append([outputs, inputs] if tensor.weight.ndim > 1 else [outputs * inputs])
        return loss, Kron(factors)

    def diag(self, x: Batch, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the batch's loss and the diagonal of its curvature, (P,)."""
        return self._accumulated(self.accumulate_diag, (self._size,), x, y)

    def full(self, x: Batch, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the batch's loss and its dense curvature, (P, P)."""
        return self._accumulated(self.accumulate_full, (self._size, self._size), x, y)

    @property
    def _size(self) -> int:
        if self.subnetwork_indices is not None:
            return len(self.subnetwork_indices)
        return sum(tensor.numel for tensor in self.tensors)

    def _accumulated(
        self,
        accumulate: Callable[[Tensor, Batch, Tensor], BatchSummary],
        shape: tuple[int, ...],
        x: Batch,
        y: Tensor,
    ) -> tuple[Tensor, Tensor]:
        state = torch.zeros(shape, dtype=self.dtype, device=self.tensors[0].weight.device)
        with torch.enable_grad():
            return accumulate(state, x, y).loss, state


def check_backend(backend: Any) -> None:
    """Raise OptionError unless the backend is a class of backends, or None."""
    if backend is None or (isinstance(backend, type) and issubclass(backend, CurvatureInterface)):
        return
    raise OptionError(
        f"Expected backend to be a class such as StreamingGGN, but got {backend!r}. Leave it out "
        "for the default; its arguments go into backend_kwargs=..."
    )


def check_streaming(backend: type[CurvatureInterface] | None, needed: str) -> None:
    """Raise OptionError unless the backend is the default or another streaming one."""
    check_backend(backend)
    if backend is not None and not issubclass(backend, StreamingInterface):
        raise OptionError(
            f"{backend.__name__} cannot give {needed}. Leave out backend=..., or use "
            "StreamingGGN or StreamingEF."
        )


def _check_trainable(trainable: dict[str, nn.Parameter], names: list[str]) -> None:
    """Compare the parent's choice of parameters (``requires_grad``) with the LoRA tensors."""
    extra = [name for name in trainable if name not in set(names)]
    missing = [name for name in names if name not in trainable]
    if extra or missing:
        raise AdapterError(
            f"Expected exactly the adapter's {len(names)} LoRA tensors to be trainable, but "
            f"{len(extra)} other parameters are too (such as {extra[:1]}) and {len(missing)} LoRA "
            f"tensors are not (such as {missing[:1]}). Use subset_of_weights='lora', which chooses "
            "them by itself, or set requires_grad accordingly."
        )
