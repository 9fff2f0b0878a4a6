"""Nesterov's momentum, which starts again when it points uphill."""

from __future__ import annotations

import torch
from torch import Tensor

from ._numbers import dot


def pushed(x: Tensor, y: Tensor, z: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
    """Choose where the next step begins.

    Parameters
    ----------
    x, z : Tensor
        The ends of the last two steps.
    y : Tensor
        Where the last of them began.
    momentum : Tensor
        The last one's, at first 1.

    Returns
    -------
    begin, following : Tensor
        Where it begins, and its momentum.
    """
    # Momentum that points uphill is lost.
    uphill = dot(y - z, z - x) > 0
    # Beck and Teboulle (2009), equations 4.2 and 4.3.
    following = (1 + (1 + 4 * momentum**2).sqrt()) / 2
    begin = torch.where(uphill, z, z + ((momentum - 1) / following) * (z - x))
    return begin, torch.where(uphill, torch.ones_like(momentum), following)
