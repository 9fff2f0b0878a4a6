"""Soft thresholding of singular values that tie or vanish."""

from __future__ import annotations

import math

import pytest
import torch

import hypergrad
from hypergrad import prox
from tests.problems import F64, data

V = torch.tensor([1.3, -0.2, 0.4, -2.0, 0.05, 0.6], dtype=F64)
T = torch.tensor(0.35, dtype=F64)
A, B = data(80, 2, 6, dtype=F64), data(81, 2, dtype=F64)


def test_singular_values_that_tie_have_their_derivative():
    """PyTorch's own derivative of the decomposition is infinite there."""
    shrunk = lambda v: prox.nuclear(v, 1.0, 0.4)
    for v in (torch.eye(3), torch.diag(torch.tensor([2.0, 2.0, 0.1])), torch.zeros(3, 2)):
        v = v.to(F64)
        directions = data(85, 4, *v.shape, dtype=F64)
        for direction in directions:
            ends = shrunk(v + 1e-6 * direction), shrunk(v - 1e-6 * direction)
            tangent = torch.func.jvp(shrunk, (v,), (direction,))[1]
            torch.testing.assert_close(tangent, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-8)
    with pytest.raises(hypergrad.StructureMismatch, match="nuclear takes matrices"):
        prox.nuclear(V, 1.0, T)
    with pytest.raises(hypergrad.StructureMismatch, match="one number for each leaf"):
        prox.nuclear(A, 1.0, T * torch.ones(2, dtype=F64))
    assert prox.nuclear(A * math.nan, 1.0, T).isnan().all()
