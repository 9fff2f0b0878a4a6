"""The method of Levenberg and Marquardt for nonlinear least squares."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .._autograd.host import any_task
from ..solvers._fields import at_least
from ._base import InnerSolver
from ._evaluator import Evaluator
from ._numbers import dot, norm
from ._progress import Progress

_TRIALS = 30  # of a damping, each ten times the one before


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt(InnerSolver):
    """Least squares: the params that minimise ``||F(params, *args)||^2 / 2``.

    ``F`` returns residuals, a tensor or a pytree of tensors of any shapes. A step solves the
    linearised problem, damped in each parameter by the largest slope of the residuals in it so
    far, so that units play no part. The Jacobian is formed at every step: for up to some hundred
    parameters, or residuals. ``info.value`` is half the sum of the squares.

    Parameters
    ----------
    maxiter : int
        Most steps.
    tol : float, optional
        The relative residual at which a task stops, of the gradient ``J^T F``; None: 1e-8 in
        float64, 1e-5 in float32.
    damping : float
        That of the first step, as a part of the squared slopes.

    References
    ----------
    Marquardt, An algorithm for least-squares estimation of nonlinear parameters, 1963; Moré, The
    Levenberg-Marquardt algorithm: implementation and theory, 1978.

    Examples
    --------
    >>> import torch, hypergrad
    >>> t = torch.tensor([0.0, 1.0, 2.0, 3.0])
    >>> def misfit(p, y):
    ...     return p[0] * torch.exp(-p[1] * t) - y
    >>> @hypergrad.custom_argmin(lambda p, y: (misfit(p, y) ** 2).sum() / 2, has_aux=True)
    ... def fit(init, y):
    ...     return hypergrad.inner_solvers.LevenbergMarquardt()(misfit, init, y)
    >>> y = 2 * torch.exp(-0.5 * t)
    >>> (p, info) = fit(torch.ones(2), y)
    >>> p.round(decimals=3), bool(info.success)
    (tensor([2.0000, 0.5000]), True)
    >>> torch.func.jacrev(lambda y: fit(torch.ones(2), y)[0])(y).shape
    torch.Size([2, 4])
    """

    maxiter: int = 200
    tol: float | None = None
    damping: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        at_least("damping", self.damping, 0.0)

    def _run(self, evaluator: Evaluator, x: Tensor) -> tuple[Tensor, Progress]:
        r, J = evaluator.residuals(x)
        value, g = dot(r, r) / 2, _times(J.mT, r)
        progress = Progress(self.tol, evaluator.layout.precision, norm(g) + 0 * value, value)
        slopes = torch.linalg.vector_norm(J, dim=-2)
        damping = torch.full_like(value, self.damping)
        eps = torch.finfo(x.dtype).eps
        for active in progress.rounds(self.maxiter):
            searching, stuck = active, active
            new, new_value, new_r, new_J, new_g = x, value, r, J, g
            for _ in range(_TRIALS):
                step = _damped(J, r, slopes, damping)
                trial = x + step
                trial_r, trial_J = evaluator.residuals(trial)
                progress.evaluated(searching)
                trial_value, trial_g = dot(trial_r, trial_r) / 2, _times(trial_J.mT, trial_r)
                # The decrease that the linearised residuals promise, without a difference.
                promised = -dot(step, g) - _square(_times(J, step)) / 2
                decrease = _difference(r, trial_r)
                noise = 4 * eps * value
                fine = decrease >= 1e-4 * promised
                # Where the decrease is lost in rounding, the gradient decides.
                level = (promised <= noise) & (decrease >= -noise) & (norm(trial_g) <= norm(g))
                sound = torch.isfinite(trial_value) & torch.isfinite(norm(trial_g))
                taken = searching & sound & (fine | level) & (promised >= 0)
                new, new_r = torch.where(taken, trial, new), torch.where(taken, trial_r, new_r)
                new_value = torch.where(taken, trial_value, new_value)
                new_J = torch.where(taken[..., None], trial_J, new_J)
                new_g = torch.where(taken, trial_g, new_g)
                stuck = stuck & ~taken
                good = taken & (decrease > 0.75 * promised)
                searching = searching & ~taken
                damping = torch.where(good, damping / 10, damping)
                damping = torch.where(searching, (10 * damping).clamp(min=1e-12), damping)
                if not any_task(searching):
                    break
            progress.update(new, new - x, new_g - g, norm(new_g), new_value, stuck=stuck)
            x, value, r, J, g = new, new_value, new_r, new_J, new_g
            slopes = torch.maximum(slopes, torch.linalg.vector_norm(J, dim=-2).nan_to_num(0.0))
            damping = torch.where(stuck, torch.full_like(damping, self.damping), damping)
        return x, progress


def _damped(J: Tensor, r: Tensor, slopes: Tensor, damping: Tensor) -> Tensor:
    """Solve for the step ``(J^T J + damping D^2)^-1 (-J^T r)`` by QR, columns of length one."""
    unit = torch.where(slopes > 0, slopes, torch.ones_like(slopes))
    n = J.shape[-1]
    # Without any damping the least is what keeps the factor regular.
    root = damping.clamp(min=(100 * torch.finfo(J.dtype).eps) ** 2).sqrt()
    ridge = root[..., None] * torch.eye(n, dtype=J.dtype, device=J.device)
    scaled = torch.cat(
        [(J / unit[..., None, :]).nan_to_num(0.0), ridge.expand(*J.shape[:-2], n, n)], -2
    )
    Q, R = torch.linalg.qr(scaled)
    target = -_times(Q[..., : J.shape[-2], :].mT, r.nan_to_num(0.0))
    scaled_step = torch.linalg.solve_triangular(R, target[..., None], upper=True)[..., 0]
    return scaled_step / unit


def _times(A: Tensor, v: Tensor) -> Tensor:
    return (A @ v[..., None])[..., 0]


def _square(v: Tensor) -> Tensor:
    return dot(v, v)


def _difference(r: Tensor, other: Tensor) -> Tensor:
    """Compute ``(||r||^2 - ||other||^2) / 2`` without the cancellation of two sums."""
    return dot(r - other, r + other) / 2
