"""What is taken out of a graph, and in which order of memory the rest is given its arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypergrad._compiled.clean import Cleaned
from hypergrad._compiled.fold import Folded
from hypergrad._compiled.run import runner
from hypergrad._compiled.trace import traced
from tests.compiled.test_fold import D, draw, replayed, same

aten = torch.ops.aten


def test_a_norm_gets_its_input_in_the_order_that_it_was_traced_in():
    norm = nn.GroupNorm(2, 4).to(D)
    weight = draw(4, seed=1)

    def fun(x: Tensor, w: Tensor) -> list[Tensor]:
        z = (2 * x.transpose(1, 2)).contiguous() * w[:, None]
        return [torch.nn.functional.group_norm(z, 2, weight=w, bias=w), norm.eps * z]

    same(fun, draw(3, 5, 4), weight, also=[[draw(3, 5, 4, seed=8), draw(4, seed=9)]])


def test_a_custom_operation_gets_its_input_in_order():
    @torch.library.custom_op("hypergrad_tests::first_in_memory", mutates_args=())
    def first_in_memory(x: Tensor) -> Tensor:
        return torch.as_strided(x, (x.numel(),), (1,)).clone()

    @first_in_memory.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.numel())

    def fun(x: Tensor) -> list[Tensor]:
        return [first_in_memory(x.t().contiguous()), first_in_memory(x.t().clone(
            memory_format=torch.preserve_format))]  # fmt: skip

    same(fun, draw(2, 3))


@pytest.mark.parametrize(
    "fun",
    [
        lambda x: [x + 0, x - 0, x * 1, x / 1, x.pow(1), x.clone(), x.expand(3, 3), x.view(3, 3)],
        lambda x: [x.transpose(0, 1).transpose(-1, -2), x.transpose(0, 1).transpose(1, 0)],
        lambda x: [x.view(9).view(3, 3).view(9), x.t().reshape(9)],
        lambda x: [x.pow(0), torch.zeros_like(x) + x, torch.ones_like(x) * x, x * torch.ones(())],
        lambda x: [x.new_full((2,), 3.0), torch.full_like(x, 2.0), torch.arange(3.0, dtype=D) + x],
        lambda x: [torch.stack([x, x * 1.0, 1.0 * x, x * 2, x * 2.0]), x.to(torch.float32)],
        lambda x: [(x * -0.0).reciprocal(), (x * 0.0).reciprocal()],
        lambda x: [x.sum(), x.sum(0), x.sum(0, True), x.amax(1), x.mean(), x.any(), x.all(0)],
        lambda x: [torch.where(x > 0, x, 0.0), x.clamp(min=0), torch.nan_to_num(x, 1.0)],
        lambda x: [x.split(1)[1], x.unbind(0)[2], torch.linalg.inv(x), x.sort()[0], x.max(0)[1]],
        lambda x: [x[:, 1], x[..., None], x.diagonal(), torch.cat([x, x], 1), x.long() // 2],
        lambda x: [torch.tensor([1.0, 2.0, 3.0], dtype=D) * x, torch.tensor(2.0) * x],
        lambda x: [(3 * x).long() & torch.ones(3, 3, dtype=torch.long), (x > 0) & (x == x)],
        lambda x: [torch.ones(3, 3, dtype=torch.long) & (3 * x).long(), (x > 0) & torch.tensor(1)],
        lambda x: [x / torch.tensor([0.0, -0.0, 0.0], dtype=D), x / torch.zeros(3, dtype=D)],
    ],
)
def test_what_computes_nothing_is_taken_out_and_no_more(fun: Any):
    same(fun, draw(3, 3), also=[[draw(3, 3, seed=5)], [torch.full((3, 3), 2.0, dtype=D).tril()]])


def test_a_graph_without_use_of_its_views():
    _, left = replayed(lambda x: [(x.view(9).view(3, 3) * 1 + 0).exp()], [draw(3, 3)])
    assert left == [aten.exp.default]


def test_equal_operations_are_computed_once():
    _, left = replayed(lambda x: [x.exp() + x.exp(), x.exp()], [draw(3)])
    assert left.count(aten.exp.default) == 1


def test_what_is_checked_is_checked_in_each_replay():
    def fun(x: Tensor) -> list[Tensor]:
        torch._assert_async((x.diagonal() > 0).all(), "no diagonal")
        return [torch.linalg.cholesky(x)]

    graph = traced(fun, [torch.eye(3, dtype=D)])
    cleaned = Cleaned(graph.graph, [torch.eye(3, dtype=D)], graph.constants)
    run = runner(cleaned.graph, cleaned.constants)
    assert torch.equal(run(4 * torch.eye(3, dtype=D))[0], 2 * torch.eye(3, dtype=D))
    with pytest.raises(RuntimeError, match="no diagonal"):
        run(-torch.eye(3, dtype=D))
    with pytest.raises(torch.linalg.LinAlgError):
        run(torch.eye(3, dtype=D) + 2 * torch.eye(3, dtype=D).flip(0))


def test_constants_have_a_budget():
    def fun(x: Tensor) -> list[Tensor]:
        return [x[:1] + torch.arange(60_000, dtype=D) * number for number in range(1, 120)]

    graph = traced(fun, [draw(3)])
    cleaned = Cleaned(graph.graph, [draw(3)], graph.constants)
    Folded(cleaned.graph, cleaned.forms, cleaned.constants)
    used = set(cleaned.graph.nodes) & set(cleaned.constants)
    assert sum(cleaned.constants[n].numel() for n in used) <= 1 << 22
    run = runner(cleaned.graph, cleaned.constants)
    x = draw(3, seed=4)
    for ours, theirs in zip(run(x), fun(x), strict=True):
        assert torch.equal(ours, theirs)
