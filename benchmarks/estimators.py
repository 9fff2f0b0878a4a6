"""Error of every estimator against its time and memory: ``python -m benchmarks.estimators``.

Time is that of the processor on one thread, memory what is live in torch's allocator beyond what
was before; both in units of one gradient of the inner loss. Under two minutes.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from benchmarks.allocator import peak_bytes
from benchmarks.estimator_problems import Problem, penalties, rates, weights

PROBLEMS = (penalties, weights, rates)
LONG, ROUNDS = 0.2, 5  # seconds: what takes longer is timed once
FLOOR = 1e-12  # errors below are drawn there

Found = TypeVar("Found")


@dataclass(frozen=True)
class Point:
    """One estimate: its relative error, its direction, and its cost in gradients."""

    problem: str
    family: str
    setting: str
    error: float
    cosine: float
    time: float
    memory: float


def timed(call: Callable[[], Found]) -> tuple[Found, float]:
    """What a call returns and its processor time: that of one if it is long, else a median."""
    clock = time.process_time
    start = clock()
    found = call()
    once = clock() - start
    if once > LONG:
        return found, once
    repeats = math.ceil(LONG / ROUNDS / max(once, 1e-4))
    rounds = []
    for _ in range(ROUNDS):
        start = clock()
        for _ in range(repeats):
            call()
        rounds.append((clock() - start) / repeats)
    return found, statistics.median(rounds)


def measure(problem: Problem, *, quick: bool = False) -> list[Point]:
    """Every setting of every family; `quick`: the first of each."""
    problem.gradient()
    unit, size = timed(problem.gradient)[1], peak_bytes(problem.gradient)
    points = []
    for family, settings in problem.families.items():
        for name, run in list(settings.items())[: 1 if quick else None]:
            found, took = timed(run)
            error = float((found - problem.exact).norm() / problem.exact.norm())
            cosine = float(found @ problem.exact / (found.norm() * problem.exact.norm()))
            peak = peak_bytes(run) / size
            points.append(Point(problem.title, family, name, error, cosine, took / unit, peak))
    return points


def markdown(points: list[Point]) -> str:
    """A table, a problem after the other."""
    lines = []
    for title in dict.fromkeys(p.problem for p in points):
        lines += [
            f"\n**{title}**\n",
            "| estimator | setting | relative error | cosine | time | memory |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {p.family} | {p.setting} | {p.error:.0e} | {p.cosine:.2f} | {_short(p.time)} | "
            f"{_short(p.memory)} |"
            for p in points
            if p.problem == title
        ]
    return "\n".join(lines)


def _short(figure: float) -> str:
    return f"{figure:.0f}" if figure >= 10 else f"{figure:.1f}"


def draw(points: list[Point], path: Path) -> None:
    """Error against time above, against memory below; a column for each problem."""
    titles = list(dict.fromkeys(p.problem for p in points))
    families = list(dict.fromkeys(p.family for p in points))
    colours = {f: colormaps["tab20"](2 * i % 19) for i, f in enumerate(families)}
    markers = {f: "osD^v<>PX*hp8d"[i % 14] for i, f in enumerate(families)}
    figure = Figure(figsize=(4.6 * len(titles), 7.4), layout="constrained")
    grid = figure.subplots(2, len(titles), squeeze=False)
    for column, title in enumerate(titles):
        for row, cost in enumerate(("time", "memory")):
            axes = grid[row][column]
            for family in families:
                own = [p for p in points if p.problem == title and p.family == family]
                axes.plot(
                    [getattr(p, cost) for p in own],
                    [max(p.error, FLOOR) for p in own],
                    marker=markers[family],
                    color=colours[family],
                    markersize=6,
                    linewidth=1,
                )
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_yscale("log")
            axes.set_xlabel(f"{cost}, in gradients of the inner loss")
            if column == 0:
                axes.set_ylabel("relative error")
            axes.axhline(1, color="0.8", linewidth=1, zorder=0)
            axes.grid(color="0.93")
            if row == 0:
                axes.set_title(title, fontsize="medium")
    handles = [
        Line2D([], [], color=colours[f], marker=markers[f], linewidth=1, label=f) for f in families
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table and draw the picture."""
    parser = argparse.ArgumentParser(prog="benchmarks.estimators", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder")
    parser.add_argument("--quick", action="store_true", help="a smoke test in seconds")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    points: list[Point] = []
    for make in PROBLEMS[:1] if chosen.quick else PROBLEMS:
        points += measure(make(), quick=chosen.quick)
    chosen.out.mkdir(parents=True, exist_ok=True)
    table = markdown(points)
    print(table)
    draw(points, chosen.out / "estimators.png")


if __name__ == "__main__":
    main()
