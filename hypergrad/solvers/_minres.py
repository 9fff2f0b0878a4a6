"""The minimal residual method for symmetric matrices."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._info import Status
from ._base import Counted, Product, dot
from ._iterative import NEGATIVE, PRICE, Iterative, Part
from ._observer import Observer
from ._ritz import condition_of_factors, lanczos_factor, ritz_values_of_lanczos

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
    maxiter, rtol, atol, damping, preconditioner
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
        x = torch.zeros_like(r)
        # The Lanczos vectors before and after the preconditioner, the first not yet of norm one.
        before_last, last = torch.zeros_like(r), r
        z = r if precondition is None else precondition(r)
        beta, indefinite = _length(dot(r, z))
        beta_last = one
        directions = torch.zeros_like(r), torch.zeros_like(r)
        c, s, delta_bar, epsilon = -one, zero, zero, zero
        phi_bar = beta
        residual, size = r, beta
        modest, least = x, size  # the answer without a solution: see `PRICE`
        diagonal, beside, known = [], [], []
        largest = zero  # the largest column of the tridiagonal matrix, a scale for its zeros
        longest = one if precondition is None else zero  # of |v|, which is one where M is I
        broken = active & indefinite
        active = active & ~indefinite
        singular, unknown = torch.zeros_like(active), torch.zeros_like(active)
        iterations = torch.zeros_like(active, dtype=torch.int64)
        observer = None if condition is None else Observer(condition, r)
        images = directions  # of the last two directions, where somebody asks for them
        steps = 0
        while steps < limit and (not looks or any_task(active)):
            steps += 1
            safe = torch.where(active, beta, one)
            v = z / safe.unsqueeze(-1)
            y = matvec(v)
            image = y
            if steps > 1:
                y = torch.addcmul(y, (safe / beta_last).unsqueeze(-1), before_last, value=-1)
            alpha = dot(v, y)
            y = torch.addcmul(y, (alpha / safe).unsqueeze(-1), last, value=-1)
            before_last, last, beta_last = last, y, safe
            z = y if precondition is None else precondition(y)
            beta, indefinite = _length(dot(y, z))
            diagonal.append(alpha)
            beside.append(beta)
            known.append(active)

            # The rotation that came before, and what is left of this column of the matrix.
            epsilon_last = epsilon
            delta = c * delta_bar + s * alpha
            gamma_bar = s * delta_bar - c * alpha
            epsilon, delta_bar = s * beta, -c * beta
            column = torch.sqrt(alpha.square() + beta.square() + beta_last.square() * (steps > 1))
            largest = torch.where(active, torch.maximum(largest, column), largest)
            # |A r| / |r| of the answer so far: zero at a least-squares solution.
            null = torch.hypot(gamma_bar, delta_bar) <= flat * largest
            gamma = torch.hypot(gamma_bar, beta)
            gamma = torch.where(gamma > 0, gamma, one)
            c, s = gamma_bar / gamma, beta / gamma
            phi, phi_next = c * phi_bar, s * phi_bar
            w = torch.addcmul(v, epsilon_last.unsqueeze(-1), directions[0], value=-1)
            w = torch.addcmul(w, delta.unsqueeze(-1), directions[1], value=-1) / gamma.unsqueeze(-1)
            if observer is not None:
                image = torch.addcmul(image, epsilon_last[..., None], images[0], value=-1)
                image = torch.addcmul(image, delta[..., None], images[1], value=-1)
                images = images[1], image / gamma[..., None]
            directions = directions[1], w
            # |A w| is 1, so that a huge w is a direction that the matrix does not see.
            if precondition is not None:
                longest = torch.maximum(longest, torch.linalg.vector_norm(v, dim=-1))
            null = null | (flat * largest * torch.linalg.vector_norm(w, dim=-1) >= longest)
            lost = ~torch.isfinite(alpha + beta)
            moving = active & ~null & ~lost & ~indefinite
            unknown, broken = unknown | (active & lost), broken | (active & indefinite)
            singular = singular | (active & null)
            x = torch.where(moving.unsqueeze(-1), torch.addcmul(x, phi.unsqueeze(-1), w), x)
            if precondition is None:
                size = torch.where(moving, phi_next, size)
            else:
                step = (phi_next * c / torch.where(beta > 0, beta, one)).unsqueeze(-1)
                moved = torch.addcmul(s.square().unsqueeze(-1) * residual, step, y, value=-1)
                residual = torch.where(moving.unsqueeze(-1), moved, residual)
                size = torch.linalg.vector_norm(residual, dim=-1)
            if observer is not None:
                image = images[1]
                observer.along(w, image, image, torch.where(moving, dot(image, image), zero))
                observer.after_step(x, size, moving)
            if steps % _EVERY == 0 or steps <= _EVERY:
                cost = size.abs() + PRICE * largest * torch.linalg.vector_norm(x, dim=-1)
                modest = torch.where((moving & (cost < least)).unsqueeze(-1), x, modest)
                least = torch.where(moving, torch.minimum(least, cost), least)
            phi_bar = torch.where(moving, phi_next, phi_bar)
            iterations = iterations + moving
            active = moving & (size > tol)
        ritz = partial(ritz_values_of_lanczos, diagonal, beside, known) if steps else None
        negative = torch.zeros_like(active)
        if ritz is not None:
            lowest, highest = ritz().unbind(dim=-1)
            negative = lowest < -NEGATIVE * torch.finfo(r.dtype).eps * highest.abs()
        status = torch.where(active, int(Status.MAX_ITERATIONS), int(Status.CONVERGED))
        status = torch.where(singular, int(Status.SINGULAR), status)
        status = torch.where(broken, int(Status.BREAKDOWN), status)
        status = torch.where(unknown, int(Status.NOT_FINITE), status)
        x = torch.where(singular[..., None], modest, x)
        return Part(
            x=torch.where(unknown[..., None], torch.full_like(x, math.nan), x),
            status=status,
            iterations=iterations,
            steps=steps,
            negative=negative,
            largest=largest,
            ritz=ritz,
            observer=observer,
            condition_number=(
                lambda: condition_of_factors([lanczos_factor(diagonal, beside, known)])
            )
            if steps
            else None,
        )


def _length(square: Tensor) -> tuple[Tensor, Tensor]:
    """The length in the preconditioner's norm, and whether there is none."""
    return square.clamp(min=0).sqrt(), square < 0
