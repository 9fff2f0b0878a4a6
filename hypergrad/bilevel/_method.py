"""How a `Bilevel` makes a step: the base of all methods."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
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
    """A way to make one step of the outer problem, as a value: frozen and printable.

    A method of one's own is a frozen dataclass with the function `step`, and with `start` where it
    remembers something. It works with the `Levels` that it is given, and keeps nothing itself: one
    method may serve several loops.

    Notes
    -----
    `step` may rely on the following.

    - It is called outside of `torch.func` transforms, with gradients enabled and outside of
      inference mode.
    - ``levels.state`` is what `start` returned, or what the last step left there. It is saved and
      restored with the loop, so that it may hold tensors, numbers, text, and lists and dicts of
      them. A restored state has the structure, shapes and dtypes of the one that is there.
    - ``levels.steps`` outer steps have been made, and nothing else moves the variables.

    It has to move both levels: the inner variables by `Levels.inner_step`, `Levels.inner_steps` or
    `Levels.move_inner`, the hyperparameters once by `Levels.outer_step` or `Levels.move_outer`. It
    has to return a `StepInfo`, which `Levels.outer_step` and `Levels.record` make. Nothing is to
    be moved after a number that is not finite (`Levels.require_finite`). Its warnings are issued
    once a run.

    Examples
    --------
    One inner step, and a rate times the identity in place of the inverse of the inner Hessian:

    >>> import dataclasses, torch, hypergrad
    >>> from hypergrad.bilevel import Method
    >>> @dataclasses.dataclass(frozen=True)
    ... class OneStep(Method):
    ...     lr: float = 0.5
    ...
    ...     def step(self, levels):
    ...         condition = levels.inner_steps(1)
    ...         value, by_params, direct = levels.outer_slopes(levels.outer_batch())
    ...         cross = levels.cross(levels.inner_batch(), self.lr * by_params)
    ...         grads = [d - c for d, c in zip(direct, cross, strict=True)]
    ...         return levels.outer_step(grads, value, condition)
    >>> loop = hypergrad.Bilevel(
    ...     lambda w, t: ((w - 3) ** 2).sum(), lambda w, t: ((w - 2 * t) ** 2).sum(),
    ...     torch.zeros(2), torch.zeros(2),
    ...     inner_optimizer=lambda v: torch.optim.SGD(v, lr=0.4),
    ...     outer_optimizer=lambda v: torch.optim.SGD(v, lr=0.1),
    ...     method=OneStep(),
    ... )
    >>> for _ in range(60):
    ...     info = loop.step()
    >>> loop.hparams  # w = 2 t is to be 3
    tensor([1.5000, 1.5000])
    """

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        itself: Any = self
        for field in dataclasses.fields(itself):
            for check in field.metadata.get("checks", ()):
                check(field.name, getattr(self, field.name))

    def start(self, levels: Levels) -> State:
        """Start what the method remembers from step to step: nothing here."""
        return {}

    @abstractmethod
    def step(self, levels: Levels) -> StepInfo:
        """Make one outer step."""


class Decaying(Method):
    """A method whose learning rates decay with the outer steps.

    Attributes
    ----------
    inner_decay, outer_decay : float
        The exponents of the learning rates of both levels.
    """

    inner_decay: float
    outer_decay: float

    def decays(self, levels: Levels) -> tuple[float, float]:
        """Compute the factor of both learning rates now: ``(steps + 1) ** -exponent``."""
        after = levels.steps + 1
        return float(after**-self.inner_decay), float(after**-self.outer_decay)

    def rate(self, levels: Levels, field: str = "linear_lr", share: float = 1.0) -> float:
        """Choose a learning rate of the method: a share of the inner optimiser's where none is set.

        Parameters
        ----------
        levels : Levels
            The problem.
        field : str
            What the rate is called.
        share : float
            What the inner optimiser's is multiplied by.

        Returns
        -------
        rate : float
            The learning rate, before any decay.

        Raises
        ------
        UnsupportedOperation
            If it must be set: the inner optimiser is not plain gradient descent.
        """
        value: float | None = getattr(self, field)
        if value is not None:
            return value
        rates = {float(group["lr"]) for group in levels.inner_optimizer.param_groups}
        if type(levels.inner_optimizer) is not torch.optim.SGD or len(rates) != 1:
            name = type(self).__name__
            raise UnsupportedOperation(
                f"{name} takes the learning rate of the inner optimiser for its own steps, which "
                "means something for torch.optim.SGD with a single rate alone. Pass "
                f"{name}({field}=...), below 2 divided by the largest eigenvalue of the inner "
                "Hessian."
            )
        return share * rates.pop()


def checked(default: Any, *checks: Callable[[str, Any], None]) -> Any:
    """Make a field whose value is looked at when the method is made: ``check(name, value)``."""
    return dataclasses.field(default=default, metadata={"checks": checks})


def least(bound: float) -> Callable[[str, Any], None]:
    """Make the check that a number is at least a bound, or None."""
    return functools.partial(at_least, bound=bound)


def exponent(default: float) -> Any:
    """Make a field that is an exponent of a learning rate: finite, and not negative."""
    return checked(default, finite, least(0.0))
