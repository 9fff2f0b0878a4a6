"""Nothing that a module holds is changed by a call, and no answer drifts from call to call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import hypergrad
from hypergrad import UnsupportedOperation, implicit_grad
from hypergrad._autograd.guard import Guard
from tests.stateful_modules import (
    X_VAL,
    Counts,
    MovingAverage,
    State,
    X,
    answer,
    by_hand,
    losses,
    randn,
)

D = torch.float64


class Lazy(nn.Module):
    """Makes a buffer and an attribute when it is first called."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1, dtype=D)

    def forward(self, x):
        if "scale" not in self._buffers:
            self.register_buffer("scale", x.std(0), persistent=False)
            self.table = x.mean(0)
        return self.linear((x - self.table) / self.scale)


class Meddling(nn.Module):
    """Changes what its part holds, not its own."""

    def __init__(self):
        super().__init__()
        self.part = MovingAverage("in place")

    def forward(self, x):
        self.part.mean = self.part.mean + 1
        self.part.training = False
        self.part.temperature = 2.0
        y = self.part(x)
        self.part.mean = self.part.mean + 1
        return y


class Cached(nn.Module):
    """Leaves what it computed where a loss may read it."""

    def __init__(self):
        super().__init__()
        self.linear, self.penalty = nn.Linear(3, 1, dtype=D), torch.zeros((), dtype=D)

    def forward(self, x):
        self.penalty = (self.linear.weight**2).sum()
        return self.linear(x)


NETS = {
    "counters": Counts,
    "moving average": lambda: MovingAverage("in place"),
    "new buffer": lambda: MovingAverage("new"),
    "data of a buffer": lambda: MovingAverage("data"),
    "out=": lambda: MovingAverage("out"),
    "tensor attribute": lambda: MovingAverage("attribute"),
    "lazy": Lazy,
    "part": Meddling,
    "cache": Cached,
    "nested": lambda: nn.Sequential(nn.Sequential(MovingAverage("new")), nn.Tanh()),
}


@pytest.mark.parametrize("kind", NETS)
def test_row_50_what_modules_hold_is_as_before_and_answers_do_not_drift(kind):
    net = NETS[kind]()
    before = State(net)
    first, second = answer(net), answer(net)
    before.assert_same()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, by_hand_from_the_start(net), rtol=1e-8, atol=1e-12)


class LazyLater(Lazy):
    """A linear layer, which makes a buffer and an attribute once it is told to."""

    told = False

    def forward(self, x):
        return super().forward(x) if self.told else self.linear(x)


@pytest.mark.parametrize("kind", NETS)
def test_a_guard_that_is_entered_again_finds_every_module_as_it_was(kind):
    net, guard = NETS[kind](), Guard()
    before = State(net)
    for x in (X, X_VAL, X):
        expected = copy.deepcopy(net)(x)
        with guard:
            found = net(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        before.assert_same()


def test_a_guard_that_is_entered_again_sees_a_module_that_has_a_state_by_then(monkeypatch):
    net, guard = nn.Sequential(LazyLater(), nn.Tanh()), Guard()
    before = State(net)
    for told in (False, True, True, False):
        monkeypatch.setattr(LazyLater, "told", told)
        expected = copy.deepcopy(net)(X)
        with guard:
            found = net(X)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        before.assert_same()


def by_hand_from_the_start(net):
    """By hand, every loss on a fresh copy of the network's state."""

    def call(p, x):
        return functional_call(copy.deepcopy(net), p, (x,))

    return by_hand(net, call)


@pytest.mark.parametrize("kind", NETS)
def test_row_50_the_state_is_put_back_after_an_exception(kind):
    net = NETS[kind]()
    before = State(net)

    def call(p, x):
        functional_call(net, p, (x,))
        net_fails = nn.Sequential(net, Fails())
        return functional_call(net_fails, {f"0.{k}": v for k, v in p.items()}, (x,))

    with pytest.raises(ZeroDivisionError):
        answer(net, call)
    before.assert_same()


class Fails(nn.Module):
    def forward(self, x):
        raise ZeroDivisionError


def test_row_50_a_call_in_one_evaluation_sees_what_the_one_before_has_left():
    net = MovingAverage("in place")
    seen = []

    def call(p, x):
        y = functional_call(net, p, (x,)) + functional_call(net, p, (x,))
        seen.append(net.mean.clone())
        return y

    answer(net, call)
    expected = torch.ones(3, dtype=D)
    for _ in range(2):
        expected = 0.9 * expected + 0.1 * X_VAL.mean(0)
    torch.testing.assert_close(seen[0], expected)
    assert torch.equal(net.mean, torch.ones(3, dtype=D))


def test_row_50_a_loss_reads_what_a_module_has_left():
    net = Cached()

    def inner(p, h):
        y = functional_call(net, p, (X,))
        return (
            y.square().mean() - y.mean() + h.exp() * (net.penalty + p["linear.bias"].square().sum())
        )

    def written(p, h):
        y = X @ p["linear.weight"].T + p["linear.bias"]
        return y.square().mean() - y.mean() + h.exp() * sum((q**2).sum() for q in p.values())

    params, h = {k: v.detach() for k, v in net.named_parameters()}, torch.tensor(0.0, dtype=D)
    outer = lambda p, h: (X_VAL @ p["linear.weight"].T).square().mean()
    hypergradient = implicit_grad(outer, inner, params, h, inner_tol=None)
    torch.testing.assert_close(
        hypergradient, implicit_grad(outer, written, params, h, inner_tol=None)
    )


def test_row_50_a_backward_of_the_callers_own_still_finds_its_buffers():
    net = MovingAverage("in place")
    scaled = (net.linear.weight * net.mean).sum()  # saves the buffer
    answer(net)
    scaled.backward()
    assert torch.equal(net.linear.weight.grad, torch.ones(1, 3, dtype=D))


@pytest.mark.parametrize("given", ["buffers of the caller's", "fresh copies"])
def test_row_50_buffers_given_to_functional_call(given):
    net = MovingAverage("in place")
    own = {k: v.clone() + 1 for k, v in net.named_buffers()}
    before, kept = State(net), {k: (v, v.clone(), v._version) for k, v in own.items()}
    aux = []

    def call(p, x):
        buffers = own if given != "fresh copies" else {k: v.clone() for k, v in own.items()}
        y = functional_call(net, (p, buffers), (x,))
        aux.append(buffers["mean"])
        return y

    first = answer(net, call)
    torch.testing.assert_close(answer(net, call), first, rtol=0, atol=0)
    before.assert_same()
    for tensor, values, version in kept.values():
        assert torch.equal(tensor, values)
        assert tensor._version == version
    if given == "fresh copies":  # which are the loss's own: it finds them updated
        torch.testing.assert_close(aux[0], 0.9 * own["mean"] + 0.1 * X_VAL.mean(0))


# Norm layers in train mode


def normed():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()


COPIES = {
    "clone": lambda b: {k: v.clone() for k, v in b.items()},
    "detach, clone": lambda b: {k: v.detach().clone() for k, v in b.items()},
    "zeros": lambda b: {k: torch.zeros_like(v) for k, v in b.items()},
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
def test_row_50_batch_norm_in_train_mode_with_fresh_copies_of_its_buffers(how):
    net = normed()
    buffers = dict(net.named_buffers())
    before = State(net)

    def call(p, x):
        return functional_call(net, (p, COPIES[how](buffers)), (x,))

    found = answer(net, call)
    before.assert_same()
    torch.testing.assert_close(found, by_hand(net, call), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("how", ["its own", "the caller's dict", "views", "detached"])
def test_row_50_batch_norm_in_train_mode_with_buffers_of_the_callers_is_refused(how):
    net = normed()
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    before, kept = State(net), {k: v.clone() for k, v in buffers.items()}
    make = {
        "its own": dict,
        "the caller's dict": lambda: buffers,
        "views": lambda: {k: v.view_as(v) for k, v in buffers.items()},
        "detached": lambda: {k: v.detach() for k, v in buffers.items()},
    }[how]

    def call(p, x):
        return functional_call(net, (p, make()), (x,))

    with pytest.raises(UnsupportedOperation, match=r"running statistics.*eval\(\)"):
        answer(net, call)
    before.assert_same()
    assert all(torch.equal(buffers[k], kept[k]) for k in kept)


def test_row_50_instance_norm_in_train_mode():
    net = nn.Sequential(
        nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten(), nn.Linear(6, 1)
    )
    net, x = net.double(), randn(4, 3, 2)
    before = State(net)
    params = {k: v.detach() for k, v in net.named_parameters()}
    h = torch.tensor(0.0, dtype=D)

    def inner(p, h):
        return (
            functional_call(net, p, (x,)).square().mean()
            + h.exp() * (p["2.weight"] ** 2).sum()
            + (p["2.bias"] - 1).square().sum()
        )

    with pytest.raises(UnsupportedOperation, match="running statistics"):
        implicit_grad(lambda p, h: p["2.weight"].sum(), inner, params, h)
    before.assert_same()


def test_row_50_an_ensemble_of_modules_whose_states_are_stacked_in_the_loss():
    nets = [normed() for _ in range(3)]
    before = [State(net) for net in nets]
    params = {k: v.detach() for k, v in stack_module_state(nets)[0].items()}

    def one(p, b, x):
        return functional_call(nets[0], (p, b), (x,))

    def call(p, x):
        buffers = stack_module_state(nets)[1]
        return vmap(one, in_dims=(0, 0, None))(p, buffers, x)

    def inner(p, h):
        return (call(p, X) - 1).square().mean() + h.exp() * sum((q**2).sum() for q in p.values())

    def outer(p, h):
        return (call(p, X_VAL) - 1).square().mean()

    h = torch.tensor(0.0, dtype=D)
    hypergradient = implicit_grad(outer, inner, params, h, inner_tol=None, on_failure="ignore")
    again = implicit_grad(outer, inner, params, h, inner_tol=None, on_failure="ignore")
    torch.testing.assert_close(hypergradient, again, rtol=0, atol=0)
    for state in before:
        state.assert_same()


# Everywhere that a user's function is recorded


def everywhere(net):
    """Calls of every part of the library that evaluate a loss of this network."""
    outer, inner = losses(net)
    total = lambda p, h: sum(q.sum() for q in p.values())
    params = {k: v.detach() for k, v in net.named_parameters()}
    h = torch.tensor(-1.0, dtype=D)

    def step(p, h):
        found = torch.autograd.grad(inner(p, h), list(p.values()), create_graph=True)
        return {k: v - 0.05 * g for (k, v), g in zip(p.items(), found, strict=True)}

    fit = hypergrad.custom_argmin(inner, inner_tol=None, on_failure="ignore")(lambda p, h: p)

    def decorated():
        lam = h.clone().requires_grad_()
        total(fit(params, lam), lam).backward()

    def bilevel():
        p = {k: v.clone().requires_grad_() for k, v in params.items()}
        lam = h.clone().requires_grad_()
        hypergrad.Bilevel(
            outer,
            inner,
            p,
            lam,
            inner_optimizer=torch.optim.SGD(p.values(), lr=0.05),
            outer_optimizer=torch.optim.SGD([lam], lr=0.05),
        ).step()

    return {
        "implicit_grad": lambda: answer(net),
        "decorator": decorated,
        "unrolled": lambda: hypergrad.unrolled_grad(outer, step, params, h, steps=2),
        "truncated": lambda: hypergrad.unrolled_grad(
            outer, step, params, h, steps=3, truncate=1, checkpoint=True
        ),
        "forward": lambda: hypergrad.unrolled_grad(outer, step, params, h, steps=2, mode="forward"),
        "one step": lambda: hypergrad.one_step_grad(outer, step, params, h),
        "evolution": lambda: hypergrad.evolution_strategies_grad(
            outer, step, params, h, steps=1, pairs=2, on_failure="ignore", batching="loop"
        ),
        "bilevel": bilevel,
        "inner solver": lambda: hypergrad.inner_solvers.LBFGS(maxiter=3)(inner, params, h),
        "fixed steps": lambda: hypergrad.inner_solvers.GradientDescent(0.01, maxiter=3, tol=0)(
            inner, params, h
        ),
        "newton": lambda: hypergrad.inner_solvers.NewtonCG(maxiter=2)(inner, params, h),
        "check": lambda: hypergrad.check_hypergrad(outer, inner, lambda h: params, h),
    }


@pytest.mark.filterwarnings("ignore::hypergrad.ConvergenceWarning")
@pytest.mark.parametrize("part", everywhere(Counts()))
@pytest.mark.parametrize("kind", ["counters", "new buffer", "lazy"])
def test_row_50_holds_wherever_a_loss_is_evaluated(part, kind):
    net = NETS[kind]()
    if part == "bilevel":
        before = {k: v.clone() for k, v in net.named_buffers()}
        everywhere(net)[part]()
        assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())
        return
    before = State(net)
    everywhere(net)[part]()
    before.assert_same()


@pytest.mark.parametrize("reentrant", [False])
def test_row_50_a_checkpointed_module_computes_again_and_changes_nothing(reentrant):
    net = Counts()
    before = State(net)

    def call(p, x):
        def block(x):
            return functional_call(net, p, (x,))

        return checkpoint(block, x, use_reentrant=reentrant)

    found = answer(net, call)
    before.assert_same()
    torch.testing.assert_close(found, by_hand_from_the_start(net), rtol=1e-8, atol=1e-12)


@pytest.mark.filterwarnings("error")
def test_a_compiled_module_is_silent():
    net = nn.Sequential(nn.Linear(3, 1, dtype=D), nn.Tanh())
    compiled = torch.compile(net, backend="eager")

    def call(p, x):
        return functional_call(compiled, {f"_orig_mod.{k}": v for k, v in p.items()}, (x,))

    torch.testing.assert_close(answer(net, call), by_hand(net), rtol=1e-8, atol=1e-12)
