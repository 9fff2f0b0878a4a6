"""Equations that do not know of each other: a diagonal matrix, found by two products."""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd.host import any_task, every_task
from .._info import Status
from ._system import Counted, LinearSystem, NewtonStep, Solution, Units
from ._vectors import norm

_ROUNDING = 1e4  # units of it, by which an entry may differ between two products


def solve_diagonal(
    system: LinearSystem, *, rtol: float | None, atol: float, damping: float
) -> tuple[Solution | None, int]:
    """Solve ``(A + damping I) x = b`` where A is diagonal, and notice where it is not.

    Of a diagonal matrix one product with any vector gives the diagonal, and one with another that
    has nothing to do with the first agrees with it in every entry. An answer is returned only where
    the true residual meets the tolerance too.

    Parameters
    ----------
    system : LinearSystem
        What is solved.
    rtol, atol, damping
        As in every iterative solver.

    Returns
    -------
    solution : Solution or None
        The answer, for all tasks; None where a task's matrix is not diagonal, or singular.
    products : int
        How many products it took: at most two without an answer that is to be checked.
    """
    b = system.b
    units, precision = Units(b), system.layout.precision
    if not every_task(torch.isfinite(units.scale)) or not any_task(units.scale > 0):
        return None, 0
    matvec = Counted(system.matvec, damping)
    first, second = _probes(b)
    diagonal = matvec(first) / first
    if not every_task((torch.isfinite(diagonal) & (diagonal != 0)).all(dim=-1)):
        return None, matvec.count
    eps = torch.finfo(precision).eps
    expected = diagonal * second
    agrees = (matvec(second) - expected).abs() <= _ROUNDING * eps * expected.abs()
    if not every_task(agrees.all(dim=-1)):
        return None, matvec.count
    x = units.b / diagonal
    residual = units.b - matvec(x)
    size = norm(residual)
    if not every_task(size <= units.tolerance(rtol, atol, precision)):
        return None, matvec.count
    linear_error: Tensor | None = None
    newton: NewtonStep | None = None
    if system.condition is not None:
        length = norm(x)
        error = norm(residual / diagonal) + 4 * eps * length
        linear_error = error / torch.where(length > 0, length, 1.0)
        step = system.condition / diagonal
        none = torch.zeros_like(step)
        newton = NewtonStep(step, none, none[..., 0], lambda v: v / diagonal)
    status = torch.full_like(size, int(Status.CONVERGED), dtype=torch.int64)
    solution = Solution(
        x=x * units.unit,
        status=status,
        iterations=torch.ones_like(status),
        matvecs=matvec.count,
        residual_norm=size,
        method="Auto: entry by entry",
        linear_error=linear_error,
        newton=newton,
        further=lambda v: v / diagonal,
    )
    return solution, matvec.count


def _probes(like: Tensor) -> tuple[Tensor, Tensor]:
    """Form two vectors of entries between 1 and 2 without a pattern, and without a random draw."""
    count = torch.arange(like.shape[-1], device=like.device).to(like.dtype)
    first, second = (1 + torch.frac((count + 1) * step) for step in (0.61803399, 0.41421356))
    return first.expand_as(like), second.expand_as(like)
