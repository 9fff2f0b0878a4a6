"""Hypergradients by hand: double backward and conjugate gradients, with nothing of the library."""

from collections.abc import Callable

import torch
from torch import Tensor

Leaves = dict[str, Tensor]
Loss = Callable[[Leaves, Leaves], Tensor]


def hypergradient(outer: Loss, inner: Loss, params: Leaves, hparams: Leaves) -> Leaves:
    """The direct term minus the cross derivative times ``A^-1 (d outer / d params)``."""
    p = {k: v.detach().clone().requires_grad_() for k, v in params.items()}
    h = {k: v.detach().clone().requires_grad_() for k, v in hparams.items()}
    P, H = list(p.values()), list(h.values())
    slopes = torch.autograd.grad(outer(p, h), [*P, *H], allow_unused=True)
    b = [torch.zeros_like(v) if s is None else s for v, s in zip(P, slopes, strict=False)]
    direct = slopes[len(P) :]
    gradient = torch.autograd.grad(inner(p, h), P, create_graph=True)

    def product(u: Tensor) -> Tensor:
        parts = torch.autograd.grad(gradient, P, _split(u, P), retain_graph=True)
        return _flat(parts)

    u = conjugate_gradients(product, _flat(b))
    cross = torch.autograd.grad(gradient, H, _split(u, P))
    return {k: -c if d is None else d - c for k, c, d in zip(h, cross, direct, strict=True)}


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """The solution of ``A u = b`` for a positive definite A, as far as rounding goes."""
    u, r = torch.zeros_like(b), b.clone()
    p, old = r.clone(), r @ r
    for _ in range(1000):
        if old.sqrt() <= 1e-13 * b.norm():
            break
        q = product(p)
        curvature = p @ q
        assert curvature > 0, "the inner problem of a test must have positive curvature"
        u, r = u + old / curvature * p, r - old / curvature * q
        new = r @ r
        p, old = r + new / old * p, new
    return u


def minimised(inner: Loss, params: Leaves, hparams: Leaves) -> Leaves:
    """The inner solution near where `params` start, by Newton's method."""
    now = {k: v.detach().clone() for k, v in params.items()}
    best = torch.inf
    for _ in range(30):
        p = {k: v.clone().requires_grad_() for k, v in now.items()}
        P = list(p.values())
        gradient = torch.autograd.grad(inner(p, hparams), P, create_graph=True)
        flat = _flat(gradient).detach()
        if not flat.norm() < best / 2:  # rounding is what is left
            break
        best = float(flat.norm())

        def product(
            u: Tensor, gradient: tuple[Tensor, ...] = gradient, P: list[Tensor] = P
        ) -> Tensor:
            return _flat(torch.autograd.grad(gradient, P, _split(u, P), retain_graph=True))

        step = _split(conjugate_gradients(product, flat), P)
        now = {k: v - s for (k, v), s in zip(now.items(), step, strict=True)}
    assert best <= 1e-5
    return now


def relative_error(found: Leaves, expected: Leaves) -> float:
    """The largest relative error of a leaf."""
    return max(float((found[k].double() - v).norm() / v.norm()) for k, v in expected.items())


def _flat(parts: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _split(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = flat.split([v.numel() for v in like])
    return [part.reshape(v.shape) for part, v in zip(parts, like, strict=True)]
