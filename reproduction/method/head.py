"""iMAML on the last layer: a task adapts the head alone, and its inner problem is solved exactly.

The features z of a shared body are computed once for a task; the head phi minimises

    loss(z phi', y) + lam / 2 * ||phi - theta||^2.

Body, theta and lam are meta-learnt through the implicit gradient of phi. Since the features enter
the inner problem as its arguments, no product of the linear solve touches the body: autograd takes
the derivative in them on to its parameters.

That the head is enough is what ANIL found (Raghu et al. 2020); R2-D2 (Bertinetto et al. 2019) and
MetaOptNet (Lee et al. 2019) solve a convex head exactly too. Here the inner problem is that of
iMAML (Rajeswaran et al. 2019) to the letter: a proximal term around meta-learnt parameters, with a
strength that is meta-learnt as well.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import vmap

import hypergrad
from hypergrad.solvers import Solver
from reproduction.method.episodes import Episodes, Params
from reproduction.method.head_newton import OutputLoss, solve_head
from reproduction.method.meta import PICTURES_AT_ONCE
from reproduction.method.systems import LEAST_HEAD_LAM, Differentiation, Method

SOLVED_RESIDUAL, SOLVED_INNER_RESIDUAL = 1e-4, 1e-3
"""A task counts as solved up to these relative residuals of its linear system and inner problem."""
STRENGTH = "strength"
STRENGTH_RATE = 5.0
"""Adam moves log lam so many times as fast as the other meta-parameters."""


def split_head(network: nn.Module) -> tuple[nn.Sequential, tuple[str, str]]:
    """Divide a network into its body and its last layer.

    Parameters
    ----------
    network
        A sequence of modules that ends with a linear layer.

    Returns
    -------
    body : Sequential
        All but the last layer; its parameters have the same names.
    head : tuple of str
        The names of the last layer's weight and bias.

    Raises
    ------
    TypeError
        If it is another network.
    """
    if not (isinstance(network, nn.Sequential) and isinstance(network[-1], nn.Linear)):
        raise TypeError(f"the network has no linear layer at its end: {type(network).__name__}")
    *names, last = (name for name, _ in network.named_children())
    body = nn.Sequential(OrderedDict((name, network.get_submodule(name)) for name in names))
    return body, (f"{last}.weight", f"{last}.bias")


@dataclass(frozen=True)
class HeadLearner:
    """How a task's head is adapted, and how the meta-parameters learn from it.

    The meta-parameters are those of the network, and `STRENGTH`: lam is
    ``LEAST_HEAD_LAM + exp(STRENGTH_RATE * strength)``.

    Parameters
    ----------
    body
        ``body(params, x)``, a task's features.
    head
        Names of the last layer's weight and bias.
    loss
        Of outputs and targets.
    steps
        Newton steps.
    lam
        Strength of the proximal term at the start.
    linear_solver
        Solves the linear systems of the implicit gradients.
    clip
        The mean meta-gradient is scaled down to this norm where it is longer.
    method
        The name of the system that this is.
    """

    body: Callable[[Params, Tensor], Tensor]
    head: tuple[str, str]
    loss: OutputLoss
    steps: int
    lam: float
    linear_solver: Solver = hypergrad.CG()
    clip: float = 10.0
    method: Method = "imaml-head"
    differentiation: Differentiation = "implicit"

    def start(self, params: Params) -> Params:
        """Return the meta-parameters to start from: the network's, and the strength."""
        strength = math.log(self.lam - LEAST_HEAD_LAM) / STRENGTH_RATE
        return {**params, STRENGTH: params[self.head[1]].new_tensor(strength)}

    def model(self, meta: Params, x: Tensor) -> Tensor:
        """Return a task's outputs before adaptation."""
        return self._features(meta, x) @ self._centre(meta).mT

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
        with torch.no_grad():
            heads = self._adapt(meta, episodes)
            return self._of_all_tasks(meta, episodes.query_x) @ heads.mT

    def predict_one_at_a_time(self, meta: Params, episodes: Episodes) -> Tensor:
        """Adapt to each task, and evaluate each query in a batch of the support set and itself.

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
        at_once = max(1, PICTURES_AT_ONCE // (episodes.support_x.shape[1] + 1))

        def one_task(support: Tensor, queries: Tensor) -> Tensor:
            def one_query(query: Tensor) -> Tensor:
                return self._features(meta, torch.cat([support, query.unsqueeze(0)]))[-1]

            return vmap(one_query, chunk_size=at_once)(queries)

        with torch.no_grad():
            heads = self._adapt(meta, episodes)
            pairs = zip(episodes.support_x, episodes.query_x, strict=True)
            return torch.stack([one_task(*pair) for pair in pairs]) @ heads.mT

    def meta_gradient(self, meta: Params, episodes: Episodes) -> tuple[Params, dict[str, Tensor]]:
        """Average the tasks' meta-gradients.

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
        meta = {name: leaf.detach().requires_grad_() for name, leaf in meta.items()}
        evidence: list[hypergrad.SolveInfo] = []
        solve = hypergrad.custom_argmin(
            self._objective,
            solver=self.linear_solver,
            inner_tol=SOLVED_INNER_RESIDUAL,
            on_failure="ignore",  # training counts the tasks
            callback=evidence.append,
        )(self._solve)
        support = self._of_all_tasks(meta, episodes.support_x)
        queries = self._of_all_tasks(meta, episodes.query_x)
        centre, lam = self._centre(meta), self.strength(meta)
        heads = vmap(lambda z, y: solve(None, z, y, centre, lam))(support, episodes.support_y)
        losses = vmap(self.loss)(queries @ heads.mT, episodes.query_y)
        slopes = torch.autograd.grad(losses.mean(), list(meta.values()))
        norm = torch.stack([leaf.square().sum() for leaf in slopes]).sum().sqrt()
        scale = (self.clip / norm.clamp(min=self.clip)).to(norm.dtype)
        (info,) = evidence
        solved = (info.residual_norm <= SOLVED_RESIDUAL) & (
            info.inner_residual <= SOLVED_INNER_RESIDUAL
        )
        return {name: scale * leaf for name, leaf in zip(meta, slopes, strict=True)}, {
            "query_loss": losses.detach(),
            "products": info.matvecs,
            "linear_residual": info.residual_norm,
            "negative_curvature": info.negative_curvature,
            "inner_residual": info.inner_residual,
            "unsolved": ~solved | info.negative_curvature,
            "lam": lam.detach().expand(len(losses)),
            "gradient_norm": norm.expand(len(losses)),
        }

    def strength(self, meta: Params) -> Tensor:
        """Return lam."""
        return LEAST_HEAD_LAM + (STRENGTH_RATE * meta[STRENGTH]).exp()

    def _solve(self, init: None, z: Tensor, y: Tensor, centre: Tensor, lam: Tensor) -> Tensor:
        return solve_head(self.loss, z, y, centre, lam, self.steps)

    def _objective(self, phi: Tensor, z: Tensor, y: Tensor, centre: Tensor, lam: Tensor) -> Tensor:
        return self.loss(z @ phi.mT, y) + lam / 2 * (phi - centre).square().sum()

    def _adapt(self, meta: Params, episodes: Episodes) -> Tensor:
        """Return each task's head, (tasks, K, d)."""
        centre, lam = self._centre(meta), self.strength(meta)
        support = self._of_all_tasks(meta, episodes.support_x)
        heads: Tensor = vmap(lambda z, y: self._solve(None, z, y, centre, lam))(
            support, episodes.support_y
        )
        return heads

    def _centre(self, meta: Params) -> Tensor:
        """Return weight and bias of the last layer as one matrix, (K, d)."""
        weight, bias = (meta[name] for name in self.head)
        return torch.cat([weight, bias.unsqueeze(1)], 1)

    def _features(self, meta: Params, x: Tensor) -> Tensor:
        """Return one task's features, of length about one, and a one for the bias, (S, d)."""
        others = {STRENGTH, *self.head}
        z = self.body({name: leaf for name, leaf in meta.items() if name not in others}, x)
        z = z / math.sqrt(z.shape[1])
        return torch.cat([z, torch.ones_like(z[:, :1])], 1)

    def _of_all_tasks(self, meta: Params, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # a task's pictures fit into the processor's cache
            return torch.stack([self._features(meta, one) for one in x])
        features: Tensor = vmap(lambda one: self._features(meta, one))(x)
        return features
