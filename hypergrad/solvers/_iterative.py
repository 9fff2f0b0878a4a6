"""What the Krylov methods share: their fields, the passes of an iteration, and the judgement."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .._autograd.double_backward import advice
from .._autograd.host import any_task, every_task
from .._autograd.rows import by_rows
from .._autograd.transforms import transforms_active
from .._errors import UnsupportedOperation
from .._info import Status
from ._base import (
    Counted,
    LinearSystem,
    Product,
    Solution,
    Solver,
    at_least,
    finite,
    norm,
    tolerance,
)
from ._factorisation import signs
from ._ritz import widest

if TYPE_CHECKING:
    from ._observer import Observer

# Where a singular system has no solution, residuals can be bought with answers of any length:
# the answer is then the iterate with the least ||r|| + PRICE ||A|| ||x||.
PRICE = 1e-4
#: An answer that came in so few steps may have left much of the spectrum unseen.
FEW = 4
AROUND = 12  # ... and in so many more it is seen
_OFF = 1e-3  # the part of a right-hand side that a start off zero explains
#: Curvature that is so many roundings of the largest below zero is negative.
NEGATIVE = 100


@dataclasses.dataclass(frozen=True)
class Iterative(Solver):
    """The fields that all Krylov methods share.

    Where an answer is judged, one product more with a fixed vector shows the size of every row: a
    residual that is small in units that hide an error is no success (a budget that is used up has
    no such claim). Of a `Minimum` an iteration
    that ends in a few steps goes on from a little off its answer, unless it has a budget or an
    `x0`, so that it also meets what the right-hand side does not reach.

    Parameters
    ----------
    maxiter : int, optional
        Most iterations. None: ten times the unknowns, at most 5000. Given without `rtol` it is
        a budget: running out of it is no failure.
    rtol, atol : float
        Stop when ``||r|| <= max(rtol ||b||, atol)``. ``rtol=None`` is a tolerance that the dtype
        can reach (1e-6 in float64, 1e-4 in float32, 5e-3 in float16, 3e-2 in bfloat16) and
        counts as met at the rounding floor.
    damping : float
        The system solved is ``(A + damping I) x = b``.
    preconditioner : callable or Nystrom, optional
        ``v -> approximately (A + damping I)^-1 v`` on pytrees shaped like `b`.
    """

    maxiter: int | None = None
    rtol: float | None = None
    atol: float = 0.0
    damping: float = 0.0
    preconditioner: Callable[[Any], Any] | Solver | None = None

    #: Whether an answer that was cut short is kept only where its residual is the smaller one.
    judged_by_residual: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        at_least("maxiter", self.maxiter, 1)
        at_least("rtol", self.rtol, 0.0)
        at_least("atol", self.atol, 0.0)
        finite("damping", self.damping)

    def run(self, system: LinearSystem, begun: Part | None = None) -> Solution:
        """Iterate from `x0`, and again from the answer where its true residual is too large.

        The right-hand side is scaled to norm one, so that neither a tiny nor a huge one loses
        accuracy; the residual that is reported is ``b - A x`` of the x that is returned.

        Parameters
        ----------
        system : LinearSystem
            What is solved.
        begun : Part, optional
            The first pass, where it has been made.

        Returns
        -------
        solution : Solution
            The answer and its evidence.
        """
        transpose = self._transpose(system) if self.needs_transpose else None
        matvec = Counted(system.matvec, self.damping, transpose)
        precondition = batched_preconditioner(self.preconditioner, system, matvec)
        scale = norm(system.b)
        present = (scale > 0) & torch.isfinite(scale)
        unit = torch.where(present, scale, torch.ones_like(scale))[..., None]
        b = system.b / unit
        precision = system.layout.precision
        tol = (self.atol / unit[..., 0]).clamp(min=tolerance(self.rtol, precision))
        looks = system.looks or self.rtol != 0
        limit = self.maxiter or min(10 * b.shape[-1], 5000)

        x, r = torch.zeros_like(b), b
        if system.x0 is not None and (not looks or any_task(present)):
            x = torch.where(present[..., None], system.x0.to(b.dtype) / unit, x)
            r = b - matvec(x)
            size = norm(r)
        else:
            size = present.to(b.dtype)  # b has norm one, or is zero or not finite
        active = present & (size > tol)
        status = torch.where(
            torch.isfinite(scale + size), int(Status.CONVERGED), int(Status.NOT_FINITE)
        )
        iterations = torch.zeros_like(status)
        negative = torch.zeros_like(present)
        ritz: Callable[[], Tensor] | None = None
        reached = torch.zeros_like(scale)  # ||A|| ||x||, the scale of rounding errors
        broken = torch.zeros_like(present)
        inverse = newton = largest = None
        condition_number: Callable[[], Tensor] | None = None
        first, expected = True, False
        plain = looks and not transforms_active()
        if begun is not None:
            matvec.count = begun.steps + 1  # who made it has looked at the true residual
        while limit > 0 and (not looks or any_task(active)):
            part = (
                begun
                if first and begun
                else self._iterate(
                    matvec,
                    precondition,
                    r,
                    tol,
                    active,
                    limit,
                    looks,
                    system.condition if first else None,
                )
            )
            limit -= part.steps
            candidate = x + part.x
            r_new = b - matvec(candidate)
            size_new = norm(r_new)
            if part.observer is not None:
                inverse = part.observer.inverse(part.x)
                newton = part.observer.newton(part.x)
                largest = part.largest
            if first and precondition is None:
                condition_number = part.condition_number
                known = system.symmetric or self.needs_symmetry
                ritz = part.ritz if looks and known else None
            expected = plain and first and self._as_expected(active, part, size_new, tol, limit)
            if expected:
                # What follows would say the same, in some forty operations.
                x, r, size = candidate, r_new, size_new
                status = torch.where(size <= tol, int(Status.CONVERGED), part.status)
                iterations, negative = part.iterations, part.negative
                break
            # A truncated iteration is closer in the energy norm also where its residual is not.
            truncated = part.status == Status.MAX_ITERATIONS
            better = (size_new < size) | ~torch.isfinite(size_new)
            if first and not self.judged_by_residual:
                better = better | truncated
            keep = active & better
            x = torch.where(keep[..., None], candidate, x)
            r = torch.where(keep[..., None], r_new, r)
            met = size_new <= tol
            claimed = part.status == Status.CONVERGED
            stalled = claimed & ~met & ~(size_new < 0.5 * size)
            ended = torch.where(stalled, int(Status.STAGNATED), part.status)
            # At the rounding floor a regular matrix looks singular.
            rounding = 100 * torch.finfo(precision).eps * (1 + part.largest * norm(candidate))
            floored = (ended == Status.SINGULAR) & (size_new <= rounding.clamp(max=1e-3))
            ended = torch.where(floored, int(Status.STAGNATED), ended)
            ended = torch.where(met, int(Status.CONVERGED), ended)
            ended = torch.where(torch.isfinite(size_new), ended, int(Status.NOT_FINITE))
            again = claimed & ~met & ~stalled
            # A method that broke down on its way gets one more try, from the true residual.
            retried = (part.status == Status.BREAKDOWN) & ~met & ~broken & (size_new < size)
            broken = broken | (active & retried)
            again = active & (again | retried) & torch.isfinite(size_new)
            ended = torch.where(again, int(Status.MAX_ITERATIONS), ended)
            status = torch.where(active, ended, status)
            iterations = torch.where(active, iterations + part.iterations, iterations)
            negative = negative | (active & part.negative)
            size = torch.where(keep, size_new, size)
            reached = torch.where(active, part.largest * norm(x), reached)
            active, first = again, False
            if not looks:
                break
        few = present & (status == Status.CONVERGED) & (iterations <= FEW)
        if self._explores(system) and any_task(few):
            start = off_zero(matvec, torch.where(few[..., None], b, torch.zeros_like(b)))
            part = self._iterate(matvec, precondition, start, tol, few, max(limit, AROUND), looks)
            negative = negative | (few & part.negative)
            bent = few & (part.status == Status.NEGATIVE_CURVATURE)
            status = torch.where(bent, int(Status.NEGATIVE_CURVATURE), status)
            ritz = widest(ritz, part.ritz)
        if expected:
            x = x * unit
        else:
            size = torch.where(scale == 0, torch.zeros_like(size), size)
            size = torch.where(torch.isfinite(scale), size, torch.full_like(size, math.nan))
            unknown = (status == Status.NOT_FINITE)[..., None]
            x = torch.where(unknown, torch.full_like(x, math.nan), x * unit)
            x = torch.where((scale == 0)[..., None], torch.zeros_like(x), x)
        return Solution(
            x=x,
            status=status,
            success=self._succeeded(status, size, reached, precision),
            iterations=iterations,
            matvecs=matvec.count,
            residual_norm=size,
            negative_curvature=negative,
            method=type(self).__name__,
            spectrum=ritz,
            condition_number=condition_number,
            residual=r * unit,
            linear_error=self._linear_error(x / unit, size, inverse, largest, precision),
            newton=newton,
        )

    def _linear_error(
        self,
        x: Tensor,
        size: Tensor,
        inverse: Tensor | None,
        largest: Tensor | None,
        precision: torch.dtype,
    ) -> Tensor | None:
        """The relative error of an answer to a right-hand side of norm one, as an observer saw."""
        if inverse is None or largest is None:
            return None
        length = norm(x)
        inverse = torch.where(torch.isfinite(inverse), inverse, length)
        eps = torch.finfo(precision).eps
        rounding = eps * largest * torch.maximum(inverse, length)
        return size * inverse / length + abs(self.damping) * inverse + rounding

    def _explores(self, system: LinearSystem) -> bool:
        """Whether to start off zero: not within a budget, which that would take a part of."""
        budget = self.rtol is None and self.maxiter is not None
        return system.explores and system.looks and system.x0 is None and not budget

    def _as_expected(
        self, active: Tensor, part: Part, size: Tensor, tol: Tensor, limit: int
    ) -> bool:
        """Whether every system was solved at once, or cut short where that was the plan."""
        good = (part.status == Status.CONVERGED) & (size <= tol)
        if limit <= 0 and not self.judged_by_residual:
            good = good | ((part.status == Status.MAX_ITERATIONS) & torch.isfinite(size))
        return every_task(good & active)

    def _succeeded(
        self, status: Tensor, size: Tensor, reached: Tensor, precision: torch.dtype
    ) -> Tensor:
        """Converged, or as close as was asked for: to the rounding floor, or to the budget."""
        good = status == Status.CONVERGED
        if self.rtol is None:
            floor = 100 * torch.finfo(precision).eps * (1 + reached)
            near = size <= floor.clamp(max=tolerance(None, precision) ** 0.5)
            good = good | ((status == Status.STAGNATED) & near)
            if self.maxiter is not None:
                good = good | (status == Status.MAX_ITERATIONS)
        return good

    def _transpose(self, system: LinearSystem) -> Product:
        """The product with the transpose, which is at hand where A is symmetric."""
        if system.rmatvec is not None:
            return system.rmatvec
        if system.symmetric:
            return system.matvec
        name = type(self).__name__
        raise UnsupportedOperation(
            f"{name} needs products with the transpose: pass rmatvec=... to {name}.solve (the "
            "same function as matvec where the matrix is symmetric), or use GMRES()."
        )

    @abstractmethod
    def _iterate(
        self,
        matvec: Counted,
        precondition: Product | None,
        r: Tensor,
        tol: Tensor,
        active: Tensor,
        limit: int,
        looks: bool,
        condition: Tensor | None = None,
    ) -> Part:
        """Correct an answer whose residual is `r`, until ``||r|| <= tol`` by the recursion.

        With the inner condition F a method that knows how lets an `Observer` follow it.
        """


@dataclasses.dataclass
class Part:
    """One pass of an iteration: the correction, and how it ended for each task."""

    x: Tensor
    status: Tensor
    iterations: Tensor
    steps: int
    negative: Tensor
    largest: Tensor  # of ||A v|| / ||v|| over the vectors met
    ritz: Callable[[], Tensor] | None = None  # lowest and highest Ritz value, when asked
    observer: Observer | None = None
    condition_number: Callable[[], Tensor] | None = None  # condition number seen, when asked


def off_zero(matvec: Product, b: Tensor) -> Tensor:
    """The residual of zero a little off it, in general position, small beside `b`."""
    z = signs(b).expand_as(b)
    image = matvec(z)
    size = norm(image)
    usable = torch.isfinite(size) & (size > 0)
    part = torch.where(usable, _OFF * norm(b) / torch.where(usable, size, 1.0), 0.0)[..., None]
    return torch.where(part > 0, -part * image, torch.zeros_like(b))


def curves_down(v: Tensor, image: Tensor) -> Tensor:
    """Whether ``v . A v`` is negative by more than rounding, for each task."""
    least = NEGATIVE * torch.finfo(v.dtype).eps
    size = torch.linalg.vector_norm(v, dim=-1) * torch.linalg.vector_norm(image, dim=-1)
    return torch.linalg.vecdot(v, image) < -least * size


def batched_preconditioner(
    preconditioner: Callable[[Any], Any] | Solver | None, system: LinearSystem, matvec: Counted
) -> Product | None:
    """A preconditioner on pytrees as one on flat vectors, mapped over the tasks."""
    if preconditioner is None:
        return None
    if isinstance(preconditioner, Solver):
        return preconditioner.as_preconditioner(matvec, system.b)
    tree, layout = system.tree, system.layout

    def one(v: Tensor) -> Tensor:
        with advice():
            answer = preconditioner(tree.rebuild(layout.split(v)))
        return layout.flatten(tree.match("preconditioner(v)", answer))

    def mapped(v: Tensor) -> Tensor:
        found: Tensor = by_rows(one, v.flatten(0, -2))
        return found.unflatten(0, v.shape[:-1])

    return one if system.b.ndim == 1 else mapped
