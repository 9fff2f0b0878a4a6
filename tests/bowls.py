"""A quadratic of condition number 100."""

from __future__ import annotations

import torch

from tests.problems import F64

STEEP = torch.logspace(0, 2, 12, dtype=F64)


def bowl(x, centre):
    """A quadratic of condition number 100."""
    return (STEEP.to(x) * (x - centre) ** 2).sum() / 2
