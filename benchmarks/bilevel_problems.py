"""Bilevel problems in batches whose value function can be evaluated apart from any method.

The simulated quadratic and the regularisation of logistic regression are those of benchmark_bilevel
(Dagréou et al., 2022), the latter on data that scikit-learn brings along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor
from torch.nn import functional

F64 = torch.float64
BATCH = 64
Batch = tuple[Tensor, ...]


@dataclass
class Problem:
    """Losses on batches, the data, and where every run starts.

    Parameters
    ----------
    inner, outer
        ``(params, hparams, batch) -> loss``, means over the samples of a batch.
    train, validation
        All samples of both levels, tensors with the samples in front.
    params, hparams
        Where every run starts, all zeros or the like.
    solution
        The inner minimiser and the optimal hyperparameters in closed form, where there is one.
    """

    name: str
    inner: Callable[[Tensor, Tensor, Batch], Tensor]
    outer: Callable[[Tensor, Tensor, Batch], Tensor]
    train: Batch
    validation: Batch
    params: Tensor
    hparams: Tensor
    solution: Callable[[Tensor], Tensor] | None = None
    optimum: Tensor | None = None
    _warm: np.ndarray | None = field(default=None, repr=False)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem in another precision, for the runs."""

        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() else t

        return Problem(
            self.name,
            self.inner,
            self.outer,
            tuple(map(cast, self.train)),
            tuple(map(cast, self.validation)),
            cast(self.params),
            cast(self.hparams),
        )

    def batches(self, level: str, seed: int = 0) -> list[Batch]:
        """The samples of a level, shuffled once and cut into batches of one size."""
        data = self.train if level == "inner" else self.validation
        n = len(data[0])
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        count = max(n // BATCH, 1)
        return [
            tuple(part[order[i * BATCH : (i + 1) * BATCH]] for part in data) for i in range(count)
        ]

    def solve(self, hparams: Tensor) -> Tensor:
        """The inner minimiser, in float64: the closed form, or L-BFGS of SciPy."""
        if self.solution is not None:
            return self.solution(hparams)

        def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
            w = torch.from_numpy(flat).reshape(self.params.shape).requires_grad_()
            value = self.inner(w, hparams, self.train)
            (gradient,) = torch.autograd.grad(value, w)
            return value.item(), gradient.reshape(-1).numpy()

        start = self.params.reshape(-1).numpy() if self._warm is None else self._warm
        found = minimize(
            value_and_gradient,
            start.copy(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 2000, "maxcor": 30, "ftol": 1e-15, "gtol": 1e-8, "maxfun": 4000},
        )
        self._warm = found.x
        return torch.from_numpy(found.x.copy()).reshape(self.params.shape)

    def value(self, hparams: Tensor) -> float:
        """The outer loss at the inner minimiser."""
        hparams = hparams.to(F64)
        if not torch.isfinite(hparams).all():
            return float("inf")
        return self.outer(self.solve(hparams), hparams, self.validation).item()

    def hypergradient(self, hparams: Tensor) -> Tensor:
        """The true one: the implicit formula with the Hessian formed and factorised."""
        hparams = hparams.to(F64)
        w = self.solve(hparams)
        shape = w.shape

        def slope(flat: Tensor, h: Tensor) -> Tensor:
            return torch.func.grad(lambda v: self.inner(v.reshape(shape), h, self.train))(flat)

        flat = w.reshape(-1)
        H = torch.func.jacrev(slope, chunk_size=64)(flat, hparams)
        by_w, direct = torch.func.grad(
            lambda v, h: self.outer(v.reshape(shape), h, self.validation), argnums=(0, 1)
        )(flat, hparams)
        u = torch.linalg.solve(H, by_w)
        _, pull = torch.func.vjp(lambda h: slope(flat, h), hparams)
        found: Tensor = direct - pull(u)[0]
        return found

    def least(self) -> float:
        """The least value, where it is known in closed form; else NaN."""
        return float("nan") if self.optimum is None else self.value(self.optimum)


def every() -> list[Problem]:
    """All of them, in float64."""
    return [quadratic(), breast_cancer(), digits(), cleaning()]


def quadratic(samples: int = 1024, inner: int = 100, outer: int = 100) -> Problem:
    """The simulated quadratic: each sample a rank-one Hessian, spectra from 0.1 to 1."""
    g = torch.Generator().manual_seed(2442)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    def level(zero: int) -> Batch:
        """Rows x, y, a, b, and linear terms: the parts of ``_quadratic_loss``."""

        def rows(d: int, spectrum: Tensor) -> Tensor:
            U = torch.linalg.qr(normal(d, d)).Q
            return normal(samples, d) @ (U * spectrum.sqrt()) @ U.T

        of_x = torch.logspace(-1, 0, outer - zero, dtype=F64)
        U, V = torch.linalg.qr(normal(outer, outer)).Q, torch.linalg.qr(normal(inner, inner)).Q
        D = torch.zeros(outer, inner, dtype=F64)
        k = min(outer, inner)
        D[range(k), range(k)] = torch.logspace(-1, -1, k, dtype=F64)
        common = normal(samples, inner)
        return (
            rows(inner, torch.logspace(-1, 0, inner, dtype=F64)),
            rows(outer, torch.cat([torch.zeros(zero, dtype=F64), of_x])),
            common @ D.T @ U.T,
            common @ V.T,
            normal(samples, inner),
            normal(samples, outer),
        )

    train, validation = level(1), level(1)

    def means(data: Batch) -> tuple[Tensor, ...]:
        x, y, a, b, c, d = data
        return x.T @ x / samples, y.T @ y / samples, a.T @ b / samples, c.mean(0), d.mean(0)

    (H, _, C, c, _), (P, Q, R, p, q) = means(train), means(validation)

    def solution(h: Tensor) -> Tensor:
        return -torch.linalg.solve(H, C.T @ h + c)

    def hypergradient(h: Tensor) -> Tensor:
        z = solution(h)
        u = torch.linalg.solve(H, P @ z + R.T @ h + p)
        return Q @ h + R @ z + q - C @ u

    at_zero = hypergradient(torch.zeros(outer, dtype=F64))
    matrix = torch.stack([hypergradient(e) - at_zero for e in torch.eye(outer, dtype=F64)], dim=1)
    lowest = torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0]
    assert lowest > 1e-3, lowest  # the value function is convex, as the benchmark wants it
    return Problem(
        "simulated quadratic",
        _quadratic_loss,
        _quadratic_loss,
        train,
        validation,
        torch.zeros(inner, dtype=F64),
        torch.zeros(outer, dtype=F64),
        solution,
        -torch.linalg.solve(matrix, at_zero),
    )


def _quadratic_loss(z: Tensor, h: Tensor, batch: Batch) -> Tensor:
    x, y, a, b, c, d = batch
    curved = (x @ z).square().mean() / 2 + (y @ h).square().mean() / 2
    return curved + ((a @ h) * (b @ z)).mean() + (c @ z).mean() + (d @ h).mean()


def breast_cancer() -> Problem:
    """Logistic regression, a penalty for each of 30 features; half of the data validates."""
    data = load_breast_cancer()
    x, y = _standardised(data.data), torch.from_numpy(data.target).to(F64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    half = len(x) // 2

    def error(w: Tensor, batch: Batch) -> Tensor:
        return functional.binary_cross_entropy_with_logits(batch[0] @ w, batch[1])

    return Problem(
        "breast cancer, penalties",
        lambda w, h, batch: error(w, batch) + (_penalty(h) * w.square()).sum() / 2,
        lambda w, h, batch: error(w, batch),
        (x[:half], y[:half]),
        (x[half:], y[half:]),
        torch.zeros(30, dtype=F64),
        torch.full((30,), -2.0, dtype=F64),
    )


def _penalty(h: Tensor) -> Tensor:
    """Bounded, so that one inner learning rate suits a run from its start to its end."""
    return 1.5 * h.sigmoid()


def digits() -> Problem:
    """Multinomial regression on digits, a penalty for each of 64 pixels; a third validates."""
    x, y = _digits()

    def error(w: Tensor, batch: Batch) -> Tensor:
        return functional.cross_entropy(batch[0] @ w, batch[1])

    def inner(w: Tensor, h: Tensor, batch: Batch) -> Tensor:
        return error(w, batch) + (_penalty(h)[:, None] * w.square()).sum() / 2

    return Problem(
        "digits, penalties",
        inner,
        lambda w, h, batch: error(w, batch),
        (x[:600], y[:600]),
        (x[600:1200], y[600:1200]),
        torch.zeros(64, 10, dtype=F64),
        torch.full((64,), -2.0, dtype=F64),
    )


def cleaning() -> Problem:
    """Digits with half of the training labels wrong: a weight for each sample is learned."""
    x, y = _digits()
    g = torch.Generator().manual_seed(1)
    wrong = torch.rand(800, generator=g) < 0.5
    shift = torch.randint(1, 10, (800,), generator=g)
    labels = torch.where(wrong, (y[:800] + shift) % 10, y[:800])

    def inner(w: Tensor, h: Tensor, batch: Batch) -> Tensor:
        x, y, place = batch
        each = functional.cross_entropy(x @ w, y, reduction="none")
        return (h[place].sigmoid() * each).mean() + 0.05 * w.square().sum()

    def outer(w: Tensor, h: Tensor, batch: Batch) -> Tensor:
        return functional.cross_entropy(batch[0] @ w, batch[1])

    return Problem(
        "digits, half of the labels wrong",
        inner,
        outer,
        (x[:800], labels, torch.arange(800)),
        (x[800:1200], y[800:1200]),
        torch.zeros(64, 10, dtype=F64),
        torch.zeros(800, dtype=F64),
    )


def _digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    x, y = _standardised(data.data), torch.from_numpy(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def _standardised(x: Any) -> Tensor:
    """Zero mean and unit deviation, but for pixels that hardly ever change."""
    t = torch.from_numpy(x).to(F64)
    return (t - t.mean(0)) / t.std(0).clamp(min=0.1)
