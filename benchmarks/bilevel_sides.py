"""Who runs the outer problem: the methods of `Bilevel`, and plain alternation with torchopt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torchopt
from torch import Tensor

import hypergrad
from benchmarks.bilevel_problems import Batch, Problem

# Plain alternation with torchopt: inner steps, CG steps, and whether on batches.
TORCHOPT = {
    "torchopt, 10 + 10": (10, 10, False),
    "torchopt, 3 + 3": (3, 3, False),
    "torchopt, 10 + 10, batches": (10, 10, True),
}

#: Makes one outer step at each call, and returns the hyperparameters.
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Rates:
    """Learning rates for one problem: the same inner ones for all, tuned outer ones."""

    inner: float
    noisy: float  # the inner rate on batches
    outer: dict[str, float]
    adam: bool = False

    def optimiser(self, side: str) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
        """The outer optimiser of a side."""
        kind = torch.optim.Adam if self.adam else torch.optim.SGD
        return functools.partial(kind, lr=self.outer[side])


METHODS: dict[str, tuple[bool, Any]] = {
    "Alternating, 10 + 10": (
        False,
        hypergrad.Alternating(10, solver=hypergrad.CG(maxiter=10), inner_tol=None),
    ),
    "Alternating, 3 + 3": (
        False,
        hypergrad.Alternating(3, solver=hypergrad.CG(maxiter=3), inner_tol=None),
    ),
    "SOBA, whole data": (False, hypergrad.SOBA(inner_decay=0.0, outer_decay=0.0)),
    "HOAG, L-BFGS inside": (False, hypergrad.HOAG(solver=hypergrad.CG())),
    "SOBA": (True, hypergrad.SOBA(inner_decay=0.1, outer_decay=0.2)),
    "MASOBA": (True, hypergrad.MASOBA(theta=0.3)),
    "SABA": (True, hypergrad.SABA()),
    "AmIGO": (True, hypergrad.AmIGO(inner_steps=3, linear_steps=3)),
    "StocBiO": (True, hypergrad.StocBiO(inner_steps=3, terms=5)),
    "F2SA": (True, hypergrad.F2SA(2.0, 0.2, inner_steps=3, inner_decay=0.0, outer_decay=0.2)),
}
SIDES = [*TORCHOPT, *METHODS]


def _rates(whole: float, batches: float, **others: float) -> dict[str, float]:
    """One outer rate for what sees whole data, one for what sees batches, and exceptions."""
    on_batches = {
        **{side: b for side, (*_, b) in TORCHOPT.items()},
        **{s: b for s, (b, _) in METHODS.items()},
    }
    return {side: others.get(side, batches if on_batches[side] else whole) for side in SIDES}


#: Tuned by hand, to the largest rates that go well.
RATES = {
    "simulated quadratic": Rates(1.4, 0.1, _rates(1.0, 0.05, SABA=0.3, MASOBA=0.03, F2SA=0.02)),
    "breast cancer, penalties": Rates(0.7, 0.4, _rates(100.0, 50.0)),
    "digits, penalties": Rates(0.7, 0.4, _rates(100.0, 30.0, **{"SOBA, whole data": 50.0})),
    "digits, half of the labels wrong": Rates(0.7, 0.4, _rates(0.2, 0.2), adam=True),
}


def run(problem: Problem, side: str, rates: Rates) -> Run:
    """A side at the start of its run."""
    if side in TORCHOPT:
        return _by_torchopt(problem, side, rates)
    on_batches, method = METHODS[side]
    inner: Any = functools.partial(torch.optim.SGD, lr=rates.noisy if on_batches else rates.inner)
    if isinstance(method, hypergrad.HOAG):
        inner = functools.partial(torch.optim.LBFGS, max_iter=5, line_search_fn="strong_wolfe")
    loop = hypergrad.Bilevel(
        problem.outer,
        problem.inner,
        problem.params,
        problem.hparams,
        inner_optimizer=inner,
        outer_optimizer=rates.optimiser(side),
        method=method,
        inner_batches=problem.batches("inner") if on_batches else [problem.train],
        outer_batches=problem.batches("outer") if on_batches else [problem.validation],
        on_failure="ignore",
    )

    def step() -> Tensor:
        loop.step()
        found: Tensor = loop.hparams
        return found

    return step


def _by_torchopt(problem: Problem, side: str, rates: Rates) -> Run:
    """Some inner steps, an implicit hypergradient by as many of CG, one outer step."""
    inner_steps, linear_steps, on_batches = TORCHOPT[side]
    w = problem.params.clone().requires_grad_()
    h = problem.hparams.clone().requires_grad_()
    inner = torch.optim.SGD([w], lr=rates.noisy if on_batches else rates.inner)
    outer = rates.optimiser(side)([h])
    solve = torchopt.linear_solve.solve_cg(maxiter=linear_steps)
    train = _batches(problem, "inner", on_batches)
    validation = _batches(problem, "outer", on_batches)

    def step() -> Tensor:
        for _ in range(inner_steps):
            batch = next(train)
            inner.zero_grad()
            problem.inner(w, h.detach(), batch).backward()
            inner.step()
        batch = next(train)
        slope = torch.func.grad(lambda w, h: problem.inner(w, h, batch))
        root = torchopt.diff.implicit.custom_root(slope, argnums=1, solve=solve)
        solution = root(lambda w, h: w)(w.detach(), h)
        value = problem.outer(solution, h, next(validation))
        (h.grad,) = torch.autograd.grad(value, h)
        outer.step()
        return h.detach()

    return step


def _batches(problem: Problem, level: str, on_batches: bool) -> Iterator[Batch]:
    """Whole data sets, or batches drawn at random, again and again."""
    whole = problem.train if level == "inner" else problem.validation
    batches = problem.batches(level) if on_batches else [whole]
    generator = torch.Generator().manual_seed(0)
    while True:
        yield batches[int(torch.randint(len(batches), (), generator=generator))]
