"""The meta-gradient of a batch of tasks: implicit, unrolled, first-order or Reptile's."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

import hypergrad
from hypergrad.solvers import Solver
from reproduction.method.episodes import Episodes, Params
from reproduction.method.inner import Curvature, FirstOrderSteps, InnerSolver, ProximalProblem
from reproduction.method.systems import LEAST_LAM, Differentiation, Method

INPUTS_AT_ONCE = 1_200_000  # numbers; pictures of 80 x 80 took four times as long, 20 tasks at once
LAM_PREFIX = "lam of "
LAM_RATE = 5.0
"""Where each leaf has a lam, its logarithm moves so many times as fast as the other parameters."""
PICTURES_AT_ONCE = 100  # more leave the processor's cache: 20-way 5-shot took eight times as long


@dataclass(frozen=True)
class MetaLearner:
    """How a task is adapted to, and how the meta-parameters learn from it.

    Parameters
    ----------
    model
        ``model(params, x)``, the network's outputs.
    loss
        ``loss(outputs, y)``, a scalar, convex in the outputs.
    differentiation
        'implicit' differentiates at the adapted parameters, wherever they came from; 'unrolled'
        through all inner steps and 'truncated' through the last `truncate` of them;
        'first-order' takes the query gradient as it is; 'reptile' adapts to support set and
        queries and takes the way back, meta minus adapted (Nichol et al. 2018).
    inner_solver
        From the meta-parameters to a task's parameters. Unrolling needs `FirstOrderSteps`.
    lam
        Strength of the proximal term.
    linear_solver
        Solves the linear system of an implicit meta-gradient.
    curvature
        Whether A is the Hessian of the inner objective or its Gauss-Newton matrix.
    truncate
        Through how many steps 'truncated' differentiates.
    clip
        A task's meta-gradient is scaled down to this norm where it is longer.
    method
        The name of the system that this is.
    learn_lam
        Whether each leaf of the network has a lam of its own, a meta-parameter beside it that
        starts from `lam`. The derivative by it is implicit, and needs that differentiation.
    """

    model: Callable[[Params, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    differentiation: Differentiation
    inner_solver: InnerSolver
    lam: float
    linear_solver: Solver = hypergrad.CG(maxiter=10)
    curvature: Curvature = "gauss-newton"
    truncate: int = 5
    clip: float = 10.0
    method: Method = "imaml"
    learn_lam: bool = False

    def start(self, params: Params) -> Params:
        """Return the meta-parameters to start from: the network's parameters, and each lam."""
        if not self.learn_lam:
            return params
        start = math.log(self.lam - LEAST_LAM) / LAM_RATE
        return {**params, **{LAM_PREFIX + n: leaf.new_tensor(start) for n, leaf in params.items()}}

    def strengths(self, meta: Params) -> float | Params:
        """Return lam: a number, or the learnt ones by the names of the network's leaves."""
        if not self.learn_lam:
            return self.lam
        return {
            name.removeprefix(LAM_PREFIX): LEAST_LAM + (LAM_RATE * leaf).exp()
            for name, leaf in meta.items()
            if name.startswith(LAM_PREFIX)
        }

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
        return self.inner_solver(self._inner_problem(meta, support_x, support_y), _network(meta))

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

        at_once = max(1, INPUTS_AT_ONCE // episodes.query_x[0].numel())
        return vmap(one_task, chunk_size=at_once)(episodes)

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
        adapted = vmap(self.adapt, in_dims=(None, 0, 0))(
            meta, episodes.support_x, episodes.support_y
        )
        at_once = max(1, PICTURES_AT_ONCE // (episodes.support_x.shape[1] + 1))

        def one_task(params: Params, task: Episodes) -> Tensor:
            def one_query(query: Tensor) -> Tensor:
                return self.model(params, torch.cat([task.support_x, query.unsqueeze(0)]))[-1]

            return vmap(one_query, chunk_size=at_once)(task.query_x)

        return torch.stack([
            one_task(
                {name: leaf[i] for name, leaf in adapted.items()},
                Episodes(*(part[i] for part in episodes)),
            )
            for i in range(len(episodes.query_x))
        ])

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
        estimate = {
            "implicit": self._implicit,
            "unrolled": self._unrolled,
            "truncated": self._unrolled,
            "first-order": self._first_order,
            "reptile": self._reptile,
        }
        gradient, measures = estimate[self.differentiation](meta, task)
        norm = torch.stack([leaf.square().sum() for leaf in gradient.values()]).sum().sqrt()
        scale = (self.clip / norm.clamp(min=self.clip)).to(norm.dtype)
        clipped = {name: scale * leaf for name, leaf in gradient.items()}
        return clipped, {**measures, "gradient_norm": norm}

    def _implicit(self, meta: Params, task: Episodes) -> tuple[Params, dict[str, Tensor]]:
        problem = self._inner_problem(meta, task.support_x, task.support_y)
        gradient, info = hypergrad.implicit_grad(
            lambda params, meta: self._query_loss(params, task),
            problem.condition(self.curvature, self.strengths if self.learn_lam else None),
            self.inner_solver(problem, _network(meta)),
            meta,
            solver=self.linear_solver,
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
        if not (isinstance(solver, FirstOrderSteps) and solver.unrollable):
            raise TypeError(f"one cannot differentiate through the steps of {solver}")
        problem = self._inner_problem(meta, task.support_x, task.support_y)
        gradient, state = hypergrad.unrolled_grad(
            lambda state, meta: self._query_loss(solver.params(state), task),
            lambda state, meta: solver.step(problem, state, meta),
            solver.start,
            meta,
            steps=solver.steps,
            truncate=self.truncate if self.differentiation == "truncated" else None,
            return_params=True,
            on_failure="ignore",  # training counts the tasks that diverge
        )
        return gradient, {"query_loss": self._query_loss(solver.params(state), task)}

    def _first_order(self, meta: Params, task: Episodes) -> tuple[Params, dict[str, Tensor]]:
        params = self.adapt(meta, task.support_x, task.support_y)
        gradient, value = grad_and_value(self._query_loss)(params, task)
        return gradient, {"query_loss": value}

    def _reptile(self, meta: Params, task: Episodes) -> tuple[Params, dict[str, Tensor]]:
        params = self.adapt(
            meta,
            torch.cat([task.support_x, task.query_x]),
            torch.cat([task.support_y, task.query_y]),
        )
        gradient = {name: meta[name] - params[name] for name in meta}
        return gradient, {"query_loss": self._query_loss(params, task)}

    def _query_loss(self, params: Params, task: Episodes) -> Tensor:
        return self.loss(self.model(params, task.query_x), task.query_y)

    def _inner_problem(self, meta: Params, support_x: Tensor, support_y: Tensor) -> ProximalProblem:
        return ProximalProblem(
            outputs=lambda params: self.model(params, support_x),
            loss=lambda outputs: self.loss(outputs, support_y),
            lam=self.strengths(meta),
        )


def _network(meta: Params) -> Params:
    """Leave out the lams."""
    return {name: leaf for name, leaf in meta.items() if not name.startswith(LAM_PREFIX)}
