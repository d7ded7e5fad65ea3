"""The errors of this package: each says what was expected, what came, and what to do.

Every class also derives from the type that `laplace-torch`, torch or Python would raise in its
place, so existing ``except ValueError`` code keeps working.
"""

import torch


class LaplaceLLMError(Exception):
    """Base class of all errors raised by `laplace_llm`."""


class AdapterError(LaplaceLLMError, ValueError):
    """The model has no LoRA tensors to work on, or not the ones that were asked for."""


class UnsupportedLayerError(AdapterError):
    """A LoRA container of a kind that is not supported yet."""


class TapError(LaplaceLLMError, RuntimeError):
    """The activations of a LoRA tensor could not be read or assigned to examples."""


class DataError(LaplaceLLMError, ValueError):
    """A loader, batch or label is not what the likelihood needs."""


class OutputError(LaplaceLLMError, ValueError):
    """The model's output is not a finite (B, C) matrix of logits."""


class NotFittedError(LaplaceLLMError, AttributeError):
    """A posterior was used before `fit`; `laplace-torch` raises AttributeError there."""


class PriorError(LaplaceLLMError, ValueError):
    """A prior precision or mean of the wrong length, sign or type."""


class OptionError(LaplaceLLMError, ValueError):
    """An option has a value that is not allowed, or is not allowed here."""


class StateError(LaplaceLLMError, ValueError):
    """A saved state does not belong to this model, adapter or posterior."""


class StorageError(LaplaceLLMError, OSError):
    """A file could not be written; what was to be written is still in memory."""


class ShardError(LaplaceLLMError, RuntimeError):
    """Another of the processes that share the data has failed."""


class DecompositionError(LaplaceLLMError, torch.linalg.LinAlgError):
    """A matrix that is not finite, or whose decomposition failed in float64 too."""
