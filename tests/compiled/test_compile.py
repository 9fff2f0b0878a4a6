"""`hypergrad.compile` as a function, a decorator, and by an argument."""

from __future__ import annotations

import copy
import pickle
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


@pytest.mark.parametrize(
    "wrong", [{"backend": "xla"}, {"on_fallback": "no"}, {"check": -1}, {"check": "often"}]
)
def test_a_word_that_is_none_of_its_values(wrong: dict[str, Any]):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        hypergrad.compile(plain, **wrong)


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="must be a function; got an object of type int"):
        hypergrad.compile(3)


class Trainer:
    """A step as a method."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    @hypergrad.compile(on_fallback="raise")
    def step(self, w: Tensor) -> Tensor:
        """Scale a hypergradient."""
        return self.scale * plain(w, one)


def test_a_method_is_bound_as_one():
    for scale in (1.0, 2.0):
        torch.testing.assert_close(Trainer(scale).step(one / 2), scale * plain(one / 2, one))
    assert "replayed 2 times" in Trainer.step.explain()


def copied_by_pickle(step: Any) -> Any:
    return pickle.loads(pickle.dumps(step))


@pytest.mark.parametrize("copied", [copy.deepcopy, copied_by_pickle])
def test_a_copy_compiles_for_itself(copied: Any):
    step = hypergrad.compile(plain, check=3)
    expected = step(one / 2, one)
    other = copied(step)
    assert "nothing" in other.explain()
    assert other.session.check == 3
    torch.testing.assert_close(other(one / 2, one), expected)
    assert "replayed 1 times" in other.explain()
    assert "replayed 1 times" in step.explain()


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
