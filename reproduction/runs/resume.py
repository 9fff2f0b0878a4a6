"""What a training goes on from: found, compared with what is asked for, or refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from rich.console import Console

from reproduction.runs.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from reproduction.runs.checkpoint_series import CheckpointSeries

ResumePoint: TypeAlias = Path | Literal["auto"] | None


class Refused(RuntimeError):
    """What the command line asks for does not fit what lies in the folder."""


@dataclass(frozen=True)
class Keeping:
    """How a training is kept.

    Parameters
    ----------
    series
        Where its checkpoints go.
    configuration
        What they say it was started with.
    generator
        What draws its tasks.
    every
        Meta-steps between two checkpoints; None: one at each validation.
    resumed
        What it goes on from.
    """

    series: CheckpointSeries
    configuration: dict[str, Any]
    generator: torch.Generator
    every: int | None
    resumed: Checkpoint | None


def find(
    point: ResumePoint,
    series: CheckpointSeries,
    configuration: dict[str, Any],
    console: Console,
    *,
    force: bool,
) -> Checkpoint | None:
    """Find the checkpoint that a training is to go on from.

    Parameters
    ----------
    point
        A file, or 'auto' for the newest good one of the series, or None for a new beginning.
    series
        The checkpoints of the training.
    configuration
        What is asked for now, from `configuration.describe`.
    console
        Where it is said what was found.
    force
        Go on although the configuration is another one.

    Returns
    -------
    Checkpoint or None
        None for a training from the beginning.

    Raises
    ------
    CheckpointError
        If the file, or each file of the series, is damaged.
    Refused
        If the configuration is another one.
    """
    if point is None:
        return None
    complaints: list[str] = []
    if point == "auto":
        found, complaints = series.read_newest()
    else:
        found = read_checkpoint(point)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for complaint in complaints:
        say(f"{complaint}; the one before it is used")
    if found is None:
        say(f"no checkpoint in {series.path}: starting at the beginning")
        return None
    changed = differences(found.configuration, configuration)
    if changed and not force:
        raise Refused(
            "the checkpoint is of a run with another configuration; --force goes on all the same:"
            + "".join(f"\n  {line}" for line in changed)
        )
    step = found.figures.get("step")
    if not isinstance(step, int):
        raise CheckpointError("the checkpoint holds no training: it has no step")
    say(f"going on after {step} meta-steps")
    for line in changed:
        say(f"  although {line}")
    return found


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each value that is not the same.

    Parameters
    ----------
    before, now
        From `configuration.describe`.

    Returns
    -------
    list of str
        Name, value before and value now.
    """
    names = sorted({*before, *now})
    missing = "not there"
    return [
        f"{name}: {before.get(name, missing)} in the checkpoint, {now.get(name, missing)} now"
        for name in names
        if before.get(name, missing) != now.get(name, missing)
    ]
