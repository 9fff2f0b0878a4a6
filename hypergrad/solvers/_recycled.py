"""Conjugate gradients that go on from what the last solve of the same system has left."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._autograd.shards import is_shards
from .._autograd.transforms import is_wrapped, outside_transforms
from .._info import Status
from ._base import Solver
from ._krylov import AROUND, FEW, SURE, curves_down
from ._long import is_vast
from ._probe import hides
from ._recycle import Memory, dropped, moved_on, refuse_recycling
from ._ritz import widest
from ._system import Counted, LinearSystem, Probe, Solution, Units, graded
from ._vectors import Product, dot, norm

if TYPE_CHECKING:
    from ._cg import CG

_FAR = 100.0  # a start whose residual is so many times the right-hand side is none
#: The least exact linear system that an inner solution is thought to support.
CEILING = 1e-2
# A solve of so many steps is worth a better preconditioner ...
_WORTH = 5
# ... which is estimated by so many products, some after each solve, and then tried.
_PROBES = 16
_AT_ONCE = 4
_TRIALS = 2
# It stays if a step with it reduces the residual by so much more (of the logarithm).
_BETTER = 1.1
_WINDOW = 16.0  # probes that count once there are more
_REFRESH = 10  # solves after which a diagonal that is in use gets another probe
_KEPT = 0.8  # what the past counts for in such a figure after each solve
#: After so many solves of few steps one looks around, for what no start from an answer meets.
EVERY = 20
_FADES = 0.95  # the length of the inverse that was seen, after a solve that shows little of it


class Scaled(Solver):
    """A diagonal as preconditioner: that of Jacobi, as far as it is known.

    Parameters
    ----------
    diagonal : Tensor
        ``(*tasks, n)``, positive.
    """

    def __init__(self, diagonal: Tensor) -> None:
        self.diagonal = diagonal

    def run(self, system: LinearSystem) -> Solution:
        """Divide by the diagonal."""
        return Solution(system.b / self.diagonal)

    def as_preconditioner(self, matvec: Counted, b: Tensor) -> Product:
        """Give that division."""
        return lambda v: v / self.diagonal


def recycled(solver: CG, system: LinearSystem) -> Solution:
    """Solve a system from what is known of the one before it, and learn for the next.

    Parameters
    ----------
    solver : CG
        With ``recycle=True``.
    system : LinearSystem
        With a memory.

    Returns
    -------
    solution : Solution
        The answer, with the evidence that a solve from zero has.

    Raises
    ------
    UnsupportedOperation
        If there is no memory.
    """
    memory = system.memory
    if memory is None:
        refuse_recycling(solver)
    plain = dataclasses.replace(solver, recycle=False)
    if memory is None or is_wrapped(system.b) or is_shards(system.b):
        return plain.run(dataclasses.replace(system, memory=None))
    memory.fit(system.b)
    return _Recycled(plain, system, memory).solution()


class _Recycled:
    """One solve: the start, the scaling, the solve for what is left, and what is learnt of it."""

    def __init__(self, solver: CG, system: LinearSystem, memory: Memory) -> None:
        self.solver, self.system, self.memory = solver, system, memory
        self.looks = system.looks or solver.rtol != 0
        self.units = Units(system.b)
        self.matvec = Counted(system.matvec, solver.damping)
        start = memory.solution if system.x0 is None else system.x0
        self.bent = torch.zeros_like(self.units.present)
        # `left` is b - A start
        self.start, self.left = torch.zeros_like(system.b), system.b
        self.quotient: Callable[[], Tensor] | None = None  # start.A start / start.start
        self.warm = start is not None and not (self.looks and not any_task(start != 0))
        if start is not None and self.warm:
            self._begin_at(start)

    def _begin_at(self, start: Tensor) -> None:
        """Begin at the multiple of a vector that is closest in the norm of A, or at zero."""
        b = self.system.b
        start = start.to(b.dtype)
        image = self.matvec(start)
        self.bent = curves_down(start, image, self.system.noise) & self.units.present
        along = dot(start, image)
        self.quotient = lambda: (along / dot(start, start))[..., None].expand(*along.shape, 2)
        factor = dot(start, b) / along
        left = b - factor[..., None] * image
        # A residual may be longer than b, as on the way of conjugate gradients; of a very long one
        # the rounding counts.
        closer = ~self.bent & torch.isfinite(factor) & (norm(left) <= _FAR * norm(b))
        closer = (closer & self.units.present)[..., None]
        self.start = torch.where(closer, factor[..., None] * start, 0.0)
        self.left = torch.where(closer, left, b)

    def solution(self) -> Solution:
        """Solve for what is left, and put the answer and its evidence together."""
        memory, looks = self.memory, self.looks
        scales = looks and memory.scaling > 0 and memory.diagonal is not None
        solver = self._scaled() if scales else self.solver
        if self.warm:
            whole = self._solved_by_goal(solver)
        else:
            whole = solver.run(dataclasses.replace(self.system, memory=None, x0=None))
            self._see(whole)
        memory.solution, iterations = self._kept(whole), whole.iterations
        if looks:
            if self.warm or memory.since >= EVERY:
                self._look_around(whole)
            self._learn_rates(whole, iterations, scaled=scales)
            self._probe(whole, iterations)
        whole.matvecs += self.matvec.count
        return whole

    def _scaled(self) -> CG:
        """Precondition with the diagonal: no entry is below its standard error."""
        memory = self.memory
        assert memory.diagonal is not None
        assert memory.square is not None
        error = (memory.square - memory.diagonal.square()).clamp(min=0) / _WINDOW
        diagonal = torch.maximum(memory.diagonal, error.sqrt())
        usable = (diagonal > 0) & torch.isfinite(diagonal)
        largest = torch.where(usable, diagonal, 0.0).amax(dim=-1, keepdim=True)
        diagonal = torch.where(usable, diagonal, torch.where(largest > 0, largest, 1.0))
        return dataclasses.replace(self.solver, preconditioner=Scaled(diagonal))

    def _solved_by_goal(self, solver: CG) -> Solution:
        """Solve to the goal, and on to what is asked for where the goal hides an error."""
        asked, left = self._asked(), self.left
        goal = self._goal(asked)
        whole = self._whole(solver, goal)
        if not (self.looks and any_task(goal > asked) and any_task(self._hidden_by_goal(whole))):
            return whole
        rest = None if solver.maxiter is None else solver.maxiter - int(whole.iterations.max())
        if rest == 0:
            return whole
        assert whole.residual is not None
        self.start, self.left = whole.x, whole.residual
        further = self._whole(dataclasses.replace(solver, maxiter=rest), asked)
        self.left = left
        further.iterations = whole.iterations + further.iterations
        further.matvecs += whole.matvecs
        return further

    def _hidden_by_goal(self, whole: Solution) -> Tensor:
        """Say whether the residual is small in units that hide an error."""
        if self.memory.rows is None:
            self._sample(self._vector())
        return self._hidden(self._rows(), whole) & (whole.status == Status.CONVERGED)

    def _rows(self) -> Tensor:
        """Give what is known of the sizes of the rows."""
        memory = self.memory
        assert memory.rows is not None
        if memory.square is not None and memory.probes > 1:
            return memory.square.sqrt()
        return memory.rows

    def _hidden(self, rows: Tensor, whole: Solution) -> Tensor:
        judged = dataclasses.replace(whole, spectrum=widest(whole.spectrum, self._extremes))
        return hides(rows, self.system, judged)

    def _asked(self) -> Tensor:
        """Give the norm of the residual that the tolerance allows."""
        solver, precision = self.solver, self.system.layout.precision
        tol = self.units.tolerance(solver.rtol, solver.atol, precision, self.system.noise)
        return tol * self.units.unit[..., 0]

    def _goal(self, asked: Tensor) -> Tensor:
        """Say at which norm of the residual each task is solved.

        Without an `rtol` that is where the error of the linear system, as far as its inverse was
        seen, is that of the inner problem at the last step: no less than the dtype can reach, and
        no more than `CEILING`.

        Parameters
        ----------
        asked : Tensor
            What the tolerance allows.

        Returns
        -------
        goal : Tensor
            In the units of the right-hand side.
        """
        memory, unit = self.memory, self.units.unit[..., 0]
        if self.solver.rtol is not None or memory.inner_residual is None:
            return asked
        longer = torch.ones_like(asked)
        if memory.inverse is not None and memory.solution is not None:
            longer = (memory.inverse * unit / norm(memory.solution)).clamp(min=1)
        enough = (memory.inner_residual / longer).clamp(max=CEILING)
        return torch.maximum(asked, enough.nan_to_num(0.0, posinf=0.0) * unit)

    def _whole(self, solver: CG, goal: Tensor) -> Solution:
        """Correct the start, and judge the sum as the answer of a solve from zero is judged."""
        system = dataclasses.replace(
            self.system, b=self.left, memory=None, x0=None, goal=goal, explores=False
        )
        first = solver.run(system)
        x, part, residual = self.start + first.x, first, first.residual
        assert residual is not None
        self._see(first)
        claimed, most = first.status == Status.CONVERGED, (1 + 1 / SURE) * goal
        if not self.looks and system.condition is not None:  # somebody asks for the figure
            residual = self.system.b - self.matvec(x)
        elif self.looks and any_task(self._blurred(x, residual)):
            residual = self.system.b - self.matvec(x)
            short = claimed & (norm(residual) > most)
            if any_task(short):  # rounding was in the way
                again = torch.where(short[..., None], residual, 0.0)
                part = solver.run(dataclasses.replace(system, b=again, condition=None))
                x = x + part.x
                residual = self.system.b - self.matvec(x)
        units, size = self.units, norm(residual) / self.units.unit[..., 0]
        short = claimed & (norm(residual) > most)
        ends = {Status.STAGNATED: short, Status.NEGATIVE_CURVATURE: self.bent}
        x, status, size = units.settled(x, graded(ends, first.status), size)
        reached = self._largest() * norm(x) / units.unit[..., 0]
        precision, noise = self.system.layout.precision, self.system.noise
        return dataclasses.replace(
            first,
            x=x,
            status=status,
            success=self.solver._succeeded(status, size, reached, precision, noise),
            iterations=first.iterations if part is first else first.iterations + part.iterations,
            matvecs=first.matvecs if part is first else first.matvecs + part.matvecs,
            residual_norm=size,
            residual=residual,
            negative_curvature=first.negative_curvature | self.bent,
            spectrum=widest(first.spectrum, self.quotient),
            linear_error=self._linear_error(x, size),
        )

    def _blurred(self, x: Tensor, residual: Tensor) -> Tensor:
        """Say where rounding of the product with the start counts beside the residual."""
        eps = torch.finfo(self.system.layout.precision).eps
        rounding = eps * (self.units.scale + self._largest() * norm(x))
        return self.units.present & (norm(residual) < SURE * rounding)

    def _largest(self) -> Tensor:
        """Give the largest eigenvalue that was seen; zero where none was."""
        extremes = self._extremes()
        return extremes[..., 1].nan_to_num(0.0)

    def _see(self, solution: Solution) -> None:
        """Keep what a solve has shown of the inverse and of the spectrum."""
        memory, seen = self.memory, solution.inverse
        if self.system.condition is None:  # nobody asks
            return
        old = memory.inverse
        if old is not None:
            if seen is None:
                memory.inverse = _FADES * old
                return
            faded = torch.where(solution.iterations > FEW, 0.0, _FADES * old)
            seen = torch.fmax(seen, faded)
        if seen is not None:
            memory.inverse = moved_on(old, seen)
        if self.looks and solution.spectrum is not None:
            now = solution.eigenvalues
            before = memory.extremes
            few = (solution.iterations <= FEW)[..., None]
            if before is not None:
                both = torch.stack(
                    [torch.fmin(now, before)[..., 0], torch.fmax(now, before)[..., 1]], dim=-1
                )
                now = torch.where(few, both, now)
            memory.extremes = moved_on(before, now)

    def _linear_error(self, x: Tensor, size: Tensor) -> Tensor | None:
        """Estimate the relative error of the answer from its residual, as from zero."""
        inverse, unit, damping = self.memory.inverse, self.units.unit[..., 0], self.solver.damping
        if inverse is None or self.system.condition is None:
            return None
        length = norm(x) / unit
        rounding = torch.finfo(self.system.layout.precision).eps * self._largest()
        rounding = rounding * torch.maximum(inverse, length)
        return size * inverse / length + abs(damping) * inverse + rounding

    def _look_around(self, whole: Solution) -> None:
        """Look now and then for negative curvature that short solves from an answer pass by."""
        memory, taken = self.memory, whole.iterations
        few = self.units.present & (taken <= FEW)
        if not self.system.explores or not any_task(few):
            memory.since = EVERY if any_task(whole.negative_curvature) else 0
            return
        memory.since += 1
        if memory.since < EVERY:
            return
        most = AROUND
        if self.solver.maxiter is not None:  # the budget is for both
            most = min(AROUND, self.solver.maxiter - int(taken.max()))
        if most < 1:
            return
        z = self._vector()
        image = self._sample(z)
        around = dataclasses.replace(self.solver, maxiter=most, rtol=None, atol=0.0, callback=None)
        seen = around.run(
            dataclasses.replace(
                self.system, b=torch.where(few[..., None], image, 0.0), x0=None, condition=None,
                explores=False, memory=None, watch=None,
            )
        )  # fmt: skip
        self.matvec.count += seen.matvecs
        bent = few & (seen.negative_curvature | curves_down(z, image, self.system.noise))
        whole.negative_curvature = whole.negative_curvature | bent
        whole.status = graded({Status.NEGATIVE_CURVATURE: bent}, whole.status)
        whole.success = whole.success & ~bent
        whole.spectrum = widest(whole.spectrum, seen.spectrum)
        # Where there was any, the next solve looks again.
        memory.since = EVERY if any_task(whole.negative_curvature) else 0

    def _vector(self) -> Tensor:
        """Make the next vector of random signs, whose entries differ a little in size."""
        b, n = self.system.b, self.system.b.shape[-1]
        with outside_transforms():
            generator = torch.Generator().manual_seed(self.memory.made)
            number = torch.rand(n, generator=generator, dtype=b.dtype).to(b.device)
        self.memory.made += 1
        size = 0.9 + 0.4 * (number % 0.5)  # so that no row of equal entries comes out as zero
        return torch.where(number < 0.5, size, -size).expand_as(b)

    def _sample(self, z: Tensor) -> Tensor:
        """Form one product, and take it into the estimates of the diagonal and of the rows."""
        memory = self.memory
        image = self.matvec(z)
        entry = image / z
        memory.rows, memory.age = entry.abs(), 0
        wanted = memory.scaling > 0 or memory.probes > 0 or memory.wait == 0
        if wanted and self._may_scale:
            part = 1 / min(memory.probes + 1, _WINDOW)
            before = memory.diagonal, memory.square
            memory.diagonal = entry if before[0] is None else torch.lerp(before[0], entry, part)
            square = entry.square()
            memory.square = square if before[1] is None else torch.lerp(before[1], square, part)
            memory.probes += 1
        return image

    @property
    def _may_scale(self) -> bool:
        """Whether a diagonal is estimated at all."""
        system = self.system
        free = self.solver.preconditioner is None and not system.noisy and system.shared == 1
        return free and not is_vast(system.b) and system.b.shape[-1] > 1

    def _learn_rates(self, whole: Solution, iterations: Tensor, *, scaled: bool) -> None:
        """Measure how much a step is worth, and decide on the diagonal by that."""
        memory, present = self.memory, self.units.present
        if not self.warm or not self._may_scale or not any_task(present & (iterations > 1)):
            return
        before, after = norm(self.left) / self.units.unit[..., 0], whole.residual_norm
        gain = (before / after.clamp(min=torch.finfo(after.dtype).tiny)).log()
        gain = torch.where(present & torch.isfinite(gain), gain, 0.0)
        counts = torch.where(present, iterations, 0)
        figures = memory.scaled if scaled else memory.plain
        figures[0] = _KEPT * figures[0] + float(counts.sum())
        figures[1] = _KEPT * figures[1] + float(gain.sum())
        if not scaled:
            memory.wait = max(memory.wait - 1, 0)
            return
        memory.trials += 1
        rate, other = (
            max(gain, 0.0) / max(steps, 1.0) for steps, gain in (memory.scaled, memory.plain)
        )
        if memory.scaling == 1 and memory.trials >= _TRIALS:
            if rate > _BETTER * other:
                memory.scaling, memory.patience = 2, Memory.patience
            else:
                dropped(memory)
        elif memory.scaling == 2 and rate < other:
            dropped(memory)

    def _probe(self, whole: Solution, iterations: Tensor) -> None:
        """Estimate the diagonal a little further, and hand on what is known of the rows."""
        memory = self.memory
        memory.age += 1
        if self._may_scale and self.warm and memory.scaling == 0 and memory.wait == 0:
            long = int(torch.where(self.units.present, iterations, 0).max()) >= _WORTH
            for _ in range(_AT_ONCE if long else 0):
                self._sample(self._vector())
            memory.scaling = int(memory.probes >= _PROBES)
        elif memory.scaling == 2 and memory.age >= _REFRESH:
            self._sample(self._vector())
        if memory.rows is None or memory.age >= EVERY or self.system.condition is None:
            return
        rows = self._rows()
        hidden = self._hidden(rows, whole)
        if not any_task(hidden):  # else it is looked at anew
            whole.probe = Probe(rows, hidden)

    def _extremes(self) -> Tensor:
        extremes = self.memory.extremes
        none = self.units.scale.new_full((*self.units.scale.shape, 2), math.nan)
        return none if extremes is None else extremes

    def _kept(self, whole: Solution) -> Tensor:
        """Keep the answer, but for tasks that failed: they start from zero next time."""
        good = (whole.status == Status.CONVERGED) | (whole.status == Status.MAX_ITERATIONS)
        good = good | (whole.status == Status.STAGNATED)
        sound = torch.isfinite(whole.residual_norm) & good
        return torch.where(sound[..., None], whole.x, 0.0)
