"""The pictures of the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reproduction.method.systems import METHODS, SYSTEMS, Method
from reproduction.report.records import Record
from reproduction.report.tables import by_seed

# iMAML in blues, MAML in reds, what takes no second derivatives in greys and greens.
COLOURS: dict[Method, str] = dict(
    zip(
        METHODS,
        ("deepskyblue", "tab:blue", "tab:cyan", "tab:purple", "navy", "tab:red", "tab:orange",
         "tab:brown", "tab:green", "0.4"),
        strict=True,
    )
)  # fmt: skip


def draw_sinusoids(tables: Mapping[str, Sequence[Record]]) -> Figure:
    """Draw each system's error on every seed, and the mean.

    Parameters
    ----------
    tables
        Runs by the title of their panel.

    Returns
    -------
    Figure
        A panel a table.
    """
    figure = Figure(figsize=(5.2 * len(tables), 3.8), layout="constrained")
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axes, (title, records) in zip(panels, tables.items(), strict=True):
        errors = by_seed(records, "after")
        shown = [method for method in METHODS if method in errors]
        for k, method in enumerate(shown):
            values = list(errors[method].values())
            axes.plot([k] * len(values), values, "o", color=COLOURS[method], alpha=0.6)
            axes.plot(k, sum(values) / len(values), "_", color="black", markersize=18)
        axes.set_xticks(range(len(shown)), shown, rotation=40, ha="right")
        axes.set_yscale("log")
        axes.set_title(title)
        axes.grid(alpha=0.3, axis="y", which="both")
    panels[0].set_ylabel("mean squared error, unseen sinusoids")
    return figure


def draw_sinusoid_curves(tables: Mapping[str, Sequence[Record]]) -> Figure:
    """Draw the error on the validation tasks against seconds and against evaluations.

    Parameters
    ----------
    tables
        Runs by the title of their panels; finished ones are drawn, a line a seed.

    Returns
    -------
    Figure
        Two panels a table.
    """
    figure, panels = _panels(2 * len(tables), columns=2, width=5.5)
    for row, (title, records) in enumerate(tables.items()):
        _sinusoid_curves(panels[2 * row : 2 * row + 2], title, records)
    return figure


def _sinusoid_curves(panels: Sequence[Axes], title: str, records: Sequence[Record]) -> None:
    by_seconds, by_evaluations = panels
    named: set[Method] = set()
    for record in (r for r in records if r.state == "finished" and r.curve):
        seconds, steps, values = zip(*record.curve, strict=True)
        a_step = record.evaluations / record.meta_steps
        style: dict[str, Any] = {"color": COLOURS[record.method], "alpha": 0.7, "linewidth": 1.2}
        label = None if record.method in named else record.method
        by_seconds.plot(seconds, values, label=label, **style)
        by_evaluations.plot([step * a_step / 1e3 for step in steps], values, **style)
        named.add(record.method)
    by_seconds.set_xlabel("seconds of meta-steps")
    by_evaluations.set_xlabel("thousand evaluations")
    by_seconds.set_ylabel("error on validation tasks")
    by_seconds.legend(fontsize="small")
    for axes in panels:
        axes.set_title(title)
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")


def draw_curves(tables: Mapping[str, Sequence[Record]]) -> Figure:
    """Draw the accuracy on the validation tasks against minutes of meta-steps.

    Parameters
    ----------
    tables
        Runs by the title of their panel.

    Returns
    -------
    Figure
        A panel a table.
    """
    figure, panels = _panels(len(tables))
    for axes, (title, records) in zip(panels, tables.items(), strict=True):
        for record in records:
            _curve(axes, record)
        axes.set_title(title)
        axes.set_xlabel("minutes of meta-steps, one thread a process")
        axes.set_ylabel("accuracy on validation tasks, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def _panels(count: int, columns: int = 3, width: float = 5.2) -> tuple[Figure, list[Axes]]:
    """Make so many panels, a row as full as can be before the next."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, 4 * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, k + 1) for k in range(count)]


def _curve(axes: Axes, record: Record) -> None:
    name = SYSTEMS[record.method].name
    if record.state != "finished":
        name += f" ({record.state})"
    axes.plot(
        [seconds / 60 for seconds, *_ in record.curve],
        [100 * value for *_, value in record.curve],
        marker="." if len(record.curve) < 30 else None, label=name, color=COLOURS[record.method],
    )  # fmt: skip
