"""HOAG: both systems are solved to a tolerance that tightens from step to step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor

from .._errors import NotConverged
from .._info import SolveInfo
from .._warnings import warn
from ..solvers import CG, GMRES, Solver
from ..solvers._fields import positive, tolerance
from ._batches import Batch
from ._estimate import estimate
from ._levels import Levels
from ._method import Method, State, checked, least
from ._step_info import StepInfo

# How often the inner problem is taken up again where the solve shows another curvature.
_ROUNDS = 3
# After so many steps without a smaller residual there will be none: that is the rounding floor,
# or an optimiser that does not converge.
_PATIENCE = 50


def _decrease(name: str, value: str) -> None:
    if value not in ("exponential", "quadratic", "cubic"):
        raise ValueError(f"{name} must be 'exponential', 'quadratic' or 'cubic'; got {value!r}.")


@dataclasses.dataclass(frozen=True)
class HOAG(Method):
    """Hyperparameter optimisation with approximate gradients (Pedregosa, 2016).

    At step k = 0, 1, ... the inner problem is solved until its relative residual
    (`SolveInfo.inner_residual`, an estimate of the relative distance to the solution) is below
    ``tol_k``, then the linear system to the relative residual ``tol_k``, and the outer optimiser
    makes one step. The tolerances have a finite sum, which is what the convergence proof needs:

    - "exponential": ``tol_k = tol * 0.9 ** k``,
    - "quadratic": ``tol_k = tol / (k + 1) ** 2``,
    - "cubic": ``tol_k = tol / (k + 1) ** 3``,

    and never below `min_tol`. One batch of each level, if there are batches, serves for all of a
    step. The step size is the outer optimiser's; the paper's own rule for it is not part of this.

    Parameters
    ----------
    tol : float
        The first tolerance.
    decrease : {"exponential", "quadratic", "cubic"}
        How it tightens.
    min_tol : float, optional
        The last tolerance. None: one that an optimiser can reach which looks at losses in that
        dtype (1e-6 in float64, 1e-3 in float32).
    max_inner_steps : int
        Most steps of the inner optimiser in one outer step. Running out of them is said, and so
        is a residual that has stopped to fall.
    solver : Solver, optional
        The linear solver, whose `rtol` follows the tolerance. None: `CG(recycle=True)`, or `GMRES`
        where A is not symmetric.

    References
    ----------
    Pedregosa, Hyperparameter optimization with approximate gradient, ICML 2016, algorithm 1 and
    section 5.

    Examples
    --------
    >>> import hypergrad
    >>> [round(hypergrad.HOAG().tolerance(k), 4) for k in (0, 1, 10)]
    [0.1, 0.09, 0.0349]
    """

    tol: float = checked(0.1, positive)
    decrease: Literal["exponential", "quadratic", "cubic"] = checked("exponential", _decrease)
    min_tol: float | None = checked(None, least(0.0))
    max_inner_steps: int = checked(1000, least(1))
    solver: Solver | None = None

    def tolerance(self, steps: int) -> float:
        """Compute the tolerance after so many outer steps, without the lowest one."""
        if self.decrease == "exponential":
            return float(self.tol * 0.9**steps)
        return float(self.tol / (steps + 1) ** (2 if self.decrease == "quadratic" else 3))

    def start(self, levels: Levels) -> State:
        """Start the solution of the linear system, and the curvature that it has shown."""
        return {"u": levels.zeros(), "started": False, "scale": 0.0}

    def step(self, levels: Levels) -> StepInfo:
        """Make one outer step."""
        lowest = _reachable(levels.layout.precision) if self.min_tol is None else self.min_tol
        tol = max(self.tolerance(levels.steps), lowest)
        solver: Any = self.solver or (CG(recycle=True) if levels.condition.symmetric else GMRES())
        if hasattr(solver, "rtol"):
            solver = dataclasses.replace(solver, rtol=tol)
        inner, outer = levels.inner_batch(), levels.outer_batch()
        made, going = 0, True
        for _ in range(_ROUNDS):
            condition, made, going = self._solve(levels, inner, tol, made)
            grads, value, info = estimate(levels, "implicit", solver, None, inner, outer)
            assert info is not None
            residual = float(info.inner_residual)
            if residual > 0:
                # Norm of the condition for a unit of the relative distance to the solution.
                levels.state["scale"] = float(levels.size(condition)) / residual
            if not (residual > tol and going):
                break
        assert info is not None
        self._judge(levels, info, tol)
        return levels.outer_step(grads, value, condition, made, tolerance=tol, info=info)

    def _solve(
        self, levels: Levels, inner: Batch, tol: float, made: int
    ) -> tuple[list[Tensor], int, bool]:
        """Make inner steps until the condition is small.

        Returns
        -------
        condition : list of Tensor
            At the end.
        made : int
            Steps in all.
        going : bool
            Whether more of them would be of use.
        """
        scale = levels.state["scale"]
        moved, lowest, since = True, math.inf, 0
        if not scale:  # nothing is known of the curvature yet: relative to where it starts
            condition, moved = levels.inner_step(inner)
            scale, made = float(levels.size(condition)), made + 1
        while moved and made < self.max_inner_steps and since < _PATIENCE:
            condition, moved = levels.inner_step(inner, above=tol * scale)
            made += moved
            size = float(levels.size(condition))
            lowest, since = (size, 0) if size < lowest else (lowest, since + 1)
        if moved:
            _, condition = levels.inner_gradient(inner)
        return condition, made, not moved

    def _judge(self, levels: Levels, info: SolveInfo, tol: float) -> None:
        if levels.on_failure == "ignore" or float(info.inner_residual) <= tol:
            return
        text = (
            "HOAG did not solve the inner problem to its tolerance: raise max_inner_steps or "
            "min_tol, or let the inner optimiser take better steps (another learning rate, "
            "momentum, or LBFGS)."
        )
        if levels.on_failure == "raise":
            raise NotConverged(
                f"{text} At outer step {levels.steps + 1} the relative inner residual is "
                f"{float(info.inner_residual):.3g} and the tolerance {tol:.3g}.",
                info=info,
            )
        warn(text)


def _reachable(precision: torch.dtype) -> float:
    """Bound the tolerance that a line search on losses can reach, and a linear solver too."""
    by_losses = 3 * math.sqrt(torch.finfo(precision).eps)
    return max(min(by_losses, 0.1), tolerance(None, precision))
