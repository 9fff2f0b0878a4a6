"""Hypergradients of logistic regression, in gradients of its training loss."""

import functools
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks import logistic_sides, own_process
from benchmarks.logistic import LogisticRegression
from benchmarks.results import OURS, Row, Settings
from benchmarks.timing import in_units, seconds

ROWS = 2000
LOOP = 12  # steps of an outer loop, there and back
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def benchmarks() -> dict[str, Callable[[Settings], list[Row]]]:
    return {
        f"logistic-{features}-{dtype}": functools.partial(measure, features=features, dtype=dtype)
        for features in (500, 5000)
        for dtype in DTYPES
    }


@functools.cache
def drawn(rows: int, features: int) -> LogisticRegression:
    return LogisticRegression.draw(rows, features)


@functools.cache
def loop(rows: int, features: int) -> list[LogisticRegression]:
    """An outer loop that moves each penalty by about one per cent a step."""
    generator = torch.Generator().manual_seed(1)
    problems = [drawn(rows, features)]
    while len(problems) < LOOP:
        way = torch.randn(features, dtype=torch.float64, generator=generator)
        problems.append(problems[-1].moved(0.01 * way))
    return problems


def measure(settings: Settings, *, features: int, dtype: str) -> list[Row]:
    name = f"logistic-{features}-{dtype}"
    rows, features = (60, features // 20) if settings.quick else (ROWS, features)
    problem = drawn(rows, features).to(DTYPES[dtype])
    exact = problem.to(torch.float64).exact()
    sides = logistic_sides.sides(problem)
    along = loop(rows, features)
    recycled = logistic_sides.Recycled([
        # The data stay where they are, and in the cache as much as for the other sides.
        replace(problem, log_penalty=step.log_penalty.to(DTYPES[dtype]), w=step.w.to(DTYPES[dtype]))
        for step in along
    ])
    leaf = problem.w.detach().requires_grad_()

    def gradient() -> None:
        torch.autograd.grad(problem.inner(leaf, problem.log_penalty), leaf)

    slope = torch.autograd.grad(problem.inner(leaf, problem.log_penalty), leaf, create_graph=True)

    def product() -> None:
        torch.autograd.grad(slope, leaf, (problem.w,), retain_graph=True)

    timed = {"gradient": gradient, "one product": product, **sides}
    timed[logistic_sides.RECYCLED] = recycled
    taken = seconds(timed, rounds=settings.rounds, threads=settings.threads)
    found = in_units(taken, "gradient")
    row = functools.partial(
        Row,
        name,
        unit="gradients",
        rounds=settings.rounds,
        threads=settings.threads,
        unit_ms=1e3 * statistics.median(taken["gradient"]),
    )
    made = int(logistic_sides.with_info(problem)[1].matvecs)
    steps = logistic_sides.STEPS
    products = {
        OURS: made,
        logistic_sides.WITH_INFO: made,
        logistic_sides.COMPILED: made,
        "by hand, autograd": steps,
        "by hand, closed-form products": steps + 1,
        "torchopt, CG": steps,
        "torchopt as shipped, CG on the normal equations": 2 * steps + 2,
    }
    answer = [row("one product, by a replayed graph", figure=found["one product"], products=1)]
    for side, hypergradient in sides.items():
        error = ((hypergradient().double() - exact).norm() / exact.norm()).item()
        answer.append(row(side, figure=found[side], error=error, products=products.get(side)))
    error, fewer = _along(recycled, along)
    side, note = logistic_sides.RECYCLED, f"error and products: medians over {LOOP} steps"
    answer.append(row(side, figure=found[side], error=error, products=fewer, note=note))
    if settings.threads == 1 and own_process.has("jaxopt"):
        figures, said = own_process.measured(
            "benchmarks.logistic_jaxopt", rows, features, dtype, settings.rounds
        )
        for side, figure in figures.items():
            products = None if side == logistic_sides.JAXOPT_ALONG else steps
            answer.append(row(side, figure=figure, error=said["errors"][side], products=products))
    return answer


def _along(
    recycled: logistic_sides.Recycled, problems: list[LogisticRegression]
) -> tuple[float, int]:
    """The error and the products of a hypergradient once there and back: medians."""
    exact = [problem.exact() for problem in logistic_sides.there_and_back(problems)]
    errors, products = [], []
    for _ in exact:
        place, gradient, info = recycled.solved()
        error = (gradient.double() - exact[place]).norm() / exact[place].norm()
        errors.append(error.item())
        products.append(int(info.matvecs))
    return statistics.median(errors), round(statistics.median(products))
