"""The meta-gradient of a batch of tasks: implicit, unrolled or first-order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

import hypergrad
from examples.imaml.episodes import Episodes, Params
from examples.imaml.inner import GradientDescent, InnerSolver, ProximalProblem

Method: TypeAlias = Literal["imaml", "maml", "fomaml"]
Curvature: TypeAlias = Literal["hessian", "gauss-newton"]

QUERIES_AT_ONCE = 15


@dataclass(frozen=True)
class MetaLearner:
    """How a task is adapted to, and how the meta-parameters learn from it.

    Parameters
    ----------
    model
        ``model(params, x)``, the network's outputs.
    loss
        ``loss(outputs, y)``, a scalar, convex in the outputs.
    method
        'imaml' differentiates implicitly, at the adapted parameters; 'maml' differentiates
        through the inner steps; 'fomaml' takes the query gradient as it is.
    inner_solver
        From the meta-parameters to a task's parameters. MAML needs `GradientDescent`.
    lam
        Strength of the proximal term.
    cg_steps
        At most so many products in the linear solve of a meta-gradient.
    curvature
        Whether A is the Hessian of the inner objective or its Gauss-Newton matrix.
    damping
        Added to A.
    clip
        A task's meta-gradient is scaled down to this norm where it is longer.
    """

    model: Callable[[Params, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    method: Method
    inner_solver: InnerSolver
    lam: float
    cg_steps: int = 10
    curvature: Curvature = "gauss-newton"
    damping: float = 0.0
    clip: float = 10.0

    def adapt(self, meta: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """Adapt the meta-parameters to one task.

        Parameters
        ----------
        meta
            The meta-parameters.
        support_x, support_y
            The task's support set.

        Returns
        -------
        Params
            The task's parameters.
        """
        return self.inner_solver(self._inner_problem(support_x, support_y), meta)

    def predict(self, meta: Params, episodes: Episodes) -> Tensor:
        """Adapt to each task of a batch and evaluate the network at its queries.

        Parameters
        ----------
        meta
            The meta-parameters.
        episodes
            A batch of tasks.

        Returns
        -------
        Tensor
            The outputs, (tasks, queries, ...).
        """

        def one_task(task: Episodes) -> Tensor:
            return self.model(self.adapt(meta, task.support_x, task.support_y), task.query_x)

        return vmap(one_task)(episodes)

    def predict_one_at_a_time(self, meta: Params, episodes: Episodes) -> Tensor:
        """Adapt to each task, and evaluate each query in a batch of the support set and itself.

        Where the network takes statistics of its batch, a query then learns nothing from the
        others.

        Parameters
        ----------
        meta
            The meta-parameters.
        episodes
            A batch of tasks.

        Returns
        -------
        Tensor
            The outputs, (tasks, queries, ...).
        """

        def one_task(task: Episodes) -> Tensor:
            adapted = self.adapt(meta, task.support_x, task.support_y)

            def one_query(query: Tensor) -> Tensor:
                return self.model(adapted, torch.cat([task.support_x, query.unsqueeze(0)]))[-1]

            return vmap(one_query, chunk_size=QUERIES_AT_ONCE)(task.query_x)

        return vmap(one_task)(episodes)

    def meta_gradient(self, meta: Params, episodes: Episodes) -> tuple[Params, dict[str, Tensor]]:
        """Average the tasks' meta-gradients, each clipped.

        Parameters
        ----------
        meta
            The meta-parameters.
        episodes
            A batch of tasks.

        Returns
        -------
        gradient : Params
            Shaped like `meta`.
        measures : dict of Tensor
            What was measured, one entry a task.
        """
        gradients, measures = vmap(self.task_gradient, in_dims=(None, 0))(meta, episodes)
        return {name: leaf.mean(0) for name, leaf in gradients.items()}, measures

    def task_gradient(self, meta: Params, task: Episodes) -> tuple[Params, dict[str, Tensor]]:
        """Compute the meta-gradient of one task, clipped.

        Parameters
        ----------
        meta
            The meta-parameters.
        task
            One task.

        Returns
        -------
        gradient : Params
            Shaped like `meta`.
        measures : dict of Tensor
            What was measured, each a scalar.
        """
        estimate = {"imaml": self._implicit, "maml": self._unrolled, "fomaml": self._first_order}
        gradient, measures = estimate[self.method](meta, task)
        norm = torch.stack([leaf.square().sum() for leaf in gradient.values()]).sum().sqrt()
        scale = (self.clip / norm.clamp(min=self.clip)).to(norm.dtype)
        clipped = {name: scale * leaf for name, leaf in gradient.items()}
        return clipped, {**measures, "gradient_norm": norm}

    def _implicit(self, meta: Params, task: Episodes) -> tuple[Params, dict[str, Tensor]]:
        problem = self._inner_problem(task.support_x, task.support_y)
        inner = (
            hypergrad.Minimum(problem.objective)
            if self.curvature == "hessian"
            else hypergrad.GaussNewton(
                lambda params, meta: problem.outputs(params),
                lambda outputs, meta: problem.loss(outputs),
                problem.proximity,
            )
        )
        gradient, info = hypergrad.implicit_grad(
            lambda params, meta: self._query_loss(params, task),
            inner,
            self.inner_solver(problem, meta),
            meta,
            solver=hypergrad.CG(maxiter=self.cg_steps, damping=self.damping),
            inner_tol=None,
            on_failure="ignore",
            return_info=True,
        )
        return gradient, {
            "query_loss": info.outer_value,
            "products": info.matvecs,
            "linear_residual": info.residual_norm,
            "negative_curvature": info.negative_curvature,
            "inner_residual": info.inner_residual,
        }

    def _unrolled(self, meta: Params, task: Episodes) -> tuple[Params, dict[str, Tensor]]:
        solver = self.inner_solver
        if not isinstance(solver, GradientDescent):
            raise TypeError("MAML differentiates through gradient steps: GradientDescent needed")
        problem = self._inner_problem(task.support_x, task.support_y)
        gradient, params = hypergrad.unrolled_grad(
            lambda params, meta: self._query_loss(params, task),
            lambda params, meta: solver.step(problem, params, meta),
            lambda meta: meta,
            meta,
            steps=solver.steps,
            return_params=True,
        )
        return gradient, {"query_loss": self._query_loss(params, task)}

    def _first_order(self, meta: Params, task: Episodes) -> tuple[Params, dict[str, Tensor]]:
        params = self.adapt(meta, task.support_x, task.support_y)
        gradient, value = grad_and_value(self._query_loss)(params, task)
        return gradient, {"query_loss": value}

    def _query_loss(self, params: Params, task: Episodes) -> Tensor:
        return self.loss(self.model(params, task.query_x), task.query_y)

    def _inner_problem(self, support_x: Tensor, support_y: Tensor) -> ProximalProblem:
        return ProximalProblem(
            outputs=lambda params: self.model(params, support_x),
            loss=lambda outputs: self.loss(outputs, support_y),
            lam=self.lam,
        )
