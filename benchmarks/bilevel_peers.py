"""The loops of `Bilevel` beside compiled ones in jax: ``python -m benchmarks.bilevel_peers``.

Every stochastic method on both sides, as benchmark_bilevel runs its own: on the simulated
quadratic, on the cleaning of digits and on a penalty for each feature of a logistic regression.
The time is that of the processor to a tenth of the gap between the start and the least value that
any run has seen, for the best of a small grid of outer learning rates. jax must be installed.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hypergrad
from benchmarks import bilevel_grid as grid
from benchmarks.bilevel_problems import Problem

METHODS: dict[str, Any] = {
    "SOBA": hypergrad.SOBA(None, *grid.DECAYS),
    "MASOBA": hypergrad.MASOBA(grid.THETA),
    "SABA": hypergrad.SABA(),
    "SRBA": hypergrad.SRBA(),
    "FSLA": hypergrad.FSLA(grid.ETA, None, *grid.DECAYS),
    "AmIGO": hypergrad.AmIGO(grid.STEPS, grid.STEPS),
    "StocBiO": hypergrad.StocBiO(grid.STEPS, grid.TERMS),
    "F2SA": hypergrad.F2SA(
        grid.PENALTY, grid.GROWTH, grid.STEPS, inner_decay=0.0, outer_decay=grid.GROWTH
    ),
    "SOBA, whole data": hypergrad.SOBA(inner_decay=0.0, outer_decay=0.0),
    "AmIGO, whole data": hypergrad.AmIGO(grid.STEPS, grid.STEPS),
}
SHARE = 0.1  # of the gap, to which a run is timed
_WARM = 3  # steps in which the others are compiled
Runs = list[tuple[str, float, grid.Curve]]  # method, outer rate, curve


def main(argv: Sequence[str] | None = None) -> None:
    """Run both sides, and print two tables for each problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run of ours")
    parser.add_argument("--jax-seconds", type=float, default=0.5, help="of each run in jax")
    parser.add_argument("--problems", nargs="*", default=[*grid.PROBLEMS])
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has jax")
    parser.add_argument("--compile", action="store_true", help="compile our steps, before the time")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in chosen.problems:
        theirs = by_jax(chosen.python, name, chosen.jax_seconds)
        ours = by_library(name, chosen.seconds, compiled=chosen.compile)
        print(table(name, ours, theirs), flush=True)


def by_jax(python: str, name: str, seconds: float) -> Runs:
    """The runs in jax, in a process of their own."""
    call = [python, "-m", "benchmarks.bilevel_jax", str(seconds), name]
    done = subprocess.run(call, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: Runs = json.loads(done.stdout.splitlines()[-1])[name]
    return found


def by_library(name: str, seconds: float, *, compiled: bool = False) -> Runs:
    """The runs of `Bilevel`."""
    problem = grid.PROBLEMS[name]()
    runs = []
    for side, rates in grid.runs(name):
        advance = epochs(problem, side, rates, compiled=compiled)
        runs.append((side, rates.outer, grid.curve(problem, advance, seconds, torch.clone)))
    return runs


def epochs(
    problem: Problem, side: str, rates: grid.Rates, *, compiled: bool = False
) -> Callable[[], Tensor]:
    """A run: each call makes an epoch of steps and returns the hyperparameters."""
    whole = side in grid.WHOLE
    single = problem.to(torch.float32)
    loop = hypergrad.Bilevel(
        single.outer,
        single.inner,
        single.params,
        single.hparams,
        inner_optimizer=functools.partial(torch.optim.SGD, lr=rates.inner),
        outer_optimizer=functools.partial(torch.optim.SGD, lr=rates.outer),
        method=METHODS[side],
        inner_batches=[single.train] if whole else single.batches("inner"),
        outer_batches=[single.validation] if whole else single.batches("outer"),
        on_failure="ignore",  # a rate of the grid may be too large
    )
    step = hypergrad.compile(loop.step) if compiled else loop.step
    if compiled:
        start = loop.state_dict()
        for _ in range(_WARM):
            step()
        loop.load_state_dict(start)

    def advance() -> Tensor:
        for _ in range(grid.EPOCH[whole]):
            step()
        return torch.clone(loop.hparams)

    return advance


def best(runs: Runs, target: float) -> dict[str, tuple[float, float]]:
    """For each method the least seconds to the target, and the rate."""
    found: dict[str, tuple[float, float]] = {}
    for side, rate, points in runs:
        time = grid.reached(points, target)
        if side not in found or time < found[side][0]:
            found[side] = time, rate
    return found


def table(name: str, ours: Runs, theirs: Runs) -> str:
    """Seconds to the target of every method on both sides, and of the best of each."""
    start = ours[0][2][0][1]
    least = min(v for runs in (ours, theirs) for *_, points in runs for _, v in points)
    target = least + SHARE * (start - least)
    a, b = best(ours, target), best(theirs, target)
    lines = [
        f"{name}: outer loss {start:.4f} at the start, least seen {least:.4f}",
        "| method | hypergrad (rate) | jax (rate) | ratio |",
        "| --- | --- | --- | --- |",
    ]
    lines += [_row(side, a[side], b[side]) for side in grid.METHODS]
    first, second = min(a, key=lambda side: a[side][0]), min(b, key=lambda side: b[side][0])
    lines.append(_row(f"best: {first}, {second}", a[first], b[second]))
    return "\n".join(lines) + "\n"


def _row(side: str, a: tuple[float, float], b: tuple[float, float]) -> str:
    ratio = f"{a[0] / b[0]:.1f}" if math.isfinite(a[0] + b[0]) else ""
    return f"| {side} | {_cell(*a)} | {_cell(*b)} | {ratio} |"


def _cell(seconds: float, rate: float) -> str:
    return f"{seconds:.4f} ({rate:g})" if math.isfinite(seconds) else "never"


if __name__ == "__main__":
    main()
