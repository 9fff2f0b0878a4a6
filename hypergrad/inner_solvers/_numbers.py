"""A task's numbers, as vectors of one entry that go with its vectors of n: ``(*tasks, 1)``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..solvers import _vectors


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Take the inner product of each task's vectors."""
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


def norm(v: Tensor) -> Tensor:
    """Take the Euclidean norm of each task's vector."""
    return _vectors.norm(v).unsqueeze(-1)
