"""Bilevel problems whose hypergradient is known without the library.

A `Problem` holds an inner problem with its solver, an outer loss and the true hypergradient: a
closed form in plain linear algebra, or the implicit formula written out densely by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian
from torch.utils import _pytree as pytree

import hypergrad

F64 = torch.float64


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """An inner problem, its solver, an outer loss, and the true hypergradient.

    `inner` is an objective for the kind "minimum", an equation for "root" and a map for
    "fixed point".
    """

    kind: str
    inner: Callable[[Any, Any], Any]
    outer: Callable[[Any, Any], Tensor]
    hparams: Any
    solve: Callable[[Any], Any]
    hypergradient: Callable[[Any], Any]

    @property
    def condition(self) -> Any:
        kinds = {
            "minimum": hypergrad.Minimum,
            "root": hypergrad.Root,
            "fixed point": hypergrad.FixedPoint,
        }
        return kinds[self.kind](self.inner)

    @property
    def symmetric(self) -> bool:
        return self.kind == "minimum"

    def decorated(self, **options: Any) -> Callable[[Any], Any]:
        """``hparams -> params``, made differentiable by the decorator of this kind."""
        decorators = {
            "minimum": hypergrad.custom_argmin,
            "root": hypergrad.custom_root,
            "fixed point": hypergrad.custom_fixed_point,
        }

        @decorators[self.kind](self.inner, **options)
        def fit(init: None, hparams: Any) -> Any:
            return self.solve(hparams)

        return lambda hparams: fit(None, hparams)


def flat(tree: Any) -> Tensor:
    """All tensors of a pytree in one vector."""
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def relative_error(found: Any, expected: Any) -> float:
    """``||found - expected|| / ||expected||`` over all leaves, which must match in structure."""
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    shapes = pytree.tree_map(lambda a, b: a.shape == b.shape, found, expected)
    assert all(pytree.tree_leaves(shapes))
    a, b = flat(found).detach().to(F64), flat(expected).detach().to(F64)
    return float((a - b).norm() / b.norm())


def central_differences(problem: Problem, step: float = 1e-5) -> Any:
    """The hypergradient by central differences of the solved problem, entry by entry."""
    leaves, spec = pytree.tree_flatten(problem.hparams)

    def value(moved: list[Tensor]) -> Tensor:
        hparams = pytree.tree_unflatten(moved, spec)
        return problem.outer(problem.solve(hparams), hparams)

    grads = []
    for place, leaf in enumerate(leaves):
        grad = torch.zeros_like(leaf)
        for entry in range(leaf.numel()):
            change = torch.zeros_like(leaf)
            change.view(-1)[entry] = step
            up, down = list(leaves), list(leaves)
            up[place], down[place] = leaf + change, leaf - change
            grad.view(-1)[entry] = (value(up) - value(down)) / (2 * step)
        grads.append(grad)
    return pytree.tree_unflatten(grads, spec)


def data(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers that depend on the seed alone, and not on the dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def ridge_data(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Inputs ``(30, 5)`` and targets ``(30,)`` of `ridge`."""
    return data(0, 30, 5, dtype=dtype), data(1, 30, dtype=dtype)


def ridge(dtype: torch.dtype = F64) -> Problem:
    """Ridge regression in its penalty, which the outer loss sees too."""
    X, y = ridge_data(dtype)
    X_val, y_val = data(2, 10, 5, dtype=dtype), data(3, 10, dtype=dtype)

    def matrix(lam: Tensor) -> Tensor:
        return X.T @ X + lam * torch.eye(5, dtype=dtype)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return (X @ w - y).square().sum() / 2 + lam * (w @ w) / 2

    def outer(w: Tensor, lam: Tensor) -> Tensor:
        return (X_val @ w - y_val).square().sum() / 2 + lam.square() / 10

    def solve(lam: Tensor) -> Tensor:
        return torch.linalg.solve(matrix(lam), X.T @ y)

    def hypergradient(lam: Tensor) -> Tensor:
        w = solve(lam)
        u = torch.linalg.solve(matrix(lam), X_val.T @ (X_val @ w - y_val))
        return lam / 5 - w @ u

    return Problem("minimum", inner, outer, torch.tensor(2.0, dtype=dtype), solve, hypergradient)


def per_feature_ridge(dtype: torch.dtype = F64) -> Problem:
    """Ridge regression with a penalty for each weight and a free 0-d bias."""
    X, y = data(4, 40, 4, dtype=dtype), 1.0 + data(5, 40, dtype=dtype)
    X_val, y_val = data(6, 15, 4, dtype=dtype), data(7, 15, dtype=dtype)
    Z = torch.cat([X, torch.ones(40, 1, dtype=dtype)], dim=1)
    Z_val = torch.cat([X_val, torch.ones(15, 1, dtype=dtype)], dim=1)

    def penalties(hparams: dict[str, Tensor]) -> Tensor:
        return torch.cat([hparams["log_penalty"].exp(), torch.zeros(1, dtype=dtype)])

    def inner(params: dict[str, Tensor], hparams: dict[str, Tensor]) -> Tensor:
        errors = X @ params["weight"] + params["bias"] - y
        penalty = hparams["log_penalty"].exp() @ params["weight"].square()
        return (errors.square().sum() + penalty) / 2

    def outer(params: dict[str, Tensor], hparams: dict[str, Tensor]) -> Tensor:
        return (X_val @ params["weight"] + params["bias"] - y_val).square().mean()

    def vector(hparams: dict[str, Tensor]) -> Tensor:
        return torch.linalg.solve(Z.T @ Z + penalties(hparams).diag(), Z.T @ y)

    def solve(hparams: dict[str, Tensor]) -> dict[str, Tensor]:
        v = vector(hparams)
        return {"weight": v[:4], "bias": v[4]}

    def hypergradient(hparams: dict[str, Tensor]) -> dict[str, Tensor]:
        v = vector(hparams)
        g = 2 * Z_val.T @ (Z_val @ v - y_val) / 15
        u = torch.linalg.solve(Z.T @ Z + penalties(hparams).diag(), g)
        return {"log_penalty": -(penalties(hparams) * v * u)[:4]}

    start = {"log_penalty": torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=dtype)}
    return Problem("minimum", inner, outer, start, solve, hypergradient)


def logistic(dtype: torch.dtype = F64) -> Problem:
    """Logistic regression with a penalty for each weight, solved by Newton's method."""
    X, X_val = data(8, 40, 4, dtype=dtype), data(9, 20, 4, dtype=dtype)
    true = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=dtype)
    y = (X @ true + data(10, 40, dtype=dtype) > 0).to(dtype)
    y_val = (X_val @ true + data(11, 20, dtype=dtype) > 0).to(dtype)

    def cross_entropy(X: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = X @ w
        return (torch.nn.functional.softplus(z) - y * z).mean()

    def inner(w: Tensor, log_penalty: Tensor) -> Tensor:
        return cross_entropy(X, w, y) + log_penalty.exp() @ w.square() / 2

    def outer(w: Tensor, log_penalty: Tensor) -> Tensor:
        return cross_entropy(X_val, w, y_val)

    def solve(log_penalty: Tensor) -> Tensor:
        w = torch.zeros(4, dtype=dtype)
        for _ in range(20):
            p = torch.sigmoid(X @ w)
            gradient = X.T @ (p - y) / 40 + log_penalty.exp() * w
            H = X.T @ ((p * (1 - p))[:, None] * X) / 40 + log_penalty.exp().diag()
            w = w - torch.linalg.solve(H, gradient)
        return w

    return Problem(
        "minimum",
        inner,
        outer,
        torch.tensor([-2.0, -3.0, -1.0, -2.5], dtype=dtype),
        solve,
        lambda log_penalty: dense_hypergradient(inner, outer, solve(log_penalty), log_penalty),
    )


def dense_hypergradient(
    inner: Callable[[Tensor, Tensor], Tensor],
    outer: Callable[[Tensor, Tensor], Tensor],
    w: Tensor,
    theta: Tensor,
) -> Tensor:
    """The implicit formula for vectors, with the two blocks of the second derivative formed."""
    blocks = hessian(inner, (w, theta))
    by_w, by_theta = jacobian(outer, (w, theta))
    return by_theta - torch.linalg.solve(blocks[0][0], by_w) @ blocks[0][1]


def minimum(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where a quasi-Newton method and then Newton's end, from `start`: a definite Hessian."""
    w = start.detach().clone().requires_grad_()
    search = torch.optim.LBFGS([w], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(w)
        value.backward()
        return value

    search.step(closure)
    w = w.detach()
    for _ in range(4):
        w = w - torch.linalg.solve(hessian(loss, w), jacobian(loss, w))
    assert torch.linalg.eigvalsh(hessian(loss, w))[0] > 0
    return w


STEEP = torch.logspace(0, 2, 12, dtype=F64)


def bowl(x: Tensor, centre: Tensor | float) -> Tensor:
    """A quadratic of condition number 100."""
    return (STEEP.to(x) * (x - centre) ** 2).sum() / 2


TASKS = 3


def imaml_matrices(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor, float]:
    """Hessians ``(3, 4, 4)``, linear terms and targets ``(3, 4)`` of three tasks, and lambda."""
    B = data(12, TASKS, 4, 4, dtype=dtype)
    scales = torch.tensor([0.1, 1.0, 3.0], dtype=dtype)[:, None, None]
    return (
        scales * (B @ B.mT) / 4,
        data(13, TASKS, 4, dtype=dtype),
        data(14, TASKS, 4, dtype=dtype),
        2.0,
    )


def imaml(dtype: torch.dtype = F64) -> Problem:
    """iMAML on three quadratic tasks: each task's answer is (I + H/lambda)^-1 times its slope."""
    H, c, target, lam = imaml_matrices(dtype)
    eye = torch.eye(4, dtype=dtype)

    def inner(phi: Tensor, theta: Tensor) -> Tensor:
        train = (phi * (H @ phi[..., None])[..., 0]).sum() / 2 - (c * phi).sum()
        return train + lam / 2 * (phi - theta).square().sum()

    def outer(phi: Tensor, theta: Tensor) -> Tensor:
        return (phi - target).square().sum() / (2 * TASKS)

    def solve(theta: Tensor) -> Tensor:
        return torch.linalg.solve(H + lam * eye, (c + lam * theta)[..., None])[..., 0]

    def hypergradient(theta: Tensor) -> Tensor:
        slope = (solve(theta) - target) / TASKS
        return torch.linalg.solve(eye + H / lam, slope[..., None])[..., 0].sum(dim=0)

    return Problem("minimum", inner, outer, data(15, 4, dtype=dtype), solve, hypergradient)


def affine(dtype: torch.dtype = F64) -> Problem:
    """The fixed point of ``scale M x + shift`` with a matrix that is far from symmetric."""
    M = data(16, 5, 5, dtype=dtype).triu() + data(17, 5, 5, dtype=dtype) / 4
    M = 0.8 * M / torch.linalg.matrix_norm(M, 2)
    target = data(18, 5, dtype=dtype)

    def step(x: Tensor, hparams: dict[str, Tensor]) -> Tensor:
        return hparams["scale"] * (M @ x) + hparams["shift"]

    def outer(x: Tensor, hparams: dict[str, Tensor]) -> Tensor:
        return (x - target).square().sum() / 2 + hparams["scale"] ** 3

    def matrix(hparams: dict[str, Tensor]) -> Tensor:
        return torch.eye(5, dtype=dtype) - hparams["scale"] * M

    def solve(hparams: dict[str, Tensor]) -> Tensor:
        return torch.linalg.solve(matrix(hparams), hparams["shift"])

    def hypergradient(hparams: dict[str, Tensor]) -> dict[str, Tensor]:
        x = solve(hparams)
        u = torch.linalg.solve(matrix(hparams).T, x - target)
        return {"scale": 3 * hparams["scale"] ** 2 + u @ (M @ x), "shift": u}

    start = {"scale": torch.tensor(0.9, dtype=dtype), "shift": data(19, 5, dtype=dtype)}
    return Problem("fixed point", step, outer, start, solve, hypergradient)


def equilibrium(dtype: torch.dtype = F64) -> Problem:
    """A deep equilibrium: a tanh layer, made a contraction, applied until nothing moves."""
    x, target = data(20, 3, 2, dtype=dtype), data(21, 3, 4, dtype=dtype)

    def layer(z: Tensor, hparams: dict[str, Tensor]) -> Tensor:
        return torch.tanh(z @ hparams["W"].T + x @ hparams["U"].T + hparams["b"])

    def outer(z: Tensor, hparams: dict[str, Tensor]) -> Tensor:
        return (z - target).square().mean() + hparams["b"].square().sum() / 20

    def solve(hparams: dict[str, Tensor]) -> Tensor:
        z = torch.zeros(3, 4, dtype=dtype)
        for _ in range(200):
            z = layer(z, hparams)
        return z

    def hypergradient(hparams: dict[str, Tensor]) -> dict[str, Tensor]:
        z = solve(hparams)
        names = list(hparams)

        def moved(z: Tensor, *values: Tensor) -> Tensor:
            return layer(z.view(3, 4), dict(zip(names, values, strict=True))).reshape(-1)

        def value(z: Tensor, *values: Tensor) -> Tensor:
            return outer(z.view(3, 4), dict(zip(names, values, strict=True)))

        inputs = (z.reshape(-1), *hparams.values())
        J, *by_hparams = jacobian(moved, inputs)
        slope, *direct = jacobian(value, inputs)
        u = torch.linalg.solve((torch.eye(12, dtype=dtype) - J).T, slope)
        return {
            name: d + torch.tensordot(u, block, dims=1)
            for name, d, block in zip(names, direct, by_hparams, strict=True)
        }

    W = data(22, 4, 4, dtype=dtype)
    start = {
        "W": 0.7 * W / torch.linalg.matrix_norm(W, 2),
        "U": data(23, 4, 2, dtype=dtype) / 2,
        "b": data(24, 4, dtype=dtype) / 4,
    }
    return Problem("fixed point", layer, outer, start, solve, hypergradient)


def kepler(dtype: torch.dtype = F64) -> Problem:
    """Kepler's equation E - e sin E = M: a 0-d root in two 0-d hyperparameters."""

    def equation(E: Tensor, hparams: tuple[Tensor, Tensor]) -> Tensor:
        e, M = hparams
        return E - e * torch.sin(E) - M

    def outer(E: Tensor, hparams: tuple[Tensor, Tensor]) -> Tensor:
        return E.square() + 0.5 * hparams[0]

    def solve(hparams: tuple[Tensor, Tensor]) -> Tensor:
        E = hparams[1]
        for _ in range(30):
            E = E - equation(E, hparams) / (1 - hparams[0] * torch.cos(E))
        return E

    def hypergradient(hparams: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        E = solve(hparams)
        slope = 2 * E / (1 - hparams[0] * torch.cos(E))
        return 0.5 + slope * torch.sin(E), slope

    start = (torch.tensor(0.6, dtype=dtype), torch.tensor(1.2, dtype=dtype))
    return Problem("root", equation, outer, start, solve, hypergradient)


CONDITION_NUMBER = 9e6


def ill_conditioned_ridge(dtype: torch.dtype = F64) -> Problem:
    """Ridge regression whose matrix has the condition number 9e6.

    Everything is written in the basis of right singular vectors of X, so that the closed form
    needs no factorisation and loses no digit.
    """
    spectrum = torch.logspace(0, 1, 6, base=CONDITION_NUMBER, dtype=F64) - 1  # of X^T X; lambda 1
    V = torch.linalg.qr(data(25, 6, 6, dtype=F64)).Q
    U = torch.linalg.qr(data(26, 12, 6, dtype=F64)).Q
    X = (U * spectrum.sqrt() @ V.T).to(dtype)
    y, target = data(27, 12, dtype=dtype), data(28, 6, dtype=dtype)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return (X @ w - y).square().sum() / 2 + lam * (w @ w) / 2

    def outer(w: Tensor, lam: Tensor) -> Tensor:
        return (w - target).square().sum() / 2

    def in_basis(lam: Tensor) -> Tensor:
        return spectrum.sqrt() * (U.T @ y.to(F64)) / (spectrum + lam.to(F64))

    def solve(lam: Tensor) -> Tensor:
        return (V @ in_basis(lam)).to(dtype)

    def hypergradient(lam: Tensor) -> Tensor:
        w = in_basis(lam)
        u = (w - V.T @ target.to(F64)) / (spectrum + lam.to(F64))
        return -(w @ u).to(dtype)

    return Problem("minimum", inner, outer, torch.tensor(1.0, dtype=dtype), solve, hypergradient)


WELL_POSED = [
    ridge,
    per_feature_ridge,
    logistic,
    imaml,
    affine,
    equilibrium,
    kepler,
]
EVERY = [*WELL_POSED, ill_conditioned_ridge]
