"""The error that a residual hides where the unknowns have different units."""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._info import Status
from ._base import Solver
from ._factorisation import signs
from ._system import LinearSystem, Probe, Solution
from ._vectors import norm

# A residual that is larger than this beside its right-hand side, once each equation is taken in
# units of its own, and so many times larger than it was before, hides an error.
_ERROR = {torch.float64: 1e-4, torch.float32: 1e-3}
_TIMES = 30.0
_SOME_TIMES = 5.0  # ... or this, where the spectrum that was seen leaves no digit
_SAMPLE = 256  # rows by which the middle of many is taken


def claimed(solver: Solver, solution: Solution) -> Tensor:
    """Say which tasks an iteration claims to have solved: a budget that is used up claims nothing.

    Parameters
    ----------
    solver : Solver
        The method.
    solution : Solution
        Its answer.

    Returns
    -------
    claimed : Tensor
        bool, for each task.
    """
    claims = solution.success
    if getattr(solver, "maxiter", None) is not None and getattr(solver, "rtol", 0) is None:
        claims = claims & (solution.status != Status.MAX_ITERATIONS)
    return claims


def probed(system: LinearSystem, solution: Solution, damping: float) -> Probe | None:
    """Form the product, and judge the residual of an answer by it.

    Parameters
    ----------
    system : LinearSystem
        What was solved.
    solution : Solution
        The answer, with its residual.
    damping : float
        Of the solver.

    Returns
    -------
    probe : Probe or None
        None where the method does not tell its residual.
    """
    if solution.residual is None:
        return None
    z = signs(system.b)
    z = z.expand(system.b.shape if system.shared == 1 else system.b.shape[1:])
    rows = _rows(system, z, damping)
    probe = Probe(rows, hides(rows, system, solution))
    return again(probe, system, solution, damping) if any_task(probe.hides) else probe


def again(probe: Probe, system: LinearSystem, solution: Solution, damping: float) -> Probe:
    """Measure the rows by another product: of many some come out small by chance, not twice.

    Parameters
    ----------
    probe, system, solution, damping
        What `probed` has returned, and what it was called with.

    Returns
    -------
    probe : Probe
        With the larger of both measurements of each row; what it hides, both have shown.
    """
    z = signs(system.b)
    z = z.expand(system.b.shape if system.shared == 1 else system.b.shape[1:])
    solution.matvecs += 1
    rows = torch.maximum(probe.rows, _rows(system, z.reciprocal(), damping))
    return Probe(rows, probe.hides & hides(rows, system, solution))


def _rows(system: LinearSystem, z: Tensor, damping: float) -> Tensor:
    """Measure the rows of the matrix by the image of a vector in general position."""
    image = system.matvec(z)
    rows = ((image + damping * z if damping else image) / z).abs_()
    del image
    largest = rows.amax(dim=-1, keepdim=True)
    rows = torch.where(torch.isfinite(rows), rows, largest)
    return rows.clamp(min=torch.finfo(rows.dtype).tiny ** 0.5) if rows.numel() else rows


def hides(rows: Tensor, system: LinearSystem, solution: Solution) -> Tensor:
    """Say whether the residual is small in units that hide an error, by the sizes of the rows.

    Parameters
    ----------
    rows : Tensor
        About the size of the rows of the matrix, ``(*tasks, n)``.
    system, solution : LinearSystem, Solution
        What was solved, and its answer, with the residual.

    Returns
    -------
    hides : Tensor
        bool, for each task.
    """
    assert solution.residual is not None
    some = rows[..., :: rows.shape[-1] // _SAMPLE] if rows.shape[-1] > 2 * _SAMPLE else rows
    middle = some.median(dim=-1, keepdim=True).values
    # Of n rows some come out n times too small by chance.
    chance = (rows < middle) & (rows > middle / (10 * rows.shape[-1]))
    scale = middle / torch.where(chance, middle, rows)
    size_b = norm(scale * system.b)
    left = norm(scale * solution.residual) / torch.where(size_b > 0, size_b, 1.0)
    far = (left > _ERROR.get(system.layout.precision, 1.0)) & (size_b > 0)
    if not any_task(far):  # the spectrum of a block takes as long as some products
        return far
    size = solution.residual_norm
    low, high = solution.eigenvalues.unbind(dim=-1)
    return far & (left > torch.where(high * size > low, _SOME_TIMES, _TIMES) * size)
