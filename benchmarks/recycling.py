"""Hypergradients along an outer loop: from zero at each step, from the last answer, and recycled.

``python -m benchmarks.recycling --features 500`` moves all penalties of a logistic regression by
1 % a step, solves the inner problem in float64, and prints for each step the products that a
hypergradient took (probes and evidence among them), its true error, and its cost in gradients.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.logistic import LogisticRegression
from hypergrad import CG, SolveInfo, compile, implicit_grad
from hypergrad.solvers._recycle import Memory, recycling

STEPS = 20  # of conjugate gradients from zero, whose error is the one to reach


class Sides:
    """The same hypergradient in several ways, each with what it keeps from step to step."""

    def __init__(self, rtol: float) -> None:
        self.last: Tensor | None = None
        self.memory = Memory()
        self.rtol = rtol
        self._compiled = compile(self._solved)
        self._recycled = compile(self._solved)

    def cold(self, problem: LogisticRegression) -> tuple[Tensor, SolveInfo]:
        return self._solved(problem, CG(maxiter=STEPS, rtol=0.0), None)

    def warm(self, problem: LogisticRegression) -> tuple[Tensor, SolveInfo]:
        grads, info = self._solved(problem, CG(maxiter=STEPS, rtol=self.rtol), self.last)
        self.last = info.solution
        return grads, info

    def recycled(self, problem: LogisticRegression) -> tuple[Tensor, SolveInfo]:
        with recycling(self.memory):
            return self._solved(problem, CG(maxiter=STEPS, rtol=self.rtol, recycle=True), None)

    def compiled(self, problem: LogisticRegression) -> tuple[Tensor, SolveInfo]:
        answer: tuple[Tensor, SolveInfo] = self._compiled(problem, CG(maxiter=STEPS, rtol=0.0))
        return answer

    def compiled_recycled(self, problem: LogisticRegression) -> tuple[Tensor, SolveInfo]:
        solver = CG(maxiter=STEPS, rtol=self.rtol, recycle=True)
        answer: tuple[Tensor, SolveInfo] = self._recycled(problem, solver)
        return answer

    def _solved(
        self, problem: LogisticRegression, solver: CG, x0: Tensor | None = None
    ) -> tuple[Tensor, SolveInfo]:
        return implicit_grad(
            problem.outer, problem.inner, problem.w, problem.log_penalty,
            solver=solver, x0=x0, on_failure="ignore", return_info=True,
        )  # fmt: skip


def gradient(problem: LogisticRegression) -> None:
    leaf = problem.w.detach().requires_grad_()
    torch.autograd.grad(problem.inner(leaf, problem.log_penalty), leaf)


def timed(call: Callable[[], object]) -> tuple[float, object]:
    start = time.process_time()
    answer = call()
    return time.process_time() - start, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=500)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--rtol", type=float, help="default: what 20 steps from zero reach")
    parser.add_argument("--step", type=float, default=0.01, help="of the logarithms")
    parser.add_argument("--same-way", action="store_true", help="all penalties up, not at random")
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    whole = LogisticRegression.draw(args.rows, args.features)
    rtol, sides = args.rtol, None
    table: dict[str, list[tuple[float, float, float]]] = {}
    for k in range(args.steps):
        if k:
            way = torch.randn(args.features, dtype=torch.float64, generator=generator)
            whole = whole.moved(args.step * (torch.ones_like(way) if args.same_way else way))
        problem, exact = whole.to(getattr(torch, args.dtype)), whole.exact()
        if sides is None:
            if rtol is None:
                rtol = float(Sides(0.0).cold(problem)[1].residual_norm)
            sides = Sides(rtol)
            print(f"relative residual asked for: {rtol:.1e}")
        for _ in range(5):
            gradient(problem)
        unit = statistics.median(timed(functools.partial(gradient, problem))[0] for _ in range(15))
        line = [f"{k:3d}"]
        for name in ("cold", "warm", "recycled", "compiled", "compiled_recycled"):
            cost, (grads, info) = timed(functools.partial(getattr(sides, name), problem))
            error = float((grads.double() - exact).norm() / exact.norm())
            table.setdefault(name, []).append((int(info.matvecs), error, cost / unit))
            line.append(f"{name}: {int(info.matvecs):2d} products, error {error:.1e}, "
                        f"{cost / unit:5.1f} gradients")  # fmt: skip
        print("; ".join(line))
    for name, rows in table.items():
        later = rows[len(rows) // 2 :]
        mean = statistics.mean(products for products, _, _ in rows)
        print(
            f"{name}: {mean:.1f} products a step over all; in the later half "
            f"{statistics.mean(p for p, _, _ in later):.1f}, error "
            f"{statistics.median(e for _, e, _ in later):.1e}, "
            f"{statistics.median(c for _, _, c in later):.1f} gradients"
        )


if __name__ == "__main__":
    main()
