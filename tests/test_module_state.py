"""Nothing that a module holds is changed by a call, and no answer drifts from call to call."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import hypergrad
from hypergrad import CG, UnsupportedOperation, implicit_grad

D = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


X, X_VAL = randn(8, 3), randn(8, 3, seed=1)


def losses(net, call=None):
    """A small ridge problem on a network's outputs."""
    call = call or (lambda p, x: functional_call(net, p, (x,)))

    def inner(p, h):
        return (call(p, X) - 1).square().mean() + h.exp() * sum((q**2).sum() for q in p.values())

    def outer(p, h):
        return (call(p, X_VAL) - 1).square().mean()

    return outer, inner


def answer(net, call=None, **options):
    outer, inner = losses(net, call)
    params = {k: v.detach() for k, v in net.named_parameters()}
    h = torch.tensor(-1.0, dtype=D)
    return implicit_grad(outer, inner, params, h, inner_tol=None, on_failure="ignore", **options)


def by_hand(net, call=None):
    """The same by the dense Hessian, the network a function without a state."""
    outer, inner = losses(net, call)
    names = [k for k, _ in net.named_parameters()]
    shapes = [v.shape for _, v in net.named_parameters()]
    sizes = [v.numel() for _, v in net.named_parameters()]
    flat = torch.cat([v.detach().reshape(-1) for _, v in net.named_parameters()])
    h = torch.tensor(-1.0, dtype=D)

    def tree(w):
        parts = zip(names, torch.split(w, sizes), shapes, strict=True)
        return {k: part.reshape(shape) for k, part, shape in parts}

    w = flat.requires_grad_()
    lam = h.clone().requires_grad_()
    (g,) = torch.autograd.grad(inner(tree(w), lam), w, create_graph=True)
    rows = [torch.autograd.grad(g[i], (w, lam), retain_graph=True) for i in range(len(w))]
    A = torch.stack([row[0] for row in rows])
    cross = torch.stack([row[1] for row in rows])
    b, direct = torch.autograd.grad(outer(tree(w), lam), (w, lam), allow_unused=True)
    assert direct is None
    return -(torch.linalg.solve(A, b) @ cross)


class State:
    """What a network's modules hold, to the bit, the identity of every tensor and its version."""

    def __init__(self, net):
        self.net = net
        self.attributes = {n: dict(m.__dict__) for n, m in net.named_modules()}
        self.slots = {n: dict(m._buffers) for n, m in net.named_modules()}
        self.tensors = [
            (t, t.clone(), t._version)
            for m in net.modules()
            for t in [*m._buffers.values(), *m.__dict__.values(), *m._parameters.values()]
            if isinstance(t, torch.Tensor)
        ]

    def assert_same(self):
        for name, module in self.net.named_modules():
            assert module.__dict__.keys() == self.attributes[name].keys()
            assert all(module.__dict__[k] is v for k, v in self.attributes[name].items())
            assert module._buffers.keys() == self.slots[name].keys()
            assert all(module._buffers[k] is v for k, v in self.slots[name].items())
        for tensor, values, version in self.tensors:
            assert torch.equal(tensor.detach(), values.detach())
            assert tensor._version == version


class Counts(nn.Module):
    """A linear layer that counts its calls, as buffers and as a number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1, dtype=D)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long), persistent=False)
        self.number = 0

    def forward(self, x):
        self.calls += 1
        self.seen = self.seen + len(x)
        self.number += 1
        return self.linear(x)


class MovingAverage(nn.Module):
    """Centres by a moving average that every call updates, in place or by a new buffer."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(3, 1, dtype=D), how
        if how == "attribute":
            self.mean = torch.ones(3, dtype=D)
        else:
            self.register_buffer("mean", torch.ones(3, dtype=D))

    def forward(self, x):
        if self.how == "new":
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        elif self.how == "data":
            self.mean.data = 0.9 * self.mean + 0.1 * x.mean(0)
        elif self.how == "out":
            torch.add(0.9 * self.mean, x.mean(0), alpha=0.1, out=self.mean)
        else:
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.linear(x * (1 + self.mean))


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
    found = implicit_grad(outer, inner, params, h, inner_tol=None)
    torch.testing.assert_close(found, implicit_grad(outer, written, params, h, inner_tol=None))


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
    found = implicit_grad(outer, inner, params, h, inner_tol=None, on_failure="ignore")
    again = implicit_grad(outer, inner, params, h, inner_tol=None, on_failure="ignore")
    torch.testing.assert_close(found, again, rtol=0, atol=0)
    for state in before:
        state.assert_same()


# Spectral norm


def spectral(old=False):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (nn.utils.spectral_norm if old else parametrizations.spectral_norm)(net[0])
    return net


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("solver", [None, CG(maxiter=5)])
def test_row_50_spectral_norm_in_train_mode_is_refused_by_name_and_left_alone(old, solver):
    net = spectral(old)
    before = State(net)
    with pytest.raises(UnsupportedOperation, match=r"0.*spectral_norm in train mode.*module\.eval"):
        answer(net, solver=solver)
    before.assert_same()


@pytest.mark.parametrize("old", [False, True])
def test_row_50_spectral_norm_in_eval_mode_is_right(old):
    net = spectral(old)
    for _ in range(50):
        net(X)
    net.eval()
    before = State(net)
    found = answer(net)
    before.assert_same()
    torch.testing.assert_close(found, by_hand(net), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("old", [False, True])
def test_row_50_spectral_norm_in_the_outer_loss_has_its_first_derivative(old):
    net = spectral(old)
    for _ in range(50):
        net(X)
    before = State(net)
    params = {k: v.detach() for k, v in net.named_parameters()}
    inner = lambda p, h: sum((q - h).square().sum() for q in p.values())
    outer = lambda p, h: functional_call(net, p, (X,)).square().mean()
    h = torch.tensor(0.5, dtype=D)
    found = implicit_grad(outer, inner, params, h, inner_tol=None)
    before.assert_same()
    net.eval()
    expected = implicit_grad(outer, inner, params, h, inner_tol=None)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


def test_row_50_spectral_norm_of_a_vector_is_a_mere_quotient():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(randn(3))
            parametrizations.spectral_norm(self)

        def forward(self, x):
            return x @ self.weight

    net = Net()
    torch.testing.assert_close(answer(net), by_hand(net), rtol=1e-7, atol=1e-12)


def test_row_50_spectral_norm_in_a_step_that_takes_a_gradient():
    net = spectral()
    before = State(net)
    params = {k: v.detach() for k, v in net.named_parameters()}

    def loss(p, h):
        return (functional_call(net, p, (X,)) - h).square().mean()

    def by_autograd(p, h):
        found = torch.autograd.grad(loss(p, h), list(p.values()), create_graph=True)
        return {k: v - 0.1 * g for (k, v), g in zip(p.items(), found, strict=True)}

    def by_func(p, h):
        found = torch.func.grad(loss)(p, h)
        return {k: v - 0.1 * found[k] for k, v in p.items()}

    for step in (by_autograd, by_func):
        with pytest.raises(UnsupportedOperation, match="spectral_norm"):
            hypergrad.unrolled_grad(
                lambda p, h: loss(p, 1.0), step, params, torch.tensor(0.0, dtype=D), steps=2
            )
        before.assert_same()


# What is changed in place


@pytest.mark.parametrize("bag", [False, True])
def test_row_50_an_embedding_with_max_norm_is_refused_before_it_moves(bag):
    kind = nn.EmbeddingBag if bag else nn.Embedding
    net = kind(5, 3, max_norm=0.5, dtype=D, **({"mode": "sum"} if bag else {}))
    ids = torch.tensor([[0, 1], [1, 4]])
    weight = {"weight": net.weight.detach()}
    kept, version = weight["weight"].clone(), weight["weight"]._version
    outer = lambda p, h: functional_call(net, p, (ids,)).square().sum()
    inner = lambda p, h: (p["weight"] - h).square().sum()
    with pytest.raises(UnsupportedOperation, match=r"max_norm=0\.5"):
        implicit_grad(outer, inner, weight, torch.tensor(0.1, dtype=D), inner_tol=None)
    assert torch.equal(weight["weight"], kept)
    assert weight["weight"]._version == version


def test_row_50_an_embedding_whose_rows_are_below_max_norm_is_right():
    net, ids = nn.Embedding(5, 3, max_norm=9.0, dtype=D), torch.tensor([0, 1, 1])
    free = nn.Embedding(5, 3, dtype=D)
    params = {"weight": net.weight.detach().clamp(-1, 1)}
    found = []
    for one in (net, free):
        outer = lambda p, h: functional_call(one, p, (ids,)).square().sum()  # noqa: B023
        inner = lambda p, h: (p["weight"] - h).square().sum()
        found.append(
            implicit_grad(outer, inner, params, torch.tensor(0.1, dtype=D), inner_tol=None)
        )
    torch.testing.assert_close(*found)


class Clamped(nn.Module):
    """Keeps its weight non-negative, by force."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(3, 1, dtype=D), how

    def forward(self, x):
        if self.how == "data":
            self.linear.weight.data.clamp_(min=0)
        else:
            with torch.no_grad():
                self.linear.weight.clamp_(min=0)
        return self.linear(x)


@pytest.mark.parametrize("how", ["data", "no_grad"])
def test_row_50_a_module_that_overwrites_its_weight_is_refused_before_it_moves(how):
    net = Clamped(how)
    before = State(net)
    params = {k: v.detach() for k, v in net.named_parameters()}
    outer, inner = losses(net)
    with pytest.raises(UnsupportedOperation, match=r"linear\.weight.*in place"):
        implicit_grad(outer, inner, params, torch.tensor(-1.0, dtype=D), inner_tol=None)
    before.assert_same()


@pytest.mark.parametrize("how", ["data", "no_grad", "out", "setitem"])
@pytest.mark.parametrize("which", ["params", "hparams"])
def test_row_50_an_argument_is_not_overwritten_either(how, which):
    w, h = randn(3), torch.tensor([0.5, 1.0, 2.0], dtype=D)
    kept, versions = (w.clone(), h.clone()), (w._version, h._version)

    def inner(w, h):
        target = w if which == "params" else h
        if how == "data":
            target.data.mul_(2.0)
        else:
            with torch.no_grad():
                if how == "out":
                    torch.mul(target, 2.0, out=target)
                elif how == "setitem":
                    target[0] = 1.0
                else:
                    target.add_(1.0)
        return ((w - h) ** 2).sum()

    with pytest.raises(UnsupportedOperation, match=f"A loss changes {which} in place"):
        implicit_grad(lambda w, h: w.sum(), inner, w, h, inner_tol=None)
    assert torch.equal(w, kept[0])
    assert torch.equal(h, kept[1])
    assert (w._version, h._version) == versions


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


def test_the_hooks_on_modules_are_there_for_an_evaluation_alone():
    hooks = nn.modules.module._global_forward_pre_hooks
    asked = nn.modules.module._has_any_global_hook
    there = []
    answer(Counts(), lambda p, x: there.append(len(hooks)) or (x @ p["linear.weight"].T))
    assert max(there) == 1
    assert not hooks
    assert nn.modules.module._has_any_global_hook is asked


# Threads


def test_row_57_one_module_in_eight_threads():
    net, wrong = MovingAverage("new"), []
    before = State(net)
    params = [{k: v.detach() * (1 + i / 10) for k, v in net.named_parameters()} for i in range(8)]
    outer, inner = losses(net)
    h = torch.tensor(-1.0, dtype=D)

    def one(i):
        return implicit_grad(outer, inner, params[i], h, inner_tol=None, on_failure="ignore")

    expected = [one(i) for i in range(8)]
    together = threading.Barrier(8)

    def work(i):
        together.wait()
        wrong.extend(i for _ in range(5) if not torch.equal(one(i), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    before.assert_same()


@pytest.mark.timeout(60)
def test_row_57_a_loss_that_waits_for_threads_which_call_hypergrad_ends():
    found = []

    def nested(p, h):
        thread = threading.Thread(target=lambda: found.append(answer(Counts())))
        thread.start()
        thread.join()
        return (p * h).square().sum() + (p - 1).square().sum()

    w, h = torch.ones(2, dtype=D), torch.tensor(0.5, dtype=D)
    implicit_grad(lambda p, h: p.sum(), nested, w, h, inner_tol=None)
    assert len(found) >= 1


def test_row_57_a_loss_that_fails_lets_the_others_in():
    def fails(p, h):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        implicit_grad(lambda p, h: p.sum(), fails, torch.ones(2), torch.ones(2))
    found = []
    thread = threading.Thread(target=lambda: found.append(answer(Counts())))
    thread.start()
    thread.join(timeout=30)
    assert found
