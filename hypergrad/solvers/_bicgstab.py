"""The stabilised biconjugate gradient method."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._info import Status
from ._base import Counted, Product, dot
from ._iterative import PRICE, Iterative, Part, curves_down


@dataclasses.dataclass(frozen=True)
class BiCGSTAB(Iterative):
    """BiCGSTAB, for any square system, in the memory of a few vectors.

    An iteration makes two products. The preconditioner is applied from the right, so the residual
    that is tested is that of the system itself. Where one of its coefficients vanishes, the method
    starts once more from the best answer so far, and then ends with the status ``BREAKDOWN``.

    Parameters
    ----------
    maxiter, rtol, atol, damping, preconditioner
        As in every iterative solver: see the documentation of the linear solvers.

    References
    ----------
    van der Vorst, Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG for the solution of
    nonsymmetric linear systems, 1992.

    Examples
    --------
    >>> import torch, hypergrad
    >>> A = torch.tensor([[2.0, 1.0], [-1.0, 3.0]], dtype=torch.float64)
    >>> b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> x, info = hypergrad.BiCGSTAB(rtol=1e-10).solve(lambda v: A @ v, b)
    >>> torch.allclose(A @ x, b), hypergrad.Status(info.status).name
    (True, 'CONVERGED')
    """

    judged_by_residual: ClassVar[bool] = True  # what it returns is its best iterate

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
        zero, one = torch.zeros_like(tol), torch.ones_like(tol)
        flat = 10 * torch.finfo(r.dtype).eps
        coarse = torch.finfo(r.dtype).eps ** 0.5
        x, p = torch.zeros_like(r), r
        shadow, shadow_size = r, torch.linalg.vector_norm(r, dim=-1)
        rho, size = shadow_size.square(), shadow_size
        best, best_size = x, size
        modest, least = x, size  # the answer where there is no solution
        largest = zero
        unknown, broken, singular, ended = (torch.zeros_like(active) for _ in range(4))
        negative = torch.zeros_like(active)
        iterations = torch.zeros_like(active, dtype=torch.int64)
        steps = 0
        while steps < limit and (not looks or any_task(active)):
            steps += 1
            p_hat = p if precondition is None else precondition(p)
            v = matvec(p_hat)
            negative = negative | (active & curves_down(p_hat, v))
            v_size, p_size = (torch.linalg.vector_norm(w, dim=-1) for w in (v, p_hat))
            across = dot(shadow, v)
            sound = across.abs() > flat * shadow_size * v_size  # false for NaN too
            alpha = torch.where(sound, rho / torch.where(sound, across, one), zero)
            s = torch.addcmul(r, alpha[..., None], v, value=-1)
            s_size = torch.linalg.vector_norm(s, dim=-1)
            half = active & sound & (s_size <= tol)  # the first half of the step is enough
            s_hat = s if precondition is None else precondition(s)
            t = matvec(s_hat)
            t_size = torch.linalg.vector_norm(t, dim=-1)
            ts = dot(t, s)
            stable = half | (ts.abs() > flat * t_size * s_size)
            omega = torch.where(stable & ~half, ts / t_size.square(), zero)
            gain = torch.addcmul(alpha[..., None] * p_hat, omega[..., None], s_hat)
            moving = active & sound  # also by half a step, where the second half is none
            x = torch.where(moving[..., None], x + gain, x)
            r = torch.where(moving[..., None], torch.addcmul(s, omega[..., None], t, value=-1), r)
            size = torch.linalg.vector_norm(r, dim=-1)
            growth = v_size / torch.where(p_size > 0, p_size, one)
            largest = torch.where(moving, torch.maximum(largest, growth), largest)
            # The answer is too long to come any closer: at the rounding floor, or singular.
            length = largest * torch.linalg.vector_norm(x, dim=-1)
            reach, cost = flat * length, size + PRICE * length
            modest = torch.where((moving & (cost < least))[..., None], x, modest)
            least = torch.where(moving, torch.minimum(least, cost), least)
            better = moving & (size < best_size) & (reach < size.clamp(min=coarse))
            best = torch.where(better[..., None], x, best)
            best_size = torch.where(better, size, best_size)
            over = moving & (reach >= best_size)
            null = active & ((v_size <= flat * largest * p_size) | (over & (best_size > coarse)))
            iterations = iterations + moving

            met = size <= tol
            rho_next = dot(shadow, r)
            vanished = ~met & ~(rho_next.abs() > flat * shadow_size * size)
            stopping = active & (~sound | ~stable | vanished | over)
            # What is not finite from the start is the matrix, and later the method.
            lost = stopping & ~torch.isfinite(size + v_size + t_size) & (iterations <= 1)
            unknown, singular = unknown | lost, singular | (null & ~met)
            broken = broken | (stopping & ~over & ~(sound & met))
            ended = ended | over
            beta = torch.where(stopping | ~stable, zero, rho_next / rho * alpha / omega)
            beta = torch.where(active & ~met, beta, zero)[..., None]
            p = torch.addcmul(r, beta, torch.addcmul(p, omega[..., None], v, value=-1))
            rho = torch.where(rho_next == 0, one, rho_next)
            active = active & ~stopping & ~met
        status = torch.where(active, int(Status.MAX_ITERATIONS), int(Status.CONVERGED))
        status = torch.where(broken, int(Status.BREAKDOWN), status)
        status = torch.where(singular, int(Status.SINGULAR), status)
        status = torch.where(unknown, int(Status.NOT_FINITE), status)
        x = torch.where((broken | ended | active)[..., None], best, x)
        x = torch.where(singular[..., None], modest, x)
        return Part(
            x=torch.where(unknown[..., None], torch.full_like(x, math.nan), x),
            status=status,
            iterations=iterations,
            steps=steps,
            negative=negative,
            largest=largest,
        )
