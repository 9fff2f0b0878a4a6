"""The generalised minimal residual method, restarted."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._info import Status
from ._fields import at_least
from ._krylov import Correction, Iterative, Pass, Recurrence, curves_down
from ._ritz import condition_of_factors, outermost
from ._system import graded
from ._vectors import along, combined


@dataclasses.dataclass(frozen=True)
class GMRES(Iterative):
    """GMRES, for any square system.

    Each cycle minimises the residual over a growing Krylov space and keeps its basis, `restart`
    vectors at most. The preconditioner is applied from the right, so the residual that is
    tested is that of the system itself.

    Parameters
    ----------
    maxiter, rtol, atol, damping, preconditioner, callback, progress
        As in every iterative solver: see the documentation of the linear solvers.
    restart : int, optional
        Length of a cycle; None: the number of unknowns, at most 50.

    References
    ----------
    Saad and Schultz, GMRES: a generalized minimal residual algorithm, 1986; Saad, Iterative methods
    for sparse linear systems, 2003, algorithms 6.9, 6.11 and, with a preconditioner, 9.5.

    Examples
    --------
    >>> import torch, hypergrad
    >>> A = torch.tensor([[2.0, 1.0], [-1.0, 3.0]], dtype=torch.float64)
    >>> b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> x, info = hypergrad.GMRES(rtol=1e-10).solve(lambda v: A @ v, b)
    >>> torch.allclose(A @ x, b), hypergrad.Status(info.status).name
    (True, 'CONVERGED')
    """

    restart: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        at_least("restart", self.restart, 1)

    def _iterate(self, start: Pass) -> Correction:
        run, r = Recurrence(start), start.r
        length = self.restart or min(r.shape[-1], 50)
        total, size = torch.zeros_like(r), torch.linalg.vector_norm(r, dim=-1)
        seen = stalled = run.singular
        triangles = []
        first: _Cycle | None = None
        while start.goes_on(run.steps, run.active):  # Saad (2003), algorithm 6.11
            active, cycle = run.active, _Cycle(r, run.active)
            for _ in range(min(length, start.limit - run.steps)):
                if start.looks and not any_task(cycle.active):
                    break
                cycle.extend(start)
                start.tell(cycle.residual)
                run.steps += 1
            step = start.preconditioned(cycle.correction())
            triangles.append(cycle.triangle())
            first = first or cycle
            run.largest = torch.maximum(run.largest, cycle.largest)
            run.negative = run.negative | cycle.negative
            run.iterations = run.iterations + cycle.iterations
            # A step this long is made of rounding errors: the matrix does not see it.
            empty = run.flat * run.largest * torch.linalg.vector_norm(step, dim=-1) > size
            step = torch.where((active & ~empty)[..., None], step, 0.0)
            total = total + step
            r = r - start.matvec(step)
            size_new = torch.linalg.vector_norm(r, dim=-1)
            met = (cycle.residual <= start.tol) & ~empty
            stuck = active & ~met & ~(size_new < (1 - 1e-3) * size)
            seen = seen | cycle.singular | (active & empty)
            stalled, run.singular = stalled | (stuck & ~seen), run.singular | (stuck & seen)
            run.active = active & ~met & ~stuck
            size = size_new
        run.unknown = ~torch.isfinite(size)
        part = run.correction(
            total,
            ritz=partial(_extremes, first) if first and not start.precondition else None,
            condition_number=partial(condition_of_factors, triangles) if triangles else None,
        )
        part.status = graded({Status.STAGNATED: stalled & ~run.unknown}, part.status)
        return part


def _extremes(cycle: _Cycle) -> Tensor:
    """Take the extreme Ritz values of a symmetric matrix."""
    core = cycle.curvature()
    sound = torch.isfinite(core).flatten(-2).all(dim=-1)[..., None]
    values = torch.linalg.eigvalsh(torch.where(sound[..., None], core, 0.0))
    return torch.where(sound, outermost(values), math.nan)


class _Cycle:
    """The Arnoldi basis of one cycle and the triangular least-squares problem beside it.

    A task that has stopped appends trivial columns, so that its answer does not change.
    """

    def __init__(self, r: Tensor, active: Tensor) -> None:
        self.residual = torch.linalg.vector_norm(r, dim=-1)
        unit = torch.where(self.residual > 0, self.residual, torch.ones_like(self.residual))
        self.basis = [r / unit[..., None]]
        # All rotations so far as one matrix: a step is a few operations, however long the cycle.
        self.rotation = torch.ones_like(self.residual)[..., None, None]
        self.columns: list[Tensor] = []  # of the triangular factor
        self.targets: list[Tensor] = []  # the rotated right-hand side
        self.last = self.residual
        self.active = active
        self.singular = self.negative = torch.zeros_like(active)
        self.raw: list[Tensor] = []  # columns of the Hessenberg matrix, without their last entry
        self.iterations = torch.zeros_like(active, dtype=torch.int64)
        self.largest = torch.zeros_like(self.residual)

    def extend(self, start: Pass) -> None:
        """Add a basis vector, orthogonalised twice: Saad (2003), algorithm 6.9."""
        v = start.preconditioned(self.basis[-1])
        w = start.matvec(v)
        self.negative = self.negative | (self.active & curves_down(v, w, start.noise))
        before = torch.linalg.vector_norm(w, dim=-1)
        self.largest = torch.maximum(self.largest, before)
        basis = torch.stack(self.basis, dim=-2)
        column = along(basis, w)
        w = w - combined(basis, column)
        part = along(basis, w)
        w, column = w - combined(basis, part), column + part
        self.raw.append(column)
        length = torch.linalg.vector_norm(w, dim=-1)
        invariant = length <= start.flat * before
        self.basis.append(w / torch.where(invariant, 1.0, length)[..., None])
        self._append(column, torch.where(invariant, 0.0, length), invariant, start.tol)

    def _append(self, column: Tensor, length: Tensor, invariant: Tensor, tol: Tensor) -> None:
        """Rotate a Hessenberg column into the triangular factor."""
        column = (self.rotation @ column[..., None])[..., 0]
        diagonal = torch.hypot(column[..., -1], length)
        null = diagonal <= 1e3 * torch.finfo(length.dtype).eps * self.largest
        safe = torch.where(null, 1.0, diagonal)
        c = torch.where(null, 1.0, column[..., -1] / safe)
        s = torch.where(null, 0.0, length / safe)
        self._rotate_further(c[..., None], s[..., None])
        useful = self.active & ~null
        # A trivial column is as long as the others, so that the triangle's condition is A's.
        trivial = torch.where(self.largest > 0, self.largest, 1.0)
        above = torch.where(useful[..., None], column[..., :-1], 0.0)
        on = torch.where(useful, safe, trivial)[..., None]
        self.columns.append(torch.cat([above, on], dim=-1))
        self.targets.append(torch.where(useful, c * self.last, 0.0))
        self.last = torch.where(useful, -s * self.last, self.last)
        self.residual = torch.where(useful, self.last.abs(), self.residual)
        self.singular = self.singular | (self.active & null)
        self.iterations = self.iterations + self.active
        self.active = useful & ~invariant & (self.residual > tol)

    def _rotate_further(self, c: Tensor, s: Tensor) -> None:
        """Append a rotation of the last two rows."""
        above, last = self.rotation[..., :-1, :], self.rotation[..., -1, :]
        rows = torch.cat([above, (c * last)[..., None, :], (-s * last)[..., None, :]], dim=-2)
        column = torch.cat([torch.zeros_like(above[..., 0]), s, c], dim=-1)
        self.rotation = torch.cat([rows, column[..., None]], dim=-1)

    def triangle(self) -> Tensor:
        """Form the triangular factor: its singular values lie within those of the matrix."""
        count = len(self.columns)
        rows = [torch.nn.functional.pad(c, (0, count - c.shape[-1])) for c in self.columns]
        return torch.stack(rows, dim=-1)

    def curvature(self) -> Tensor:
        """Form the matrix between the basis vectors, ``(*tasks, k, k)``: symmetric where A is."""
        count = len(self.raw)
        rows = [torch.nn.functional.pad(c, (0, count - c.shape[-1])) for c in self.raw]
        upper = torch.stack(rows, dim=-1)
        return upper.triu() + upper.triu(1).mT

    def correction(self) -> Tensor:
        """Form the combination of the basis that minimises the residual."""
        if not self.columns:
            return torch.zeros_like(self.basis[0])
        count, triangle = len(self.columns), self.triangle()
        target = torch.stack(self.targets, dim=-1)[..., None]
        y = torch.linalg.solve_triangular(triangle, target, upper=True)
        return combined(torch.stack(self.basis[:count], dim=-2), y[..., 0])
