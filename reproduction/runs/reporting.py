"""What a run ends with: a table with intervals, and pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from reproduction.method.systems import SYSTEMS, Method
from reproduction.runs.training import Trained


class Estimate(NamedTuple):
    """A mean and half the width of its 95% interval."""

    mean: float
    interval: float


@dataclass(frozen=True)
class Outcome:
    """One method's run: how it went, and its figure on each test task."""

    trained: Trained
    figures: dict[str, Tensor]

    def estimates(self) -> dict[str, Estimate]:
        """Return mean and interval of each figure."""
        return {name: mean_interval(values) for name, values in self.figures.items()}


def mean_interval(values: Tensor) -> Estimate:
    """Estimate a mean, with its 95% interval by the normal approximation.

    Parameters
    ----------
    values
        One figure for each test task.

    Returns
    -------
    Estimate
        The mean, and 1.96 standard errors.
    """
    values = values.double()
    return Estimate(values.mean().item(), 1.96 * values.std().item() / len(values) ** 0.5)


def summarise(outcomes: Mapping[Method, Outcome]) -> dict[str, dict[str, object]]:
    """Return what the table says, for `results.json`."""
    return {
        method: {
            "meta_steps": outcome.trained.steps,
            "seconds": round(outcome.trained.seconds, 1),
            "products": _products(outcome.trained),
            "figures": {name: list(value) for name, value in outcome.estimates().items()},
        }
        for method, outcome in outcomes.items()
    }


def print_table(
    console: Console, title: str, outcomes: Mapping[Method, Outcome], scale: float = 1.0
) -> None:
    """Print one row a method, with mean and 95% interval of each figure.

    The column "products" is the mean number of curvature products of a meta-gradient's solve.

    Parameters
    ----------
    console
        Where to.
    title
        What the figures are.
    outcomes
        The runs.
    scale
        Figures are multiplied by it: 100 for per cent.
    """
    digits = 2 if scale > 1 else 3
    table = Table(box=SIMPLE)
    table.add_column("method", no_wrap=True)
    for name in ("steps", "seconds", "products"):
        table.add_column(name, justify="right")
    for name in next(iter(outcomes.values())).figures:
        table.add_column(name, justify="right", no_wrap=True)
    for method, outcome in outcomes.items():
        products = _products(outcome.trained)
        table.add_row(
            SYSTEMS[method].name,
            str(outcome.trained.steps),
            f"{outcome.trained.seconds:.0f}",
            "-" if products is None else f"{products:.1f}",
            *(
                f"{scale * mean:.{digits}f} ± {scale * interval:.{digits}f}"
                for mean, interval in outcome.estimates().values()
            ),
        )
    console.print(title)
    console.print(table)


def draw_learning_curves(
    axes: Axes, outcomes: Mapping[Method, Outcome], ylabel: str, scale: float = 1.0
) -> None:
    """Draw the figure on the validation tasks against the seconds of training.

    Parameters
    ----------
    axes
        Where to.
    outcomes
        The runs.
    ylabel
        What the figure is.
    scale
        Figures are multiplied by it: 100 for per cent.
    """
    for method, outcome in outcomes.items():
        seconds, values = outcome.trained.history.curve("validation")
        axes.plot(seconds, [scale * value for value in values], label=SYSTEMS[method].name)
    axes.set_xlabel("training, seconds")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.legend()


def budget(trained: Trained) -> str:
    """Say how long a training was, for the title of a picture."""
    return f"{trained.steps:,} meta-steps in {trained.seconds / 60:.1f} minutes"


def save_figure(figure: Figure) -> Callable[[Path], None]:
    """Return what writes the figure as a PNG file to a path."""
    return lambda path: figure.savefig(path, format="png", dpi=120)


def _products(trained: Trained) -> float | None:
    records: Sequence[dict[str, float]] = trained.history.records
    counts = [record["products"] for record in records if "products" in record]
    return sum(counts) / len(counts) if counts else None
