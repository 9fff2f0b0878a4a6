"""The method of conjugate gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .._autograd.host import any_task, every_task
from .._autograd.transforms import transforms_active
from .._info import Status
from ._base import Counted, LinearSystem, Product, Solution, dot, norm, tolerance
from ._cg_in_numbers import FLAT, in_numbers, suits
from ._iterative import AROUND, FEW, Iterative, Part, off_zero
from ._observer import Observer
from ._ritz import ritz_values_of_cg, widest


@dataclasses.dataclass(frozen=True)
class CG(Iterative):
    """Conjugate gradients, for symmetric positive definite matrices.

    A task that meets negative curvature (p.Ap <= 0) stops there with the iterate of the smallest
    residual and the status ``NEGATIVE_CURVATURE``; it does not disturb the others. On a
    singular, consistent system the answer is that of minimum norm.

    Parameters
    ----------
    maxiter, rtol, atol, damping, preconditioner
        As in every iterative solver: see the documentation of the linear solvers.

    References
    ----------
    Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, 1952.

    Examples
    --------
    >>> import torch, hypergrad
    >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> x, info = hypergrad.CG(rtol=1e-10).solve(lambda v: A @ v, b)
    >>> torch.allclose(A @ x, b), hypergrad.Status(info.status).name
    (True, 'CONVERGED')
    """

    needs_symmetry: ClassVar[bool] = True

    def run(self, system: LinearSystem, begun: Part | None = None) -> Solution:
        """Iterate as all Krylov methods do; one system on the CPU in numbers."""
        if begun is None and suits(system.b) and self.preconditioner is None:
            return self._run_in_numbers(system)
        return super().run(system, begun)

    def _run_in_numbers(self, system: LinearSystem) -> Solution:
        """What the general way would do where one pass is enough, in a fifth of the operations."""
        scale = norm(system.b).item()
        looks = system.looks or self.rtol != 0
        if not looks or system.x0 is not None or not 0 < scale < math.inf:
            return super().run(system)
        matvec = Counted(system.matvec, self.damping)
        b = system.b / scale
        precision = system.layout.precision
        tol = max(tolerance(self.rtol, precision), self.atol / scale)
        limit = self.maxiter or min(10 * b.shape[-1], 5000)
        if tol >= 1:
            return super().run(system)
        part = in_numbers(matvec, None, b, tol, limit, system.condition)
        few = part.steps <= FEW and part.steps < limit and part.status == Status.CONVERGED
        if few and self._explores(system):
            self._look_around(matvec, b, part, tol, max(limit - part.steps, AROUND))
        x = part.x
        residual = torch.sub(b, matvec(x))
        size = norm(residual)
        status = Status(int(part.status))
        solved = status == Status.CONVERGED and size.item() <= tol
        cut = status == Status.MAX_ITERATIONS and math.isfinite(size.item())
        if not solved and not cut:
            return super().run(system, part)
        if size.item() <= tol:
            status = Status.CONVERGED
        inverse = newton = None
        if part.observer is not None:
            inverse, newton = part.observer.inverse(part.x), part.observer.newton(part.x)
        met = status == Status.CONVERGED
        allowed = self.rtol is None and self.maxiter is not None
        return Solution(
            x=x * scale,
            status=torch.tensor(int(status), device="cpu"),
            success=torch.tensor(met or allowed, device="cpu"),
            iterations=part.iterations,
            matvecs=matvec.count,
            residual_norm=size,
            negative_curvature=part.negative,
            method="CG",
            spectrum=part.ritz,
            residual=residual * scale,
            linear_error=self._linear_error(x, size, inverse, part.largest, precision),
            newton=newton,
        )

    def _look_around(self, matvec: Counted, b: Tensor, part: Part, tol: float, limit: int) -> None:
        """Go on from a little off an answer that came soon, for what the search did not reach."""
        r = off_zero(matvec, b)
        more = in_numbers(matvec, None, r, tol, limit, None)
        part.negative = more.negative
        part.largest = torch.maximum(part.largest, more.largest)
        part.ritz = widest(part.ritz, more.ritz)
        if more.negative:
            part.status = more.status
        part.steps += more.steps + 1

    def _iterate(
        self,
        matvec: Product,
        precondition: Product | None,
        r: Tensor,
        tol: Tensor,
        active: Tensor,
        limit: int,
        looks: bool,
        condition: Tensor | None = None,
    ) -> Part:
        if looks and suits(r):
            return in_numbers(matvec, precondition, r, tol.item(), limit * bool(active), condition)
        target = tol.square()
        zero = torch.zeros_like(tol)
        x = torch.zeros_like(r)
        z = r if precondition is None else precondition(r)
        p = z
        # In place, where no transform is in the way; x stays, since others keep it.
        scratch = None
        if r.device.type == "cpu" and not transforms_active():
            r, p, scratch = r.clone(), p.clone(), torch.empty_like(r)
        rz = dot(r, z)
        rr = rz if precondition is None else dot(r, r)
        best, best_rr = x, rr
        steepest = zero  # the largest Rayleigh quotient met, the scale for "p.Ap is zero"
        flat = FLAT * torch.finfo(r.dtype).eps
        pp = dot(p, p)
        stopped = zero  # p.Ap / p.p of the direction at which a task had to stop
        bent = torch.zeros_like(active)  # p.Ap is zero there, and Ap is not
        failed = torch.zeros_like(active)
        curvatures, sizes, betas, known, moves = [], [], [], [], []  # of each step
        observer = None if condition is None else Observer(condition, r)
        steps, smooth = 0, False
        while steps < limit and (smooth or not looks or any_task(active)):
            steps += 1
            Ap = matvec(p)
            pAp = dot(p, Ap) if scratch is None else torch.mul(p, Ap, out=scratch).sum(dim=-1)
            quotient = pAp / pp
            steepest = torch.maximum(steepest, quotient.abs())
            usable = quotient > flat * steepest  # false for NaN too
            moving = active & usable
            alpha = torch.where(moving, rz / pAp, zero)[..., None]
            if observer is not None:
                observer.along(p, Ap, p, torch.where(moving, pAp, zero))
            x = torch.addcmul(x, alpha, p)
            r = torch.addcmul(r, alpha, Ap, value=-1, out=None if scratch is None else r)
            z = r if precondition is None else precondition(r)
            # A norm is summed without a vector of the squares.
            rr = torch.linalg.vector_norm(r, dim=-1).square()
            rz_new = rr if precondition is None else dot(r, z)
            beta = torch.where(moving, rz_new / rz, zero)
            curvatures.append(pAp)
            sizes.append(rz)
            betas.append(beta)
            known.append(active)
            moves.append(moving)
            going, better = moving & (rr > target), rr < best_rr
            # Where every task goes on and comes closer, which one look tells, that is all.
            smooth = looks and every_task(going & better)
            if smooth or (looks and every_task(better)):
                best, best_rr = x, rr
            elif not looks or any_task(better):
                best = torch.where(better[..., None], x, best)
                best_rr = torch.where(better, rr, best_rr)
            if not looks or not (smooth or every_task(usable | ~active)):
                stopping = active & ~usable
                stopped = torch.where(stopping, quotient, stopped)
                # |Ap|^2 <= |A| p.Ap for a semidefinite A: more is negative curvature too.
                bent = bent | (stopping & (dot(Ap, Ap) > 100 * flat * steepest.square() * pp))
                failed = failed | stopping
            p = torch.addcmul(z, beta[..., None], p, out=None if scratch is None else p)
            pp = torch.addcmul(rr, beta.square(), pp) if precondition is None else dot(p, p)
            rz = rz_new
            if observer is not None:
                observer.after_step(x, rr.sqrt(), moving)
            active = going
        status = torch.where(active, int(Status.MAX_ITERATIONS), int(Status.CONVERGED))
        unknown = failed & ~torch.isfinite(stopped)
        negative = failed & ~unknown & ((stopped < -flat * steepest) | bent)
        status = torch.where(failed, int(Status.SINGULAR), status)
        status = torch.where(negative, int(Status.NEGATIVE_CURVATURE), status)
        status = torch.where(unknown, int(Status.NOT_FINITE), status)
        if not looks or any_task(failed):
            x = torch.where(failed[..., None], best, x)
            x = torch.where(unknown[..., None], torch.full_like(x, math.nan), x)
        return Part(
            x=x,
            status=status,
            iterations=torch.stack(moves).sum(dim=0) if steps else torch.zeros_like(status),
            steps=steps,
            negative=negative,
            largest=steepest,
            ritz=partial(_ritz, curvatures, sizes, betas, known) if steps else None,
            observer=observer,
        )


def _ritz(*of_steps: Sequence[Tensor]) -> Tensor:
    pAp, size, beta, known = (torch.stack(list(kept), dim=-1) for kept in of_steps)
    return ritz_values_of_cg(pAp, size, beta, known)
