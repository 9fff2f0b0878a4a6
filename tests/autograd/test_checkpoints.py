"""A checkpoint inside of a module computes its layers again with the parameters of the call."""

from __future__ import annotations

import _thread
import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint

import hypergrad
from hypergrad import CG, Exact, GaussNewton, implicit_grad
from hypergrad._autograd import turns

D = torch.float64
pytestmark = pytest.mark.filterwarnings("error")


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


X, Y, X_VAL, Y_VAL = randn(9, 3), randn(9, 1, seed=1), randn(7, 3, seed=2), randn(7, 1, seed=3)
H = torch.tensor([0.3, -0.2], dtype=D)


@pytest.fixture(autouse=True)
def _same_modules():
    torch.manual_seed(0)


def region(fun, *args, keep, **options):
    """A function's value, whose graph is computed again where it is kept under a checkpoint."""
    if keep == "reentrant":
        return checkpoint(fun, *args, use_reentrant=True, **options)
    return checkpoint(fun, *args, use_reentrant=False, **options) if keep else fun(*args)


def linear(n, m):
    return nn.Linear(n, m, dtype=D)


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = linear(3, 4), linear(4, 1)

    def forward(self, x, keep):
        h = region(lambda x: torch.tanh(self.first(x)), x, keep=keep)
        return self.last(h)


class TwoRegions(OneLayer):
    def __init__(self):
        super().__init__()
        self.middle = linear(4, 4)

    def forward(self, x, keep):
        h = region(lambda x: torch.tanh(self.first(x)), x, keep=keep)
        h = region(lambda h: torch.tanh(self.middle(h)), h, keep=keep)
        return self.last(h)


class Nested(TwoRegions):
    def forward(self, x, keep):
        def inside(h):
            return torch.sin(self.middle(h))

        def outside(x):
            return torch.tanh(region(inside, torch.tanh(self.first(x)), keep=keep)).square()

        return self.last(region(outside, x, keep=keep))


class Deep(nn.Module):
    """Its parts have regions of their own."""

    def __init__(self):
        super().__init__()
        self.body, self.last = Nested(), linear(1, 1)

    def forward(self, x, keep):
        return self.last(torch.tanh(self.body(x, keep)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = linear(3, 3), linear(3, 3), linear(3, 1)
        self.again.weight = self.first.weight

    def forward(self, x, keep):
        h = region(lambda x: torch.tanh(self.first(x)), x, keep=keep)
        return self.last(region(lambda h: torch.tanh(self.again(h)), h, keep=keep))


class Bare(nn.Module):
    """No module runs in its region."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(randn(3, 4, seed=5))
        self.last = linear(4, 1)

    def forward(self, x, keep):
        return self.last(region(lambda x: torch.tanh(x @ self.weight), x, keep=keep))


class Attributes(OneLayer):
    """Its region sees a buffer, a tensor and a number that the module has changed before it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", randn(4, seed=6))
        self.register_buffer("count", torch.zeros((), dtype=D))
        self.scale, self.power = torch.ones(4, dtype=D), 1

    def forward(self, x, keep):
        self.scale, self.power = self.last.weight[0].exp(), 3
        self.count += 1
        self.shift = self.shift * 2

        def layer(x):
            return (
                torch.tanh(self.first(x) * self.scale + self.shift * self.count.clone())
                ** self.power
            )

        h = region(layer, x, keep=keep)
        self.scale, self.power = torch.zeros(4, dtype=D), 1
        self.count += 5
        return self.last(h)


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()

    def right_inverse(self, x):
        return x


class Parametrized(OneLayer):
    def __init__(self):
        super().__init__()
        parametrize.register_parametrization(self.first, "weight", Exponential())


KINDS = [OneLayer, TwoRegions, Nested, Deep, Tied, Bare, Attributes, Parametrized]


def away(net):
    """Parameters that are other numbers than the module's own."""
    return {
        k: v.detach() + 0.4 * randn(*v.shape, seed=i + 10)
        for i, (k, v) in enumerate(net.named_parameters())
    }


def losses(net, keep, call=None):
    call = call or (lambda p, x: functional_call(net, p, (x, keep)))

    def inner(p, h):
        decay = sum((h[1].exp() * v).square().sum() for v in p.values())
        return (call(p, X) - h[0] * Y).square().sum() + decay

    def outer(p, h):
        return (call(p, X_VAL) - Y_VAL).square().mean() + h.square().sum()

    return outer, inner


class Same:
    """Nothing of a module is changed meanwhile."""

    def __init__(self, net):
        self.net = net

    def _now(self):
        return {
            name: (dict(m.__dict__), dict(m._parameters), dict(m._buffers))
            for name, m in self.net.named_modules()
        }

    def __enter__(self):
        self.before, self.values = self._now(), copy.deepcopy(self.net.state_dict())

    def __exit__(self, kind, error, trace):
        after = self._now()
        for name, parts in self.before.items():
            for was, now in zip(parts, after[name], strict=True):
                assert list(was) == list(now)
                assert all(now[k] is v for k, v in was.items()), name
        for name, value in self.net.state_dict().items():
            torch.testing.assert_close(value, self.values[name], rtol=0, atol=0)


def close(found, expected, rtol=1e-10):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-12)


def by_hand(outer, inner, p, h, damping=0.0):
    """By the dense Hessian, of losses without a checkpoint."""
    names, shapes = list(p), [v.shape for v in p.values()]
    sizes = [v.numel() for v in p.values()]
    flat = torch.cat([v.reshape(-1) for v in p.values()])

    def tree(w):
        parts = zip(names, w.split(sizes), shapes, strict=True)
        return {k: part.reshape(shape) for k, part, shape in parts}

    def gradient(w, h):
        w = w.requires_grad_() if not w.requires_grad else w
        (g,) = torch.autograd.grad(inner(tree(w), h), w, create_graph=True)
        return g

    A = torch.autograd.functional.jacobian(lambda w: gradient(w, h), flat)
    A = A + damping * torch.eye(len(flat), dtype=D)
    B = torch.autograd.functional.jacobian(lambda h: gradient(flat, h), h)
    w, lam = flat.clone().requires_grad_(), h.clone().requires_grad_()
    g, direct = torch.autograd.grad(outer(tree(w), lam), (w, lam))
    return direct - B.T @ torch.linalg.solve(A, g)


DAMPING = 400.0  # far from a minimum; all in all the matrix is positive definite
SOLVERS = [CG(maxiter=300, rtol=1e-14, damping=DAMPING), Exact(damping=DAMPING)]


def fresh(net):
    """A call of a copy, without a checkpoint."""
    return lambda p, x: functional_call(copy.deepcopy(net), p, (x, False))


def hypergradient(outer, inner, p, h=H, **options):
    return implicit_grad(outer, inner, p, h, inner_tol=None, **options)


@pytest.mark.parametrize("solver", SOLVERS, ids=["CG", "Exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_inside_a_module_changes_no_hypergradient(kind, solver):
    net = kind()
    p = away(net)
    with Same(net):
        found = hypergradient(*losses(net, True), p, solver=solver)
    close(found, hypergradient(*losses(net, False), p, solver=solver))
    close(found, by_hand(*losses(net, False, fresh(net)), p, H, DAMPING), 1e-9)


@pytest.mark.parametrize("where", ["outer", "inner"])
def test_in_one_of_the_losses(where):
    net = Deep()
    p = away(net)
    plain = losses(net, False)
    outer, inner = losses(net, True)
    given = (outer, plain[1]) if where == "outer" else (plain[0], inner)
    with Same(net):
        found = hypergradient(*given, p, solver=SOLVERS[1])
    close(found, hypergradient(*plain, p, solver=SOLVERS[1]))


@pytest.mark.parametrize("solver", SOLVERS, ids=["CG", "Exact"])
@pytest.mark.parametrize("kind", [Nested, Tied, Bare, Attributes])
def test_gauss_newton(kind, solver):
    net = kind()
    p = away(net)

    def answer(keep):
        outer, _ = losses(net, keep)
        condition = GaussNewton(
            outputs=lambda p, h: functional_call(net, p, (X, keep)) - h[0] * Y,
            loss=lambda r, h: r.square().sum(),
            regulariser=lambda p, h: sum((h[1].exp() * v).square().sum() for v in p.values()),
        )
        return hypergradient(outer, condition, p, solver=solver)

    with Same(net):
        found = answer(True)
    close(found, answer(False))


@pytest.mark.parametrize("kind", [TwoRegions, Attributes])
def test_the_reentrant_checkpoint_is_right_too(kind):
    net = kind()
    p = away(net)
    with Same(net):
        found = hypergradient(*losses(net, "reentrant"), p, solver=SOLVERS[1])
    close(found, hypergradient(*losses(net, False), p, solver=SOLVERS[1]))


@pytest.mark.parametrize("keep", [True, "reentrant"])
def test_a_checkpoint_around_functional_call_stays_right(keep):
    net = TwoRegions()
    p = away(net)

    def call(p, x):
        return region(lambda x: functional_call(net, p, (x, False)), x, keep=keep)

    with Same(net):
        found = hypergradient(*losses(net, keep, call), p, solver=SOLVERS[0])
    close(found, hypergradient(*losses(net, False), p, solver=SOLVERS[0]))


def test_one_module_with_two_sets_of_parameters_in_one_loss():
    net = TwoRegions()
    p, teacher = away(net), {k: v * -0.7 for k, v in away(net).items()}
    with Same(net):
        found, expected = (
            hypergradient(
                *losses(
                    net,
                    keep,
                    lambda p, x, keep=keep: (
                        functional_call(net, p, (x, keep))
                        - 0.5
                        * functional_call(net, teacher, (x, keep))
                        * functional_call(net, {k: v * 2 for k, v in p.items()}, (x, keep))
                    ),
                ),
                p,
                solver=SOLVERS[1],
            )
            for keep in (True, False)
        )
    close(found, expected)


def test_a_part_that_runs_for_the_first_time_in_a_region():
    net = TwoRegions()
    p = away(net)

    def answer(keep):
        def call(p, x):
            with torch.nn.utils.stateless._reparametrize_module(net, p):
                return net.last(region(net.first, x, keep=keep).tanh())

        return hypergradient(*losses(net, keep, call), p, solver=SOLVERS[1])

    with Same(net):
        found = answer(True)
    close(found, answer(False))


def test_buffers_that_are_given_with_the_parameters():
    net = Attributes()
    p = away(net)

    def answer(keep):
        def call(p, x):
            buffers = {"shift": p["last.bias"].expand(4), "count": torch.full((), 2.0, dtype=D)}
            return functional_call(net, {**p, **buffers}, (x, keep))

        return hypergradient(*losses(net, keep, call), p, solver=SOLVERS[1])

    with Same(net):
        found = answer(True)
    close(found, answer(False))


def test_dropout_in_a_region_draws_the_same_numbers():
    net, drop = OneLayer(), nn.Dropout(0.5)
    p = away(net)

    def answer(keep, solver):
        def call(p, x):
            return region(lambda x: drop(functional_call(net, p, (x, keep))), x, keep=keep)

        torch.manual_seed(0)
        return hypergradient(*losses(net, keep, call), p, solver=solver)

    for solver in SOLVERS:
        close(answer(True, solver), answer(False, solver))


def test_central_differences_of_a_solution():
    net = TwoRegions()
    outer, inner = losses(net, True)
    _, plain = losses(net, False)

    @hypergrad.custom_argmin(inner, solver=Exact())
    def solve(p, h):
        return hypergrad.inner_solvers.NewtonCG(maxiter=50, tol=1e-12)(plain, p, h)[0]

    start = away(net)
    h = H.clone().requires_grad_()
    value = outer(solve(start, h), h)
    (found,) = torch.autograd.grad(value, h)
    for i in range(2):
        e = torch.zeros(2, dtype=D)
        e[i] = 1e-5
        with torch.no_grad():
            up, down = (outer(solve(start, H + s * e), H + s * e) for s in (1, -1))
        close(found[i], (up - down) / 2e-5, 1e-6)


def test_a_decorated_solver_and_its_double_backward():
    net = Nested()
    p = away(net)

    def derivatives(keep):
        _, inner = losses(net, keep)
        solve = hypergrad.custom_argmin(inner, solver=SOLVERS[1], inner_tol=None)(lambda p, h: p)
        h = H.clone().requires_grad_()
        solution = solve(p, h)
        value = sum((v * (i + 1)).sin().sum() for i, v in enumerate(solution.values()))
        (first,) = torch.autograd.grad(value, h, create_graph=True)
        return first.detach(), torch.autograd.grad((first * randn(2, seed=8)).sum(), h)[0]

    with Same(net):
        found = derivatives(True)
    for one, other in zip(found, derivatives(False), strict=True):
        close(one, other)


def step(inner):
    def descend(p, h):
        g = torch.autograd.grad(inner(p, h), list(p.values()), create_graph=True)
        return {k: v - 0.01 * d for (k, v), d in zip(p.items(), g, strict=True)}

    return descend


ESTIMATORS = {
    "unrolled": lambda o, i, p: hypergrad.unrolled_grad(o, step(i), p, H, steps=3),
    "segments": lambda o, i, p: hypergrad.unrolled_grad(o, step(i), p, H, steps=3, checkpoint=True),
    "one step": lambda o, i, p: hypergrad.one_step_grad(o, step(i), p, H),
    "penalty": lambda o, i, p: hypergrad.penalty_grad(
        o, i, p, H, penalty=0.1, steps=3, lr=0.01, on_failure="ignore"
    ),
    "differences": lambda o, i, p: hypergrad.finite_difference_grad(
        o, i, p, H, lr=0.1, on_failure="ignore"
    ),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", [Nested, Attributes])
def test_estimators(estimator, kind):
    net = kind()
    p = away(net)
    estimate = ESTIMATORS[estimator]
    with Same(net):
        found = estimate(*losses(net, True), p)
    close(found, estimate(*losses(net, False), p))


@pytest.mark.parametrize(
    "solver",
    [
        hypergrad.inner_solvers.LBFGS(maxiter=4),
        hypergrad.inner_solvers.NewtonCG(maxiter=3),
        hypergrad.inner_solvers.GradientDescent(step_size=0.01, maxiter=4),
    ],
    ids=lambda solver: type(solver).__name__,
)
@pytest.mark.filterwarnings("ignore::hypergrad.ConvergenceWarning")
def test_inner_solvers(solver):
    net = Nested()
    p = away(net)
    with Same(net):
        found, _ = solver(losses(net, True)[1], p, H)
    expected, _ = solver(losses(net, False)[1], p, H)
    for k in p:
        close(found[k], expected[k])


@pytest.mark.parametrize("solver", SOLVERS, ids=["CG", "Exact"])
def test_a_batch_of_tasks(solver):
    net = Nested()
    p = away(net)
    hs = torch.stack([H, H + 0.2, H - 0.1])

    def tasks(keep):
        def one(h):
            return hypergradient(*losses(net, keep), p, h, solver=solver)

        return torch.func.vmap(one)(hs)

    with Same(net):
        found = tasks(True)
    close(found, tasks(False))


@pytest.mark.parametrize("keep", [True, "reentrant"])
@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_a_function_transform_in_a_loss(transform, keep):
    net = Nested()
    p = away(net)

    def answer(keep):
        def call(p, x):
            if transform == "grad":
                one = torch.func.grad(lambda x: functional_call(net, p, (x, keep)).sum())
                return one(x).sum(1, keepdim=True)
            return torch.func.vmap(lambda x: functional_call(net, p, (x[None], keep))[0])(x)

        return hypergradient(*losses(net, keep, call), p, solver=SOLVERS[0])

    with Same(net):
        found = answer(keep)
    close(found, answer(False))


def test_a_region_with_a_transform_in_it():
    net = Nested()
    p = away(net)

    def answer(keep, solver):
        def call(p, x):
            def rows(x):
                return torch.func.vmap(lambda x: functional_call(net, p, (x[None], keep))[0])(x)

            return region(rows, x, keep=keep)

        return hypergradient(*losses(net, keep, call), p, solver=solver)

    for solver in SOLVERS:
        with Same(net):
            found = answer(True, solver)
        close(found, answer(False, solver))


def test_a_gradient_within_a_loss():
    net = TwoRegions()
    p = away(net)

    def answer(keep):
        outer, inner = losses(net, keep)

        def penalised(p, h):
            g = torch.autograd.grad(inner(p, h), list(p.values()), create_graph=True)
            return inner(p, h) + 1e-3 * sum(d.square().sum() for d in g)

        return hypergradient(outer, penalised, p, solver=SOLVERS[1])

    with Same(net):
        found = answer(True)
    close(found, answer(False))


def test_a_region_that_fails_when_it_is_computed_again():
    net = TwoRegions()
    p, calls = away(net), []

    def call(p, x):
        return functional_call(net, p, (x, True))

    def fails(module, args):
        calls.append(module)
        if len(calls) > 2:
            raise ValueError("again")

    handle = net.middle.register_forward_pre_hook(fails)
    with Same(net), pytest.raises(ValueError, match="again"):
        hypergradient(*losses(net, True, call), p, solver=SOLVERS[0])
    handle.remove()


def test_eight_threads_on_one_module():
    net = TwoRegions()
    given = [{k: v * (1 + i / 10) for k, v in away(net).items()} for i in range(8)]
    expected = [hypergradient(*losses(net, False), p, solver=SOLVERS[1]) for p in given]
    found = [None] * 8

    def work(i):
        found[i] = hypergradient(*losses(net, True), given[i], solver=SOLVERS[1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    with Same(net):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for one, other in zip(found, expected, strict=True):
        close(one, other)


def test_what_a_region_notes_is_freed():
    net, target = TwoRegions(), linear(3, 1)
    p = away(net)
    made = []

    def call(p, x):
        w = functional_call(net, p, (x, True)).mean() * torch.ones(1, 3, dtype=D)
        made.append(weakref.ref(w))
        return functional_call(target, {"weight": w}, (x,))

    outer, inner = losses(net, True, call)
    hypergradient(outer, inner, p, solver=SOLVERS[0])
    gc.collect()
    assert made
    assert not any(w() is not None for w in made)


def test_pytorch_is_left_as_it_was():
    before = dict(vars(checkpoints))
    net = OneLayer()
    hypergradient(*losses(net, True), away(net), solver=SOLVERS[0])
    assert all(there is before[name] for name, there in vars(checkpoints).items())


def test_a_thread_of_autograd_does_not_wait_for_the_thread_that_waits_for_it(monkeypatch):
    begun, done, release = threading.Event(), [], threading.Lock()
    release.acquire()

    class Engine:
        run_backward = staticmethod(release.acquire)  # waits outside of Python, as autograd does

    monkeypatch.setattr(torch.autograd.graph.Variable, "_execution_engine", Engine)

    def work():
        begun.wait()
        done.append(turns.take_turn())
        release.release()

    assert turns.take_turn()
    try:
        _thread.start_new_thread(work, ())
        begun.set()
        assert torch.autograd.graph._engine_run_backward(True, 20.0)
    finally:
        turns.end_turn()
    assert done == [False]
