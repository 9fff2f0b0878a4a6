"""Meta-learn sinusoid regression: ``python -m examples.imaml.sinusoid``.

The problem is that of Finn et al. 2017, section 5.1. Without flags this trains iMAML, then
first-order and unrolled MAML for the same time, and ends with a table and a picture.
"""

from dataclasses import dataclass, replace

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn
from torch.func import vmap

from reproduction.method.episodes import Episodes, Params
from reproduction.method.head_newton import OutputLoss, SquaredError
from reproduction.method.learner import Learner
from reproduction.method.models import SinusoidMLP
from reproduction.method.sinusoid_tasks import SinusoidTasks
from reproduction.method.systems import SYSTEMS, Method, Recipe
from reproduction.runs.command_line import Settings, finish, make_parser, read_settings
from reproduction.runs.experiment import run_experiment
from reproduction.runs.ranks import is_first
from reproduction.runs.reporting import (
    Outcome,
    budget,
    draw_learning_curves,
    print_table,
    save_figure,
)
from reproduction.runs.run_folder import RunFolder

VALIDATION_SEED, TEST_SEED = 20170101, 20261123
VALIDATION_TASKS, GRID = 100, 100

# How these were found: reproduction/README.md.
IMPLICIT = Recipe(
    "gauss-newton", inner_steps=3, inner_lr=0.01, lam=0.1, lr=0.02, tasks_per_step=25, cg_steps=20
)
PUBLISHED = replace(IMPLICIT, inner_solver="gradient-descent", inner_steps=5, lr=0.01)
SIXTEEN = replace(PUBLISHED, inner_steps=16, inner_lr=0.005, lam=0.5)
RECIPES: dict[Method, Recipe] = {
    "imaml-head": replace(IMPLICIT, inner_solver="newton", inner_steps=1, lam=0.01, lr=0.01),
    "imaml": replace(IMPLICIT, compile=True),
    "imaml-gd": SIXTEEN,
    "imaml-neumann": replace(SIXTEEN, compile=True),
    "imaml-hf": replace(IMPLICIT, inner_solver="hessian-free", compile=True),
    "maml": PUBLISHED,
    "maml-nesterov": replace(PUBLISHED, inner_solver="nesterov"),
    "truncated": SIXTEEN,
    "fomaml": replace(IMPLICIT, lr=0.01),
    "reptile": SIXTEEN,
}


@dataclass(frozen=True)
class SinusoidBenchmark:
    """Sinusoid regression, judged by the squared error at even points of [-5, 5]."""

    tasks: SinusoidTasks
    validation: Episodes
    held_out: Episodes
    figure: str = "validation error"
    larger_is_better: bool = False

    @classmethod
    def build(cls, settings: Settings) -> "SinusoidBenchmark":
        """Draw the validation and test tasks, which no seed of a run changes."""
        tasks = SinusoidTasks(settings.shots, settings.queries)

        def draw(count: int, seed: int) -> Episodes:
            generator = torch.Generator(settings.device).manual_seed(seed)
            return tasks.sample_for_test(count, generator, GRID)

        count = min(VALIDATION_TASKS, settings.test_tasks)
        return cls(tasks, draw(count, VALIDATION_SEED), draw(settings.test_tasks, TEST_SEED))

    @property
    def head_loss(self) -> OutputLoss:
        """The loss, with its derivatives in the outputs."""
        return SquaredError()

    def build_network(self) -> nn.Module:
        """Make the network 1-40-40-1."""
        return SinusoidMLP()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error."""
        return self.head_loss(outputs, targets)

    def sample(self, tasks: int, generator: torch.Generator) -> Episodes:
        """Draw training tasks."""
        return self.tasks.sample(tasks, generator)

    def validate(self, learner: Learner, params: Params) -> float:
        """Return the mean error after adaptation to the validation tasks."""
        return _errors(learner.predict(params, self.validation), self.validation).mean().item()

    def test(self, learner: Learner, params: Params) -> dict[str, Tensor]:
        """Return each test task's error before and after adaptation."""
        before = vmap(learner.model, in_dims=(None, 0))(params, self.held_out.query_x)
        after = learner.predict(params, self.held_out)
        return {
            "before": _errors(before, self.held_out),
            "after": _errors(after, self.held_out),
        }


def draw(
    outcomes: dict[Method, Outcome],
    learner: Learner,
    benchmark: SinusoidBenchmark,
    *,
    tasks: int = 3,
) -> Figure:
    """Draw a few test tasks before and after adaptation, and the learning curves.

    Parameters
    ----------
    outcomes
        The runs, that of `learner` among them.
    learner
        Whose predictions are drawn.
    benchmark
        The tasks.
    tasks
        How many test tasks.

    Returns
    -------
    Figure
        The picture.
    """
    params = outcomes[learner.method].trained.params
    tasks = min(tasks, len(benchmark.held_out.query_x))
    shown = Episodes(*(part[:tasks].cpu() for part in benchmark.held_out))
    first = Episodes(*(part[:tasks] for part in benchmark.held_out))
    before = vmap(learner.model, in_dims=(None, 0))(params, first.query_x).cpu()
    after = learner.predict(params, first).cpu()
    figure = Figure(figsize=(10, 8), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    for k, axes in enumerate(panels[:tasks]):
        axes.sharey(panels[0])
        x = shown.query_x[k, :, 0].numpy()
        axes.plot(x, shown.query_y[k, :, 0].numpy(), color="0.6", linewidth=3, label="target")
        axes.plot(x, before[k, :, 0].numpy(), "--", color="tab:orange", label="before adaptation")
        axes.plot(x, after[k, :, 0].numpy(), color="tab:blue", label="after adaptation")
        axes.plot(
            shown.support_x[k, :, 0].numpy(), shown.support_y[k, :, 0].numpy(),
            "^", color="tab:red", label=f"{shown.support_x.shape[1]} points",
        )  # fmt: skip
        axes.set_title(f"unseen sinusoid {k + 1}")
        axes.set(xlabel="x", ylabel="y")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    draw_learning_curves(panels[-1], outcomes, f"mean squared {benchmark.figure}")
    panels[-1].set_yscale("log")
    trained = outcomes[learner.method].trained
    figure.suptitle(f"Sinusoids, {SYSTEMS[learner.method].name}: {budget(trained)}", fontsize=14)
    return figure


def read_command_line(arguments: list[str] | None = None) -> Settings:
    """Read the settings of a run from the command line."""
    parser = make_parser(
        "sinusoid",
        "Meta-learn sinusoid regression with implicit MAML and the systems beside it.",
        {
            "compare": ["fomaml", "maml"],
            "shots": 10,
            "queries": 20,
            "meta_steps": 700,
            "validate_every": 25,
        },
    )
    return read_settings(parser, RECIPES, "sinusoid", arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train, test, and write table and picture."""
    settings, console = read_command_line(arguments), Console(quiet=not is_first())
    benchmark = SinusoidBenchmark.build(settings)
    outcomes, learners = run_experiment(settings, benchmark, console)
    picture = draw(outcomes, learners[settings.method], benchmark)
    path = RunFolder(settings.out).write("sinusoid.png", save_figure(picture))
    print_table(
        console,
        f"Mean squared error on {settings.test_tasks} unseen sinusoids at {GRID} points, "
        f"before\nand after adaptation to {settings.shots} shots (mean and 95% interval)",
        outcomes,
    )
    console.print(f"Picture: {path}", soft_wrap=True)


def _errors(outputs: Tensor, episodes: Episodes) -> Tensor:
    return (outputs - episodes.query_y).square().flatten(1).mean(1)


if __name__ == "__main__":
    finish(main)
