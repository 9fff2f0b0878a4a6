"""What both sides of `benchmarks.bilevel_peers` run: problems, methods, rates, and the clock."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.bilevel_problems import Problem, breast_cancer, cleaning, quadratic

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "quadratic": quadratic,
    "cleaning": cleaning,
    "penalties": breast_cancer,
}
# The parameters of the methods, the same on both sides.
DECAYS, THETA, ETA = (0.1, 0.2), 0.3, 0.3
STEPS, TERMS = 3, 5
PENALTY, GROWTH = 2.0, 0.2
WHOLE = ("SOBA, whole data", "AmIGO, whole data")
METHODS = ("SOBA", "MASOBA", "SABA", "SRBA", "FSLA", "AmIGO", "StocBiO", "F2SA", *WHOLE)
EPOCH = {False: 32, True: 8}  # steps between two looks at the clock, on batches and on whole data
POINTS = 24  # of a curve

Curve = list[tuple[float, float]]  # processor seconds and the outer loss at the inner minimiser


@dataclass(frozen=True)
class Rates:
    """The learning rates of one run."""

    inner: float
    outer: float


#: The inner rate on batches and on whole data, and the outer ones that are tried.
RATES: dict[str, dict[bool, tuple[float, tuple[float, ...]]]] = {
    "quadratic": {False: (0.1, (0.03, 0.1, 0.3)), True: (1.4, (0.3, 1.0, 3.0))},
    "cleaning": {False: (0.4, (100.0, 300.0, 1000.0)), True: (0.7, (100.0, 300.0, 1000.0))},
    "penalties": {False: (0.4, (50.0, 150.0, 500.0)), True: (0.7, (150.0, 500.0, 1500.0))},
}


def runs(name: str) -> list[tuple[str, Rates]]:
    """Every method with every rate."""
    found = []
    for method in METHODS:
        inner, outer = RATES[name][method in WHOLE]
        found += [(method, Rates(inner, rate)) for rate in outer]
    return found


def curve(
    problem: Problem,
    advance: Callable[[], Any],
    seconds: float,
    tensor: Callable[[Any], Tensor],
) -> Curve:
    """Run for some seconds of the processor, and evaluate the outer loss afterwards.

    `advance` makes the steps of an epoch and returns the hyperparameters; `tensor` turns them into
    a tensor.
    """
    kept: list[tuple[float, Any]] = []
    begin = time.process_time()
    while not kept or kept[-1][0] < seconds:
        hparams = advance()
        kept.append((time.process_time() - begin, hparams))
    marks = [seconds * 0.003 ** (1 - i / (POINTS - 1)) for i in range(POINTS)]
    chosen = [next((p for p in kept if p[0] >= mark), kept[-1]) for mark in marks]
    chosen = [next(same) for _, same in itertools.groupby(chosen, key=lambda point: point[0])]
    values = [(t, problem.value(tensor(hparams))) for t, hparams in chosen]
    return [(0.0, problem.value(problem.hparams)), *values]


def reached(points: Curve, target: float) -> float:
    """The seconds at which a curve comes to a value, between its points; infinite if never."""
    for (t0, v0), (t1, v1) in itertools.pairwise(points):
        if v1 <= target:
            return t0 + (t1 - t0) * (v0 - target) / max(v0 - v1, 1e-300)
    return math.inf
