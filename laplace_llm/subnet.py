"""LoRA weights as a subnetwork of the parent's own subnetwork Laplace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from laplace_llm._compat import SubnetMask
from laplace_llm.adapters import find_lora_tensors
from laplace_llm.errors import AdapterError


class LoraSubnetMask(SubnetMask):
    """Indices of one adapter's LoRA weights, for ``subset_of_weights="subnetwork"``.

    The parent's subnetwork Laplace indexes the vector of *trainable* parameters, its masks that of
    *all* parameters. The two differ as soon as the base is frozen; this mask follows the former,
    which is what its indices are used for.

    Parameters
    ----------
    model : torch.nn.Module
        Any module with PEFT LoRA layers somewhere inside.
    adapter : str, optional
        Adapter's name; default: the active one.

    Raises
    ------
    AdapterError
        If there are no such LoRA tensors, or they do not require gradients.
    """

    def __init__(self, model: nn.Module, adapter: str | None = None) -> None:
        self.tensors = find_lora_tensors(model, adapter)
        frozen = [t.name for t in self.tensors if not t.weight.requires_grad]
        if frozen:
            raise AdapterError(
                f"Expected trainable LoRA tensors, as the parent's subnetwork Laplace takes "
                f"parameters by requires_grad, but {frozen[0]!r} is frozen. Load the adapter with "
                "is_trainable=True, or use subset_of_weights='lora', which needs no such flag."
            )
        self.model = model
        self._indices: Tensor | None = None
        self._n_params_subnet: int | None = None
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        self._n_params = sum(p.numel() for p in self._trainable)

    @property
    def parameter_vector(self) -> Tensor:
        """All trainable parameters as one vector, the one that the indices point into."""
        return torch.cat([p.detach().flatten() for p in self._trainable])

    def get_subnet_mask(self, train_loader: Any = None) -> Tensor:
        """Return the boolean mask over trainable parameters; the loader is not used."""
        chosen = {tensor.weight for tensor in self.tensors}
        return torch.cat(
            [torch.full((p.numel(),), p in chosen, device=p.device) for p in self._trainable]
        )
