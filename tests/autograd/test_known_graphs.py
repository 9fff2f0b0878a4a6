"""Losses without their guard: the same steps, and a guard again wherever anything is new."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import hypergrad
from hypergrad import FSLA, MASOBA, SABA, SOBA, SRBA, AmIGO, Bilevel, StocBiO
from hypergrad._autograd.guard import Guard
from tests.bilevel_quadratic import F64, Quadratic, loop, run, sgd


class Counted:
    """How many guards have been entered."""

    def __init__(self, monkeypatch):
        self.count = 0
        enter = Guard.__enter__

        def entered(guard):
            self.count += 1
            return enter(guard)

        monkeypatch.setattr(Guard, "__enter__", entered)


@pytest.fixture
def guards(monkeypatch):
    return Counted(monkeypatch)


def changing(first, later, *, at=4, method=None, outer=None):
    """A loop whose inner loss is another function from a step on."""
    where = {}

    def inner(w, h):
        return (later if where["loop"].steps >= at else first)(w, h)

    where["loop"] = Bilevel(
        outer or (lambda w, h: ((w - 1) ** 2).sum()),
        inner,
        torch.zeros(3),
        torch.zeros(3),
        inner_optimizer=sgd(0.1),
        outer_optimizer=sgd(0.1),
        method=method or SOBA(),
    )
    return where["loop"]


def plain(w, h):
    return ((w - h) ** 2).sum() + (w**2).sum() / 2


@pytest.mark.parametrize(
    "method",
    [SOBA(), MASOBA(), SABA(), SRBA(), FSLA(), AmIGO(2, 2), StocBiO(2, 2), hypergrad.F2SA()],
    ids=lambda m: type(m).__name__,
)
def test_the_steps_are_those_under_the_guard_bit_for_bit(method, guards):
    problem = Quadratic()
    quick = loop(problem, method, batches=True, inner_lr=0.1, outer_lr=0.05)
    slow = loop(problem, method, batches=True, inner_lr=0.1, outer_lr=0.05)
    of = slow._levels.derivatives
    of._of_outer.open = of._of_inner.open = of._of_params.open = False
    records = []
    for bilevel in (quick, slow):
        problem.seen.clear()
        guards.count = 0
        run(bilevel, 3)
        first, guards.count = guards.count, 0
        records.append([bilevel.step() for _ in range(5)])
        if bilevel is quick:
            seen, of_quick = list(problem.seen), (first, guards.count)
    assert of_quick[0] > 0 == of_quick[1]
    assert guards.count > 5
    assert [id(b) for b in seen] == [
        id(b) for b in problem.seen
    ]  # and no loss is called more often
    assert quick.params.equal(slow.params)
    assert quick.hparams.equal(slow.hparams)
    for a, b in zip(*records, strict=True):
        assert a.grads.equal(b.grads)
        assert a.outer_value.equal(b.outer_value)
        assert a.inner_norm.equal(b.inner_norm)


def test_a_loss_that_comes_to_reach_a_variable_past_its_arguments_is_refused():
    where = {}
    bilevel = changing(plain, lambda w, h: plain(w, where["h"]))
    where["h"] = bilevel._levels.hparams.variables[0]
    run(bilevel, 4)
    with pytest.raises(hypergrad.NotConnected, match="hparams past its arguments"):
        bilevel.step()


def test_a_loss_that_comes_to_change_its_argument_in_place_is_refused():
    def overwrites(w, h):
        with torch.no_grad():
            h.detach().add_(1.0)
        return plain(w, h)

    bilevel = changing(plain, overwrites)
    run(bilevel, 4)
    with pytest.raises(hypergrad.UnsupportedOperation, match="changes hparams in place") as caught:
        bilevel.step()
    assert caught.value.leaf == "hparams"


def test_a_derivative_that_comes_to_be_lost_is_refused():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, cotangent):
            (x,) = ctx.saved_tensors
            return 3 * x**2 * cotangent

    bilevel = changing(plain, lambda w, h: plain(w, h) + Cube.apply(w).sum())
    run(bilevel, 4)
    with pytest.raises(hypergrad.UnsupportedOperation, match="once_differentiable"):
        bilevel.step()


class Counts(nn.Module):
    """Adds nothing to the graph, and counts in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


def test_a_loss_that_runs_a_module_keeps_its_guard_and_is_called_no_more_often():
    net, calls = Counts(), []

    def inner(w, h):
        calls.append(1)
        return plain(net(w), h)

    bilevel = changing(inner, inner)
    run(bilevel, 6)
    assert len(calls) == 6
    assert not bilevel._levels.derivatives._of_inner.open
    assert net.calls == 0


def test_a_module_that_comes_to_run_does_not_change():
    net = Counts()
    bilevel = changing(plain, lambda w, h: plain(net(w), h))
    twin = changing(plain, plain)
    run(bilevel, 8)
    run(twin, 8)
    assert net.calls == 0
    assert bilevel.hparams.equal(twin.hparams)


def test_a_module_that_a_loss_hides_behind_a_caught_exception_does_not_change():
    net = Counts()

    def hides(w, h):
        try:
            return plain(net(w), h)
        except Exception:
            return plain(w, h)

    bilevel = changing(plain, hides)
    run(bilevel, 8)
    assert net.calls == 0
    assert not bilevel._levels.derivatives._of_inner.open


def test_running_statistics_that_come_to_be_updated_are_refused():
    mean, x = torch.zeros(3), torch.randn(8, 3)

    def normed(training):
        def inner(w, h):
            y = functional.batch_norm(x * w, mean, torch.ones(3), training=training)
            return (y - h).square().mean() + (w**2).sum()

        return inner

    bilevel = changing(normed(False), normed(True))
    run(bilevel, 4)
    with pytest.raises(hypergrad.UnsupportedOperation, match="running statistics"):
        bilevel.step()
    assert mean.equal(torch.zeros(3))


def test_a_loss_with_random_numbers_keeps_its_guard():
    bilevel = changing(*[lambda w, h: plain(functional.dropout(w), h)] * 2)
    run(bilevel, 3)
    assert not bilevel._levels.derivatives._of_inner.open
    assert bilevel._levels.derivatives._of_outer.open


def test_every_branch_of_a_loss_is_learnt(guards):
    calls = []

    def doubled(w, h):
        calls.append(1)
        value = plain(w, h) * (1.0 if bilevel.steps % 3 else 2.0)
        return value + (w.sum() if bilevel.steps % 2 else 0)

    bilevel = changing(doubled, doubled)
    run(bilevel, 12)
    guards.count, called = 0, len(calls)
    run(bilevel, 12)
    assert guards.count == 0
    assert len(calls) == called + 12


def test_a_loss_with_another_graph_each_time_is_tried_a_few_times_alone():
    calls = []

    def grows(w, h):
        calls.append(1)
        for _ in range(len(calls)):
            h = h + 0
        return plain(w, h)

    bilevel = changing(grows, grows)
    run(bilevel, 12)
    assert not bilevel._levels.derivatives._of_inner.open
    assert len(calls) <= 12 + 4


def test_a_mode_around_the_step_sees_the_operations_of_a_loss_under_the_guard(guards):
    bilevel = changing(plain, plain)
    run(bilevel, 3)
    guards.count = 0
    bilevel.step()
    assert guards.count == 0
    with torch.device("cpu"):  # a mode, which may change what a loss makes
        bilevel.step()
    assert guards.count > 0


def test_the_error_of_a_loss_without_its_guard_has_the_same_advice():
    wrong = torch.randn(3, dtype=F64)
    bilevel = changing(plain, lambda w, h: plain(w, h) + (w @ wrong))
    run(bilevel, 4)
    with pytest.raises(hypergrad.StructureMismatch, match="several dtypes"):
        bilevel.step()
