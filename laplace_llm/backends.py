"""The streaming backends: which seeds the curvature is made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from laplace_llm import seeds
from laplace_llm._compat import EFInterface, GGNInterface
from laplace_llm.curvature import StreamingInterface
from laplace_llm.errors import OptionError
from laplace_llm.options import check_count, check_flag


class StreamingGGN(StreamingInterface, GGNInterface):
    """Generalised Gauss-Newton (type-2 Fisher) of LoRA tensors, exact or Monte-Carlo.

    Parameters
    ----------
    stochastic : bool, default=False
        Draw labels from the model instead of using all C - 1 directions of the output Hessian.
    mc_samples : int, default=1
        Number of labels drawn for each example where `stochastic`.
    **kwargs
        See `StreamingInterface`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        mc_samples: int = 1,
        **kwargs: Any,
    ) -> None:
        check_count("mc_samples", mc_samples)
        check_flag("stochastic", stochastic)
        super().__init__(
            model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, **kwargs
        )
        self.stochastic = stochastic
        self.mc_samples = mc_samples

    def options(self) -> dict[str, Any]:
        """Return the constructor's options of the curvature, defaults worked out."""
        sampled = {"stochastic": self.stochastic, "mc_samples": self.mc_samples}
        return {**super().options(), **sampled}

    def _seeds(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.likelihood == "regression":
            if self.stochastic:
                return seeds.sampled_regression_seeds(logits, self.mc_samples)
            return seeds.regression_seeds(logits)
        if self.stochastic:
            return seeds.sampled_softmax_seeds(logits, self.mc_samples)
        return seeds.softmax_seeds(logits)


class StreamingEF(StreamingInterface, EFInterface):
    """Empirical Fisher of LoRA tensors: one backward pass a batch, from the labels themselves.

    Takes the arguments of `StreamingInterface`. `stochastic` and `mc_samples` have no meaning
    here and are accepted at their defaults only.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        mc_samples: int = 1,
        **kwargs: Any,
    ) -> None:
        if stochastic or mc_samples != 1:
            raise OptionError(
                "The empirical Fisher uses the labels and draws none, but stochastic or mc_samples "
                "was given. Use StreamingGGN for a Monte-Carlo Fisher."
            )
        super().__init__(
            model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, **kwargs
        )

    def _seeds(self, logits: Tensor, labels: Tensor) -> Tensor:
        return seeds.empirical_seeds(logits, labels, self.likelihood == "regression")
