"""Eigenvalue-corrected Kronecker Laplace over LoRA weights, ``("lora", "ekfac")``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace_llm._compat import CurvatureInterface
from laplace_llm.adapters import Sides
from laplace_llm.checkpoints import Checkpoints
from laplace_llm.curvature import check_streaming
from laplace_llm.eigenbasis import EigenbasisMoments
from laplace_llm.errors import DataError
from laplace_llm.factors import LoraKron
from laplace_llm.session import undisturbed_calls
from laplace_llm.shards import Shard, as_shard
from laplace_llm.structures.kron import KronLoraLaplace


class Corrected(NamedTuple):
    """Kronecker factors, and the second moments of gradients in their eigenbasis."""

    factors: LoraKron
    moments: EigenbasisMoments


@undisturbed_calls
class EkfacLoraLaplace(KronLoraLaplace):
    """Eigenvalue-corrected Kronecker Laplace over LoRA weights, ``("lora", "ekfac")``.

    The eigenvectors are those of `KronLoraLaplace`'s factors (of either ``kfac_approx``, which
    decides nothing else here); the eigenvalues are the GGN's own second moments along them, in
    place of the products of the factors' eigenvalues. Of all matrices with these eigenvectors it
    is the closest to each tensor's GGN (`laplace_llm.eigenbasis`; on the complement of a sketch
    each row of the small factor's basis has one value). It takes two passes over the data. With
    ``stochastic=True`` the second one draws labels of its own.

    Source: George et al., *Fast Approximate Natural Gradient Descent in a Kronecker-factored
    Eigenbasis*, NeurIPS 2018.

    Parameters
    ----------
    *args, **kwargs
        See `LoraPosterior`; the backend must be one of the streaming ones. There is no `damping`,
        which is about factors.

    Raises
    ------
    OptionError
        If the backend is not one of these.
    """

    _key = ("lora", "ekfac")

    def __init__(
        self,
        model: nn.Module,
        likelihood: str = "classification",
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        adapter: str | None = None,
        tensors: Sides = "AB",
        include_modules_to_save: bool = False,
    ) -> None:
        check_streaming(backend, "per-example gradients")
        super().__init__(
            model, likelihood, sigma_noise, prior_precision, prior_mean, temperature,
            enable_backprop, dict_key_x, dict_key_y, backend, False, backend_kwargs,
            asdl_fisher_kwargs, adapter, tensors, include_modules_to_save,
        )  # fmt: skip

    def fit(
        self,
        train_loader: DataLoader | Iterable[Any],
        override: bool = True,
        progress_bar: bool = False,
        **checkpoints: Any,
    ) -> None:
        """Fit the posterior at the model's present weights, in two passes over the data.

        Parameters
        ----------
        train_loader : Iterable
            As in `LoraLaplace`, but no iterator: it must yield the same examples in each pass, in
            any order.
        override : bool, default=True
            Whether to start anew; False adds the data to those of earlier fits. New data change the
            eigenbasis, so the second pass is over the loaders of the earlier fits as well.
        progress_bar : bool, default=False
            Whether to show one.
        **checkpoints
            ``checkpoint_dir`` and ``checkpoint_every``, as in `LoraLaplace`.

        Raises
        ------
        DataError
            As in `LoraLaplace`; also if `train_loader` is an iterator, if the earlier loaders are
            gone (the posterior was loaded), or if a pass has more examples than the other.
        OutputError
            As in `LoraLaplace`. As with every error, an earlier posterior stays as it was.
        """
        if isinstance(as_shard(train_loader).loader, Iterator):
            raise DataError(
                "Expected a loader that can be passed over twice, but got an iterator "
                f"({type(train_loader).__name__}), which is used up by then. Give a DataLoader or "
                "a list of batches."
            )
        if not override and self.H is not None and self._train_loaders is None:
            raise DataError(
                "Expected the data of earlier fits for fit(override=False), as new data change the "
                "eigenbasis, but a loaded posterior has none. Fit all data with override=True."
            )
        super().fit(train_loader, override, progress_bar, **checkpoints)

    def _init_H(self) -> None:
        super()._init_H()
        self.H_moments: EigenbasisMoments | None = None

    def _completed(
        self,
        state: LoraKron,
        merge: bool,
        loaders: list[Iterable[Any]],
        progress_bar: bool,
        checkpoints: Checkpoints | None,
    ) -> Corrected:
        if merge and self.H_facs is not None:
            state.merge(self.H_facs)
        blocks, n_data = state.decompose().blocks, 0
        moments = EigenbasisMoments(blocks)
        for loader in loaders:
            sums = self._sums_over(
                as_shard(loader),
                partial(EigenbasisMoments, blocks),
                self._streaming.accumulate_eigenvalues,
                "[Correcting eigenvalues]",
                progress_bar,
                checkpoints,
            )
            moments.merge(sums.state)
            n_data += sums.n_data
        if n_data != state.n_data:
            raise DataError(
                f"Expected the same {state.n_data} examples in both passes over the data, but the "
                f"second one had {n_data}. Give loaders that can be passed over again."
            )
        return Corrected(state, moments)

    def _over_all(self, state: Any, shard: Shard) -> Any:
        if isinstance(state, LoraKron):
            return super()._over_all(state, shard)
        shard.sum(state.tensors())
        return state

    def _set_curvature(self, state: Any, merge: bool) -> None:
        self.H = state.moments.decompose()
        self.H_facs, self.H_moments = state

    def _options(self) -> dict[str, Any]:
        return {key: value for key, value in super()._options().items() if key != "damping"}

    def _curvature_state(self) -> dict[str, Any]:
        assert self.H_moments is not None
        return {"factors": super()._curvature_state(), "moments": self.H_moments.state()}

    def _curvature_from_state(self, state: dict[str, Any]) -> Corrected:
        factors = super()._curvature_from_state(state["factors"])
        empty = EigenbasisMoments(factors.decompose().blocks)
        return Corrected(factors, empty.load(state["moments"]))
