"""Arguments of a decorated solver that are passed by keyword."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

import hypergrad
from hypergrad import custom_argmin
from tests.quartic import D, close, leaf, randn

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
A, B = torch.tensor([1.0, 2.0], dtype=D), torch.tensor([1.0, 3.0], dtype=D)


def test_keyword_arguments_reach_the_solver_alone_and_may_not_carry_a_derivative():
    @custom_argmin(lambda w, a: ((w - a) ** 2).sum())
    def fit(init, a, *, steps=1, weight=None):
        return a * min(steps, 1)

    close(fit(None, A, steps=5), A)
    fit(None, A, weight=torch.ones(2))
    with pytest.raises(hypergrad.UnsupportedOperation, match="weight"):
        fit(None, A, weight=leaf(A))
    with pytest.raises(hypergrad.UnsupportedOperation, match="weight"):
        grad(lambda a: fit(None, A, weight={"deep": a}).sum())(A)
    with pytest.raises(hypergrad.UnsupportedOperation, match="weight"):
        vmap(lambda a: fit(None, A, weight=a))(A[None])


def _weighted(w, lam, X, y, scale=1.0):
    return ((X @ w - y) ** 2).sum() / 2 + scale * lam * (w @ w) / 2


@pytest.mark.parametrize("derive", [grad, jacfwd])
def test_arguments_by_keyword_are_differentiated_like_positional_ones(derive):
    X, y, lam = randn(6, 2), randn(6), torch.tensor(0.5, dtype=D)
    closed = lambda lam, X, y: torch.linalg.solve(X.T @ X + lam * torch.eye(2, dtype=D), X.T @ y)

    @custom_argmin(_weighted)
    def fit(start, X, y, lam):  # in an order of its own
        return closed(lam, X, y)

    truth = derive(lambda lam: closed(lam, X, y)[0])(lam)
    close(derive(lambda lam: fit(None, y=y, X=X, lam=lam)[0])(lam), truth)
    close(derive(lambda lam: fit(start=None, lam=lam, X=X, y=y)[0])(lam), truth)
    by_data = jacrev(lambda X: fit(None, y=y, lam=lam, X=X))(X)
    close(by_data, jacrev(lambda X: closed(lam, X, y))(X))
    lams = torch.tensor([0.5, 2.0], dtype=D)
    both = vmap(grad(lambda lam: fit(None, lam=lam, X=X, y=y)[0]))(lams)
    close(both, torch.stack([grad(lambda lam: closed(lam, X, y)[0])(lam) for lam in lams]))
    with pytest.raises(TypeError, match=r"fit\(\) misses lam, which the inner problem takes"):
        fit(None, X=X, y=y)


def test_keywords_and_positions_may_be_mixed_and_argnums_are_the_decorated_functions():
    X, y, lam = randn(6, 2), randn(6), torch.tensor(0.5, dtype=D)
    seen = {}

    @custom_argmin(_weighted, argnums=1)
    def fit(init, lam, X, y, scale=1.0, *, steps=1):
        seen.update(scale=scale, steps=steps)
        return torch.linalg.solve(X.T @ X + scale * lam * torch.eye(2, dtype=D), X.T @ y)

    jacobian = jacrev(lambda lam: fit(None, lam, scale=2.0, y=y, X=X, steps=7))(lam)
    assert seen == {"scale": 2.0, "steps": 7}
    doubled = jacrev(
        lambda lam: torch.linalg.solve(X.T @ X + 2 * lam * torch.eye(2, dtype=D), X.T @ y)
    )
    close(jacobian, doubled(lam))
    found = fit(None, leaf(lam), X=leaf(X), y=y)
    found.sum().backward()  # X is a constant: argnums leaves it out
    with pytest.raises(TypeError, match="lam by position and by keyword"):
        fit(None, lam, lam=lam, X=X, y=y)
    with pytest.raises(TypeError, match="misses its first argument"):
        fit(lam=lam, X=X, y=y)


def test_a_keyword_of_another_name_is_bound_where_the_inner_problem_needs_it():
    @custom_argmin(lambda w, a: ((w - a) ** 2).sum())
    def fit(init, target, steps=1):
        return target * min(steps, 1)

    close(jacrev(lambda a: fit(None, target=a, steps=3))(A), torch.eye(2, dtype=D))

    @custom_argmin(lambda w, a, *, scale=1.0: scale * ((w - a) ** 2).sum())
    def refused(init, a, *, scale=1.0):
        return a

    close(refused(None, A), A)
    with pytest.raises(hypergrad.UnsupportedOperation, match="takes scale by keyword alone"):
        refused(None, A, scale=2.0)
