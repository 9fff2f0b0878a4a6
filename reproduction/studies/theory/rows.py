"""The rows of the table: each computes a meta-gradient to a wanted accuracy, and is measured.

How many steps that takes is found first, on closed forms where those exist; then the library runs
once with that many, its calls are counted, and its answer is compared with the exact one. Where
two parts are approximate, the inner solution and what follows it, either is given half of the
error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

import torch
from torch import Tensor

import hypergrad
from reproduction.studies.theory.peak_memory import peak_bytes
from reproduction.studies.theory.quadratics import Calls, CountedObjective, Quadratic

MOST_STEPS = 200_000
UNREACHABLE = 1e-300  # a tolerance that is looked at and never met

Method: TypeAlias = Callable[[Quadratic], tuple[float, float]]
Solve: TypeAlias = Callable[[CountedObjective], Tensor]


@dataclass(frozen=True)
class Measurement:
    """One meta-gradient of one row.

    Parameters
    ----------
    row
        Which.
    kappa, accuracy, seed
        The condition number, the relative error that was asked for, and the problem's seed.
    inner_steps
        Steps of the inner solver.
    second
        Steps that were differentiated, or steps of conjugate gradients.
    gradients, products
        Inner gradients and Hessian-vector products, as counted.
    error
        Relative error, against the exact meta-gradient.
    own_error
        Relative error against the closed form of what the row computes: for a truncated or
        implicit row at the inner point that it has reached.
    peak
        Most bytes live at once, or None where that was not measured.
    """

    row: str
    kappa: float
    accuracy: float
    seed: int
    inner_steps: int
    second: int
    gradients: int
    products: int
    error: float
    own_error: float
    peak: int | None = None

    @property
    def total(self) -> int:
        """Gradients and products."""
        return self.gradients + self.products


@dataclass(frozen=True)
class Run:
    """A meta-gradient with all numbers of steps fixed, and the truth for it."""

    inner_steps: int
    second: int
    compute: Callable[[Calls], Tensor]
    own: Tensor

    def measure(self, row: str, problem: Quadratic, accuracy: float, seed: int) -> Measurement:
        """Compute it, and compare."""
        calls = Calls()
        found = self.compute(calls)
        return Measurement(
            row, problem.kappa, accuracy, seed, self.inner_steps, self.second, calls.gradients,
            calls.products, problem.error(found), problem.error(found, self.own),
        )  # fmt: skip

    def peak(self) -> int:
        """Measure its memory."""
        return peak_bytes(lambda: self.compute(Calls()))


def gradient_descent(problem: Quadratic) -> tuple[float, float]:
    """Return step size and momentum (none) of the best gradient descent."""
    return 2 / (problem.kappa + 1), 0.0


def nesterov(problem: Quadratic) -> tuple[float, float]:
    """Return step size and momentum of Nesterov's method for strongly convex functions."""
    root = problem.kappa**0.5
    return 1 / problem.kappa, (root - 1) / (root + 1)


def full(problem: Quadratic, accuracy: float, method: Method) -> Run:
    """Differentiate through all steps of the fewest that reach the accuracy."""
    exact = problem.meta_gradient()
    path = enumerate(problem.momentum_path(*method(problem)))
    steps = next(k for k, (found, _) in path if problem.error(found, exact) <= accuracy)
    return full_run(problem, steps, method)


def full_run(problem: Quadratic, steps: int, method: Method) -> Run:
    """Differentiate through all of so many steps."""
    own, _ = next(islice(problem.momentum_path(*method(problem)), steps, None))
    step_size, momentum = method(problem)

    def compute(calls: Calls) -> Tensor:
        inner = problem.inner(calls)

        def step(pair: tuple[Tensor, Tensor], theta: Tensor) -> tuple[Tensor, Tensor]:
            phi, before = pair
            y = phi + momentum * (phi - before) if momentum else phi
            return y - step_size * inner.gradient(y, theta), phi

        answer: Tensor = hypergrad.unrolled_grad(
            lambda pair, theta: problem.outer(pair[0], theta),
            step,
            lambda theta: (theta, theta),
            problem.theta,
            steps=steps,
        )
        return answer

    return Run(steps, steps, compute, own)


def truncated(problem: Quadratic, accuracy: float) -> Run:
    """Differentiate through the last gradient steps alone, the fewest that reach the accuracy."""
    steps, phi = _solved_to(accuracy / 2, problem, gradient_descent)
    step_size, _ = gradient_descent(problem)
    kept = least(lambda k: problem.error(problem.truncated(phi, step_size, k)) <= accuracy, start=8)
    return truncated_run(problem, max(steps, kept + 1), kept)


def solved_truncated(problem: Quadratic, kept: int) -> Run:
    """Differentiate through the last `kept` steps, at an inner point that is as good as solved."""
    steps, _ = _solved_to(1e-3, problem, gradient_descent)
    return truncated_run(problem, max(steps, kept + 1), kept)


def truncated_run(problem: Quadratic, steps: int, kept: int) -> Run:
    """Differentiate through the last `kept` of so many gradient steps."""
    path = problem.momentum_path(*gradient_descent(problem))
    _, phi = next(islice(path, steps, None))
    step_size, _ = gradient_descent(problem)

    def compute(calls: Calls) -> Tensor:
        inner = problem.inner(calls)
        answer: Tensor = hypergrad.unrolled_grad(
            problem.outer,
            lambda phi, theta: phi - step_size * inner.gradient(phi, theta),
            lambda theta: theta,
            problem.theta,
            steps=steps,
            truncate=kept,
        )
        return answer

    return Run(steps, kept, compute, problem.truncated(phi, step_size, kept))


def implicit_nesterov(problem: Quadratic, accuracy: float) -> Run:
    """Solve by Nesterov's method, then the linear system by conjugate gradients."""
    steps, _ = _solved_to(accuracy / 2, problem, nesterov)
    solve = _nesterov_solve(problem, steps)
    # Conjugate gradients cut short answer to the last digits of where they start: the same digits.
    return _implicit(problem, accuracy, steps, solve(problem.inner(Calls())), solve)


def implicit_run(problem: Quadratic, steps: int, products: int, *, evidence: bool = False) -> Run:
    """Take so many steps of Nesterov's method, then so many of conjugate gradients.

    Parameters
    ----------
    problem
        The problem.
    steps, products
        How many.
    evidence
        Whether the solve also collects what `SolveInfo` reports, as it does by default.

    Returns
    -------
    Run
        What is to be measured.
    """
    _, phi = next(islice(problem.momentum_path(*nesterov(problem)), steps, None))
    solve = _nesterov_solve(problem, steps)
    return _implicit_run(problem, steps, products, phi, solve, evidence=evidence)


def _nesterov_solve(problem: Quadratic, steps: int) -> Solve:
    step_size, momentum = nesterov(problem)

    def solve(inner: CountedObjective) -> Tensor:
        phi = before = problem.theta
        for _ in range(steps):
            y = phi + momentum * (phi - before)
            phi, before = y - step_size * inner.gradient(y, problem.theta), phi
        return phi

    return solve


def implicit_cg(problem: Quadratic, accuracy: float) -> Run:
    """Solve by conjugate gradients, which on a quadratic are Newton's method, and again by them."""

    def solve(inner: CountedObjective, steps: int) -> Tensor:
        theta = problem.theta
        start = theta.detach().requires_grad_()
        slope = inner.gradient(start, theta)

        def product(v: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(slope, start, v, retain_graph=True)
            return found

        step, _ = _cg(steps).solve(product, -slope.detach())
        return theta + step

    def solved(steps: int) -> bool:
        phi = solve(problem.inner(Calls()), steps)
        return problem.error(problem.meta_gradient_at(phi)) <= accuracy / 2

    steps = least(solved, start=8)
    phi = solve(problem.inner(Calls()), steps)
    return _implicit(problem, accuracy, steps, phi, lambda inner: solve(inner, steps))


ROWS: dict[str, Callable[[Quadratic, float], Run]] = {
    "MAML, gradient descent": lambda problem, accuracy: full(problem, accuracy, gradient_descent),
    "MAML, Nesterov": lambda problem, accuracy: full(problem, accuracy, nesterov),
    "truncated, gradient descent": truncated,
    "implicit, Nesterov and CG": implicit_nesterov,
    "implicit, CG and CG": implicit_cg,
}


def least(enough: Callable[[int], bool], start: int) -> int:
    """Find the least number for which `enough` holds, of a property that holds from there on.

    Parameters
    ----------
    enough
        The property.
    start
        Where to begin to look upwards.

    Returns
    -------
    int
        The number, at least 1.

    Raises
    ------
    ArithmeticError
        If it does not hold for the largest number that is tried.
    """
    low, high = 0, start
    while not enough(high):
        if high > MOST_STEPS:
            raise ArithmeticError(f"the accuracy was not reached in {high} steps")
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _solved_to(accuracy: float, problem: Quadratic, method: Method) -> tuple[int, Tensor]:
    """Find the fewest steps to a point whose implicit meta-gradient is so accurate, and it."""
    exact = problem.meta_gradient()
    for steps, (_, phi) in enumerate(problem.momentum_path(*method(problem))):
        if problem.error(problem.meta_gradient_at(phi), exact) <= accuracy:
            return steps, phi
    raise AssertionError


def _cg(steps: int, rtol: float = 0.0) -> hypergrad.CG:
    """Exactly so many steps: no tolerance stops them earlier, and without one nothing is judged."""
    return hypergrad.CG(maxiter=steps, rtol=rtol)


def _implicit(problem: Quadratic, accuracy: float, steps: int, phi: Tensor, solve: Solve) -> Run:
    """Form the implicit meta-gradient at `phi`, where `solve` ends, with the fewest steps of CG."""

    def enough(products: int) -> bool:
        found = _implicit_gradient(problem, problem.inner(Calls()), phi, products)
        return problem.error(found) <= accuracy

    return _implicit_run(problem, steps, least(enough, start=8), phi, solve)


def _implicit_run(
    problem: Quadratic,
    steps: int,
    products: int,
    phi: Tensor,
    solve: Solve,
    *,
    evidence: bool = False,
) -> Run:
    def compute(calls: Calls) -> Tensor:
        inner = problem.inner(calls)
        return _implicit_gradient(problem, inner, solve(inner), products, evidence=evidence)

    return Run(steps, products, compute, problem.meta_gradient_at(phi))


def _implicit_gradient(
    problem: Quadratic,
    inner: CountedObjective,
    phi: Tensor,
    products: int,
    *,
    evidence: bool = False,
) -> Tensor:
    # Whether the budgets suffice is judged here, against the exact answer.
    answer: tuple[Tensor, hypergrad.SolveInfo] | Tensor = hypergrad.implicit_grad(
        problem.outer, inner, phi, problem.theta,
        solver=_cg(products, UNREACHABLE if evidence else 0.0),
        inner_tol=None, on_failure="ignore", return_info=evidence,
    )  # fmt: skip
    return answer if isinstance(answer, Tensor) else answer[0]
