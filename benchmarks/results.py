"""What a run finds: rows, kept as JSON and shown as one Markdown table."""

import dataclasses
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.timing import Quartiles

OURS = "hypergrad"


@dataclass(frozen=True)
class Row:
    """One side of one benchmark.

    Parameters
    ----------
    benchmark, side
        What was measured, and who did it.
    unit
        What the figures count: gradients, gradients a task, MB or ms.
    figure
        Quartiles over the rounds.
    rounds
        How many rounds.
    threads
        Threads that torch used.
    error
        Relative error of the hypergradient against the exact one.
    products
        Products with the matrix, those for the true residual included.
    note
        What else a reader must know.
    judged
        What the error was measured on, where that is not what was timed.
    """

    benchmark: str
    side: str
    unit: str
    figure: Quartiles
    rounds: int
    threads: int = 1
    error: float | None = None
    products: int | None = None
    note: str = ""
    judged: str = ""

    @classmethod
    def from_json(cls, fields: dict) -> "Row":
        return cls(**{**fields, "figure": Quartiles(**fields["figure"])})


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run: `quick` is for a smoke test, whose figures mean nothing."""

    rounds: int
    threads: int
    quick: bool


def read(path: Path) -> list[Row]:
    """The rows of an earlier run; none where there was none."""
    if not path.is_file():
        return []
    return [Row.from_json(fields) for fields in json.loads(path.read_text())["rows"]]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Keep the rows, and what they were measured with."""
    content = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def merged(before: Sequence[Row], now: Sequence[Row], order: Sequence[str]) -> list[Row]:
    """Earlier rows with those of the benchmarks that were run again in their place, in order."""
    again = {(row.benchmark, row.threads) for row in now}
    kept = [row for row in before if (row.benchmark, row.threads) not in again]
    return sorted([*kept, *now], key=lambda row: (order.index(row.benchmark), row.threads))


def markdown(rows: Sequence[Row]) -> str:
    """One table, the rows of a benchmark together; threads are named where there are several."""
    ours = {(row.benchmark, row.threads): row.figure.median for row in rows if row.side == OURS}
    lines = [
        "| benchmark | side | median (quartiles) | against hypergrad | error | products |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        own = ours.get((row.benchmark, row.threads))
        threads = "" if row.threads == 1 else f", {row.threads} threads"
        cells = (
            row.benchmark + threads,
            row.side + (f" ({row.note})" if row.note else ""),
            f"{row.figure} {row.unit}",
            "" if own is None or row.unit in ("MB", "ms") else f"{row.figure.median / own:.2f}",
            _error(row),
            "" if row.products is None else str(row.products),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _error(row: Row) -> str:
    judged = f" ({row.judged})" if row.judged else ""
    return "" if row.error is None else f"{row.error:.1e}{judged}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor()
