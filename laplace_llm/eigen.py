"""Matrix decompositions that may fail: tried again in float64 on the CPU, then an error of ours.

All eigendecompositions and Cholesky factorisations of this package come by here. In their place
laplace-torch raises an error that names nothing, or ends the process (`laplace.utils.symeig`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from laplace_llm.errors import DecompositionError


def eigh(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (..., n), ascending, and eigenvectors (..., n, n).

    Parameters
    ----------
    matrix : Tensor
        (..., n, n), symmetric.
    what : str
        What the matrix is, for the error's message.

    Raises
    ------
    DecompositionError
        If the matrix is not finite, or the solver fails in float64 on the CPU as well.
    """
    values, vectors = _tried_twice(torch.linalg.eigh, matrix, what)
    return values, vectors


def cholesky(matrix: Tensor, what: str) -> Tensor:
    """Return the lower Cholesky factor (..., n, n) of positive definite matrices; see `eigh`."""
    (factor,) = _tried_twice(lambda values: (torch.linalg.cholesky(values),), matrix, what)
    return factor


@contextmanager
def decomposing(what: str) -> Iterator[None]:
    """Raise DecompositionError where a solver fails that there is nothing in place of."""
    try:
        yield
    except DecompositionError:
        raise
    except torch.linalg.LinAlgError as error:
        raise _failed(what, str(error)) from error


def _tried_twice(
    decompose: Callable[[Tensor], tuple[Tensor, ...]], matrix: Tensor, what: str
) -> tuple[Tensor, ...]:
    if not bool(matrix.isfinite().all()):
        raise DecompositionError(
            f"Expected finite numbers in {what}, but there are NaN or inf. Check the data and the "
            f"model's precision: {matrix.dtype} ends at {torch.finfo(matrix.dtype).max:.0e}."
        )
    results = _tried(decompose, matrix)
    if isinstance(results, RuntimeError):
        results = _tried(decompose, matrix.to("cpu", torch.float64))
    if isinstance(results, RuntimeError):
        raise _failed(what, f"failed in float64 on the CPU too: {results}") from results
    return tuple(result.to(matrix) for result in results)


def _tried(
    decompose: Callable[[Tensor], tuple[Tensor, ...]], matrix: Tensor
) -> tuple[Tensor, ...] | RuntimeError:
    """Return the decomposition, or how it failed."""
    try:
        results = decompose(matrix)
    except torch.linalg.LinAlgError as error:
        return error
    except RuntimeError as error:
        if "cusolver" not in str(error).lower():  # CUDA's solver says so when it fails
            raise
        return error
    if not all(bool(result.isfinite().all()) for result in results):
        return RuntimeError("the solver returned NaN.")
    return results


def _failed(what: str, reason: str) -> DecompositionError:
    return DecompositionError(
        f"Expected a decomposition of {what}, but the solver {reason} Use a larger prior "
        "precision, or load the adapter in float32 or float64."
    )
