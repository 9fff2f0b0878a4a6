"""Plain alternation: some inner steps, one hypergradient, one outer step."""

from __future__ import annotations

import dataclasses

from ..solvers import Solver
from ._estimate import Estimator, check, estimate
from ._levels import Levels
from ._method import Method, State, checked, least
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
        The linear solver of "implicit". None: at most ten iterations of `CG(recycle=True)`, or of
        `GMRES` where A is not symmetric. The next step goes on from there.
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

    inner_steps: int = checked(10, least(1))
    estimator: Estimator = checked("implicit", check)  # noqa: RUF009 - a field
    solver: Solver | None = None
    inner_tol: float | None = checked(1e-3, least(0.0))

    def start(self, levels: Levels) -> State:
        """Start the solution of the linear system, with a note of whether there is one."""
        return {"u": levels.zeros(), "started": False}

    def step(self, levels: Levels) -> StepInfo:
        """Make one outer step."""
        condition = levels.inner_steps(self.inner_steps)
        batches = levels.inner_batch(), levels.outer_batch()
        grads, value, info = estimate(levels, self.estimator, self.solver, self.inner_tol, *batches)
        return levels.outer_step(grads, value, condition, self.inner_steps, info=info)
