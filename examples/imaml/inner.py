"""The inner problem of a task, and ways to solve it.

Everything here is written for one task; `torch.func.vmap` batches it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.func import grad, jacrev, vjp, vmap

from examples.imaml.episodes import Params

STEP_SIZES = (1.0, 0.5, 0.25, 0.1, 0.03, 0.0)


@dataclass(frozen=True)
class ProximalProblem:
    """Minimise loss(outputs(params)) + lam / 2 * ||params - centre||^2 over params.

    Parameters
    ----------
    outputs
        From parameters to the network's outputs on the support set.
    loss
        From these outputs to a scalar, convex in the outputs.
    lam
        Strength of the pull towards the centre.
    """

    outputs: Callable[[Params], Tensor]
    loss: Callable[[Tensor], Tensor]
    lam: float

    def data_loss(self, params: Params) -> Tensor:
        """Evaluate the loss without the proximal term."""
        return self.loss(self.outputs(params))

    def proximity(self, params: Params, centre: Params) -> Tensor:
        """Evaluate the proximal term, lam / 2 * ||params - centre||^2."""
        squares = [(params[name] - centre[name]).square().sum() for name in params]
        return self.lam / 2 * torch.stack(squares).sum()

    def objective(self, params: Params, centre: Params) -> Tensor:
        """Evaluate the whole objective."""
        return self.data_loss(params) + self.proximity(params, centre)


class InnerSolver(Protocol):
    """Adapts: from an inner problem and its centre, where it starts, to parameters."""

    def __call__(self, problem: ProximalProblem, centre: Params) -> Params:
        """Return the adapted parameters."""
        ...


@dataclass(frozen=True)
class GradientDescent:
    """A fixed number of gradient steps.

    Parameters
    ----------
    steps
        Number of steps.
    lr
        Step size.
    proximal
        Whether the proximal term takes part; MAML has none.
    """

    steps: int
    lr: float
    proximal: bool = True

    def __call__(self, problem: ProximalProblem, centre: Params) -> Params:
        """Return the parameters after the last step, differentiable in `centre`."""
        params = centre
        for _ in range(self.steps):
            params = self.step(problem, params, centre)
        return params

    def step(self, problem: ProximalProblem, params: Params, centre: Params) -> Params:
        """Take one step."""
        slope = grad(problem.data_loss)(params)
        if self.proximal:
            slope = {
                name: slope[name] + problem.lam * (params[name] - centre[name]) for name in params
            }
        return {name: params[name] - self.lr * slope[name] for name in params}


@dataclass(frozen=True)
class GaussNewtonSteps:
    """Gauss-Newton steps with a line search, each solved in the space of the outputs.

    With J the Jacobian of the m outputs, H the Hessian and g the gradient of the loss in
    them, and w = params - centre, the minimiser of the linearised problem is
    centre + J^T a where (lam I + H J J^T) a = H J w - g, an m x m system. The line
    search takes the best of a few step sizes, zero among them, so that the objective never
    rises and no task can diverge.

    Parameters
    ----------
    steps
        Number of steps; each costs m + 1 backward passes.
    """

    steps: int

    def __call__(self, problem: ProximalProblem, centre: Params) -> Params:
        """Return the parameters after the last step."""
        origin = torch.cat([leaf.reshape(-1) for leaf in centre.values()])
        position = origin
        shape = torch.Size()

        def unflatten(vector: Tensor) -> Params:
            pieces = vector.split([leaf.numel() for leaf in centre.values()])
            return {
                name: piece.view(leaf.shape)
                for (name, leaf), piece in zip(centre.items(), pieces, strict=True)
            }

        def outputs(vector: Tensor) -> Tensor:
            nonlocal shape
            values = problem.outputs(unflatten(vector))
            shape = values.shape
            return values.reshape(-1)

        def loss(values: Tensor) -> Tensor:
            return problem.loss(values.view(shape))

        def objective(vector: Tensor) -> Tensor:
            distance = (vector - origin).square().sum()
            return loss(outputs(vector)) + problem.lam / 2 * distance

        for _ in range(self.steps):
            direction = _newton_point(outputs, loss, position, origin, problem.lam) - position
            position = _line_search(objective, position, direction)
        return unflatten(position)


def _newton_point(
    outputs: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor], Tensor],
    position: Tensor,
    origin: Tensor,
    lam: float,
) -> Tensor:
    """Minimise the problem with the outputs linearised at `position`."""
    values, pull_back = vjp(outputs, position)[:2]
    identity = torch.eye(values.numel(), dtype=values.dtype, device=values.device)
    jacobian: Tensor = vmap(pull_back)(identity)[0]
    slope = grad(loss)(values)
    curvature: Tensor = jacrev(grad(loss))(values)
    matrix = lam * identity + curvature @ (jacobian @ jacobian.T)
    right = curvature @ (jacobian @ (position - origin)) - slope
    weights, _ = torch.linalg.solve_ex(matrix, right.unsqueeze(-1))
    return origin + (jacobian.T @ weights).squeeze(-1)


def _line_search(
    objective: Callable[[Tensor], Tensor], position: Tensor, direction: Tensor
) -> Tensor:
    sizes = torch.tensor(STEP_SIZES, dtype=position.dtype, device=position.device)
    values = vmap(lambda size: objective(position + size * direction))(sizes)
    best = torch.nan_to_num(values, nan=torch.inf).argmin()
    return position + sizes[best] * direction
