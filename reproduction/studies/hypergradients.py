"""Sinusoid tasks, and the ways to a hypergradient on them that are compared."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, vmap

import hypergrad
from reproduction.method.episodes import Episodes, Params
from reproduction.method.inner import (
    GaussNewtonSteps,
    GradientDescent,
    InnerSolver,
    ProximalProblem,
)
from reproduction.method.models import SinusoidMLP
from reproduction.method.sinusoid_tasks import SinusoidTasks

SHOTS, QUERIES, RATE, PRODUCTS, KEPT = 10, 20, 0.01, 50, 8
MOST_GAUSS_NEWTON_STEPS = 32
TASKS_SEED = 20240501


@dataclass(frozen=True)
class Bench:
    """A network, its tasks, and the strength of the proximal term.

    Parameters
    ----------
    network
        Whose parameters are the meta-parameters.
    tasks
        A batch of them.
    lam
        Strength of the proximal term.
    """

    network: nn.Module
    tasks: Episodes
    lam: float

    @property
    def meta(self) -> Params:
        """The meta-parameters."""
        return {name: p.detach() for name, p in self.network.named_parameters()}

    def inner(self, task: Episodes) -> ProximalProblem:
        """Return the inner problem of one task."""
        return ProximalProblem(
            outputs=lambda params: functional_call(self.network, params, (task.support_x,)),
            loss=lambda outputs: (outputs - task.support_y).square().mean(),
            lam=self.lam,
        )

    def outer(self, params: Params, task: Episodes) -> Tensor:
        """Evaluate the query loss of one task."""
        outputs: Tensor = functional_call(self.network, params, (task.query_x,))
        return (outputs - task.query_y).square().mean()

    def solve(self, solver: InnerSolver) -> Params:
        """Adapt to every task."""
        solved: Params = vmap(lambda task: solver(self.inner(task), self.meta))(self.tasks)
        return solved

    def descend(self, steps: int, target: float = 0.0) -> Params:
        """Adapt by so many gradient steps, or fewer where no task's gradient is above `target`."""
        one = GradientDescent(1, RATE)
        step = vmap(lambda params, task: one.step(self.inner(task), params, self.meta))
        count = len(self.tasks.query_x)
        params = {name: leaf.expand(count, *leaf.shape) for name, leaf in self.meta.items()}
        for k in range(steps):
            if target and k % 200 == 0 and self.slopes(params).max() <= target:
                break
            params = step(params, self.tasks)
        return params

    def slopes(self, params: Params) -> Tensor:
        """Return the norm of each task's gradient of the inner objective."""

        def one(params: Params, task: Episodes) -> Tensor:
            found = grad(lambda params: self.inner(task).objective(params, self.meta))(params)
            return torch.cat([leaf.reshape(-1) for leaf in found.values()]).norm()

        norms: Tensor = vmap(one)(params, self.tasks)
        return norms

    def exact(self, params: Params) -> tuple[Tensor, Tensor]:
        """Form and factorise every task's Hessian at solved `params`.

        Parameters
        ----------
        params
            The inner solutions, a leading dimension for the tasks.

        Returns
        -------
        hypergradient : Tensor
            (tasks, n); NaN where A is not positive definite.
        definite : Tensor
            Where it is.
        """
        found = []
        for k in range(len(self.tasks.query_x)):
            task = Episodes(*(part[k] for part in self.tasks))
            sizes = [leaf.numel() for leaf in self.meta.values()]

            def unflatten(vector: Tensor, sizes: list[int] = sizes) -> Params:
                pieces = vector.split(sizes)
                return {
                    name: piece.view(leaf.shape)
                    for (name, leaf), piece in zip(self.meta.items(), pieces, strict=True)
                }

            point = torch.cat([leaf[k].reshape(-1) for leaf in params.values()])
            inner = self.inner(task)
            A = hessian(lambda v: inner.objective(unflatten(v), self.meta))(point)  # noqa: B023
            slope = grad(lambda v: self.outer(unflatten(v), task))(point)  # noqa: B023
            factor, failed = torch.linalg.cholesky_ex(A)
            u = torch.cholesky_solve(slope[:, None], factor)[:, 0]
            found.append(self.lam * u if not failed else torch.full_like(u, torch.nan))
        stacked = torch.stack(found)
        return stacked, stacked.isfinite().all(1)

    def implicit(self, params: Params) -> Tensor:
        """Return every task's implicit gradient at `params`, flat."""

        def one(params: Params, task: Episodes) -> Params:
            answer: Params = hypergrad.implicit_grad(
                lambda params, meta: self.outer(params, task),
                self.inner(task).objective,
                params,
                self.meta,
                solver=hypergrad.CG(maxiter=PRODUCTS),
                inner_tol=None,  # what an unsolved inner problem costs is measured here
                on_failure="ignore",
            )
            return answer

        return _flat(vmap(one)(params, self.tasks))

    def unrolled(self, steps: int, kept: int | None = None) -> Tensor:
        """Return every task's gradient through the steps, flat."""
        one_step = GradientDescent(1, RATE)

        def one(task: Episodes) -> Params:
            problem = self.inner(task)
            found: Params = hypergrad.unrolled_grad(
                lambda params, meta: self.outer(params, task),
                lambda params, meta: one_step.step(problem, params, meta),
                lambda meta: meta,
                self.meta,
                steps=steps,
                truncate=kept,
            )
            return found

        return _flat(vmap(one)(self.tasks))

    def estimators(self, steps: int) -> dict[str, Callable[[], Tensor]]:
        """Return the ways to a meta-gradient after so many steps."""
        found = {
            "implicit": lambda: self.implicit(self.descend(steps)),
            "unrolled": lambda: self.unrolled(steps),
            f"truncated to {KEPT}": lambda: self.unrolled(steps, KEPT),
        }
        if steps <= MOST_GAUSS_NEWTON_STEPS:
            solver = GaussNewtonSteps(steps)
            found["implicit, Gauss-Newton steps"] = lambda: self.implicit(self.solve(solver))
        return found


def draw_network(seed: int, activation: type[nn.Module]) -> nn.Module:
    """Make the sinusoid network with this activation, in float64."""
    torch.manual_seed(seed)
    layers = [activation() if isinstance(m, nn.ReLU) else m for m in SinusoidMLP()]
    return nn.Sequential(*layers).double()


def draw_tasks(count: int) -> Episodes:
    """Draw the tasks, which no seed of a run changes."""
    generator = torch.Generator().manual_seed(TASKS_SEED)
    tasks = SinusoidTasks(SHOTS, QUERIES).sample(count, generator)
    return Episodes(*(part.double() for part in tasks))


def _flat(params: Params) -> Tensor:
    return torch.cat([leaf.flatten(1) for leaf in params.values()], 1)
