"""A ridge with a weight for each feature, whose hypergradient is there in closed form."""

from __future__ import annotations

import pytest
import torch

D = torch.float64
MATRIX = torch.tensor([[3.0, 1.0, 0.5], [1.0, 2.0, 0.2], [0.5, 0.2, 4.0]], dtype=D)
TARGET = torch.tensor([1.0, -2.0, 0.5], dtype=D)


def inner(w, h):
    """A ridge with a weight for each feature; w* = (M + diag h)^-1 c."""
    return w @ MATRIX @ w / 2 - TARGET @ w + (h * w * w).sum() / 2


def outer(w, h):
    return ((w - 1) ** 2).sum() / 2 + (h**2).sum()


def solution(h):
    return torch.linalg.solve(MATRIX + torch.diag(h), TARGET)


def expected(h):
    h = h.detach().clone().requires_grad_()
    return torch.autograd.grad(outer(solution(h), h), h)[0]


@pytest.fixture
def h():
    return torch.tensor([0.3, 0.7, 1.1], dtype=D)
