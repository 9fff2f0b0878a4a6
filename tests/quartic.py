"""An inner problem all of whose derivatives are there to be wrong, and its solution by hand.

A quartic objective on a dict with a 0-d leaf. Newton's method is written out without torch.func
and without the library; unrolled from the solution it has the solution's derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import grad
from torch.utils import _pytree as pytree

D = torch.float64
_RNG = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_RNG, dtype=D)


X, Y, C = randn(8, 3), randn(8), randn(4)
LAM = torch.rand(3, generator=_RNG, dtype=D) + 0.5
LAMS = torch.rand(4, 3, generator=_RNG, dtype=D) + 0.5
XS = randn(4, 8, 3)
ONES = torch.ones(3, dtype=D)


def inner(p: Any, X: Tensor, y: Tensor, lam: Tensor) -> Tensor:
    w, b = p["w"], p["b"]
    return (
        ((X @ w + b - y) ** 2).sum() / 2
        + (lam * w**2).sum() / 2
        + lam.sum() * b**2 / 2
        + 0.05 * (w**4).sum()
        + 0.1 * (w.sum() * b) ** 2
    )


def gradient(p: Any, X: Tensor, y: Tensor, lam: Tensor) -> Any:
    """That of `inner`, by hand."""
    w, b = p["w"], p["b"]
    r, s = X @ w + b - y, w.sum()
    return {
        "w": X.T @ r + lam * w + 0.2 * w**3 + 0.2 * s * b**2,
        "b": r.sum() + lam.sum() * b + 0.2 * s**2 * b,
    }


def newton(X: Tensor, y: Tensor, lam: Tensor, steps: int, start: Tensor | None = None) -> Any:
    """Newton's method with the gradient and the Hessian by hand."""
    v = torch.zeros(4, dtype=lam.dtype) if start is None else start
    for _ in range(steps):
        w, b = v[:3], v[3]
        s = w.sum()
        corner = X.T @ X + torch.diag(lam + 0.6 * w**2) + 0.2 * b**2
        side = X.sum(dim=0) + 0.4 * s * b
        last = len(y) + lam.sum() + 0.2 * s**2
        H = torch.cat([
            torch.cat([corner, side[:, None]], dim=1),
            torch.cat([side, last[None]])[None],
        ])
        v = v - torch.linalg.solve(H, flat(gradient({"w": w, "b": b}, X, y, lam)))
    return {"w": v[:3], "b": v[3]}


def solve(init: Any, X: Tensor, y: Tensor, lam: Tensor) -> Any:
    return newton(X, y, lam, 8)


def reference(init: Any, X: Tensor, y: Tensor, lam: Tensor) -> Any:
    """Newton's method, unrolled from the solution: k steps have the derivatives to order k."""
    return newton(X, y, lam, 3, flat(solve(None, X, y, lam)).detach())


def step(p: Any, X: Tensor, y: Tensor, lam: Tensor) -> Any:
    g = grad(inner)(p, X, y, lam)
    return {k: p[k] - 0.03 * g[k] for k in p}


def skewed(p: Any, X: Tensor, y: Tensor, lam: Tensor) -> Any:
    """The gradient, mixed by a matrix that is not symmetric: the same root."""
    g = grad(inner)(p, X, y, lam)
    return {"w": g["w"] + 0.5 * g["b"] + torch.roll(g["w"], 1), "b": g["b"] - 0.3 * g["w"].sum()}


def skewed_by_hand(p: Any, X: Tensor, y: Tensor, lam: Tensor) -> Any:
    """The same without torch.func, which does not support saved-tensor hooks itself."""
    g = gradient(p, X, y, lam)
    return {"w": g["w"] + 0.5 * g["b"] + torch.roll(g["w"], 1), "b": g["b"] - 0.3 * g["w"].sum()}


def flat(p: Any) -> Tensor:
    return torch.cat([p["w"], p["b"][None]])


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def close(found: Any, want: Any, rtol: float = 1e-8) -> None:
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(want), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * (1 + b.abs().max().item()))
