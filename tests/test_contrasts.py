"""Contrasts: an orthonormal basis of the differences between an example's choices."""

from itertools import product

import pytest
import torch

from laplace_llm.contrasts import choice_contrasts, contrasts

EXACT = {"rtol": 1e-12, "atol": 1e-14}


@pytest.mark.parametrize("classes", [2, 3, 7, 50])
def test_contrasts_are_an_orthonormal_basis_of_what_sums_to_zero(classes):
    basis = contrasts(classes, torch.zeros(()).double())
    assert basis.shape == (classes, classes - 1)
    identity = torch.eye(classes - 1).double()
    torch.testing.assert_close(basis.T @ basis, identity, **EXACT)
    torch.testing.assert_close(basis.sum(0), torch.zeros(classes - 1).double(), **EXACT)
    centre = torch.eye(classes).double() - 1 / classes
    torch.testing.assert_close(basis @ basis.T, centre, **EXACT)


def test_contrasts_of_some_choices_span_the_differences_between_them():
    present = torch.tensor([p for p in product([True, False], repeat=5) if any(p)])
    for here, basis in zip(
        present, choice_contrasts(present, torch.zeros(()).double()), strict=True
    ):
        used = basis[:, basis.abs().sum(0) > 0]
        assert used.shape[1] == here.sum() - 1
        torch.testing.assert_close(used.T @ used, torch.eye(used.shape[1]).double(), **EXACT)
        one = here.double()
        centre = one.diag() - torch.outer(one, one) / one.sum()
        torch.testing.assert_close(basis @ basis.T, centre, **EXACT)


def test_the_first_choices_have_the_contrasts_of_so_many():
    for count in range(1, 6):
        basis = choice_contrasts(torch.arange(5) < count, torch.zeros(()).double())
        torch.testing.assert_close(
            basis[:count, : count - 1], contrasts(count, torch.zeros(()).double()), **EXACT
        )
        assert not basis[count:].any()
        assert not basis[:, count - 1 :].any()
