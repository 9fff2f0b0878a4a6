"""Three ways to choose the decays: random search, Optuna's TPE, and hypergradients."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import hypergrad
from benchmarks.worth_it_problems import HIGH, LOW, MIDDLE, Problem

SOLVER = hypergrad.inner_solvers.NewtonCG()  # of the inner problem, for all three
RATE = 0.3  # of Adam, on the logarithms of the decays

#: The log decays, the inner solution there, and the validation loss of it.
Point = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class Best:
    """The point of least validation loss so far, and the processor seconds to it."""

    seconds: float
    log_decay: Tensor
    validation: float
    test: float


@dataclass(frozen=True)
class Search:
    """What one search came to: each point that was better than all before, and how many there were.

    `seconds` are those of all points that ended within the budget.
    """

    bests: list[Best]
    points: int
    seconds: float


def random_search(problem: Problem, seed: int) -> Iterator[Point]:
    """The start, and then points that are drawn log-uniformly."""
    generator = torch.Generator().manual_seed(seed)
    log_decay = problem.start
    while True:
        yield solved(problem, log_decay)
        draws = torch.rand(problem.count, generator=generator, dtype=torch.float64)
        log_decay = LOW + (HIGH - LOW) * draws


def tpe(problem: Problem, seed: int) -> Iterator[Point]:
    """The start, and then points that Optuna's TPE suggests at its defaults."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    names = [f"log_decay_{i}" for i in range(problem.count)]
    study.enqueue_trial(dict.fromkeys(names, MIDDLE))
    while True:
        trial = study.ask()
        values = [trial.suggest_float(name, LOW, HIGH) for name in names]
        point = solved(problem, torch.tensor(values, dtype=torch.float64))
        study.tell(trial, point[-1])
        yield point


def hypergradients(problem: Problem, seed: int) -> Iterator[Point]:
    """The start, and then steps of Adam along the gradient of the validation loss."""
    fit = hypergrad.argmin(problem.inner, solver=SOLVER)
    log_decay = problem.start.requires_grad_()
    optimizer = torch.optim.Adam([log_decay], lr=RATE)
    w = problem.zeros
    while True:
        w = fit(w.detach(), log_decay)
        value = problem.validation(w, log_decay)
        yield log_decay.detach().clone(), w.detach(), value.item()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        with torch.no_grad():
            log_decay.clamp_(LOW, HIGH)


def solved(problem: Problem, log_decay: Tensor) -> Point:
    """Solve the inner problem from zero, and evaluate the validation loss."""
    w, _ = SOLVER(problem.inner, problem.zeros, log_decay)
    return log_decay, w, problem.validation(w, log_decay).item()


METHODS: dict[str, Callable[[Problem, int], Iterator[Point]]] = {
    "random search": random_search,
    "TPE": tpe,
    "hypergradients": hypergradients,
}


def search(problem: Problem, method: str, seed: int, seconds: float) -> Search:
    """Search for some seconds of the processor's.

    The point at which they run out is thrown away. Test losses are evaluated afterwards, and are
    not on the account.
    """
    points = METHODS[method](problem, seed)
    kept: list[tuple[float, Point]] = []
    least, count, spent = math.inf, 0, 0.0
    gc.collect()
    begin = time.process_time()
    for point in points:
        now = time.process_time() - begin
        if now > seconds:
            break
        count, spent = count + 1, now
        if point[-1] < least:
            least = point[-1]
            kept.append((now, point))
    if not kept:
        raise ValueError(f"{method}: not one point within {seconds:g} processor seconds.")
    bests = [
        Best(now, log_decay, value, problem.test(w, log_decay).item())
        for now, (log_decay, w, value) in kept
    ]
    return Search(bests, count, spent)
