"""`Auto` against every solver chosen by hand: time, products and true error, as a table.

Each system comes from a hypergradient of a real loss; its true solution is known. CPU time of one
thread, the sides interleaved, after a warm-up: ``python -m benchmarks.solvers [unknowns ...]``.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

import hypergrad
from hypergrad import CG, GMRES, MINRES, Auto, BiCGSTAB, Exact, Root
from hypergrad.solvers import Solver

SYMMETRIC: tuple[Solver, ...] = (Auto(), Exact(), CG(), MINRES())
INDEFINITE: tuple[Solver, ...] = (Auto(), Exact(), MINRES(), GMRES())
GENERAL: tuple[Solver, ...] = (Auto(), Exact(), GMRES(), BiCGSTAB())
BUDGET = 5.0  # seconds: a side that takes longer is measured once


@dataclass(frozen=True)
class Case:
    """A hypergradient whose linear system has a known solution."""

    name: str
    outer: Callable[[Tensor, Tensor], Tensor]
    condition: Any
    params: Tensor
    hparams: Tensor
    solution: Tensor
    solvers: tuple[Solver, ...]


def reflected(spectrum: Tensor) -> Tensor:
    """A dense symmetric matrix with a given spectrum: three reflections of a diagonal one."""
    A = spectrum.diag()
    for _ in range(3):
        w = torch.randn(len(spectrum), 1)
        w = w / w.norm()
        A = A - 2 * w @ (w.T @ A)
        A = A - 2 * (A @ w) @ w.T
    return (A + A.T) / 2


def system(name: str, A: Tensor, solvers: tuple[Solver, ...], *, symmetric: bool) -> Case:
    """A quadratic inner loss, or a linear equation, with the matrix A."""
    n = len(A)
    solution, point = torch.randn(n), torch.ones(n)
    b = A.T @ solution
    condition: Any = Root(lambda w, t: A @ (w - t))
    if symmetric:
        condition = hypergrad.Minimum(lambda w, t: (w - t) @ (A @ (w - t)) / 2)
    return Case(name, lambda w, t: b @ w, condition, point.clone(), point, solution, solvers)


def logistic(n: int, rows: int = 2000, log_penalty: float = -5.0) -> Case:
    """Logistic regression with a penalty for each feature."""
    X, X_val = torch.randn(rows, n) / n**0.5, torch.randn(rows // 4, n) / n**0.5
    y, y_val = ((torch.rand(k) > 0.5).double() for k in (rows, rows // 4))
    penalty = torch.full((n,), log_penalty)

    def inner(w: Tensor, penalty: Tensor) -> Tensor:
        return cross_entropy(X @ w, y) + (penalty.exp() * w * w).sum() / 2

    def outer(w: Tensor, penalty: Tensor) -> Tensor:
        return cross_entropy(X_val @ w, y_val)

    w = torch.zeros(n)
    for _ in range(12):
        p = torch.sigmoid(X @ w)
        H = X.T @ ((p * (1 - p))[:, None] * X) / rows + penalty.exp().diag()
        w = w - torch.linalg.solve(H, X.T @ (p - y) / rows + penalty.exp() * w)
    slope = X_val.T @ (torch.sigmoid(X_val @ w) - y_val) / len(y_val)
    name = f"logistic, log-penalty {log_penalty:g}"
    return Case(name, outer, inner, w, penalty, torch.linalg.solve(H, slope), SYMMETRIC)


def cases(n: int) -> Iterator[Case]:
    """One case of each kind."""
    for condition in (30, 1e4):
        A = reflected(torch.logspace(0, torch.tensor(condition).log10().item(), n))
        yield system(f"definite, condition {condition:.0e}", A, SYMMETRIC, symmetric=True)
    spectrum = torch.cat([torch.logspace(6, 6.95, 5), torch.logspace(0, 0.3, n - 5)])
    yield system(
        "definite, condition 9e6, clustered", reflected(spectrum), SYMMETRIC, symmetric=True
    )
    spectrum = torch.cat([-torch.logspace(0, 0.6, n // 2), torch.logspace(0, 1.3, n - n // 2)])
    yield system("indefinite", reflected(spectrum), INDEFINITE, symmetric=True)
    A = torch.randn(n, n) / n**0.5
    A = A.triu() - A.tril() / 2 + 2 * torch.eye(n)
    yield system("not symmetric", A, GENERAL, symmetric=False)
    yield logistic(n)
    yield logistic(n, log_penalty=-11.0)


def measure(case: Case, rounds: int) -> Iterator[str]:
    """One row of the table for each solver."""
    times: dict[Solver, list[float]] = {solver: [] for solver in case.solvers}
    infos = {}
    for round_ in range(rounds + 2):
        for solver, seconds in times.items():
            if round_ and seconds and seconds[0] > BUDGET:
                continue
            start = time.process_time()
            _, infos[solver] = hypergrad.implicit_grad(
                case.outer,
                case.condition,
                case.params,
                case.hparams,
                solver=solver,
                on_failure="ignore",
                return_info=True,
            )
            took = time.process_time() - start
            if round_ > 1 or took > BUDGET:
                seconds.append(took)
    unit = statistics.median(times[case.solvers[0]])
    for solver, info in infos.items():
        error = float((info.solution - case.solution).norm() / case.solution.norm())
        took = statistics.median(times[solver])
        name = info.method if info.method.startswith("Auto") else type(solver).__name__
        if isinstance(solver, Auto) and name == "Auto":
            name = f"Auto: {info.method}"
        yield (
            f"| {case.name} | {len(case.params)} | {name} | {took * 1e3:.1f} | "
            f"{took / unit:.2f} | {int(info.matvecs)} | {error:.0e} |"
        )


def main(sizes: list[int]) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    print("| system | unknowns | solver | ms | of Auto's time | products | true error |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for n in sizes:
        torch.manual_seed(0)
        for case in cases(n):
            for row in measure(case, rounds=9 if n < 1000 else 1):
                print(row, flush=True)


if __name__ == "__main__":
    main([int(n) for n in sys.argv[1:]] or [50, 500, 5000])
