"""AmIGO: amortised inner and linear loops, both started where they left off."""

from __future__ import annotations

import dataclasses

import torch

from ..solvers._fields import at_least
from ._levels import Levels
from ._method import Method, State, check_decays, check_rate, decayed, linear_rate
from ._step_info import StepInfo


@dataclasses.dataclass(frozen=True)
class AmIGO(Method):
    """Amortised implicit gradient optimisation (Arbel and Mairal, 2022).

    Each step makes `inner_steps` stochastic gradient steps on the inner problem, then
    `linear_steps` of them on ``A u = d outer / d params``, each with an inner batch of its own
    and all with one outer batch, and one outer step with the cross derivative of a last inner
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

    inner_steps: int = 10
    linear_steps: int = 10
    linear_lr: float | None = None
    inner_decay: float = 0.0
    outer_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        at_least("inner_steps", self.inner_steps, 1)
        at_least("linear_steps", self.linear_steps, 1)
        check_rate("linear_lr", self.linear_lr)
        check_decays(inner_decay=self.inner_decay, outer_decay=self.outer_decay)

    def start(self, levels: Levels) -> State:
        """The running solution of the linear system."""
        return {"u": levels.zeros()}

    def step(self, levels: Levels) -> StepInfo:
        """Make one outer step."""
        inner, outer = (decayed(e, levels.steps) for e in (self.inner_decay, self.outer_decay))
        rate = linear_rate(self, self.linear_lr, levels) * inner
        for _ in range(self.inner_steps):
            condition, _ = levels.inner_step(levels.inner_batch(), inner)
        value, by_params, direct = levels.outer_slopes(levels.outer_batch())
        u = levels.state["u"]
        for _ in range(self.linear_steps):
            residual = levels.product(levels.inner_batch(), u) - by_params
            u = torch.sub(u, residual, alpha=rate)
        cross = levels.cross(levels.inner_batch(), u)
        grads = [d - c for d, c in zip(direct, cross, strict=True)]
        levels.require_finite(the_linear_system=u, the_hypergradient=grads)
        levels.state["u"] = u
        levels.move_outer(grads, outer)
        return StepInfo(
            step=levels.steps + 1,
            outer_value=value,
            grads=levels.shaped(grads),
            inner_norm=levels.size(condition),
            inner_steps=self.inner_steps,
        )
