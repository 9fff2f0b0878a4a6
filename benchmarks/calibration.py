"""How good ``info.error_estimate`` is: estimates against true errors on 2,000 random problems.

    python -m benchmarks.calibration --out docs/pictures

prints a table and draws the picture of the page on reliability.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibration_problems import draw

Row = dict[str, str | int | float]


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the problems, print the table, write the rows and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first problem")
    parser.add_argument("--out", type=Path, default=Path("runs/calibration"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [measured(seed) for seed in range(options.seed, options.seed + options.problems)]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "calibration.json").write_text(json.dumps(rows), encoding="utf-8")
    print(table(rows))
    picture(rows, options.out / "calibration.png")


def measured(seed: int, largest: int = 500) -> Row:
    """The true error and the estimate of one problem, with what it is."""
    problem = draw(seed, largest)
    error, estimate = problem.judged()
    return {**problem.kinds, "error": error, "estimate": estimate, "known to": problem.uncertainty}


def covered(row: Row) -> bool:
    """Whether the estimate is at least the true error, as far as that is known."""
    return float(row["estimate"]) >= float(row["error"]) - float(row["known to"])


def excess(row: Row) -> float:
    """The estimate over the true error, or over what the error is known to."""
    return float(row["estimate"]) / max(float(row["error"]), float(row["known to"]))


def close(row: Row) -> bool:
    """Whether the estimate is within a factor of 30."""
    return 1 / 30 <= excess(row) <= 30


def table(rows: Sequence[Row]) -> str:
    """The two percentages, for all problems and for the parts that they can be taken apart into."""
    lines = [
        "| problems | how many | at least the true error | within a factor of 30 | median factor |",
        "| --- | --- | --- | --- | --- |",
        _line("all", rows),
    ]
    for key in ("inner", "hparams", "outer", "stopped", "solver"):
        for value in sorted({str(row[key]) for row in rows}):
            lines.append(_line(f"{key}: {value}", [r for r in rows if r[key] == value]))
    for low in (0, 2, 4):
        part = [r for r in rows if 10**low <= float(r["condition"]) < 10 ** (low + 2)]
        lines.append(_line(f"condition number 1e{low} to 1e{low + 2}", part))
    return "\n".join(lines)


def _line(name: str, rows: Sequence[Row]) -> str:
    if not rows:
        return f"| {name} | 0 | | | |"
    factors = sorted(excess(row) for row in rows)
    return (
        f"| {name} | {len(rows)} | {_share(covered, rows)} | {_share(close, rows)} "
        f"| {factors[len(factors) // 2]:.1f} |"
    )


def _share(holds: Callable[[Row], bool], rows: Iterable[Row]) -> str:
    found = [holds(row) for row in rows]
    return f"{100 * sum(found) / len(found):.1f}%"


def picture(rows: Sequence[Row], path: Path) -> None:
    """Estimates against true errors, one dot a problem."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5.2), layout="constrained")
    for kind, colour in (("quadratic", "tab:blue"), ("logistic", "tab:orange")):
        part = [r for r in rows if r["inner"] == kind and math.isfinite(float(r["estimate"]))]
        errors = [max(float(r["error"]), float(r["known to"])) for r in part]
        estimates = [float(r["estimate"]) for r in part]
        axes.plot(errors, estimates, ".", color=colour, alpha=0.4, markersize=4, label=kind)
    ends = [1e-14, 1e3]
    draw_band(axes, ends)
    axes.set(xscale="log", yscale="log", xlim=(1e-14, 1e3), ylim=(1e-14, 1e2))
    axes.set_xlabel("true relative error of the hypergradient")
    axes.set_ylabel("info.error_estimate")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def draw_band(axes: Any, ends: Sequence[float]) -> None:
    """Draw where an estimate is within a factor of 30 of the true error."""
    axes.fill_between(
        ends,
        [e / 30 for e in ends],
        [e * 30 for e in ends],
        color="0.9",
        lw=0,
        label="within a factor of 30",
    )
    axes.plot(ends, ends, color="0.3", lw=1, label="estimate = true error")


if __name__ == "__main__":
    main()
