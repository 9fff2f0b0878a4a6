"""Plain alternation: some inner steps, one hypergradient, one outer step."""

from __future__ import annotations

import dataclasses

from ..solvers import Solver
from ..solvers._fields import at_least
from ._estimate import Estimator, check, estimate
from ._levels import Levels
from ._method import Method, State
from ._step_info import StepInfo


@dataclasses.dataclass(frozen=True)
class Alternating(Method):
    """Some inner steps, one hypergradient, one outer step; and both start where they left off.

    Every inner step draws an inner batch of its own, and so does the hypergradient.

    Parameters
    ----------
    inner_steps : int
        Steps of the inner optimiser before each hypergradient.
    estimator : str or callable
        "implicit", which is `implicit_grad` with the linear system started from the last step's
        solution; another word before ``_grad`` among the public estimators; or any callable
        ``(outer, inner, params, hparams) -> grads``.
    solver : Solver, optional
        The linear solver of "implicit". None: ten iterations of `CG`, or of `GMRES` where A is not
        symmetric. The inner solution supports no more, and the next step goes on from there.
    inner_tol : float, optional
        Of "implicit": above this relative inner residual the inner problem counts as unsolved, and
        that is said. None: measured, not judged, as mini-batches and inner loops that are cut
        short on purpose want it.

    Examples
    --------
    >>> import hypergrad
    >>> hypergrad.Alternating(inner_steps=5, solver=hypergrad.CG(maxiter=10), inner_tol=None)
    Alternating(inner_steps=5, estimator='implicit', solver=CG(maxiter=10, ...), inner_tol=None)
    """

    inner_steps: int = 10
    estimator: Estimator = "implicit"
    solver: Solver | None = None
    inner_tol: float | None = 1e-3

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        at_least("inner_steps", self.inner_steps, 1)
        at_least("inner_tol", self.inner_tol, 0.0)
        check(self.estimator)

    def start(self, levels: Levels) -> State:
        """The solution of the linear system, and whether there is one."""
        return {"u": levels.zeros(), "started": False}

    def step(self, levels: Levels) -> StepInfo:
        """Make one outer step."""
        for _ in range(self.inner_steps):
            condition, _ = levels.inner_step(levels.inner_batch())
        grads, value, info = estimate(
            levels,
            self.estimator,
            self.solver,
            self.inner_tol,
            levels.inner_batch(),
            levels.outer_batch(),
        )
        levels.require_finite(the_hypergradient=grads)
        levels.move_outer(grads)
        return StepInfo(
            step=levels.steps + 1,
            outer_value=value,
            grads=levels.shaped(grads),
            inner_norm=levels.size(condition),
            inner_steps=self.inner_steps,
            info=info,
        )
