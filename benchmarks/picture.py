"""The picture of a run: one panel a benchmark, a mark a side."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks.results import OURS, Row, title

COLOURS = {OURS: "tab:orange", "by hand": "tab:blue", "jax": "tab:green"}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw what was timed in gradients on one thread, in float32; to the left is faster."""
    names = list(dict.fromkeys(row.benchmark for row in rows if _shown(row)))
    if not names:
        return
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(7 * columns, 3.4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        shown = [row for row in rows if row.benchmark == name and _shown(row)][::-1]
        for place, row in enumerate(shown):
            median, low, high = row.figure.median, row.figure.low, row.figure.high
            axes.errorbar(
                median, place, xerr=[[median - low], [high - median]], fmt="o", color=_colour(row)
            )
            axes.annotate(
                f"{median:.3g}", (median, place), (0, 5), textcoords="offset points", ha="center",
                fontsize="small",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(range(len(shown)), [row.side for row in shown], fontsize="small")
        axes.set_ylim(-0.5, len(shown) - 0.2)
        axes.margins(x=0.12)
        axes.grid(axis="x", color="0.9")
        axes.set_title(title(name), fontsize="medium")
        axes.set_xlabel(f"time, in {shown[0].unit}; left is faster", fontsize="small")
        axes.tick_params(axis="x", which="both", labelsize="small")
    for axes in panels[len(names) :]:
        axes.remove()
    figure.savefig(path, dpi=110)


def _colour(row: Row) -> str:
    return next((c for start, c in COLOURS.items() if row.side.startswith(start)), "tab:gray")


def _shown(row: Row) -> bool:
    timed = row.threads == 1 and row.error is not None and "of jax" not in row.side
    return timed and not row.benchmark.endswith("float64")
