"""The step along a descent direction."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .._autograd.host import any_task
from ._evaluator import Evaluator
from ._numbers import dot, norm
from ._progress import Progress

_DECREASE = 1e-4  # of the value, as a part of what the slope promises
_TRIALS = 40


@dataclasses.dataclass
class Step:
    """Where a line search has led; the old point where it has found nothing."""

    x: Tensor
    value: Tensor
    gradient: Tensor
    length: Tensor
    found: Tensor


def backtrack(
    evaluator: Evaluator,
    progress: Progress,
    x: Tensor,
    value: Tensor,
    gradient: Tensor,
    direction: Tensor,
    length: Tensor,
    reference: Tensor | None = None,
) -> Step:
    """Shorten a step until the objective has decreased enough (Armijo's rule).

    Where the decrease is lost in rounding, the slope decides: the approximate Wolfe condition of
    Hager and Zhang, A new conjugate gradient method with guaranteed descent and an efficient line
    search, 2005.

    Parameters
    ----------
    evaluator, progress : Evaluator, Progress
        The problem, and its active tasks.
    x, value, gradient : Tensor
        The point, and the objective there.
    direction : Tensor
        A direction of descent.
    length : Tensor
        The first length to try.
    reference : Tensor, optional
        The value that is to be decreased, in place of `value`.

    Returns
    -------
    step : Step
        The first that will do.
    """
    slope = dot(gradient, direction)
    noise = 4 * torch.finfo(progress.precision).eps * value.abs()
    searching = progress.active & (slope < 0)
    below = value if reference is None else reference
    taken = Step(x, value, gradient, length, torch.zeros_like(searching))
    for _ in range(_TRIALS):
        if not any_task(searching):
            break
        trial = x + length * direction
        new_value, new_gradient = evaluator.objective(trial)
        progress.evaluated(searching)
        decreased = new_value <= below + _DECREASE * length * slope
        level = (new_value <= value + noise) & (
            dot(new_gradient, direction) <= (2 * _DECREASE - 1) * slope
        )
        sound = torch.isfinite(new_value) & torch.isfinite(norm(new_gradient))
        # A value of minus infinity is taken, for it says that there is no minimum.
        fine = searching & ((sound & (decreased | level)) | (new_value == -torch.inf))
        taken = Step(
            torch.where(fine, trial, taken.x),
            torch.where(fine, new_value, taken.value),
            torch.where(fine, new_gradient, taken.gradient),
            torch.where(fine, length, taken.length),
            taken.found | fine,
        )
        searching = searching & ~fine
        # The minimum of the parabola through both values, within reason.
        bend = 2 * (new_value - value - length * slope)
        guess = -slope * length * length / bend
        usable = torch.isfinite(guess) & (bend > 0)
        guess = torch.where(usable, guess, length / 2)
        guess = torch.minimum(torch.maximum(guess, length / 10), length / 2)
        length = torch.where(searching, guess, length)
    return taken
