"""The table and the picture of the page 'Is it worth it?', made of the stored figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

COLOURS = {"random search": "tab:blue", "TPE": "tab:green", "hypergradients": "tab:orange"}
TITLES = {
    "breast_cancer": "breast cancer",
    "diabetes": "diabetes",
    "digits": "digits, even or odd",
}
LOSSES = {
    "breast_cancer": "cross-entropy, nats",
    "diabetes": "squared error, variances",
    "digits": "cross-entropy, nats",
}
CLEAR = 0.01  # a lead of less than this share is no win

Run = dict[str, Any]


def compared(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures without the splits that not every method has been run on."""
    methods: dict[tuple[int, int], set[str]] = {}
    for run in figures["runs"]:
        methods.setdefault((run["count"], run["seed"]), set()).add(run["method"])
    runs = [run for run in figures["runs"] if methods[run["count"], run["seed"]] == set(COLOURS)]
    return {**figures, "runs": runs}


def table(stored: Sequence[dict[str, Any]]) -> str:
    """Losses at the end of the budget, a row for each data set and number of decays."""
    splits = len({run["seed"] for run in stored[0]["runs"]})
    lines = [
        f"Means of {splits} splits, {stored[0]['seconds']:g} processor seconds a run.\n",
        f"| data | decays | {' | '.join(COLOURS)} | lowest validation loss |",
        f"| --- | --- |{' --- |' * (len(COLOURS) + 1)}",
    ]
    for figures in stored:
        for count in counts(figures):
            cells = [cell(runs_of(figures, count, method)) for method in COLOURS]
            lines.append(
                f"| {TITLES[figures['data']]} | {count:,} | {' | '.join(cells)} | "
                f"{winners(figures, count)} |"
            )
    return "\n".join(lines) + "\n"


def cell(runs: Sequence[Run]) -> str:
    """The means over the splits of validation loss and test loss, and the median of the points."""
    validation, test = (statistics.mean(run["curve"][-1][i] for run in runs) for i in (1, 2))
    points = statistics.median(run["points"] for run in runs)
    return f"{validation:.3f} / {test:.3f} ({points:.0f})"


def winners(figures: dict[str, Any], count: int) -> str:
    """Who ends lowest on how many splits, by a hundredth at least; the others are ties."""
    by_seed: dict[int, dict[str, float]] = {}
    for run in figures["runs"]:
        if run["count"] == count:
            by_seed.setdefault(run["seed"], {})[run["method"]] = run["curve"][-1][1]
    wins = dict.fromkeys([*COLOURS, "tie"], 0)
    for ends in by_seed.values():
        first, second = sorted(ends, key=ends.__getitem__)[:2]
        clear = ends[first] < (1 - CLEAR) * ends[second]
        wins[first if clear else "tie"] += 1
    return ", ".join(f"{name} {wins[name]}" for name in wins if wins[name])


def counts(figures: dict[str, Any]) -> list[int]:
    """The numbers of decays that were measured."""
    return sorted({run["count"] for run in figures["runs"]})


def runs_of(figures: dict[str, Any], count: int, method: str) -> list[Run]:
    """The runs of one method with one number of decays, a split each."""
    return [r for r in figures["runs"] if r["count"] == count and r["method"] == method]


def at(curve: Sequence[Sequence[float]], times: np.ndarray) -> np.ndarray:
    """The least validation loss up to each time; NaN before the first point."""
    seconds, values = (np.array([point[i] for point in curve]) for i in (0, 1))
    places = np.searchsorted(seconds, times, side="right") - 1
    return np.where(places >= 0, values[places.clip(0)], np.nan)


def picture(stored: Sequence[dict[str, Any]], path: Path) -> None:
    """A row of panels a data set, a column a number of decays."""
    columns = max(len(counts(figures)) for figures in stored)
    figure = Figure(figsize=(9.6, 2.4 * len(stored) + 1.1), layout="constrained")
    panels = figure.subplots(len(stored), columns, sharex=True, sharey="row", squeeze=False)
    for row, figures in zip(panels, stored, strict=True):
        for axes, count in zip(row, counts(figures), strict=True):
            for method, colour in COLOURS.items():
                _draw(axes, runs_of(figures, count, method), figures["seconds"], colour)
            axes.grid(alpha=0.25)
        row[0].set_yscale("log")
        low, high = row[0].get_ylim()
        narrow = high < 4 * low
        row[0].yaxis.set_major_locator(LogLocator(subs=range(1, 10) if narrow else (1, 2, 5)))
        row[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        row[0].yaxis.set_minor_formatter(NullFormatter())
        row[0].set_ylabel(f"{TITLES[figures['data']]}\n{LOSSES[figures['data']]}")
    for axes, count in zip(panels[0], counts(stored[0]), strict=True):
        axes.set_title(f"{count:,} hyperparameter{'s' if count > 1 else ''}", fontsize=10.5)
    for axes in panels[-1]:
        axes.set_xlabel("processor seconds")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    seeds = len({run["seed"] for run in stored[0]["runs"]})
    figure.suptitle(
        f"Least validation loss so far: {stored[0]['seconds']:g} processor seconds a run, "
        f"median and range of {seeds} splits",
        fontsize=11.5,
    )
    handles = [Line2D([], [], color=colour, label=name, lw=2) for name, colour in COLOURS.items()]
    circle = {"marker": "o", "mfc": "white", "color": "0.3", "ls": "none"}
    handles.append(Line2D([], [], label="test loss at the end (median)", **circle))  # type: ignore[arg-type]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def _draw(axes: Any, runs: Sequence[Run], seconds: float, colour: str) -> None:
    """One method in one panel."""
    times = np.geomspace(seconds / 100, seconds, 200)
    curves = np.array([at(run["curve"], times) for run in runs])
    known = np.isfinite(curves).all(axis=0)
    times, curves = times[known], curves[:, known]
    axes.plot(times, np.median(curves, axis=0), color=colour, lw=2)
    axes.fill_between(times, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.15, lw=0)
    test = statistics.median(run["curve"][-1][2] for run in runs)
    beside = seconds * 1.3 ** (1 + list(COLOURS.values()).index(colour))  # circles hide none
    axes.plot([beside], [test], "o", mfc="white", color=colour)
    axes.set_xscale("log")
