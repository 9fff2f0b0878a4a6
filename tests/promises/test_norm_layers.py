"""Tasks and second derivatives through norm layers, which PyTorch itself has wrong in places.

In PyTorch 2.13 a derivative of a vmapped derivative is wrong through layer, batch and instance
norm; so is their third derivative, in plain autograd, which a second derivative of the solution
needs; group norm has both right.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn import functional as F

import hypergrad
from hypergrad import GMRES, custom_argmin, custom_fixed_point, custom_root
from tests.quartic import D, close, leaf

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

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
    c = leaf(start)
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
        c = leaf(c)
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
