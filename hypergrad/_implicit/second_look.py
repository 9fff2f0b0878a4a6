"""A second look at a solution, one inner Newton step further on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..solvers._vectors import norm
from .linearisation import Linearisation

_PART = 64.0  # of a Newton step, along which a smooth condition hardly changes
_JUMP = 0.25  # the relative change there that only rounding makes


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


def is_noise(lin: Linearisation, step: Tensor) -> Tensor:
    """Say whether the inner condition is mere rounding, so that no step can make it smaller.

    Parameters
    ----------
    lin : Linearisation
        The condition at the solution.
    step : Tensor
        The inner Newton step, ``(*tasks, n)``.

    Returns
    -------
    noise : Tensor
        bool, for each task.
    """
    try:
        there = lin.at(shifted(lin, lin.tensors, step / _PART)).residual
    except Exception:  # the user's function does not like what it gets there
        return torch.zeros(step.shape[:-1], dtype=torch.bool, device=step.device)
    return norm(there - lin.residual) > _JUMP * norm(lin.residual)
