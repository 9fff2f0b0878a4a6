"""SOBA and MA-SOBA: parameters, linear system and hyperparameters move at the same time."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..solvers._fields import positive
from ._batches import Batch
from ._derivatives import At, Leaves
from ._levels import Levels, minus
from ._method import Decaying, State, checked, exponent
from ._step_info import StepInfo


@dataclasses.dataclass
class Directions:
    """The three directions of SOBA at one point, and the outer loss there."""

    inner: Tensor
    linear: Tensor
    outer: Leaves
    value: Tensor


class SingleLoop(Decaying):
    """A method that moves both levels and the linear system at the same time."""

    def start(self, levels: Levels) -> State:
        """Start the running solution of the linear system."""
        return {"u": levels.zeros()}

    def directions(self, levels: Levels) -> Directions:
        """Form the directions from one inner and one outer batch, all at the same point."""
        return at_point(levels, levels.inner_batch(), levels.outer_batch(), levels.state["u"])

    def averaged(self, levels: Levels, outer: Leaves, decay: float) -> Leaves:
        """Choose what the hyperparameters move along: the outer direction."""
        return outer

    def moving(self, levels: Levels, along: Directions) -> None:
        """Note, before anything moves, what the next step will ask for: nothing here."""

    def bounded(self, u: Tensor) -> Tensor:
        """Keep the solution of the linear system within bounds: there are none here."""
        return u

    def step(self, levels: Levels) -> StepInfo:
        """Make one outer step."""
        along = self.directions(levels)
        inner, outer = self.decays(levels)
        rate = self.rate(levels) * inner
        levels.require_finite({
            "the inner gradient": along.inner,
            "the linear system": along.linear,
            "the hypergradient": along.outer,
        })
        self.moving(levels, along)
        grads = self.averaged(levels, along.outer, outer)
        levels.move_inner(along.inner, inner)
        levels.state["u"] = self.bounded(torch.sub(levels.state["u"], along.linear, alpha=rate))
        levels.move_outer(grads, outer)
        return levels.record(grads, along.value, along.inner)


def at_point(
    levels: Levels,
    inner: Batch,
    outer: Batch,
    u: Tensor,
    params: Leaves | None = None,
    hparams: Leaves | None = None,
) -> Directions:
    """Form the directions on one batch of each level, at the variables or at other tensors."""
    seen, slopes = levels.derivatives.both(inner, outer, u, At(params, hparams))
    value, by_params, direct = slopes
    return Directions(seen.residual, seen.product - by_params, minus(direct, seen.cross), value)


def weight(name: str, value: float) -> None:
    """Refuse what is no weight of an average."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1; got {value!r}.")


@dataclasses.dataclass(frozen=True)
class SOBA(SingleLoop):
    """The stochastic bilevel algorithm of Dagréou et al. (2022).

    One inner batch and one outer batch a step, one evaluation of each loss, one Hessian-vector
    product and one cross derivative. With z the parameters, x the hyperparameters and u the
    running solution of ``A u = d outer / d params``, all three move at the same time:

    - z along ``-dG/dz``, by the inner optimiser,
    - u along ``-(A u - dF/dz)``, by plain gradient descent,
    - x along ``-(dF/dx - (d2G/dxdz)^T u)``, by the outer optimiser.

    Learning rates are those of the optimisers, times ``(k + 1) ** -decay`` at step k.

    Parameters
    ----------
    linear_lr : float, optional
        The learning rate of u. None: that of the inner optimiser, as in the paper, which must
        then be a plain `torch.optim.SGD`.
    inner_decay, outer_decay : float
        The exponents of the learning rates; `inner_decay` holds for z and u. 0: constant, which
        is right where the losses are not stochastic.

    References
    ----------
    Dagréou, Ablin, Vaiter and Moreau, A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms, NeurIPS 2022, algorithm 1 with equation 6.

    Examples
    --------
    >>> import hypergrad
    >>> hypergrad.SOBA()
    SOBA(linear_lr=None, inner_decay=0.5, outer_decay=0.5)
    """

    linear_lr: float | None = checked(None, positive)
    inner_decay: float = exponent(0.5)
    outer_decay: float = exponent(0.5)


@dataclasses.dataclass(frozen=True)
class MASOBA(SingleLoop):
    """SOBA with a moving average of the outer direction (Chen, Xiao and Balasubramanian, 2023).

    As `SOBA`, but x moves along an average h of the directions D: ``x - lr h`` first, and then
    ``h = (1 - theta) h + theta D``, with D taken where x was; h starts at zero. The average takes
    out the noise and the bias that SOBA needs small steps for. It is a momentum: an outer
    optimiser with one of its own has two.

    Parameters
    ----------
    theta : float
        The weight of a new direction, above 0 and at most 1; it decays as the outer learning rate.
    linear_lr, inner_decay, outer_decay
        As in `SOBA`. The paper's rates are constant, proportional to 1 / sqrt(total steps).

    References
    ----------
    Chen, Xiao and Balasubramanian, Optimal algorithms for stochastic bilevel optimization under
    relaxed smoothness conditions, 2023, algorithm 1.

    Examples
    --------
    >>> import hypergrad
    >>> hypergrad.MASOBA(theta=0.2)
    MASOBA(theta=0.2, linear_lr=None, inner_decay=0.0, outer_decay=0.0)
    """

    theta: float = checked(0.1, weight)
    linear_lr: float | None = checked(None, positive)
    inner_decay: float = exponent(0.0)
    outer_decay: float = exponent(0.0)

    def start(self, levels: Levels) -> State:
        """Start the running solution of the linear system, and the average."""
        zeros = [torch.zeros_like(v, requires_grad=False) for v in levels.hparams.variables]
        return {"u": levels.zeros(), "h": zeros}

    def averaged(self, levels: Levels, outer: Leaves, decay: float) -> Leaves:
        """Return the average as it was, and move it on to the outer direction."""
        average: Leaves = levels.state["h"]
        levels.state["h"] = [
            torch.lerp(h, d, self.theta * decay) for h, d in zip(average, outer, strict=True)
        ]
        return average
