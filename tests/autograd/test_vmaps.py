"""`implicit_grad` under the caller's vmaps, which it leaves to work on plain batches.

Each test holds the batch against a loop over the tasks, on a problem whose answer is known:
``inner = ||w - c||^2 / 2 + lam ||w||^2 / 2``, so ``w = c / (1 + lam)``, and with the outer loss
``t . w`` the hypergradient is ``-t . c / (1 + lam)^2``.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from hypergrad import (
    CG,
    GMRES,
    MINRES,
    ConvergenceWarning,
    Exact,
    Root,
    UnsupportedOperation,
    custom_argmin,
    implicit_grad,
)
from hypergrad.inner_solvers import LBFGS, GradientDescent, NewtonCG

D = torch.float64


def inner(c):
    return lambda w, lam: ((w - c) ** 2).sum() / 2 + lam * (w**2).sum() / 2


def outer(t):
    return lambda w, lam: t @ w


def exact(c, t, lam):
    return -(c * t).sum(-1) / (1 + lam) ** 2


def drawn(*shape):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(0))


def hypergradient(c, t, lam, **options):
    w = c / (1 + lam)
    return implicit_grad(outer(t), inner(c), w, lam, solver=CG(rtol=1e-12), **options)


def test_batches_at_other_places_and_levels_that_batch_other_arguments():
    c, t, lam = drawn(4, 3), drawn(4, 5), drawn(3).exp()
    found = vmap(
        lambda lam, c: vmap(lambda t: hypergradient(c, t, lam), in_dims=1)(t), in_dims=(0, 1)
    )(lam, c)
    torch.testing.assert_close(found, exact(c.T[:, None], t.T[None], lam[:, None]))


def test_three_levels_the_middle_of_which_batches_nothing_that_is_used():
    c, t, lam = drawn(2, 4), drawn(3, 4), torch.tensor(0.5, dtype=D)
    found = vmap(
        lambda c: vmap(lambda _: vmap(lambda t: hypergradient(c, t, lam))(t))(torch.zeros(5))
    )(c)
    expected = exact(c[:, None, None], t[None, None], lam).expand(2, 5, 3)
    torch.testing.assert_close(found, expected)


def test_the_arguments_may_be_the_same_for_all_tasks():
    c, t, lam = drawn(4), drawn(3, 4), torch.tensor(0.5, dtype=D)
    found, info = vmap(lambda t: hypergradient(c, t, lam, return_info=True))(t)
    torch.testing.assert_close(found, exact(c, t, lam))
    torch.testing.assert_close(info.solution, t / (1 + lam))
    torch.testing.assert_close(info.outer_value, t @ c / (1 + lam))
    assert info.status.shape == (3,)
    assert info.eigenvalues.shape == (3, 2)


def test_the_warm_start_of_each_task_is_its_own():
    c, t, lam = drawn(3, 4), drawn(3, 4), torch.tensor(0.5, dtype=D)
    _, info = vmap(lambda c, t: hypergradient(c, t, lam, return_info=True))(c, t)
    _, again = vmap(
        lambda c, t, x0: hypergradient(c, t, lam, return_info=True, x0=x0),
    )(c, t, info.solution)
    assert again.iterations.tolist() == [0, 0, 0]


def test_inference_mode_and_no_grad():
    c, t, lam = drawn(3, 4), drawn(3, 4), torch.tensor(0.5, dtype=D)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = vmap(lambda c, t: hypergradient(c, t, lam))(c, t)
        torch.testing.assert_close(found.clone(), exact(c, t, lam))


def test_an_integer_argument_is_copied_and_the_callers_stays():
    count = torch.tensor([[1, 2], [3, 4], [5, 6]])

    def one(count, c):
        def changed(w, h):
            h["count"].add_(1)
            return inner(c)(w, h["lam"])

        return implicit_grad(
            outer(torch.ones(4, dtype=D)),
            changed,
            c / 1.5,
            {"lam": torch.tensor(0.5, dtype=D), "count": count},
        )

    with pytest.raises(Exception, match=r"count.*in place"):
        vmap(one)(count, drawn(3, 4))
    assert count.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_a_wrong_number_in_one_task_is_named_with_the_others_left_alone():
    c, t, lam = drawn(5, 4), drawn(5, 4), torch.tensor(0.5, dtype=D)
    c[2] = torch.nan
    with pytest.raises(Exception, match=r"1 of 5 tasks: params holds NaN"):
        vmap(lambda c, t: hypergradient(c, t, lam))(c, t)
    found = vmap(lambda c, t: hypergradient(c, t, lam, on_failure="ignore"))(c, t)
    expected = exact(c, t, lam)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_one_warning_for_the_batch():
    c, t, lam = drawn(5, 4), drawn(5, 4), torch.tensor(0.5, dtype=D)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vmap(lambda c, t: implicit_grad(outer(t), inner(c), c, lam))(c, t)
    assert [w.category for w in caught] == [ConvergenceWarning]
    assert "of 5 tasks: params does not solve" in str(caught[0].message)
    assert caught[0].filename == __file__


class Normed(nn.Module):
    """Linear, affine layer norm, tanh, linear."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        return self.body(x)


def test_a_condition_that_takes_derivatives_itself_is_right_through_a_norm_layer():
    # A derivative around vmap(grad(loss)) would be wrong here: it is noticed, and taken inside.
    torch.manual_seed(0)
    net = Normed().double().requires_grad_(False)
    meta = {name: p + 0.3 * torch.randn_like(p) for name, p in net.named_parameters()}
    x, y = drawn(3, 6, 2), torch.randint(2, (3, 6), generator=torch.Generator().manual_seed(1))

    def objective(params, meta, x, y):
        pull = sum(
            ((p - m) ** 2).sum() for p, m in zip(params.values(), meta.values(), strict=True)
        )
        return F.cross_entropy(functional_call(net, params, (x,)), y) + 5 * pull

    def one(x, y, condition):
        return implicit_grad(
            lambda params, meta: F.cross_entropy(functional_call(net, params, (x,)), 1 - y),
            condition(lambda params, meta: objective(params, meta, x, y)),
            meta,
            meta,
            solver=CG(rtol=1e-10),
            inner_tol=None,
        )

    def gradient(f):
        return Root(grad(f), symmetric=True)

    batched = vmap(lambda x, y: one(x, y, gradient))(x, y)
    for i in range(3):
        alone = one(x[i], y[i], lambda f: f)  # by the objective, without any transform
        for name, part in alone.items():
            torch.testing.assert_close(batched[name][i], part, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver", [Exact(), GMRES(), MINRES(), CG()])
def test_systems_in_nested_vmaps_whose_matrix_belongs_to_the_outer_one(solver):
    # torch.linalg.lu_solve is wrong where the outer vmap alone has a batch of matrices.
    A, b, c = drawn(2, 3, 3), drawn(4, 3), drawn(2, 3)
    A = A @ A.mT + torch.eye(3, dtype=D)
    found = vmap(lambda A, c: vmap(lambda b: solver.solve(lambda v: A @ v, b + c)[0])(b))(A, c)
    expected = torch.linalg.solve(A[:, None].expand(2, 4, 3, 3), b + c[:, None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("derivatives", [False, True])
def test_the_generator_moves_as_by_one_call_of_each_loss(derivatives):
    def loss(w, h, c):
        mask = F.dropout(torch.ones_like(w), 0.5)
        return (mask * (w - c) ** 2).sum() / 2 + h * (w**2).sum() / 2

    def one(c):
        def condition(w, h):
            return grad(loss)(w, h, c)

        return implicit_grad(
            lambda w, h: (w * F.dropout(torch.ones_like(w), 0.5)).sum(),
            Root(condition, symmetric=True) if derivatives else lambda w, h: loss(w, h, c),
            c,
            torch.tensor(0.5, dtype=D),
            inner_tol=None,
            on_failure="ignore",
        )

    c = drawn(3, 4)
    torch.manual_seed(0)
    vmap(one, randomness="different")(c)
    after = torch.rand(1)
    torch.manual_seed(0)
    for _ in range(2):
        vmap(lambda c: F.dropout(torch.ones_like(c), 0.5), randomness="different")(c)
    assert torch.equal(torch.rand(1), after)


def test_a_preconditioner_may_close_over_the_tasks_data():
    scale, t = drawn(3, 4).exp(), drawn(3, 4)
    lam = torch.tensor(0.5, dtype=D)

    def one(scale, t):
        solver = CG(rtol=1e-12, preconditioner=lambda v: v / (scale + lam))
        found, info = implicit_grad(
            outer(t),
            lambda w, lam: (scale * (w - 1) ** 2).sum() / 2 + lam * (w**2).sum() / 2,
            scale / (scale + lam),
            lam,
            solver=solver,
            return_info=True,
        )
        return found, info.iterations

    found, iterations = vmap(one)(scale, t)
    w = scale / (scale + lam)
    torch.testing.assert_close(found, -(t * w / (scale + lam)).sum(-1))
    assert iterations.tolist() == [1, 1, 1]


def test_a_loss_that_asks_whether_it_is_differentiated_is_the_same_in_a_batch():
    def inner(w, lam):
        return ((w - lam) ** 2).sum() + ((w**2).sum() if w.requires_grad else 0.0)

    def one(lam):
        return implicit_grad(lambda w, lam: w.sum(), inner, lam / 2, lam)

    torch.testing.assert_close(vmap(one)(drawn(3, 2)), torch.full((3, 2), 0.5, dtype=D))


def test_a_loss_that_calls_autograd_is_the_same_in_a_batch():
    def inner(w, lam):  # its solution is lam / 2
        height = (w**2).sum() / 2 - (w * lam).sum() / 2
        return (torch.autograd.grad(height, w, create_graph=True)[0] ** 2).sum()

    def one(lam):
        return implicit_grad(lambda w, lam: w.sum(), inner, lam / 2, lam)

    torch.testing.assert_close(vmap(one)(drawn(3, 2)), torch.full((3, 2), 0.5, dtype=D))


def test_an_error_of_a_loss_comes_out_of_a_batch_as_it_is():
    def outer(w, lam):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        vmap(lambda c: implicit_grad(outer, inner(c), c, c.sum()))(drawn(3, 2))


# Custom functions with a batching rule of their own, which a vmap puts in the place of them


class Softplus(torch.autograd.Function):
    """Its batching rule has no derivative, and needs none: a vmap of its gradient is right."""

    @staticmethod
    def forward(x):
        return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * torch.sigmoid(ctx.saved_tensors[0])

    @staticmethod
    def vmap(info, in_dims, x):
        with torch.no_grad():
            return Softplus.forward(x), in_dims[0]


@torch.library.custom_op("hypergrad_tests::softplus", mutates_args=())
def softplus_operator(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.softplus(x)


softplus_operator.register_autograd(
    lambda ctx, g: g * torch.sigmoid(ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
softplus_operator.register_vmap(
    lambda info, in_dims, x: (torch.nn.functional.softplus(x.detach()), in_dims[0])
)

CENTRES = torch.tensor([[0.3, -0.7], [1.2, 2.2]], dtype=D)


def objective(softplus):
    return lambda w, h, c: h * ((w - c) ** 2).sum() / 2 + softplus(w).sum()


def truth(h=1.0):
    """The solutions and their derivative: h (w - c) + sigmoid(w) = 0."""
    w = CENTRES.clone()
    for _ in range(50):
        s = torch.sigmoid(w)
        w = w - (h * (w - CENTRES) + s) / (h + s * (1 - s))
    s = torch.sigmoid(w)
    return w, -(w - CENTRES) / (h + s * (1 - s))


@pytest.mark.parametrize("solver", [GradientDescent(), NewtonCG(), LBFGS()], ids=repr)
def test_an_inner_solver_keeps_the_derivative_of_a_custom_function(solver):
    inner = objective(Softplus.apply)
    one, start = torch.tensor(1.0, dtype=D), torch.zeros(2, dtype=D)
    w, info = vmap(lambda c: solver(inner, start, one, c))(CENTRES)

    assert info.success.all()
    torch.testing.assert_close(w, truth()[0])


@pytest.mark.parametrize("batching", ["vmap", "loop"])
@pytest.mark.filterwarnings("error")
def test_a_hypergradient_keeps_the_derivative_of_a_custom_function(batching):
    inner, one = objective(Softplus.apply), torch.tensor(1.0, dtype=D)
    solutions, slopes = truth()
    expected = (2 * solutions * slopes).sum(-1)

    @custom_argmin(inner, batching=batching)
    def fit(init, h, c):
        return LBFGS()(inner, init, h, c)[0]

    loss = lambda h, c: (fit(torch.zeros(2, dtype=D), h, c) ** 2).sum()
    torch.testing.assert_close(vmap(grad(loss), in_dims=(None, 0))(one, CENTRES), expected)
    torch.testing.assert_close(
        grad(lambda h: vmap(loss, in_dims=(None, 0))(h, CENTRES).sum())(one), expected.sum()
    )

    def by_hand(w, c):
        inner_of_task = lambda w, h: inner(w, h, c)
        return implicit_grad(lambda w, h: (w**2).sum(), inner_of_task, w, one)

    torch.testing.assert_close(vmap(by_hand)(solutions, CENTRES), expected)


def test_a_custom_operator_is_right_or_an_error_with_the_cure():
    inner, one = objective(softplus_operator), torch.tensor(1.0, dtype=D)
    solve = lambda c: LBFGS()(inner, torch.zeros(2, dtype=D), one, c)
    torch.testing.assert_close(torch.stack([solve(c)[0] for c in CENTRES]), truth()[0])
    # PyTorch has no derivative of it inside of a transform.
    with pytest.raises(UnsupportedOperation, match="setup_context"):
        vmap(solve)(CENTRES)
