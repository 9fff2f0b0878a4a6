"""The matrix taken as a multiple of the identity."""

from __future__ import annotations

import dataclasses
import math

import torch

from .._info import Status
from ._base import Solver
from ._fields import finite
from ._system import LinearSystem, Solution, graded
from ._vectors import norm


@dataclasses.dataclass(frozen=True)
class Identity(Solver):
    """A taken as ``scale`` times the identity: ``u = b / scale``, with no product at all.

    This is T1-T2 (Luketina et al., 2016), Jacobian-free backpropagation (Fung et al., 2022) and,
    with ``scale=lam`` for iMAML's inner problem, first-order MAML. It is an approximation that
    the caller has chosen: nothing is measured, so the residual is NaN and the solve counts as
    successful.

    Parameters
    ----------
    scale : float
        What stands for the matrix.

    Examples
    --------
    >>> import torch, hypergrad
    >>> x, info = hypergrad.Identity(scale=2.0).solve(lambda v: 2.5 * v, torch.ones(2))
    >>> x.tolist(), int(info.matvecs)
    ([0.5, 0.5], 0)
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a scale that means nothing."""
        finite("scale", self.scale)
        if self.scale == 0:
            raise ValueError("scale must not be zero.")

    def run(self, system: LinearSystem) -> Solution:
        """Divide by the scale."""
        size = norm(system.b)
        return Solution(
            x=system.b / self.scale,
            status=graded({Status.CONVERGED: torch.isfinite(size)}, Status.NOT_FINITE),
            residual_norm=torch.full_like(size, math.nan),
            method="Identity",
        )
