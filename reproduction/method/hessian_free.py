"""Hessian-free steps: a direction from a few conjugate gradients, a length from a line search."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vjp

import hypergrad
from reproduction.method.episodes import Params
from reproduction.method.inner import Curvature, ProximalProblem, flatten, line_search


@dataclass(frozen=True)
class HessianFree:
    """Newton steps whose system is solved by a few conjugate gradients (Martens 2010).

    The direction d is where `cg_steps` of them get from zero in (H + lam I) d = -gradient. Where
    the first one meets negative curvature there is no such d, and the step is along the negative
    gradient. The line search takes the best of a few step sizes, zero among them, so that the
    objective never rises.

    Parameters
    ----------
    steps
        Number of steps.
    cg_steps
        Conjugate gradients in each: five in Rajeswaran et al. 2019.
    curvature
        Whether H is the Hessian of the loss or its Gauss-Newton matrix.
    """

    steps: int
    cg_steps: int = 5
    curvature: Curvature = "hessian"

    def __call__(
        self, problem: ProximalProblem, centre: Params, first: Params | None = None
    ) -> Params:
        """Return the parameters after the last step."""
        position, unflatten = flatten(first or centre)

        def objective(vector: Tensor) -> Tensor:
            return problem.objective(unflatten(vector), centre)

        solver = hypergrad.CG(maxiter=self.cg_steps)
        for _ in range(self.steps):
            slope = grad(objective)(position)
            product = self._product(problem, unflatten, objective, position)
            direction, _ = solver.solve(product, -slope)
            downhill = direction @ slope < 0
            direction = torch.where(downhill, direction, -slope)
            position = line_search(objective, position, direction)
        return unflatten(position)

    def _product(
        self,
        problem: ProximalProblem,
        unflatten: Callable[[Tensor], Params],
        objective: Callable[[Tensor], Tensor],
        position: Tensor,
    ) -> Callable[[Tensor], Tensor]:
        """Return v -> (H + lam I) v at `position`; what does not depend on v is done once."""
        if self.curvature == "hessian":
            twice = vjp(grad(objective), position)[1]
            return lambda v: twice(v)[0]

        def outputs(vector: Tensor) -> Tensor:
            return problem.outputs(unflatten(vector))

        values, pull_back = vjp(outputs, position)[:2]
        bend = vjp(grad(problem.loss), values)[1]
        # u -> J^T u is linear, so that its own pull-back is v -> J v, at any u.
        push = vjp(lambda u: vjp(outputs, position)[1](u)[0], torch.zeros_like(values))[1]

        def product(v: Tensor) -> Tensor:
            lam = problem.strengths(unflatten(position))
            total: Tensor = pull_back(bend(push(v)[0])[0])[0] + lam * v
            return total

        return product
