"""A logistic regression with a penalty for each weight, its exact hypergradient, and its graph."""

import functools

import torch
from torch.func import grad, hessian, jacrev
from torch.nn.functional import binary_cross_entropy_with_logits as entropy

import hypergrad
from hypergrad._compiled.clean import Cleaned
from hypergrad._compiled.fold import Folded
from hypergrad._compiled.run import runner
from hypergrad._compiled.session import Session
from hypergrad._compiled.trace import traced

FEATURES = 6


def draw(rows=30, seed=0, dtype=torch.float64, device="cpu"):
    """Draw data and logarithms of penalties, and find the weights."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, FEATURES, generator=generator, dtype=dtype)
    y = (torch.rand(rows, generator=generator) > 0.5).to(dtype)
    w, lam = torch.randn(2, FEATURES, generator=generator, dtype=dtype) / 5
    _, inner = losses(X, y)
    for _ in range(3):  # Newton steps, to an inner solution that is not quite one
        w = w - torch.linalg.solve(hessian(inner)(w, lam), grad(inner)(w, lam))
    return tuple(t.to(device) for t in (X, y, w + 1e-4, lam))


def losses(X, y):
    def outer(w, lam):
        return entropy(X[:10] @ w, y[:10])

    def inner(w, lam):
        return entropy(X @ w, y) + (lam.exp() * w.square()).sum() / 2

    return outer, inner


def hypergradient(X, y, w, lam):
    """Solve by as many steps as there are weights, so that the answer is exact to rounding."""
    return hypergrad.implicit_grad(
        *losses(X, y),
        w,
        lam,
        solver=hypergrad.CG(maxiter=FEATURES, rtol=1e-12),
        inner_tol=None,
        return_info=True,
    )


def exact(X, y, w, lam):
    """The same by dense matrices."""
    outer, inner = losses(X, y)
    u = torch.linalg.solve(hessian(inner)(w, lam), grad(outer)(w, lam))
    return -(jacrev(grad(inner), argnums=1)(w, lam).T @ u)


class Keeping(Session):
    """A session that keeps the last graph, and the inputs with which it was made."""

    def _assembled(self, graph, inputs):
        self.graph, self.inputs = graph, inputs
        return runner(graph.graph, graph.constants)


@functools.cache
def graph_of_a_hypergradient(seed=0):
    """Trace a hypergradient, no part of which stays Python."""
    session = Keeping("cudagraphs")
    with session.entered():
        hypergradient(*draw(seed=seed))
    return session.graph, session.inputs


def graph_of(function, *inputs):
    """Trace, clean and fold a function that returns a list."""
    graph = traced(function, inputs)
    cleaned = Cleaned(graph.graph, inputs, graph.constants)
    Folded(cleaned.graph, cleaned.forms, cleaned.constants)
    return cleaned
