"""`Bilevel.step` against the same loop by hand: ``python -m benchmarks.bilevel_overhead``.

SOBA on batches of three problems, with the same optimisers, batches and learning rates. By hand it
is what one would write in PyTorch without the library: no check of anything, no record of a step.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import hypergrad
from benchmarks.bilevel_problems import Batch, Problem, breast_cancer, cleaning, quadratic
from benchmarks.timing import Quartiles, ratios

PROBLEMS = {"quadratic": quadratic, "cleaning": cleaning, "penalties": breast_cancer}
RATE = 0.1  # of everything: the time of a step is measured, not where it leads
STEPS = 10  # that are timed together


def main(argv: Sequence[str] | None = None) -> None:
    """Print the time of a step in units of one by hand, for each problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="interleaved (default 40)")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in PROBLEMS:
        figures = measured(name, chosen.rounds)
        print(f"| {name} | {figures['library']} | {figures['compiled']} |", flush=True)


def measured(name: str, rounds: int) -> dict[str, Quartiles]:
    """The time of `Bilevel.step`, also compiled, over that of a step by hand."""
    problem = PROBLEMS[name]().to(torch.float32)
    compiled = hypergrad.compile(library(problem).step)
    sides = {
        "library": _several(library(problem).step),
        "compiled": _several(compiled),
        "by hand": _several(by_hand(problem)),
    }
    return ratios(sides, "by hand", rounds=rounds)


def _several(step: Callable[[], object]) -> Callable[[], object]:
    def steps() -> None:
        for _ in range(STEPS):
            step()

    return steps


def library(problem: Problem) -> hypergrad.Bilevel:
    """SOBA of the library."""
    return hypergrad.Bilevel(
        problem.outer,
        problem.inner,
        problem.params,
        problem.hparams,
        inner_optimizer=functools.partial(torch.optim.SGD, lr=RATE),
        outer_optimizer=functools.partial(torch.optim.SGD, lr=RATE),
        method=hypergrad.SOBA(inner_decay=0.0, outer_decay=0.0),
        inner_batches=problem.batches("inner"),
        outer_batches=problem.batches("outer"),
    )


def by_hand(problem: Problem) -> Callable[[], Tensor]:
    """The same steps, written out; each returns the outer loss before it."""
    w = problem.params.clone().requires_grad_()
    h = problem.hparams.clone().requires_grad_()
    u = torch.zeros_like(w)
    inner, outer = torch.optim.SGD([w], lr=RATE), torch.optim.SGD([h], lr=RATE)
    train, validation = drawn(problem.batches("inner")), drawn(problem.batches("outer"))

    def step() -> Tensor:
        nonlocal u
        value = problem.inner(w, h, next(train))
        (gradient,) = torch.autograd.grad(value, w, create_graph=True)
        product, cross = torch.autograd.grad(gradient, (w, h), u)
        loss = problem.outer(w, h, next(validation))
        by_w, by_h = torch.autograd.grad(loss, (w, h), allow_unused=True)
        w.grad = gradient.detach()
        h.grad = -cross if by_h is None else by_h - cross
        u = u - RATE * (product - by_w)
        inner.step()
        outer.step()
        return loss.detach()

    return step


def drawn(batches: Sequence[Batch], seed: int = 0) -> Iterator[Batch]:
    """Batches at random, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield batches[int(torch.randint(len(batches), (), generator=generator))]


if __name__ == "__main__":
    main()
