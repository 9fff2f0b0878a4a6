"""Conditions: what they declare of the matrix, and the Gauss-Newton matrix in its place."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp

import hypergrad
from hypergrad import GaussNewton, custom_argmin
from tests.problems import relative_error, ridge, ridge_data
from tests.quartic import LAM, ONES, D, X, Y, close, leaf

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


def test_a_second_derivative_through_gauss_newton_raises():
    condition = hypergrad.GaussNewton(
        outputs=lambda w, lam: (X @ w) ** 2,
        loss=lambda z, lam: ((z - Y) ** 2).sum() / 2,
        regulariser=lambda w, lam: (lam * w**2).sum() / 2,
    )

    @custom_argmin(condition, inner_tol=None)
    def fit(init, lam):
        return torch.ones(3, dtype=D)

    def total(lam):
        return fit(None, lam).sum()

    A = (lambda J: J.T @ J)(jacrev(lambda w: (X @ w) ** 2)(ONES)) + torch.diag(LAM)
    close(grad(total)(LAM), -torch.linalg.solve(A, ONES))
    close(jvp(total, (LAM,), (ONES,))[1], -torch.linalg.solve(A, ONES).sum())
    for derivative in (
        lambda: grad(lambda s: grad(total)(s).sum())(LAM),
        lambda: hessian(total)(LAM),
        lambda: jvp(grad(total), (LAM,), (ONES,)),
        lambda: jacfwd(jacfwd(total))(LAM),
        lambda: torch.autograd.grad(
            torch.autograd.grad(total(lam := leaf(LAM)), lam, create_graph=True)[0].sum(), lam
        ),
    ):
        with pytest.raises(hypergrad.UnsupportedOperation, match="GaussNewton"):
            derivative()


def test_gauss_newton_counts_an_output_that_depends_on_another_once():
    def dependent(w, lam):
        z = X @ w
        return z, z * z

    def separate(w, lam):
        return X @ w, (X @ w) ** 2

    def loss(z, lam):
        return ((z[0] - Y) ** 2).sum() + ((z[1] - 1) ** 2).sum()

    found = [
        hypergrad.implicit_grad(
            lambda w, lam: w.sum(),
            hypergrad.GaussNewton(outputs, loss, lambda w, lam: (lam * w**2).sum()),
            ONES,
            LAM,
            inner_tol=None,
        )
        for outputs in (dependent, separate)
    ]
    close(*found, rtol=1e-12)


def test_the_gauss_newton_condition_is_exact_for_a_linear_model():
    problem = ridge()
    X, y = ridge_data()
    condition = GaussNewton(
        outputs=lambda w, lam: X @ w,
        loss=lambda z, lam: (z - y).square().sum() / 2,
        regulariser=lambda w, lam: lam * (w @ w) / 2,
    )
    w = problem.solve(problem.hparams)
    hypergradient = hypergrad.implicit_grad(problem.outer, condition, w, problem.hparams)
    assert relative_error(hypergradient, problem.hypergradient(problem.hparams)) < 1e-9
