"""AmIGO: amortised inner and linear loops, both started where they left off."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..solvers._fields import positive
from ._levels import Levels, minus
from ._method import Decaying, State, checked, exponent, least
from ._step_info import StepInfo


class DoubleLoop(Decaying):
    """A method of some inner steps, then products with A, then one outer step.

    Every inner step and every product has an inner batch of its own, and so has the cross
    derivative.

    Attributes
    ----------
    inner_steps : int
        The steps of the inner optimiser.
    called : str
        What the solution is called where it is not finite.
    """

    inner_steps: int
    called: ClassVar[str] = "the linear system"

    @abstractmethod
    def solved(self, levels: Levels, by_params: Tensor, rate: float) -> Tensor:
        """Take a vector for ``A^-1 d outer / d params``."""

    def step(self, levels: Levels) -> StepInfo:
        """Make one outer step."""
        inner, outer = self.decays(levels)
        rate = self.rate(levels)
        condition = levels.inner_steps(self.inner_steps, inner)
        value, by_params, direct = levels.outer_slopes(levels.outer_batch())
        u = self.solved(levels, by_params, rate)
        grads = minus(direct, levels.cross(levels.inner_batch(), u))
        info = levels.outer_step(
            grads, value, condition, self.inner_steps, factor=outer, finite={self.called: u}
        )
        if "u" in levels.state:
            levels.state["u"] = u
        return info


@dataclasses.dataclass(frozen=True)
class AmIGO(DoubleLoop):
    """Amortised implicit gradient optimisation (Arbel and Mairal, 2022).

    Each step makes `inner_steps` stochastic gradient steps on the inner problem, then
    `linear_steps` of them on ``A u = d outer / d params``. Each has an inner batch of its own, and
    all have one outer batch. One outer step follows, with the cross derivative of a last inner
    batch. Both loops start where they left off.

    Parameters
    ----------
    inner_steps, linear_steps : int
        How many steps each loop makes.
    linear_lr : float, optional
        The learning rate of the linear system. None: that of the inner optimiser, which must then
        be a plain `torch.optim.SGD`.
    inner_decay, outer_decay : float
        The exponents of the learning rates, which are constant in the paper.

    References
    ----------
    Arbel and Mairal, Amortized implicit differentiation for stochastic bilevel optimization, ICLR
    2022, algorithms 1 to 3.

    Examples
    --------
    >>> import hypergrad
    >>> hypergrad.AmIGO(inner_steps=5)
    AmIGO(inner_steps=5, linear_steps=10, linear_lr=None, inner_decay=0.0, outer_decay=0.0)
    """

    inner_steps: int = checked(10, least(1))
    linear_steps: int = checked(10, least(1))
    linear_lr: float | None = checked(None, positive)
    inner_decay: float = exponent(0.0)
    outer_decay: float = exponent(0.0)

    def start(self, levels: Levels) -> State:
        """Start the running solution of the linear system."""
        return {"u": levels.zeros()}

    def solved(self, levels: Levels, by_params: Tensor, rate: float) -> Tensor:
        """Make some steps of gradient descent, from the last outer step's solution."""
        u, rate = levels.state["u"], rate * self.decays(levels)[0]
        for _ in range(self.linear_steps):
            u = torch.sub(u, levels.product(levels.inner_batch(), u) - by_params, alpha=rate)
        return u
