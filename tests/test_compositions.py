"""A differentiable inner solver in every composition of derivatives and vmap."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import hypergrad
from hypergrad import (
    CG,
    GMRES,
    Exact,
    Status,
    custom_argmin,
    custom_fixed_point,
    custom_root,
    root_jvp,
    root_vjp,
)

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

D = torch.float64
RNG = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=RNG, dtype=D)


X, Y, C = randn(8, 3), randn(8), randn(4)
LAM = torch.rand(3, generator=RNG, dtype=D) + 0.5
LAMS = torch.rand(4, 3, generator=RNG, dtype=D) + 0.5
XS = randn(4, 8, 3)
ONES = torch.ones(3, dtype=D)


def inner(p, X, y, lam):
    """A quartic objective on a dict with a 0-d leaf: all its derivatives are there to be wrong."""
    w, b = p["w"], p["b"]
    return (
        ((X @ w + b - y) ** 2).sum() / 2
        + (lam * w**2).sum() / 2
        + lam.sum() * b**2 / 2
        + 0.05 * (w**4).sum()
        + 0.1 * (w.sum() * b) ** 2
    )


def newton(X, y, lam, steps, start=None):
    """Newton's method with the gradient and the Hessian by hand."""
    v = torch.zeros(4, dtype=D) if start is None else start
    for _ in range(steps):
        w, b = v[:3], v[3]
        r, s = X @ w + b - y, w.sum()
        by_w = X.T @ r + lam * w + 0.2 * w**3 + 0.2 * s * b**2
        by_b = r.sum() + lam.sum() * b + 0.2 * s**2 * b
        corner = X.T @ X + torch.diag(lam + 0.6 * w**2) + 0.2 * b**2
        side = X.sum(dim=0) + 0.4 * s * b
        last = len(y) + lam.sum() + 0.2 * s**2
        H = torch.cat([
            torch.cat([corner, side[:, None]], dim=1),
            torch.cat([side, last[None]])[None],
        ])
        v = v - torch.linalg.solve(H, torch.cat([by_w, by_b[None]]))
    return {"w": v[:3], "b": v[3]}


def solve(init, X, y, lam):
    return newton(X, y, lam, 12)


def step(p, X, y, lam):
    g = grad(inner)(p, X, y, lam)
    return {k: p[k] - 0.03 * g[k] for k in p}


def skewed(p, X, y, lam):
    """The gradient, mixed by a matrix that is not symmetric: the same root."""
    g = grad(inner)(p, X, y, lam)
    return {"w": g["w"] + 0.5 * g["b"] + torch.roll(g["w"], 1), "b": g["b"] - 0.3 * g["w"].sum()}


FITS = {
    "argmin": custom_argmin(inner)(solve),
    "argmin by CG": custom_argmin(inner, solver=CG(rtol=1e-13))(solve),
    "root": custom_root(skewed)(solve),
    "root by GMRES": custom_root(skewed, solver=GMRES(rtol=1e-13))(solve),
    "fixed point": custom_fixed_point(step)(solve),
}


def by_hand(p, X, y, lam):
    """The gradient of `inner`, mixed like `skewed`, without torch.func."""
    w, b = p["w"], p["b"]
    r, s = X @ w + b - y, w.sum()
    g = X.T @ r + lam * w + 0.2 * w**3 + 0.2 * s * b**2
    h = r.sum() + lam.sum() * b + 0.2 * s**2 * b
    return {"w": g + 0.5 * h + torch.roll(g, 1), "b": h - 0.3 * g.sum()}


def reference(init, X, y, lam):
    """Newton's method, unrolled from the solution: k steps have the derivatives to order k."""
    return newton(X, y, lam, 3, flat(solve(None, X, y, lam)).detach())


def flat(p):
    return torch.cat([p["w"], p["b"][None]])


def loss(fit):
    return lambda lam: (flat(fit(None, X, Y, lam)) @ C) ** 2 + lam.prod()


def vector(fit):
    return lambda lam: flat(fit(None, X, Y, lam)) * lam.sum()


def _leaf(lam):
    return lam.detach().clone().requires_grad_()


def backward(fit):
    def run(lam):
        lam = _leaf(lam)
        loss(fit)(lam).backward()
        return lam.grad

    return run


def higher(order):
    def of(fit):
        def run(lam):
            lam = _leaf(lam)
            value = loss(fit)(lam)
            for k in range(order):
                (g,) = torch.autograd.grad(value, lam, create_graph=k < order - 1)
                value = (g**2).sum()
            return g

        return run

    return of


def dual_level(fit):
    def run(lam):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(lam, ONES)
            return forward_ad.unpack_dual(vector(fit)(dual)).tangent

    return run


def dual_over_backward(fit):
    def run(lam):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(_leaf(lam), ONES)
            (g,) = torch.autograd.grad(loss(fit)(dual), dual, create_graph=True)
            return forward_ad.unpack_dual(g).tangent.detach()

    return run


PLAIN = {
    "backward": backward,
    "double backward": higher(2),
    "triple backward": higher(3),
    "dual level": dual_level,
    "dual level over backward": dual_over_backward,
}
TRANSFORMS = {
    "grad": lambda f: grad(loss(f)),
    "vjp": lambda f: lambda lam: vjp(vector(f), lam)[1](C)[0],
    "jvp": lambda f: lambda lam: jvp(vector(f), (lam,), (ONES,))[1],
    "jacrev": lambda f: jacrev(vector(f)),
    "jacfwd": lambda f: jacfwd(vector(f)),
    "hessian": lambda f: hessian(loss(f)),
    "grad of grad": lambda f: grad(lambda lam: (grad(loss(f))(lam) ** 2).sum()),
    "jacrev of jacrev": lambda f: jacrev(jacrev(vector(f))),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(vector(f))),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(vector(f))),
    "jvp of grad": lambda f: lambda lam: jvp(grad(loss(f)), (lam,), (ONES,))[1],
    "grad of jvp": lambda f: grad(lambda lam: jvp(vector(f), (lam,), (ONES,))[1] @ C),
    "jvp of jvp": lambda f: (
        lambda lam: jvp(lambda s: jvp(vector(f), (s,), (ONES,))[1], (lam,), (ONES,))[1]
    ),
}


def close(found, want, rtol=1e-8):
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(want), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * (1 + b.abs().max().item()))


@pytest.fixture(params=FITS)
def fit(request):
    return FITS[request.param]


def _pairs(names):
    """Every rule with every derivative; the iterative solvers with the first and one second."""
    second = [n for n in names if " of " in n and n != "grad of grad"]
    return [(f, n) for f in FITS for n in names if " by " not in f or n not in second]


@pytest.mark.parametrize(("rule", "name"), _pairs([*PLAIN, *TRANSFORMS]))
def test_every_derivative_equals_that_of_unrolled_newton(rule, name):
    fit = FITS[rule]
    make = {**PLAIN, **TRANSFORMS}[name]
    close(make(fit)(LAM), make(reference)(LAM))


@pytest.mark.parametrize(("rule", "name"), _pairs(TRANSFORMS))
def test_vmap_of_every_derivative_equals_the_loop(rule, name):
    fit = FITS[rule]
    make = TRANSFORMS[name]
    want = torch.stack([make(reference)(lam) for lam in LAMS])
    close(vmap(make(fit))(LAMS), want)


OUTSIDE = {
    "grad": grad,
    "hessian": hessian,
    "jacrev": lambda g: jacrev(lambda lam: g(lam) * lam),
    "jacfwd": lambda g: jacfwd(lambda lam: g(lam) * lam),
    "jvp": lambda g: lambda lam: jvp(g, (lam,), (ONES,))[1],
    "grad of grad": lambda g: grad(lambda lam: (grad(g)(lam) ** 2).sum()),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_every_derivative_over_vmap_equals_that_of_the_loop(fit, name):
    def mapped(lam):
        return (vmap(lambda X: flat(fit(None, X, Y, lam)))(XS) ** 2).sum()

    def looped(lam):
        return (torch.stack([flat(reference(None, X, Y, lam)) for X in XS]) ** 2).sum()

    close(OUTSIDE[name](mapped)(LAM), OUTSIDE[name](looped)(LAM))


def test_plain_backward_over_vmap_equals_the_loop(fit):
    lam, xs = _leaf(LAM), _leaf(XS)
    value = (vmap(lambda X: flat(fit(None, X, Y, lam)))(xs) ** 2).sum()
    first = torch.autograd.grad(value, (lam, xs), create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), (lam, xs))
    ref_lam, ref_xs = _leaf(LAM), _leaf(XS)
    value = (torch.stack([flat(reference(None, X, Y, ref_lam)) for X in ref_xs]) ** 2).sum()
    want = torch.autograd.grad(value, (ref_lam, ref_xs), create_graph=True)
    close(first, want)
    close(second, torch.autograd.grad(want[0].square().sum(), (ref_lam, ref_xs)))


def test_nested_vmap_of_a_derivative_equals_the_loops(fit):
    def one(fit, X, lam):
        return grad(lambda lam: flat(fit(None, X, Y, lam)) @ C)(lam)

    found = vmap(lambda X: vmap(lambda lam: one(fit, X, lam))(LAMS[:3]))(XS[:2])
    want = torch.stack([torch.stack([one(reference, X, s) for s in LAMS[:3]]) for X in XS[:2]])
    close(found, want)


def test_vmap_between_two_derivatives_equals_the_loop(fit):
    def total(f):
        return lambda lam: vmap(lambda X: grad(lambda s: flat(f(None, X, Y, s)) @ C)(lam))(XS)

    def looped(lam):
        return torch.stack([
            grad(lambda s, X=X: flat(reference(None, X, Y, s)) @ C)(lam) for X in XS
        ])

    close(jacrev(total(fit))(LAM), jacrev(looped)(LAM))
    close(jacfwd(total(fit))(LAM), jacfwd(looped)(LAM))


def test_batched_cotangents_of_plain_autograd_are_right_or_an_error(fit):
    """torch.autograd.grad(is_grads_batched=True) uses another vmap than torch.func."""
    try:
        found = torch.autograd.functional.jacobian(vector(fit), LAM, vectorize=True)
    except hypergrad.UnsupportedOperation:
        return
    close(found, jacrev(vector(reference))(LAM))


def test_in_dims_may_be_none_negative_or_in_the_middle(fit):
    xs, ys = torch.stack(list(XS), dim=1), torch.stack([Y, 2 * Y, 3 * Y, 4 * Y], dim=-1)

    def one(X, y, lam):
        return jacrev(lambda lam: flat(fit(None, X, y, lam)))(lam)

    found = vmap(one, in_dims=(1, -1, None), out_dims=2)(xs, ys, LAM)
    want = [
        jacrev(lambda lam, i=i: flat(reference(None, XS[i], (i + 1) * Y, lam)))(LAM)
        for i in range(4)
    ]
    close(found, torch.stack(want, dim=2))


def test_gradcheck_passes_in_both_modes(fit):
    assert torch.autograd.gradcheck(vector(fit), _leaf(LAM), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(vector(fit), _leaf(LAM), check_fwd_over_rev=True)


HOOKED = {  # torch.func, in a user's function, does not support hooks itself
    "argmin": FITS["argmin"],
    "argmin by CG": FITS["argmin by CG"],
    "root": custom_root(by_hand)(solve),
    "fixed point": custom_fixed_point(
        lambda p, *args: (lambda g: {k: p[k] - 0.01 * g[k] for k in p})(by_hand(p, *args))
    )(solve),
}


@pytest.mark.parametrize("name", HOOKED)
def test_checkpoint_around_the_call_changes_nothing(name):
    fit = HOOKED[name]
    lam = _leaf(LAM)
    value = flat(checkpoint(fit, None, X, Y, lam, use_reentrant=False)) @ C
    close(
        torch.autograd.grad(value, lam)[0], grad(lambda s: flat(reference(None, X, Y, s)) @ C)(LAM)
    )


@pytest.mark.parametrize("name", HOOKED)
def test_saved_tensor_hooks_see_and_may_replace_what_is_kept(name):
    fit = HOOKED[name]
    lam, packed = _leaf(LAM), []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.detach().numpy().copy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        value = flat(fit(None, X, Y, lam)) @ C
    (found,) = torch.autograd.grad(value, lam)
    close(found, grad(lambda s: flat(reference(None, X, Y, s)) @ C)(LAM))
    assert packed


def test_eight_threads_give_the_serial_answers(fit):
    """Reverse mode: forward mode's levels are one global counter in PyTorch itself."""
    makes = [
        TRANSFORMS["jacrev of jacrev"],
        PLAIN["double backward"],
        lambda f: lambda lam: vmap(grad(loss(f)))(torch.stack([lam, 2 * lam])),
        PLAIN["backward"],
    ]
    jobs = [(makes[i % 4], LAMS[i % 4]) for i in range(8)]
    found, errors = [None] * 8, []

    def work(i):
        try:
            for _ in range(3):
                make, lam = jobs[i]
                found[i] = make(fit)(lam)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for (make, lam), answer in zip(jobs, found, strict=True):
        close(answer, make(fit)(lam), rtol=1e-12)


# A solve inside a solve


def cubic(v, t):
    return (v - t) ** 2 / 2 + v**4 / 4  # v + v^3 = t


def cubic_root(init, t):
    v = t.clone()
    for _ in range(15):
        v = v - (v - t + v**3) / (1 + 3 * v**2)
    return v


inside = custom_argmin(cubic)(cubic_root)


def outer_objective(u, s):
    return (u - 1) ** 2 / 2 + s * inside(None, u * s) ** 2 / 2


def nested_by_newton(solver):
    def f(u, s):
        return (u - 1) ** 2 / 2 + s * solver(None, u * s) ** 2 / 2

    def run(s, steps=6):
        u = torch.ones((), dtype=D)
        for _ in range(steps):
            u = u - grad(f)(u, s) / grad(grad(f))(u, s)
        return u

    return run


@custom_argmin(outer_objective)
def nested(init, s):
    return nested_by_newton(inside)(s)


def central(s):
    run = nested_by_newton(cubic_root)
    above, here, below = run(s + 1e-4), run(s), run(s - 1e-4)
    return (above - below) / 2e-4, (above - 2 * here + below) / 1e-8


def test_an_implicit_solve_inside_the_objective_of_another_is_right():
    s = torch.tensor(0.8, dtype=D)
    first, second = central(s)
    fit = lambda s: nested(None, s)
    for found in (grad(fit)(s), jacfwd(fit)(s), jvp(fit, (s,), (torch.ones_like(s),))[1]):
        torch.testing.assert_close(found, first, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad(grad(fit))(s), second, rtol=1e-4, atol=0)
    mapped = vmap(grad(fit))(torch.stack([s, 2 * s]))
    torch.testing.assert_close(mapped, torch.stack([first, central(2 * s)[0]]), rtol=1e-6, atol=0)


def test_plain_backward_through_nested_solves_is_right():
    s = torch.tensor(0.8, dtype=D, requires_grad=True)
    (g,) = torch.autograd.grad(nested(None, s), s)
    torch.testing.assert_close(g, grad(lambda s: nested(None, s))(s.detach()))


# Norm layers. In PyTorch 2.13 a derivative of a vmapped derivative is wrong through layer, batch
# and instance norm; so is their third derivative, in plain autograd, which a second derivative of
# the solution needs; group norm has both right.

AFFINE = {
    "layer": lambda: nn.LayerNorm(4),
    "batch": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "group": lambda: nn.GroupNorm(2, 4),
}


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(2, 4), norm, nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


def _norm_problem(norm):
    torch.manual_seed(0)
    net = Net(AFFINE[norm]()).double()
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    net.requires_grad_(False)
    names = [k for k, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]
    start = torch.cat([p.detach().reshape(-1) for p in net.parameters()])

    def objective(v, x, y, centre):
        parts = torch.split(v, [s.numel() for s in shapes])
        params = {k: t.reshape(s) for k, t, s in zip(names, parts, shapes, strict=True)}
        fit = F.cross_entropy(functional_call(net, params, (x,)), y)
        return fit + 5 * ((v - centre) ** 2).sum()

    def hessian_by_rows(x, y, centre, v):
        """torch.func.hessian and jacrev(jacrev) are wrong here: a vmap between two derivatives."""
        v = v.detach().requires_grad_()
        (g,) = torch.autograd.grad(objective(v, x, y, centre), v, create_graph=True)
        return g.detach(), torch.stack([
            torch.autograd.grad(g[i], v, retain_graph=True)[0] for i in range(len(v))
        ])

    def newton(init, x, y, centre):
        v = centre
        for _ in range(12):
            g, H = hessian_by_rows(x, y, centre, v)
            if g.norm() < 1e-13:
                break
            v = v - torch.linalg.solve(H, g)
        return v

    x, y = torch.randn(3, 6, 2, dtype=D), torch.randint(2, (3, 6))
    weight = torch.linspace(-1, 1, len(start), dtype=D)

    def gradient(x, y, centre):
        """d (phi . weight)^2 / d centre; the cross derivative is -10 I."""
        v = newton(None, x, y, centre)
        _, H = hessian_by_rows(x, y, centre, v)
        return 10 * torch.linalg.solve(H, weight) * 2 * (v @ weight)

    return objective, newton, gradient, weight, start, x, y


def _conditions(objective):
    def by_vjp(v, x, y, c):
        value, pull = vjp(lambda v: objective(v, x, y, c), v)
        return pull(torch.ones_like(value))[0]

    def by_jvps(v, x, y, c):
        units = torch.eye(len(v), dtype=D).unbind()
        return torch.stack([jvp(lambda v: objective(v, x, y, c), (v,), (e,))[1] for e in units])

    mix = torch.eye(30, dtype=D) + 0.1 * torch.ones(30, 30, dtype=D).triu()
    loop = {"batching": "loop"}
    return {
        "argmin": custom_argmin(objective, **loop),
        "root of grad": custom_root(lambda v, x, y, c: grad(objective)(v, x, y, c), **loop),
        "skewed root of grad": custom_root(
            lambda v, x, y, c: mix @ grad(objective)(v, x, y, c), **loop
        ),
        "root of vjp by GMRES": custom_root(by_vjp, solver=GMRES(rtol=1e-13), **loop),
        "root of jvps": custom_root(by_jvps, **loop),
        "fixed point of grad": custom_fixed_point(
            lambda v, x, y, c: v - 0.05 * grad(objective)(v, x, y, c), **loop
        ),
    }


CASES = [
    ("layer", "argmin"),
    ("layer", "skewed root of grad"),
    ("layer", "root of vjp by GMRES"),
    ("layer", "fixed point of grad"),
    ("batch", "argmin"),
    ("group", "root of grad"),
    ("group", "root of jvps"),  # a derivative of a jvp is wrong in PyTorch through the other two
]
SECOND = [
    ("layer", "argmin", False),
    ("layer", "root of grad", True),
    ("batch", "argmin", True),
    ("group", "argmin", True),
    ("group", "root of grad", False),
]


@pytest.mark.parametrize(("norm", "name"), CASES)
def test_a_batch_of_tasks_with_an_affine_norm_layer_equals_the_loop(norm, name):
    objective, newton, gradient, weight, start, x, y = _norm_problem(norm)
    fit = _conditions(objective)[name](newton)

    def one(x, y, c):
        return (fit(None, x, y, c) @ weight) ** 2

    def batched(c):
        return vmap(one, in_dims=(0, 0, None))(x, y, c).sum()

    each = torch.stack([gradient(x[i], y[i], start) for i in range(3)])
    want = each.sum(dim=0)
    close(grad(batched)(start), want)
    c = _leaf(start)
    close(torch.autograd.grad(batched(c), c)[0], want)
    close(vmap(grad(one, argnums=2), in_dims=(0, 0, None))(x, y, start), each)
    direction = torch.cos(torch.arange(30, dtype=D))
    close(jvp(batched, (start,), (direction,))[1], want @ direction)


@pytest.mark.parametrize(("norm", "name", "batch"), SECOND)
def test_a_second_derivative_through_a_norm_layer_is_right_or_an_error(norm, name, batch):
    objective, newton, gradient, weight, start, x, y = _norm_problem(norm)
    fit = _conditions(objective)[name](newton)
    direction = torch.cos(torch.arange(30, dtype=D))

    def total(c):
        if not batch:
            return (fit(None, x[0], y[0], c) @ weight) ** 2
        one = lambda x, y: (fit(None, x, y, c) @ weight) ** 2
        return vmap(one)(x, y).sum()

    def double_backward(c):
        c = _leaf(c)
        (g,) = torch.autograd.grad(total(c), c, create_graph=True)
        return torch.autograd.grad(g @ direction, c)[0]

    tasks = range(3) if batch else range(1)
    moved = [sum(gradient(x[i], y[i], start + s * direction) for i in tasks) for s in (1e-5, -1e-5)]
    want = (moved[0] - moved[1]) / 2e-5
    refused = []
    for second in (
        double_backward,
        grad(lambda c: grad(total)(c) @ direction),
        lambda c: jvp(grad(total), (c,), (direction,))[1],
        grad(lambda c: jvp(total, (c,), (direction,))[1]),
    ):
        try:
            found = second(start)
        except hypergrad.UnsupportedOperation as error:
            refused.append(str(error))
            continue
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    assert norm != "group" or not refused
    assert all("norm" in text for text in refused)


# Captured tensors


def _ridge(scale):
    def objective(w, lam):
        return ((w - scale) ** 2).sum() / 2 + lam * (w**2).sum() / 2

    @custom_argmin(objective)
    def fit(init, lam):
        return scale.detach() / (1 + lam)

    return fit


def test_captured_leaves_and_non_leaves_are_differentiated_by_plain_backward():
    scale = torch.tensor([1.0, 2.0], dtype=D, requires_grad=True)
    lam = torch.tensor(1.0, dtype=D, requires_grad=True)
    for captured, factor in ((scale, 1.0), (scale * 3, 3.0)):
        answer = _ridge(captured)(None, lam)
        found = torch.autograd.grad(answer.sum(), (scale, lam))
        close(found[0], torch.full((2,), factor / 2, dtype=D))
        close(found[1], -factor * scale.detach().sum() / 4)
    # where nothing but the captured tensor requires grad
    answer = _ridge(scale)(None, torch.tensor(1.0, dtype=D))
    close(torch.autograd.grad(answer.sum(), scale)[0], torch.full((2,), 0.5, dtype=D))


@pytest.mark.parametrize("reduce", [False, True])
def test_captured_modules_are_differentiated_by_plain_backward(reduce):
    torch.manual_seed(0)
    net = nn.Linear(2, 2).double()
    x = torch.randn(5, 2, dtype=D)

    def objective(w, lam):
        return ((net(x) @ w - 1) ** 2).sum() / 2 + lam * (w**2).sum() / 2

    def closed(lam):
        z = net(x)
        return torch.linalg.solve(
            z.T @ z + lam * torch.eye(2, dtype=D), z.T @ torch.ones(5, dtype=D)
        )

    @custom_argmin(objective)
    def fit(init, lam):
        return closed(lam).detach()

    lam = torch.tensor(0.7, dtype=D, requires_grad=True)
    inputs = (*net.parameters(), lam)
    close(
        torch.autograd.grad((fit(None, lam) ** 3).sum(), inputs),
        torch.autograd.grad((closed(lam) ** 3).sum(), inputs),
    )


def test_a_captured_tensor_under_a_transform_is_an_error_that_names_it():
    lam = torch.tensor(1.0, dtype=D)

    def total(scale):
        return _ridge(scale)(None, lam).sum()

    scale = torch.tensor([1.0, 2.0], dtype=D)
    for derivative in (
        lambda: grad(total)(scale),
        lambda: jvp(total, (scale,), (scale,)),
        lambda: hessian(total)(scale),
        lambda: vmap(grad(total))(scale[None]),
        lambda: grad(lambda s: vmap(lambda lam: _ridge(s)(None, lam).sum())(LAM).sum())(scale),
    ):
        with pytest.raises(hypergrad.UnsupportedOperation, match="captures scale"):
            derivative()


def test_a_captured_parameter_under_a_transform_of_something_else_is_an_error_that_names_it():
    scale = torch.tensor([1.0, 2.0], dtype=D, requires_grad=True)
    fit = _ridge(scale)
    with pytest.raises(hypergrad.UnsupportedOperation, match="captures scale"):
        grad(lambda lam: fit(None, lam).sum())(torch.tensor(1.0, dtype=D))


def test_a_captured_tensor_in_forward_mode_is_an_error_that_names_it():
    with forward_ad.dual_level():
        scale = forward_ad.make_dual(torch.ones(2, dtype=D), torch.ones(2, dtype=D))
        with pytest.raises(hypergrad.UnsupportedOperation, match="captures scale"):
            _ridge(scale)(None, torch.tensor(1.0, dtype=D))


@pytest.mark.parametrize("hide", ["dict", "module", "list", "attribute"])
def test_a_captured_tensor_with_create_graph_is_an_error_that_names_it(hide):
    scale = nn.Parameter(torch.tensor([1.0, 2.0], dtype=D))
    box = {
        "dict": {"scale": scale},
        "list": [scale],
        "module": nn.ParameterDict({"scale": scale}),
        "attribute": type("Box", (), {"scale": scale}),
    }[hide]
    reach = {
        "dict": lambda: box["scale"],
        "list": lambda: box[0],
        "module": lambda: box["scale"],
        "attribute": lambda: box.scale,
    }[hide]

    def objective(w, lam):
        return ((w - reach()) ** 2).sum() / 2 + lam * (w**2).sum() / 2

    @custom_argmin(objective)
    def fit(init, lam):
        return reach().detach() / (1 + lam)

    lam = torch.tensor(1.0, dtype=D, requires_grad=True)
    value = fit(None, lam).sum()
    close(torch.autograd.grad(value, scale, retain_graph=True)[0], torch.full((2,), 0.5, dtype=D))
    with pytest.raises(hypergrad.UnsupportedOperation, match="captures"):
        torch.autograd.grad(value, lam, create_graph=True)


def test_a_batched_tensor_that_is_only_captured_is_an_error():
    lam = torch.tensor(1.0, dtype=D)
    table = {}

    def by_closure(scale):
        return _ridge(scale)(None, lam)

    def by_dict(scale):
        table["scale"] = scale

        @custom_argmin(lambda w, lam: ((w - table["scale"]) ** 2).sum() + lam * (w**2).sum())
        def fit(init, lam):
            return torch.ones(2, dtype=D) / (1 + lam)

        return fit(None, lam)

    for task in (by_closure, by_dict):
        with pytest.raises(hypergrad.UnsupportedOperation, match="captures"):
            vmap(task)(torch.ones(3, 2, dtype=D))
        with pytest.raises(hypergrad.UnsupportedOperation, match="captures"):
            vmap(vmap(task))(torch.ones(2, 3, 2, dtype=D))


def test_batched_data_that_comes_in_as_an_argument_is_right():
    @custom_argmin(lambda w, s, lam: ((w - s) ** 2).sum() / 2 + lam * (w**2).sum() / 2)
    def fit(init, s, lam):
        return s / (1 + lam)

    s = randn(3, 2)
    found = vmap(lambda s: grad(lambda lam: fit(None, s, lam).sum())(torch.ones((), dtype=D)))(s)
    close(found, -s.sum(dim=1) / 4)


# Arguments


def _pair(**keywords):
    @custom_argmin(lambda w, a, b: ((w - a) ** 2).sum() / 2 + (b * w**2).sum() / 2, **keywords)
    def fit(init, a, b):
        return a / (1 + b)

    return fit


A, B = torch.tensor([1.0, 2.0], dtype=D), torch.tensor([1.0, 3.0], dtype=D)
BY_A, BY_B = 1 / (1 + B), -A / (1 + B) ** 2


@pytest.mark.parametrize(
    ("argnums", "parts"),
    [(None, (1, 1)), (1, (1, 0)), (2, (0, 1)), ((1, 2), (1, 1)), ((2, 1), (1, 1)), ([2], (0, 1))],
)
def test_argnums_restricts_what_is_differentiated(argnums, parts):
    fit = _pair(argnums=argnums)
    want = (parts[0] * BY_A, parts[1] * BY_B)
    close(grad(lambda a, b: fit(None, a, b).sum(), argnums=(0, 1))(A, B), want)
    a, b = _leaf(A), _leaf(B)
    found = torch.autograd.grad(fit(None, a, b).sum(), (a, b), allow_unused=True)
    for g, w, used in zip(found, want, parts, strict=True):
        assert (g is None) if not used else torch.allclose(g, w)
    moved = jvp(lambda a, b: fit(None, a, b), (A, B), (torch.ones_like(A), torch.ones_like(B)))[1]
    close(moved, sum(want))


def test_argnums_of_the_initial_guess_is_refused():
    for argnums in (0, (0, 1), (1, 0)):
        with pytest.raises(hypergrad.UnsupportedOperation, match="initial guess"):
            _pair(argnums=argnums)


def test_argnums_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="positive"):
        _pair(argnums=-1)
    with pytest.raises(ValueError, match="out of range"):
        _pair(argnums=3)(None, A, B)


def test_aux_is_passed_on_without_a_gradient():
    @custom_argmin(lambda w, a: ((w - a) ** 2).sum(), has_aux=True)
    def fit(init, a):
        return a.clone(), {"twice": 2 * a, "steps": 3}

    a = _leaf(A)
    w, aux = fit(None, a)
    assert w.requires_grad
    assert not aux["twice"].requires_grad
    assert aux["steps"] == 3
    close(aux["twice"], 2 * A)
    _, aux = vmap(lambda a: (lambda w, x: (w, x["twice"]))(*fit(None, a)))(torch.stack([A, B]))
    close(aux, 2 * torch.stack([A, B]))
    with pytest.raises(hypergrad.StructureMismatch, match="has_aux"):
        custom_argmin(lambda w, a: ((w - a) ** 2).sum(), has_aux=True)(lambda i, a: a)(None, A)


def test_integers_and_none_are_constants_that_reach_everyone():
    seen = []

    @custom_argmin(
        lambda w, n, nothing, mask, a: ((w - n * a)[mask] ** 2).sum() + (w[~mask] ** 2).sum()
    )
    def fit(init, n, nothing, mask, a):
        seen.append((n, nothing, mask.dtype))
        return torch.where(mask, n * a, 0)

    mask = torch.tensor([True, False])
    a = _leaf(A)
    fit(None, torch.tensor(3), None, mask, a).sum().backward()
    assert torch.equal(a.grad, torch.tensor([3.0, 0.0], dtype=D))
    close(grad(lambda a: fit(None, 3, None, mask, a).sum())(A), torch.tensor([3.0, 0.0], dtype=D))
    assert seen[0][1] is None
    assert seen[1][0] == 3


def test_keyword_arguments_reach_the_solver_alone_and_may_not_carry_a_derivative():
    @custom_argmin(lambda w, a: ((w - a) ** 2).sum())
    def fit(init, a, *, steps=1, weight=None):
        return a * min(steps, 1)

    close(fit(None, A, steps=5), A)
    fit(None, A, weight=torch.ones(2))
    with pytest.raises(hypergrad.UnsupportedOperation, match="weight"):
        fit(None, A, weight=_leaf(A))
    with pytest.raises(hypergrad.UnsupportedOperation, match="weight"):
        grad(lambda a: fit(None, A, weight={"deep": a}).sum())(A)
    with pytest.raises(hypergrad.UnsupportedOperation, match="weight"):
        vmap(lambda a: fit(None, A, weight=a))(A[None])


@pytest.mark.parametrize(
    "context", [lambda f: f(A), lambda f: grad(lambda a: f(a).sum())(A), lambda f: vmap(f)(A[None])]
)
def test_the_solver_is_called_with_plain_detached_tensors_and_grad_mode_on(context):
    seen = []

    @custom_argmin(lambda w, a: ((w - a) ** 2).sum(), batching="loop")
    def fit(init, a):
        seen.append((type(a), a.requires_grad, a.grad_fn, torch.is_grad_enabled(), float(a.sum())))
        return a.clone()

    with torch.no_grad():
        context(lambda a: fit(torch.zeros(2, dtype=D), a))
    assert seen == [(torch.Tensor, False, None, True, 3.0)]
    fit(None, _leaf(A))
    assert seen[1][:3] == (torch.Tensor, False, None)


def test_the_callback_gets_plain_tensors_for_every_linear_solve():
    infos = []
    fit = custom_argmin(inner, callback=infos.append)(solve)

    def total(lam):
        return flat(fit(None, X, Y, lam)).sum()

    grad(total)(LAM)
    vmap(grad(total))(LAMS)
    jvp(total, (LAM,), (ONES,))
    lam = _leaf(LAM)
    total(lam).backward()
    assert len(infos) == 4
    assert [info.status.shape for info in infos] == [(), (4,), (), ()]
    for info in infos:
        assert (info.status == Status.CONVERGED).all()
        assert (info.inner_residual < 1e-8).all()
        for leaf in pytree.tree_leaves(info):
            assert type(leaf) is torch.Tensor
            assert not torch._C._functorch.is_functorch_wrapped_tensor(leaf)
            assert not leaf.requires_grad
            leaf.numpy()
    infos.clear()
    hessian(total)(LAM)
    assert len(infos) >= 2


def test_a_second_derivative_through_gauss_newton_raises():
    condition = hypergrad.GaussNewton(
        outputs=lambda w, lam: (X @ w) ** 2,
        loss=lambda z, lam: ((z - Y) ** 2).sum() / 2,
        regulariser=lambda w, lam: (lam * w**2).sum() / 2,
    )

    @custom_argmin(condition, inner_tol=None)
    def fit(init, lam):
        return torch.ones(3, dtype=D)

    def total(lam):
        return fit(None, lam).sum()

    A = (lambda J: J.T @ J)(jacrev(lambda w: (X @ w) ** 2)(ONES)) + torch.diag(LAM)
    close(grad(total)(LAM), -torch.linalg.solve(A, ONES))
    close(jvp(total, (LAM,), (ONES,))[1], -torch.linalg.solve(A, ONES).sum())
    for derivative in (
        lambda: grad(lambda s: grad(total)(s).sum())(LAM),
        lambda: hessian(total)(LAM),
        lambda: jvp(grad(total), (LAM,), (ONES,)),
        lambda: jacfwd(jacfwd(total))(LAM),
        lambda: higher(2)(lambda i, X, y, lam: {"w": fit(None, lam), "b": lam[0]})(LAM),
    ):
        with pytest.raises(hypergrad.UnsupportedOperation, match="GaussNewton"):
            derivative()


def test_gauss_newton_counts_an_output_that_depends_on_another_once():
    def dependent(w, lam):
        z = X @ w
        return z, z * z

    def separate(w, lam):
        return X @ w, (X @ w) ** 2

    def loss(z, lam):
        return ((z[0] - Y) ** 2).sum() + ((z[1] - 1) ** 2).sum()

    found = [
        hypergrad.implicit_grad(
            lambda w, lam: w.sum(),
            hypergrad.GaussNewton(outputs, loss, lambda w, lam: (lam * w**2).sum()),
            ONES,
            LAM,
            inner_tol=None,
        )
        for outputs in (dependent, separate)
    ]
    close(*found, rtol=1e-12)


# What a solver may do


def descend(init, target, lam):
    """The way most people write an inner loop, in place on the initial guess."""
    w = init.requires_grad_()
    optimiser = torch.optim.SGD([w], lr=0.4)
    for _ in range(200):
        optimiser.zero_grad()
        value = ((w - target) ** 2).sum() / 2 + lam * (w**2).sum() / 2
        value.backward()
        if value.item() < 0:
            break
        optimiser.step()
    return w


def by_scipy(init, target, lam):
    target, lam = target.numpy(), float(lam)
    found = scipy.optimize.minimize(
        lambda w: ((w - target) ** 2).sum() / 2 + lam * (w**2).sum() / 2,
        init.numpy(),
        jac=lambda w: w - target + lam * w,
        method="BFGS",
        options={"gtol": 1e-12},
    )
    return torch.from_numpy(found.x)


def by_numpy(init, target, lam):
    return torch.as_tensor(np.asarray(target) / (1 + np.asarray(lam)))


@pytest.mark.parametrize("solver", [descend, by_scipy, by_numpy])
def test_any_solver_may_be_looped_over_tasks(solver):
    fit = custom_argmin(
        lambda w, t, lam: ((w - t) ** 2).sum() / 2 + lam * (w**2).sum() / 2, batching="loop"
    )(solver)
    init, targets, lam = torch.zeros(2, dtype=D), randn(3, 2), torch.tensor(0.5, dtype=D)
    close(vmap(lambda t: fit(init, t, lam))(targets), targets / 1.5)
    found = vmap(lambda t: grad(lambda lam: fit(init, t, lam).sum())(lam))(targets)
    close(found, -targets.sum(dim=1) / 1.5**2)
    both = vmap(lambda s: vmap(lambda t: fit(init, t, s))(targets))(torch.stack([lam, lam]))
    close(both, (targets / 1.5).expand(2, 3, 2))
    lam.requires_grad_()
    (found,) = torch.autograd.grad(vmap(lambda t: fit(init, t, lam))(targets).sum(), lam)
    close(found, -targets.sum() / 1.5**2)
    assert torch.equal(init, torch.zeros(2, dtype=D))


def test_a_solver_that_cannot_be_mapped_names_the_cure():
    fit = custom_argmin(lambda w, t, lam: ((w - t) ** 2).sum() + lam * (w**2).sum())(descend)
    with pytest.raises(Exception) as error:  # noqa: PT011
        vmap(lambda t: fit(torch.zeros(2, dtype=D), t, torch.ones(())))(randn(3, 2))
    assert any("batching='loop'" in note for note in error.value.__notes__)


def test_a_solver_that_works_in_place_on_the_initial_guess_leaves_the_callers_tensor_alone():
    """The initial guess is often the centre of the proximal term too, as in iMAML."""
    target = torch.tensor([1.0, 2.0], dtype=D)

    def objective(w, centre):
        return ((w - target) ** 2).sum() + ((w - centre) ** 2).sum()

    @custom_argmin(objective)
    def fit(init, centre):
        w = init.requires_grad_()
        optimiser = torch.optim.SGD([w], lr=0.2)
        for _ in range(100):
            optimiser.zero_grad()
            objective(w, centre).backward()
            optimiser.step()
        return w

    theta = torch.zeros(2, dtype=D, requires_grad=True)
    answer = fit(theta, theta)
    assert torch.equal(theta, torch.zeros(2, dtype=D))
    close(answer, target / 2)
    close(torch.autograd.grad((answer**2).sum(), theta)[0], target / 2)
    close(grad(lambda t: (fit(t, t) ** 2).sum())(theta.detach()), target / 2)
    assert torch.equal(theta, torch.zeros(2, dtype=D))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda a: {"w": a}, "structure"),
        (lambda a: a[:1], "shape"),
        (lambda a: a.float(), "dtype"),
        (lambda a: 3.0, "must be a tensor"),
    ],
)
def test_a_solver_that_returns_another_structure_than_the_guess_is_an_error(answer, words):
    fit = custom_argmin(lambda w, a: ((w - a) ** 2).sum())(lambda init, a: answer(a))
    with pytest.raises(hypergrad.StructureMismatch, match=words):
        fit(torch.zeros(2, dtype=D), A)


def test_without_a_guess_any_structure_may_be_returned():
    @custom_argmin(lambda w, a: ((w["u"][0] - a) ** 2).sum())
    def fit(init, a):
        return {"u": (a.clone(), None, 3)}

    a = _leaf(A)
    answer = fit(None, a)
    assert answer["u"][1:] == (None, 3)
    answer["u"][0].sum().backward()
    close(a.grad, torch.ones(2, dtype=D))


def test_a_proximal_centre_that_is_captured_is_differentiated_or_named():
    """Elsewhere the gradient by the initial guess is exactly 0 where this was meant."""
    theta = torch.zeros(2, dtype=D, requires_grad=True)

    def task(theta):
        @custom_argmin(lambda w, a: ((w - a) ** 2).sum() + ((w - theta) ** 2).sum())
        def fit(init, a):
            return (a + theta.detach()) / 2

        return fit(theta, A).sum()

    close(torch.autograd.grad(task(theta), theta)[0], torch.full((2,), 0.5, dtype=D))
    with pytest.raises(hypergrad.UnsupportedOperation, match="captures theta"):
        grad(task)(theta.detach())


def test_an_argument_changed_in_place_before_the_backward_pass_is_an_error():
    a = _leaf(A)
    b = a * 1
    fit = _pair()
    value = fit(None, b, B).sum()
    with torch.no_grad():
        b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_data_that_is_captured_and_has_changed_before_the_backward_pass_is_noticed():
    data = A.clone()

    @custom_argmin(lambda w, lam: ((w - data) ** 2).sum() / 2 + lam * (w**2).sum() / 2)
    def fit(init, lam):
        return data / (1 + lam)

    lam = torch.tensor(1.0, dtype=D, requires_grad=True)
    value = fit(None, lam).sum()
    data.copy_(B * 5)  # the next batch
    with pytest.warns(hypergrad.ConvergenceWarning, match="does not solve the inner problem"):
        value.backward()


def test_a_derivative_at_a_point_that_is_no_solution_is_judged():
    fit = custom_argmin(lambda w, a: ((w - a) ** 2).sum())(lambda init, a: a + 1)
    a = _leaf(A)
    with pytest.warns(hypergrad.ConvergenceWarning, match="does not solve the inner problem"):
        fit(None, a).sum().backward()
    fit = custom_argmin(lambda w, a: ((w - a) ** 2).sum(), on_failure="raise")(lambda i, a: a + 1)
    with pytest.raises(hypergrad.NotConverged):
        grad(lambda a: fit(None, a).sum())(A)
    fit = custom_argmin(lambda w, a: ((w - a) ** 2).sum())(lambda init, a: a * torch.nan)
    with pytest.raises(hypergrad.NotFinite):
        grad(lambda a: fit(None, a).sum())(A)


def test_a_symmetric_solver_is_refused_for_a_root():
    fit = custom_root(lambda w, a: w - a, solver=CG())(lambda init, a: a.clone())
    with pytest.raises(hypergrad.UnsupportedOperation, match="symmetric"):
        fit(None, A)
    fit = custom_root(hypergrad.Root(lambda w, a: w - a, symmetric=True), solver=CG())(
        lambda init, a: a.clone()
    )
    close(grad(lambda a: fit(None, a).sum())(A), torch.ones(2, dtype=D))


# The two rules by themselves


def test_the_rules_equal_the_derivatives_of_the_decorated_solver():
    params = newton(X, Y, LAM, 12)
    cotangent = {"w": C[:3], "b": C[3]}
    want_x, want_lam = vjp(lambda X, lam: reference(None, X, Y, lam), X, LAM)[1](cotangent)
    for solver in (None, Exact(), GMRES(rtol=1e-13)):
        found = root_vjp(skewed, params, (X, Y, LAM), cotangent, solver=solver)
        close((found[0], found[2]), (want_x, want_lam))
        close(root_vjp(skewed, params, (X, Y, LAM), cotangent, argnums=3, solver=solver), want_lam)
        found = root_vjp(skewed, params, (X, Y, LAM), cotangent, argnums=(3, 1), solver=solver)
        close(found, (want_lam, want_x))
        found = root_jvp(skewed, params, (X, Y, LAM), (ONES,), argnums=(3,), solver=solver)
        want = jvp(lambda lam: reference(None, X, Y, lam), (LAM,), (ONES,))[1]
        close(found, want)
        found, info = root_jvp(
            skewed, params, (X, Y, LAM), ONES, argnums=3, solver=solver, return_info=True
        )
        close(found, want)
        assert info.success
    for argnums in (0, 4, -1):
        with pytest.raises(ValueError, match="argnums"):
            root_vjp(skewed, params, (X, Y, LAM), cotangent, argnums=argnums)
    with pytest.raises(hypergrad.StructureMismatch, match="cotangent"):
        root_vjp(skewed, params, (X, Y, LAM), C)


def test_the_rules_may_be_mapped_and_differentiated():
    fit = FITS["root"]

    def by_rule(X, lam):
        params = fit(None, X, Y, lam)
        return root_vjp(skewed, params, (X, Y, lam), {"w": C[:3], "b": C[3]}, argnums=3)

    def by_reference(X, lam):
        return vjp(lambda lam: reference(None, X, Y, lam), lam)[1]({"w": C[:3], "b": C[3]})[0]

    close(vmap(by_rule)(XS, LAMS), torch.stack([by_reference(X, s) for X, s in zip(XS, LAMS)]))  # noqa: B905
    close(jacrev(by_rule, argnums=1)(X, LAM), jacrev(by_reference, argnums=1)(X, LAM))


# torch.compile


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler's
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_breaks_its_graph_at_an_implicit_solution(backend):
    X = torch.arange(12, dtype=D).reshape(4, 3).sin()
    y = torch.arange(4, dtype=D).cos()
    inner = lambda w, lam: ((X @ w - y) ** 2).sum() / 2 + (lam * w**2).sum() / 2
    outer = lambda w, lam: (w**2).sum()

    @custom_argmin(inner)
    def fit(init, lam):
        return torch.linalg.solve(X.T @ X + lam.diag(), X.T @ y)

    def by_decorator(lam):
        return outer(fit(None, 2 * lam), lam)

    def once(lam):
        return 2 * hypergrad.implicit_grad(outer, inner, fit(None, 2 * lam).detach(), 2 * lam)

    def closed_form(lam):
        return outer(torch.linalg.solve(X.T @ X + 2 * lam.diag(), X.T @ y), lam)

    lam = torch.linspace(0.5, 1.5, 3, dtype=D, requires_grad=True)
    want = torch.autograd.grad(closed_form(lam), lam)[0]
    compiled = torch.compile(by_decorator, backend=backend)
    close(torch.autograd.grad(compiled(lam), lam)[0], want)
    close(torch.compile(once, backend=backend)(lam.detach()), want)
