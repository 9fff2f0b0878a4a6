"""Newton's method with conjugate gradients."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..solvers._cg import CG
from ..solvers._fields import at_least
from ..solvers._system import LinearSystem
from ._base import InnerSolver
from ._evaluator import Evaluator
from ._line_search import backtrack
from ._numbers import dot, norm
from ._progress import Progress


@dataclasses.dataclass(frozen=True)
class NewtonCG(InnerSolver):
    """Newton's method; each step is solved for by conjugate gradients, and shortened if need be.

    Where negative curvature is met, the step is what the conjugate gradients had before, or the
    negative gradient.

    Parameters
    ----------
    maxiter : int
        Most Newton steps.
    tol : float, optional
        The relative residual at which a task stops; None: 1e-8 in float64, 1e-5 in float32.
    cg_rtol : float
        The relative residual to which a step is solved for.
    cg_maxiter : int, optional
        Most products for a step; None: as in `CG`.

    References
    ----------
    Nocedal and Wright, Numerical optimization, 2006, algorithm 7.1.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import inner_solvers
    >>> f = lambda x, a: x.exp().sum() - (a * x).sum()
    >>> x, info = inner_solvers.NewtonCG()(f, torch.zeros(2), torch.tensor([1.0, 2.0]))
    >>> x  # log(a)
    tensor([0.0000, 0.6931])
    """

    maxiter: int = 100
    tol: float | None = None
    cg_rtol: float = 0.01
    cg_maxiter: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        at_least("cg_rtol", self.cg_rtol, 0.0)
        at_least("cg_maxiter", self.cg_maxiter, 1)

    def _run(self, evaluator: Evaluator, x: Tensor) -> tuple[Tensor, Progress]:
        value, g = evaluator.objective(x)
        progress = Progress(self.tol, evaluator.layout.precision, norm(g) + 0 * value, value)
        length = progress.begin(evaluator, x, g)  # of steps along the gradient
        cg = CG(maxiter=self.cg_maxiter, rtol=self.cg_rtol)
        for active in progress.rounds(self.maxiter):
            _, _, hessian = evaluator.with_hessian(x)
            # A right-hand side of zero takes no part.
            b = torch.where(active, -g, torch.zeros_like(g))
            solution = cg.run(
                LinearSystem(hessian, b, evaluator.layout, evaluator.tree, symmetric=True)
            )
            progress.evaluated(active, 1 + solution.matvecs)
            newton = torch.where(
                torch.isfinite(solution.x), solution.x, torch.zeros_like(solution.x)
            )
            downhill = dot(newton, g) < -1e-12 * norm(newton) * norm(g)
            direction = torch.where(downhill, newton, -length * g)
            step = backtrack(evaluator, progress, x, value, g, direction, torch.ones_like(value))
            s, y = step.x - x, step.gradient - g
            progress.update(step.x, s, y, norm(step.gradient), step.value, stuck=~step.success)
            x, value, g = step.x, step.value, step.gradient
        return x, progress
