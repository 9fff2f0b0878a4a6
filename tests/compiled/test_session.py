"""What may change from one call of a compiled function to the next, and what is not compiled."""

from __future__ import annotations

import copy
import functools
import gc
import os
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint

import hypergrad
from hypergrad._compiled.session import Program, Replayed, Session, distance
from tests.compiled_losses import KINDS, D, Task, dropout, hypergradient_by_hand

# Few and fixed steps: the same program at each call.
QUICK: dict[str, Any] = {"solver": hypergrad.Exact(), "inner_tol": None, "on_failure": "ignore"}


def ask(outer: Any, inner: Any, w: Any, h: Any, **options: Any) -> Any:
    return hypergrad.implicit_grad(outer, inner, w, h, **{**QUICK, **options})


def compiled(**options: Any) -> Any:
    return hypergrad.compile(ask, **options)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loss(w: Tensor, h: Tensor) -> Tensor:
    return (w**2).sum() + h.sum() * w.sum()


def fit(w: Tensor, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.softplus(-y * (x @ w)).mean() + (h.exp() * w**2).sum()


def same(step: Any, *args: Any, graphs: int | None = None, **options: Any) -> Tensor:
    """Call twice, and compare with the call as it is; no warning, no fallback."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", hypergrad.CompileWarning)
        ours = step(*args, **options)
    theirs = ask(*args, **options)
    assert not step.session.causes
    if graphs is not None:
        assert sum(len(c.graphs) for c in step.session._captures.values()) == graphs
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert not torch.equal(ours, torch.zeros_like(ours))
    return ours


W, H = draw(3, seed=1), draw(3, seed=2)


# Every kind of loss.


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_loss_is_right_at_later_calls(kind: Callable[[int], Task]):
    step = compiled(on_fallback="raise")
    for seed in range(3):
        task = kind(seed)
        ours = step(task.outer, task.inner, task.params, task.hparams)
        theirs = ask(task.outer, task.inner, task.params, task.hparams)
        for name, by_hand in zip(ours, hypergradient_by_hand(task), strict=True):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(ours[name], by_hand, rtol=1e-8, atol=1e-11)
    assert sum(program.calls for program in step.session.programs) == 3


def test_dropout_is_not_compiled_and_draws_as_without():
    task, answers = dropout(0), []
    step = compiled()
    for call in (step, ask):
        torch.manual_seed(3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answers.append(call(task.outer, task.inner, task.params, task.hparams))
            answers.append(torch.rand(()))
        assert [w.category for w in caught] == [hypergrad.CompileWarning] * (call is step)
    assert "random numbers" in str(step.explain())
    torch.testing.assert_close(answers[0], answers[2])
    assert answers[1] == answers[3]


# Under vmap.


@pytest.mark.parametrize("nested", [False, True])
def test_tasks_of_a_vmap(nested: bool):
    lead = (2, 3) if nested else (4,)
    step = compiled(on_fallback="raise")

    def mapped(call: Any, *batched: Tensor) -> Tensor:
        def one(w: Tensor, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return call(loss, lambda w, h: fit(w, h, x, y), w, h)

        return (vmap(vmap(one)) if nested else vmap(one))(*batched)

    for seed in (0, 10):
        data = (
            draw(*lead, 3, seed=seed), draw(*lead, 3, seed=seed + 1),
            draw(*lead, 6, 3, seed=seed + 2), draw(*lead, 6, seed=seed + 3).sign(),
        )  # fmt: skip
        ours, theirs = mapped(step, *data), mapped(ask, *data)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        flat = [t.flatten(0, len(lead) - 1) for t in data]
        alone = [
            ask(loss, lambda w, h, x=x, y=y: fit(w, h, x, y), w, h)
            for w, h, x, y in zip(*flat, strict=True)
        ]
        torch.testing.assert_close(ours.flatten(0, -2), torch.stack(alone), rtol=1e-9, atol=1e-12)
    assert sum(program.calls for program in step.session.programs) == 2


def test_a_task_and_a_batch_are_told_apart():
    step = compiled(on_fallback="raise")
    x, y = draw(6, 3), draw(6, seed=4).sign()
    xs = draw(2, 6, 3, seed=5)

    def one(w: Tensor, h: Tensor, x: Tensor, call: Any) -> Tensor:
        return call(loss, lambda w, h: fit(w, h, x, y), w, h)

    for in_dims in ((None, None, 0), (0, 0, None), (0, None, 0)):
        args = [
            torch.stack([t, 2 * t]) if dim == 0 and t.ndim == 1 else t
            for t, dim in zip((W, H, xs if in_dims[2] == 0 else x), in_dims, strict=True)
        ]
        ours, theirs = (
            vmap(functools.partial(one, call=call), in_dims=in_dims)(*args) for call in (step, ask)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_test_points_that_share_an_inner_problem():
    step, (x, y) = compiled(), (draw(6, 3), draw(6, seed=4).sign())

    def of_points(call: Any, w: Tensor) -> Tensor:
        inner = lambda w, h: fit(w, h, x, y)
        return vmap(lambda p: call(lambda w, h: (p @ w) ** 2, inner, w, H))(draw(4, 3, seed=9))

    for scale in (1.0, 2.0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hypergrad.CompileWarning)
            ours = of_points(step, scale * W)
        torch.testing.assert_close(ours, of_points(ask, scale * W), rtol=1e-9, atol=1e-12)


# What changes between calls.


def test_closures_made_anew_on_new_batches_take_one_graph():
    step = compiled()
    for seed in range(4):
        x, y = draw(6, 3, seed=seed), draw(6, seed=seed + 20).sign()
        same(step, loss, lambda w, h, x=x: fit(w, h, x, y), W + seed, H - seed, graphs=1)  # noqa: B023


def test_a_captured_tensor_changed_in_place_is_read_anew():
    step, x, y = compiled(), draw(6, 3), draw(6, seed=4).sign()
    inner = lambda w, h: fit(w, h, x, y)
    before = same(step, loss, inner, W, H)
    x.mul_(-3)
    assert not torch.equal(before, same(step, loss, inner, W, H, graphs=1))


def test_a_global_that_is_replaced_is_read_anew(monkeypatch: pytest.MonkeyPatch):
    step = compiled()
    inner = lambda w, h: fit(w, h, X_GLOBAL, Y_GLOBAL)
    same(step, loss, inner, W, H)
    monkeypatch.setitem(globals(), "X_GLOBAL", draw(6, 3, seed=77))
    same(step, loss, inner, W, H, graphs=1)


X_GLOBAL, Y_GLOBAL = draw(6, 3, seed=30), draw(6, seed=31).sign()


def test_a_captured_number_takes_another_graph():
    step = compiled()
    for number in (0.5, 2.0, 3):
        same(step, loss, lambda w, h: (number * (w - 1) ** 2 + h.exp() * w**2).sum(), W, H)  # noqa: B023
    assert len(step.session.programs) == 3


@pytest.mark.parametrize("kind", ["number", "tensor", "keyword"])
def test_a_default_of_an_argument_is_no_constant(kind: str):
    step = compiled()
    for number in (0.5, 2.0, -1.0):
        if kind == "number":
            inner = lambda w, h, c=number: ((c * w - 1) ** 2 + h.exp() * w**2).sum()
        elif kind == "tensor":
            value = torch.tensor(number, dtype=D)
            inner = lambda w, h, c=value: ((c * w - 1) ** 2 + h.exp() * w**2).sum()
        else:
            inner = lambda w, h, *, c=number: ((c * w - 1) ** 2 + h.exp() * w**2).sum()
        same(step, loss, inner, W, H)


def test_partials_and_methods_and_objects_are_read_anew():
    class Loss:
        def __init__(self, c: float) -> None:
            self.c = c

        def method(self, w: Tensor, h: Tensor) -> Tensor:
            return ((self.c * w - 1) ** 2 + h.exp() * w**2).sum()

        __call__ = method

    step = compiled()
    for c in (0.5, 2.0):
        same(step, loss, Loss(c).method, W, H)
        same(step, loss, Loss(c), W, H)
        same(step, loss, functools.partial(shifted, c), W, H)
    held = Loss(1.0)
    before = same(step, loss, held, W, H)
    held.c = -3.0
    assert not torch.equal(before, same(step, loss, held, W, H))


def shifted(c: float, w: Tensor, h: Tensor) -> Tensor:
    return ((c * w - 1) ** 2 + h.exp() * w**2).sum()


def test_other_sizes_and_strides_and_dtypes():
    step = compiled()
    for rows in (20, 15, 20):
        x, y = draw(rows, 3), draw(rows, seed=4).sign()
        same(step, loss, lambda w, h: fit(w, h, x, y), W, H)  # noqa: B023
    x, y = draw(3, 20).T, draw(20, seed=4).sign()
    same(step, loss, lambda w, h: fit(w, h, x, y), W, H)
    same(step, loss, lambda w, h: fit(w, h, x, y), draw(6, seed=8)[::2], H)
    x, y = x.float(), y.float()
    step(loss, lambda w, h: fit(w, h, x, y), W.float(), H.float())
    assert not step.session.causes
    assert len(step.session.programs) >= 4


def test_slices_of_one_memory_with_other_offsets():
    step, data, y = compiled(), draw(40, 3), draw(40, seed=4).sign()
    for at in (0, 7, 21):
        x, t = data[at : at + 10], y[at : at + 10]
        same(step, loss, lambda w, h: fit(w, h, x, t), W, H, graphs=1)  # noqa: B023


def test_a_marked_dynamic_size_is_never_taken_for_another():
    step = compiled()
    for rows in (20, 15, 10):
        x, y = draw(rows, 3), draw(rows, seed=4).sign()
        torch._dynamo.mark_dynamic(x, 0)
        inner = lambda w, h: fit(w, h, x, y)  # noqa: B023
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hypergrad.CompileWarning)
            ours = step(loss, inner, W, H)
        torch.testing.assert_close(ours, ask(loss, inner, W, H), rtol=1e-9, atol=1e-12)


def test_values_in_numpy_are_read_anew():
    step, x = compiled(), np.array([1.0, 2.0, 3.0])
    inner = lambda w, h: ((w * torch.from_numpy(x) - 1) ** 2 + h.exp() * w**2).sum()
    scaled = lambda w, h: ((w - 1) ** 2 * float(x[0]) + h.exp() * w**2).sum()
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hypergrad.CompileWarning)
            for loss_of_numbers in (inner, scaled):
                ours = step(loss, loss_of_numbers, W, H)
                torch.testing.assert_close(ours, ask(loss, loss_of_numbers, W, H))
        x *= -2


def test_one_tensor_in_two_places():
    step = compiled()
    c = draw(3, seed=6)
    inner = lambda w, h: ((c * w - 1) ** 2 + h.exp() * w**2).sum()
    same(step, loss, inner, W, H)
    same(step, loss, inner, W, W)
    same(step, loss, inner, c, H)
    same(step, loss, inner, W, c)
    same(step, loss, inner, c, c)
    pair = lambda w, h: ((w["a"] - c) ** 2 + (w["b"] * h - w["a"]) ** 2 + w["b"] ** 2).sum()
    outer = lambda w, h: (w["a"] * w["b"]).sum()
    for w in ({"a": W, "b": H}, {"a": W, "b": W}, {"a": H, "b": W}):
        ours, theirs = step(outer, pair, w, H), ask(outer, pair, w, H)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert not step.session.causes


def test_which_leaves_are_variables_may_change():
    step, c = compiled(), draw(3, seed=6)
    inner = lambda w, h: ((w["a"] - c) ** 2 + (w["b"] * h - w["a"]) ** 2 + w["b"] ** 2).sum()
    outer = lambda w, h: (w["a"] * w["b"]).sum()
    answers = []
    for of_a, of_b in ((True, True), (False, True), (True, False), (False, False)):
        w = {"a": W.clone().requires_grad_(of_a), "b": H.clone().requires_grad_(of_b)}
        answers.append(step(outer, inner, w, H))
        torch.testing.assert_close(answers[-1], ask(outer, inner, w, H), rtol=1e-9, atol=1e-12)
    assert not step.session.causes
    assert not torch.allclose(answers[0], answers[1])


def test_tied_weights_and_others():
    step = compiled()

    class Two(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.a = nn.Parameter(draw(3, seed=40))
            self.b = self.a if tied else nn.Parameter(draw(3, seed=41))

        def forward(self, w: Tensor) -> Tensor:
            return ((w * self.a - 1) ** 2 + (w - self.b) ** 2).sum()

    for tied in (True, False, True):
        module = Two(tied)
        same(step, loss, lambda w, h: module(w) + (h.exp() * w**2).sum(), W, H)  # noqa: B023


def test_train_and_eval():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).to(D).eval()
    params = {k: p.detach() for k, p in net.named_parameters()}

    def inner(w: Any, h: Tensor) -> Tensor:
        value = functional_call(net, w, draw_x)
        return (value**2).mean() + sum((h.exp() * (p - 1) ** 2).sum() for p in w.values())

    draw_x, outer = draw(4, 3), lambda w, h: sum((p**3).sum() for p in w.values())
    step = compiled()
    same(step, outer, inner, params, H)
    net.train()
    torch.manual_seed(0)
    with pytest.warns(hypergrad.CompileWarning, match="random"):
        ours = step(outer, inner, params, H)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, ask(outer, inner, params, H))


def test_hooks_that_are_added_to_a_module_later():
    net, step = nn.Linear(3, 3).to(D), compiled()

    def inner(w: Any, h: Tensor) -> Tensor:
        value = functional_call(net, w, X_GLOBAL)
        return (value.tanh() ** 2).mean() + sum((h.exp() * (p - 1) ** 2).sum() for p in w.values())

    params = {k: p.detach() for k, p in net.named_parameters()}
    outer = lambda w, h: sum((p**3).sum() for p in w.values())
    before = same(step, outer, inner, params, H)
    handle = net.register_forward_hook(lambda module, args, out: 3 * out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hypergrad.CompileWarning)
        ours = step(outer, inner, params, H)
    torch.testing.assert_close(ours, ask(outer, inner, params, H), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(ours, before)
    handle.remove()
    torch.testing.assert_close(step(outer, inner, params, H), before)


class Replaceable:
    """Something with a method that is replaced in a test."""

    def squares(self, w: Tensor) -> Tensor:
        return ((2 * w - 1) ** 2).sum()


@pytest.mark.parametrize("what", ["method", "hook of all modules", "environment"])
def test_what_dynamo_does_not_guard(what: str, monkeypatch: pytest.MonkeyPatch):
    step, held, net = compiled(), Replaceable(), nn.Linear(3, 3).to(D)
    monkeypatch.setenv("HYPERGRAD_TEST_FACTOR", "1.0")

    def inner(w: Tensor, h: Tensor) -> Tensor:
        value = held.squares(w) + (net(w) ** 2).sum() + (h.exp() * w**2).sum()
        if what == "environment":
            value = value + float(os.environ.get("HYPERGRAD_TEST_FACTOR", "1.0")) * (w**2).sum()
        return value

    def answers() -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hypergrad.CompileWarning)
            return step(loss, inner, W, H), ask(loss, inner, W, H)

    before = answers()
    handle = None
    if what == "method":
        monkeypatch.setattr(Replaceable, "squares", lambda self, w: ((9 * w - 1) ** 2).sum())
    elif what == "environment":
        monkeypatch.setenv("HYPERGRAD_TEST_FACTOR", "7.0")
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: 5 * out)
    after = answers()
    if handle is not None:
        handle.remove()
    torch.testing.assert_close(*before)
    torch.testing.assert_close(*after)
    assert not torch.allclose(before[0], after[0])


def test_autocast_between_calls():
    step, x, y = compiled(), draw(6, 3).float(), draw(6, seed=4).sign().float()
    inner = lambda w, h: (
        F.softplus(-y * (x @ w[:, None]).squeeze(1)).mean() + (w**2 * h.exp()).sum()
    )
    w, h = W.float(), H.float()
    answers = []
    for on in (False, True, False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            ours, theirs = step(loss, inner, w, h), ask(loss, inner, w, h)
        rtol = 3e-2 if on else 1e-5
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol / 10)
        answers.append(ours)
    assert not step.session.causes
    assert not torch.allclose(answers[0], answers[1], rtol=1e-5)


def test_the_callers_modes():
    step, c = compiled(), draw(3, seed=6)

    def inner(w: Tensor, h: Tensor) -> Tensor:
        with torch.no_grad():
            target = (w * 2).clone()
        kept = w * 3 if torch.is_grad_enabled() else w
        return ((kept - c - target) ** 2 + h.exp() * w**2).sum()

    expected = ask(loss, inner, W, H)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for first in (step, compiled()):
            with mode():
                ours = first(loss, inner, W, H)
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
            assert not first.session.causes
    torch.set_default_dtype(D)
    try:
        half = lambda w, h: ((w * torch.ones(3) / 3 - 1) ** 2 + h.exp() * w**2).sum()
        same(step, loss, half, W, H)
        torch.set_default_dtype(torch.float32)
        same(step, loss, half, W, H)
    finally:
        torch.set_default_dtype(torch.float32)


def test_requires_grad_of_what_is_captured():
    step = compiled()
    for flag in (False, True, False):
        c = draw(3, seed=6).requires_grad_(flag)
        ours = same(step, loss, lambda w, h: ((c * w - 1) ** 2 + h.exp() * w**2).sum(), W, H)  # noqa: B023
        assert not ours.requires_grad
    c = draw(3, seed=6).requires_grad_()
    same(step, loss, lambda w, h: ((w - 2 * c) ** 2 + h.exp() * w**2).sum(), W, H)


def test_where_the_solve_starts():
    step = compiled(on_fallback="raise")
    inner = lambda w, h: fit(w, h, X_GLOBAL, Y_GLOBAL)
    cg = hypergrad.CG(maxiter=2, rtol=0.0)
    answers = []
    for x0 in (None, draw(3, seed=50), draw(3, seed=51), None):
        ours = step(loss, inner, W, H, solver=cg, x0=x0)
        torch.testing.assert_close(ours, ask(loss, inner, W, H, solver=cg, x0=x0))
        answers.append(ours)
    assert not torch.allclose(answers[1], answers[2])


def test_aux_is_that_of_this_call():
    step = compiled(on_fallback="raise")
    inner = lambda w, h: ((w - 1) ** 2 + h.exp() * w**2).sum()
    for number, x in ((1, draw(2)), (2, draw(2, seed=1)), (2, draw(2, seed=2))):
        outer = lambda w, h: (loss(w, h), {"n": number, "x": x, "w": 2 * w, "of": KEPT})  # noqa: B023
        grads, aux = step(outer, inner, W + number, H, has_aux=True)
        theirs, truth = ask(outer, inner, W + number, H, has_aux=True)
        torch.testing.assert_close(grads, theirs)
        assert aux["n"] == truth["n"] == number
        assert aux["of"] is truth["of"]
        torch.testing.assert_close(aux["x"], x)
        torch.testing.assert_close(aux["w"], truth["w"])


KEPT = "a word"


# What a replay hands out.


def test_nothing_that_is_returned_is_memory_of_somebody_else():
    step, c = compiled(on_fallback="raise"), draw(3, seed=6)
    outer = lambda w, h: ((c * h["a"]).sum() + w.sum(), c)
    inner = lambda w, h: (w**2).sum() + (w * h["b"]).sum()
    h = {"a": H, "b": H + 1, "unused": H + 2}
    kept = c.clone()
    for _ in range(3):
        grads, _ = step(outer, inner, W, h, has_aux=True)
        torch.testing.assert_close(grads["a"], kept)
        torch.testing.assert_close(grads["b"], torch.full_like(c, -0.5))
        assert torch.equal(grads["unused"], torch.zeros_like(c))
        for leaf in grads.values():
            leaf.mul_(7).add_(1)
    torch.testing.assert_close(c, kept)


def test_params_past_the_arguments_are_refused_at_a_later_call():
    step = compiled()
    for reached in (draw(3, seed=6).requires_grad_(), W.clone().requires_grad_()):
        inner = lambda w, h: ((w - reached) ** 2 + h.exp() * w**2).sum()  # noqa: B023
        step(loss, inner, W, H)
    w = W.clone().requires_grad_()
    inner = lambda v, h: ((v - w) ** 2 + h.exp() * v**2).sum()
    with pytest.raises(hypergrad.NotConnected) as ours:
        step(loss, inner, w, H)
    with pytest.raises(hypergrad.NotConnected) as theirs:
        ask(loss, inner, w, H)
    assert str(ours.value) == str(theirs.value)
    assert ours.value.leaf == theirs.value.leaf


def test_an_answer_that_overflows_in_a_replay_alone_is_computed_anew():
    step, small = compiled(), {"dtype": torch.float32}
    inner = lambda w, h: (w**2).sum() / 2 + (w * (h * a * b)).sum()
    a, b = torch.ones(3), torch.ones(3)
    w, h = torch.zeros(3, **small), torch.ones(3, **small)
    step(loss, inner, w, h)
    a, b = torch.full((3,), 1e25), torch.full((3,), 1e-25)
    torch.testing.assert_close(step(loss, inner, w, h), ask(loss, inner, w, h))


FIGURES = {"solver": hypergrad.CG(maxiter=3, rtol=0.0), "return_info": True, "inner_tol": 1e-3}


@pytest.mark.parametrize("tasks", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_evidence_of_a_replay_is_that_of_the_call_as_it_is(tasks: int, dtype: torch.dtype):
    step = compiled(on_fallback="raise")
    options = {**FIGURES, "on_failure": "warn"}

    def one(call: Any, w: Tensor, h: Tensor, x: Tensor, y: Tensor) -> Any:
        return call(loss, lambda w, h: fit(w, h, x, y), w, h, **options)

    lead = (tasks,) if tasks else ()
    for seed in (0, 1):
        shapes = ((4,), (4,), (9, 4), (9,))
        data = [draw(*lead, *s, seed=10 * seed + i, dtype=dtype) for i, s in enumerate(shapes)]
        answers = []
        for call in (step, ask):
            of = functools.partial(one, call)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                grads, info = (vmap(of) if tasks else of)(*data)
            answers.append((grads, info, [str(w.message) for w in caught]))
        (ours, info, said), (theirs, truth, truly) = answers
        assert said == truly
        assert repr(info).split("(")[0] == repr(truth).split("(")[0]
        rtol = 1e-6 if dtype == D else 2e-3
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol / 100)
        for name in vars(truth):
            a, b = getattr(info, name), getattr(truth, name)
            if isinstance(b, Tensor):
                torch.testing.assert_close(
                    a,
                    b,
                    rtol=rtol,
                    atol=rtol / 100,
                    equal_nan=True,
                    msg=lambda m: f"{name}: {m}",  # noqa: B023
                )
            else:
                assert a == b or torch.equal(a, b)
    assert sum(program.calls for program in step.session.programs) >= 2


@pytest.mark.parametrize("mode", ["warn", "raise"])
@pytest.mark.parametrize("case", ["negative curvature", "nan", "unsolved"])
def test_failures_at_a_later_call_say_the_same(case: str, mode: str):
    step = compiled()
    solver = hypergrad.CG(maxiter=6, rtol=1e-6)
    options = {**FIGURES, "solver": solver, "on_failure": mode}
    ok, bad = {
        "negative curvature": (1.0, -5.0), "nan": (1.0, float("nan")), "unsolved": (1.0, 1.0),
    }[case]  # fmt: skip
    away = draw(3, seed=60) if case == "unsolved" else torch.zeros(3, dtype=D)

    def inner_of(c: float) -> Any:
        scale = torch.tensor(c, dtype=D)
        return lambda w, h: (scale * (w - 1) ** 2 + h.exp() * (w - 1) ** 2).sum()

    at = torch.ones(3, dtype=D)
    step(loss, inner_of(ok), at, H, **options)
    texts = []
    for call in (step, ask, step):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                _, info = call(loss, inner_of(bad), at + away, H, **options)
                texts.append(([str(w.message) for w in caught], bool(info.success)))
            except hypergrad.HypergradError as error:
                texts.append((type(error), str(error)))
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][0] or mode == "raise"


# What is not compiled.


def _branch(w: Tensor, h: Tensor) -> Tensor:
    return ((w - 1) ** 2 + h.exp() * w**2).sum() * (1.0 if w.sum().item() > 0 else 2.0)


def _random(w: Tensor, h: Tensor) -> Tensor:
    return ((w * torch.randn(3, dtype=D) - 1) ** 2 + h.exp() * w**2).sum()


def _mask(w: Tensor, h: Tensor) -> Tensor:
    return ((w - 1) ** 2 + h.exp() * w**2).sum() + w[w > 0].mean()


def _prints(w: Tensor, h: Tensor) -> Tensor:
    print("called")
    return ((w - 1) ** 2 + h.exp() * w**2).sum()


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(2 * x.detach().numpy())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def _function(w: Tensor, h: Tensor) -> Tensor:
    return ((_Doubled.apply(w) - 1) ** 2 + h.exp() * w**2).sum()


def _strided(w: Tensor, h: Tensor) -> Tensor:
    return ((w.as_strided((3,), (1,)) - 1) ** 2 + h.exp() * w**2).sum()


@pytest.mark.parametrize(
    "inner", [_branch, _random, _mask, _prints, _strided], ids=lambda inner: inner.__name__
)
def test_what_cannot_be_captured_runs_as_it_is_and_is_said_once(inner: Any):
    step = compiled()
    for number in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.manual_seed(number)
            ours = step(loss, inner, W - number, H)
        said = [str(w.message) for w in caught if w.category is hypergrad.CompileWarning]
        assert len(said) == (number == 0), said
        assert all(text.startswith("implicit_grad is not compiled: ") for text in said)
        torch.manual_seed(number)
        torch.testing.assert_close(ours, ask(loss, inner, W - number, H))
    assert "is not compiled" in step.explain()
    strict = compiled(on_fallback="raise")
    for _ in range(2):
        with pytest.raises(hypergrad.NotCompiled):
            strict(loss, inner, W, H)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(on_fallback="ignore")(loss, inner, W, H)


def test_a_function_with_a_backward_of_its_own():
    step = compiled()
    for number in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hypergrad.CompileWarning)
            ours = step(loss, _function, W - number, H)
        torch.testing.assert_close(ours, ask(loss, _function, W - number, H))


def test_a_checkpoint_and_saved_tensor_hooks():
    def hooked(w: Tensor, h: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return ((w - 1) ** 4 + h.exp() * w**2).sum()

    def kept(w: Tensor, h: Tensor) -> Tensor:
        return (
            checkpoint(lambda w: ((w - 1) ** 4).sum(), w, use_reentrant=False)
            + (h.exp() * w**2).sum()
        )

    for inner in (hooked, kept):
        step = compiled()
        for number in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", hypergrad.CompileWarning)
                ours = step(loss, inner, W - number, H)
            torch.testing.assert_close(ours, ask(loss, inner, W - number, H))
    step, inner = compiled(), lambda w, h: ((w - 1) ** 4 + h.exp() * w**2).sum()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: 2 * t, lambda t: t):
        same(step, loss, inner, W, H)
        same(step, loss, inner, W - 1, H)


def test_a_hook_on_a_tensor_inside():
    def inner(w: Tensor, h: Tensor) -> Tensor:
        z = w * 2
        z.register_hook(lambda g: 3 * g)
        return (z**2).sum() / 2 + (h.exp() * w**2).sum()

    step = compiled()
    for number in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ours = step(loss, inner, W - number, H)
            except hypergrad.CompileMismatch:
                continue
            torch.testing.assert_close(ours, ask(loss, inner, W - number, H))


class _Named(torch.Tensor):
    pass


def test_a_subclass_that_is_captured():
    step, c = compiled(), draw(3, seed=6).as_subclass(_Named)
    inner = lambda w, h: ((c * w - 1) ** 2 + h.exp() * w**2).sum()
    with pytest.warns(hypergrad.CompileWarning):
        ours = step(loss, inner, W, H)
    torch.testing.assert_close(torch.Tensor(ours), torch.Tensor(ask(loss, inner, W, H)))


@pytest.mark.parametrize("by_module", [True, False])
def test_batch_norm_in_train_mode_is_refused_as_without(by_module: bool):
    norm = nn.BatchNorm1d(3).to(D)
    x, before = draw(6, 3), [b.clone() for b in norm.buffers()]

    def inner(w: Tensor, h: Tensor) -> Tensor:
        z = x * w
        if by_module:
            z = norm(z)
        else:
            z = F.batch_norm(z, norm.running_mean, norm.running_var, training=True)
        return ((z - 1).tanh() ** 2).sum() + (h.exp() * w**2).sum()

    texts = []
    for call in (compiled(on_fallback="ignore"), ask):
        with pytest.raises(hypergrad.UnsupportedOperation) as raised:
            call(loss, inner, W, H)
        texts.append(str(raised.value))
    assert texts[0] == texts[1]
    assert all(torch.equal(a, b) for a, b in zip(before, norm.buffers(), strict=True))


def test_a_counter_in_place():
    seen = torch.zeros(1, dtype=D)

    def inner(w: Tensor, h: Tensor) -> Tensor:
        seen.add_(1)
        return ((w - 1) ** 2 + h.exp() * w**2).sum()

    ask(loss, inner, W, H)
    once = seen.item()
    with pytest.warns(hypergrad.CompileWarning, match="in place"):
        compiled()(loss, inner, W, H)
    assert seen.item() == 2 * once


def test_tensors_that_leave_by_another_way():
    kept: list[Tensor] = []

    def inner(w: Tensor, h: Tensor) -> Tensor:
        kept.append(w.detach().sum())
        return ((w - 1) ** 2 + h.exp() * w**2).sum()

    with pytest.warns(hypergrad.CompileWarning, match="leaves the function"):
        compiled()(loss, inner, W, H)
    assert all(torch.equal(t, W.sum()) for t in kept)


def test_pythons_random_numbers():
    import random

    def inner(w: Tensor, h: Tensor) -> Tensor:
        return ((w * random.random() - 1) ** 2 + h.exp() * w**2).sum()

    step = compiled()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(loss, inner, W, H)
    assert hypergrad.CompileWarning in [w.category for w in caught]


def test_errors_of_a_loss_are_its_own():
    class Bad(Exception):
        pass

    def inner(w: Tensor, h: Tensor) -> Tensor:
        raise Bad("here")

    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hypergrad.CompileWarning)
            with pytest.raises(Bad, match="here"):
                compiled()(loss, inner, W, H)


def test_mistakes_are_told_as_without():
    wrong = [
        (loss, lambda w, h: h.sum(), W, H),
        (loss, lambda w, h: w, W, H),
        (lambda w, h: h.sum(), fit_here, W, H),
        (loss, fit_here, W.long(), H),
    ]
    for args in wrong:
        texts = []
        for call in (compiled(on_fallback="ignore"), ask):
            with pytest.raises(hypergrad.HypergradError) as raised:
                call(*args)
            texts.append((type(raised.value), str(raised.value), raised.value.leaf))
        assert texts[0] == texts[1]


def fit_here(w: Tensor, h: Tensor) -> Tensor:
    return ((w - 1) ** 2 + h.exp() * w**2).sum()


def test_solvers_and_conditions_that_hold_functions():
    scale = [2.0]
    solver = hypergrad.CG(maxiter=2, rtol=0.0, preconditioner=lambda v: v / scale[0])
    step = compiled()
    with pytest.warns(hypergrad.CompileWarning, match="preconditioner"):
        step(loss, fit_here, W, H, solver=solver)
    root = hypergrad.Root(lambda w, h: 2 * (w - 1) + 2 * h.exp() * w, symmetric=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hypergrad.CompileWarning)
        ours = step(loss, root, W, H)
    torch.testing.assert_close(ours, ask(loss, root, W, H))


def test_inside_of_another_transform():
    step = compiled()
    c = draw(3, seed=6)
    inner = lambda w, h: ((c * w - 1) ** 2 + h.exp() * w**2).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hypergrad.CompileWarning)
        with pytest.raises(hypergrad.UnsupportedOperation):
            torch.func.grad(lambda h: step(loss, inner, W, h).sum())(H)
    with torch.autograd.forward_ad.dual_level():
        c = torch.autograd.forward_ad.make_dual(c, torch.ones_like(c))
        for call in (compiled(on_fallback="ignore"), ask):
            with pytest.raises(hypergrad.UnsupportedOperation, match="custom_argmin"):
                call(loss, inner, W, H)


# Limits of Dynamo, and its state.


@pytest.mark.slow
def test_fifty_losses_in_one_process():
    step = compiled(on_fallback="raise")
    before = copy.deepcopy(torch._dynamo.config.get_config_copy())
    for number in range(50):
        space: dict[str, Any] = {}
        exec(f"def inner(w, h): return (({number + 1} * w - 1) ** 2 + h.exp() * w**2).sum()", space)
        ours = step(loss, space["inner"], W, H)
        if number % 10 == 0:
            torch.testing.assert_close(ours, ask(loss, space["inner"], W, H))
    assert len(step.session.programs) == 50
    assert torch._dynamo.config.get_config_copy() == before


@pytest.mark.slow
def test_a_dozen_losses_in_one_wrapper():
    def wrapped(of: Callable[[Tensor], Tensor]) -> Any:
        return lambda w, h: of(w) + (h.exp() * w**2).sum()

    step = compiled(on_fallback="raise")
    for number in range(12):
        space: dict[str, Any] = {}
        exec(f"def of(w): return (({number + 1} * w - 1) ** 2).sum()", space)
        inner = wrapped(space["of"])
        torch.testing.assert_close(step(loss, inner, W, H), ask(loss, inner, W, H))


def test_a_number_that_changes_at_each_call():
    step = compiled()
    said = []
    for number in range(12):
        inner = lambda w, h: (((number + 1) * w - 1) ** 2 + h.exp() * w**2).sum()  # noqa: B023
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours = step(loss, inner, W, H)
        said += [str(w.message) for w in caught]
        torch.testing.assert_close(ours, ask(loss, inner, W, H))
    assert len(said) == 1
    assert "as a tensor" in said[0]


def test_dynamo_reset_between_calls():
    step = compiled(on_fallback="raise")
    for number in range(3):
        x = draw(6, 3, seed=number)
        inner = lambda w, h: fit(w, h, x, Y_GLOBAL)  # noqa: B023
        torch.testing.assert_close(step(loss, inner, W, H), ask(loss, inner, W, H))
        torch._dynamo.reset()


@pytest.mark.parametrize(
    "stance", ["default", "force_eager", "eager_on_recompile", "fail_on_recompile", "unsafe"]
)
def test_stances(stance: str):
    step = compiled()
    for number in (0, 1):
        options = {"skip_guard_eval_unsafe": True} if stance == "unsafe" else {"stance": stance}
        with torch.compiler.set_stance(**options), warnings.catch_warnings():
            warnings.simplefilter("ignore", hypergrad.CompileWarning)
            inner = lambda w, h: (((number + 1) * w - 1) ** 2 + h.exp() * w**2).sum()  # noqa: B023
            ours = step(loss, inner, W, H)
        torch.testing.assert_close(ours, ask(loss, inner, W, H))


def test_no_graph_keeps_a_dead_closure():
    step = compiled(on_fallback="raise")

    def once(seed: int) -> list[weakref.ref[Tensor]]:
        x, w, h = draw(6, 3, seed=seed), draw(3, seed=seed + 1), draw(3, seed=seed + 2)
        net = nn.Linear(3, 1).to(D)

        def inner(w: Tensor, h: Tensor) -> Tensor:
            return fit(w, h, x, Y_GLOBAL) + (net(w) ** 2).sum()

        step(loss, inner, w, h)
        return [weakref.ref(t) for t in (x, w, h, *net.parameters())]

    for seed in (0, 5, 6):
        held = once(seed)
        gc.collect()
        assert [ref() for ref in held] == [None] * len(held)


def test_threads():
    step = compiled(on_fallback="raise")
    expected, answers = {}, {}

    def work(number: int) -> None:
        x = draw(6, 3, seed=number)
        inner = lambda w, h: fit(w, h, x, Y_GLOBAL)
        answers[number] = [step(loss, inner, W + i, H) for i in range(4)]

    for number in range(3):
        x = draw(6, 3, seed=number)
        inner = lambda w, h: fit(w, h, x, Y_GLOBAL)  # noqa: B023
        expected[number] = [ask(loss, inner, W + i, H) for i in range(4)]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(answers, expected)


def test_a_version_that_was_not_tested(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "__version__", "3.1.0")
    with pytest.warns(hypergrad.CompileWarning, match=r"not been tested with PyTorch 3\.1\.0"):
        compiled()(loss, fit_here, W, H)


# What fails, or is exact, at one call and not at another.


def _asserted(w: Tensor, h: Tensor) -> Tensor:
    torch._assert_async((w > -50).all(), "out of range")  # as Dynamo writes an assertion
    return ((w - 1) ** 2 + h.exp() * w**2).sum()


def _factorised(w: Tensor, h: Tensor) -> Tensor:
    root = torch.linalg.cholesky(torch.diag(w + 60))
    return (root**2).sum() + ((w - 1) ** 2 + h.exp() * w**2).sum()


@pytest.mark.parametrize("inner", [_asserted, _factorised], ids=lambda inner: inner.__name__)
def test_what_raises_at_a_later_call_raises_there(inner: Any):
    step = compiled(on_fallback="raise")
    same(step, loss, inner, W, H)
    texts = []
    for call in (step, ask):
        with pytest.raises(Exception) as raised:  # noqa: PT011 - whatever the loss raises
            call(loss, inner, W - 100, H)
        texts.append((type(raised.value), str(raised.value)))
    assert texts[0] == texts[1]
    same(step, loss, inner, W, H)
    assert [program.calls for program in step.session.programs] == [2]
    for _ in range(5):
        with pytest.raises(Exception):  # noqa: B017, PT011
            step(loss, inner, W - 100, H)
        same(step, loss, inner, W, H)


def test_an_outer_loss_that_fails_further_on():
    # The evidence looks at it a Newton step away, and goes on where it fails there.
    inner = lambda w, h: ((w - c) ** 2 + h.exp() * w**2).sum()
    outer = lambda w, h: torch.linalg.cholesky(torch.diag(w + shift)).sum() + h.sum()
    step, c = compiled(), draw(3, seed=6)
    options = {"inner_tol": 1e-3, "on_failure": "ignore", "return_info": True}
    for number in (30.0, 1.0, 30.0):
        shift, w = torch.tensor(number, dtype=D), W.abs() + 0.1
        (ours, info), (theirs, truth) = (f(outer, inner, w, H, **options) for f in (step, ask))
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(info.outer_error, truth.outer_error)


def test_a_residual_that_is_zero_or_rounding_is_no_other_branch():
    step = compiled(on_fallback="raise")
    for seed in range(4):
        c = draw(3, seed=seed) if seed % 2 else torch.ones(3, dtype=D)
        inner = lambda w, h: ((w - c) ** 2 + w**2).sum() + 0 * h.sum()  # noqa: B023
        for w in (c / 2, c / 3):
            same(step, loss, inner, w, H, return_info=False, inner_tol=1e-3)


def test_a_penalty_with_a_kink():
    step = compiled(on_fallback="raise")
    inner = lambda w, h: ((w - 1) ** 2).sum() + (h.exp() * w.abs()).sum() + (w.abs() ** 1.5).sum()
    for w in (W, W + 1, W - 1):
        same(step, loss, inner, w, H)


def test_transforms_inside_of_losses_that_tasks_share():
    x = draw(4, 3, seed=3)
    losses = [
        lambda w, h: vmap(lambda r: ((r * w).sum() - 1).tanh() ** 2)(x).sum() + (w**2).sum(),
        lambda w, h: (torch.func.grad(lambda u: (x @ u).tanh().sum())(w) ** 2).sum() + (w**2).sum(),
    ]
    for inner in losses:
        step = compiled(on_fallback="raise")
        for seed in (0, 1):
            of = lambda call, t: call(lambda w, h: t * loss(w, h), inner, W, H)  # noqa: B023
            tasks = draw(4, seed=seed)
            ours, theirs = (vmap(functools.partial(of, call))(tasks) for call in (step, ask))
            torch.testing.assert_close(ours, theirs)
    own = lambda call, w: call(loss, losses[0], w, H)
    step = compiled()
    with pytest.warns(hypergrad.CompileWarning, match=r"torch\.func stays inside of the vmap"):
        ours = vmap(functools.partial(own, step))(draw(4, 3))
    torch.testing.assert_close(ours, vmap(functools.partial(own, ask))(draw(4, 3)))


def test_a_memory_that_the_problem_has_left_behind():
    step, cg = compiled(), hypergrad.CG(rtol=1e-8, recycle=True)
    n, h = 40, torch.ones(40, dtype=D)
    matrices = []
    for seed in (0, 1):
        basis = torch.linalg.qr(draw(n, n, seed=seed)).Q
        matrices.append((basis * torch.logspace(0, 3, n, dtype=D)) @ basis.T)
    scaled = torch.diag(torch.logspace(4, 0, n, dtype=D))
    for number in (0, 0, 0, 1, 1, 0, 2, 2, 2, 0, 3, 0):
        A = [*matrices, scaled, 1e6 * matrices[0]][number]
        b = draw(n, seed=7)
        w = torch.linalg.solve(A, b)
        inner = lambda w, h: w @ (A @ w) / 2 - (b * h) @ w  # noqa: B023
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hypergrad.CompileWarning)
            ours, info = step(
                lambda w, h: (w**2).sum(), inner, w, h, solver=cg, return_info=True,
                inner_tol=1e-3, on_failure="raise",
            )  # fmt: skip
        torch.testing.assert_close(ours, b * torch.linalg.solve(A, 2 * w), rtol=1e-4, atol=1e-8)
        info.solution.mul_(1e9)


# The check.


def test_a_mismatch_is_raised_and_ends_compiling(monkeypatch: pytest.MonkeyPatch):
    step = compiled(check=2)
    for _ in range(3):
        step(loss, fit_here, W, H)
    program = step.session.programs[0]
    run = program.run
    program.run = lambda *inputs: [1.01 * t if t.is_floating_point() else t for t in run(*inputs)]
    with pytest.raises(hypergrad.CompileMismatch, match=r"off by 0\.01"):
        step(loss, fit_here, W, H)
    torch.testing.assert_close(step(loss, fit_here, W, H), ask(loss, fit_here, W, H))
    assert "differed" in step.explain()


def test_a_trace_that_its_first_replay_leaves_is_tried_again(monkeypatch: pytest.MonkeyPatch):
    # As where a residual lies on the tolerance itself, and rounding decides.
    runs = []

    def run_after(once: int) -> Any:
        def run(program: Program, inputs: list[Tensor]) -> list[Tensor] | None:
            runs.append(program)
            return None if len(runs) <= once else ran(program, inputs)

        return run

    ran = hypergrad._compiled.session._run
    step = compiled()
    monkeypatch.setattr("hypergrad._compiled.session._run", run_after(1))
    same(step, loss, fit_here, W, H, graphs=1)
    same(step, loss, fit_here, W, H, graphs=1)
    assert [program.calls for program in step.session.programs] == [1]

    monkeypatch.setattr("hypergrad._compiled.session._run", run_after(100))
    four_times = lambda: [step(loss, fit_here, W, H) for _ in range(4)]
    with pytest.warns(hypergrad.CompileWarning, match="its steps change from call to call") as told:
        four_times()
    assert len(told) == 1


def test_distances():
    one, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert distance([one], [one]) == 0
    assert distance([nan], [nan]) == 0
    assert distance([nan], [one]) == float("inf")
    assert distance([one], [nan]) == float("inf")
    assert distance([one], [torch.zeros(2)]) == float("inf")
    assert distance([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert 0 < distance([one + 1e-4], [one]) < 1
    assert distance([one + 0.1], [one]) > 1


def test_an_ill_conditioned_system_is_no_mismatch():
    scale = torch.logspace(0, 6, 12)
    target = draw(12, seed=70, dtype=torch.float32)
    inner = lambda w, h: (scale * (w * h.exp() - target) ** 2).sum() + ((w * scale).sum()) ** 2
    outer = lambda w, h: (w**2).sum() + h.sum() * w.sum()
    w, h = draw(12, seed=71, dtype=torch.float32), draw(12, seed=72, dtype=torch.float32)
    step = compiled(on_fallback="raise")
    for solver in (hypergrad.CG(maxiter=12, rtol=0.0), hypergrad.Exact()):
        step(outer, inner, w, h, solver=solver)


def test_explain():
    step = compiled()
    assert "nothing" in step.explain()
    step(loss, fit_here, W, H)
    step(loss, fit_here, W, H)
    assert "replayed 2 times" in step.explain()


def test_a_session_of_its_own_and_the_one_everywhere():
    for number in range(2):
        inner = lambda w, h: (((number + 1) * w - 1) ** 2 + h.exp() * w**2).sum()  # noqa: B023
        ours = hypergrad.implicit_grad(loss, inner, W, H, **QUICK, compile=True)
        torch.testing.assert_close(ours, ask(loss, inner, W, H))
    assert not Session().programs


@pytest.mark.parametrize(
    ("off", "left", "nudged", "right"),
    [
        (1e-9, 0.0, 0.0, True),
        (1e-3, 0.0, 0.0, False),
        (1e-3, 1e-4, 0.0, True),  # both ends of a solve that leaves so much
        (1e-3, 1e-6, 0.0, False),
        (1e-3, 0.0, 1e-3, True),  # one rounding of the inner variables makes as much
        (1e-3, 0.0, 1e-5, False),
        (0.5, 1.0, 0.0, False),  # no solve excuses another answer
    ],
)
def test_an_answer_may_be_off_by_what_a_solve_leaves_or_a_rounding_makes(
    off: float, left: float, nudged: float, right: bool
):
    session, present = Session(), [torch.ones(4, dtype=D)]
    ours, moved = [present[0] * (1 + off)], [present[0] * (1 + nudged)]
    program = Program(run=lambda: ours, seen=[], static=None, nodes=1)
    replay = Replayed(ours, program, ("loss",), [], [])
    if right:
        session.agree(replay, ours, present, lambda: moved, left)
        assert program.checked
    else:
        with pytest.raises(hypergrad.CompileMismatch, match="Please report it"):
            session.agree(replay, ours, present, lambda: moved, left)
        assert not program.checked
        assert session.causes


def test_an_answer_that_is_taken_for_bad_shows_nothing_against_a_replay():
    """Iterations that end nowhere end elsewhere in another order of sums."""
    session, present = Session(), [torch.ones(4, dtype=D)]
    program = Program(run=lambda: present, seen=[], static=None, nodes=1)
    replay = Replayed(present, program, ("loss",), [], [])
    session.agree(replay, [2 * present[0]], present, sure=False)
    assert not program.checked  # a later call is compared
    assert not session.causes
    session.agree(replay, present, present, sure=False)
    assert program.checked


def test_a_solve_that_hides_an_error_is_no_mismatch():
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(60, 60, dtype=D, generator=generator))
    A = (Q * torch.logspace(0, -1, 60, dtype=D)) @ Q.T
    t, c = (torch.randn(60, dtype=D, generator=generator) for _ in range(2))
    units = torch.logspace(0, -4, 60, dtype=D)[torch.randperm(60, generator=generator)]
    inner = lambda w, t: (w * units) @ (A @ (w * units)) / 2 - w @ (units * t)
    step = hypergrad.compile(hypergrad.implicit_grad, on_fallback="raise")
    for _ in range(2):
        with pytest.warns(hypergrad.ConvergenceWarning, match="units that hide an error"):
            step(
                lambda w, t: (c * units) @ w,
                inner,
                torch.linalg.solve(A, t) / units,
                t,
                solver=hypergrad.CG(rtol=1e-2),
            )
