"""Plain gradient descent: the steps of torch.optim.SGD, and whatever is more is left to it."""

from __future__ import annotations

import pytest
import torch
from torch.optim import optimizer as optimizers

from hypergrad import SOBA
from hypergrad._autograd.plain_steps import descend, plain_rate
from tests.bilevel_quadratic import Quadratic, loop, run, sgd


def made(*, count=2, **options):
    variables = [torch.randn(3, requires_grad=True) for _ in range(count)]
    return torch.optim.SGD(variables, **{"lr": 0.1, **options}), variables


def test_a_step_is_that_of_sgd_bit_for_bit():
    optimiser, variables = made(lr=0.3)
    twins = [v.detach().clone().requires_grad_() for v in variables]
    gradients = [torch.randn(3) for _ in variables]
    for twin, gradient in zip(twins, gradients, strict=True):
        twin.grad = gradient.clone()
    torch.optim.SGD(twins, lr=0.3).step()
    rate = plain_rate(optimiser, variables)
    assert rate == 0.3
    before = [v._version for v in variables]
    assert descend(variables, gradients, rate)
    assert all(a.equal(b) for a, b in zip(variables, twins, strict=True))
    assert [v._version for v in variables] == [v + 1 for v in before]
    assert all(v.grad is None for v in variables)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"foreach": True},
        {"fused": True},
        {"differentiable": True},
        {"lr": torch.tensor(0.1)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_more_than_plain_descent_has_no_plain_rate(options):
    optimiser, variables = made(**options)
    assert plain_rate(optimiser, variables) is None


def test_an_optimiser_whose_steps_are_followed_has_no_plain_rate(monkeypatch):
    optimiser, variables = made()
    assert plain_rate(optimiser, variables) == 0.1
    for register in (
        optimiser.register_step_pre_hook,
        optimiser.register_step_post_hook,
        optimizers.register_optimizer_step_pre_hook,
        optimizers.register_optimizer_step_post_hook,
    ):
        handle = register(lambda *args: None)
        assert plain_rate(optimiser, variables) is None
        handle.remove()
    assert plain_rate(optimiser, variables) == 0.1
    torch.optim.lr_scheduler.StepLR(optimiser, 1)  # which counts steps
    assert plain_rate(optimiser, variables) is None
    other, variables = made()
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, closure=None: None)
    assert plain_rate(other, variables) is None


def test_optimisers_of_other_tensors_or_kinds_have_no_plain_rate():
    class Own(torch.optim.SGD):
        pass

    optimiser, variables = made()
    assert plain_rate(optimiser, variables[:1]) is None
    assert plain_rate(optimiser, variables[::-1]) is None
    assert plain_rate(Own(variables, lr=0.1), variables) is None
    assert plain_rate(torch.optim.Adam(variables, lr=0.1), variables) is None
    optimiser.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    assert plain_rate(optimiser, variables) is None


def test_gradients_of_another_shape_or_dtype_are_left_to_the_optimiser():
    _, variables = made(count=1)
    before = variables[0].detach().clone()
    assert not descend(variables, [torch.ones(())], 0.1)
    assert not descend(variables, [torch.ones(3, dtype=torch.float64)], 0.1)
    assert variables[0].equal(before)


def test_a_loop_follows_a_scheduler_and_hooks_as_ever(recwarn):
    problem, seen = Quadratic(), []
    runs = [loop(problem, SOBA(), inner_lr=0.2, outer_lr=0.1) for _ in range(2)]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(runs[0].outer_optimizer, 0.5)
    runs[0].inner_optimizer.register_step_post_hook(lambda *args: seen.append(1))
    for k in range(4):
        run(runs[0], 1)
        scheduler.step()  # warns if the optimiser seems to have made no step
        runs[1].outer_optimizer.param_groups[0]["lr"] = 0.1 * 0.5**k
        run(runs[1], 1)
    assert len(seen) == 4
    torch.testing.assert_close(runs[0].hparams, runs[1].hparams, rtol=1e-12, atol=0)
    assert not recwarn.list


def test_a_loop_with_plain_rates_is_that_with_a_momentum_of_nothing():
    """A hook that does nothing takes the way through torch.optim."""
    problem = Quadratic()
    plain = loop(problem, SOBA(), inner_optimizer=sgd(0.2), outer_optimizer=sgd(0.1))
    whole = loop(problem, SOBA(), inner_optimizer=sgd(0.2), outer_optimizer=sgd(0.1))
    for optimiser in (whole.inner_optimizer, whole.outer_optimizer):
        optimiser.register_step_pre_hook(lambda *args: None)
    run(plain, 5)
    run(whole, 5)
    assert plain.params.equal(whole.params)
    assert plain.hparams.equal(whole.hparams)
