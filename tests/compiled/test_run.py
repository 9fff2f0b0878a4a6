"""A graph as Python code calls each operation with the arguments that the graph has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from hypergrad._compiled.run import _NAMES, runner
from hypergrad._compiled.trace import traced
from tests.compiled.test_fold import D, draw

#: A call of every operation that is called by its name in the namespace of torch.
CALLS: dict[str, Any] = {
    "abs": lambda x: x.abs(), "add": lambda x: torch.add(x, x.exp(), alpha=2.5),
    "addcmul": lambda x: torch.addcmul(x, x.exp(), x, value=-1), "all": lambda x: (x > 0).all(1),
    "amax": lambda x: x.amax(1, True), "amin": lambda x: x.amin((0, 1)),
    "any": lambda x: (x > 0).any(), "bitwise_and": lambda x: (x > 0) & (x < 1),
    "bitwise_not": lambda x: ~(x > 0), "bitwise_or": lambda x: (x > 1) | (x < 0),
    "bmm": lambda x: x[None] @ x[None], "cat": lambda x: torch.cat([x, x.exp()], 1),
    "cos": lambda x: x.cos(), "diag_embed": lambda x: torch.diag_embed(x, 1, 0, 2),
    "div": lambda x: torch.stack([x / 3, x.div(x.exp(), rounding_mode="floor")]),
    "dot": lambda x: x[0] @ x[1], "eq": lambda x: x == x.abs(), "exp": lambda x: x.exp(),
    "ge": lambda x: x >= 0.1, "gt": lambda x: x > x.t(), "isfinite": lambda x: (1 / x).isfinite(),
    "le": lambda x: x <= 0.1, "log": lambda x: x.abs().log(), "lt": lambda x: x < x.t(),
    "maximum": lambda x: torch.maximum(x, x.t()), "minimum": lambda x: torch.minimum(x, x.t()),
    "mm": lambda x: x @ x, "mul": lambda x: torch.stack([x * 2.5, x * x.exp()]),
    "mv": lambda x: x @ x[0], "nan_to_num": lambda x: (x / 0).nan_to_num(1.0, 2.0, -3.0),
    "ne": lambda x: x != 0, "neg": lambda x: -x, "outer": lambda x: torch.outer(x[0], x[1]),
    "permute": lambda x: x[None].permute(2, -3, 1), "reciprocal": lambda x: x.reciprocal(),
    "relu": lambda x: x.relu(), "rsqrt": lambda x: x.abs().rsqrt(),
    "select": lambda x: x.select(-1, 1), "sigmoid": lambda x: x.sigmoid(),
    "sign": lambda x: x.sign(), "sin": lambda x: x.sin(), "sqrt": lambda x: x.abs().sqrt(),
    "squeeze": lambda x: torch.squeeze(x[None, None], (0, 1)),
    "stack": lambda x: torch.stack([x, x.exp()], -1), "sub": lambda x: torch.sub(x, x.t(), alpha=3),
    "addmm": lambda x: torch.addmm(x[0], x, x.t()), "addmv": lambda x: torch.addmv(x[0], x, x[1]),
    "baddbmm": lambda x: torch.baddbmm(x[None], x[None], x.t()[None]),
    "sum": lambda x: torch.stack([x.sum((0, 1), dtype=torch.float32), x.sum().float()]),
    "t": lambda x: x.t().exp(), "tanh": lambda x: x.tanh(),
    "transpose": lambda x: x[None].transpose(-1, 0), "unsqueeze": lambda x: x.unsqueeze(-1),
    "where": lambda x: torch.where(x > 0, x, -1.5),
}  # fmt: skip


def test_every_name_is_called_below():
    assert set(CALLS) == _NAMES


@pytest.mark.parametrize("name", sorted(_NAMES))
def test_an_operation_by_its_name_in_torch(name: str):
    graph = traced(lambda x: [CALLS[name](x)], [draw(3, 3)])
    run = runner(graph.graph, {})
    for seed in (0, 1):
        x = draw(3, 3, seed=seed)
        (ours,), theirs = run(x), CALLS[name](x)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_constants_and_several_outputs_and_repeated_runs():
    def fun(x: Tensor) -> list[Tensor]:
        values, places = x.max(0)
        return [values, places, x, torch.full((2,), float("nan")), x * float("inf")]

    graph = traced(fun, [draw(3, 3)])
    held: dict[fx.Node, Tensor] = {
        node: torch.full((2,), 7.0) for node in graph.graph.nodes if "full" in str(node.target)
    }
    run = runner(graph.graph, held)
    for seed in (0, 1):
        x = draw(3, 3, seed=seed)
        for place, (ours, theirs) in enumerate(zip(run(x), fun(x), strict=True)):
            if place != 3:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(run(x)[3], torch.full((2,), 7.0))
    assert draw(1).dtype == D
