"""Situations that users bring: right against an independent truth, and nothing is said."""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref

import pytest
import scipy.linalg
import torch
from sklearn.linear_model import Lasso
from sklearn.svm import SVC
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from hypergrad import (
    CG,
    ProjectedGradient,
    ProximalGradient,
    Root,
    custom_fixed_point,
    custom_root,
    implicit_grad,
    projections,
    prox,
)
from tests import problems

D = torch.float64
DTYPES = pytest.mark.parametrize("dtype", [D, torch.float32], ids=str)
# torch.func.jvp compiles its formulas with torch.jit when it is first used.
JIT = ".torch.jit.script. is deprecated"
pytestmark = pytest.mark.filterwarnings(f"ignore:{JIT}")


@pytest.fixture(autouse=True)
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", JIT)
        yield


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def differences(function, point, step=1e-5):
    """Central differences of a function with respect to every entry of `point`."""
    slopes = torch.zeros_like(point)
    for k in range(point.numel()):
        moved = torch.zeros_like(point)
        moved.view(-1)[k] = step
        slopes.view(-1)[k] = (function(point + moved) - function(point - moved)) / (2 * step)
    return slopes


def close(found, want, rtol=1e-6):
    error = float((found.to(D) - want.to(D)).norm() / want.to(D).norm())
    assert error < rtol, error


# Optimal transport, control, games


def test_sinkhorn_with_its_hessian():
    x, y = randn(4, 2, seed=1), randn(5, 2, seed=2)
    a, b = torch.full((4,), 0.25, dtype=D), torch.full((5,), 0.2, dtype=D)

    def cost_of(f, x):
        cost = ((x[:, None] - y[None]) ** 2).sum(-1)
        g = -torch.logsumexp(f[:, None] - cost + a.log()[:, None], 0)
        plan = (f[:, None] + g[None] - cost).exp() * a[:, None] * b[None]
        return (plan * cost).sum()

    def step(f, x):
        """A round of Sinkhorn on the first potential, which is known up to a constant."""
        cost = ((x[:, None] - y[None]) ** 2).sum(-1)
        g = -torch.logsumexp(f[:, None] - cost + a.log()[:, None], 0)
        f = -torch.logsumexp(g[None] - cost + b.log()[None], 1)
        return f - f.mean()

    def iterate(f, x, steps=80):
        for _ in range(steps):
            f = step(f, x)
        return f

    solve = custom_fixed_point(step)(iterate)
    zero = torch.zeros(4, dtype=D)
    unrolled = lambda x: cost_of(iterate(zero, x, 40), x)
    close(grad(lambda x: cost_of(solve(zero, x), x))(x), jacobian(unrolled, x))
    found = torch.func.hessian(lambda x: cost_of(solve(zero, x), x))(x)
    close(found, hessian(unrolled, x), 1e-5)


def test_lyapunov_and_riccati():
    n, P0 = 3, torch.zeros(3, 3, dtype=D)
    A, B, C = randn(n, n, seed=3), randn(n, n, seed=4), randn(n, n, seed=5)
    A = A - 4 * torch.eye(n, dtype=D)
    Q = C @ C.T + torch.eye(n, dtype=D)
    weights = randn(n, n, seed=6)

    @custom_root(lambda P, A: A @ P + P @ A.T + Q)
    def lyapunov(_, A):
        return torch.tensor(scipy.linalg.solve_continuous_lyapunov(A.numpy(), -Q.numpy()))

    def by_kronecker(A):
        eye = torch.eye(n, dtype=D)
        both = torch.kron(A, eye) + torch.kron(eye, A)
        return (weights.reshape(-1) * torch.linalg.solve(both, -Q.reshape(-1))).sum()

    found = grad(lambda A: (weights * lyapunov(P0, A)).sum())(A)
    close(found, grad(by_kronecker)(A))

    @custom_root(lambda P, A, B: A.T @ P + P @ A - P @ B @ B.T @ P + Q)
    def riccati(_, A, B):
        R = torch.eye(n).double().numpy()
        return torch.tensor(scipy.linalg.solve_continuous_are(A.numpy(), B.numpy(), Q.numpy(), R))

    for k, tensor in enumerate((A, B)):
        value = lambda X, k=k: (weights * riccati(P0, *((X, B) if k == 0 else (A, X)))).sum()
        close(grad(value)(tensor), differences(value, tensor))


def test_a_game_of_two_players():
    A, B, cross = (randn(3, 3, seed=s) for s in (7, 8, 9))
    A, B = A @ A.T + torch.eye(3, dtype=D), B @ B.T + torch.eye(3, dtype=D)
    theta, target = randn(6, seed=10), randn(6, seed=11)

    def both(players, theta):
        """Each player's own gradient: x.Ax/2 + x.Cy - a.x and y.By/2 - y.C'x - b.y."""
        x, y = players
        return A @ x + cross @ y - theta[:3], B @ y - cross.T @ x - theta[3:]

    K = torch.cat([torch.cat([A, cross], 1), torch.cat([-cross.T, B], 1)])
    z = torch.linalg.solve(K, theta)
    outer = lambda players, theta: (torch.cat(players) - target).square().sum() / 2
    hypergradient = implicit_grad(outer, Root(both), (z[:3], z[3:]), theta)
    close(hypergradient, torch.linalg.solve(K.T, z - target), 1e-9)


# Constraints and penalties


def simplex(v):
    """The projection by sorting."""
    u = v.sort(descending=True).values
    k = torch.arange(1, len(v) + 1, dtype=v.dtype)
    shift = (u.cumsum(0) - 1) / k
    return (v - shift[int((u > shift).sum()) - 1]).clamp(min=0)


def test_a_projection_that_is_itself_a_decorated_solver():
    theta, target = randn(6, seed=12), randn(6, seed=13)

    @custom_root(lambda w, v: w - projections.simplex(v))
    def project(_, v):
        return simplex(v)

    curvature = torch.linspace(1, 3, 6, dtype=D)
    step = lambda w, theta: project(w.detach(), w - (curvature * w - theta) / 4)

    def iterate(w, theta):
        for _ in range(300):
            w = simplex(w - (curvature * w - theta) / 4)
        return w

    solve = custom_fixed_point(step)(iterate)
    start = torch.full((6,), 1 / 6, dtype=D)
    value = lambda theta: (solve(start, theta) - target).square().sum()
    close(
        grad(value)(theta),
        differences(lambda t: (iterate(start, t) - target).square().sum(), theta),
    )


def test_a_support_vector_machine_solved_by_scikit_learn():
    X = randn(30, 3, seed=14)
    y = (X[:, 0] + 0.5 * randn(30, seed=15)).sign()
    probe = randn(4, 3, seed=16)
    bound = 2.0

    def kernel(U, V, gamma):
        return (-gamma * ((U[:, None] - V[None]) ** 2).sum(-1)).exp()

    def fit(gamma):
        machine = SVC(C=bound, kernel="precomputed", tol=1e-12)
        machine.fit(kernel(X, X, gamma).numpy(), y.numpy())
        alpha = torch.zeros(30, dtype=D)
        alpha[torch.tensor(machine.support_, dtype=torch.long)] = torch.tensor(
            machine.dual_coef_[0]
        ).abs()
        return alpha

    def dual(alpha, gamma):
        signed = alpha * y
        return signed @ kernel(X, X, gamma) @ signed / 2 - alpha.sum()

    inner = ProjectedGradient(
        dual, lambda v, _: projections.box_section(v, 0.0, bound, y, 0.0), step_size=0.1
    )
    outer = lambda alpha, gamma: (kernel(probe, X, gamma) @ (alpha * y)).square().sum()
    gamma = torch.tensor(0.5, dtype=D)
    alpha = fit(gamma)
    free = (alpha > 0) & (alpha < bound)
    fixed = torch.where(free, 0.0, alpha)

    def by_conditions(gamma):
        """Those strictly between the bounds, by a linear system; libsvm knows six digits."""
        K, one = kernel(X, X, gamma) * y[:, None] * y, y[free][:, None]
        zero = torch.zeros(1, 1, dtype=D)
        left = torch.cat([torch.cat([K[free][:, free], one], 1), torch.cat([one.T, zero], 1)])
        right = torch.cat([1 - (K @ fixed)[free], -(y @ fixed)[None]])
        return fixed.masked_scatter(free, torch.linalg.solve(left, right)[:-1])

    assert (by_conditions(gamma) - alpha).abs().max() < 1e-5
    want = grad(lambda gamma: outer(by_conditions(gamma), gamma))(gamma)
    close(implicit_grad(outer, inner, alpha, gamma), want, 1e-4)


def test_total_variation():
    y = torch.cat([randn(6, seed=17) + 4, randn(6, seed=18) - 4, randn(6, seed=19)])
    lam, target = torch.tensor(1.5, dtype=D), randn(18, seed=20)
    differ = torch.diff(torch.eye(18, dtype=D), dim=0)
    dual = lambda u, lam: (y - differ.T @ u).square().sum() / 2
    project = lambda v, lam: v.clamp(-lam, lam)
    u = torch.zeros(17, dtype=D)
    for _ in range(20_000):
        u = project(u + differ @ (y - differ.T @ u) / 4, lam)
    x = y - differ.T @ u
    # A jump where the dual is at its bound; x is constant between, at the mean plus what lam pulls.
    at = (u.abs() > lam - 1e-9).nonzero()[:, 0].tolist()
    pull = torch.zeros(18, dtype=D)
    for start, end in itertools.pairwise([0, *[k + 1 for k in at], 18]):
        ends = (u[end - 1].sign() if end < 18 else 0) - (u[start - 1].sign() if start else 0)
        pull[start:end] = ends / (end - start)
    outer = lambda u, lam: (y - differ.T @ u - target).square().sum() / 2
    hypergradient = implicit_grad(outer, ProjectedGradient(dual, project, step_size=0.25), u, lam)
    close(hypergradient, (x - target) @ pull)


def test_an_admm_layer():
    A = randn(6, 4, seed=21)
    H, c, b = A.T @ A + torch.eye(4, dtype=D), randn(4, seed=22), randn(4, seed=23)
    inverse = torch.linalg.inv(H + torch.eye(4, dtype=D))

    def step(state, c):
        """ADMM for x.Hx/2 + c.x with 0 <= x; the state is what z and the multiplier come from."""
        z = state.clamp(min=0)
        dual = state - z
        x = inverse @ (z - dual - c)
        return x + dual

    def iterate(state, c):
        for _ in range(2000):
            state = step(state, c)
        return state

    solve = custom_fixed_point(step)(iterate)
    c = 3 * c
    value = lambda c: b @ solve(torch.zeros(4, dtype=D), c).clamp(min=0)
    free = iterate(torch.zeros(4, dtype=D), c) > 0
    assert 0 < int(free.sum()) < 4
    want = torch.zeros(4, dtype=D)
    want[free] = -torch.linalg.solve(H[free][:, free], b[free])
    close(grad(value)(c), want)


def test_a_weighted_lasso_of_5000_features():
    X, noise = randn(60, 5000, seed=24) / 60**0.5, randn(60, seed=25)
    y = X[:, :5] @ torch.ones(5, dtype=D) * 3 + 0.1 * noise
    weights = 0.3 + 0.1 * torch.rand(5000, dtype=D, generator=torch.Generator().manual_seed(26))
    scaled = (X / weights).numpy()
    machine = Lasso(alpha=1 / 60, fit_intercept=False, tol=1e-14, max_iter=100_000)
    w = torch.tensor(machine.fit(scaled, y.numpy()).coef_) / weights
    on = w != 0
    assert 3 <= int(on.sum()) < 60
    X_val = randn(40, 5000, seed=27)
    target = X_val[:, :5] @ torch.ones(5, dtype=D) * 3
    inner = ProximalGradient(
        lambda w, h: (X @ w - y).square().sum() / 2,
        lambda v, step, h: prox.l1(v, step, h),
        step_size=0.01,
    )
    outer = lambda w, h: (X_val @ w - target).square().mean() / 2
    hypergradient = implicit_grad(outer, inner, w, weights)
    gram = X[:, on].T @ X[:, on]
    slope = X_val[:, on].T @ (X_val @ w - target) / 40
    want = torch.zeros_like(weights)
    want[on] = -w[on].sign() * torch.linalg.solve(gram, slope)
    close(hypergradient, want, 1e-5)


# Many unknowns, many roots, many calls


def test_a_million_unknowns_in_float64():
    n = 10**6
    a, c = torch.linspace(1, 10, n, dtype=D), torch.linspace(-1, 1, n, dtype=D)
    inner = lambda w, t: (a * w * w).sum() / 2 - t * (c @ w)
    hypergradient = implicit_grad(
        lambda w, t: w.square().sum() / 2, inner, 2 * c / a, torch.tensor(2.0, dtype=D)
    )
    close(hypergradient, (c / a) @ (2 * c / a), 1e-5)


def test_20_000_roots_in_one_batch():
    t = torch.linspace(-2, 2, 20_000, dtype=D)

    @custom_root(lambda x, t: x**3 + x - t)
    def cubic(x, t):
        for _ in range(50):
            x = x - (x**3 + x - t) / (3 * x**2 + 1)
        return x

    x = cubic(torch.zeros_like(t), t)
    one = lambda t: grad(lambda t: cubic(torch.zeros_like(t), t))(t)
    torch.testing.assert_close(vmap(one)(t), 1 / (3 * x**2 + 1))


def test_500_calls_leave_nothing_behind():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = randn(10, 3), randn(10, 1, seed=1)
    outer, inner = ridge(net, (x,), y, y + 1)
    params, h = minimum(inner, net), torch.tensor(0.0, dtype=D)

    def count():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    kept = []
    for k in range(500):
        answer, info = implicit_grad(outer, inner, params, h, solver=CG(), return_info=True)
        kept.append(weakref.ref(info.solution["0.weight"]))
        if k == 20:
            before = count()
    del answer, info
    assert count() <= before
    assert all(ref() is None for ref in kept)


# Networks


def ridge(net, inputs, y, y_val, decay=0.3):
    """Fit `y` under a penalty around zero, whose strength is the hyperparameter; then `y_val`."""

    def call(p):
        out = functional_call(net, p, inputs)
        return (out[0] if isinstance(out, tuple) else out).reshape(y.shape)

    def inner(p, h):
        return (call(p) - y).square().mean() + decay * h.exp() * sum(
            q.square().sum() for q in p.values()
        )

    return lambda p, h: (call(p) - y_val).square().mean(), inner


def flatten(p):
    return torch.cat([q.detach().reshape(-1) for q in p.values()])


def like(p, vector):
    parts = torch.split(vector, [q.numel() for q in p.values()])
    return {k: part.reshape(q.shape) for (k, q), part in zip(p.items(), parts, strict=True)}


def minimum(inner, net, h=None):
    """The minimum that is reached from the start of the network."""
    p = {k: v.detach() for k, v in net.named_parameters()}
    h = torch.tensor(0.0, dtype=D) if h is None else h
    return like(p, problems.minimum(lambda w: inner(like(p, w), h), flatten(p)))


def by_hand(outer, inner, p, h):
    """The implicit formula with PyTorch's own double backward, densely."""
    on_vectors = lambda loss: lambda w, h: loss(like(p, w), h)
    return problems.dense_hypergradient(on_vectors(inner), on_vectors(outer), flatten(p), h)


def cast(tree, dtype):
    return {k: v.to(dtype) for k, v in tree.items()}


@DTYPES
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=lambda kind: kind.__name__)
def test_recurrent_networks(kind, dtype):
    torch.manual_seed(0)
    net = kind(2, 3, batch_first=True).double()
    x, y = randn(6, 4, 2, seed=30), randn(6, 4, 3, seed=31)
    outer, inner = ridge(net, (x,), y, y.flip(0))
    h = torch.tensor(-2.0, dtype=D)
    p = minimum(inner, net, h)
    want = by_hand(outer, inner, p, h)
    net = net.to(dtype)
    outer, inner = ridge(net, (x.to(dtype),), y.to(dtype), y.flip(0).to(dtype))
    hypergradient = implicit_grad(outer, inner, cast(p, dtype), h.to(dtype))
    close(hypergradient, want, 1e-6 if dtype == D else 1e-2)


def test_an_ensemble_by_stack_module_state():
    nets = []
    for seed in range(3):
        torch.manual_seed(seed)
        nets.append(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double())
    x, y = randn(12, 3, seed=32), randn(12, 1, seed=33)
    h = torch.tensor([-1.0, -0.5, 0.0], dtype=D)
    outer, inner = ridge(nets[0], (x,), y, y + 1)
    solved = [minimum(inner, net, one) for net, one in zip(nets, h, strict=True)]
    for net, p in zip(nets, solved, strict=True):
        net.load_state_dict(p)
    stacked, _ = stack_module_state(nets)
    for solver in (None, CG()):
        found = vmap(lambda p, h, s=solver: implicit_grad(outer, inner, p, h, solver=s))(stacked, h)
        for k, p in enumerate(solved):
            close(found[k], by_hand(outer, inner, p, h[k]), 1e-5)


@DTYPES
def test_lora_by_hand(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x, y = randn(15, 4, seed=34), randn(15, 1, seed=35)
    frozen = {k: v.detach() for k, v in net.named_parameters()}
    low = nn.ParameterDict({"down": randn(2, 4, seed=36), "up": randn(6, 2, seed=37)})

    def losses(x, y, frozen):
        def call(p):
            weight = frozen["0.weight"] + p["up"] @ p["down"]
            return functional_call(net, {**frozen, "0.weight": weight}, (x,))

        def inner(p, h):
            return (call(p) - y).square().mean() + h.exp() * sum(
                q.square().sum() for q in p.values()
            )

        return lambda p, h: (call(p) - y.flip(0)).square().mean(), inner

    outer, inner = losses(x, y, frozen)
    # The penalty leaves a rotation of the two factors free; a third term fixes it.
    fixed = lambda inner: (
        lambda p, h: inner(p, h) + 0.1 * (p["down"] - torch.eye(2, 4).to(p["down"])).square().sum()
    )
    h = torch.tensor(-2.0, dtype=D)
    p = minimum(fixed(inner), low, h)
    want = by_hand(outer, fixed(inner), p, h)
    net.to(dtype)
    outer, inner = losses(x.to(dtype), y.to(dtype), cast(frozen, dtype))
    hypergradient = implicit_grad(outer, fixed(inner), cast(p, dtype), h.to(dtype))
    close(hypergradient, want, 1e-6 if dtype == D else 1e-2)


@pytest.mark.parametrize("reentrant", [False])
def test_checkpointing(reentrant):
    torch.manual_seed(2)

    class Checkpointed(nn.Module):
        saves = False

        def __init__(self):
            super().__init__()
            self.inside, self.last = nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, 1)

        def forward(self, x):
            if not self.saves:  # PyTorch alone computes it again with the module's own numbers
                return self.last(self.inside(x))
            return self.last(checkpoint(self.inside, x, use_reentrant=reentrant))

    net = Checkpointed().double()
    x, y = randn(12, 3, seed=38), randn(12, 1, seed=39)
    outer, inner = ridge(net, (x,), y, y.flip(0))
    p, h = minimum(inner, net), torch.tensor(0.0, dtype=D)
    want = by_hand(outer, inner, p, h)
    net.saves = True
    for solver in (None, CG()):
        close(implicit_grad(outer, inner, p, h, solver=solver), want, 1e-5)


def test_autocast():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x, y = randn(40, 3, seed=40), randn(40, 1, seed=41)
    outer, inner = ridge(net, (x,), y, y + 1)
    p, h = minimum(inner, net), torch.tensor(0.0, dtype=D)
    want = by_hand(outer, inner, p, h)
    net = net.float()
    outer, inner = ridge(net, (x.float(),), y.float(), y.float() + 1)
    with torch.autocast("cpu", torch.bfloat16):
        # The inner solution is known to the precision of the losses.
        hypergradient = implicit_grad(
            outer, inner, cast(p, torch.float32), h.float(), inner_tol=0.05
        )
    assert hypergradient.dtype == torch.float32
    close(hypergradient, want, 0.05)
