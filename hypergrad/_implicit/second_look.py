"""A second look at a solution, one inner Newton step further on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .._autograd.host import any_task
from ..solvers._vectors import dot, norm
from .linearisation import Linearisation

_PART = 64.0  # of a Newton step, along which a smooth condition hardly changes
_JUMP = 0.25  # the relative change there that only rounding and kinks make
_PLACES = 8  # at which it is looked at, where it changes by so much


@dataclasses.dataclass(frozen=True)
class SecondLook:
    """The changes at ``params - step``.

    Attributes
    ----------
    change : Tensor
        The change of the hypergradient, relative to it, for each task.
    bent : Tensor
        The inner condition there, but for what a straight one would have left: ``(*tasks, n)``.
    """

    change: Tensor
    bent: Tensor


def shifted(lin: Linearisation, tensors: Sequence[Tensor], step: Tensor) -> list[Tensor]:
    """Move the inner variables, among the problem's tensors, back along a flat step."""
    moved = list(tensors)
    for place, part in zip(lin.problem.inner, lin.layout.split(step), strict=True):
        moved[place] = tensors[place] - part.reshape(tensors[place].shape)
    return moved


def look_near(lin: Linearisation, step: Tensor) -> tuple[Tensor, Tensor]:
    """Look whether the inner condition is mere rounding, or jumps at a kink, beside the solution.

    No step makes either smaller. Rounding is another one wherever it is looked at; behind a kink
    the condition is as smooth as before it.

    Parameters
    ----------
    lin : Linearisation
        The condition at the solution.
    step : Tensor
        The inner Newton step, ``(*tasks, n)``.

    Returns
    -------
    rounding, kink : Tensor
        bool, for each task.
    """
    F, size = lin.residual, norm(lin.residual)
    changes = torch.zeros_like(size)

    def at(part: float) -> Tensor:
        return lin.at(shifted(lin, lin.tensors, step * part)).residual

    def differ(here: Tensor, there: Tensor) -> Tensor:
        return norm(here - there) > _JUMP * size

    none = torch.zeros_like(size, dtype=torch.bool)
    try:
        there = at(1 / _PART)
        changed = differ(F, there)
        if not any_task(changed):
            return none, none
        for i in reversed(range(_PLACES)):
            here = at(i / (_PLACES * _PART)) if i else F
            changes = changes + differ(here, there)
            beside, there = there, here
    except Exception:  # the user's function does not like what it gets there
        return none, none
    rounding = changes >= _PLACES / 2
    # A minimum that lies on a kink has no way down: the slope along the step turns round.
    kink = differ(F, beside) & (dot(beside, step) * dot(F, step) <= 0)
    return changed & rounding, changed & ~rounding & kink
