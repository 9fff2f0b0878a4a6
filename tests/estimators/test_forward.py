"""Forward mode: the derivative of the steps, in memory that is flat in their number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import hypergrad
from benchmarks.allocator import peak_bytes
from tests.problems import F64, data, equilibrium, per_feature_ridge, relative_error

RIDGE = per_feature_ridge()


def by_func(w: Any, h: Any) -> Any:
    g = grad(RIDGE.inner)(w, h)
    return {k: w[k] - 0.01 * g[k] for k in w}


def by_autograd(w: Any, h: Any) -> Any:
    g = torch.autograd.grad(RIDGE.inner(w, h), list(w.values()), create_graph=True)
    return {k: w[k] - 0.01 * part for k, part in zip(w, g, strict=True)}


def start(h: Any = None) -> Any:
    return {"weight": torch.zeros(4, dtype=F64), "bias": torch.zeros((), dtype=F64)}


def differentiated(step: Any, init: Any, h: Any, steps: int, kept: int | None = None) -> Any:
    """The derivative by torch.func alone; only the last `kept` steps see the hyperparameters."""

    def value(h: Any, fixed: Any) -> Tensor:
        first = steps if kept is None else min(kept, steps)
        w = init(h if first == steps else fixed)
        for k in range(steps):
            w = step(w, h if k >= steps - first else fixed)
        return RIDGE.outer(w, h)

    return grad(value)(h, h)


@pytest.mark.parametrize("step", [by_func, by_autograd])
@pytest.mark.parametrize("kept", [None, 0, 3])
def test_forward_mode_is_the_derivative_of_the_steps(step, kept):
    hypergradient, params = hypergrad.unrolled_grad(
        RIDGE.outer,
        step,
        start(),
        RIDGE.hparams,
        steps=12,
        truncate=kept,
        mode="forward",
        return_params=True,
    )
    expected = differentiated(by_func, start, RIDGE.hparams, 12, kept)
    if kept == 0:
        assert not hypergradient["log_penalty"].any()  # the outer loss has no direct term
    else:
        assert relative_error(hypergradient, expected) < 1e-12
    w = start()
    for _ in range(12):
        w = by_func(w, RIDGE.hparams)
    torch.testing.assert_close(params, w, rtol=1e-12, atol=0)


def test_in_forward_mode_an_init_that_is_a_function_carries_its_derivative():
    def init(h: Any) -> Any:
        return {"weight": h["log_penalty"].sin(), "bias": h["log_penalty"].sum()}

    for steps in (0, 1, 5):
        hypergradient = hypergrad.unrolled_grad(
            RIDGE.outer, by_func, init, RIDGE.hparams, steps=steps, mode="forward"
        )
        assert (
            relative_error(hypergradient, differentiated(by_func, init, RIDGE.hparams, steps))
            < 1e-12
        )


def test_forward_mode_passes_the_number_of_a_step():
    rates = 0.01 / torch.arange(1.0, 9, dtype=F64)

    def step(w: Any, h: Any, k: int) -> Any:
        g = grad(RIDGE.inner)(w, h)
        return {name: w[name] - rates[k] * g[name] for name in w}

    given = (RIDGE.outer, step, start(), RIDGE.hparams)
    forward = hypergrad.unrolled_grad(*given, steps=8, mode="forward")

    def value(h: Any) -> Tensor:
        w = start()
        for k in range(8):
            w = step(w, h, k)
        return RIDGE.outer(w, h)

    assert relative_error(forward, grad(value)(RIDGE.hparams)) < 1e-12


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_many_steps_lead_to_the_hypergradient_of_the_solution(mode):
    problem = equilibrium()
    hypergradient = hypergrad.unrolled_grad(
        problem.outer,
        problem.inner,
        torch.zeros(3, 4, dtype=F64),
        problem.hparams,
        steps=120,
        mode=mode,
    )
    assert relative_error(hypergradient, problem.hypergradient(problem.hparams)) < 1e-10


def test_forward_mode_goes_through_layer_norm_and_a_learnt_rate():
    """It takes a second derivative of the step, which PyTorch has wrong for vmapped norm layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = data(1, 12, 3, dtype=F64), torch.arange(12) % 2
    w0 = {k: v.detach() for k, v in net.named_parameters()}

    def loss(w: Any) -> Tensor:
        return nn.functional.cross_entropy(functional_call(net, w, (x,)), y)

    def step(w: Any, h: Tensor) -> Any:
        g = grad(loss)(w)
        return {k: w[k] - h.exp() * g[k] for k in w}

    h = torch.tensor(-1.0, dtype=F64)
    hypergradient = hypergrad.unrolled_grad(
        lambda w, h: loss(w), step, w0, h, steps=6, mode="forward"
    )

    def value(h: float) -> float:
        w = w0
        for _ in range(6):
            w = step(w, torch.tensor(h, dtype=F64))
        return loss(w).item()

    expected = (value(-1 + 1e-5) - value(-1 - 1e-5)) / 2e-5
    assert hypergradient.item() == pytest.approx(expected, rel=1e-7)


def test_forward_mode_under_vmap_is_the_loop_over_tasks():
    c, theta = data(3, 4, 3, dtype=F64), data(4, 3, dtype=F64)

    def task(c: Tensor) -> Tensor:
        return hypergrad.unrolled_grad(
            lambda w, theta: (w * w.cos()).sum() + theta.sum(),
            lambda w, theta: w - 0.3 * (w - c * theta.sin()),
            lambda theta: 2 * theta,
            theta,
            steps=5,
            mode="forward",
        )

    torch.testing.assert_close(vmap(task)(c), torch.stack([task(row) for row in c]))


def test_forward_mode_draws_the_random_numbers_of_reverse_mode():
    def step(w: Tensor, theta: Tensor) -> Tensor:
        return w - 0.3 * (w - theta) * torch.rand(2, dtype=F64)

    found = []
    for mode in ("reverse", "forward"):
        torch.manual_seed(0)
        grads = hypergrad.unrolled_grad(
            lambda w, theta: w.square().sum() + torch.rand((), dtype=F64) * theta.sum(),
            step,
            torch.ones(2, dtype=F64),
            torch.tensor([2.0, 3.0], dtype=F64),
            steps=9,
            mode=mode,
        )
        found.append((grads, torch.rand(3)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def test_forward_mode_has_no_checkpoints():
    with pytest.raises(ValueError, match="stores no steps"):
        hypergrad.unrolled_grad(
            RIDGE.outer, by_func, start(), RIDGE.hparams, steps=1, mode="forward", checkpoint=True
        )
    with pytest.raises(hypergrad.UnsupportedOperation, match="'reverse' or 'forward'"):
        hypergrad.unrolled_grad(RIDGE.outer, by_func, start(), RIDGE.hparams, steps=1, mode="both")


# Memory


X, Y = data(5, 60, 50, dtype=F64), data(6, 60, dtype=F64)


def descend(w: Tensor, h: Tensor) -> Tensor:
    return w - 0.01 * (X.T @ (X @ w - Y) / 60 + h.exp() * w)


def test_memory_of_forward_mode_is_flat_in_the_steps():
    h = torch.zeros(2, dtype=F64)
    step = lambda w, h: descend(w, h.sum().expand(50))
    peaks = []
    for steps in (10, 100):
        call = lambda steps=steps: hypergrad.unrolled_grad(
            lambda w, h: w @ w, step, X[0] * 0, h, steps=steps, mode="forward"
        )
        call()
        peaks.append(peak_bytes(call))
    assert peaks[1] < 1.1 * peaks[0]


# Numbers that are not finite


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"mode": "forward"}], ids=repr)
def test_steps_that_diverge_are_an_error_that_names_the_inner_variable(options):
    w, h = torch.ones(2), torch.tensor(1.0)
    given = (lambda w, h: w["w"].sum(), lambda w, h: {"w": w["w"] ** 2 * (3 + h)}, {"w": w}, h)
    with pytest.raises(hypergrad.NotFinite, match=r"params\['w'\] holds NaN.*smaller"):
        hypergrad.unrolled_grad(*given, steps=20, **options)
    left = hypergrad.unrolled_grad(*given, steps=20, on_failure="ignore", **options)
    assert not left.isfinite()


def test_a_batch_says_how_many_of_its_tasks_diverge():
    def task(c: Tensor) -> Tensor:
        return hypergrad.unrolled_grad(
            lambda w, h: w, lambda w, h: w * w * h, c, torch.tensor(1.0), steps=9
        )

    with pytest.raises(hypergrad.NotFinite, match="1 of 3 tasks: params"):
        vmap(task)(torch.tensor([0.5, 0.9, 2.0]))
