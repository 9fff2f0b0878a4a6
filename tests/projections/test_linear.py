"""Projections onto linear equations: of bad condition, and with dependent rows."""

from __future__ import annotations

import pytest
import torch

from hypergrad import projections
from tests.problems import F64, data

V = torch.tensor([1.3, -0.2, 0.4, -2.0, 0.05, 0.6], dtype=F64)


A, B = data(80, 2, 6, dtype=F64), data(81, 2, dtype=F64)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_an_affine_set_of_bad_condition_is_met(scale):
    rows = torch.stack([A[0], A[0] + scale * 1e-4 * A[1]])
    x = projections.affine_set(V, rows, B)
    # To the accuracy of the constraints themselves, and not to their condition number squared.
    assert (rows @ x - B).norm() < 1e-9 * x.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_dependent_rows_of_an_affine_set_give_numbers_that_are_not_finite(dtype):
    """Rounding makes them look independent, and the point that came back was another one."""
    rows = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]], dtype=dtype)
    v = torch.tensor([0.5, 0.2, -0.1], dtype=dtype)
    torch.manual_seed(0)
    more = torch.randn(3, 6, dtype=dtype)
    more = torch.cat([more, 2 * more[:1] - 3 * more[1:2]])
    for point, A, b in (
        (v, rows, torch.tensor([1.0, 2.0], dtype=dtype)),
        (v, rows, torch.tensor([1.0, 3.0], dtype=dtype)),
        (torch.ones(6, dtype=dtype), more, more.sum(dim=1)),
    ):
        assert projections.affine_set(point, A, b).isnan().all()
        both = torch.func.vmap(projections.affine_set, in_dims=(0, None, None))
        assert both(torch.stack([point, -point]), A, b).isnan().all()
