"""Unrolled differentiation: the derivative of the steps, whichever problem is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import hypergrad
from tests.drawn_inner_problems import few, fewer, inner_problems
from tests.problems import F64, data, relative_error

pytestmark = pytest.mark.filterwarnings(
    # PyTorch's own forward mode imports a module that uses torch.jit.script.
    "ignore:.torch.jit.script. is deprecated",
    # higher's optimisers are subclasses of what torch has since renamed.
    "ignore::DeprecationWarning:higher",
)


@few
@given(inner_problems(), st.integers(0, 12))
def test_unrolled_grad_is_the_derivative_of_the_steps(problem, steps):
    def value(hparams: dict[str, Tensor]) -> Tensor:
        params = problem.init
        for _ in range(steps):
            params = problem.gradient_step(params, hparams)
        return problem.outer(params, hparams)

    hypergradient, params = hypergrad.unrolled_grad(
        problem.outer,
        problem.gradient_step,
        problem.init,
        problem.hparams,
        steps=steps,
        return_params=True,
    )
    assert relative_error(hypergradient, torch.func.grad(value)(problem.hparams)) < 1e-12
    expected = problem.init
    for _ in range(steps):
        expected = problem.gradient_step(expected, problem.hparams)
    torch.testing.assert_close(params, expected)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves((hypergradient, params)))


@pytest.mark.parametrize("gradient", ["by hand", "torch.func.grad", "torch.autograd.grad"])
@few
@given(inner_problems(), st.integers(0, 12), st.sampled_from([None, 0, 3, 7, 30]))
def test_checkpointing_changes_nothing(gradient, problem, steps, truncate):
    step = {
        "by hand": problem.step_by_hand,
        "torch.func.grad": problem.gradient_step,
        "torch.autograd.grad": problem.autograd_step,
    }[gradient]
    given = (problem.outer, step, problem.init, problem.hparams)
    plain = hypergrad.unrolled_grad(*given, steps=steps, truncate=truncate)
    spared = hypergrad.unrolled_grad(*given, steps=steps, truncate=truncate, checkpoint=True)
    torch.testing.assert_close(spared, plain, rtol=1e-14, atol=1e-15)


@few
@given(inner_problems(), st.integers(0, 8), st.integers(0, 10))
def test_truncation_keeps_the_last_steps_alone(problem, steps, kept):
    def value(hparams: dict[str, Tensor]) -> Tensor:
        params = problem.init
        for k in range(steps):
            plain = pytree.tree_map(torch.Tensor.detach, problem.hparams)
            given = hparams if k >= steps - kept else plain
            params = problem.gradient_step(params, given)
        return problem.outer(params, hparams)

    given = (problem.outer, problem.gradient_step, problem.init, problem.hparams)
    hypergradient = hypergrad.unrolled_grad(*given, steps=steps, truncate=kept)
    assert relative_error(hypergradient, torch.func.grad(value)(problem.hparams)) < 1e-12
    if kept >= steps:
        full = hypergrad.unrolled_grad(*given, steps=steps)
        torch.testing.assert_close(hypergradient, full, rtol=0, atol=0)


@fewer
@given(inner_problems(), st.integers(0, 8), st.sampled_from([None, 0, 3]), st.booleans())
def test_it_does_not_matter_how_a_step_takes_its_gradient(problem, steps, truncate, spare):
    found = [
        hypergrad.unrolled_grad(
            problem.outer,
            step,
            problem.init,
            problem.hparams,
            steps=steps,
            truncate=truncate,
            checkpoint=spare,
        )
        for step in (problem.step_by_hand, problem.gradient_step, problem.autograd_step)
    ]
    assert relative_error(found[1], found[0]) < 1e-12
    assert relative_error(found[2], found[0]) < 1e-12


@pytest.mark.parametrize("truncate", [None, 5])
def test_checkpointing_sees_the_same_random_numbers_and_draws_them_once(truncate):
    def step(w: Tensor, theta: Tensor) -> Tensor:
        return w - 0.3 * (w - theta) * torch.rand(2, dtype=F64)

    found = []
    for spare in (False, True):
        torch.manual_seed(0)
        grads = hypergrad.unrolled_grad(
            lambda w, theta: w.square().sum() + torch.rand((), dtype=F64) * theta.sum(),
            step,
            torch.ones(2, dtype=F64),
            torch.tensor([2.0, 3.0], dtype=F64),
            steps=9,
            truncate=truncate,
            checkpoint=spare,
        )
        found.append((grads, torch.rand(3)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


@few
@given(inner_problems(), st.integers(0, 5), st.booleans())
def test_an_init_that_is_a_function_carries_the_gradient_as_maml_needs_it(problem, steps, spare):
    def init(hparams: dict[str, Tensor]) -> Any:
        start = hparams["shift"].sum() * torch.ones(problem.n, dtype=F64) * hparams["log"].exp()
        return problem.build(start)

    def value(hparams: dict[str, Tensor]) -> Tensor:
        params = init(hparams)
        for _ in range(steps):
            params = problem.step_by_hand(params, hparams)
        return problem.outer(params, hparams)

    hypergradient = hypergrad.unrolled_grad(
        problem.outer, problem.step_by_hand, init, problem.hparams, steps=steps, checkpoint=spare
    )
    assert relative_error(hypergradient, torch.func.grad(value)(problem.hparams)) < 1e-12


@few
@given(inner_problems(), st.integers(1, 6), st.booleans())
def test_a_third_argument_of_the_step_is_its_number(problem, steps, spare):
    rates = 1 / torch.arange(1.0, steps + 1, dtype=F64)

    def step(params: Any, hparams: dict[str, Tensor], k: int) -> Any:
        stepped = problem.step_by_hand(params, hparams)
        return pytree.tree_map(lambda w, new: w + rates[k] * (new - w), params, stepped)

    def value(hparams: dict[str, Tensor]) -> Tensor:
        params = problem.init
        for k in range(steps):
            params = step(params, hparams, k)
        return problem.outer(params, hparams)

    hypergradient = hypergrad.unrolled_grad(
        problem.outer, step, problem.init, problem.hparams, steps=steps, checkpoint=spare
    )
    assert relative_error(hypergradient, torch.func.grad(value)(problem.hparams)) < 1e-12


@few
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(0, 5))
def test_a_batch_of_unrolled_hypergradients_is_the_loop_over_its_tasks(seed, tasks, steps):
    c, theta = data(seed, tasks, 3, dtype=F64), data(seed + 1, 3, dtype=F64)

    def task(c: Tensor) -> Tensor:
        def step(w: Tensor, theta: Tensor) -> Tensor:
            return w - 0.3 * (w - c * theta.sin())

        found: Tensor = hypergrad.unrolled_grad(
            lambda w, theta: (w * w.cos()).sum() + theta.sum(),
            step,
            lambda theta: 2 * theta,
            theta,
            steps=steps,
        )
        return found

    found = torch.func.vmap(task)(c)
    expected = torch.stack([task(row) for row in c])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    alone = torch.func.jacrev(lambda theta: theta.cos())(theta)  # nothing stays traced
    torch.testing.assert_close(alone, (-theta.sin()).diag())


def test_an_init_that_shares_a_tensor_with_the_hyperparameters_is_refused():
    theta = torch.ones(3, dtype=F64)
    for init, hparams in ((theta, theta), ({"w": theta}, {"theta": theta})):
        with pytest.raises(hypergrad.NotConnected, match="init=lambda"):
            hypergrad.unrolled_grad(
                lambda w, h: pytree.tree_leaves(w)[0].sum(), lambda w, h: w, init, hparams, steps=1
            )


def test_a_module_as_the_initial_point_is_refused_with_the_cure():
    with pytest.raises(hypergrad.StructureMismatch, match="named_parameters"):
        hypergrad.unrolled_grad(
            lambda w, h: h.sum(), lambda w, h: w, torch.nn.Linear(2, 2), torch.ones(2), steps=1
        )
