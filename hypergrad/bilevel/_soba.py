"""SOBA and MA-SOBA: parameters, linear system and hyperparameters move at the same time."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ._levels import Levels
from ._method import Method, State, check_decays, check_rate, decayed, linear_rate
from ._step_info import StepInfo


@dataclasses.dataclass
class Directions:
    """The three directions of SOBA at one point, and what was seen on the way."""

    inner: Tensor
    linear: Tensor
    outer: list[Tensor]
    value: Tensor
    norm: Tensor


def directions(levels: Levels, u: Tensor) -> Directions:
    """The directions from one inner and one outer batch, all at the same point."""
    found = levels.products(levels.inner_batch(), u)
    value, by_params, direct = levels.outer_slopes(levels.outer_batch())
    return Directions(
        inner=found.residual,
        linear=found.product - by_params,
        outer=[d - c for d, c in zip(direct, found.cross, strict=True)],
        value=value,
        norm=torch.linalg.vector_norm(found.residual),
    )


@dataclasses.dataclass(frozen=True)
class SOBA(Method):
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

    linear_lr: float | None = None
    inner_decay: float = 0.5
    outer_decay: float = 0.5

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        check_rate("linear_lr", self.linear_lr)
        check_decays(inner_decay=self.inner_decay, outer_decay=self.outer_decay)

    def start(self, levels: Levels) -> State:
        """The running solution of the linear system."""
        return {"u": levels.zeros()}

    def step(self, levels: Levels) -> StepInfo:
        """Make one outer step."""
        found = directions(levels, levels.state["u"])
        inner, outer = (decayed(e, levels.steps) for e in (self.inner_decay, self.outer_decay))
        rate = linear_rate(self, self.linear_lr, levels) * inner
        levels.require_finite(
            the_inner_gradient=found.inner,
            the_linear_system=found.linear,
            the_hypergradient=found.outer,
        )
        levels.move_inner(found.inner, inner)
        levels.state["u"] = torch.sub(levels.state["u"], found.linear, alpha=rate)
        levels.move_outer(found.outer, outer)
        return record(levels, found, found.outer)


@dataclasses.dataclass(frozen=True)
class MASOBA(Method):
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

    theta: float = 0.1
    linear_lr: float | None = None
    inner_decay: float = 0.0
    outer_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        check_rate("linear_lr", self.linear_lr)
        check_decays(inner_decay=self.inner_decay, outer_decay=self.outer_decay)
        if not 0 < self.theta <= 1:
            raise ValueError(f"theta must be above 0 and at most 1; got {self.theta!r}.")

    def start(self, levels: Levels) -> State:
        """The running solution of the linear system, and the average."""
        zeros = [torch.zeros_like(v, requires_grad=False) for v in levels.hparams.variables]
        return {"u": levels.zeros(), "h": zeros}

    def step(self, levels: Levels) -> StepInfo:
        """Make one outer step."""
        found = directions(levels, levels.state["u"])
        inner, outer = (decayed(e, levels.steps) for e in (self.inner_decay, self.outer_decay))
        rate = linear_rate(self, self.linear_lr, levels) * inner
        levels.require_finite(
            the_inner_gradient=found.inner,
            the_linear_system=found.linear,
            the_hypergradient=found.outer,
        )
        average = levels.state["h"]
        levels.move_inner(found.inner, inner)
        levels.state["u"] = torch.sub(levels.state["u"], found.linear, alpha=rate)
        levels.move_outer(average, outer)
        levels.state["h"] = [
            torch.lerp(h, d, self.theta * outer) for h, d in zip(average, found.outer, strict=True)
        ]
        return record(levels, found, average)


def record(levels: Levels, found: Directions, grads: list[Tensor]) -> StepInfo:
    """What a step of a single-loop method leaves behind."""
    return StepInfo(
        step=levels.steps + 1,
        outer_value=found.value,
        grads=levels.shaped(grads),
        inner_norm=found.norm,
        inner_steps=1,
    )
