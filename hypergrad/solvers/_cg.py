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
        pAps, rzs, betas, known, ends = [], [], [], [], []  # of each step, for what comes after
        observer = None if condition is None else Observer(condition, r)
        steps = 0
        while steps < limit and (not looks or any_task(active)):
            steps += 1
            Ap = matvec(p)
            pAp = dot(p, Ap)
            quotient = pAp / pp
            steepest = torch.maximum(steepest, quotient)
            moving = active & (quotient > flat * steepest)  # false for NaN too
            alpha = torch.where(moving, rz / pAp, zero).unsqueeze(-1)
            if observer is not None:
                observer.along(p, Ap, p, torch.where(moving, pAp, zero))
            x = torch.addcmul(x, alpha, p)
            r = torch.addcmul(r, alpha, Ap, value=-1)
            pAps.append(pAp)
            rzs.append(rz)
            known.append(active)
            ends.append((moving, quotient, steepest, dot(Ap, Ap), pp))
            z = r if precondition is None else precondition(r)
            rz_new = dot(r, z)
            rr = rz_new if precondition is None else dot(r, r)
            better = rr < best_rr
            best = torch.where(better.unsqueeze(-1), x, best)
            best_rr = torch.where(better, rr, best_rr)
            beta = torch.where(moving, rz_new / rz, zero)
            betas.append(beta)
            p = torch.addcmul(z, beta.unsqueeze(-1), p)
            pp = torch.addcmul(rr, beta.square(), pp) if precondition is None else dot(p, p)
            rz = rz_new
            if observer is not None:
                observer.after_step(x, rr.sqrt(), moving)
            active = moving & (rr > target)
        status = torch.where(active, int(Status.MAX_ITERATIONS), int(Status.CONVERGED))
        iterations, negative = torch.zeros_like(status), torch.zeros_like(active)
        if steps:
            moved, quotients, scales, ApAps, pps = (
                torch.stack(kept) for kept in zip(*ends, strict=True)
            )
            iterations = moved.sum(dim=0)
            stops = torch.stack(known) & ~moved  # at the step at which a task had to stop, if any
            failed = stops.any(dim=0)
            unknown = (stops & ~torch.isfinite(quotients)).any(dim=0)
            # |Ap|^2 <= |A| p.Ap for a semidefinite A: more than that is negative curvature too.
            bent = ApAps > 100 * flat * scales.square() * pps
            negative = (stops & ((quotients < -flat * scales) | bent)).any(dim=0) & ~unknown
            status = torch.where(failed, int(Status.SINGULAR), status)
            status = torch.where(negative, int(Status.NEGATIVE_CURVATURE), status)
            status = torch.where(unknown, int(Status.NOT_FINITE), status)
            x = torch.where(failed[..., None], best, x)
            x = torch.where(unknown[..., None], torch.full_like(x, math.nan), x)
        return Part(
            x=x,
            status=status,
            iterations=iterations,
            steps=steps,
            negative=negative,
            largest=steepest,
            ritz=partial(ritz_values_of_cg, pAps, rzs, betas, known) if steps else None,
            observer=observer,
        )
