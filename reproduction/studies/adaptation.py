"""Inner steps of a trained network: ``python -m reproduction.studies.adaptation RUN``.

RUN is the output folder of a finished run of the Omniglot program. Its meta-parameters are adapted
to the validation tasks by 1 to 32 inner steps, and judged; and the time and memory of a
meta-gradient at that many steps are measured, implicit, unrolled and truncated.
"""

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from matplotlib.figure import Figure
from rich.console import Console

from reproduction.method.episodes import Params
from reproduction.method.inner import FirstOrderSteps
from reproduction.method.meta import MetaLearner
from reproduction.method.systems import Differentiation, Recipe, System
from reproduction.omniglot.archive import OmniglotError
from reproduction.runs.command_line import OneLineParser, Settings, finish, whole
from reproduction.runs.experiment import build_meta_learner
from reproduction.runs.omniglot import VALIDATION_TASKS, OmniglotBenchmark
from reproduction.runs.reporting import save_figure
from reproduction.runs.resume import Refused
from reproduction.runs.run_folder import RunFolder
from reproduction.studies.theory.peak_memory import peak_bytes

Record: TypeAlias = dict[str, Any]

STEPS = (1, 2, 4, 8, 16, 32)
TASKS = 4
WAYS: tuple[Differentiation, ...] = ("implicit", "unrolled", "truncated")
STYLES: dict[str, dict[str, Any]] = {
    "implicit": {"color": "tab:blue", "marker": "o"},
    "unrolled": {"color": "tab:red", "marker": "s"},
    "truncated": {"color": "tab:brown", "marker": "^", "linestyle": "--"},
}


def read_run(folder: Path, data_dir: Path | None) -> tuple[Settings, Params]:
    """Read what a run was started with, and the meta-parameters that it ended with.

    Parameters
    ----------
    folder
        Its output folder.
    data_dir
        Where Omniglot lies; None: where the environment says.

    Returns
    -------
    settings : Settings
        As the run had them, on the CPU.
    params : Params
        The meta-parameters.

    Raises
    ------
    Refused
        If there is no finished run of the Omniglot program whose inner steps follow a gradient.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        saved = (folder / "parameters.pt").read_bytes()
    except FileNotFoundError as error:
        raise Refused(f"{folder} holds no finished run: {error.filename} is missing") from error
    config |= {
        "recipes": {m: Recipe(**r) for m, r in config["recipes"].items()},
        "systems": {m: System(**s) for m, s in config["systems"].items()},
        "device": torch.device("cpu"),
        "out": folder,
        "resume": None,
    }
    if "ways" not in config["further"]:
        raise Refused(f"{folder} holds a run of another program; one of Omniglot is needed")
    config["further"] = {
        "network": None, **config["further"], "data_dir": data_dir, "download": False
    }  # fmt: skip
    if config["systems"][config["method"]].adapted == "head":
        raise Refused(f"{folder} holds a run that adapts the last layer; it has no inner steps")
    later = {"start_from": None, "validation_only": False}  # flags that a run may be older than
    settings = Settings(**{f.name: {**later, **config}[f.name] for f in fields(Settings)})
    params: Params = torch.load(io.BytesIO(saved), weights_only=True, map_location="cpu")
    return settings, {name: leaf.detach() for name, leaf in params.items()}


def measure(
    learner: MetaLearner, benchmark: OmniglotBenchmark, params: Params, steps: Sequence[int]
) -> list[Record]:
    """Measure accuracy, time and memory at each number of steps.

    Parameters
    ----------
    learner
        Of the run.
    benchmark
        The tasks.
    params
        The meta-parameters.
    steps
        Numbers of inner steps.

    Returns
    -------
    list of Record
        One for each number of steps and way to differentiate.

    Raises
    ------
    Refused
        If the inner steps do not follow a gradient.
    """
    solver = learner.inner_solver
    if not (isinstance(solver, FirstOrderSteps) and solver.unrollable):
        raise Refused("the run's inner solver is none that one could unroll")
    batch = benchmark.sample(TASKS, torch.Generator().manual_seed(0))
    found = []
    for count in steps:
        # A truncated step depends on the meta-parameters through the proximal term alone.
        own = replace(learner, inner_solver=replace(solver, steps=count, proximal=True))  # type: ignore[type-var]
        accuracy = benchmark.validate(own, params)
        for way in WAYS:
            compute = partial(replace(own, differentiation=way).meta_gradient, params, batch)
            found.append({
                "steps": count, "differentiation": way, "accuracy": accuracy,
                "seconds": _seconds(compute),
                "peak": peak_bytes(compute),
            })  # fmt: skip
    return found


def table(records: Sequence[Record], learner: MetaLearner, tasks: int) -> str:
    """Write what was found as Markdown.

    Parameters
    ----------
    records
        From `measure`.
    learner
        Of the run.
    tasks
        How many validation tasks there were.

    Returns
    -------
    str
        Accuracy, time and memory.
    """
    steps = sorted({r["steps"] for r in records})
    by = {(r["differentiation"], r["steps"]): r for r in records}
    rows = [("accuracy, %", [f"{100 * by['implicit', s]['accuracy']:.1f}" for s in steps])]
    for key, unit, scale, form in (("seconds", "ms", 1e3, ".0f"), ("peak", "MB", 1e-6, ".1f")):
        for way in WAYS:
            cells = [format(scale * by[way, s][key], form) for s in steps]
            rows.append((f"{way}, {unit}", cells))
    return "\n".join([
        f"The meta-parameters of `{learner.method}` after so many inner steps, on {tasks} "
        f"validation tasks; and the processor time and peak memory of a meta-gradient of {TASKS} "
        f"tasks (truncated: the last {learner.truncate} steps are differentiated).",
        "",
        "| inner steps | " + " | ".join(map(str, steps)) + " |",
        "| --- |" + " --- |" * len(steps),
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
    ]) + "\n"  # fmt: skip


def draw(records: Sequence[Record]) -> Figure:
    """Draw accuracy, time and memory against the inner steps.

    Parameters
    ----------
    records
        From `measure`.

    Returns
    -------
    Figure
        The picture.
    """
    picture = Figure(figsize=(12, 3.6), layout="constrained")
    accuracy, seconds, peak = picture.subplots(1, 3)
    first = [r for r in records if r["differentiation"] == WAYS[0]]
    accuracy.semilogx(
        [r["steps"] for r in first], [100 * r["accuracy"] for r in first], "o-", color="0.3"
    )
    for way in WAYS:
        own = [r for r in records if r["differentiation"] == way]
        x = [r["steps"] for r in own]
        seconds.loglog(x, [r["seconds"] for r in own], label=way, **STYLES[way])
        peak.loglog(x, [r["peak"] / 1e6 for r in own], label=way, **STYLES[way])
    accuracy.set_title("accuracy on validation tasks, %")
    seconds.set_title(f"meta-gradient of {TASKS} tasks, processor seconds")
    peak.set_title("its peak memory, MB")
    seconds.legend(fontsize="small")
    for axes in (accuracy, seconds, peak):
        axes.set_xlabel("inner steps")
        axes.set_xticks(STEPS, [str(s) for s in STEPS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    return picture


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the records, the table and the picture."""
    parser = OneLineParser(
        prog="adaptation", description="Measure a trained run against the number of inner steps."
    )
    parser.add_argument("run", type=Path, help="output folder of a finished Omniglot run")
    parser.add_argument("--data-dir", type=Path, help="Omniglot's archives")
    parser.add_argument("--most-steps", type=whole(1), default=STEPS[-1], help="inner steps")
    parser.add_argument("--out", type=Path, help="output folder (default: RUN/adaptation)")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    given = parser.parse_args(arguments)
    settings, params = read_run(given.run, given.data_dir)
    torch.set_num_threads(1)
    if given.smoke:
        settings = replace(settings, test_tasks=2)
    benchmark, console = OmniglotBenchmark.build(settings), Console()
    learner = build_meta_learner(settings, settings.method, benchmark)
    steps = [s for s in STEPS if s <= (2 if given.smoke else given.most_steps)]
    with console.status("inner steps"):
        records = measure(learner, benchmark, params, steps)
    folder = RunFolder(given.out or given.run / "adaptation")
    text = table(records, learner, min(VALIDATION_TASKS, settings.test_tasks))
    folder.write_lines("metrics.jsonl", records)
    folder.write("adaptation.md", lambda path: path.write_text(text))
    folder.write("adaptation.png", save_figure(draw(records)))
    console.print(text, markup=False, soft_wrap=True)


def _seconds(function: Callable[[], object]) -> float:
    """Return the lesser processor time of two calls."""
    found = []
    for _ in range(2):
        began = time.process_time()
        function()
        found.append(time.process_time() - began)
    return min(found)


if __name__ == "__main__":
    finish(main, expected=(OmniglotError,))
