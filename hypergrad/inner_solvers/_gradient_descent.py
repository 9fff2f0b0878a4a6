"""Gradient descent."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ._base import InnerSolver
from ._evaluator import Evaluator
from ._fixed_steps import FixedSteps, descend
from ._line_search import backtrack
from ._numbers import dot, norm
from ._progress import Progress

_MEMORY = 10


@dataclasses.dataclass(frozen=True)
class GradientDescent(InnerSolver):
    """Steps along the negative gradient, of a fixed length or by a line search.

    Parameters
    ----------
    step_size : float or Tensor, optional
        The length of the steps, or of shape (n,) one for every unknown. None: that of Barzilai and
        Borwein, shortened until the objective is below the largest of its last ten values.
    maxiter : int
        Most iterations.
    tol : float, optional
        The relative residual at which a task stops; None: 1e-8 in float64, 1e-5 in float32. 0,
        with a `step_size`: exactly `maxiter` steps and as many gradients, and no number is read
        by the host. A task whose numbers are not finite stays where they were finite last. The
        figures of the info are those of the last gradient, before the last step.

    References
    ----------
    Barzilai and Borwein, Two-point step size gradient methods, 1988; Raydan, The Barzilai and
    Borwein gradient method for the large scale unconstrained minimization problem, 1997.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import inner_solvers
    >>> def ridge(w, lam):
    ...     return ((w - 1) ** 2).sum() / 2 + lam * (w**2).sum() / 2
    >>> w, info = inner_solvers.GradientDescent()(ridge, torch.zeros(2), torch.tensor(1.0))
    >>> w, bool(info.success)
    (tensor([0.5000, 0.5000]), True)
    """

    step_size: float | Tensor | None = None
    maxiter: int = 10_000
    tol: float | None = None

    def _run(self, evaluator: Evaluator, x: Tensor) -> tuple[Tensor, Progress | FixedSteps]:
        if self.step_size is not None and self.tol == 0:
            return descend(evaluator, x, evaluator.step_size(self.step_size), self.maxiter)
        value, g = evaluator.objective(x)
        progress = Progress(self.tol, evaluator.layout.precision, norm(g) + 0 * value, value)
        length, values = progress.begin(evaluator, x, g), [value]
        fixed = None if self.step_size is None else evaluator.step_size(self.step_size)
        for active in progress.rounds(self.maxiter):
            if fixed is None:
                # Not below the last value but below one of the last ten, which these steps need.
                reference = torch.stack(values).amax(dim=0)
                step = backtrack(evaluator, progress, x, value, g, -g, length, reference)
                new, new_value, new_g, stuck = step.x, step.value, step.gradient, ~step.success
            else:
                new = torch.where(active, x - fixed * g, x)
                new_value, new_g = evaluator.objective(new)
                progress.evaluated(active)
                stuck = torch.zeros_like(active)
            s, y = new - x, new_g - g
            size = norm(new_g)
            progress.update(new, s, y, size, new_value, stuck=stuck)
            if fixed is None:
                along = dot(s, y)
                length = torch.where(along > 0, dot(s, s) / along, 2 * length)
            sound = active & torch.isfinite(size) & torch.isfinite(new_value)
            x, g = torch.where(sound, new, x), torch.where(sound, new_g, g)
            value = torch.where(sound, new_value, value)
            values = [*values, value][-_MEMORY:]
        return x, progress
