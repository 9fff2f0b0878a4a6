"""The paper beside its own script: ``python -m reproduction.studies.authors_script``.

The paper (Rajeswaran et al. 2019) solves (I + H / lam) u = g at the solution of the proximal inner
problem, g the query gradient. The script at github.com/aravindr93/imaml_dev takes gradient steps
without a proximal term, then one along the term's own gradient, and solves
(2 I + H / (lam + 10)) u = g there. This program meta-trains on sinusoids for a while and measures
how far apart the two are, for H the Gauss-Newton matrix, which keeps both systems definite.
"""

import dataclasses
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch.func import grad, vmap

import hypergrad
from reproduction.method.episodes import Episodes, Params
from reproduction.method.inner import GaussNewtonSteps, GradientDescent, ProximalProblem, flatten
from reproduction.method.meta import MetaLearner
from reproduction.runs.command_line import OneLineParser, finish, whole
from reproduction.runs.experiment import build_meta_learner, run_experiment
from reproduction.runs.run_folder import RunFolder
from reproduction.runs.sinusoid import SinusoidBenchmark, read_command_line

EXTRA_IDENTITY, EXTRA_LAM = 1.0, 10.0
LAMBDAS = (0.1, 2.0)
STEPS, LR = 16, 0.01
TASKS, TASKS_SEED = 100, 20261124


@dataclasses.dataclass(frozen=True)
class PulledGradientDescent:
    """Gradient steps without the proximal term, and one along that term's gradient at the end.

    Parameters
    ----------
    steps
        Number of gradient steps.
    lr
        Step size, of the last step too.
    """

    steps: int
    lr: float

    def __call__(
        self, problem: ProximalProblem, centre: Params, first: Params | None = None
    ) -> Params:
        """Return the parameters after the pull."""
        params = GradientDescent(self.steps, self.lr, proximal=False)(problem, centre, first)
        pull = grad(problem.proximity)(params, centre)
        return {name: params[name] - self.lr * pull[name] for name in params}


def script_meta_gradient(learner: MetaLearner, meta: Params, task: Episodes) -> Params:
    """Compute a task's meta-gradient with the script's operator, 2 I + H / (lam + 10).

    It is the answer of a system with H + 2 (lam + 10) I for a matrix, so that the library solves
    it with another lam: (2 I + H / c)^-1 = c (H + 2 c I)^-1.

    Parameters
    ----------
    learner
        Its inner solver, and its lam, are used.
    meta
        The meta-parameters.
    task
        One task.

    Returns
    -------
    Params
        Shaped like `meta`.
    """
    adapted = learner.adapt(meta, task.support_x, task.support_y)
    c = learner.lam + EXTRA_LAM
    strong = dataclasses.replace(
        learner,
        inner_solver=lambda problem, centre, first=None: adapted,
        lam=(1 + EXTRA_IDENTITY) * c,
    )
    gradient, _ = strong.task_gradient(meta, task)  # 2 c (H + 2 c I)^-1 g
    return {name: leaf / (1 + EXTRA_IDENTITY) for name, leaf in gradient.items()}


def compare(learner: MetaLearner, meta: Params, tasks: Episodes) -> dict[str, tuple[float, float]]:
    """Measure the script's meta-gradients against the paper's, over tasks.

    Parameters
    ----------
    learner
        Its network, loss and lam are used; the paper's inner problem is solved by eight
        Gauss-Newton steps.
    meta
        The meta-parameters.
    tasks
        A batch.

    Returns
    -------
    dict of str to (float, float)
        Medians of the cosine and of the ratio of the lengths, for the script's operator at the
        paper's inner points, and at its own.
    """
    solved = dataclasses.replace(learner, inner_solver=GaussNewtonSteps(8))
    pulled = dataclasses.replace(learner, inner_solver=PulledGradientDescent(STEPS, LR))

    def measure(task: Episodes) -> dict[str, tuple[Tensor, Tensor]]:
        paper, _ = flatten(solved.task_gradient(meta, task)[0])
        found = {
            "operator alone": script_meta_gradient(solved, meta, task),
            "operator and inner steps": script_meta_gradient(pulled, meta, task),
        }
        flat = {name: flatten(gradient)[0] for name, gradient in found.items()}
        return {
            name: (paper @ v / (paper.norm() * v.norm()), v.norm() / paper.norm())
            for name, v in flat.items()
        }

    return {
        name: (cosine.median().item(), ratio.median().item())
        for name, (cosine, ratio) in vmap(measure)(tasks).items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Train for a while, compare, and write a table."""
    parser = OneLineParser(prog="authors_script", description="The paper against its script.")
    parser.add_argument("--seed", type=whole(0), default=0, help="of network and training tasks")
    parser.add_argument("--out", type=Path, help="output folder (default: runs/authors-script)")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    given = parser.parse_args(arguments)
    out = given.out or Path("runs", "authors-script")
    flags = ["--seed", str(given.seed), "--device", "cpu", "--out", str(out), "--compare"]
    settings = read_command_line([*flags, *(["--smoke"] if given.smoke else [])])
    benchmark, console = SinusoidBenchmark.build(settings), Console()
    outcomes, _ = run_experiment(settings, benchmark, console)
    trained = outcomes[settings.method].trained.params
    fresh = {n: p.detach() for n, p in benchmark.build_network().named_parameters()}
    count = min(TASKS, settings.test_tasks)
    tasks = benchmark.tasks.sample(count, torch.Generator().manual_seed(TASKS_SEED))
    learner = dataclasses.replace(
        build_meta_learner(settings, "imaml", benchmark),
        linear_solver=hypergrad.CG(maxiter=200, rtol=1e-6),
        clip=1e12,
    )
    lines = [
        "| network | lambda | figure | operator alone | operator and inner steps |",
        "| --- | --- | --- | --- | --- |",
    ]
    for network, params in (("fresh", fresh), ("trained", trained)):
        for lam in LAMBDAS:
            found = compare(
                dataclasses.replace(learner, lam=lam),
                {name: leaf.double() for name, leaf in params.items()},
                Episodes(*(part.double() for part in tasks)),
            )
            for figure, cells in zip(
                ("cosine", "ratio of lengths"), zip(*found.values(), strict=True), strict=True
            ):
                values = " | ".join(f"{cell:.2f}" for cell in cells)
                lines.append(f"| {network} | {lam:g} | {figure} | {values} |")
    text = "\n".join(lines) + "\n"
    RunFolder(out).write("authors_script.md", lambda path: path.write_text(text))
    console.print(text, markup=False, soft_wrap=True)


if __name__ == "__main__":
    finish(main)
