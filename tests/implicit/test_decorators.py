"""What the decorators take and call: arguments, solvers, callbacks."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, hessian, jvp, vmap
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad import Status, custom_argmin
from tests.quartic import LAM, LAMS, ONES, D, X, Y, close, flat, inner, leaf, solve

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


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
    a, b = leaf(A), leaf(B)
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

    a = leaf(A)
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
    a = leaf(A)
    fit(None, torch.tensor(3), None, mask, a).sum().backward()
    assert torch.equal(a.grad, torch.tensor([3.0, 0.0], dtype=D))
    close(grad(lambda a: fit(None, 3, None, mask, a).sum())(A), torch.tensor([3.0, 0.0], dtype=D))
    assert seen[0][1] is None
    assert seen[1][0] == 3


def test_the_callback_gets_plain_tensors_for_every_linear_solve():
    infos = []
    fit = custom_argmin(inner, callback=infos.append)(solve)

    def total(lam):
        return flat(fit(None, X, Y, lam)).sum()

    grad(total)(LAM)
    vmap(grad(total))(LAMS)
    jvp(total, (LAM,), (ONES,))
    lam = leaf(LAM)
    total(lam).backward()
    assert len(infos) == 4
    assert [info.status.shape for info in infos] == [(), (4,), (), ()]
    for info in infos:
        assert (info.status == Status.CONVERGED).all()
        assert (info.inner_residual < 1e-8).all()
        for part in pytree.tree_leaves(info):
            assert type(part) is torch.Tensor
            assert not torch._C._functorch.is_functorch_wrapped_tensor(part)
            assert not part.requires_grad
            part.numpy()
    infos.clear()
    hessian(total)(LAM)
    assert len(infos) >= 2


# What a solver may do


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
