"""nn.Module as the inner and as the outer model, with mini-batches on both levels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import hypergrad
from hypergrad import CG, GMRES, Exact, custom_argmin, implicit_backward, implicit_grad

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
D = torch.float64


def newton(objective, params, steps=10):
    """The minimiser over a dict, by Newton's method on the flat vector."""
    shapes = {k: v.shape for k, v in params.items()}

    def unflatten(v):
        parts = torch.split(v, [s.numel() for s in shapes.values()])
        return {k: p.reshape(s) for (k, s), p in zip(shapes.items(), parts, strict=True)}

    v = torch.cat([p.detach().reshape(-1) for p in params.values()])
    for _ in range(steps):
        g, H = gradient_and_hessian(lambda v: objective(unflatten(v)), v)
        v = v - torch.linalg.solve(H, g)
    return unflatten(v)


def gradient_and_hessian(f, v):
    """By plain autograd: torch.func.hessian is wrong through layer norm in PyTorch 2.13."""
    v = v.detach().requires_grad_()
    (g,) = torch.autograd.grad(f(v).sum(), v, create_graph=True)
    units = torch.eye(len(v), dtype=D)
    return g.detach(), torch.autograd.grad(g, v, units, is_grads_batched=True)[0]


def central(fun, hparams, direction, eps=1e-5):
    """The derivative of a scalar function of a dict along a direction."""
    moved = [{k: v.detach() + s * direction[k] for k, v in hparams.items()} for s in (eps, -eps)]
    return (fun(moved[0]) - fun(moved[1])) / (2 * eps)


def along(grads, direction):
    return sum((g * direction[k]).sum() for k, g in grads.items())


def randn_like(tree, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=generator, dtype=D) for k, v in tree.items()}


class Small(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 2)
        self.norm = norm if norm is not None else nn.Identity()

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(12, 2, generator=generator, dtype=D),
        torch.randint(2, (12,), generator=generator),
        torch.randn(9, 2, generator=generator, dtype=D),
        torch.randint(2, (9,), generator=generator),
    )


NORMS = {
    "none": lambda: None,
    "layer": lambda: nn.LayerNorm(3),
    "batch statistics": lambda: nn.BatchNorm1d(3, track_running_stats=False),
    "batch in eval mode": lambda: nn.BatchNorm1d(3).eval(),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("solver", [Exact(), CG(rtol=1e-11), GMRES(rtol=1e-11)])
def test_weight_decay_of_each_parameter_equals_central_differences(norm, solver, data):
    x, y, xv, yv = data
    torch.manual_seed(1)
    net = Small(NORMS[norm]()).double()
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    start = {k: v.detach() for k, v in net.named_parameters()}
    decay = {k.replace(".", "_"): torch.full((), 1.0, dtype=D) for k in start}

    def inner(p, d):
        fit = F.cross_entropy(functional_call(net, p, (x,)), y)
        return fit + sum((d[k.replace(".", "_")] * (p[k] - 1.1 * start[k]) ** 2).sum() for k in p)

    def outer(p, d):
        return F.cross_entropy(functional_call(net, p, (xv,)), yv)

    solve = lambda d: newton(lambda p: inner(p, d), start)
    hypergradient, info = implicit_grad(
        outer, inner, solve(decay), decay, solver=solver, return_info=True
    )
    direction = randn_like(decay)
    want = central(lambda d: outer(solve(d), d), decay, direction)
    torch.testing.assert_close(along(hypergradient, direction), want, rtol=1e-5, atol=1e-9)
    assert info.inner_residual < 1e-8
    for k, v in net.named_buffers():
        assert torch.equal(v, buffers[k])


def test_frozen_parameters_are_constants_and_are_left_alone(data):
    x, y, xv, yv = data
    torch.manual_seed(1)
    net = Small().double()
    net.first.weight.requires_grad_(False)
    net.first.bias.requires_grad_(False)
    lam = torch.tensor(0.2, dtype=D)
    free = {k: v for k, v in net.named_parameters() if v.requires_grad}

    def inner(p, lam):
        loss = F.cross_entropy(functional_call(net, p, (x,)), y)
        return loss + lam * sum((p[k] ** 2).sum() for k in free)

    def outer(p, lam):
        return F.cross_entropy(functional_call(net, p, (xv,)), yv)

    def solved(lam):
        return newton(lambda p: inner(p, lam), free)

    for k, v in solved(lam).items():
        free[k].data.copy_(v)
    everything = dict(net.named_parameters())
    kept = {k: (v.detach().clone(), v._version) for k, v in everything.items()}
    want = (outer(solved(lam + 1e-5), lam) - outer(solved(lam - 1e-5), lam)) / 2e-5
    hypergradient, info = implicit_grad(outer, inner, everything, lam, return_info=True)
    torch.testing.assert_close(hypergradient, want, rtol=1e-6, atol=0)
    # the frozen ones handed in, or left to the module: the same
    torch.testing.assert_close(implicit_grad(outer, inner, free, lam), hypergradient)
    assert torch.equal(info.solution["first.weight"], torch.zeros(3, 2, dtype=D))
    for k, v in everything.items():
        assert torch.equal(v, kept[k][0])
        assert v._version == kept[k][1]
        assert v.grad is None


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.b = nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def test_tied_weights_are_one_variable(data):
    x, y, xv, yv = data
    torch.manual_seed(1)
    net = Tied().double()
    start = dict(net.named_parameters())
    assert list(start) == ["a.weight"]
    lam = {"lam": torch.tensor(0.2, dtype=D)}

    def inner(p, h):
        return (
            F.cross_entropy(functional_call(net, p, (x,)), y)
            + h["lam"] * (p["a.weight"] ** 2).sum()
        )

    def outer(p, h):
        return F.cross_entropy(functional_call(net, p, (xv,)), yv)

    solve = lambda h: newton(lambda p: inner(p, h), start)
    hypergradient = implicit_grad(outer, inner, solve(lam), lam)
    one = {"lam": torch.ones((), dtype=D)}
    want = central(lambda h: outer(solve(h), h), lam, one)
    torch.testing.assert_close(hypergradient["lam"], want, rtol=1e-6, atol=0)


class Weighting(nn.Module):
    """A meta-network that weights samples, with a tied, a frozen and a normalising part."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.frozen = (nn.Linear(2, 2, bias=False) for _ in range(3))
        self.b.weight = self.a.weight
        self.frozen.requires_grad_(False)
        self.norm, self.dropout = nn.BatchNorm1d(2), nn.Dropout(0.5)

    def forward(self, x):
        z = self.dropout(self.norm(torch.tanh(self.a(x))))
        return torch.sigmoid(self.b(z) + self.frozen(x))[:, 0]


def weighted(net, meta, x, y):
    def inner(p, h):
        each = F.cross_entropy(functional_call(net, p, (x,)), y, reduction="none")
        penalty = 0.05 * sum((v**2).sum() for v in p.values())
        return (functional_call(meta, h, (x,)) * each).mean() + penalty

    return inner


@pytest.fixture
def two_models(data):
    """The model, the meta-network, the two losses, and the true gradient of each parameter."""
    x, y, xv, yv = data
    torch.manual_seed(1)
    net, meta = nn.Linear(2, 2).double(), Weighting().double()
    meta.norm.running_mean.uniform_()
    meta.eval()
    inner = weighted(net, meta, x, y)
    start = {k: v.detach() for k, v in net.named_parameters()}
    hparams = dict(meta.named_parameters())
    assert list(hparams) == ["a.weight", "frozen.weight", "norm.weight", "norm.bias"]

    def outer(p, h):
        return F.cross_entropy(functional_call(net, p, (xv,)), yv)

    def solve(h):
        return newton(lambda p: inner(p, {k: v.detach() for k, v in h.items()}), start)

    def derivative(direction):
        return central(lambda h: outer(solve(h), h), hparams, direction)

    return net, meta, inner, outer, solve, derivative


def test_a_meta_network_in_eval_mode_is_handed_over_as_its_named_parameters(
    two_models,
):
    _, meta, inner, outer, solve, derivative = two_models
    hparams = dict(meta.named_parameters())
    params, direction = solve(hparams), randn_like(hparams)
    hypergradient = implicit_grad(outer, inner, params, hparams)
    torch.testing.assert_close(
        along(hypergradient, direction), derivative(direction), rtol=1e-5, atol=1e-10
    )

    kept = {k: v.clone() for k, v in meta.state_dict().items()}
    implicit_backward(outer, inner, params, hparams)
    assert meta.frozen.weight.grad is None
    assert meta.b.weight.grad is meta.a.weight.grad
    for k in ("a.weight", "norm.weight", "norm.bias"):
        torch.testing.assert_close(hparams[k].grad, hypergradient[k])
    # the frozen part left to the module: the same
    free = {k: v for k, v in hparams.items() if v.requires_grad}
    less = implicit_grad(outer, inner, params, free)
    for k in free:
        torch.testing.assert_close(less[k], hypergradient[k])
    for k, v in meta.state_dict().items():
        assert torch.equal(v, kept[k])
    assert not meta.training


@pytest.mark.parametrize("way", ["argument", "closure"])
def test_a_decorated_model_is_differentiated_by_the_meta_network_as_argument_or_closure(
    two_models, data, way
):
    net, meta, inner, outer, solve, derivative = two_models
    x, y, _, _ = data
    hparams = dict(meta.named_parameters())
    free = {k: v for k, v in hparams.items() if v.requires_grad}
    if way == "argument":
        fit = custom_argmin(inner)(lambda init, h: solve({**hparams, **h}))
        value = lambda: outer(fit(None, free), None)
    else:  # the module itself, called in the objective

        def by_closure(p):
            each = F.cross_entropy(functional_call(net, p, (x,)), y, reduction="none")
            return (meta(x) * each).mean() + 0.05 * sum((v**2).sum() for v in p.values())

        fit = custom_argmin(by_closure)(lambda init: solve(hparams))
        value = lambda: outer(fit(None), None)
    direction = randn_like(hparams)
    direction["frozen.weight"].zero_()
    value().backward()
    grads = {k: v.grad for k, v in free.items()}
    torch.testing.assert_close(
        along(grads, direction), derivative(direction), rtol=1e-5, atol=1e-10
    )
    assert meta.frozen.weight.grad is None
    if way == "argument":
        found = grad(lambda h: outer(fit(None, h), None))({k: v.detach() for k, v in free.items()})
        for k, v in free.items():
            torch.testing.assert_close(found[k], v.grad)
    else:
        with pytest.raises(hypergrad.UnsupportedOperation, match=r"captures meta\.a\.weight"):
            torch.autograd.grad(value(), [*free.values()], create_graph=True)


def test_a_module_as_the_centre_of_imaml_equals_the_papers_equation(data):
    """(I + H / lam)^-1 d outer / d phi, with H the Hessian of the training loss alone."""
    x, y, xv, yv = data
    torch.manual_seed(1)
    net = Small(nn.LayerNorm(3)).double()
    centre, lam = dict(net.named_parameters()), 2.0

    def train(p):
        return F.cross_entropy(functional_call(net, p, (x,)), y)

    def inner(p, t):
        return train(p) + lam / 2 * sum(((p[k] - t[k]) ** 2).sum() for k in p)

    def outer(p, t):
        return F.cross_entropy(functional_call(net, p, (xv,)), yv)

    fixed = {k: v.detach() for k, v in centre.items()}
    params = newton(lambda p: inner(p, fixed), fixed)
    shapes = [v.shape for v in params.values()]
    flat = torch.cat([v.reshape(-1) for v in params.values()])

    def unflatten(v):
        parts = torch.split(v, [s.numel() for s in shapes])
        return {k: p.reshape(s) for k, p, s in zip(params, parts, shapes, strict=True)}

    _, H = gradient_and_hessian(lambda v: train(unflatten(v)), flat)
    b = grad(lambda v: outer(unflatten(v), None))(flat)
    want = unflatten(torch.linalg.solve(torch.eye(len(b), dtype=D) + H / lam, b))
    hypergradient = implicit_grad(outer, inner, params, centre)
    for k in want:
        torch.testing.assert_close(hypergradient[k], want[k], rtol=1e-8, atol=1e-12)


def test_mini_batches_on_both_levels_are_closed_over_and_drawn_anew(data):
    """A least-squares model of which each call sees another batch: the hand formula, each time."""
    generator = torch.Generator().manual_seed(3)
    x, y = (
        torch.randn(64, 3, generator=generator, dtype=D),
        torch.randn(64, generator=generator, dtype=D),
    )
    net = nn.Linear(3, 1, bias=False).double()
    log = torch.zeros(3, dtype=D, requires_grad=True)
    for _ in range(4):
        i = torch.randperm(64, generator=generator)[:20]
        j = torch.randperm(64, generator=generator)[:10]

        def inner(p, h, i=i):
            fit = functional_call(net, p, (x[i],))[:, 0]
            return ((fit - y[i]) ** 2).sum() / 2 + (h * p["weight"][0] ** 2).sum() / 2

        def outer(p, h, j=j):
            return ((functional_call(net, p, (x[j],))[:, 0] - y[j]) ** 2).sum() / 2

        def closed(log, i=i, j=j):
            w = torch.linalg.solve(x[i].T @ x[i] + torch.diag(log.exp()), x[i].T @ y[i])
            return ((x[j] @ w - y[j]) ** 2).sum() / 2, w

        _, w = closed(log.detach())
        log.grad = None
        loss = implicit_backward(outer, inner, {"weight": w[None]}, log.exp())
        want = torch.autograd.grad(closed(log)[0], log)[0]
        torch.testing.assert_close(log.grad, want, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(loss, closed(log.detach())[0])
        with torch.no_grad():
            log -= 0.1 * log.grad


def test_a_loop_started_from_the_last_solution_needs_fewer_iterations():
    generator = torch.Generator().manual_seed(3)
    x, y = (
        torch.randn(80, 30, generator=generator, dtype=D) * torch.logspace(0, 1, 30, dtype=D),
        torch.randn(80, generator=generator, dtype=D),
    )
    net = nn.Linear(30, 1, bias=False).double()

    def inner(p, h):
        fit = functional_call(net, p, (x,))[:, 0]
        return ((fit - y) ** 2).sum() / 2 + h * (p["weight"] ** 2).sum() / 2

    def outer(p, h):
        return (p["weight"] - 1).square().sum()

    solver, warm, counts = CG(rtol=1e-6), None, {"warm": [], "cold": []}
    for k in range(4):
        h = torch.tensor(1.0 + 1e-5 * k, dtype=D)
        w = torch.linalg.solve(x.T @ x + h * torch.eye(30, dtype=D), x.T @ y)
        arguments = (outer, inner, {"weight": w[None]}, h)
        g, info = implicit_grad(*arguments, solver=solver, x0=warm, return_info=True)
        cold, fresh = implicit_grad(*arguments, solver=solver, return_info=True)
        torch.testing.assert_close(g, cold, rtol=1e-4, atol=0)
        warm = info.solution
        counts["warm"].append(int(info.iterations))
        counts["cold"].append(int(fresh.iterations))
    assert counts["warm"][0] == counts["cold"][0]
    assert sum(counts["warm"][1:]) < 0.7 * sum(counts["cold"][1:])


def test_batch_norm_that_updates_running_statistics_is_refused_and_left_alone(data):
    x, y, xv, yv = data
    net = Small(nn.BatchNorm1d(3)).double()
    params = {k: v.detach() for k, v in net.named_parameters()}
    kept = {k: v.clone() for k, v in net.state_dict().items()}

    def inner(p, lam):
        return F.cross_entropy(functional_call(net, p, (x,)), y) + lam * sum(
            (v**2).sum() for v in p.values()
        )

    def outer(p, lam):
        return F.cross_entropy(functional_call(net, p, (xv,)), yv)

    lam = torch.tensor(0.1, dtype=D, requires_grad=True)
    with pytest.raises(hypergrad.HypergradError, match="running"):
        implicit_grad(outer, inner, params, lam, inner_tol=None)
    fit = custom_argmin(inner, inner_tol=None)(lambda init, lam: params)
    with pytest.raises(hypergrad.HypergradError, match="running"):
        fit(None, lam)["last.bias"].sum().backward()
    for k, v in net.state_dict().items():
        assert torch.equal(v, kept[k])


def test_dropout_inside_a_network_sees_one_mask_per_solve(data):
    x, y, xv, yv = data
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    params = {k: v.detach() for k, v in net.named_parameters()}
    lam = torch.tensor(1.0, dtype=D)

    def inner(p, lam):
        return F.cross_entropy(functional_call(net, p, (x,)), y) + lam * sum(
            (v**2).sum() for v in p.values()
        )

    def outer(p, lam):
        return F.cross_entropy(functional_call(net, p, (xv,)), yv)

    answers = []
    for solver in (Exact(), CG(rtol=1e-12), GMRES(rtol=1e-12)):
        torch.manual_seed(5)
        answers.append(implicit_grad(outer, inner, params, lam, solver=solver, inner_tol=None))
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(answers[2], answers[0], rtol=1e-9, atol=0)


def test_a_network_fitted_by_a_decorated_torch_optimiser_is_differentiated(data):
    x, y, xv, yv = data
    torch.manual_seed(1)
    net = nn.Linear(2, 2).double()

    def inner(p, x, y, log):
        penalty = log.exp() * sum((v**2).sum() for v in p.values())
        return F.cross_entropy(functional_call(net, p, (x,)), y) + penalty

    @custom_argmin(inner)
    def fit(init, x, y, log):
        params = {k: v.requires_grad_() for k, v in init.items()}
        optimiser = torch.optim.LBFGS(
            params.values(), max_iter=100, tolerance_grad=1e-12, tolerance_change=0,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure():
            optimiser.zero_grad()
            loss = inner(params, x, y, log)
            loss.backward()
            return loss

        optimiser.step(closure)
        return params

    start = dict(net.named_parameters())
    kept = {k: v.detach().clone() for k, v in start.items()}
    log = torch.tensor([-2.0], dtype=D, requires_grad=True)
    F.cross_entropy(functional_call(net, fit(start, x, y, log), (xv,)), yv).backward()

    def total(h):
        params = newton(lambda p: inner(p, x, y, h["log"]), kept)
        return F.cross_entropy(functional_call(net, params, (xv,)), yv)

    want = central(total, {"log": log}, {"log": torch.ones(1, dtype=D)})
    torch.testing.assert_close(log.grad[0], want, rtol=1e-6, atol=0)
    for k, v in net.named_parameters():
        assert torch.equal(v, kept[k])
        assert v.grad is None


@pytest.mark.parametrize("solver", [Exact(), CG(rtol=1e-12), CG(maxiter=5)])
def test_a_batch_of_imaml_tasks_equals_the_loop(solver, data):
    torch.manual_seed(1)
    net = Small(nn.BatchNorm1d(3, track_running_stats=False)).double()
    meta = dict(net.named_parameters())
    tasks = 4
    x, v = torch.randn(tasks, 6, 2, dtype=D), torch.randn(tasks, 5, 2, dtype=D)
    y, z = torch.randint(2, (tasks, 6)), torch.randint(2, (tasks, 5))

    def one(x, y, v, z):
        def inner(p, t):
            fit = F.cross_entropy(functional_call(net, p, (x,)), y)
            return fit + sum(((p[k] - t[k]) ** 2).sum() for k in p)

        params = {k: p.detach() for k, p in meta.items()}
        for _ in range(8):
            g = grad(inner)(params, {k: p.detach() for k, p in meta.items()})
            params = {k: params[k] - 0.2 * g[k] for k in params}
        return implicit_grad(
            lambda p, t: F.cross_entropy(functional_call(net, p, (v,)), z),
            inner, params, meta, solver=solver, inner_tol=None, on_failure="raise",
        )  # fmt: skip

    found = vmap(one)(x, y, v, z)
    for i in range(tasks):
        alone = one(x[i], y[i], v[i], z[i])
        for k in meta:
            torch.testing.assert_close(found[k][i], alone[k], rtol=1e-8, atol=1e-12)
    for p in net.parameters():
        assert p.grad is None
