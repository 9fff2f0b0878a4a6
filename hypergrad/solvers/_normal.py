"""Methods for the normal equations: least squares, with products by the transpose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from .._errors import UnsupportedOperation
from .._info import Status
from ._fields import tolerance
from ._krylov import Correction, Iterative, Pass, Recurrence
from ._system import LinearSystem, Solution, Units, graded
from ._vectors import Product, dot, norm

_PASSES = 4  # of an iteration, each from the true residual of the one before


@dataclasses.dataclass(frozen=True)
class LeastSquares(Iterative):
    """The base of both methods: rectangular systems, whose answer is that of least squares."""

    needs_transpose: ClassVar[bool] = True
    judged_by_residual: ClassVar[bool] = True
    takes_rectangles: ClassVar[bool] = True

    def run(self, system: LinearSystem, begun: Correction | None = None) -> Solution:
        """Solve a square system as all methods do, and a rectangular one by least squares."""
        if system.layout.n == system.b.shape[-1]:
            return super().run(system, begun)
        return self._rectangular(system)

    def _rectangular(self, system: LinearSystem) -> Solution:
        """Find the x of least ||b - A x||, and among those the closest to x0.

        It is met where ``||r|| <= max(rtol ||b||, atol)``, or where ``||A^T r||`` is `rtol` times
        ``||A|| ||r||``; without `rtol`, where it is down to rounding.

        Parameters
        ----------
        system : LinearSystem
            What is solved.

        Returns
        -------
        solution : Solution
            The answer and its evidence; its residual is ``b - A x``, which is not small where no
            x solves the system.

        Raises
        ------
        UnsupportedOperation
            With damping, for there is no identity to damp by.
        """
        if self.damping:
            raise UnsupportedOperation(
                "damping means (A + damping I), which a rectangular A has not. For the penalty "
                "damping ||x||^2 let matvec return (A x, damping**0.5 x) too, and b a zero for it."
            )
        units, precision = Units(system.b), system.layout.precision
        x, start = self._start(system, units)
        usual, eps = tolerance(self.rtol, precision), torch.finfo(x.dtype).eps
        enough = 10 * eps if self.rtol is None else max(self.rtol, 10 * eps)
        limit = self.maxiter or min(10 * min(x.shape[-1], start.r.shape[-1]) + 10, 5000)
        start = dataclasses.replace(start, limit=limit, condition=None, enough=enough)
        size = norm(start.r)
        status = graded({Status.MAX_ITERATIONS: start.active})
        iterations, largest = torch.zeros_like(status), torch.zeros_like(size)
        slope = torch.full_like(size, math.inf)  # ||A^T r||, in units of ||A|| ||r||
        for _ in range(_PASSES):
            active = start.active
            if not start.goes_on(0, active):
                break
            part = self._iterate(start)
            iterations = iterations + torch.where(active, part.iterations, 0)
            largest = torch.where(active, torch.maximum(largest, part.largest), largest)
            candidate = x + part.x
            r = units.b - start.matvec(candidate)
            size_new, gradient = norm(r), norm(start.matvec.transposed(r))
            sizes = largest * size_new
            slope_new = torch.where(sizes > 0, gradient / torch.where(sizes > 0, sizes, 1.0), 0.0)
            good = (size_new <= start.tol) | (slope_new <= 10 * enough)
            sound = torch.isfinite(size_new) & torch.isfinite(slope_new)
            better = sound & ((size_new < size) | (slope_new < slope) | good)
            going = sound & ~good & (slope_new < 0.5 * slope)
            unfinished = going | (part.status == Status.MAX_ITERATIONS)
            ends = {Status.MAX_ITERATIONS: unfinished, Status.CONVERGED: good}
            ended = graded({**ends, Status.NOT_FINITE: ~sound}, Status.STAGNATED)
            status = torch.where(active, ended, status)
            keep = active & better
            x = torch.where(keep[..., None], candidate, x)
            size = torch.where(keep, size_new, size)
            slope = torch.where(keep, slope_new, slope)
            r = torch.where(keep[..., None], r, start.r)
            limit = start.limit - part.steps
            start = dataclasses.replace(start, r=r, limit=limit, active=active & going)
        x, status, size = units.settled(x * units.unit, status, size)
        success = status == Status.CONVERGED
        if self.rtol is None:
            near = (size <= usual) | (slope <= usual)
            success = success | ((status == Status.STAGNATED) & near)
            success = success | ((status == Status.MAX_ITERATIONS) & (self.maxiter is not None))
        return Solution(
            x=x,
            status=status,
            success=success,
            iterations=iterations,
            matvecs=start.matvec.count,
            residual_norm=size,
            method=type(self).__name__,
        )


@dataclasses.dataclass(frozen=True)
class NormalCG(LeastSquares):
    """Conjugate gradients on the normal equations, for any system, by least squares.

    An iteration makes a product with the matrix and one with its transpose, and sees the square
    of the condition number. A singular, consistent square system gets the answer of minimum norm;
    where there is no solution, the status is ``SINGULAR``
    and the answer that of least squares. `solve` takes rectangular systems too: their answer is
    that of least squares, the one closest to `x0`, and a success also where the residual is not
    small. The preconditioner is applied from the right; its transpose is taken by
    `torch.func.vjp`.

    Parameters
    ----------
    maxiter, rtol, atol, damping, preconditioner, callback, progress
        As in every iterative solver: the damping means ``(A + damping I)`` here too, and not the
        Tikhonov term of a least-squares problem.

    References
    ----------
    Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, 1952,
    section 10; Björck, Numerical methods for least squares problems, 1996, section 7.4; Saad,
    Iterative methods for sparse linear systems, 2003, algorithm 8.4 (CGNR).

    Examples
    --------
    >>> import torch, hypergrad
    >>> A = torch.tensor([[2.0, 1.0], [-1.0, 3.0]], dtype=torch.float64)
    >>> b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> solver = hypergrad.NormalCG(rtol=1e-10)
    >>> x, info = solver.solve(lambda v: A @ v, b, rmatvec=lambda v: A.T @ v)
    >>> torch.allclose(A @ x, b), hypergrad.Status(info.status).name
    (True, 'CONVERGED')
    """

    def _iterate(self, start: Pass) -> Correction:
        there, back = _preconditioned(start)
        flat, enough = start.flat, start.flat_slope
        r, run = start.r, Recurrence(start)
        size = torch.linalg.vector_norm(r, dim=-1)
        s = back(r)
        y = torch.zeros_like(s)
        # Divided by its scale, lest the fourth power of a matrix of 1e12 or 1e-12 be no number.
        scale = norm(s) / torch.where(size > 0, size, 1.0)
        scale = torch.where(scale > 0, scale, 1.0)[..., None]
        s = s / scale
        p, gamma = s, dot(s, s)
        run.largest = torch.where(size > 0, gamma.sqrt() / size, 0.0)
        run.unknown = run.active & ~torch.isfinite(gamma)
        run.active = run.active & ~run.unknown
        while run.goes_on():  # Saad (2003), algorithm 8.4
            q = there(p) / scale
            qq, pp = dot(q, q), dot(p, p)
            pp = torch.where(pp > 0, pp, 1.0)
            run.grown((qq / pp).sqrt())
            # |A^T r| is zero at a least-squares answer, |A p| in a direction that A does not see.
            null = gamma.sqrt() <= enough * run.largest * size
            null = null | (qq <= (flat * run.largest).square() * pp)
            moving = run.moving(null, ~torch.isfinite(qq))
            wide = moving[..., None]
            alpha = torch.where(moving, gamma / torch.where(moving, qq, 1.0), 0.0)[..., None]
            y = torch.where(wide, torch.addcmul(y, alpha, p), y)
            r = torch.where(wide, torch.addcmul(r, alpha, q, value=-1), r)
            run.size = size = torch.linalg.vector_norm(r, dim=-1)
            s = back(r) / scale
            gamma_next = dot(s, s)
            beta = torch.where(moving, gamma_next / torch.where(moving, gamma, 1.0), 0.0)
            p = torch.addcmul(s, beta[..., None], p)
            gamma = gamma_next
            run.active = moving & (size > start.tol)
        run.largest = run.largest * scale[..., 0]
        return run.correction(start.preconditioned(y / scale))


@dataclasses.dataclass(frozen=True)
class LSMR(LeastSquares):
    """LSMR, for any system, by least squares: MINRES on the normal equations, without forming them.

    It makes the products of `NormalCG` and loses less accuracy where the matrix is badly
    conditioned. A singular, consistent square
    system gets the answer of minimum norm; where there is no solution, the status is ``SINGULAR``
    and the answer that of least squares. `solve` takes rectangular systems too: their answer is
    that of least squares, the one closest to `x0`, and a success also where the residual is not
    small. The preconditioner is applied from the right; its transpose is taken by
    `torch.func.vjp`.

    Parameters
    ----------
    maxiter, rtol, atol, damping, preconditioner, callback, progress
        As in every iterative solver: the damping means ``(A + damping I)`` here too, and not the
        Tikhonov term of a least-squares problem.

    References
    ----------
    Fong and Saunders, LSMR: an iterative algorithm for sparse least-squares problems, 2011; for the
    bidiagonalisation, Paige and Saunders, LSQR, 1982, equation 3.1.

    Examples
    --------
    >>> import torch, hypergrad
    >>> A = torch.tensor([[2.0, 1.0], [-1.0, 3.0]], dtype=torch.float64)
    >>> b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> solver = hypergrad.LSMR(rtol=1e-10)
    >>> x, info = solver.solve(lambda v: A @ v, b, rmatvec=lambda v: A.T @ v)
    >>> torch.allclose(A @ x, b), hypergrad.Status(info.status).name
    (True, 'CONVERGED')
    """

    def _iterate(self, start: Pass) -> Correction:
        there, back = _preconditioned(start)
        run = Recurrence(start)
        zero, one, flat = run.zero, run.one, run.flat
        r, enough = start.r, start.flat_slope
        u, size = _unit(r)
        v, alpha = _unit(back(u))
        y = torch.zeros_like(v)
        # The names are the paper's; the images A h and A h_bar give the residual itself.
        h, h_bar, Ah, Ah_bar = v, torch.zeros_like(v), torch.zeros_like(u), torch.zeros_like(u)
        zeta_bar, alpha_bar = alpha * size, alpha
        rho, rho_bar, c_bar, s_bar = one, one, one, zero
        theta, run.largest = zero, alpha
        run.unknown = run.active & ~torch.isfinite(alpha)
        run.active = run.active & ~run.unknown
        while run.goes_on():
            Av = there(v)  # Paige and Saunders (1982), equation 3.1
            u, beta = _unit(torch.addcmul(Av, alpha[..., None], u, value=-1))
            v_next, alpha = _unit(torch.addcmul(back(u), beta[..., None], v, value=-1))
            run.grown(torch.hypot(alpha, beta))

            h = v if run.steps == 1 else torch.addcmul(v, (theta / rho)[..., None], h, value=-1)
            Ah = Av if run.steps == 1 else torch.addcmul(Av, (theta / rho)[..., None], Ah, value=-1)
            rho_last, rho_bar_last = rho, rho_bar
            rho = torch.hypot(alpha_bar, beta)
            null = rho <= flat * run.largest
            rho = torch.where(rho > 0, rho, one)
            c, s = alpha_bar / rho, beta / rho
            theta, alpha_bar = s * alpha, c * alpha
            theta_bar = s_bar * rho
            rho_bar = torch.hypot(c_bar * rho, theta)
            null = null | (rho_bar <= flat * run.largest)
            rho_bar = torch.where(rho_bar > 0, rho_bar, one)
            zeta_last = zeta_bar  # |A^T r| so far, zero at a least-squares answer
            null = null | (zeta_last.abs() <= enough * run.largest * size)
            c_bar, s_bar = c_bar * rho / rho_bar, theta / rho_bar
            zeta, zeta_bar = c_bar * zeta_bar, -s_bar * zeta_bar
            back_by = (theta_bar * rho / (rho_last * rho_bar_last))[..., None]
            h_bar = torch.addcmul(h, back_by, h_bar, value=-1)
            Ah_bar = torch.addcmul(Ah, back_by, Ah_bar, value=-1)
            # |A^T A h_bar| is rho rho_bar: a huge h_bar is what the matrix does not see.
            reach = torch.linalg.vector_norm(h_bar, dim=-1) * (flat * run.largest).square()
            null = null | (reach >= rho * rho_bar)
            moving = run.moving(null, ~torch.isfinite(alpha + beta))
            step = torch.where(moving, zeta / (rho * rho_bar), zero)[..., None]
            y = torch.where(moving[..., None], torch.addcmul(y, step, h_bar), y)
            r = torch.where(moving[..., None], torch.addcmul(r, step, Ah_bar, value=-1), r)
            run.size = size = torch.linalg.vector_norm(r, dim=-1)
            v = v_next
            run.active = moving & (size > start.tol)
        return run.correction(start.preconditioned(y))


def _preconditioned(start: Pass) -> tuple[Product, Product]:
    """Form products with A M and M^T A^T, for a preconditioner M that is a linear map."""
    matvec, precondition = start.matvec, start.precondition
    if precondition is None:
        return matvec, matvec.transposed
    pull: Callable[[Tensor], tuple[Tensor]] | None = None

    def back(v: Tensor) -> Tensor:
        nonlocal pull
        image = matvec.transposed(v)
        if pull is None:
            pull = torch.func.vjp(precondition, torch.zeros_like(image))[1]
        return pull(image)[0]

    return lambda v: matvec(precondition(v)), back


def _unit(v: Tensor) -> tuple[Tensor, Tensor]:
    """Take a vector to norm one, or zero, and the norm."""
    length = torch.linalg.vector_norm(v, dim=-1)
    return v / torch.where(length > 0, length, 1.0)[..., None], length
