"""How a `Bilevel` makes a step: what all methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from .._errors import UnsupportedOperation
from .._mistakes import Fields
from ..solvers._fields import at_least, finite

if TYPE_CHECKING:
    from ._levels import Levels
    from ._step_info import StepInfo

State = dict[str, Any]


class Method(Fields, ABC):
    """A way to make one step of the outer problem, as a value: frozen and printable."""

    @abstractmethod
    def start(self, levels: Levels) -> State:
        """What the method remembers from step to step, before the first: tensors and numbers."""

    @abstractmethod
    def step(self, levels: Levels) -> StepInfo:
        """Make one outer step."""


def decayed(exponent: float, steps: int) -> float:
    """What a learning rate is multiplied by after so many steps: ``(steps + 1) ** -exponent``."""
    return float((steps + 1) ** -exponent)


def linear_rate(
    method: Method, given: float | None, levels: Levels, field: str = "linear_lr"
) -> float:
    """A learning rate of the method: the inner optimiser's own where none is given.

    Parameters
    ----------
    method : Method
        Whose it is.
    given : float, optional
        The value of its field.
    levels : Levels
        The problem.
    field : str
        What the field is called.

    Returns
    -------
    rate : float
        The learning rate, before any decay.

    Raises
    ------
    UnsupportedOperation
        If it must be given: the inner optimiser is not plain gradient descent.
    """
    if given is not None:
        return given
    groups = levels.inner_optimizer.param_groups
    rates = {float(group["lr"]) for group in groups}
    if type(levels.inner_optimizer) is not torch.optim.SGD or len(rates) != 1:
        name = type(method).__name__
        raise UnsupportedOperation(
            f"{name} takes the learning rate of the inner optimiser for its own steps, which means "
            f"something for torch.optim.SGD with a single rate alone. Pass {name}({field}=...), "
            "below 2 divided by the largest eigenvalue of the inner Hessian."
        )
    return rates.pop()


def check_decays(**exponents: float) -> None:
    """Refuse exponents that are negative or no numbers."""
    for name, value in exponents.items():
        finite(name, value)
        at_least(name, value, 0.0)


def check_rate(name: str, value: float | None) -> None:
    """Refuse a learning rate that is not positive."""
    if value is not None:
        finite(name, value)
        if value <= 0:
            raise ValueError(f"{name} must be positive; got {value!r}.")
