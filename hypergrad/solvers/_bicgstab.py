"""The stabilised biconjugate gradient method."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from ._krylov import PRICE, Correction, Iterative, Pass, Recurrence, curves_down
from ._vectors import dot


@dataclasses.dataclass(frozen=True)
class BiCGSTAB(Iterative):
    """BiCGSTAB, for any square system, in the memory of a few vectors.

    An iteration makes two products. The preconditioner is applied from the right, so the residual
    that is tested is that of the system itself. Where one of its coefficients vanishes, the method
    starts once more from the best answer so far, and then ends with the status ``BREAKDOWN``.

    Parameters
    ----------
    maxiter, rtol, atol, damping, preconditioner, callback, progress
        As in every iterative solver: see the documentation of the linear solvers.

    References
    ----------
    van der Vorst, Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG for the solution of
    nonsymmetric linear systems, 1992; Saad, Iterative methods for sparse linear systems, 2003,
    algorithm 7.7.

    Examples
    --------
    >>> import torch, hypergrad
    >>> A = torch.tensor([[2.0, 1.0], [-1.0, 3.0]], dtype=torch.float64)
    >>> b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> x, info = hypergrad.BiCGSTAB(rtol=1e-10).solve(lambda v: A @ v, b)
    >>> torch.allclose(A @ x, b), hypergrad.Status(info.status).name
    (True, 'CONVERGED')
    """

    judged_by_residual: ClassVar[bool] = True  # it returns its best iterate

    def _iterate(self, start: Pass) -> Correction:
        run = _Recurrence(start)
        while run.goes_on():
            run.step()
        x = torch.where((run.broken | run.ended | run.active)[..., None], run.best, run.x)
        return run.correction(torch.where(run.singular[..., None], run.modest, x))


class _Recurrence(Recurrence):
    """The iteration, by the names of Saad (2003), algorithm 7.7; `shadow` is r0*."""

    def __init__(self, start: Pass) -> None:
        super().__init__(start)
        self.coarse = torch.finfo(start.r.dtype).eps ** 0.5
        self.shadow = self.r = self.p = start.r
        self.x = self.best = self.modest = torch.zeros_like(start.r)
        self.size = self.best_size = self.least = torch.linalg.vector_norm(start.r, dim=-1)
        self.rho, self.shadow_size = self.size.square(), self.size
        self.ended = self.broken

    def step(self) -> None:
        """Make one step of two products."""
        start, active, zero, one = self.start, self.active, self.zero, self.one
        p_hat = start.preconditioned(self.p)
        v = start.matvec(p_hat)
        self.negative = self.negative | (active & curves_down(p_hat, v, self.start.noise))
        v_size, p_size = (torch.linalg.vector_norm(w, dim=-1) for w in (v, p_hat))
        across = dot(self.shadow, v)
        sound = across.abs() > self.flat * self.shadow_size * v_size  # false for NaN too
        alpha = torch.where(sound, self.rho / torch.where(sound, across, one), zero)
        s = torch.addcmul(self.r, alpha[..., None], v, value=-1)
        s_size = torch.linalg.vector_norm(s, dim=-1)
        half = active & sound & (s_size <= start.tol)  # the first half of the step is enough
        s_hat = start.preconditioned(s)
        t = start.matvec(s_hat)
        t_size = torch.linalg.vector_norm(t, dim=-1)
        ts = dot(t, s)
        stable = half | (ts.abs() > self.flat * t_size * s_size)
        omega = torch.where(stable & ~half, ts / t_size.square(), zero)
        gain = torch.addcmul(alpha[..., None] * p_hat, omega[..., None], s_hat)
        moving = active & sound  # also by half a step, where the second half is none
        wide = moving[..., None]
        self.x = torch.where(wide, self.x + gain, self.x)
        self.r = torch.where(wide, torch.addcmul(s, omega[..., None], t, value=-1), self.r)
        self.size = torch.linalg.vector_norm(self.r, dim=-1)
        over = self._keep_best(moving, v_size, p_size)
        self.iterations = self.iterations + moving

        met = self.size <= start.tol
        rho = dot(self.shadow, self.r)
        vanished = ~met & ~(rho.abs() > self.flat * self.shadow_size * self.size)
        stopping = active & (~sound | ~stable | vanished | over)
        # A number that is not finite from the start is the matrix's, and a later one the method's.
        lost = stopping & ~torch.isfinite(self.size + v_size + t_size) & (self.iterations <= 1)
        self.unknown = self.unknown | lost
        self.broken = self.broken | (stopping & ~over & ~(sound & met))
        beta = torch.where(stopping | ~stable, zero, rho / self.rho * alpha / omega)
        beta = torch.where(active & ~met, beta, zero)[..., None]
        self.p = torch.addcmul(self.r, beta, torch.addcmul(self.p, omega[..., None], v, value=-1))
        self.rho = torch.where(rho == 0, one, rho)
        self.active = active & ~stopping & ~met

    def _keep_best(self, moving: Tensor, v_size: Tensor, p_size: Tensor) -> Tensor:
        """Keep the best iterate, and say where the answer is too long to come any closer."""
        growth = v_size / torch.where(p_size > 0, p_size, self.one)
        self.largest = torch.where(moving, torch.maximum(self.largest, growth), self.largest)
        length = self.largest * torch.linalg.vector_norm(self.x, dim=-1)
        reach, cost = self.flat * length, self.size + PRICE * length
        # The answer where there is no solution.
        self.modest = torch.where((moving & (cost < self.least))[..., None], self.x, self.modest)
        self.least = torch.where(moving, torch.minimum(self.least, cost), self.least)
        better = moving & (self.size < self.best_size) & (reach < self.size.clamp(min=self.coarse))
        self.best = torch.where(better[..., None], self.x, self.best)
        self.best_size = torch.where(better, self.size, self.best_size)
        over = moving & (reach >= self.best_size)  # at the rounding floor, or singular
        null = v_size <= self.flat * self.largest * p_size
        null = self.active & (null | (over & (self.best_size > self.coarse)))
        self.singular = self.singular | (null & ~(self.size <= self.start.tol))
        self.ended = self.ended | over
        return over
