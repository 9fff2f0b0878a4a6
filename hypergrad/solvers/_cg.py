"""The method of conjugate gradients."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._autograd.branches import traced
from .._autograd.host import any_task, every_task
from .._autograd.transforms import transforms_active
from .._info import Status
from ._block_cg import in_a_block, shares
from ._cg_in_numbers import in_numbers, suits
from ._cg_steps import drift_of, quotients_of, ritz_of
from ._fields import tolerance
from ._krylov import AROUND, FEW, Correction, Iterative, Pass, Recurrence, off_zero
from ._long import is_long
from ._observer import Observer
from ._recycled import Scaled, recycled
from ._ritz import widest
from ._straight_cg import StraightCG
from ._system import Counted, LinearSystem, Solution, Units, graded
from ._vectors import dot, norm


@dataclasses.dataclass(frozen=True)
class CG(Iterative):
    """Conjugate gradients, for symmetric positive definite matrices.

    A task that meets negative curvature (p.Ap <= 0) stops there with the iterate of the smallest
    residual and the status ``NEGATIVE_CURVATURE``; it does not disturb the others. On a
    singular, consistent system the answer is that of minimum norm.

    Parameters
    ----------
    maxiter, rtol, atol, damping, preconditioner, callback, progress
        As in every iterative solver: see the documentation of the linear solvers.
    recycle : bool
        In a `Bilevel`, or a step of `hypergrad.compile`: start from the last solution, and keep
        what it showed of the matrix. A diagonal that some random products estimate scales the
        system, where that is measured to save steps; it is dropped where it does not, and not
        tried again for a while. With ``rtol=None`` a system is solved about as well as the inner
        problem was at the last step: to a relative residual between the one that the dtype can
        reach and 1e-2. Now and then a solve that ends within four steps looks around for negative
        curvature, with what is left of `maxiter`. Elsewhere it is an error.

    References
    ----------
    Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, 1952,
    equations 3:1; Saad, Iterative methods for sparse linear systems, 2003, algorithms 6.18 and,
    with a preconditioner, 9.1.

    Examples
    --------
    >>> import torch, hypergrad
    >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> x, info = hypergrad.CG(rtol=1e-10).solve(lambda v: A @ v, b)
    >>> torch.allclose(A @ x, b), hypergrad.Status(info.status).name
    (True, 'CONVERGED')
    """

    recycle: bool = dataclasses.field(default=False, kw_only=True)

    needs_symmetry: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        if not isinstance(self.recycle, bool):
            raise TypeError(f"recycle must be True or False; got {self.recycle!r}.")

    def run(self, system: LinearSystem, begun: Correction | None = None) -> Solution:
        """Iterate as all Krylov methods do; one system on the CPU in numbers."""
        looks = system.looks or self.rtol != 0
        if self.recycle:
            return recycled(self, system)
        simple = self.preconditioner is None or isinstance(self.preconditioner, Scaled)
        if begun is None and simple and suits(system.b, looks):
            return self._run_in_numbers(system)
        return super().run(system, begun)

    def _run_in_numbers(self, system: LinearSystem) -> Solution:
        """Do what the general way would, where one pass is enough, in a fifth of the operations."""
        scale = norm(system.b).item()
        if system.x0 is not None or not 0 < scale < math.inf:
            return super().run(system)
        matvec = Counted(system.matvec, self.damping)
        b, long = system.b / scale, is_long(system.b)
        precision = system.layout.precision
        tol = max(tolerance(self.rtol, precision), self.atol / scale)
        if system.noisy:
            tol = float(Units(system.b).tolerance(self.rtol, self.atol, precision, system.noise))
        if system.goal is not None:
            tol = system.goal.item() / scale
        limit = self.maxiter or min(10 * b.shape[-1], 5000)
        if tol >= 1:
            return super().run(system)
        scaled = self.preconditioner
        by_diagonal = scaled.as_preconditioner(matvec, b) if isinstance(scaled, Scaled) else None
        part = in_numbers(
            matvec, by_diagonal, b, tol, limit, system.condition, system.watch, system.noise
        )
        residual = part.known(precision) if system.steady else None
        known = residual is not None
        if long and not known:  # it has become the residual
            torch.div(system.b, scale, out=b)
            part.residual = None
        few = part.steps <= FEW and part.steps < limit and part.status == Status.CONVERGED
        if few and self._explores(system):
            most = max(limit - part.steps, AROUND)
            unit = system.b / scale if long and known else b
            self._look_around(matvec, unit, part, tol, most, system.noise)
        if residual is None:
            image = matvec(part.x)
            residual = torch.sub(b, image, out=b if long else None)
            del image
        size = norm(residual)
        status = Status(int(part.status))
        met = size.item() <= tol or (known and status == Status.CONVERGED)
        solved = status == Status.CONVERGED and met
        cut = status == Status.MAX_ITERATIONS and math.isfinite(size.item())
        if not solved and not cut:
            del b, residual
            return super().run(system, part)
        allowed = self.rtol is None and self.maxiter is not None
        linear_error = self._linear_error(part.x, size, part, precision)
        newton = None if part.observer is None else part.observer.newton(part.x)
        return Solution(
            x=torch.mul(part.x, scale, out=part.x if long else None),
            status=torch.tensor(int(Status.CONVERGED if met else status), device="cpu"),
            success=torch.tensor(met or allowed, device="cpu"),
            iterations=part.iterations,
            matvecs=matvec.count,
            residual_norm=size,
            negative_curvature=part.negative,
            method="CG",
            spectrum=part.ritz if by_diagonal is None else part.quotients,
            residual=torch.mul(residual, scale, out=residual if long else None),
            linear_error=linear_error,
            newton=newton,
            inverse=None if part.observer is None else part.observer.inverse(part.x),
        )

    def _look_around(
        self,
        matvec: Counted,
        b: Tensor,
        part: Correction,
        tol: float,
        limit: int,
        noise: Tensor | float,
    ) -> None:
        """Go on from a little off an answer that came soon, for what the search did not reach."""
        more = in_numbers(matvec, None, off_zero(matvec, b), tol, limit, None, noise=noise)
        part.negative = more.negative
        part.largest = torch.maximum(part.largest, more.largest)
        part.ritz = widest(part.ritz, more.ritz)
        if more.negative:
            part.status = more.status
        part.steps += more.steps + 1

    def _iterate(self, start: Pass) -> Correction:
        if suits(start.r, start.looks):
            limit = start.limit * bool(start.active)
            r = start.r.clone() if is_long(start.r) else start.r
            return in_numbers(
                start.matvec,
                start.precondition,
                r,
                start.tol.item(),
                limit,
                start.condition,
                start.watch,
                start.noise,
            )
        return in_a_block(start, _one_by_one) if shares(start) else _one_by_one(start)


def _one_by_one(start: Pass) -> Correction:
    if traced() and start.precondition is None:
        straight = StraightCG(start)
        if straight.sound():
            return straight.ended()
        start = dataclasses.replace(start, looks=False)
    run = _Recurrence(start)
    while run.goes_on():
        run.step()
    return run.ended()


class _Recurrence(Recurrence):
    """The iteration for many tasks at once; the names are the literature's."""

    def __init__(self, start: Pass) -> None:
        super().__init__(start)
        zero, self.smooth = self.zero, False
        self.target = start.tol.square()
        r, z = start.r, start.preconditioned(start.r)
        self.rz = dot(r, z)
        self.rr = self.rz if start.precondition is None else dot(r, r)
        self.pp = dot(z, z)
        self.x = self.best = torch.zeros_like(r)
        self.best_rr, self.first = self.rr, self.rr.sqrt()
        # In place, where no transform is in the way; x stays, since others keep it.
        self.scratch: Tensor | None = None
        if r.device.type == "cpu" and not transforms_active():
            r, z, self.scratch = r.clone(), z.clone(), torch.empty_like(r)
        self.r, self.p = r, z
        # `largest` is the largest Rayleigh quotient met, the scale for "p.Ap is zero".
        self.stopped = zero  # p.Ap / p.p of the direction at which a task had to stop
        self.bent = self.singular  # p.Ap is zero there, and Ap is not
        self.log: list[tuple[Tensor, ...]] = []  # the coefficients of each step
        self.observer = None if start.condition is None else Observer(start.condition, r)

    def goes_on(self) -> bool:
        """Count a step, if one is made; where every task goes on there is no need to ask."""
        if not self.smooth or self.steps >= self.start.limit or self.start.watch is not None:
            return super().goes_on()
        self.steps += 1
        return True

    def reached(self) -> Tensor:
        """Give the norm of each task's residual."""
        return self.rr.sqrt()

    def step(self) -> None:
        """Make one step: Hestenes and Stiefel (1952), equations 3:1b to 3:1f."""
        start, zero, p, scratch = self.start, self.zero, self.p, self.scratch
        Ap = start.matvec(p)
        pAp = dot(p, Ap) if scratch is None else torch.mul(p, Ap, out=scratch).sum(dim=-1)
        quotient = pAp / self.pp
        self.largest = torch.maximum(self.largest, quotient.abs())
        usable = quotient > self.start.least * self.largest  # false for NaN too
        moving = self.active & usable
        alpha = torch.where(moving, self.rz / pAp, zero)[..., None]  # 3:1b
        if self.observer is not None:
            self.observer.along(p, Ap, p, torch.where(moving, pAp, zero))
        self.x = torch.addcmul(self.x, alpha, p)  # 3:1c
        out = None if scratch is None else self.r
        self.r = torch.addcmul(self.r, alpha, Ap, value=-1, out=out)  # 3:1d
        z = start.preconditioned(self.r)
        # A norm is summed without a vector of the squares.
        self.rr = torch.linalg.vector_norm(self.r, dim=-1).square()
        rz = self.rr if start.precondition is None else dot(self.r, z)
        beta = torch.where(moving, rz / self.rz, zero)  # 3:1e
        self.log.append((pAp, self.rz, beta, self.active, moving, self.pp, self.rr))
        going = moving & (self.rr > self.target)
        self._keep_best(going)
        if not start.looks or not (self.smooth or every_task(usable | ~self.active)):
            self._stop(self.active & ~usable, quotient, Ap)
        self.p = torch.addcmul(z, beta[..., None], p, out=None if scratch is None else p)  # 3:1f
        alone = start.precondition is None
        self.pp = torch.addcmul(self.rr, beta.square(), self.pp) if alone else dot(self.p, self.p)
        self.rz, self.active = rz, going
        if self.observer is not None and self.observer.is_due():
            self.observer.keep(self.x, self.rr.sqrt(), moving)

    def _keep_best(self, going: Tensor) -> None:
        """Keep the iterate of the smallest residual."""
        looks, better = self.start.looks, self.rr < self.best_rr
        # Where every task goes on and comes closer, which one look tells, that is all.
        self.smooth = looks and every_task(going & better)
        if self.smooth or (looks and every_task(better)):
            self.best, self.best_rr = self.x, self.rr
        elif not looks or any_task(better):
            self.best = torch.where(better[..., None], self.x, self.best)
            self.best_rr = torch.where(better, self.rr, self.best_rr)

    def _stop(self, stopping: Tensor, quotient: Tensor, Ap: Tensor) -> None:
        """Stop the tasks whose direction has no positive curvature."""
        self.stopped = torch.where(stopping, quotient, self.stopped)
        # |Ap|^2 <= |A| p.Ap for a semidefinite A: more is negative curvature too.
        bound = 100 * self.flat * self.largest.square() * self.pp
        self.bent = self.bent | (stopping & (dot(Ap, Ap) > bound))
        self.singular = self.singular | stopping

    def ended(self) -> Correction:
        """Say how the tasks ended; one that had to stop returns its best iterate."""
        failed, x = self.singular, self.x
        self.unknown = failed & ~torch.isfinite(self.stopped)
        bent = self.bent | (self.stopped < -self.flat * self.largest)
        self.negative = failed & ~self.unknown & bent
        stopped = not self.start.looks or any_task(failed)
        if stopped:
            x = torch.where(failed[..., None], self.best, x)
        known: dict[str, Any] = {"observer": self.observer}
        if self.log:
            *of_steps, moves, pp, _ = zip(*self.log, strict=True)
            self.iterations = torch.stack(moves).sum(dim=0)
            known["ritz"] = partial(ritz_of, *of_steps)
            known["quotients"] = partial(quotients_of, of_steps[0], pp, moves)
        if self.start.steady and self.log and not stopped:
            known |= {"residual": self.r, "drift": drift_of(self.log, self.first)}
        part = self.correction(x, **known)
        part.status = graded({Status.NEGATIVE_CURVATURE: self.negative}, part.status)
        return part
