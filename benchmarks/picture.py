"""The picture of a run: one panel a benchmark, a bar a side."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.results import OURS, Row


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw what was timed in gradients on one thread; shorter is faster."""
    names = list(dict.fromkeys(row.benchmark for row in rows if _shown(row)))
    if not names:
        return
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(6 * columns, 2.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        shown = [row for row in rows if row.benchmark == name and _shown(row)][::-1]
        medians = [row.figure.median for row in shown]
        spread = [
            [row.figure.median - row.figure.low for row in shown],
            [row.figure.high - row.figure.median for row in shown],
        ]
        colours = ["tab:orange" if row.side.startswith(OURS) else "tab:blue" for row in shown]
        labels = [f"{row.side}\nerror {row.error:.0e}" for row in shown]
        axes.barh(labels, medians, xerr=spread, color=colours, ecolor="0.4")
        for place, value in enumerate(medians):
            axes.text(value, place, f" {value:.3g}", va="bottom", fontsize="x-small")
        axes.margins(x=0.12)
        axes.tick_params(axis="y", labelsize="x-small")
        axes.set_title(f"{name}, {shown[0].unit}", fontsize="small")
    for axes in panels[len(names) :]:
        axes.remove()
    figure.savefig(path, dpi=110)


def _shown(row: Row) -> bool:
    return row.threads == 1 and row.error is not None and "of jax" not in row.side
