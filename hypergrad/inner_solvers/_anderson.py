"""Anderson acceleration of a fixed-point iteration."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..solvers import _fields, _vectors
from ._base import InnerSolver
from ._evaluator import Evaluator
from ._numbers import norm
from ._progress import Progress

_WORSE = 10.0  # a residual so many times the best one empties the history


@dataclasses.dataclass(frozen=True)
class Anderson(InnerSolver):
    """The fixed point ``T(params, *args) = params`` by Anderson's acceleration.

    The next point is the combination of the last ones whose residual would be least if T were
    affine. Where the residual grows all the same, the history is emptied and the iteration goes
    on from the best point.

    Parameters
    ----------
    history : int
        How many earlier points are combined; 0 is the plain iteration.
    mixing : float
        The part of the residual that is added, from 0 to 1.
    maxiter : int
        Most iterations.
    tol : float, optional
        The relative residual at which a task stops; None: 1e-8 in float64, 1e-5 in float32.

    References
    ----------
    Anderson, Iterative procedures for nonlinear integral equations, 1965; Walker and Ni, Anderson
    acceleration for fixed-point iterations, 2011.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import inner_solvers
    >>> x, info = inner_solvers.Anderson()(lambda x, a: torch.cos(a * x), *torch.ones(2, 1))
    >>> x, bool(info.success)
    (tensor([0.7391]), True)
    """

    history: int = 5
    mixing: float = 1.0
    maxiter: int = 1000
    tol: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        _fields.at_least("history", self.history, 0)
        if not 0 < self.mixing <= 1:
            raise ValueError(f"mixing must be above 0 and at most 1; got {self.mixing!r}.")

    def _run(self, evaluator: Evaluator, x: Tensor) -> tuple[Tensor, Progress]:
        r = evaluator.mapped(x) - x
        size = norm(r)
        nan = torch.full_like(size, math.nan)
        one = torch.ones_like(size)  # the curvature where T is constant
        progress = Progress(self.tol, evaluator.layout.precision, size, nan, one)
        best, best_r, best_size = x, r, size
        steps: list[Tensor] = []  # changes of x ...
        changes: list[Tensor] = []  # ... and of the residual
        floor = 2 * torch.finfo(evaluator.layout.precision).eps
        for active in progress.rounds(self.maxiter):
            new = x + self.mixing * r
            if steps:
                rows = torch.stack(changes, dim=-2)
                moved = torch.stack(steps, dim=-2) + self.mixing * rows
                new = new - (_least_squares(rows, r)[..., None] * moved).sum(dim=-2)
            new = torch.where(active, new, x)
            new_r = evaluator.mapped(new) - new
            progress.evaluated(active)
            size = norm(new_r)
            progress.update(new, new - x, new_r - r, size, nan, floored=size <= floor * norm(new))
            worse = active & ~(size <= _WORSE * best_size) & torch.isfinite(best_size)
            if self.history:
                steps = [*steps, new - x][-self.history :]
                changes = [*changes, new_r - r][-self.history :]
                # Zeros take no part in the combination.
                steps = [torch.where(worse, torch.zeros_like(s), s) for s in steps]
                changes = [torch.where(worse, torch.zeros_like(c), c) for c in changes]
                new, new_r = torch.where(worse, best, new), torch.where(worse, best_r, new_r)
            x, r = torch.where(active, new, x), torch.where(active, new_r, r)
            better = active & (size < best_size)
            best, best_r = torch.where(better, new, best), torch.where(better, new_r, best_r)
            best_size = torch.where(better, size, best_size)
        return best, progress


def _least_squares(rows: Tensor, r: Tensor) -> Tensor:
    """Find weights ``(m,)`` whose weighted sum of the rows ``(m, n)`` comes closest to r."""
    length = _vectors.norm(rows)
    unit = rows / torch.where(length > 0, length, torch.ones_like(length))[..., None]
    m = rows.shape[-2]
    ridge = 10 * torch.finfo(r.dtype).eps * m
    gram = unit @ unit.mT + ridge * torch.eye(m, dtype=r.dtype, device=r.device)
    target = (unit * r[..., None, :]).sum(dim=-1)
    weights = torch.linalg.solve_ex(gram, target)[0]
    weights = torch.where(length > 0, weights / torch.where(length > 0, length, 1.0), 0.0)
    return torch.where(torch.isfinite(weights), weights, torch.zeros_like(weights))
