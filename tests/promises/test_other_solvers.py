"""Solvers of other packages: their answers in `implicit_grad`, and they in the decorators."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.optimize
import sklearn.linear_model
import torch
import torchopt
from torch.func import grad, vmap

import hypergrad
from hypergrad import KKT, ProximalGradient, implicit_grad, prox
from tests.problems import F64, data, logistic, relative_error, ridge, ridge_data

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


@pytest.fixture(autouse=True)
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error", hypergrad.ConvergenceWarning)
        yield


def by_adam(f, start, *args):
    """torch.optim.Adam, with a rate that falls."""
    w = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([w], lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    for _ in range(700):
        optimizer.zero_grad()
        f(w, *args).backward()
        optimizer.step()
        schedule.step()
    return w.detach()


def by_lbfgs(f, start, *args):
    """torch.optim.LBFGS, whose defaults stop long before a solution."""
    w = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [w], max_iter=200, tolerance_grad=1e-10, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = f(w, *args)
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach()


def by_torchopt(f, start, *args):
    """A functional optimiser of torchopt."""
    optimizer = torchopt.adam(lr=torchopt.schedule.linear_schedule(0.1, 1e-5, 600, 100))
    params = (start.clone(),)
    state = optimizer.init(params)
    for _ in range(700):
        gradients = (grad(f)(params[0], *args),)
        updates, state = optimizer.update(gradients, state, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return params[0]


def by_scipy(f, start, *args):
    """scipy.optimize.minimize, which wants NumPy arrays."""

    def with_gradient(w):
        w = torch.from_numpy(w).requires_grad_()
        value = f(w, *args)
        return value.item(), torch.autograd.grad(value, w)[0].numpy()

    found = scipy.optimize.minimize(
        with_gradient, start.numpy(), jac=True, method="BFGS", options={"gtol": 1e-9}
    )
    return torch.from_numpy(found.x)


SOLVERS = {"Adam": by_adam, "LBFGS": by_lbfgs, "torchopt": by_torchopt, "SciPy": by_scipy}
OF_EVERY = pytest.mark.parametrize("name", SOLVERS)


@OF_EVERY
def test_an_answer_in_implicit_grad(name):
    problem = logistic()
    w = SOLVERS[name](problem.inner, torch.zeros(4, dtype=F64), problem.hparams)
    hypergradient = implicit_grad(problem.outer, problem.inner, w, problem.hparams)
    assert relative_error(hypergradient, problem.hypergradient(problem.hparams)) < 1e-3


@OF_EVERY
def test_a_solver_in_a_decorated_function(name):
    problem = logistic()

    @hypergrad.custom_argmin(problem.inner, batching="loop")
    def fit(init, log_penalty):
        return SOLVERS[name](problem.inner, init, log_penalty)

    value = lambda h: problem.outer(fit(torch.zeros(4, dtype=F64), h), h)
    expected = problem.hypergradient(problem.hparams)
    h = problem.hparams.clone().requires_grad_()
    value(h).backward()
    assert relative_error(h.grad, expected) < 1e-3
    tasks = torch.stack([problem.hparams, problem.hparams + 0.5])
    found = vmap(grad(value))(tasks)
    assert relative_error(found[0], expected) < 1e-3
    assert relative_error(found[1], problem.hypergradient(tasks[1])) < 1e-3


def sklearn_ridge(X, y, lam):
    model = sklearn.linear_model.Ridge(alpha=float(lam), fit_intercept=False, tol=1e-10)
    return torch.from_numpy(model.fit(X.numpy(), y.numpy()).coef_)


def test_scikit_learns_ridge():
    problem = ridge()
    X, y = ridge_data()
    w = sklearn_ridge(X, y, problem.hparams)
    found = implicit_grad(problem.outer, problem.inner, w, problem.hparams)
    assert relative_error(found, problem.hypergradient(problem.hparams)) < 1e-8

    @hypergrad.custom_argmin(problem.inner)
    def fit(init, lam):
        return sklearn_ridge(X, y, lam)

    found = grad(lambda lam: problem.outer(fit(None, lam), lam))(problem.hparams)
    assert relative_error(found, problem.hypergradient(problem.hparams)) < 1e-8


def test_scikit_learns_logistic_regression_with_an_intercept():
    X = data(140, 60, 3, dtype=F64)
    y = (X @ torch.tensor([1.0, -1, 0.5], dtype=F64) + 0.5 * data(141, 60, dtype=F64) > 0.3).long()
    X_val, target = data(142, 30, 3, dtype=F64), data(143, 30, dtype=F64)

    # scikit-learn's objective: C times the sum of the losses, and no penalty on the intercept.
    def inner(params, C):
        scores = X @ params["weight"] + params["bias"]
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            scores, y.to(F64), reduction="sum"
        )
        return C * losses + params["weight"].square().sum() / 2

    def solve(C):
        model = sklearn.linear_model.LogisticRegression(C=float(C), tol=1e-10, max_iter=1000)
        model.fit(X.numpy(), y.numpy())
        return {
            "weight": torch.from_numpy(model.coef_[0]),
            "bias": torch.tensor(model.intercept_[0], dtype=F64),
        }

    outer = lambda p, C: (X_val @ p["weight"] + p["bias"] - target).square().mean()
    C = torch.tensor(0.7, dtype=F64)
    params = solve(C)
    found = implicit_grad(outer, inner, params, C)
    # Against Newton's method by hand, in the four unknowns together.
    Z = torch.cat([X, torch.ones(60, 1, dtype=F64)], dim=1)
    Z_val = torch.cat([X_val, torch.ones(30, 1, dtype=F64)], dim=1)
    v = torch.cat([params["weight"], params["bias"][None]])
    free = torch.tensor([1.0, 1, 1, 0], dtype=F64)
    for _ in range(5):
        p = torch.sigmoid(Z @ v)
        H = C * Z.T @ ((p * (1 - p))[:, None] * Z) + free.diag()
        v = v - torch.linalg.solve(H, C * Z.T @ (p - y) + free * v)
    u = torch.linalg.solve(H, 2 * Z_val.T @ (Z_val @ v - target) / 30)
    expected = -(u @ (Z.T @ (torch.sigmoid(Z @ v) - y)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)

    fit = hypergrad.custom_argmin(inner)(lambda init, C: solve(C))
    found = grad(lambda C: outer(fit(None, C), C))(C)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_scikit_learns_lasso_and_elastic_net():
    X, y = data(144, 50, 8, dtype=F64), data(145, 50, dtype=F64)
    y = y + X @ torch.tensor([2.0, -1, 0, 0, 1, 0, 0, 0], dtype=F64)
    target = data(146, 8, dtype=F64)
    outer = lambda w, alpha: (w - target).square().sum() / 2

    # scikit-learn divides the squared error by twice the samples.
    def error(w, *args):
        return (X @ w - y).square().sum() / 100

    for ratio in (1.0, 0.6):

        def shrink(v, s, alpha, ratio=ratio):
            return prox.elastic_net(v, s, alpha * ratio, alpha * (1 - ratio))

        def solve(alpha, ratio=ratio):
            model = sklearn.linear_model.ElasticNet(
                alpha=float(alpha), l1_ratio=ratio, fit_intercept=False, tol=1e-12, max_iter=100_000
            )
            return torch.from_numpy(model.fit(X.numpy(), y.numpy()).coef_)

        alpha = torch.tensor(0.2, dtype=F64)
        w = solve(alpha)
        on = w != 0
        assert 0 < on.sum() < 8
        matrix = X[:, on].T @ X[:, on] / 50 + alpha * (1 - ratio) * torch.eye(int(on.sum()))
        u = torch.linalg.solve(matrix, (w - target)[on])
        expected = -(u @ (ratio * w[on].sign() + (1 - ratio) * w[on]))
        condition = ProximalGradient(error, shrink, 0.5)
        found = implicit_grad(outer, condition, w, alpha)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        fit = hypergrad.custom_argmin(condition)(lambda init, alpha, solve=solve: solve(alpha))
        found = grad(lambda alpha: outer(fit(None, alpha), alpha))(alpha)  # noqa: B023
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_scipys_constrained_minimum_and_its_multipliers():
    H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)

    def f(x, t):
        return x @ H @ x / 2 - t * x.sum()

    def solve(t):
        t = float(t)
        constraints = scipy.optimize.LinearConstraint(np.array([[1.0, 2.0]]), -np.inf, 1.0)
        found = scipy.optimize.minimize(
            lambda x: x @ H.numpy() @ x / 2 - t * x.sum(),
            np.zeros(2),
            jac=lambda x: H.numpy() @ x - t,
            constraints=constraints,
            method="trust-constr",
            options={"gtol": 1e-12, "xtol": 1e-14, "maxiter": 2000, "barrier_tol": 1e-14},
        )
        return torch.from_numpy(found.x), None, torch.from_numpy(np.maximum(found.v[0], 0.0))

    condition = KKT(
        f, inequalities=lambda x, t: (x @ torch.tensor([1.0, 2.0], dtype=F64) - 1)[None]
    )
    t = torch.tensor(1.5, dtype=F64)
    params = solve(t)
    assert params[2] > 0.1
    found = implicit_grad(lambda p, t: p[0][0], condition, params, t)
    K = torch.tensor([[2.0, 0.5, 1.0], [0.5, 1.0, 2.0], [1.0, 2.0, 0.0]], dtype=F64)
    expected = torch.linalg.solve(K, torch.tensor([1.0, 1.0, 0.0], dtype=F64))[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
