"""stocBiO: a Neumann series whose every factor sees another batch."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..solvers._fields import positive
from ._amigo import DoubleLoop
from ._levels import Levels
from ._method import checked, exponent, least


@dataclasses.dataclass(frozen=True)
class StocBiO(DoubleLoop):
    """The stochastic bilevel optimiser of Ji, Yang and Liang (2021).

    Each step makes `inner_steps` stochastic gradient steps on the inner problem, started where
    they left off. Then it takes ``u = eta sum_{q=0}^{Q} (I - eta A_Q) ... (I - eta A_{Q-q+1}) b``
    with ``b = d outer / d params`` on one outer batch and every A of an inner batch of its own.
    One outer step follows, with the cross derivative of a last inner batch.

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

    inner_steps: int = checked(10, least(1))
    terms: int = checked(10, least(0))
    linear_lr: float | None = checked(None, positive)
    inner_decay: float = exponent(0.0)
    outer_decay: float = exponent(0.0)
    called = "the Neumann series"

    def solved(self, levels: Levels, by_params: Tensor, rate: float) -> Tensor:
        """Add up the series."""
        total = term = by_params
        for _ in range(self.terms):
            term = torch.sub(term, levels.product(levels.inner_batch(), term), alpha=rate)
            total = total + term
        return rate * total
