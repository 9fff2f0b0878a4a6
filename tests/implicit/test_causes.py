"""A message names the cause: of NaN, of code that leaves PyTorch, of a derivative that is lost."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import hypergrad
from hypergrad import CG, GMRES, NotFinite, StructureMismatch, UnsupportedOperation, implicit_grad

D = torch.float64
W, H = torch.tensor([0.5, -1.0, 2.0], dtype=D), torch.tensor(0.5, dtype=D)


def outer(w, h):
    return ((w - 1) ** 2).sum()


def bowl(w, h):
    return ((w - h) ** 2).sum()


def entrances(condition):
    fit = hypergrad.custom_root(condition)(lambda init, h: W)
    return (
        lambda: implicit_grad(outer, condition, W, H),
        lambda: torch.func.grad(lambda h: fit(None, h).sum())(H),
        lambda: hypergrad.root_vjp(condition, W, (H,), W),
    )


def test_nan_of_a_prox_is_not_blamed_on_the_data():
    broken = hypergrad.ProximalGradient(bowl, lambda v, step, h: v / (v - v), 0.1)
    project = hypergrad.ProjectedGradient(bowl, lambda v, h: v + (-v.abs() - 1).sqrt(), 0.1)
    for condition, name in ((broken, "prox"), (project, "project")):
        for call in entrances(condition):
            with pytest.raises(NotFinite, match=rf"what {name} returned .*itself is at fault") as e:
                call()
            assert "data" not in str(e.value)


def test_nan_of_the_smooth_part_is_no_fault_of_the_prox():
    prox = lambda v, step, h: hypergrad.prox.l1(v, step, h)
    log = hypergrad.ProximalGradient(lambda w, h: (w.log() * h).sum(), prox, 0.1)
    for call in entrances(log):
        with pytest.raises(NotFinite, match=r"the smooth part of the inner problem holds"):
            call()


@pytest.mark.parametrize("mean", [lambda r: (r**2).mean(), lambda r: F.mse_loss(r, r.detach())])
def test_a_mean_over_an_empty_batch_is_named(mean):
    x, y = torch.zeros(0, 3, dtype=D), torch.zeros(0, dtype=D)
    empty = lambda w, h: mean(x @ w - y) + h * (w**2).sum()
    for call in (
        lambda: implicit_grad(outer, empty, W, H),
        lambda: implicit_grad(empty, bowl, W, H),
        lambda: torch.func.grad(
            lambda h: hypergrad.custom_argmin(empty)(lambda init, h: W)(None, h).sum()
        )(H),
    ):
        with pytest.raises(NotFinite, match=r"mean over nothing.*is a batch empty"):
            call()
    with pytest.raises(NotFinite, match=r"empty batch"):
        hypergrad.unrolled_grad(empty, lambda w, h: w * h, W, H, steps=2)


def test_an_infinite_derivative_is_not_blamed_on_the_step():
    def adam(w, h):
        gradient = torch.func.grad(bowl)(w, h)
        return w - 0.1 * gradient / ((gradient**2).sqrt() + 1e-8)

    at = torch.full((3,), 0.5, dtype=D)  # where the gradient is zero
    for call in (
        lambda: implicit_grad(outer, hypergrad.FixedPoint(adam), at, H),
        lambda: hypergrad.unrolled_grad(outer, adam, at, H, steps=2),
        lambda: hypergrad.unrolled_grad(outer, adam, at, H, steps=2, mode="forward"),
        lambda: implicit_grad(lambda w, h: (w - 0.5).square().sum().sqrt(), bowl, at, H),
    ):
        with pytest.raises(NotFinite, match=r"infinite derivative.*sqrt\(v \+ eps\)") as caught:
            call()
        assert not re.search("step size|the data|smaller", str(caught.value))


def test_residuals_of_least_squares_as_a_root_name_the_cure():
    x = torch.linspace(0, 1, 9)
    residuals = hypergrad.Root(lambda p, y: p[0] * x + p[1] - y)
    words = r"shape \(9,\).*least-squares.*Minimum.*GaussNewton"
    with pytest.raises(StructureMismatch, match=words):
        implicit_grad(lambda p, y: p.sum(), residuals, torch.tensor([1.0, 0.0]), x.clone())


# Code that leaves PyTorch


class OfNumpy(torch.autograd.Function):
    """``x^2 - p`` and its derivatives by NumPy."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.save_for_backward(x, p)
        return torch.from_numpy(x.numpy() ** 2 - p.numpy())

    @staticmethod
    def backward(ctx, g):
        x, _ = ctx.saved_tensors
        return torch.from_numpy(2 * x.numpy() * g.numpy()), torch.from_numpy(-g.numpy())


@pytest.mark.parametrize("solver", [None, GMRES(), hypergrad.Exact()], ids=repr)
def test_a_residual_of_numpys_is_called_row_by_row(solver):
    p = torch.tensor([4.0, 9.0], dtype=D)
    x, truth = p.sqrt(), 0.5 / p.sqrt()
    root = hypergrad.Root(OfNumpy.apply)
    hypergradient = implicit_grad(lambda x, p: x.sum(), root, x, p, solver=solver)
    torch.testing.assert_close(hypergradient, truth)
    leaf = p.clone().requires_grad_()
    hypergrad.custom_root(root, solver=solver)(lambda init, p: p.sqrt())(
        None, leaf
    ).sum().backward()
    torch.testing.assert_close(leaf.grad, truth)


def test_a_preconditioner_of_numpys_is_called_row_by_row_in_a_jacobian():
    A = torch.diag(torch.arange(1.0, 7.0, dtype=D)) + 0.1
    inverse = np.linalg.inv(A.numpy())
    solver = CG(preconditioner=lambda v: torch.from_numpy(inverse @ v.numpy()))
    F = hypergrad.Root(lambda u, c: A @ u - c, symmetric=True)
    layer = hypergrad.custom_root(F, solver=solver)(lambda init, c: torch.linalg.solve(A, c))
    found = torch.func.jacrev(lambda c: layer(None, c))(torch.ones(6, dtype=D))
    torch.testing.assert_close(found, torch.linalg.inv(A))
    words = r"leaves PyTorch.*one call of hypergrad for each task"
    with pytest.raises(UnsupportedOperation, match=words):
        torch.func.vmap(
            lambda c: implicit_grad(
                lambda u, c: u.sum(), F, torch.linalg.solve(A, c), c, solver=solver
            )
        )(torch.ones(2, 6, dtype=D))


@pytest.mark.parametrize("solver", [CG(), hypergrad.Exact(), hypergrad.Auto()], ids=repr)
@pytest.mark.parametrize("how", ["numpy", "autograd"])
def test_a_product_may_leave_pytorch_or_take_derivatives_itself(how, solver):
    A = torch.diag(torch.arange(1.0, 7.0, dtype=D)) + 0.1

    def by_autograd(v):
        w = torch.zeros(6, dtype=D).requires_grad_()
        (gradient,) = torch.autograd.grad(w @ A @ w / 2, w, create_graph=True)
        return torch.autograd.grad(gradient, w, v)[0]

    matvec = by_autograd if how == "autograd" else lambda v: torch.from_numpy(A.numpy() @ v.numpy())
    with torch.no_grad():
        x, info = solver.solve(matvec, torch.ones(6, dtype=D))
    assert info.success
    torch.testing.assert_close(x, torch.linalg.solve(A, torch.ones(6, dtype=D)), rtol=1e-5, atol=0)
    assert not x.requires_grad


# Steps of an optimiser of PyTorch


@pytest.mark.parametrize("cut", [torch.clone, torch.detach], ids=["clone", "detach"])
def test_a_step_of_an_optimiser_of_pytorch_is_an_error_with_the_cure(cut):
    def step(w, h):
        w = cut(w).requires_grad_()
        optimiser = torch.optim.SGD([w], lr=0.1)
        bowl(w, h.detach()).backward()
        optimiser.step()
        return w

    with pytest.raises(UnsupportedOperation, match=r"torch\.optim.*implicit_grad"):
        hypergrad.unrolled_grad(lambda w, h: (w * h).sum(), step, W.clone(), H, steps=2)
