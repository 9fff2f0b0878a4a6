"""The inner problem of a task, and ways to solve it.

Everything here is written for one task; `torch.func.vmap` batches it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.func import grad, jacrev, vjp, vmap

import hypergrad
from reproduction.method.episodes import Params

Curvature: TypeAlias = Literal["hessian", "gauss-newton"]

STEP_SIZES = (1.0, 0.5, 0.25, 0.1, 0.03, 0.0)


@dataclass(frozen=True)
class ProximalProblem:
    """Minimise loss(outputs(params)) + lam / 2 * ||params - centre||^2 over params.

    With a lam for each leaf the proximal term is the sum of the leaves' terms.

    Parameters
    ----------
    outputs
        From parameters to the network's outputs on the support set.
    loss
        From these outputs to a scalar, convex in the outputs.
    lam
        Strength of the pull towards the centre: a number, or one for each leaf, by name.
    """

    outputs: Callable[[Params], Tensor]
    loss: Callable[[Tensor], Tensor]
    lam: float | Params

    def strengths(self, params: Params) -> float | Tensor:
        """Return lam: a number, or a vector as `flatten` makes one of `params`."""
        lam = self.lam
        if not isinstance(lam, dict):
            return lam
        return flatten({name: lam[name].expand_as(leaf) for name, leaf in params.items()})[0]

    def data_loss(self, params: Params) -> Tensor:
        """Evaluate the loss without the proximal term."""
        return self.loss(self.outputs(params))

    def proximity(self, params: Params, centre: Params) -> Tensor:
        """Evaluate the proximal term, lam / 2 * ||params - centre||^2."""
        return proximity(params, centre, self.lam)

    def objective(self, params: Params, centre: Params) -> Tensor:
        """Evaluate the whole objective."""
        return self.data_loss(params) + self.proximity(params, centre)

    def condition(
        self, curvature: Curvature, lam_of: Callable[[Params], float | Params] | None = None
    ) -> hypergrad.Minimum | hypergrad.GaussNewton:
        """State what holds at the solution, with the matrix A that goes with it.

        Parameters
        ----------
        curvature
            With 'hessian' A is H + lam I, H the Hessian of the loss; with 'gauss-newton' the
            Gauss-Newton matrix takes H's place.
        lam_of
            lam as a function of the meta-parameters, which are then differentiated through it.
            None: lam does not depend on them.

        Returns
        -------
        Minimum or GaussNewton
            For `hypergrad.implicit_grad`.
        """

        def pull(params: Params, meta: Params) -> Tensor:
            return proximity(params, meta, lam_of(meta) if lam_of else self.lam)

        if curvature == "hessian":
            return hypergrad.Minimum(lambda p, meta: self.data_loss(p) + pull(p, meta))
        return hypergrad.GaussNewton(
            lambda params, meta: self.outputs(params),
            lambda outputs, meta: self.loss(outputs),
            pull,
        )


def proximity(params: Params, centre: Params, lam: float | Params) -> Tensor:
    """Evaluate the proximal term; `centre` may have further leaves."""
    squares = {name: (params[name] - centre[name]).square().sum() for name in params}
    if isinstance(lam, dict):
        return torch.stack([lam[name] / 2 * square for name, square in squares.items()]).sum()
    return lam / 2 * torch.stack(list(squares.values())).sum()


class InnerSolver(Protocol):
    """Adapts: from an inner problem and its centre to parameters."""

    def __call__(
        self, problem: ProximalProblem, centre: Params, first: Params | None = None
    ) -> Params:
        """Return the adapted parameters; the steps begin at `first`, by default the centre."""
        ...


class FirstOrderSteps(ABC):
    """Steps that take gradients alone, so that one may differentiate through them.

    A state is a pytree of tensors: the parameters and whatever the steps remember.
    """

    steps: int
    lr: float
    proximal: bool

    @property
    def unrollable(self) -> bool:
        """Whether the steps have finite derivatives."""
        return True

    def __call__(
        self, problem: ProximalProblem, centre: Params, first: Params | None = None
    ) -> Params:
        """Return the parameters after the last step, differentiable in `centre`."""
        state = self.start(first or centre)
        for _ in range(self.steps):
            state = self.step(problem, state, centre)
        return self.params(state)

    def start(self, centre: Params) -> Any:
        """Return the state before the first step."""
        return centre

    @abstractmethod
    def step(self, problem: ProximalProblem, state: Any, centre: Params) -> Any:
        """Take one step."""

    def params(self, state: Any) -> Params:
        """Return the parameters of a state."""
        found: Params = state
        return found

    def slope(self, problem: ProximalProblem, params: Params, centre: Params) -> Params:
        """Return the gradient that the steps follow."""
        slope: Params = grad(problem.data_loss)(params)
        if not self.proximal:
            return slope
        lam = problem.lam
        return {
            name: slope[name]
            + (lam[name] if isinstance(lam, dict) else lam) * (params[name] - centre[name])
            for name in params
        }


@dataclass(frozen=True)
class GradientDescent(FirstOrderSteps):
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

    def step(self, problem: ProximalProblem, state: Params, centre: Params) -> Params:
        """Take one step."""
        slope = self.slope(problem, state, centre)
        return {name: state[name] - self.lr * slope[name] for name in state}


@dataclass(frozen=True)
class Nesterov(FirstOrderSteps):
    """A fixed number of steps of Nesterov's accelerated gradient descent.

    A gradient step from the point ahead, y, leads to x; the next point ahead is
    x + momentum * (x - the x before).

    Parameters
    ----------
    steps
        Number of steps.
    lr
        Step size.
    proximal
        Whether the proximal term takes part; MAML has none.
    momentum
        Best at (1 - sqrt(lr mu)) / (1 + sqrt(lr mu)) where the curvature is mu at least.
    """

    steps: int
    lr: float
    proximal: bool = True
    momentum: float = 0.9

    def start(self, centre: Params) -> tuple[Params, Params]:
        """Return the parameters, and the same as the point ahead."""
        return centre, centre

    def step(
        self, problem: ProximalProblem, state: tuple[Params, Params], centre: Params
    ) -> tuple[Params, Params]:
        """Take one step."""
        before, ahead = state
        slope = self.slope(problem, ahead, centre)
        params = {name: ahead[name] - self.lr * slope[name] for name in ahead}
        ahead = {
            name: params[name] + self.momentum * (params[name] - before[name]) for name in params
        }
        return params, ahead

    def params(self, state: tuple[Params, Params]) -> Params:
        """Return the parameters, and not the point ahead."""
        return state[0]


@dataclass(frozen=True)
class GaussNewtonSteps:
    """Gauss-Newton steps with a line search, each solved in the space of the outputs.

    With J the Jacobian of the m outputs, H the Hessian and g the gradient of the loss in
    them, and w = params - centre, the minimiser of the linearised problem is
    centre + J^T a where (lam I + H J J^T) a = H J w - g, an m x m system. (With a lam for each
    leaf, L the diagonal matrix of them: centre + L^-1 J^T a, (I + H J L^-1 J^T) a.) The line
    search takes the best of a few step sizes, zero among them, so that the objective never
    rises and no task can diverge.

    Parameters
    ----------
    steps
        Number of steps; each costs m + 1 backward passes.
    """

    steps: int

    def __call__(
        self, problem: ProximalProblem, centre: Params, first: Params | None = None
    ) -> Params:
        """Return the parameters after the last step."""
        origin, unflatten = flatten(centre)
        position = flatten(first)[0] if first else origin
        lam = problem.strengths(centre)
        shape = torch.Size()

        def outputs(vector: Tensor) -> Tensor:
            nonlocal shape
            values = problem.outputs(unflatten(vector))
            shape = values.shape
            return values.reshape(-1)

        def loss(values: Tensor) -> Tensor:
            return problem.loss(values.view(shape))

        def objective(vector: Tensor) -> Tensor:
            if isinstance(lam, Tensor):
                return loss(outputs(vector)) + (lam / 2 * (vector - origin).square()).sum()
            return loss(outputs(vector)) + lam / 2 * (vector - origin).square().sum()

        for _ in range(self.steps):
            direction = _newton_point(outputs, loss, position, origin, lam) - position
            position = line_search(objective, position, direction)
        return unflatten(position)


def _newton_point(
    outputs: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor], Tensor],
    position: Tensor,
    origin: Tensor,
    lam: float | Tensor,
) -> Tensor:
    """Minimise the problem with the outputs linearised at `position`."""
    values, pull_back = vjp(outputs, position)[:2]
    identity = torch.eye(values.numel(), dtype=values.dtype, device=values.device)
    jacobian: Tensor = vmap(pull_back)(identity)[0]

    def slope_twice(values: Tensor) -> tuple[Tensor, Tensor]:
        slope: Tensor = grad(loss)(values)
        return slope, slope

    curvature, slope = jacrev(slope_twice, has_aux=True)(values)
    # In a batch, products with a row are ten times as quick as products with a column.
    moved = ((position - origin).unsqueeze(0) @ jacobian.mT).squeeze(0)
    scaled, ridge = (jacobian / lam, 1.0) if isinstance(lam, Tensor) else (jacobian, lam)
    matrix = ridge * identity + curvature @ torch.einsum("ip,jp->ij", jacobian, scaled)
    right = curvature @ moved - slope
    weights, _ = torch.linalg.solve_ex(matrix, right.unsqueeze(-1))
    return origin + (weights.mT @ scaled).squeeze(0)


@dataclass(frozen=True)
class HeadFirst:
    """The last layer solved first, the rest held at the centre; then steps on all from there.

    For the last layer the outputs are linear, so that Gauss-Newton steps are Newton's.

    Parameters
    ----------
    steps
        Of the last layer.
    head
        Names of its parameters.
    then
        Takes the steps that follow.
    """

    steps: int
    head: tuple[str, ...]
    then: InnerSolver

    def __call__(
        self, problem: ProximalProblem, centre: Params, first: Params | None = None
    ) -> Params:
        """Return the parameters after the last step."""
        begin = first or centre

        def part(params: Params) -> Params:
            return {name: params[name] for name in self.head}

        lam = problem.lam
        of_head = ProximalProblem(
            outputs=lambda own: problem.outputs({**begin, **own}),
            loss=problem.loss,
            lam=part(lam) if isinstance(lam, dict) else lam,
        )
        own = GaussNewtonSteps(self.steps)(of_head, part(centre), part(begin))
        return self.then(problem, centre, {**begin, **own})


def line_search(
    objective: Callable[[Tensor], Tensor], position: Tensor, direction: Tensor
) -> Tensor:
    """Go along `direction` by the best of `STEP_SIZES`, zero among them."""
    # Filled on the device: a copy of numbers from the host would wait for a GPU.
    sizes = torch.cat([position.new_full((1,), size) for size in STEP_SIZES])
    values = vmap(lambda size: objective(position + size * direction))(sizes)
    best = torch.nan_to_num(values, nan=torch.inf).argmin(0, keepdim=True)
    return position + sizes.index_select(0, best) * direction


def flatten(params: Params) -> tuple[Tensor, Callable[[Tensor], Params]]:
    """Return parameters as one vector, and what turns a vector back into parameters."""

    def unflatten(vector: Tensor) -> Params:
        pieces = vector.split([leaf.numel() for leaf in params.values()])
        return {
            name: piece.view(leaf.shape)
            for (name, leaf), piece in zip(params.items(), pieces, strict=True)
        }

    return torch.cat([leaf.reshape(-1) for leaf in params.values()]), unflatten
