"""Count negative curvature on the sinusoids: ``python -m reproduction.studies.curvature``.

Trains iMAML four times for the same number of meta-steps: with the Hessian and with the
Gauss-Newton matrix, at inner points that are solved and after sixteen gradient steps. At several
points of each training it counts, over 100 tasks that no training sees, in how many conjugate
gradients meet negative curvature, and how far the linear system is then from solved.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from matplotlib.figure import Figure
from rich.console import Console

from reproduction.method.episodes import Episodes, Params
from reproduction.method.inner import Curvature, GaussNewtonSteps, GradientDescent, InnerSolver
from reproduction.method.meta import MetaLearner
from reproduction.runs.command_line import OneLineParser, Settings, finish, whole
from reproduction.runs.experiment import build_meta_learner
from reproduction.runs.reporting import mean_interval, save_figure
from reproduction.runs.run_folder import RunFolder
from reproduction.runs.sinusoid import SinusoidBenchmark, read_command_line
from reproduction.runs.training import Schedule, TrainingFailed, train

Inner: TypeAlias = Literal["solved", "16 steps"]
Record: TypeAlias = dict[str, Any]

INNER_SOLVERS: dict[Inner, InnerSolver] = {
    "solved": GaussNewtonSteps(3),
    "16 steps": GradientDescent(16, 0.01),
}
CURVATURES: tuple[Curvature, ...] = get_args(Curvature)
LAMBDAS = (0.02, 0.1, 0.5, 2.0)
POINTS = (0, 25, 100, 225, 400, 625)
PROBE_SEED, PROBE_TASKS = 20240501, 100
COLOURS: dict[Curvature, str] = {"hessian": "tab:red", "gauss-newton": "tab:blue"}
LINES: dict[Inner, str] = {"solved": "-", "16 steps": "--"}


@dataclass(frozen=True)
class Training:
    """One of the four trainings: which matrix, at which inner points."""

    curvature: Curvature
    inner: Inner

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"{self.curvature}-{self.inner.replace(' ', '-')}"

    def build(self, settings: Settings, benchmark: SinusoidBenchmark) -> MetaLearner:
        """Make its learner: that of the demo with this matrix and this inner solver."""
        return dataclasses.replace(
            build_meta_learner(settings, "imaml", benchmark),
            curvature=self.curvature,
            inner_solver=INNER_SOLVERS[self.inner],
        )


TRAININGS = tuple(Training(c, i) for i in INNER_SOLVERS for c in CURVATURES)


def probe(learner: MetaLearner, params: Params, tasks: Episodes) -> Iterator[Record]:
    """Measure the linear solve at one set of meta-parameters, for every matrix, inner and lambda.

    Parameters
    ----------
    learner
        Whose network, loss and number of products are used.
    params
        The meta-parameters.
    tasks
        The tasks over which is counted.

    Yields
    ------
    Record
        Shares and medians over the tasks.
    """
    for inner, solver in INNER_SOLVERS.items():
        for lam in LAMBDAS:
            for curvature in CURVATURES:
                one = dataclasses.replace(
                    learner, inner_solver=solver, lam=lam, curvature=curvature
                )
                _, measures = one.meta_gradient(params, tasks)
                residual = measures["linear_residual"]
                yield {
                    "inner": inner,
                    "lam": lam,
                    "curvature": curvature,
                    "negative_curvature": measures["negative_curvature"].float().mean().item(),
                    "linear_residual": residual.nanmedian().item(),
                    "linear_residual_90": residual.nanquantile(0.9).item(),
                    "inner_residual": measures["inner_residual"].nanmedian().item(),
                    "not_finite": (~residual.isfinite()).float().mean().item(),
                }


def run(
    training: Training, settings: Settings, benchmark: SinusoidBenchmark, console: Console
) -> tuple[list[Record], Record]:
    """Train once, measuring on the way.

    Parameters
    ----------
    training
        Which of the four.
    settings
        Those of the demo.
    benchmark
        The tasks.
    console
        Where progress is shown.

    Returns
    -------
    probes : list of Record
        What `probe` found at each point.
    outcome : Record
        The error on the unseen tasks, and the learning curve.
    """
    recipe = settings.recipes["imaml"]
    torch.manual_seed(settings.seed)
    learner = training.build(settings, benchmark)
    start = {n: p.detach() for n, p in benchmark.build_network().named_parameters()}
    generator = torch.Generator().manual_seed(settings.seed)
    count = min(PROBE_TASKS, settings.test_tasks)
    tasks = benchmark.tasks.sample(count, torch.Generator().manual_seed(PROBE_SEED))
    probes: list[Record] = []
    curve: list[list[float]] = []
    best, best_params, step = float("inf"), start, 0

    def look(params: Params) -> None:
        if step in POINTS or step == settings.meta_steps:
            of = {"training": training.folder, "step": step}
            probes.extend({**of, **found} for found in probe(learner, params, tasks))

    def validate(params: Params) -> float:
        nonlocal best, best_params, step
        step += settings.validate_every
        look(params)
        error = benchmark.validate(learner, params)
        curve.append([step, error])
        if error < best:
            best, best_params = error, {n: p.clone() for n, p in params.items()}
        return error

    look(start)
    failed = None
    try:
        train(
            learner, start, lambda count: benchmark.sample(count, generator), validate,
            Schedule(
                settings.meta_steps, None, recipe.tasks_per_step, recipe.lr,
                settings.validate_every,
            ),
            RunFolder(settings.out / training.folder),
            console=console, figure=f"{training.folder}: {benchmark.figure}",
        )  # fmt: skip
    except TrainingFailed:
        failed = step
    error, interval = mean_interval(benchmark.test(learner, best_params)["after"])
    return probes, {
        "training": training.folder,
        "error": error,
        "interval": interval,
        "not_finite_before_step": failed,
        "validation": curve,
    }


def table(probes: list[Record], outcomes: list[Record], lam: float, tasks: int) -> str:
    """Write what was found as Markdown.

    Parameters
    ----------
    probes, outcomes
        From `run`, of all trainings.
    lam
        The lambda of the trainings.
    tasks
        Over how many tasks was counted.

    Returns
    -------
    str
        Two tables: along the trainings, and over lambda.
    """
    steps = sorted({r["step"] for r in probes})

    def figure(name: str, **wanted: object) -> float | None:
        rows = [r for r in probes if all(r[key] == value for key, value in wanted.items())]
        return rows[0][name] if rows else None

    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.0f}%"

    def residual(value: float | None) -> str:
        return "-" if value is None else f"{value:.2g}"

    lines = [
        f"Trained at lambda {lam:g}: tasks with negative curvature / median linear residual "
        "after that many meta-steps, and the error on unseen tasks.",
        "",
        "| inner points | matrix | " + " | ".join(map(str, steps)) + " | error |",
        "| --- | --- |" + " --- |" * (len(steps) + 1),
    ]
    for training, outcome in zip(TRAININGS, outcomes, strict=True):
        own = {
            "training": training.folder, "lam": lam, "inner": training.inner,
            "curvature": training.curvature,
        }  # fmt: skip
        cells = [
            f"{share(figure('negative_curvature', step=s, **own))} / "
            f"{residual(figure('linear_residual', step=s, **own))}"
            for s in steps
        ]
        end = f"{outcome['error']:.3f} ± {outcome['interval']:.3f}"
        if outcome["not_finite_before_step"] is not None:
            end += f", not finite before step {outcome['not_finite_before_step']}"
        lines.append(f"| {training.inner} | {training.curvature} | {' | '.join(cells)} | {end} |")
    ends = (steps[0], steps[-1])
    definite = [r for r in probes if r["curvature"] == "gauss-newton"]
    met = round(sum(r["negative_curvature"] for r in definite) * tasks)
    lines += [
        "",
        "The same figures for the Hessian over lambda, along the training with Gauss-Newton: at "
        f"step {ends[0]}, then at step {ends[1]}. Of all measurements with the Gauss-Newton matrix "
        f"{met} of {len(definite) * tasks} reported negative curvature.",
        "",
        "| inner points | " + " | ".join(f"lambda {lam:g}" for lam in LAMBDAS) + " |",
        "| --- |" + " --- |" * len(LAMBDAS),
    ]
    for inner in INNER_SOLVERS:
        cells = []
        for value in LAMBDAS:
            own = {
                "training": Training("gauss-newton", inner).folder, "inner": inner, "lam": value,
                "curvature": "hessian",
            }  # fmt: skip
            cells.append(
                ", ".join(
                    f"{share(figure('negative_curvature', step=s, **own))} / "
                    f"{residual(figure('linear_residual', step=s, **own))}"
                    for s in ends
                )
            )
        lines.append(f"| {inner} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(probes: list[Record], outcomes: list[Record], lam: float) -> Figure:
    """Draw negative curvature, linear residual and validation error along the trainings.

    Parameters
    ----------
    probes, outcomes
        From `run`, of all trainings.
    lam
        The lambda of the trainings.

    Returns
    -------
    Figure
        The picture.
    """
    picture = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = picture.subplots(1, 3)
    for training, outcome in zip(TRAININGS, outcomes, strict=True):
        rows = [
            r for r in probes
            if r["training"] == training.folder and r["lam"] == lam
            and r["inner"] == training.inner and r["curvature"] == training.curvature
        ]  # fmt: skip
        steps = [r["step"] for r in rows]
        style = {"color": COLOURS[training.curvature], "linestyle": LINES[training.inner]}
        label = f"{training.curvature}, {training.inner}"
        left.plot(steps, [100 * r["negative_curvature"] for r in rows], "o", **style, label=label)
        middle.semilogy(steps, [r["linear_residual"] for r in rows], "o", **style)
        if outcome["validation"]:
            right.semilogy(
                *zip(*outcome["validation"], strict=True), **style,
                label=f"{outcome['error']:.3f} ± {outcome['interval']:.3f}",
            )  # fmt: skip
    for axes, text in (
        (left, "tasks with negative curvature, %"),
        (middle, "linear residual, median"),
        (right, "error on validation tasks"),
    ):
        axes.set_xlabel("meta-steps")
        axes.set_ylabel(text)
        axes.grid(alpha=0.3)
    left.legend(fontsize="small", title="matrix, inner points")
    right.legend(fontsize="small", title="error on unseen tasks")
    return picture


def main(arguments: list[str] | None = None) -> None:
    """Train four times, and write the records, the tables and the picture."""
    parser = OneLineParser(prog="curvature", description="Count negative curvature on sinusoids.")
    parser.add_argument("--seed", type=whole(0), default=0, help="of network and training tasks")
    parser.add_argument("--out", type=Path, help="output folder (default: runs/curvature-seedSEED)")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    given = parser.parse_args(arguments)
    out = given.out or Path("runs", f"curvature-seed{given.seed}")
    if out.exists() and not out.is_dir():
        parser.error(f"--out {out}: a file is there; the name of a folder is needed")
    flags = ["--seed", str(given.seed), "--device", "cpu", "--out", str(out)]
    settings = read_command_line([*flags, "--compare", *(["--smoke"] if given.smoke else [])])
    torch.set_num_threads(settings.threads)
    benchmark, console = SinusoidBenchmark.build(settings), Console()
    probes: list[Record] = []
    outcomes: list[Record] = []
    folder = RunFolder(out)
    for training in TRAININGS:
        found, outcome = run(training, settings, benchmark, console)
        probes += found
        outcomes.append(outcome)
        folder.write_lines("metrics.jsonl", probes)
        folder.write_json("results.json", {o["training"]: o for o in outcomes})
    lam = settings.recipes["imaml"].lam
    text = table(probes, outcomes, lam, min(PROBE_TASKS, settings.test_tasks))
    folder.write("curvature.md", lambda path: path.write_text(text))
    folder.write("curvature.png", save_figure(draw(probes, outcomes, lam)))
    console.print(text, markup=False, soft_wrap=True)


if __name__ == "__main__":
    finish(main)
