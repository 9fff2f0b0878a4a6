"""Each rule of folding and cleaning against the graph as it was, and against autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypergrad._compiled.clean import Cleaned
from hypergrad._compiled.fold import Folded
from hypergrad._compiled.fuse import fuse
from hypergrad._compiled.run import runner
from hypergrad._compiled.trace import traced

aten = torch.ops.aten
D = torch.float64
Fun = Callable[..., Sequence[Tensor]]


def replayed(fun: Fun, examples: Sequence[Tensor]) -> tuple[Callable[..., list[Tensor]], set[Any]]:
    """Trace, clean and fold a function: the program, and the operations that are left."""
    graph = traced(fun, examples)
    cleaned = Cleaned(graph.graph, examples, graph.constants)
    Folded(cleaned.graph, cleaned.forms, cleaned.constants)
    fuse(cleaned.graph, cleaned.forms, cleaned.constants)
    cleaned.settle(examples)
    left = [n.target for n in cleaned.graph.nodes if n.op == "call_function"]
    left = [n for n in left if n not in (aten.detach.default,)]
    return runner(cleaned.graph, cleaned.constants), left


def same(fun: Fun, *examples: Tensor, also: Sequence[Sequence[Tensor]] = ()) -> list[Any]:
    """Compare a program with the function itself, where it was traced and at other values."""
    run, left = replayed(fun, examples)
    for inputs in (examples, *also):
        for ours, theirs in zip(run(*inputs), fun(*inputs), strict=True):
            wide = theirs.dtype in (D, torch.float32)
            assert ours.dtype == theirs.dtype
            assert ours.shape == theirs.shape
            rtol = {D: 1e-12, torch.float32: 1e-5}.get(theirs.dtype, 3e-2)
            atol = rtol if wide or not theirs.is_floating_point() else 1e-1
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
    return left


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=D).to(dtype)


#: Elementwise steps of a chain: of the value so far, and of tensors that are there before it.
STEPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "neg": lambda v, a, m: -v,
    "by a number": lambda v, a, m: 2.5 * v,
    "by zero": lambda v, a, m: 0.0 * v,
    "by a part": lambda v, a, m: v / 3,
    "by a tensor": lambda v, a, m: a * v,
    "by a tensor on the right": lambda v, a, m: v * a,
    "by a part of a tensor": lambda v, a, m: v / (a * a + 1),
    "by a row": lambda v, a, m: v * a[:1],
    "by a scalar": lambda v, a, m: v * a.sum(),
    "by a mask": lambda v, a, m: v * m,
    "by itself": lambda v, a, m: v * v,
    "plus a scaling": lambda v, a, m: a + a * v,
    "minus a scaling": lambda v, a, m: a - a * v,
    "plus scalings of one": lambda v, a, m: v * a + v * (a - 1),
    "plus masks": lambda v, a, m: v * m + v * (a > 0),
    "plus numbers": lambda v, a, m: 2 * v + 3 * v,
    "plus zero": lambda v, a, m: v + torch.zeros_like(v),
    "times one": lambda v, a, m: torch.ones_like(v) * v,
    "sigmoid": lambda v, a, m: aten.sigmoid_backward(v, torch.sigmoid(a).expand_as(v)),
    "tanh": lambda v, a, m: aten.tanh_backward(v, torch.tanh(a).expand_as(v)),
    "square": lambda v, a, m: v.pow(1) + v.pow(0),
    "there and back": lambda v, a, m: v.t().t() if v.ndim == 2 else v.view(v.shape),
    "swapped": lambda v, a, m: v.permute(-1, -2).permute(1, 0) if v.ndim == 2 else v,
    "reshaped": lambda v, a, m: v.reshape(-1).reshape(v.shape),
    "where": lambda v, a, m: torch.where(m, v, a.expand_as(v)),
}
SHAPES = [(3, 3), (2, 3), (4,), (1,), (0,), (1, 3)]


@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from([D, torch.float32, torch.bfloat16]),
    odd=st.sampled_from([0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf")]),
    seed=st.integers(0, 1000),
)
def test_chains_of_scalings(
    steps: list[str], shape: tuple[int, ...], dtype: torch.dtype, odd: float, seed: int
):
    def fun(v: Tensor, a: Tensor, m: Tensor) -> list[Tensor]:
        outputs = []
        for step in steps:
            v = STEPS[step](v, a, m)
            outputs.append(v.sum())
        return [v, *outputs[:1]]

    def inputs(seed: int) -> list[Tensor]:
        # Of one size, so that no sum cancels.
        v, a = draw(*shape, seed=seed, dtype=dtype), draw(*shape, seed=seed + 1, dtype=dtype)
        return [v.sign() * (0.5 + v.abs().clamp(max=1)), 0.5 + a.abs().clamp(max=1), a > 0.1]

    strange = inputs(seed + 2)
    if strange[0].numel():
        strange[0].view(-1)[0] = odd
    if dtype == torch.bfloat16:  # sums of rounded numbers cancel
        steps = [s for s in steps if s not in ("minus a scaling", "plus scalings of one")]
    same(fun, *inputs(seed), also=[inputs(seed + 7), strange])


@settings(deadline=None, max_examples=60)
@given(
    first=st.sampled_from(["softplus", "sigmoid", "tanh", "exp", "square"]),
    seed=st.integers(0, 1000),
    rows=st.integers(1, 5),
)
def test_products_with_a_hessian(first: str, seed: int, rows: int):
    function: Any = {
        "softplus": torch.nn.functional.softplus, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
        "exp": torch.exp, "square": torch.square,
    }[first]  # fmt: skip

    def product(X: Tensor, w: Tensor, v: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            value = function(X @ w).mean()
            (g,) = torch.autograd.grad(value, w, create_graph=True)
            outputs = []
            for _ in range(2):  # the second product shares what the first has made
                (v,) = torch.autograd.grad(g, w, v, retain_graph=True)
                outputs.append(v)
        return [o.detach() for o in outputs]

    def inputs(seed: int) -> list[Tensor]:
        return [draw(rows, 3, seed=seed), draw(3, seed=seed + 1), draw(3, seed=seed + 2)]

    same(product, *inputs(seed), also=[inputs(seed + 5)])


def test_a_logistic_regression_becomes_its_closed_form():
    def product(X: Tensor, w: Tensor, *vs: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            value = torch.nn.functional.softplus(X @ w).sum() / len(X)
            (g,) = torch.autograd.grad(value, w, create_graph=True)
            return [torch.autograd.grad(g, w, v, retain_graph=True)[0].detach() for v in vs]

    few, more = (
        same(product, draw(5, 3), *(draw(3, seed=seed) for seed in range(vectors)))
        for vectors in (4, 5)
    )
    assert len(more) - len(few) <= 4  # mv, mul, mv, and perhaps a view


@pytest.mark.parametrize("dims", [(-1, 0), (-1, -2), (1, 0), (0, 1), (-2, -1), (-2, 1)])
def test_a_permutation_of_a_square(dims: tuple[int, int]):
    same(lambda x: [x.permute(dims) * 1, x.permute(dims).permute(dims)], draw(3, 3))


def test_masks_are_not_added_up():
    def fun(x: Tensor, y: Tensor) -> list[Tensor]:
        one, two = x > -9, x < 9
        v = y * y
        return [v * one + v * two]

    same(fun, draw(4), draw(4, seed=1))


def test_small_integers_are_not_added_up():
    def fun(x: Tensor, y: Tensor) -> list[Tensor]:
        v = y * y
        return [v * x + v * (x + 0)]

    same(fun, torch.full((3,), 100, dtype=torch.int8), draw(3))


def test_numbers_at_the_ends_of_the_range():
    def fun(x: Tensor) -> list[Tensor]:
        return [
            x * 1e30 * 1e30 * 1e-30 * 1e-30, x * 1e-30 * 1e-30 * 1e30, x / 1e-30 / 1e-30,
            x * float("inf") * 0.0, -(x * 1e38) * 1e-38,
        ]  # fmt: skip

    for dtype in (torch.float32, D, torch.bfloat16):
        zero_and_more = torch.tensor([0.0, 1.0, -2.0], dtype=dtype)
        same(fun, zero_and_more)


def test_half_precision_keeps_its_order():
    def fun(a: Tensor, b: Tensor, x: Tensor) -> list[Tensor]:
        return [(x * 2.0 + 0.0) * a * b]

    a = torch.full((3,), 1e-4, dtype=torch.float16)
    ours = replayed(fun, [a, a, torch.full((3,), 3e4, dtype=torch.float16)])[0]
    x = torch.full((3,), 2e4, dtype=torch.float16)
    assert torch.equal(ours(a, a, x)[0], fun(a, a, x)[0])
    assert ours(a, a, x)[0].min() > 0
