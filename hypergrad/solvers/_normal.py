"""Methods for the normal equations: least squares, with products by the transpose."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._errors import UnsupportedOperation
from .._info import Status
from ._base import Counted, LinearSystem, Product, Solution, dot, norm, tolerance
from ._iterative import Iterative, Part, batched_preconditioner

_PASSES = 4  # of an iteration, each from the true residual of the one before


@dataclasses.dataclass(frozen=True)
class LeastSquares(Iterative):
    """What both methods share: rectangular systems, whose answer is that of least squares."""

    needs_transpose: ClassVar[bool] = True
    judged_by_residual: ClassVar[bool] = True
    takes_rectangles: ClassVar[bool] = True

    def run(self, system: LinearSystem, begun: Part | None = None) -> Solution:
        """Solve a square system as all methods do, and a rectangular one by least squares."""
        if system.layout.n == system.b.shape[-1]:
            return super().run(system, begun)
        return self._rectangular(system)

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
        enough: float = 0.0,
    ) -> Part:
        """Correct an answer, until ``||r|| <= tol`` or ``||A^T r|| <= enough ||A|| ||r||``."""

    def _rectangular(self, system: LinearSystem) -> Solution:
        """The x of least ||b - A x||, and among those the closest to x0.

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
        matvec = Counted(system.matvec, 0.0, self._transpose(system))
        precondition = batched_preconditioner(self.preconditioner, system, matvec)
        scale = norm(system.b)
        present = (scale > 0) & torch.isfinite(scale)
        unit = torch.where(present, scale, torch.ones_like(scale))[..., None]
        b, n, precision = system.b / unit, system.layout.n, system.layout.precision
        usual = tolerance(self.rtol, precision)
        tol = (self.atol / unit[..., 0]).clamp(min=usual)
        eps = torch.finfo(b.dtype).eps
        enough = 10 * eps if self.rtol is None else max(self.rtol, 10 * eps)
        looks = system.looks or self.rtol != 0
        limit = self.maxiter or min(10 * min(n, b.shape[-1]) + 10, 5000)

        x, r = b.new_zeros((*b.shape[:-1], n)), b
        if system.x0 is not None:
            x = torch.where(present[..., None], system.x0.to(b.dtype) / unit, x)
            r = b - matvec(x)
        size, active = norm(r), present
        iterations = torch.zeros_like(present, dtype=torch.int64)
        status = torch.where(present, int(Status.MAX_ITERATIONS), int(Status.CONVERGED))
        status = torch.where(torch.isfinite(scale), status, int(Status.NOT_FINITE))
        largest = torch.zeros_like(scale)
        slope = torch.full_like(scale, math.inf)  # ||A^T r||, in units of ||A|| ||r||
        for _ in range(_PASSES):
            if limit <= 0 or (looks and not any_task(active)):
                break
            part = self._iterate(matvec, precondition, r, tol, active, limit, looks, enough=enough)
            limit -= part.steps
            iterations = iterations + torch.where(active, part.iterations, 0)
            largest = torch.where(active, torch.maximum(largest, part.largest), largest)
            candidate = x + part.x
            r_new = b - matvec(candidate)
            size_new, gradient = norm(r_new), norm(matvec.transposed(r_new))
            sizes = largest * size_new
            slope_new = torch.where(sizes > 0, gradient / torch.where(sizes > 0, sizes, 1.0), 0.0)
            good = (size_new <= tol) | (slope_new <= 10 * enough)
            sound = torch.isfinite(size_new) & torch.isfinite(slope_new)
            better = sound & ((size_new < size) | (slope_new < slope) | good)
            going = sound & ~good & (slope_new < 0.5 * slope)
            ended = torch.where(going, int(Status.MAX_ITERATIONS), int(Status.STAGNATED))
            cut = part.status == Status.MAX_ITERATIONS
            ended = torch.where(cut, int(Status.MAX_ITERATIONS), ended)
            ended = torch.where(good, int(Status.CONVERGED), ended)
            ended = torch.where(sound, ended, int(Status.NOT_FINITE))
            status = torch.where(active, ended, status)
            keep = (active & better)[..., None]
            x, r = torch.where(keep, candidate, x), torch.where(keep, r_new, r)
            size = torch.where(keep[..., 0], size_new, size)
            slope = torch.where(keep[..., 0], slope_new, slope)
            active = active & going
        success = status == Status.CONVERGED
        if self.rtol is None:
            near = (size <= usual) | (slope <= usual)
            success = success | ((status == Status.STAGNATED) & near)
            success = success | ((status == Status.MAX_ITERATIONS) & (self.maxiter is not None))
        x = torch.where((status == Status.NOT_FINITE)[..., None], math.nan, x * unit)
        size = torch.where(torch.isfinite(scale), size, math.nan)
        return Solution(
            x=torch.where((scale == 0)[..., None], 0.0, x),
            status=status,
            success=success,
            iterations=iterations,
            matvecs=matvec.count,
            residual_norm=torch.where(scale == 0, 0.0, size),
            negative_curvature=torch.zeros_like(success),
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
    maxiter, rtol, atol, damping, preconditioner
        As in every iterative solver: the damping means ``(A + damping I)`` here too, and not the
        Tikhonov term of a least-squares problem.

    References
    ----------
    Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, 1952,
    section 10; Björck, Numerical methods for least squares problems, 1996, section 7.4.

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
        enough: float = 0.0,
    ) -> Part:
        there, back = _preconditioned(matvec, precondition)
        zero, one = torch.zeros_like(tol), torch.ones_like(tol)
        flat = 10 * torch.finfo(r.dtype).eps
        size = torch.linalg.vector_norm(r, dim=-1)
        s = back(r)
        y = torch.zeros_like(s)
        # Divided by its scale, lest the fourth power of a matrix of 1e12 or 1e-12 be no number.
        scale = norm(s) / torch.where(size > 0, size, one)
        scale = torch.where(scale > 0, scale, one)[..., None]
        s = s / scale
        p, gamma = s, dot(s, s)
        largest = torch.where(size > 0, gamma.sqrt() / size, zero)
        unknown = active & ~torch.isfinite(gamma)
        singular = torch.zeros_like(active)
        iterations = torch.zeros_like(active, dtype=torch.int64)
        active = active & ~unknown
        steps = 0
        while steps < limit and (not looks or any_task(active)):
            steps += 1
            q = there(p) / scale
            qq, pp = dot(q, q), dot(p, p)
            pp = torch.where(pp > 0, pp, one)
            largest = torch.where(active, torch.maximum(largest, (qq / pp).sqrt()), largest)
            # |A^T r| is zero at a least-squares answer, |A p| in a direction that A does not see.
            null = (gamma.sqrt() <= max(flat, enough) * largest * size) | (
                qq <= (flat * largest).square() * pp
            )
            lost = active & ~torch.isfinite(qq)
            moving = active & ~null & ~lost
            unknown, singular = unknown | lost, singular | (active & null)
            alpha = torch.where(moving, gamma / torch.where(moving, qq, one), zero)[..., None]
            y = torch.where(moving[..., None], torch.addcmul(y, alpha, p), y)
            r = torch.where(moving[..., None], torch.addcmul(r, alpha, q, value=-1), r)
            size = torch.linalg.vector_norm(r, dim=-1)
            s = back(r) / scale
            gamma_next = dot(s, s)
            beta = torch.where(moving, gamma_next / torch.where(moving, gamma, one), zero)
            p = torch.addcmul(s, beta[..., None], p)
            gamma = gamma_next
            iterations = iterations + moving
            active = moving & (size > tol)
        largest = largest * scale[..., 0]
        y = y / scale
        return _part(y, precondition, active, singular, unknown, iterations, steps, largest)


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
    maxiter, rtol, atol, damping, preconditioner
        As in every iterative solver: the damping means ``(A + damping I)`` here too, and not the
        Tikhonov term of a least-squares problem.

    References
    ----------
    Fong and Saunders, LSMR: an iterative algorithm for sparse least-squares problems, 2011.

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
        enough: float = 0.0,
    ) -> Part:
        there, back = _preconditioned(matvec, precondition)
        zero, one = torch.zeros_like(tol), torch.ones_like(tol)
        flat = 10 * torch.finfo(r.dtype).eps
        u, size = _unit(r)
        v, alpha = _unit(back(u))
        y, r_now = torch.zeros_like(v), r
        # The names are the paper's; the images A h and A h_bar give the residual itself.
        h, h_bar, Ah, Ah_bar = v, torch.zeros_like(v), torch.zeros_like(u), torch.zeros_like(u)
        zeta_bar, alpha_bar = alpha * size, alpha
        rho, rho_bar, c_bar, s_bar = one, one, one, zero
        theta, largest = zero, alpha
        unknown = active & ~torch.isfinite(alpha)
        singular = torch.zeros_like(active)
        iterations = torch.zeros_like(active, dtype=torch.int64)
        active = active & ~unknown
        steps = 0
        while steps < limit and (not looks or any_task(active)):
            steps += 1
            Av = there(v)
            u, beta = _unit(torch.addcmul(Av, alpha[..., None], u, value=-1))
            v_next, alpha = _unit(torch.addcmul(back(u), beta[..., None], v, value=-1))
            largest = torch.where(active, torch.maximum(largest, torch.hypot(alpha, beta)), largest)

            h = v if steps == 1 else torch.addcmul(v, (theta / rho)[..., None], h, value=-1)
            Ah = Av if steps == 1 else torch.addcmul(Av, (theta / rho)[..., None], Ah, value=-1)
            rho_last, rho_bar_last = rho, rho_bar
            rho = torch.hypot(alpha_bar, beta)
            null = rho <= flat * largest
            rho = torch.where(rho > 0, rho, one)
            c, s = alpha_bar / rho, beta / rho
            theta, alpha_bar = s * alpha, c * alpha
            theta_bar = s_bar * rho
            rho_bar = torch.hypot(c_bar * rho, theta)
            null = null | (rho_bar <= flat * largest)
            rho_bar = torch.where(rho_bar > 0, rho_bar, one)
            zeta_last = zeta_bar  # |A^T r| so far, zero at a least-squares answer
            null = null | (zeta_last.abs() <= max(flat, enough) * largest * size)
            c_bar, s_bar = c_bar * rho / rho_bar, theta / rho_bar
            zeta, zeta_bar = c_bar * zeta_bar, -s_bar * zeta_bar
            back_by = (theta_bar * rho / (rho_last * rho_bar_last))[..., None]
            h_bar = torch.addcmul(h, back_by, h_bar, value=-1)
            Ah_bar = torch.addcmul(Ah, back_by, Ah_bar, value=-1)
            # |A^T A h_bar| is rho rho_bar: a huge h_bar is what the matrix does not see.
            reach = torch.linalg.vector_norm(h_bar, dim=-1) * (flat * largest).square()
            null = null | (reach >= rho * rho_bar)
            lost = active & ~torch.isfinite(alpha + beta)
            moving = active & ~null & ~lost
            unknown, singular = unknown | lost, singular | (active & null)
            step = torch.where(moving, zeta / (rho * rho_bar), zero)[..., None]
            y = torch.where(moving[..., None], torch.addcmul(y, step, h_bar), y)
            moved = torch.addcmul(r_now, step, Ah_bar, value=-1)
            r_now = torch.where(moving[..., None], moved, r_now)
            size = torch.linalg.vector_norm(r_now, dim=-1)
            v = v_next
            iterations = iterations + moving
            active = moving & (size > tol)
        return _part(y, precondition, active, singular, unknown, iterations, steps, largest)


def _preconditioned(matvec: Counted, precondition: Product | None) -> tuple[Product, Product]:
    """Products with A M and M^T A^T, for a preconditioner M that is a linear map."""
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
    """A vector of norm one, or zero, and the norm."""
    length = torch.linalg.vector_norm(v, dim=-1)
    return v / torch.where(length > 0, length, torch.ones_like(length))[..., None], length


def _part(
    y: Tensor,
    precondition: Product | None,
    active: Tensor,
    singular: Tensor,
    unknown: Tensor,
    iterations: Tensor,
    steps: int,
    largest: Tensor,
) -> Part:
    status = torch.where(active, int(Status.MAX_ITERATIONS), int(Status.CONVERGED))
    status = torch.where(singular, int(Status.SINGULAR), status)
    status = torch.where(unknown, int(Status.NOT_FINITE), status)
    x = y if precondition is None else precondition(y)
    return Part(
        x=torch.where(unknown[..., None], torch.full_like(x, math.nan), x),
        status=status,
        iterations=iterations,
        steps=steps,
        negative=torch.zeros_like(active),
        largest=largest,
    )
