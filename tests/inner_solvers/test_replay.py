"""Fixed inner steps as one compiled program."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

import hypergrad
from hypergrad import Status
from hypergrad.inner_solvers import FISTA, LBFGS, GradientDescent, Nesterov
from tests.problems import data, relative_error

F64 = torch.float64
SOLVERS = {
    "descent": GradientDescent(step_size=0.05, maxiter=6, tol=0),
    "Nesterov": Nesterov(step_size=0.05, maxiter=6, tol=0),
}


def network(dtype: torch.dtype) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
    return net, {name: leaf.detach() for name, leaf in net.named_parameters()}


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_replayed_steps_are_those_by_hand_in_a_batch_and_alone(solver, dtype):
    net, start = network(dtype)

    def solve(x, y):
        return solver(lambda p: ((functional_call(net, p, (x,)) - y) ** 2).mean(), start)

    together = hypergrad.compile(vmap(solve), on_fallback="raise")
    alone = hypergrad.compile(solve, on_fallback="raise")
    for seed in (11, 12, 13):  # new closures, and new data
        x, y = data(seed, 3, 10, 1, dtype=dtype), data(seed + 50, 3, 10, 1, dtype=dtype)
        ended, info = together(x, y)
        for k in range(3):
            expected, figures = solve(x[k], y[k])
            one, own = alone(x[k], y[k])
            for name, leaf in expected.items():
                close = 1e-12 if dtype == F64 else 1e-5
                assert relative_error(ended[name][k], leaf) < close
                assert relative_error(one[name], leaf) < close
            for seen in (own, hypergrad.inner_solvers.InnerInfo(
                *(getattr(info, f)[k] for f in ("status", "success", "iterations", "evaluations",
                  "residual_norm", "inner_residual", "value")))):  # fmt: skip
                assert seen.status == figures.status
                assert seen.iterations == figures.iterations
                assert seen.evaluations == figures.evaluations
                torch.testing.assert_close(seen.residual_norm, figures.residual_norm)
                torch.testing.assert_close(seen.value, figures.value)
    assert len(together.session.programs) == 1
    by_hand = {name: leaf.clone().requires_grad_() for name, leaf in start.items()}
    if isinstance(solver, GradientDescent):
        for _ in range(6):
            value = ((functional_call(net, by_hand, (x[2],)) - y[2]) ** 2).mean()
            slopes = torch.autograd.grad(value, list(by_hand.values()))
            by_hand = {
                name: (leaf - 0.05 * slope).detach().requires_grad_()
                for (name, leaf), slope in zip(by_hand.items(), slopes, strict=True)
            }
        for name, leaf in by_hand.items():
            assert relative_error(ended[name][2], leaf.detach()) < (1e-12 if dtype == F64 else 1e-5)


def test_a_length_for_each_task_is_read_at_each_call():
    descend = lambda c, length: GradientDescent(length, maxiter=3, tol=0)(
        lambda x: ((x - c) ** 2).sum(), torch.zeros(2, dtype=F64)
    )[0]
    solve = hypergrad.compile(vmap(descend), on_fallback="raise")
    for seed in (1, 2):
        c, lengths = data(seed, 4, 2, dtype=F64), data(seed + 9, 4, dtype=F64).abs() / 4
        expected = c * (1 - (1 - 2 * lengths[:, None]) ** 3)
        assert relative_error(solve(c, lengths), expected) < 1e-13


def test_a_task_that_is_not_finite_in_a_later_call_is_frozen_and_said():
    def one(c):
        descend = GradientDescent(step_size=0.15, maxiter=6, tol=0)
        return descend(lambda x: (x + 0 * x.sqrt()).sum(), c.expand(2))

    solve = hypergrad.compile(vmap(one), on_fallback="raise")
    x, info = solve(torch.tensor([2.0, 3.0], dtype=F64))
    assert (info.status == Status.MAX_ITERATIONS).all()
    x, info = solve(torch.tensor([2.0, 0.5], dtype=F64))
    expected, figures = vmap(one)(torch.tensor([2.0, 0.5], dtype=F64))
    assert info.status.tolist() == figures.status.tolist()
    assert info.status[1] == Status.NOT_FINITE
    torch.testing.assert_close(x, expected)
    assert torch.isfinite(x).all()
    x, info = solve(torch.tensor([2.5, 3.0], dtype=F64))
    torch.testing.assert_close(x, torch.tensor([[1.6], [2.1]], dtype=F64).expand(2, 2))


@pytest.mark.parametrize(
    ("solver", "cause"),
    [
        (GradientDescent(maxiter=5), "its steps are not fixed"),
        (LBFGS(maxiter=5), "its steps are not fixed"),
        (FISTA(lambda v, step: v, step_size=0.1, maxiter=3, tol=0), "a function that it holds"),
    ],
)
def test_other_solvers_run_as_they_are_and_say_so_once(solver, cause):
    solve = hypergrad.compile(lambda c: solver(lambda x: ((x - c) ** 2).sum(), torch.zeros(2)))
    with pytest.warns(hypergrad.CompileWarning, match=cause):
        solve(torch.ones(2))
    x, _ = solve(torch.ones(2))  # and nothing more is said
    expected, _ = solver(lambda x: ((x - 1) ** 2).sum(), torch.zeros(2))
    torch.testing.assert_close(x, expected)


def test_a_solution_is_not_differentiated_in_silence():
    target = torch.ones(2, dtype=F64, requires_grad=True)
    solver = GradientDescent(step_size=0.1, maxiter=2, tol=0)
    solve = hypergrad.compile(lambda: solver(lambda x: ((x - target) ** 2).sum(), 0 * target)[0])
    assert not solve().requires_grad
    assert not solve().requires_grad
    assert math.isclose(solve()[0].item(), 0.36)
