"""A bilevel problem of quadratics, in batches, whose value function is known in closed form.

Batch i of the inner loss is ``z.H_i z / 2 + x.C_i z + c_i.z``, batch j of the outer loss
``z.P_j z / 2 + x.Q_j x / 2 + p_j.z + q_j.x``; both losses are the means over their batches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad import Bilevel

F64 = torch.float64
P, H = 4, 3  # inner and outer variables


@dataclass(frozen=True)
class Inner:
    H: Tensor
    C: Tensor
    c: Tensor


@dataclass(frozen=True)
class Outer:
    P: Tensor
    Q: Tensor
    p: Tensor
    q: Tensor


def _definite(generator: torch.Generator, n: int, low: float) -> Tensor:
    root = torch.randn(n, n, generator=generator, dtype=F64)
    return low * torch.eye(n, dtype=F64) + root @ root.T / (2 * n)


class Quadratic:
    """Inner and outer batches, the losses on them, and the truth."""

    def __init__(self, inner: int = 5, outer: int = 3, noise: float = 0.5) -> None:
        g = torch.Generator().manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=F64)

        C, c, p, q = normal(H, P) / 2, normal(P), normal(P), normal(H)
        curved, bent, outside = _definite(g, P, 0.5), _definite(g, P, 0.3), _definite(g, H, 0.5)
        self.inner_batches = [
            Inner(
                curved + noise * _definite(g, P, 0.0),
                C + noise * normal(H, P) / 4,
                c + noise * normal(P),
            )
            for _ in range(inner)
        ]
        self.outer_batches = [
            Outer(
                bent + noise * _definite(g, P, 0.0),
                outside + noise * _definite(g, H, 0.0),
                p + noise * normal(P),
                q + noise * normal(H),
            )
            for _ in range(outer)
        ]
        self.seen: list[Inner | Outer] = []

    def inner(self, z: Tensor, x: Tensor, batch: Inner) -> Tensor:
        self.seen.append(batch)
        return z @ batch.H @ z / 2 + x @ batch.C @ z + batch.c @ z

    def outer(self, z: Tensor, x: Tensor, batch: Outer) -> Tensor:
        self.seen.append(batch)
        return z @ batch.P @ z / 2 + x @ batch.Q @ x / 2 + batch.p @ z + batch.q @ x

    @property
    def whole_inner(self) -> Inner:
        parts = [(b.H, b.C, b.c) for b in self.inner_batches]
        return Inner(*(torch.stack(part).mean(0) for part in zip(*parts, strict=True)))

    @property
    def whole_outer(self) -> Outer:
        parts = [(b.P, b.Q, b.p, b.q) for b in self.outer_batches]
        return Outer(*(torch.stack(part).mean(0) for part in zip(*parts, strict=True)))

    def solution(self, x: Tensor) -> Tensor:
        g = self.whole_inner
        return -torch.linalg.solve(g.H, g.C.T @ x + g.c)

    def hypergradient(self, x: Tensor) -> Tensor:
        g, f, z = self.whole_inner, self.whole_outer, self.solution(x)
        u = torch.linalg.solve(g.H, f.P @ z + f.p)
        return f.Q @ x + f.q - g.C @ u

    def optimum(self) -> Tensor:
        """The outer minimiser: the hypergradient is affine in x."""
        zero = torch.zeros(H, dtype=F64)
        at_zero = self.hypergradient(zero)
        columns = [self.hypergradient(e) - at_zero for e in torch.eye(H, dtype=F64)]
        return -torch.linalg.solve(torch.stack(columns, dim=1), at_zero)

    def distance(self, x: Tensor) -> float:
        """How far x is from the optimum, relative to where every run starts."""
        start, best = torch.zeros(H, dtype=F64), self.optimum()
        return float((x - best).norm() / (start - best).norm())


def start() -> tuple[Tensor, Tensor]:
    """Where every run starts."""
    return torch.zeros(P, dtype=F64), torch.zeros(H, dtype=F64)


def sgd(lr, **options):
    return functools.partial(torch.optim.SGD, lr=lr, **options)


def adam(lr):
    return functools.partial(torch.optim.Adam, lr=lr)


def loop(problem, method=None, *, inner_lr=0.4, outer_lr=0.3, batches=False, **options):
    """A run from zero: on the whole losses, or on batches drawn at random."""
    options = {"inner_optimizer": sgd(inner_lr), "outer_optimizer": sgd(outer_lr), **options}
    if batches:
        sources = {"inner_batches": problem.inner_batches, "outer_batches": problem.outer_batches}
        return Bilevel(
            problem.outer, problem.inner, *start(), method=method, **{**sources, **options}
        )
    inner, outer = problem.whole_inner, problem.whole_outer
    return Bilevel(
        lambda z, x: problem.outer(z, x, outer),
        lambda z, x: problem.inner(z, x, inner),
        *start(),
        method=method,
        **options,
    )


def run(bilevel, steps):
    for _ in range(steps):
        info = bilevel.step()
    return info
