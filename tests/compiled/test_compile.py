"""`hypergrad.compile` as a function, a decorator, and by an argument."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad

one = torch.ones(2, dtype=torch.float64)


def inner(w: Tensor, t: Tensor) -> Tensor:
    return ((w - t) ** 2).sum() + (w**2).sum()


def plain(w: Tensor, t: Tensor) -> Tensor:
    """Ask for a hypergradient."""
    return hypergrad.implicit_grad(
        lambda w, t: (w**3).sum(), inner, w, t, solver=hypergrad.CG(maxiter=2, rtol=0.0)
    )


def test_a_decorator_with_arguments_and_without():
    expected = plain(one / 2, one)
    for step in (
        hypergrad.compile(plain),
        hypergrad.compile(check=1, on_fallback="raise")(plain),
        hypergrad.compile(backend="aten")(plain),
    ):
        for _ in range(2):
            torch.testing.assert_close(step(one / 2, one), expected)
        assert step.__name__ == "plain"
        assert step.__doc__ == "Ask for a hypergradient."
        assert "operations" in step.explain()


@pytest.mark.parametrize("wrong", [{"backend": "xla"}, {"on_fallback": "no"}])
def test_a_word_that_is_none_of_its_values(wrong: dict[str, Any]):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        hypergrad.compile(plain, **wrong)


def test_what_a_function_does_beside_calling_the_library_is_left_alone():
    calls: list[int] = []

    @hypergrad.compile(on_fallback="raise")
    def step(w: Tensor) -> tuple[Tensor, float]:
        calls.append(1)
        g = plain(w, one)
        return g, float(g.sum())

    for _ in range(3):
        g, total = step(one / 2)
        assert total == pytest.approx(float(g.sum()))
    assert len(calls) == 3


def test_nothing_is_compiled_after_the_call():
    step = hypergrad.compile(plain)
    step(one / 2, one)
    step(one / 2, one)
    before = step.explain()
    plain(one / 2, one)
    assert step.explain() == before


def test_accumulating_by_backward_and_by_an_argument():
    step = hypergrad.compile(hypergrad.implicit_backward, on_fallback="raise")
    for _ in range(3):
        t = one.clone().requires_grad_()
        options = {"solver": hypergrad.CG(maxiter=2, rtol=0.0)}
        step(lambda w, t: (w**3).sum(), inner, one / 2, t * 1, **options)
        torch.testing.assert_close(t.grad, plain(one / 2, one))
        t.grad = None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hypergrad.implicit_backward(
                lambda w, t: (w**3).sum(), inner, one / 2, t * 1, **options, compile=True
            )
        torch.testing.assert_close(t.grad, plain(one / 2, one))
