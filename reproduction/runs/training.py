"""The meta-training loop: Adam, progress on the terminal, and what is kept of a run."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from reproduction.method.episodes import Episodes, Params
from reproduction.method.learner import Learner
from reproduction.method.recorded import MetaGradient
from reproduction.runs.clock import Clock, clock_for
from reproduction.runs.interruption import Interrupted, Interruption
from reproduction.runs.ranks import Ranks, is_first
from reproduction.runs.resume import Keeping
from reproduction.runs.run_folder import RunFolder
from reproduction.runs.training_state import History, TrainingState

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
        Stop after so many seconds of meta-steps, validation left out, see `clock_for`. None: never.
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
        Time spent in them, see `clock_for`.
    """

    params: Params
    history: History
    steps: int
    seconds: float


def train(
    learner: Learner,
    start: Params,
    sample: Callable[[int], Episodes],
    validate: Callable[[Params], float],
    schedule: Schedule,
    folder: RunFolder,
    *,
    console: Console,
    figure: str,
    larger_is_better: bool = False,
    keeping: Keeping | None = None,
    ranks: Ranks | None = None,
    sink: Callable[[Mapping[str, float]], None] | None = None,
    compute: MetaGradient | None = None,
) -> Trained:
    """Meta-train, and keep `metrics.jsonl` and `timings.jsonl` up to date in `folder`.

    Nothing waits for the device inside a meta-step: figures are read at a validation.

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
    keeping
        Where checkpoints go, and what the training goes on from. None: it is not kept.
    ranks
        The processes that share each meta-step. None: this one alone.
    sink
        Is given each record too.
    compute
        The learner's meta-gradient in another form. None: as it is.

    Returns
    -------
    Trained
        Parameters and history.

    Raises
    ------
    TrainingFailed
        If a meta-gradient is not finite. The records up to there are kept.
    Interrupted
        After Ctrl-C, with the checkpoint written.
    """
    ranks, compute = ranks or Ranks(), compute or learner.meta_gradient
    state = TrainingState(start, keeping.generator if keeping else None)
    if keeping and keeping.resumed:
        state.load(keeping.resumed)
        _write_history(folder, state.history)
    ranks.begin(state.seconds)
    clock = Clock(state.device, clock_for(state.device, torch.get_num_threads()))
    sign = -1.0 if larger_is_better else 1.0
    seconds = state.seconds  # those of the first process
    done = schedule.progress(state.step, seconds)
    with _display(console) as display, Interruption() as interruption:
        bar = display.add_task(learner.method, total=1.0, figures="")
        display.update(bar, completed=done)
        while done < 1.0:
            clock.start()
            episodes = ranks.share(sample(schedule.tasks_per_step))
            gradient, measures = compute(state.params, episodes)
            gradient, figures = ranks.average(
                gradient, _average(measures), schedule.tasks_per_step,
                state.seconds, interruption.requested,
            )  # fmt: skip
            state.update(gradient, schedule.rate(state.step, done))
            state.means.add(figures)
            state.seconds += clock.stop()
            state.step += 1
            seconds, stop = ranks.agreed(state.seconds, interruption.requested)
            done = schedule.progress(state.step, seconds)
            display.update(bar, completed=done)
            validates = done >= 1.0 or state.step % schedule.validate_every == 0
            if validates:
                state.seconds += clock.synchronise()
                value = validate(state.params)
                state.history.records.append({
                    "step": state.step,
                    **state.means.take(),
                    "validation": value,
                })
                state.history.timings.append({
                    "step": state.step,
                    "seconds": round(state.seconds, 3),
                })
                _write_history(folder, state.history)
                if sink:
                    sink(state.history.records[-1])
                if state.history.records[-1]["not_finite"] or not math.isfinite(value):
                    raise TrainingFailed(_not_finite(learner, state.step))
                state.note_best(sign * value)
                display.update(bar, figures=f"{figure} {value:.3f} after {state.step} meta-steps")
            due = validates if not (keeping and keeping.every) else state.step % keeping.every == 0
            if keeping and (due or stop or done >= 1.0):
                state.seconds += clock.synchronise()
                if not state.is_finite():
                    raise TrainingFailed(_not_finite(learner, state.step))
                if is_first():
                    keeping.series.write(state.step, state.save(keeping.configuration))
            if stop:
                raise Interrupted(
                    f"interrupted after {state.step} meta-steps"
                    + ("; --resume auto goes on from there" if keeping else "")
                )
        if interruption.requested:  # during the last validation
            raise Interrupted(f"interrupted at the end of the training, {state.step} meta-steps")
    return Trained(state.best_params, state.history, state.step, seconds)


def _average(measures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Average over the tasks; a task without a finite gradient counts in "not_finite"."""
    missing = (~torch.isfinite(measures["gradient_norm"])).float().mean()
    means = {name: value.float().mean() for name, value in measures.items()}
    return {**means, "not_finite": missing}


def _not_finite(learner: Learner, step: int) -> str:
    return (
        f"{learner.method}: a meta-gradient was not finite before step {step}; "
        "try a smaller --inner-lr or --lr, or --curvature gauss-newton"
    )


def _write_history(folder: RunFolder, history: History) -> None:
    folder.write_lines("metrics.jsonl", history.records)
    folder.write_lines("timings.jsonl", history.timings)


def _display(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>6}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
    )
