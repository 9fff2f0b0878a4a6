"""F2SA: first derivatives alone, from a penalty that grows."""

from __future__ import annotations

import dataclasses

import torch

from .._errors import UnsupportedOperation
from ..conditions._gauss_newton import GaussNewton
from ..conditions._minimum import Minimum
from ..solvers._fields import positive
from ._levels import Levels
from ._method import Decaying, State, checked, exponent, least
from ._step_info import StepInfo


@dataclasses.dataclass(frozen=True)
class F2SA(Decaying):
    """The fully first-order stochastic approximation of Kwon et al. (2023).

    No second derivative is formed. Beside the parameters z, which follow the inner loss G, a second
    copy y follows ``F + lam G``. With both at their minima
    ``dF/dx(y) + lam (dG/dx(y) - dG/dx(z))`` is the derivative of a penalty. Its distance from the
    hypergradient is of the order 1 / lam, and lam grows: ``lam_k = penalty (k + 1) ** growth``.
    Each of the `inner_steps` moves z by the inner optimiser and y by gradient descent with the
    rate ``relaxed_lr / lam``, every derivative on a batch of its own; then x moves. ``params`` of
    the loop is z.

    Parameters
    ----------
    penalty : float
        lam at the first step. A bias of the order 1 / lam remains where `growth` is 0.
    growth : float
        How lam grows. In the paper 1/7 where both losses are stochastic, 1/5 where the outer one
        is, and 1/3 where none is.
    inner_steps : int
        T, the steps of z and y before each outer step.
    relaxed_lr : float, optional
        lam times the learning rate of y. None: half the inner optimiser's, as in the paper, which
        must then be a plain `torch.optim.SGD`.
    inner_decay, outer_decay : float
        The exponents of the learning rates; `inner_decay` holds for z and y. The outer one should
        be the inner one plus `growth`. In the paper (4/7, 5/7) where both losses are stochastic,
        (2/5, 3/5) where the outer one is, and (0, 1/3) where none is.

    References
    ----------
    Kwon, Kwon, Wright and Nowak, A fully first-order method for stochastic bilevel optimization,
    ICML 2023, algorithm 1 and corollary 4.2.

    Examples
    --------
    >>> import hypergrad
    >>> hypergrad.F2SA(penalty=10.0, growth=0.0, inner_decay=0.0, outer_decay=0.0)
    F2SA(penalty=10.0, growth=0.0, inner_steps=10, relaxed_lr=None, ...)
    """

    penalty: float = checked(1.0, positive)
    growth: float = exponent(1 / 7)
    inner_steps: int = checked(10, least(1))
    relaxed_lr: float | None = checked(None, positive)
    inner_decay: float = exponent(4 / 7)
    outer_decay: float = exponent(5 / 7)

    def start(self, levels: Levels) -> State:
        """Make the second copy of the parameters."""
        if not isinstance(levels.condition, Minimum | GaussNewton):
            raise UnsupportedOperation(
                f"F2SA needs an inner loss; {type(levels.condition).__name__} has none. Use SOBA, "
                "AmIGO or Alternating for it."
            )
        return {"y": [v.detach().clone() for v in levels.params.variables]}

    def step(self, levels: Levels) -> StepInfo:
        """Make one outer step."""
        inner, outer = self.decays(levels)
        lam = self.penalty * float((levels.steps + 1) ** self.growth)
        rate = self.rate(levels, "relaxed_lr", share=0.5)
        y = levels.state["y"]
        count = len(y)
        for _ in range(self.inner_steps):
            condition, _ = levels.inner_step(levels.inner_batch(), inner)
            slopes = levels.inner_slopes(levels.inner_batch(), y)[:count]
            _, by_params, _ = levels.outer_slopes(levels.outer_batch(), y)
            # (rate / lam) (dF/dy + lam dG/dy)
            y = [
                v - rate * inner * (g + f / lam)
                for v, g, f in zip(y, slopes, levels.layout.split(by_params), strict=True)
            ]
        value, _, direct = levels.outer_slopes(levels.outer_batch(), y)
        at_y = levels.inner_slopes(levels.inner_batch(), y)[count:]
        at_z = levels.inner_slopes(levels.inner_batch())[count:]
        grads = [torch.add(f, a - b, alpha=lam) for f, a, b in zip(direct, at_y, at_z, strict=True)]
        finite = {"the second copy of params": y}
        info = levels.outer_step(
            grads, value, condition, self.inner_steps, factor=outer, finite=finite
        )
        levels.state["y"] = y
        return info
