"""What a run has left in its folder, as one record."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reproduction.method.evaluations import evaluations_a_task
from reproduction.method.systems import SYSTEMS, Method, Recipe, System
from reproduction.report.plan import MEASUREMENTS, TRAININGS, Planned
from reproduction.report.runner import read_state, refuse_other_arguments


@dataclass(frozen=True)
class Record:
    """One run, finished or not.

    Parameters
    ----------
    name, table
        Of the run, and of the table that it belongs to.
    method
        The system.
    state, message
        How it ended, and what it said where that was not well.
    seed, ways, shots
        Of the run and its tasks; no ways on sinusoids.
    recipe
        What was tuned.
    meta_steps, tasks, seconds, evaluations
        How much it has trained; evaluations as `evaluations` counts them.
    clock
        Whose seconds those are.
    figures
        On the test tasks: mean, and half of the 95% interval over them; none if it did not end.
    curve
        Seconds, meta-steps and the figure on the validation tasks.
    products, negative_curvature, linear_residual
        Means over the last meta-steps, where there is a linear solve.
    versions, hardware, processes
        What computed it; processes that shared its meta-steps.
    """

    name: str
    table: str
    method: Method
    state: str
    message: str
    seed: int
    ways: int | None
    shots: int
    recipe: dict[str, Any]
    meta_steps: int
    tasks: int
    seconds: float
    evaluations: float
    clock: str
    figures: dict[str, tuple[float, float]]
    curve: list[tuple[float, int, float]]
    products: float | None
    negative_curvature: float | None
    linear_residual: float | None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    processes: int = 1

    @property
    def length(self) -> str:
        """How long it has trained."""
        cores = f" on {self.processes} cores" if self.processes > 1 else ""
        return f"{self.seconds / 60:.0f} min{cores}"

    @property
    def title(self) -> str:
        """The system's name."""
        return SYSTEMS[self.method].name

    def at_evaluations(self, evaluations: float) -> float:
        """Return the last figure on the validation tasks within so many evaluations, or NaN."""
        a_step = self.evaluations / max(self.meta_steps, 1)
        within = [value for _, step, value in self.curve if step * a_step <= evaluations]
        return within[-1] if within else math.nan


@dataclass(frozen=True)
class Measured:
    """What a program that trains nothing has left in its folder.

    Parameters
    ----------
    name, title
        Of the run, and over its table.
    table
        In Markdown.
    picture
        Its file.
    records
        All figures.
    hardware
        What computed it.
    """

    name: str
    title: str
    table: str
    picture: Path
    records: list[dict[str, Any]]
    hardware: dict[str, Any]


def read_measured(out: Path, runs: Sequence[Planned]) -> list[Measured]:
    """Read the finished runs of the programs that train nothing.

    Parameters
    ----------
    out
        The folder of all runs.
    runs
        Which.

    Returns
    -------
    list of Measured
        In the same order.
    """
    found = []
    for run in runs:
        folder = out / run.name
        state = read_state(folder)
        if run.program not in TRAININGS and state.get("state") == "finished":
            refuse_other_arguments(folder, state, run)
            found.append(
                Measured(
                    run.name,
                    MEASUREMENTS[run.program],
                    (folder / f"{run.program}.md").read_text(),
                    folder / f"{run.program}.png",
                    _read_lines(folder / "metrics.jsonl"),
                    state["hardware"],
                )
            )
    return found


def read_records(out: Path, runs: Sequence[Planned]) -> list[Record]:
    """Read every run that has measured something.

    Parameters
    ----------
    out
        The folder of all runs.
    runs
        Which, in the order that is wanted.

    Returns
    -------
    list of Record
        Those that have begun.
    """
    found = (_read(out / run.name, run) for run in runs if run.program in TRAININGS)
    return [record for record in found if record]


def _read(folder: Path, run: Planned) -> Record | None:
    state, config = read_state(folder), _read_json(folder / "config.json")
    if not state or not config:
        return None
    refuse_other_arguments(folder, state, run)
    method: Method = config["method"]
    recipe, system = Recipe(**config["recipes"][method]), System(**config["systems"][method])
    metrics, timings = (_read_lines(folder / f"{name}.jsonl") for name in ("metrics", "timings"))
    ended = _read_json(folder / "results.json").get(method, {})
    if not (metrics or state["state"] == "failed"):
        return None
    last = metrics[-1] if metrics else {"step": 0}
    ways, shots = config["further"].get("ways"), config["shots"]
    seconds = ended.get("seconds", timings[-1]["seconds"] if timings else 0.0)
    tasks = last["step"] * recipe.tasks_per_step
    return Record(
        name=run.name,
        table=run.table,
        method=method,
        state=state["state"],
        message=state["message"],
        seed=config["seed"],
        ways=ways,
        shots=shots,
        recipe=asdict(recipe),
        meta_steps=last["step"],
        tasks=tasks,
        seconds=seconds,
        evaluations=tasks
        * evaluations_a_task(
            recipe,
            system,
            outputs=shots * ways**2 if ways else shots,
            truncate=config["truncate"],
            products=_mean_products(metrics),
        ),
        clock=config["clock"],
        figures={name: (mean, width) for name, (mean, width) in ended.get("figures", {}).items()},
        curve=[
            (t["seconds"], m["step"], m["validation"])
            for t, m in zip(timings, metrics, strict=False)
        ],
        products=last.get("products"),
        negative_curvature=last.get("negative_curvature"),
        linear_residual=last.get("linear_residual"),
        versions=config["versions"],
        hardware=state["hardware"],
        processes=run.processes,
    )


def _mean_products(metrics: Sequence[dict[str, Any]]) -> float:
    """Average over the meta-steps: each record holds the mean since the one before it."""
    total, before = 0.0, 0
    for record in metrics:
        total += record.get("products", 0.0) * (record["step"] - before)
        before = record["step"]
    return total / before if before else 0.0


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
