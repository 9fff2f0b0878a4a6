"""Limited-memory BFGS."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..solvers._fields import at_least
from ._base import InnerSolver
from ._evaluator import Evaluator
from ._line_search import backtrack
from ._numbers import dot, norm
from ._progress import Progress


@dataclasses.dataclass(frozen=True)
class LBFGS(InnerSolver):
    """The quasi-Newton method of limited memory: for smooth problems the first to try.

    Parameters
    ----------
    history : int
        How many steps are remembered.
    maxiter : int
        Most iterations.
    tol : float, optional
        The relative residual at which a task stops; None: 1e-8 in float64, 1e-5 in float32.

    References
    ----------
    Liu and Nocedal, On the limited memory BFGS method for large scale optimization, 1989; Nocedal
    and Wright, Numerical optimization, 2006, algorithms 7.4 and 7.5.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import inner_solvers
    >>> def rosenbrock(x):
    ...     return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
    >>> x, info = inner_solvers.LBFGS()(rosenbrock, torch.zeros(2, dtype=torch.float64))
    >>> torch.allclose(x, torch.ones(2, dtype=torch.float64)), bool(info.success)
    (True, True)
    """

    history: int = 10
    maxiter: int = 1000
    tol: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        at_least("history", self.history, 1)

    def _run(self, evaluator: Evaluator, x: Tensor) -> tuple[Tensor, Progress]:
        value, g = evaluator.objective(x)
        progress = Progress(self.tol, evaluator.layout.precision, norm(g) + 0 * value, value)
        memory: list[tuple[Tensor, Tensor, Tensor]] = []
        scale = progress.begin(evaluator, x, g)  # of the inverse Hessian that all starts from
        for _ in progress.rounds(self.maxiter):
            direction = -_two_loops(memory, scale, g)
            downhill = dot(direction, g) < -1e-12 * norm(direction) * norm(g)
            direction = torch.where(downhill, direction, -scale * g)
            one = torch.ones_like(value)
            step = backtrack(evaluator, progress, x, value, g, direction, one)
            s, y = step.x - x, step.gradient - g
            progress.update(step.x, s, y, norm(step.gradient), step.value, stuck=~step.success)
            # A pair without positive curvature is left out: with a weight of zero, in its task.
            along = dot(s, y)
            good = along > 1e-10 * norm(s) * norm(y)
            weight = torch.where(good, 1 / torch.where(good, along, one), torch.zeros_like(along))
            scale = torch.where(good, along / dot(y, y), scale)
            memory = [*memory, (s, y, weight)][-self.history :]
            x, value, g = step.x, step.value, step.gradient
        return x, progress


def _two_loops(memory: list[tuple[Tensor, Tensor, Tensor]], scale: Tensor, g: Tensor) -> Tensor:
    """Multiply g by the memory's inverse Hessian: Nocedal and Wright (2006), algorithm 7.4."""
    q, shares = g, []
    for s, y, weight in reversed(memory):
        share = weight * dot(s, q)
        q = q - share * y
        shares.append(share)
    q = scale * q
    for (s, y, weight), share in zip(memory, reversed(shares), strict=True):
        q = q + (share - weight * dot(y, q)) * s
    return q
