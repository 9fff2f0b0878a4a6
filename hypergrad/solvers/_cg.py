"""The method of conjugate gradients."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .._info import Status
from .._transforms import any_task
from ._base import Iterative, Part, Product, dot
from ._observer import Observer
from ._ritz import ritz_values_of_cg


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
        target = tol.square()
        zero = torch.zeros_like(tol)
        x = torch.zeros_like(r)
        z = r if precondition is None else precondition(r)
        p = z
        rz = dot(r, z)
        rr = rz if precondition is None else dot(r, r)
        best, best_rr = x, rr
        steepest = zero  # the largest Rayleigh quotient met, the scale for "p.Ap is zero"
        flat = torch.finfo(r.dtype).eps * r.shape[-1]
        pp = dot(p, p)
        stopped = zero  # p.Ap / p.p of the direction at which a task had to stop
        bent = torch.zeros_like(active)  # p.Ap is zero there, and Ap is not
        failed = torch.zeros_like(active)
        iterations = torch.zeros_like(active, dtype=torch.int64)
        curvatures, sizes, betas, known = [], [], [], []  # what the Ritz values are made from
        observer = None if condition is None else Observer(condition, r)
        steps = 0
        while steps < limit and (not looks or any_task(active)):
            steps += 1
            Ap = matvec(p)
            pAp = dot(p, Ap)
            steepest = torch.maximum(steepest, pAp.abs() / pp)
            usable = pAp > flat * steepest * pp  # false for NaN too
            moving = active & usable
            stopping = active & ~usable
            stopped = torch.where(stopping, pAp / pp, stopped)
            # |Ap|^2 <= |A| p.Ap for a semidefinite A: more than that is negative curvature too.
            bent = bent | (stopping & (dot(Ap, Ap) > 100 * flat * steepest.square() * pp))
            failed = failed | stopping
            if observer is not None:
                observer.along(p, Ap, p, torch.where(moving, pAp, zero))
            alpha = torch.where(moving, rz / pAp, zero)[..., None]
            x = torch.addcmul(x, alpha, p)
            r = torch.addcmul(r, alpha, Ap, value=-1)
            z = r if precondition is None else precondition(r)
            rz_new = dot(r, z)
            rr = rz_new if precondition is None else dot(r, r)
            better = rr < best_rr
            best = torch.where(better[..., None], x, best)
            best_rr = torch.where(better, rr, best_rr)
            beta = torch.where(moving, rz_new / rz, zero)
            curvatures.append(pAp)
            sizes.append(rz)
            betas.append(beta)
            known.append(active)
            p = torch.addcmul(z, beta[..., None], p)
            pp = rr + beta.square() * pp if precondition is None else dot(p, p)
            rz = rz_new
            iterations = iterations + moving
            if observer is not None:
                observer.after_step(x, rr.sqrt(), moving)
            active = moving & (rr > target)
        status = torch.where(active, int(Status.MAX_ITERATIONS), int(Status.CONVERGED))
        negative = failed & ((stopped < -flat * steepest) | bent)
        status = torch.where(failed, int(Status.SINGULAR), status)
        status = torch.where(negative, int(Status.NEGATIVE_CURVATURE), status)
        status = torch.where(failed & ~torch.isfinite(stopped), int(Status.NOT_FINITE), status)
        unknown = failed & ~torch.isfinite(stopped)
        x = torch.where(failed[..., None], best, x)
        x = torch.where(unknown[..., None], torch.full_like(x, math.nan), x)
        return Part(
            x=x,
            status=status,
            iterations=iterations,
            steps=steps,
            negative=negative,
            largest=steepest,
            ritz=partial(ritz_values_of_cg, curvatures, sizes, betas, known) if steps else None,
            observer=observer,
        )
