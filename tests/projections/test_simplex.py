"""Projections onto the simplex, the l1 ball and the l1 sphere."""

from __future__ import annotations

import torch

from hypergrad import projections
from tests.problems import F64


def test_sparse_points_of_the_simplex():
    v = torch.tensor([0.9, 0.6, 0.5], dtype=F64)
    right = torch.tensor([0.65, 0.35, 0.0], dtype=F64)
    torch.testing.assert_close(projections.sparse_simplex(v, 2), right)
    torch.testing.assert_close(projections.sparse_simplex(v, 7), projections.simplex(v))
    tied = torch.ones(4, dtype=F64)
    expected = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=F64)
    torch.testing.assert_close(projections.sparse_simplex(tied, 2), expected)
