"""Calls of `check_hypergrad` on whole problems and on one of three numbers, and their blame."""

from __future__ import annotations

import warnings

import torch

from hypergrad import check_hypergrad
from tests.problems import F64


def check(problem, **changes):
    given = {"outer": problem.outer, "inner": problem.condition, "solve": problem.solve}
    given |= {"hparams": problem.hparams, **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return check_hypergrad(**given)


def gradient_descent(problem, init, steps, rate):
    """Plain steps on the inner objective, with the derivative through them."""

    def solve(hparams):
        w = init.clone().requires_grad_()
        for _ in range(steps):
            (slope,) = torch.autograd.grad(problem.inner(w, hparams), w, create_graph=True)
            w = w - rate * slope
        return w

    return solve


def blamed(report, part, *words):
    assert not report.ok
    assert report.blame == part
    for word in words:
        assert word in report.reason
    assert part in str(report)
    return True


A = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=F64))


def inner_of_three(w, theta):
    return w @ (A.to(w.dtype) @ w) / 2 - theta * w.sum()


def solve_of_three(theta):
    return theta / A.diag().to(theta.dtype)


def outer_of_three(w, theta):
    return (w - 1).square().sum() / 2


def check_three(theta=2.0, dtype=F64, **changes):
    given = {"outer": outer_of_three, "inner": inner_of_three, "solve": solve_of_three}
    theta = torch.tensor(theta, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return check_hypergrad(**(given | {"hparams": theta} | changes))
