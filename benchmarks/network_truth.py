"""Newton's method to the minimum, and the hypergradient there, by dense matrices.

Nothing of the library takes part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

Scalar = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

_STEPS = 50  # of Newton's method
_HALVINGS = 40
_ROUNDING = 1e-9  # of the value: below it the gradient's norm judges a step
#: The relative accuracy to which a hypergradient has to be known.
KNOWN = 1e-6


@dataclass
class Minimum:
    """Where Newton's method ended: a minimum, if `found`; `step` is the relative last step."""

    w: Tensor
    hessian: Tensor
    step: float
    found: bool


def jacobian(value: Tensor, w: Tensor) -> Tensor:
    """The rows of derivatives of a vector that was computed from `w`."""
    (rows,) = torch.autograd.grad(
        value, w, torch.eye(len(value), dtype=value.dtype), is_grads_batched=True
    )
    return rows


def derivatives(f: Scalar, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The value, the gradient and the Hessian."""
    w = w.detach().requires_grad_()
    value = f(w)
    (gradient,) = torch.autograd.grad(value, w, create_graph=True)
    hessian = jacobian(gradient, w)
    return value.detach(), gradient.detach(), (hessian + hessian.T) / 2


def minimise(f: Scalar, w: Tensor, steps: int = _STEPS) -> Minimum:
    """Newton's method, made safe.

    Where the Hessian is positive definite the step is halved until it lowers the value; elsewhere
    it is that of a trust region, which leaves saddles along the lowest curvature.
    """
    tiny = torch.finfo(w.dtype).tiny
    rounding = max(_ROUNDING, 4 * torch.finfo(w.dtype).eps)
    before, radius = float("inf"), 0.3 * (1 + float(vector_norm(w)))
    value, gradient, hessian = derivatives(f, w)
    for _ in range(steps):
        if not bool(torch.isfinite(hessian).all() & torch.isfinite(gradient).all()):
            break
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if bool(failed):
            step, radius = _within(f, w, value, gradient, hessian, radius)
            before = float("inf")
        else:
            step = torch.cholesky_solve(gradient[:, None], factor)[:, 0]
            decrease = float(gradient @ step)
            if decrease <= rounding * abs(float(value)) + tiny:
                size = float(vector_norm(gradient))
                if size >= 0.5 * before or size == 0:
                    return _judged(w, hessian, step)
                before = size
            else:
                before, step = float("inf"), _halved(f, w, value, step, decrease)
        if not bool(step.any()):
            break
        w = w - step
        value, gradient, hessian = derivatives(f, w)
    return Minimum(w, hessian, float("inf"), False)


def _halved(f: Scalar, w: Tensor, value: Tensor, step: Tensor, decrease: float) -> Tensor:
    """The first of the halved steps that lowers the value enough; zero if none does."""
    size = 1.0
    with torch.no_grad():
        for _ in range(_HALVINGS):
            if bool(f(w - size * step) <= value - 1e-4 * size * decrease):
                return size * step
            size /= 2
    return torch.zeros_like(step)


def _within(
    f: Scalar, w: Tensor, value: Tensor, gradient: Tensor, hessian: Tensor, radius: float
) -> tuple[Tensor, float]:
    """The step to the minimum of the model within a radius, and the next radius.

    The radius shrinks until the value falls by a tenth of what the model says (Nocedal and Wright,
    Numerical Optimization, 2006, section 4.3). Zero where that is never so.
    """
    values, vectors = torch.linalg.eigh(hessian)
    along = vectors.T @ gradient
    with torch.no_grad():
        for _ in range(_HALVINGS):
            part = _shifted(values, along, radius)
            expected = float(along @ part - part @ (values * part) / 2)
            step = vectors @ part
            gained = float(value - f(w - step))
            if gained > 0.1 * expected > 0:
                return step, radius * (3 if gained > 0.7 * expected else 1)
            radius /= 4
    return torch.zeros_like(gradient), radius


def _shifted(values: Tensor, along: Tensor, radius: float) -> Tensor:
    """``along / (values + shift)`` of length `radius`, the shift above minus the lowest value."""
    lowest, size = -float(values[0]), float(vector_norm(along))
    low, high = max(lowest, 0.0), max(lowest, 0.0) + size / radius
    for _ in range(60):
        middle = (low + high) / 2
        long = bool(vector_norm(along / (values + middle).clamp(min=1e-300)) > radius)
        low, high = (middle, high) if long else (low, middle)
    part = along / (values + high).clamp(min=torch.finfo(values.dtype).tiny)
    part = torch.where(torch.isfinite(part), part, torch.zeros_like(part))
    left = radius**2 - float(part @ part)
    if lowest > 0 and left > 0.1 * radius**2:  # nothing leads along the lowest curvature
        part[0] = part[0] + (left**0.5 if float(part[0]) >= 0 else -(left**0.5))
    return part


def _judged(w: Tensor, hessian: Tensor, step: Tensor) -> Minimum:
    values = torch.linalg.eigvalsh(hessian)
    eps = torch.finfo(w.dtype).eps
    positive = float(values[0]) > len(w) * eps * float(values[-1])
    left = float(vector_norm(step) / vector_norm(w).clamp(min=eps))
    return Minimum(w, hessian, left, positive and left < eps**0.5)


def hypergradient(
    inner: Loss, outer: Loss, w: Tensor, h: Tensor, matrix: Tensor | None = None
) -> Tensor:
    """The hypergradient by a dense solve with the Hessian at `w`, or with another matrix."""
    if matrix is None:
        matrix = derivatives(lambda w: inner(w, h), w)[2]
    w, h = w.detach().requires_grad_(), h.detach().requires_grad_()
    right, direct = torch.autograd.grad(outer(w, h), (w, h), materialize_grads=True)
    u = torch.linalg.solve(matrix, right)
    (gradient,) = torch.autograd.grad(inner(w, h), w, create_graph=True)
    (cross,) = torch.autograd.grad(gradient, h, u)
    return direct - cross


def truth(inner: Loss, outer: Loss, w: Tensor, h: Tensor) -> tuple[Tensor | None, float]:
    """The hypergradient at the minimum that Newton's method reaches from `w`, and its accuracy.

    None where there is no such minimum. The accuracy is relative: the last step times how much the
    hypergradient changes with the point, and rounding times the condition number.
    """
    end = minimise(lambda w: inner(w, h), w)
    if not end.found:
        return None, 0.0
    found = hypergradient(inner, outer, end.w, h, end.hessian)
    generator = torch.Generator().manual_seed(0)
    way = torch.randn(len(w), generator=generator, dtype=w.dtype)
    size, near = vector_norm(found), 1e-9
    moved = end.w + near * vector_norm(end.w) * way / vector_norm(way)
    change = float(vector_norm(hypergradient(inner, outer, moved, h) - found) / size / near)
    eps = torch.finfo(w.dtype).eps
    accuracy = (end.step + eps) * change + eps * float(torch.linalg.cond(end.hessian))
    return found, accuracy if accuracy == accuracy else float("inf")


def gauss_newton(outputs: Scalar, loss: Scalar, regulariser: Scalar, w: Tensor) -> Tensor:
    """J^T (d2 loss) J, and the Hessian of the regulariser."""
    w = w.detach().requires_grad_()
    z = outputs(w)
    rows = jacobian(z.flatten(), w)
    curvature = derivatives(lambda flat: loss(flat.view(z.shape)), z.detach().flatten())[2]
    return rows.T @ curvature @ rows + derivatives(regulariser, w)[2]
