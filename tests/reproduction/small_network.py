"""A small regression with a network, and what is known of it by other means."""

import torch
from torch.func import functional_call, grad, hessian

from reproduction.method.inner import ProximalProblem
from reproduction.method.meta import MetaLearner

LAM, LR, POINTS = 0.3, 0.1, 4


def network_problem(x, y, network, lam=LAM):
    return ProximalProblem(
        lambda p: functional_call(network, p, (x,)), lambda o: (o - y).square().mean(), lam
    )


def flat(params):
    return torch.cat([leaf.reshape(-1) for leaf in params.values()])


def dense_hessian(network, params, x, y):
    """Return the Hessian of the support loss alone, by torch.func.hessian."""
    shapes = [(name, leaf.shape, leaf.numel()) for name, leaf in params.items()]

    def loss(vector):
        pieces = vector.split([count for _, _, count in shapes])
        leaves = {n: p.view(s) for (n, s, _), p in zip(shapes, pieces, strict=True)}
        return (functional_call(network, leaves, (x,)) - y).square().mean()

    return hessian(loss)(flat(params))


def learner(network, differentiation, solver, **options):
    options = {"lam": LAM, "clip": 1e9, **options}
    return MetaLearner(
        lambda params, x: functional_call(network, params, (x,)),
        lambda outputs, y: (outputs - y).square().mean(),
        differentiation,
        solver,
        **options,
    )


def query_gradient(network, params, task):
    loss = lambda p: (functional_call(network, p, (task.query_x,)) - task.query_y).square().mean()
    return flat(grad(loss)(params))
