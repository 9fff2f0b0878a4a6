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
    unit_ms
        Milliseconds that one unit took, where the unit is no time itself.
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
    unit_ms: float | None = None

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
        "processor": processor(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def merged(before: Sequence[Row], now: Sequence[Row], order: Sequence[str]) -> list[Row]:
    """Earlier rows with those of the benchmarks that were run again in their place, in order."""
    again = {(row.benchmark, row.threads) for row in now}
    kept = [row for row in before if (row.benchmark, row.threads) not in again]
    return sorted([*kept, *now], key=lambda row: (order.index(row.benchmark), row.threads))


def title(benchmark: str) -> str:
    """What a benchmark measures, in words."""
    kind, *size = benchmark.split("-")
    if kind == "logistic":
        return f"Logistic regression, {size[0]} weights, {size[1]}"
    tasks = {"sinusoid": "sinusoid tasks", "omniglot": "Omniglot tasks"}.get(kind)
    if tasks:
        return f"Meta-step of iMAML, {size[0]} {tasks}"
    return {"memory": "Memory of a meta-step on Omniglot", "import": "Import"}[kind]


def markdown(rows: Sequence[Row], *, folded: bool = False) -> str:
    """A table for each benchmark and number of threads; `folded`: for a page, to be opened."""
    tables: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        tables.setdefault((row.benchmark, row.threads), []).append(row)
    parts = []
    for (benchmark, threads), of_it in tables.items():
        heading = title(benchmark) + ("" if threads == 1 else f", {threads} threads")
        if of_it[0].unit_ms is not None:
            heading += f" (a gradient took {of_it[0].unit_ms:.2g} ms)"
        table = "\n".join(_table(of_it))
        if folded:
            parts.append(f":::{{dropdown}} {heading}\n\n{table}\n:::\n")
        else:
            parts.append(f"{benchmark}: {heading}\n\n{table}\n")
    return "\n".join(parts)


def overview(rows: Sequence[Row]) -> str:
    """One table: the quickest of each kind, in each benchmark that is in gradients, one thread."""
    kinds = {OURS: OURS, "by hand": "by hand", "torchopt": "torchopt, CG", "higher": "higher"}
    kinds["jax under jit"] = "jax"
    lines = ["| | " + " | ".join(kinds) + " |", "| --- " * (len(kinds) + 1) + "|"]
    for benchmark in dict.fromkeys(row.benchmark for row in rows):
        of_it = [row for row in rows if row.benchmark == benchmark and row.threads == 1]
        of_it = [row for row in of_it if row.error is not None and "of jax" not in row.side]
        for loop in (False, True):
            rows_of_it = [row for row in of_it if ("along a loop" in row.side) is loop]
            if not rows_of_it:
                continue
            cells = []
            for start in kinds.values():
                medians = [row.figure.median for row in rows_of_it if row.side.startswith(start)]
                cells.append(f"{min(medians):.3g}" if medians else "")
            what = title(benchmark) + (", along a loop of 1 per cent steps" if loop else "")
            lines.append(f"| {what}, in {of_it[0].unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    """The lines of the table of one benchmark."""
    own = next((row.figure.median for row in rows if row.side == OURS), None)
    compared = own is not None and rows[0].unit not in ("MB", "ms")
    columns = ["who", f"{rows[0].unit}: median (quartiles)"]
    columns += ["against hypergrad", "error", "products"] if compared else []
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for row in rows:
        cells = [row.side + (f" ({row.note})" if row.note else ""), str(row.figure)]
        if compared:
            products = "" if row.products is None else str(row.products)
            cells += [f"{row.figure.median / own:.2f}", _error(row), products]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _error(row: Row) -> str:
    judged = f" ({row.judged})" if row.judged else ""
    return "" if row.error is None else f"{row.error:.1e}{judged}"


def processor() -> str:
    """Name the processor, as Linux does where it can."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor()
