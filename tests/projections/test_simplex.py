"""Projections onto the simplex, the l1 ball and the l1 sphere."""

from __future__ import annotations

import pytest
import torch
from torch.func import jacrev

from hypergrad import projections
from tests.problems import F64, data


def test_sparse_points_of_the_simplex():
    v = torch.tensor([0.9, 0.6, 0.5], dtype=F64)
    right = torch.tensor([0.65, 0.35, 0.0], dtype=F64)
    torch.testing.assert_close(projections.sparse_simplex(v, 2), right)
    torch.testing.assert_close(projections.sparse_simplex(v, 7), projections.simplex(v))
    tied = torch.ones(4, dtype=F64)
    expected = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=F64)
    torch.testing.assert_close(projections.sparse_simplex(tied, 2), expected)


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@DTYPES
def test_the_simplex_is_met_to_the_last_digits(dtype):
    for offset in (0.0, 1e4):
        v = (data(83, 50, dtype=F64) + offset).to(dtype)
        x = projections.simplex(v)
        assert x.dtype == dtype
        assert (x >= 0).all()
        assert abs(float(x.double().sum()) - 1) < 50 * torch.finfo(dtype).eps


def test_ties_on_the_simplex_are_treated_alike():
    v = torch.tensor([0.5, 0.5, 0.5, -1.0, -1.0], dtype=F64)
    third = torch.full((3,), 1 / 3, dtype=F64)
    expected = torch.cat([third, torch.zeros(2, dtype=F64)])
    torch.testing.assert_close(projections.simplex(v), expected, rtol=1e-15, atol=0)
    J = jacrev(projections.simplex)(v)
    on = torch.tensor([1.0, 1, 1, 0, 0], dtype=F64)
    torch.testing.assert_close(J, on.diag() - torch.outer(on, on) / 3)
    # The second largest two tie exactly at the threshold: both count as held at zero.
    v = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    torch.testing.assert_close(projections.simplex(v), v)
    assert torch.equal(jacrev(projections.simplex)(v), torch.zeros(3, 3, dtype=F64))


def test_the_simplex_of_radius_zero_is_the_origin():
    v = torch.tensor([0.5, 0.5, -3.0], dtype=F64)
    zero = torch.zeros(3, dtype=F64)
    assert torch.equal(projections.simplex(v, 0.0), zero)
    assert torch.equal(projections.simplex(v, torch.tensor(0.0, dtype=F64)), zero)
    assert torch.equal(
        jacrev(lambda v: projections.simplex(v, 0.0))(v), torch.zeros(3, 3, dtype=F64)
    )
    assert projections.simplex(v, 1e-300).sum() == pytest.approx(1e-300, rel=1e-12)
    assert projections.simplex(v.log(), 0.0).isnan().any()


def test_the_simplex_along_another_dimension():
    v = data(84, 4, 3, dtype=F64)
    columns = torch.stack([projections.simplex(c, 2.0) for c in v.T], dim=1)
    torch.testing.assert_close(projections.simplex(v, 2.0, dim=0), columns)
    torch.testing.assert_close(projections.simplex(v.T, 2.0), columns.T)
