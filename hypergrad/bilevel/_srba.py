"""SRBA: SOBA with the recursive variance reduction of SARAH."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..solvers._fields import positive
from ..solvers._vectors import norm
from ._derivatives import Leaves
from ._levels import Levels, minus
from ._method import State, checked, exponent, least
from ._soba import Directions, SingleLoop, at_point
from ._step_info import StepInfo


@dataclasses.dataclass(frozen=True)
class SRBA(SingleLoop):
    """The stochastic recursive bilevel algorithm of Dagréou et al. (2024).

    `SOBA` in which each direction d is followed from step to step, as in SARAH: in every `period`
    steps the first takes it from all batches, and the others add to it what it has changed by on
    one batch of each level since the step before, ``d += D(now) - D(before)``. The noise goes to
    zero as the iterates converge, so that constant learning rates reach the optimum. A step costs
    two evaluations of each loss, a first one as many as there are batches. Beside the variables the
    last point and three directions are remembered, and no table of batches as in `SABA`.

    Both levels' batches must be sequences, from which batches are drawn at random, with
    replacement. The losses that are minimised are the plain means over the batches.

    Parameters
    ----------
    period : int, optional
        q, how many steps there are from one pass through all batches to the next. None: the
        number of inner and outer batches together, as in the paper's analysis.
    radius : float, optional
        R, the largest norm of the solution u of the linear system: longer ones are scaled down to
        it. The paper's analysis wants it; None: no bound, as in its experiments.
    linear_lr : float, optional
        As in `SOBA`.
    inner_decay, outer_decay : float
        The exponents of the learning rates, which are constant in the paper.

    References
    ----------
    Dagréou, Moreau, Vaiter and Ablin, A lower bound and a near-optimal algorithm for bilevel
    empirical risk minimization, AISTATS 2024, algorithm 1; Nguyen, Liu, Scheinberg and Takáč,
    SARAH, 2017.

    Examples
    --------
    >>> import hypergrad
    >>> hypergrad.SRBA(period=64)
    SRBA(period=64, radius=None, linear_lr=None, inner_decay=0.0, outer_decay=0.0)
    """

    period: int | None = checked(None, least(1))
    radius: float | None = checked(None, positive)
    linear_lr: float | None = checked(None, positive)
    inner_decay: float = exponent(0.0)
    outer_decay: float = exponent(0.0)

    def start(self, levels: Levels) -> State:
        """Start the running solution of the linear system, the last point and the directions."""
        for batches in (levels.inner_batches, levels.outer_batches):
            batches.places("SRBA")
        P = levels.zeros()
        H = [torch.zeros_like(v, requires_grad=False) for v in levels.hparams.variables]
        return {
            "u": P,
            "before": {"u": P, **_variables(levels)},
            "directions": {"inner": P, "linear": P, "outer": H},
        }

    def step(self, levels: Levels) -> StepInfo:
        """Make one outer step."""
        levels.refuse_passed("SRBA")
        return super().step(levels)

    def directions(self, levels: Levels) -> Directions:
        """Form the directions from all batches, or follow them on one batch of each level."""
        n, m = levels.inner_batches.places("SRBA"), levels.outer_batches.places("SRBA")
        if levels.steps % (self.period or n + m) == 0:
            return _whole(levels, n, m)
        before, known = levels.state["before"], levels.state["directions"]
        batches = levels.inner_batch(), levels.outer_batch()
        now = at_point(levels, *batches, levels.state["u"])
        then = at_point(levels, *batches, before["u"], before["params"], before["hparams"])
        change = minus(now.outer, then.outer)
        return Directions(
            known["inner"] + (now.inner - then.inner),
            known["linear"] + (now.linear - then.linear),
            [d + c for d, c in zip(known["outer"], change, strict=True)],
            now.value,
        )

    def moving(self, levels: Levels, along: Directions) -> None:
        """Keep the point and the directions there."""
        state = levels.state
        state["before"] = {"u": state["u"], **_variables(levels)}
        state["directions"] = {
            "inner": along.inner,
            "linear": along.linear,
            "outer": along.outer,
        }

    def bounded(self, u: Tensor) -> Tensor:
        """Scale u down to the radius."""
        return u if self.radius is None else u * (self.radius / norm(u).clamp(min=self.radius))


def _variables(levels: Levels) -> dict[str, Leaves]:
    """Copy the variables of both levels."""
    return {
        tree.name: [v.detach().clone() for v in tree.variables]
        for tree in (levels.params, levels.hparams)
    }


def _whole(levels: Levels, n: int, m: int) -> Directions:
    """Form the directions on the means over all batches of both levels."""
    u = levels.state["u"]
    inner = [levels.products(levels.inner_batches[i], u) for i in range(n)]
    outer = [levels.outer_slopes(levels.outer_batches[j]) for j in range(m)]
    by_params = sum((slopes[1] for slopes in outer), levels.zeros()) / m
    return Directions(
        sum((p.residual for p in inner), levels.zeros()) / n,
        sum((p.product for p in inner), levels.zeros()) / n - by_params,
        minus(_means([slopes[2] for slopes in outer]), _means([p.cross for p in inner])),
        torch.stack([slopes[0] for slopes in outer]).mean(),
    )


def _means(rows: list[Leaves]) -> Leaves:
    """Form the mean of several lists of tensors."""
    return [torch.stack(parts).mean(dim=0) for parts in zip(*rows, strict=True)]
