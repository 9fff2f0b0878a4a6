"""Linear systems of every kind, for the tests of the solvers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import hypergrad
from hypergrad import CG, GMRES, LSMR, MINRES, BiCGSTAB, Exact, Neumann, NormalCG, SolveInfo
from tests.problems import F64, data

#: Every method at its defaults, and the default one.
SOLVERS = {
    "None": None,
    "Exact": Exact(),
    "CG": CG(),
    "MINRES": MINRES(),
    "GMRES": GMRES(),
    "BiCGSTAB": BiCGSTAB(),
    "NormalCG": NormalCG(),
    "LSMR": LSMR(),
    "Neumann": Neumann(),
}


class Counting:
    """A matrix as a product that counts how often it is formed."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.count = A, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1
        return self.A @ v


def definite(n: int, seed: int = 0, condition: float = 10.0, dtype: torch.dtype = F64) -> Tensor:
    """A symmetric positive definite matrix with eigenvalues from 1 to `condition`."""
    Q = torch.linalg.qr(data(seed, n, n, dtype=F64)).Q
    A = Q * torch.logspace(0, math.log10(condition), n, dtype=F64) @ Q.T
    return ((A + A.T) / 2).to(dtype)


def semidefinite(n: int, rank: int, seed: int) -> Tensor:
    B = data(seed, n, rank, dtype=F64)
    return B @ B.T


def residual(A: Tensor, x: Tensor, b: Tensor) -> float:
    return float((b - A @ x).norm() / b.norm())


def hypergradient_with(A: Tensor, b: Tensor, solver: Any, **options: Any) -> Any:
    """A hypergradient whose linear system is ``A u = b``, at an exact inner solution."""

    def inner(w: Tensor, theta: Tensor) -> Tensor:
        return (w - theta) @ A @ (w - theta) / 2

    theta = torch.ones_like(b)
    return hypergrad.implicit_grad(
        lambda w, theta: b @ w, inner, theta.clone(), theta, solver=solver, **options
    )


def batch(solver: Any, A: Tensor, b: Tensor) -> tuple[Tensor, SolveInfo]:
    found: tuple[Tensor, SolveInfo] = torch.func.vmap(
        lambda A, b: solver.solve(lambda v: A @ v, b)
    )(A, b)
    return found


def with_spectrum(*values: Any, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """A symmetric matrix with given eigenvalues."""
    spectrum = torch.cat([torch.as_tensor(v, dtype=F64).reshape(-1) for v in values])
    Q = torch.linalg.qr(data(seed, len(spectrum), len(spectrum), dtype=F64)).Q
    A = Q * spectrum @ Q.T
    return ((A + A.T) / 2).to(dtype)


def spread(n: int, low: float, high: float) -> Tensor:
    return torch.logspace(math.log10(low), math.log10(high), n, dtype=F64)


def indefinite(n: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return with_spectrum(-spread(n // 2, 1, 4), spread(n - n // 2, 1, 20), seed=seed, dtype=dtype)


def skewed(n: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """A well-conditioned matrix that is far from symmetric."""
    A = data(seed, n, n, dtype=F64) / n**0.5
    return (A.triu() - A.tril() / 2 + 2 * torch.eye(n, dtype=F64)).to(dtype)


def suiting(method: Any, n: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """A matrix of the kind that a method is for."""
    if method is CG:
        return with_spectrum(spread(n, 1, 30), seed=seed, dtype=dtype)
    return indefinite(n, seed, dtype) if method is MINRES else skewed(n, seed, dtype)


def solve(solver: Any, A: Tensor, b: Tensor, **options: Any) -> tuple[Tensor, SolveInfo]:
    found: tuple[Tensor, SolveInfo] = solver.solve(
        lambda v: A @ v, b, rmatvec=lambda v: A.mT @ v, **options
    )
    return found
