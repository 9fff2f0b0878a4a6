"""Where the implicit gradient is exact: ``python -m reproduction.studies.inner_steps``.

On sinusoid tasks the meta-gradient is computed after 1 to 128 inner steps: implicitly, by unrolling
all steps and by unrolling the last few. Each answer is compared with the hypergradient at the
solved inner problem, and its time and memory are measured.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

from reproduction.runs.command_line import OneLineParser, finish, whole
from reproduction.runs.reporting import save_figure
from reproduction.runs.run_folder import RunFolder
from reproduction.studies.hypergradients import KEPT, Bench, draw_network, draw_tasks
from reproduction.studies.theory.peak_memory import peak_bytes

Record: TypeAlias = dict[str, Any]

QUARTILES = torch.tensor([0.25, 0.5, 0.75])
SOLVED = 1e-8  # a gradient of the inner objective this short, of one that starts at several
STYLES: dict[str, dict[str, Any]] = {
    "implicit": {"color": "tab:blue", "marker": "o"},
    "unrolled": {"color": "tab:red", "marker": "s"},
    f"truncated to {KEPT}": {"color": "tab:brown", "marker": "^", "linestyle": "--"},
    "implicit, Gauss-Newton steps": {"color": "tab:cyan", "marker": "o", "linestyle": ":"},
}


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Parameters
    ----------
    tasks
        In the batch.
    steps
        Inner steps.
    lams
        Strengths of the proximal term.
    to_solve
        Gradient steps that are to solve the inner problem.
    repeats
        Calls behind a time.
    """

    tasks: int = 16
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    lams: tuple[float, ...] = (2.0, 10.0)
    to_solve: int = 10_000
    repeats: int = 5


SMOKE = Plan(tasks=3, steps=(1, 8, 64), lams=(10.0,), to_solve=400, repeats=1)


def measure(bench: Bench, plan: Plan) -> tuple[list[Record], Record]:
    """Measure every estimator after every number of steps.

    Parameters
    ----------
    bench
        What is measured on.
    plan
        How much.

    Returns
    -------
    records : list of Record
        Quartiles of the relative error over the tasks whose inner problem was solved to a minimum;
        processor seconds and peak bytes of a batch.
    solved : Record
        How many tasks those are.
    """
    params = bench.descend(plan.to_solve, SOLVED / 100)
    exact, definite = bench.exact(params)
    used = definite & (bench.slopes(params) <= SOLVED)
    records = []
    for steps in plan.steps:
        for name, estimate in bench.estimators(steps).items():
            errors = ((estimate() - exact).norm(dim=1) / exact.norm(dim=1))[used]
            low, middle, high = errors.quantile(QUARTILES.to(errors)).tolist()
            records.append({
                "estimator": name, "lam": bench.lam, "steps": steps, "error": middle,
                "error_low": low, "error_high": high, "seconds": _seconds(estimate, plan.repeats),
                "peak": peak_bytes(estimate),
            })  # fmt: skip
    return records, {"lam": bench.lam, "solved": int(used.sum()), "tasks": len(used)}


def look_at_kinks(bench: Bench, plan: Plan) -> Record:
    """Say how far gradient descent brings the inner problem of a network with kinks."""
    norms = bench.slopes(bench.descend(plan.to_solve // 4, SOLVED))
    return {
        "lam": bench.lam,
        "steps": plan.to_solve // 4,
        "solved": int((norms <= SOLVED).sum()),
        "least_gradient": norms.min().item(),
        "median_gradient": norms.median().item(),
        "median_gradient_at_start": bench.slopes(bench.descend(0)).median().item(),
    }


def table(records: list[Record], solved: list[Record], kinks: list[Record]) -> str:
    """Write what was found as Markdown.

    Parameters
    ----------
    records, solved, kinks
        From `measure` and `look_at_kinks`, for each lambda.

    Returns
    -------
    str
        Error, time and memory.
    """
    steps = sorted({r["steps"] for r in records})
    lines = []
    for found in solved:
        lines += [
            f"Lambda {found['lam']:g}: median relative error over the {found['solved']} of "
            f"{found['tasks']} tasks that {SOLVED:g} was reached on.",
            "",
            "| inner steps | " + " | ".join(map(str, steps)) + " |",
            "| --- |" + " --- |" * len(steps),
        ]
        lines += [
            f"| {name} | {' | '.join(_cells(records, name, found['lam'], steps, 'error'))} |"
            for name in STYLES
        ]
        lines.append("")
    lam = solved[-1]["lam"]
    for key, text in (("seconds", "Milliseconds of processor time"), ("peak", "Peak memory in kB")):
        lines += [
            f"{text}, lambda {lam:g}, all {solved[-1]['tasks']} tasks in one batch.",
            "",
            "| inner steps | " + " | ".join(map(str, steps)) + " |",
            "| --- |" + " --- |" * len(steps),
        ]
        lines += [f"| {n} | {' | '.join(_cells(records, n, lam, steps, key))} |" for n in STYLES]
        lines.append("")
    lines += [
        f"With ReLU, lambda {k['lam']:g}: {k['steps']} gradient steps bring {k['solved']} tasks "
        f"below {SOLVED:g}; median gradient {k['median_gradient']:.2g} (least "
        f"{k['least_gradient']:.2g}), at the start {k['median_gradient_at_start']:.2g}."
        for k in kinks
    ]
    return "\n".join(lines) + "\n"


def draw(records: list[Record]) -> Figure:
    """Draw error, time and memory against the inner steps.

    Parameters
    ----------
    records
        From `measure`, for each lambda.

    Returns
    -------
    Figure
        The picture.
    """
    lams = sorted({r["lam"] for r in records})
    picture = Figure(figsize=(4 * (len(lams) + 2), 4), layout="constrained")
    panels = picture.subplots(1, len(lams) + 2)
    for name, style in STYLES.items():
        for axes, lam in zip(panels, lams, strict=False):
            rows = [r for r in records if r["estimator"] == name and r["lam"] == lam]
            x = [r["steps"] for r in rows]
            axes.loglog(x, [r["error"] for r in rows], markersize=4, label=name, **style)
            low, high = ([r[key] for r in rows] for key in ("error_low", "error_high"))
            axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
            axes.set_title(f"relative error, lambda {lam:g}")
        rows = [r for r in records if r["estimator"] == name and r["lam"] == lams[-1]]
        x = [r["steps"] for r in rows]
        panels[-2].loglog(x, [1e3 * r["seconds"] for r in rows], markersize=4, **style)
        panels[-1].loglog(x, [r["peak"] / 1e6 for r in rows], markersize=4, **style)
    panels[-2].set_title("processor time, ms")
    panels[-1].set_title("peak memory, MB")
    panels[0].legend(fontsize="small")
    for axes in panels:
        axes.set_xlabel("inner steps")
        axes.grid(alpha=0.3)
    return picture


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the records, the tables and the picture."""
    parser = OneLineParser(
        prog="inner_steps", description="Measure hypergradients against the number of inner steps."
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="of the network")
    parser.add_argument(
        "--out", type=Path, help="output folder (default: runs/inner-steps-seedSEED)"
    )
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    given = parser.parse_args(arguments)
    out = given.out or Path("runs", f"inner-steps-seed{given.seed}")
    if out.exists() and not out.is_dir():
        parser.error(f"--out {out}: a file is there; the name of a folder is needed")
    torch.set_num_threads(1)
    plan, console, folder = SMOKE if given.smoke else Plan(), Console(), RunFolder(out)
    tasks = draw_tasks(plan.tasks)
    smooth, kinked = (draw_network(given.seed, kind) for kind in (nn.Tanh, nn.ReLU))
    records: list[Record] = []
    solved: list[Record] = []
    kinks: list[Record] = []
    for lam in plan.lams:
        with console.status(f"lambda {lam:g}"):
            found, used = measure(Bench(smooth, tasks, lam), plan)
            kinks.append(look_at_kinks(Bench(kinked, tasks, lam), plan))
        records += found
        solved.append(used)
        folder.write_lines("metrics.jsonl", records)
    folder.write_json("results.json", {"solved": solved, "relu": kinks})
    text = table(records, solved, kinks)
    folder.write("inner_steps.md", lambda path: path.write_text(text))
    folder.write("inner_steps.png", save_figure(draw(records)))
    console.print(text, markup=False, soft_wrap=True)


def _seconds(function: Callable[[], object], repeats: int) -> float:
    """Return the least processor time of a call: others who use the machine do not count."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        function()
        found.append(time.process_time() - began)
    return min(found)


def _cells(records: list[Record], name: str, lam: float, steps: list[int], key: str) -> list[str]:
    rows = {r["steps"]: r[key] for r in records if r["estimator"] == name and r["lam"] == lam}
    scale, form = {"error": (1, ".2g"), "seconds": (1e3, ".0f"), "peak": (1e-3, ".0f")}[key]
    return [format(scale * rows[s], form) if s in rows else "-" for s in steps]


if __name__ == "__main__":
    finish(main)
