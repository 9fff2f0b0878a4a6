"""Functions captured by Dynamo: their graph, what they capture, and what they return."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad._autograd.transforms import depth
from hypergrad._compiled.capture import Capture, Captured, Failed, NotCaptured, returned
from tests.compiled.test_fold import draw


def run(capture: Capture, stages: Any, arguments: Any) -> tuple[list[Any], Captured]:
    """Capture functions, and call what was captured on the same tensors."""
    captured, tensors, _ = capture(stages, arguments)
    returned(captured)
    lifted = [tensors[place] for place in captured.lifted]
    values: list[Any] = []
    functions = captured.functions(lifted.__getitem__)
    for function, (_, first) in zip(functions, stages, strict=True):
        given = arguments if first is None else (values[first], *arguments[1:])
        values.append(function(*given))
    return values, captured


def test_functions_are_called_as_they_are_and_tensors_that_they_reach_are_lifted():
    capture, h = Capture(), draw(3, seed=1)
    for seed in range(3):
        c = draw(3, seed=10 + seed)
        stages = [(lambda w, h: {"a": w * c, "b": (h.sum(), 3)}, None), (lambda w, h: w - h, None)]  # noqa: B023
        w = draw(3, seed=seed)
        (first, second), captured = run(capture, stages, (w, h))
        torch.testing.assert_close(first["a"], w * c)
        torch.testing.assert_close(first["b"][0], h.sum())
        torch.testing.assert_close(second, w - h)
        assert len(captured.lifted) == 1
    assert len(capture.graphs) == 1


def test_a_stage_takes_the_value_of_an_earlier_one():
    c = draw(3, seed=5)
    stages = [
        (lambda w, h: (w * c, w + h), None),
        (lambda z, h: (z[0] * h).sum() + z[1].sum() * c.sum(), 0),
    ]
    w, h = draw(3), draw(3, seed=1)
    (first, second), _ = run(Capture(), stages, (w, h))
    torch.testing.assert_close(second, (first[0] * h).sum() + first[1].sum() * c.sum())


def test_what_nothing_reads_is_kept():
    def fun(w: Tensor, h: Tensor) -> Tensor:
        with torch.no_grad():
            held = w * 2
        y = torch.zeros(3, dtype=w.dtype)
        y[1:] = (w * h)[1:]
        y.mul_(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = (w[None] @ h[:, None]).squeeze()
        return held.sum() + y.sum() + z.double()

    w, h = draw(3).requires_grad_(), draw(3, seed=1)
    (value,), _ = run(Capture(), [(fun, None)], (w, h))
    torch.testing.assert_close(value, fun(w, h))
    ours, theirs = (torch.autograd.grad(v, w)[0] for v in (value, fun(w, h)))
    torch.testing.assert_close(ours, theirs)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_the_callers_grad_mode_does_not_enter():
    def fun(w: Tensor) -> Tensor:
        with torch.no_grad():
            kept = w * 2
        return (w * kept).sum() if torch.is_grad_enabled() else w.sum()

    w = draw(3).requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            captured = Capture()([(fun, None)], (w,)).captured
            assert not torch.is_grad_enabled()
        value = captured.functions(lambda _: w)[0](w)
        (slope,) = torch.autograd.grad(value, w)
        torch.testing.assert_close(slope, 2 * w.detach())


@pytest.mark.parametrize(
    ("fun", "why"),
    [
        (lambda w: w if w.sum() > 0 else 2 * w, "(?i)data-dependent"),
        (lambda w: print(w) or w, "print"),
        (lambda w: LIST.append(w * 2) or w, "leaves the function"),
    ],
)
def test_the_cause_is_named(fun: Any, why: str):
    before = KEPT.clone()
    with pytest.raises(NotCaptured, match=why):
        run(Capture(), [(fun, None)], (draw(3),))
    assert torch.equal(KEPT, before)
    assert not LIST


KEPT = torch.zeros(3, dtype=torch.float64)
LIST: list[Tensor] = []


def test_settings_of_dynamo_are_the_callers_again():
    config: Any = torch._dynamo.config
    with config.patch(skip_nnmodule_hook_guards=True, capture_scalar_outputs=True):
        before = config.get_config_copy()
        for fun in (lambda w: w * 2, lambda w: w if w.sum() > 0 else 2 * w):
            try:
                run(Capture(), [(fun, None)], (draw(3),))
            except NotCaptured:
                continue
        assert config.get_config_copy() == before


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_a_transform_inside_is_right_at_another_depth(transform: str):
    def fun(w: Tensor) -> Tensor:
        if transform == "vmap":
            return torch.func.vmap(lambda r: (r * w).sum().tanh())(x).sum()
        if transform == "grad":
            return torch.func.grad(lambda u: (x @ u).tanh().sum())(w).sum()
        return torch.func.jvp(lambda u: (x @ u).tanh(), (w,), (w,))[1].sum()

    x, w, kept = draw(4, 3, seed=3), draw(3), []

    def inside(_: Tensor) -> Tensor:  # captured here, and called without the vmap
        captured, tensors, _ = Capture()([(fun, None)], (w,))
        kept.append((captured, [tensors[place] for place in captured.lifted]))
        return torch.zeros(())

    torch.func.vmap(inside)(torch.zeros(2))
    captured, lifted = kept[0]
    (function,) = captured.functions(lifted.__getitem__)
    torch.testing.assert_close(function(w), fun(w))
    torch.testing.assert_close(
        torch.func.vmap(torch.func.vmap(function))(draw(2, 2, 3)),
        torch.func.vmap(torch.func.vmap(fun))(draw(2, 2, 3)),
    )


def test_what_a_function_has_entered_is_left_where_it_fails():
    def fun(w: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            root = torch.func.vmap(lambda r: torch.linalg.cholesky(torch.diag(r)).sum())
            return root(w.expand(2, 3)).sum()

    captured, _, _ = Capture()([(fun, None)], (draw(3).abs(),))
    (function,) = captured.functions(lambda _: torch.zeros(()))
    before = torch.autocast_increment_nesting()
    for _ in range(3):
        with pytest.raises(torch.linalg.LinAlgError):
            function(-draw(3).abs())
        assert depth() == 0
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
    assert torch.autocast_decrement_nesting() == before - 1


OWN = random.Random(0)


@pytest.mark.parametrize(
    "fun",
    [
        lambda w: (w * OWN.random()).sum(),
        lambda w: (w * random.uniform(0, 1)).sum(),
        lambda w: (w * random.randint(0, 9)).sum(),
    ],
)
def test_numbers_of_pythons_generators_are_refused_and_not_used_up(fun: Any):
    before = random.getstate(), OWN.getstate()
    with pytest.raises(NotCaptured, match="random numbers"):
        Capture()([(fun, None)], (draw(3),))
    assert (random.getstate(), OWN.getstate()) == before


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo does so
@pytest.mark.parametrize("tracked", [False, True])
def test_a_backward_of_its_own_is_refused(tracked: bool):
    with pytest.raises(NotCaptured, match="backward of its own"):
        Capture()([(lambda w: _Cube.apply(w).sum(), None)], (draw(3).requires_grad_(tracked),))


def test_a_function_that_raises_may_be_followed_later():
    raises, capture = [True], Capture()

    def fun(w: Tensor) -> Tensor:
        if raises[0]:
            raise ValueError("not now")
        return w.sum()

    with pytest.raises(Failed):
        capture([(fun, None)], (draw(3),))
    raises[0] = False
    run(capture, [(fun, None)], (draw(3),))


def test_what_dynamo_logs_is_hidden_and_its_loggers_stay_as_they_are(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    capture, logger = Capture(), logging.getLogger("torch._dynamo")
    monkeypatch.setattr(logger, "propagate", True)
    before = logger.level
    number = 0
    fun = lambda w: (number * w).sum()
    for number in range(8):  # noqa: B007
        capture([(fun, None)], (draw(3),))
    number = 8
    with pytest.raises(NotCaptured, match="again and again"):
        capture([(fun, None)], (draw(3),))
    assert not [r for r in caplog.records if r.name.startswith("torch._dynamo")]
    assert logger.level == before
