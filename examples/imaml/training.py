"""The meta-training loop: Adam, progress on the terminal, and what is kept of a run."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from examples.imaml.episodes import Episodes, Params
from examples.imaml.meta import MetaLearner
from examples.imaml.run_folder import RunFolder

WARM_UP_STEPS = 20


class TrainingFailed(RuntimeError):
    """A meta-gradient was not finite."""


@dataclass(frozen=True)
class Schedule:
    """How long to train, and at which rate.

    Parameters
    ----------
    meta_steps
        At most so many meta-steps.
    time_budget
        Stop after so many seconds of meta-steps, validation left out. None: never.
    tasks_per_step
        Tasks in a meta-step.
    lr
        The rate of Adam, reached after `WARM_UP_STEPS`; it falls to zero along a cosine.
    validate_every
        Meta-steps between two validations.
    """

    meta_steps: int
    time_budget: float | None
    tasks_per_step: int
    lr: float
    validate_every: int

    def progress(self, step: int, seconds: float) -> float:
        """Return the share of the run that is done, from 0 to 1."""
        by_time = seconds / self.time_budget if self.time_budget else 0.0
        return min(1.0, max(step / self.meta_steps, by_time))

    def rate(self, step: int, progress: float) -> float:
        """Return the learning rate of a meta-step, at this share of the run."""
        warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
        return warm_up * self.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass
class History:
    """What a run has measured so far."""

    records: list[dict[str, float]] = field(default_factory=list)
    """One a validation: same seed, same numbers on the CPU."""
    timings: list[dict[str, float]] = field(default_factory=list)
    """Beside each record, the seconds of meta-steps so far."""

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Return the seconds and the values of one figure."""
        return [t["seconds"] for t in self.timings], [r[name] for r in self.records]


@dataclass(frozen=True)
class Trained:
    """The outcome of a run.

    Parameters
    ----------
    params
        The meta-parameters that were best on the validation tasks.
    history
        What was measured on the way.
    steps
        Meta-steps taken.
    seconds
        Time spent in them.
    """

    params: Params
    history: History
    steps: int
    seconds: float


def train(
    learner: MetaLearner,
    start: Params,
    sample: Callable[[int], Episodes],
    validate: Callable[[Params], float],
    schedule: Schedule,
    folder: RunFolder,
    *,
    console: Console,
    figure: str,
    larger_is_better: bool = False,
) -> Trained:
    """Meta-train, and keep `metrics.jsonl` and `timings.jsonl` up to date in `folder`.

    Parameters
    ----------
    learner
        Where the meta-gradients come from.
    start
        The initial meta-parameters.
    sample
        Draws a batch of that many training tasks.
    validate
        The figure on the validation tasks.
    schedule
        How long, and at which rate.
    folder
        Where the records go.
    console
        Where progress is shown.
    figure
        What `validate` returns, in words.
    larger_is_better
        Whether it is to rise.

    Returns
    -------
    Trained
        Parameters and history.

    Raises
    ------
    TrainingFailed
        If a meta-gradient is not finite. The records up to there are kept.
    """
    params = {name: leaf.detach().clone() for name, leaf in start.items()}
    optimiser = torch.optim.Adam(list(params.values()), lr=schedule.lr)
    clock, history, sums = _Clock(params), History(), _Means()
    sign = -1.0 if larger_is_better else 1.0
    best, best_params = math.inf, params
    step = 0
    with _display(console) as display:
        bar = display.add_task(learner.method, total=1.0, figures="")
        while (done := schedule.progress(step, clock.seconds)) < 1.0:
            clock.start()
            optimiser.param_groups[0]["lr"] = schedule.rate(step, done)
            gradient, measures = learner.meta_gradient(params, sample(schedule.tasks_per_step))
            for name, leaf in params.items():
                leaf.grad = gradient[name]
            optimiser.step()
            sums.add(measures)
            clock.stop()
            step += 1
            done = schedule.progress(step, clock.seconds)
            display.update(bar, completed=done)
            if done < 1.0 and step % schedule.validate_every:
                continue
            clock.synchronise()
            value = validate(params)
            history.records.append({"step": step, **sums.take(), "validation": value})
            history.timings.append({"step": step, "seconds": round(clock.seconds, 3)})
            folder.write_lines("metrics.jsonl", history.records)
            folder.write_lines("timings.jsonl", history.timings)
            if history.records[-1]["not_finite"] or not math.isfinite(value):
                raise TrainingFailed(
                    f"{learner.method}: a meta-gradient was not finite before step {step}; "
                    "try a smaller --inner-lr or --lr, or --curvature gauss-newton"
                )
            if sign * value < best:
                best = sign * value
                best_params = {name: leaf.detach().clone() for name, leaf in params.items()}
            display.update(bar, figures=f"{figure} {value:.3f} after {step} meta-steps")
    return Trained(best_params, history, step, clock.seconds)


class _Clock:
    """Seconds spent in meta-steps, the device's own work included."""

    def __init__(self, params: Params) -> None:
        self.seconds = 0.0
        self._device = next(iter(params.values())).device
        self._began = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self._began

    def synchronise(self) -> None:
        if self._device.type == "cuda":
            self.start()
            torch.cuda.synchronize(self._device)
            self.stop()


class _Means:
    """Averages over tasks and meta-steps, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, measures: dict[str, Tensor]) -> None:
        missing = (~torch.isfinite(measures["gradient_norm"])).float().mean()
        means = {name: value.float().mean() for name, value in measures.items()}
        for name, value in {**means, "not_finite": missing}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1

    def take(self) -> dict[str, float]:
        means = {name: (total / self._steps).item() for name, total in self._sums.items()}
        self._sums, self._steps = {}, 0
        return means


def _display(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>6}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
    )
