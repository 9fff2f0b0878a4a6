"""A trace holds no value, changes nothing, and is refused where a replay would not repeat it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad._autograd.branches import look
from hypergrad._compiled.capture import Failed, NotCaptured
from hypergrad._compiled.clean import Cleaned
from hypergrad._compiled.run import runner
from hypergrad._compiled.trace import Traced, traced

X = torch.tensor([1.0, -2.0, 3.0])
OTHER, NUMBER = torch.ones(3), torch.tensor(2.0)


@pytest.mark.parametrize(
    ("fun", "why"),
    [
        (lambda x: [x + OTHER], "none of the functions captures"),
        (lambda x: [x + NUMBER], "none of the functions captures"),
        (lambda x: [x + torch.rand(3)], "random numbers"),
        (lambda x: [torch.dropout(x, 0.5, True)], "random numbers"),
        (lambda x: [x.add_(1)], "in place"),
        (lambda x: [x[x > 0].sum()], "depends on values"),
        (lambda x: [x.nonzero()], "depends on values"),
        (lambda x: [x.as_strided((2,), (1,))], "order of its memory"),
    ],
)
def test_what_a_replay_would_not_repeat_is_refused(fun: Any, why: str):
    before, state = X.clone(), torch.get_rng_state()
    with pytest.raises(NotCaptured, match=why):
        traced(fun, [X])
    assert torch.equal(X, before)
    assert torch.equal(torch.get_rng_state(), state)


def replayed(graph: Traced, *inputs: Tensor) -> list[Tensor]:
    return runner(graph.graph, graph.constants)(*inputs)


def test_a_statistic_that_is_kept_is_refused_and_not_changed():
    mean, var = torch.zeros(3), torch.ones(3)

    def fun(x: Tensor, mean: Tensor, var: Tensor) -> list[Tensor]:
        return [torch.nn.functional.batch_norm(x, mean, var, training=True)]

    with pytest.raises(NotCaptured, match="in place"):
        traced(fun, [torch.randn(4, 3), mean, var])
    assert torch.equal(mean, torch.zeros(3))


def test_a_change_in_place_that_changes_nothing_is_one():
    kept = torch.zeros(3)
    with pytest.raises(NotCaptured, match="in place"):
        traced(lambda x, kept: [kept.copy_(0 * x) + x], [X, kept])


def test_attention_without_dropout_draws_nothing():
    q = torch.randn(1, 2, 4, 3)
    fun = lambda q: [torch.nn.functional.scaled_dot_product_attention(q, q, q)]
    graph = traced(fun, [q])
    torch.testing.assert_close(replayed(graph, 2 * q), fun(2 * q))
    dropped = lambda q: [torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)]
    with pytest.raises(NotCaptured, match="random numbers"):
        traced(dropped, [q])


@pytest.mark.parametrize("caught", [False, True])
def test_an_operation_that_fails_is_no_part_of_a_program(caught: bool):
    def fun(x: Tensor) -> list[Tensor]:
        try:
            return [torch.linalg.cholesky(torch.diag(x))]
        except torch.linalg.LinAlgError:
            if caught:
                return [torch.zeros_like(x)]
            raise

    with pytest.raises(Failed, match="not positive-definite"):
        traced(fun, [X])
    traced(fun, [X.abs()])


def test_zeros_that_autograd_does_not_write_down():
    def fun(x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(x.abs().sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x)
        return [slope.detach(), bend]

    with torch.enable_grad():
        graph = traced(fun, [X])
    cleaned = Cleaned(graph.graph, [X], graph.constants)
    slope, bend = runner(cleaned.graph, cleaned.constants)(-X)
    assert torch.equal(slope, -X.sign())
    assert torch.equal(bend, torch.zeros(3))
    assert not bend._is_zerotensor()


def test_lists_of_tensors_that_are_changed_at_once_are_named():
    def fun(x: Tensor) -> list[Tensor]:
        made = [x * 1, x * 2]
        torch._foreach_add_(made, 1.0)
        return made

    with pytest.raises(NotCaptured, match="several tensors are changed"):
        traced(fun, [X])


def test_tensors_that_are_written_down_are_constants():
    graph = traced(lambda x: [x + torch.tensor([1.0, 2.0, 3.0]), x[torch.tensor([0, 2])]], [X])
    assert torch.equal(replayed(graph, 2 * X)[0], 2 * X + torch.tensor([1.0, 2.0, 3.0]))


def test_changes_of_what_the_function_has_made_are_no_mutations():
    def fun(x: Tensor) -> list[Tensor]:
        y = torch.zeros(3)
        y[1:] = x[1:] * 2
        return [y.add_(x)]

    graph = traced(fun, [X])
    assert torch.equal(replayed(graph, 3 * X)[0], fun(3 * X)[0])


def test_flags_that_the_host_reads_are_outputs():
    graph = traced(lambda x: [x * 2 if look((x > 0).all()) else -x], [X])
    assert graph.seen == (False,)
    assert replayed(graph, X.abs())[-1].tolist() == [True]
