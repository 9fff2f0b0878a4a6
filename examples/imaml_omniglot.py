"""Implicit MAML on Omniglot, from top to bottom: ``python -m examples.imaml_omniglot``.

A task shows one drawing of each of five characters, and asks which of the five other drawings are.
A network of four convolutions turns drawings into features z. Each task fits a last layer phi of
its own to the few drawings that it is shown, close to a shared layer theta:

    inner   phi*(theta) = argmin over phi of  cross_entropy(z phi', y) + lam/2 ||phi - theta||^2
    outer   minimise over the convolutions, theta and log lam
                                              cross_entropy(queries phi*', their classes)

This is iMAML (Rajeswaran et al. 2019), with only the last layer adapted to a task. The inner
problem is then small and strongly convex, and Newton's method solves it exactly.
`hypergrad.custom_argmin` differentiates the solution by the implicit function theorem, whatever
steps led there. The linear solve never touches a convolution, since features are computed once.

The characters come from `reproduction.omniglot`, which checks the archives and makes the split.
Six minutes of one core:

    python -m examples.imaml_omniglot --data-dir FOLDER --download
    python -m examples.imaml_omniglot --smoke      # seconds; strokes drawn at random, no data
"""

import argparse
import math
import time
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn.functional import cross_entropy

import hypergrad
from reproduction.method.episodes import Episodes
from reproduction.omniglot.data import (
    draw_characters,
    load_omniglot,
    sample_tasks,
    split_characters,
    with_rotations,
)

NEWTON_STEPS = 12
STEP_SIZES = (1.0, 0.5, 0.2, 0.1, 0.03, 0.01, 1e-3, 0.0)


# The inner problem, written for one task: features z (S, d), classes y (S,), theta and phi (K, d).


def inner(phi: Tensor, z: Tensor, y: Tensor, theta: Tensor, lam: Tensor) -> Tensor:
    """Evaluate the inner objective."""
    return cross_entropy(z @ phi.T, y) + lam / 2 * (phi - theta).square().sum()


def solve(init: None, z: Tensor, y: Tensor, theta: Tensor, lam: Tensor) -> Tensor:
    """Solve the inner problem exactly, by Newton's method in the space of the outputs."""
    # Where the gradient is zero, phi = theta + alpha' z with S x K numbers alpha, for which
    # lam alpha + slope(outputs) = 0, outputs = z theta' + Q alpha and Q = z z'.
    Q, start = z @ z.T, z @ theta.T
    shape, n = start.shape, start.numel()
    truth = torch.eye(shape[1])[y]

    def gradient(alpha: Tensor) -> Tensor:
        return lam * alpha + (torch.softmax(start + Q @ alpha, -1) - truth) / len(y)

    def objective(alpha: Tensor) -> Tensor:
        return cross_entropy(start + Q @ alpha, y) + lam / 2 * (alpha * (Q @ alpha)).sum()

    alpha, sizes = torch.zeros(shape), torch.tensor(STEP_SIZES)
    for _ in range(NEWTON_STEPS):
        matrix = jacrev(gradient)(alpha).reshape(n, n)
        here = gradient(alpha)
        step = torch.linalg.solve(matrix, -here.reshape(n)).view(shape)
        values = vmap(lambda size: objective(alpha + size * step))(sizes)  # noqa: B023
        best = sizes.index_select(0, values.argmin(0, keepdim=True))
        # Near the solution the objective differs by rounding alone; the gradient still tells.
        halves = gradient(alpha + step).norm() < here.norm() / 2
        alpha = alpha + torch.where(halves, 1.0, best) * step
    return theta + alpha.T @ z


class Learner(nn.Module):
    """The meta-parameters: convolutions, the shared last layer theta, and log lam."""

    def __init__(self, ways: int, shots: int, channels: int = 64) -> None:
        """Make them."""
        super().__init__()
        layers: list[nn.Module] = []
        for k in range(4):
            convolution = nn.Conv2d(channels if k else 1, channels, 3, 2, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            # Statistics of the pictures in the call, at test time too, as in the papers.
            norm = nn.BatchNorm2d(channels, track_running_stats=False)
            layers += [convolution, norm, nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.theta = nn.Parameter(torch.randn(ways, 4 * channels + 1) / 16)
        self.log_lam = nn.Parameter(torch.tensor(3e-3).log())
        self.evidence: list[hypergrad.SolveInfo] = []  # of each solve: converged, or why not
        self.fit = hypergrad.custom_argmin(
            inner, solver=hypergrad.CG(), on_failure="ignore", callback=self.evidence.append
        )(solve)

    def lam(self) -> Tensor:
        """Return the strength of the pull to theta; a floor keeps the inner problem well posed."""
        return 3e-4 + self.log_lam.exp()

    def features(self, pictures: Tensor) -> Tensor:
        """Return the features of each task's pictures, of length about one; a one for the bias."""
        z = torch.stack([self.body(one) for one in pictures])
        z = z / math.sqrt(z.shape[-1])
        return torch.cat([z, torch.ones_like(z[..., :1])], -1)

    def forward(self, tasks: Episodes) -> Tensor:
        """Adapt to each task, and return the outputs for its queries."""
        lam = self.lam()
        z = self.features(tasks.support_x)
        phi = vmap(lambda z, y: self.fit(None, z, y, self.theta, lam))(z, tasks.support_y)
        outputs: Tensor = self.features(tasks.query_x) @ phi.mT
        return outputs


def accuracies(outputs: Tensor, tasks: Episodes) -> Tensor:
    """Return each task's share of correct answers."""
    return (outputs.argmax(-1) == tasks.query_y).float().mean(-1)


def evaluate(learner: Learner, batches: list[Episodes]) -> Tensor:
    """Return each task's accuracy."""
    with torch.no_grad():
        return torch.cat([accuracies(learner(tasks), tasks) for tasks in batches])


def train(
    learner: Learner, options: argparse.Namespace, characters: Tensor, validation: list[Episodes]
) -> list[tuple[float, float]]:
    """Meta-learn for so many minutes; return minutes and accuracy on the validation tasks."""
    others = [p for name, p in learner.named_parameters() if name != "log_lam"]
    groups = [{"params": others, "scale": 1.0}, {"params": [learner.log_lam], "scale": 5.0}]
    optimiser = torch.optim.Adam(groups)
    generator = torch.Generator().manual_seed(options.seed)
    used, step, curve = 0.0, 0, [(0.0, 1 / options.ways)]
    converged: list[Tensor] = []
    while True:
        done = max(used / (60 * options.minutes), step / options.meta_steps)
        if done >= 1 or (step and step % 200 == 0):
            accuracy = evaluate(learner, validation).mean().item()
            curve.append((used / 60, accuracy))
            print(
                f"{step:5} meta-steps, {used:4.0f} s: {100 * accuracy:.1f}% of validation queries; "
                f"lam {learner.lam():.1e}; solves converged: {torch.cat(converged).mean():.1%}"
            )
        if done >= 1:
            return curve
        began = time.process_time()
        for group in optimiser.param_groups:  # warm up, then along a cosine to zero
            rate = 5e-3 * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * done)) / 2
            group["lr"] = rate * group["scale"]
        tasks = sample_tasks(
            characters, tasks=options.tasks, ways=options.ways, shots=options.shots,
            queries=options.queries, generator=generator,
        )  # fmt: skip
        loss = cross_entropy(learner(tasks).flatten(0, 1), tasks.query_y.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        converged.append(learner.evidence.pop().success.float())  # one entry a task
        used, step = used + time.process_time() - began, step + 1


def draw_task(axes: Axes, tasks: Episodes, outputs: Tensor, ways: int) -> None:
    """Draw the first task: a row a class, what it was shown at the left, and its answers."""
    answers = outputs[0].argmax(-1).reshape(ways, -1)
    shots, queries = len(tasks.support_y[0]) // ways, answers.shape[1]
    sets = [(tasks.support_x[0], shots, 0.0), (tasks.query_x[0], queries, shots + 0.5)]
    for pictures, count, left in sets:
        for k, picture in enumerate(pictures):
            row, column = k // count, left + k % count
            place = (column, column + 0.95, row + 0.95, row)
            axes.imshow(1 - picture[0].numpy(), cmap="gray", extent=place)
    for row in range(ways):
        for k in range(queries):
            right = int(answers[row, k]) == row
            colour = "tab:green" if right else "tab:red"
            name = str(int(answers[row, k]))
            axes.text(shots + 0.55 + k, row + 0.25, name, color=colour, fontsize=8)
    axes.set(xlim=(0, shots + 0.5 + queries), ylim=(ways, 0), ylabel="class", xticks=[])
    axes.set_yticks([row + 0.5 for row in range(ways)], [str(row) for row in range(ways)])
    axes.set_title("an unseen task: shown (left), asked, with the answers")


def main() -> None:
    """Meta-learn, test on unseen characters, and draw."""
    parser = argparse.ArgumentParser(description="Implicit MAML of the last layer, on Omniglot.")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, processor time")
    parser.add_argument("--meta-steps", type=int, default=10**6, help="at most")
    parser.add_argument("--ways", type=int, default=5, help="characters of a task")
    parser.add_argument("--shots", type=int, default=1, help="drawings of each to adapt to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, help="default: the variable OMNIGLOT_DIR")
    parser.add_argument("--download", action="store_true", help="fetch archives that are missing")
    parser.add_argument("--smoke", action="store_true", help="a few meta-steps on random strokes")
    parser.add_argument("--picture", default="imaml_omniglot.png")
    options = parser.parse_args()
    options.tasks, options.queries = (8, 10) if options.ways <= 10 else (4, 5)
    options.meta_steps = min(options.meta_steps, 5) if options.smoke else options.meta_steps
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    if options.smoke:
        images = draw_characters(max(120, 17 * options.ways))
    else:
        images = load_omniglot(options.data_dir, download=options.download)
    split, count = split_characters(images), 20 if options.smoke else 600
    validation, test = (
        [
            sample_tasks(
                part, tasks=20, ways=options.ways, shots=options.shots,
                queries=max(1, 75 // options.ways), generator=torch.Generator().manual_seed(k),
            )
            for k in range(size // 20)
        ]
        for part, size in ((split.validation, count // 3 + 20), (split.test, count))
    )  # fmt: skip
    learner = Learner(options.ways, options.shots)
    curve = train(learner, options, with_rotations(split.train), validation)
    scores = 100 * evaluate(learner, test)
    strokes = "synthetic strokes (--smoke)" if options.smoke else "Omniglot"
    what = f"{strokes}, {options.ways}-way {options.shots}-shot, {curve[-1][0]:.1f} minutes"
    interval = 1.96 * scores.std() / len(scores) ** 0.5
    print(
        f"{what}, seed {options.seed}: {scores.mean():.2f} ± {interval:.2f} % of the queries of "
        f"{len(scores)} unseen tasks"
    )
    figure = Figure(figsize=(13, max(4.5, 0.4 * options.ways)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    left.plot([m for m, _ in curve], [100 * a for _, a in curve], "o-")
    left.axhline(100 / options.ways, color="0.6", linestyle="--", label="chance")
    left.set(xlabel="minutes of training (one core)", ylabel="accuracy on validation tasks, %")
    left.legend()
    with torch.no_grad():
        draw_task(right, test[0], learner(test[0]), options.ways)
    figure.suptitle(f"iMAML of the last layer: {what}, test {scores.mean():.1f}%", fontsize=13)
    figure.savefig(options.picture, dpi=120)
    print(f"Picture: {options.picture}")


if __name__ == "__main__":
    main()
