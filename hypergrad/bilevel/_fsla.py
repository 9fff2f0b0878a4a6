"""FSLA: a single loop whose outer direction has the variance reduction of STORM."""

from __future__ import annotations

import dataclasses

import torch

from ..solvers._fields import positive
from ._levels import Levels, minus
from ._method import Decaying, State, checked, exponent
from ._soba import weight
from ._step_info import StepInfo


@dataclasses.dataclass(frozen=True)
class FSLA(Decaying):
    """The fully single loop algorithm of Li, Gu and Huang (2022).

    One step of the inner optimiser on the parameters z, then one step of gradient descent on the
    linear system at the new z, ``u' = u - rate (A u - dF/dz)``, then one outer step along

    ``d' = D(x, z', u') + (1 - eta) (d - D(x0, z, u))``,

    in which ``D = dF/dx - (d2G/dxdz)^T u`` is taken on the same batches at the new point and at
    that of the step before, with the hyperparameters x0 that it had. Without the second term, as
    in the first step, or with eta = 1, it is plain alternation of single steps. Inner step,
    product, ``dF/dz`` and D have batches of their own: three inner and two outer ones a step.

    Parameters
    ----------
    eta : float
        The weight of a new direction, above 0 and at most 1; it decays as the outer learning rate.
    linear_lr : float, optional
        The learning rate of u. None: that of the inner optimiser, which must then be a plain
        `torch.optim.SGD`.
    inner_decay, outer_decay : float
        The exponents of the learning rates; `inner_decay` holds for z and u. 0: constant.

    References
    ----------
    Li, Gu and Huang, A fully single loop algorithm for bilevel optimization without Hessian
    inverse, AAAI 2022, algorithm 1; Cutkosky and Orabona, Momentum-based variance reduction in
    non-convex SGD (STORM), 2019.

    Examples
    --------
    >>> import hypergrad
    >>> hypergrad.FSLA(eta=0.5)
    FSLA(eta=0.5, linear_lr=None, inner_decay=0.5, outer_decay=0.5)
    """

    eta: float = checked(0.1, weight)
    linear_lr: float | None = checked(None, positive)
    inner_decay: float = exponent(0.5)
    outer_decay: float = exponent(0.5)

    def start(self, levels: Levels) -> State:
        """Start the running solution of the linear system, the direction and the last x."""
        zeros = [torch.zeros_like(v, requires_grad=False) for v in levels.hparams.variables]
        x = [v.detach().clone() for v in levels.hparams.variables]
        return {"u": levels.zeros(), "d": zeros, "x": x, "started": False}

    def step(self, levels: Levels) -> StepInfo:
        """Make one outer step."""
        state = levels.state
        inner, outer = self.decays(levels)
        rate, eta = self.rate(levels) * inner, self.eta * outer
        z = [v.detach().clone() for v in levels.params.variables]
        condition, _ = levels.inner_step(levels.inner_batch(), inner)
        product = levels.product(levels.inner_batch(), state["u"])
        _, by_params, _ = levels.outer_slopes(levels.outer_batch())
        u = torch.sub(state["u"], product - by_params, alpha=rate)

        again, batch = levels.inner_batch(), levels.outer_batch()
        value, _, direct = levels.outer_slopes(batch)
        d = minus(direct, levels.cross(again, u))
        if state["started"]:
            _, _, direct = levels.outer_slopes(batch, z, state["x"])
            last = minus(direct, levels.cross(again, state["u"], z, state["x"]))
            d = [
                torch.add(new, before - old, alpha=1 - eta)
                for new, before, old in zip(d, state["d"], last, strict=True)
            ]
        x = [v.detach().clone() for v in levels.hparams.variables]
        finite = {"the linear system": u}
        info = levels.outer_step(d, value, condition, factor=outer, finite=finite)
        levels.state = {"u": u, "d": d, "x": x, "started": True}
        return info
