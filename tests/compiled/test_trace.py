"""A trace holds no value, changes nothing, and is refused where a replay would not repeat it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad._autograd.branches import look
from hypergrad._compiled.capture import NotCaptured
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
