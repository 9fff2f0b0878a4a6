"""The outer problem against time: every method of `Bilevel`, and torchopt's plain alternation.

    python -m benchmarks.bilevel --out docs/pictures

prints a table and draws the picture of the page on the loop for the outer problem.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bilevel_problems import Problem, every
from benchmarks.bilevel_sides import RATES, SIDES, TORCHOPT, run

POINTS = 12  # of a curve
TARGETS = (0.1, 0.01)  # of the gap between the start and the least value

Curve = list[tuple[float, float]]  # processor seconds and the outer loss at the inner minimiser


def main(argv: Sequence[str] | None = None) -> None:
    """Run every side on every problem, print the table, write the figures and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="of each run (default 1.5)")
    parser.add_argument("--out", type=Path, default=Path("runs/bilevel"))
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    # torchopt calls torch.func by its old name.
    warnings.filterwarnings("ignore", message="We've integrated functorch", category=FutureWarning)
    found: dict[str, dict[str, Any]] = {}
    for problem in every():
        found[problem.name] = measured(problem, chosen.seconds)
        print(table(problem.name, found[problem.name]), flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    picture(found, chosen.out / "bilevel.png")
    (Path("runs") / "bilevel").mkdir(parents=True, exist_ok=True)
    Path("runs/bilevel/curves.json").write_text(json.dumps(found, indent=1))


def measured(problem: Problem, seconds: float) -> dict[str, Any]:
    """The curves of all sides, the least value, and the true gradient at the start and there."""
    curves, ends = {}, {}
    for side in SIDES:
        curves[side], ends[side] = curve(problem, side, seconds)
    best = min(curves, key=lambda side: curves[side][-1][1])
    lowest = min(value for points in curves.values() for _, value in points)
    exact = problem.least()
    return {
        "curves": curves,
        "least": lowest if math.isnan(exact) else exact,
        "known": not math.isnan(exact),
        "best": best,
        "gradient at the start": problem.hypergradient(problem.hparams).norm().item(),
        "gradient at the end": problem.hypergradient(ends[best]).norm().item(),
    }


def curve(problem: Problem, side: str, seconds: float) -> tuple[Curve, torch.Tensor]:
    """What a side reaches after how many seconds of the processor's, and where it ends."""
    step = run(problem.to(torch.float32), side, RATES[problem.name])
    marks = [seconds * 0.02 * 50 ** (i / (POINTS - 2)) for i in range(POINTS - 1)]
    kept, spent = [(0.0, problem.hparams.clone())], 0.0
    for mark in marks:
        begin = time.process_time()
        while spent + time.process_time() - begin < mark:
            hparams = step()
        spent += time.process_time() - begin
        kept.append((spent, hparams.clone()))
    # The value needs the inner problem solved, which is not on the side's account.
    points = [(t, problem.value(h)) for t, h in kept]
    return points, kept[-1][1]


def reached(points: Curve, target: float) -> float:
    """The seconds at which a curve comes to a value, between its points; infinite if never."""
    for (t0, v0), (t1, v1) in itertools.pairwise(points):
        if v1 <= target:
            return t0 + (t1 - t0) * (v0 - target) / max(v0 - v1, 1e-300)
    return math.inf


def targets(figures: dict[str, Any]) -> list[float]:
    """The values that a run is timed to."""
    start = figures["curves"][SIDES[0]][0][1]
    return [figures["least"] + share * (start - figures["least"]) for share in TARGETS]


def table(name: str, figures: dict[str, Any]) -> str:
    """Seconds to each target, and the gap that is left at the end, for every side."""
    start, least = figures["curves"][SIDES[0]][0][1], figures["least"]
    shares = " | ".join(f"seconds to {share:.0%} of the gap" for share in TARGETS)
    lines = [
        f"{name}: outer loss {start:.4f} at the start, "
        f"{'optimum' if figures['known'] else 'least seen'} {least:.4f}; true gradient "
        f"{figures['gradient at the start']:.1e} at the start, "
        f"{figures['gradient at the end']:.1e} at the end of {figures['best']}",
        f"| side | {shares} | gap at the end |",
        f"| --- |{' --- |' * (len(TARGETS) + 1)}",
    ]
    for side, points in figures["curves"].items():
        times = [_seconds(reached(points, target)) for target in targets(figures)]
        gap = (points[-1][1] - least) / (start - least)
        lines.append(f"| {side} | {' | '.join(times)} | {_share(gap)} |")
    for share, target in zip(TARGETS, targets(figures), strict=True):
        ours = {s: reached(p, target) for s, p in figures["curves"].items() if s not in TORCHOPT}
        theirs = {s: reached(p, target) for s, p in figures["curves"].items() if s in TORCHOPT}
        a, b = min(ours, key=lambda s: ours[s]), min(theirs, key=lambda s: theirs[s])
        lines.append(
            f"To {share:.0%}: {a} {_seconds(ours[a])} s, {b} {_seconds(theirs[b])} s, ratio "
            f"{theirs[b] / ours[a]:.2f}"
        )
    return "\n".join(lines) + "\n"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "never"


def _share(gap: float) -> str:
    return f"{gap:.1%}" if gap < 10 else "diverged"


def picture(found: dict[str, dict[str, Any]], path: Path) -> None:
    """The gap to the least value against time, a panel for each problem."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(3.6 * len(found), 4.4), sharey=True)
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    own = [side for side in SIDES if side not in TORCHOPT]
    for panel, (name, figures) in zip(axes, found.items(), strict=True):
        start, least = figures["curves"][SIDES[0]][0][1], figures["least"]
        for side, points in figures["curves"].items():
            gaps = [max((v - least) / (start - least), 3e-4) for _, v in points]
            style: dict[str, Any] = (
                {"color": "0.25", "ls": ["-", "--", ":"][list(TORCHOPT).index(side)], "lw": 1.8}
                if side in TORCHOPT
                else {"color": colours[own.index(side) % 10], "lw": 1.3, "marker": ".", "ms": 4}
            )
            panel.plot([max(t, 1e-2) for t, _ in points], gaps, label=side, **style)
        panel.set(xscale="log", yscale="log", ylim=(3e-4, 3), xlim=(2e-2, None), title=name)
        panel.set_xlabel("processor seconds")
        panel.grid(alpha=0.2)
    axes[0].set_ylabel("gap to the least outer loss, 1 at the start")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, fontsize="small", frameon=False)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
