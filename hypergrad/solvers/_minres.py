"""The minimal residual method for symmetric matrices."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ._krylov import NEGATIVE, PRICE, Correction, Iterative, Pass, Recurrence, noise_floor
from ._observer import Observer
from ._ritz import condition_of_factors, lanczos_factor, ritz_values_of_lanczos
from ._vectors import dot

_EVERY = 4  # steps between two looks for a modest answer, which cost as much as a vector operation


@dataclasses.dataclass(frozen=True)
class MINRES(Iterative):
    """The minimal residual method, for symmetric matrices, also indefinite or singular ones.

    On a singular, consistent system the answer is that of minimum norm. Where a singular system
    has no solution it stops at a least-squares answer with the status ``SINGULAR``. The
    preconditioner must be symmetric positive definite; one that is found not to be ends the
    solve with the status ``BREAKDOWN``. A saddle is solved, and ``info.negative_curvature`` says
    that there is one: of a `Minimum` that is no success.

    Parameters
    ----------
    maxiter, rtol, atol, damping, preconditioner, callback, progress
        As in every iterative solver: see the documentation of the linear solvers.

    References
    ----------
    Paige and Saunders, Solution of sparse indefinite systems of linear equations, 1975.

    Examples
    --------
    >>> import torch, hypergrad
    >>> A = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)  # eigenvalues -1 and 1
    >>> b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> x, info = hypergrad.MINRES(rtol=1e-10).solve(lambda v: A @ v, b)
    >>> torch.allclose(A @ x, b), hypergrad.Status(info.status).name
    (True, 'CONVERGED')
    """

    needs_symmetry: ClassVar[bool] = True
    judged_by_residual: ClassVar[bool] = True

    def _iterate(self, start: Pass) -> Correction:
        run = _Recurrence(start)
        while run.goes_on():
            run.step()
        of_steps = run.diagonal, run.beside, run.known
        x = torch.where(run.singular[..., None], run.modest, run.x)
        if not run.steps:
            return run.correction(x, observer=run.observer)
        ritz = partial(ritz_values_of_lanczos, *of_steps)
        lowest, highest = ritz().unbind(dim=-1)
        least = noise_floor(NEGATIVE * torch.finfo(x.dtype).eps, start.noise)
        run.negative = lowest < -least * highest.abs()
        condition = partial(_condition, *of_steps)
        return run.correction(x, ritz=ritz, observer=run.observer, condition_number=condition)


class _Recurrence(Recurrence):
    """The iteration: Lanczos vectors, one rotation a step, and the answer along `w`."""

    def __init__(self, start: Pass) -> None:
        super().__init__(start)
        r, zero = start.r, self.zero
        self.x = self.modest = none = torch.zeros_like(r)
        # The Lanczos vectors before and after the preconditioner, the first not yet of norm one.
        self.before_last, self.last, self.z = none, r, start.preconditioned(r)
        self.beta, self.indefinite = _length(dot(r, self.z))
        self.beta_last = self.one
        self.directions = self.images = none, none  # the last two directions, and A times them
        self.c, self.s, self.delta_bar, self.epsilon = -self.one, zero, zero, zero
        self.phi_bar = self.size = self.least = self.beta
        self.residual = r
        self.diagonal: list[Tensor] = []
        self.beside: list[Tensor] = []
        self.known: list[Tensor] = []
        # `largest` is the largest column of the tridiagonal matrix, a scale for its zeros.
        self.longest = zero if start.precondition else self.one  # of |v|, one where M is I
        self.broken = start.active & self.indefinite
        self.active = start.active & ~self.indefinite
        self.observer = None if start.condition is None else Observer(start.condition, r)

    def step(self) -> None:
        """Make one step."""
        v, image, alpha, beta = self._lanczos()
        w, null, phi, phi_bar = self._rotate(v, image, alpha, beta)
        self.broken = self.broken | (self.active & self.indefinite)
        self.active = self.active & ~self.indefinite
        moving = self.moving(null, ~torch.isfinite(alpha + beta))
        x = torch.addcmul(self.x, phi[..., None], w)
        self.x = torch.where(moving[..., None], x, self.x)
        if self.start.precondition is None:
            self.size = torch.where(moving, phi_bar, self.size)
        else:
            along = (phi_bar * self.c / torch.where(beta > 0, beta, self.one))[..., None]
            r = self.s.square()[..., None] * self.residual
            r = torch.addcmul(r, along, self.last, value=-1)
            self.residual = torch.where(moving[..., None], r, self.residual)
            self.size = torch.linalg.vector_norm(self.residual, dim=-1)
        if self.observer is not None:
            Aw = self.images[1]
            self.observer.along(w, Aw, Aw, torch.where(moving, dot(Aw, Aw), 0.0))
            if self.observer.is_due():
                self.observer.keep(self.x, self.size, moving)
        if self.steps % _EVERY == 0 or self.steps <= _EVERY:
            self._keep_modest(moving)
        self.phi_bar = torch.where(moving, phi_bar, self.phi_bar)
        self.beta = beta
        self.active = moving & (self.size > self.start.tol)

    def _lanczos(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Append a column to the tridiagonal matrix: a vector, its image, and two entries."""
        beta = torch.where(self.active, self.beta, self.one)
        v = self.z / beta[..., None]
        y = image = self.start.matvec(v)
        if self.steps > 1:
            y = torch.addcmul(y, (beta / self.beta_last)[..., None], self.before_last, value=-1)
        alpha = dot(v, y)
        y = torch.addcmul(y, (alpha / beta)[..., None], self.last, value=-1)
        self.before_last, self.last, self.beta_last = self.last, y, beta
        self.z = self.start.preconditioned(y)
        beta, self.indefinite = _length(dot(y, self.z))
        self.diagonal.append(alpha)
        self.beside.append(beta)
        self.known.append(self.active)
        return v, image, alpha, beta

    def _rotate(
        self, v: Tensor, image: Tensor, alpha: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Make the matrix triangular: the direction, where it is null, and the step along it."""
        flat, one = self.flat, self.one
        # The rotation that came before, and the rest of this column of the matrix.
        epsilon, delta = self.epsilon[..., None], self.c * self.delta_bar + self.s * alpha
        gamma_bar = self.s * self.delta_bar - self.c * alpha
        self.epsilon, self.delta_bar = self.s * beta, -self.c * beta
        before = self.beta_last.square() * (self.steps > 1)
        column = torch.sqrt(alpha.square() + beta.square() + before)
        self.grown(column)
        # |A r| / |r| of the answer so far: zero at a least-squares solution.
        null = torch.hypot(gamma_bar, self.delta_bar) <= flat * self.largest
        gamma = torch.hypot(gamma_bar, beta)
        gamma = torch.where(gamma > 0, gamma, one)
        self.c, self.s = gamma_bar / gamma, beta / gamma

        def next_of(vector: Tensor, last: tuple[Tensor, Tensor]) -> Tensor:
            vector = torch.addcmul(vector, epsilon, last[0], value=-1)
            vector = torch.addcmul(vector, delta[..., None], last[1], value=-1)
            return vector / gamma[..., None]

        w = next_of(v, self.directions)
        if self.observer is not None:
            self.images = self.images[1], next_of(image, self.images)
        self.directions = self.directions[1], w
        # |A w| is 1, so that a huge w is a direction that the matrix does not see.
        if self.start.precondition is not None:
            self.longest = self.longest.maximum(torch.linalg.vector_norm(v, dim=-1))
        null = null | (flat * self.largest * torch.linalg.vector_norm(w, dim=-1) >= self.longest)
        return w, null, self.c * self.phi_bar, self.s * self.phi_bar

    def _keep_modest(self, moving: Tensor) -> None:
        """Keep the answer for a system without a solution: see `PRICE`."""
        cost = self.size.abs() + PRICE * self.largest * torch.linalg.vector_norm(self.x, dim=-1)
        self.modest = torch.where((moving & (cost < self.least))[..., None], self.x, self.modest)
        self.least = torch.where(moving, torch.minimum(self.least, cost), self.least)


def _condition(*coefficients: list[Tensor]) -> Tensor:
    return condition_of_factors([lanczos_factor(*coefficients)])


def _length(square: Tensor) -> tuple[Tensor, Tensor]:
    """Take the length in the preconditioner's norm, and say where there is none."""
    return square.clamp(min=0).sqrt(), square < 0
