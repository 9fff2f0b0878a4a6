"""stocBiO: a Neumann series whose every factor sees another batch."""

from __future__ import annotations

import dataclasses

import torch

from ..solvers._fields import at_least
from ._levels import Levels
from ._method import Method, State, check_decays, check_rate, decayed, linear_rate
from ._step_info import StepInfo


@dataclasses.dataclass(frozen=True)
class StocBiO(Method):
    """The stochastic bilevel optimiser of Ji, Yang and Liang (2021).

    Each step makes `inner_steps` stochastic gradient steps on the inner problem, started where
    they left off, and takes ``u = eta sum_{q=0}^{Q} (I - eta A_Q) ... (I - eta A_{Q-q+1}) b``
    with ``b = d outer / d params`` on one outer batch and every A of an inner batch of its own;
    then one outer step with the cross derivative of a last inner batch.

    Parameters
    ----------
    inner_steps : int
        Steps of the inner optimiser before each hypergradient.
    terms : int
        Q, how many products the series takes.
    linear_lr : float, optional
        eta, which must lie below 2 divided by the largest eigenvalue of A. None: the learning
        rate of the inner optimiser, which must then be a plain `torch.optim.SGD`.
    inner_decay, outer_decay : float
        The exponents of the learning rates, which are constant in the paper. eta does not decay.

    References
    ----------
    Ji, Yang and Liang, Bilevel optimization: convergence analysis and enhanced design, ICML 2021,
    algorithms 2 and 3.

    Examples
    --------
    >>> import hypergrad
    >>> hypergrad.StocBiO(terms=20)
    StocBiO(inner_steps=10, terms=20, linear_lr=None, inner_decay=0.0, outer_decay=0.0)
    """

    inner_steps: int = 10
    terms: int = 10
    linear_lr: float | None = None
    inner_decay: float = 0.0
    outer_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        at_least("inner_steps", self.inner_steps, 1)
        at_least("terms", self.terms, 0)
        check_rate("linear_lr", self.linear_lr)
        check_decays(inner_decay=self.inner_decay, outer_decay=self.outer_decay)

    def start(self, levels: Levels) -> State:
        """Nothing: every step's series starts anew."""
        return {}

    def step(self, levels: Levels) -> StepInfo:
        """Make one outer step."""
        inner, outer = (decayed(e, levels.steps) for e in (self.inner_decay, self.outer_decay))
        eta = linear_rate(self, self.linear_lr, levels)
        for _ in range(self.inner_steps):
            condition, _ = levels.inner_step(levels.inner_batch(), inner)
        value, by_params, direct = levels.outer_slopes(levels.outer_batch())
        total = term = by_params
        for _ in range(self.terms):
            term = torch.sub(term, levels.product(levels.inner_batch(), term), alpha=eta)
            total = total + term
        cross = levels.cross(levels.inner_batch(), eta * total)
        grads = [d - c for d, c in zip(direct, cross, strict=True)]
        levels.require_finite(the_Neumann_series=total, the_hypergradient=grads)
        levels.move_outer(grads, outer)
        return StepInfo(
            step=levels.steps + 1,
            outer_value=value,
            grads=levels.shaped(grads),
            inner_norm=levels.size(condition),
            inner_steps=self.inner_steps,
        )
