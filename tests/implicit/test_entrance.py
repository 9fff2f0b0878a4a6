"""The contract of implicit_grad and implicit_backward, sentence by sentence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

import hypergrad
from hypergrad import CG, ConvergenceWarning, Exact, Status, implicit_backward, implicit_grad
from tests.weighted_ridge import expected, inner, outer, solution

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
D = torch.float64


@pytest.fixture
def h():
    return torch.tensor([0.3, 0.7, 1.1], dtype=D)


# Pytrees


@pytest.mark.parametrize("solver", [None, CG(rtol=1e-12), hypergrad.GMRES(rtol=1e-12)])
def test_a_system_of_several_leaves_keeps_its_off_diagonal_blocks(h, solver):
    w = tuple(solution(h)[i] for i in range(3))
    hypergradient = implicit_grad(
        lambda w, h: outer(torch.stack(w), h),
        lambda w, h: inner(torch.stack(w), h),
        w,
        h,
        solver=solver,
    )
    torch.testing.assert_close(hypergradient, expected(h), rtol=1e-9, atol=0)


# Failure, and its three modes


def test_x0_of_another_structure_shape_or_dtype_is_refused(h):
    for x0, words in (
        ({"w": solution(h)}, "structure"),
        (torch.zeros(2, dtype=D), "shape"),
        (torch.zeros(3), "dtype"),
    ):
        with pytest.raises(hypergrad.StructureMismatch, match=rf"x0.*{words}"):
            implicit_grad(outer, inner, solution(h), h, x0=x0)


# What comes back


def test_x0_that_is_the_answer_needs_no_iteration(h):
    solver = CG(rtol=1e-8)
    hypergradient, info = implicit_grad(
        outer, inner, solution(h), h, solver=solver, return_info=True
    )
    assert info.iterations == 3
    again, warm = implicit_grad(
        outer, inner, solution(h), h, solver=solver, x0=info.solution, return_info=True
    )
    assert warm.iterations == 0
    assert warm.matvecs <= 2
    torch.testing.assert_close(again, hypergradient, rtol=1e-7, atol=0)


# Contexts


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("solver", [None, CG(rtol=1e-12), hypergrad.GMRES(rtol=1e-12)])
def test_it_works_whatever_the_grad_mode(h, context, solver):
    with context():
        t = h.clone()  # an inference tensor under inference_mode
        hypergradient = implicit_grad(outer, inner, solution(t), t, solver=solver)
    torch.testing.assert_close(hypergradient, expected(h), rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", [None, CG(), hypergrad.GMRES()])
def test_autocast_of_the_caller_does_not_reach_the_linear_algebra(solver):
    torch.manual_seed(0)
    x, y, lam = torch.randn(40, 5), torch.randn(40), torch.tensor(0.5)
    w = torch.linalg.solve(x.T @ x + lam * torch.eye(5), x.T @ y)

    def objective(w, lam):  # no operation that autocast touches
        return ((x * w).sum(dim=1) - y).square().sum() / 2 + lam * (w * w).sum() / 2

    def run():
        return implicit_grad(
            lambda w, t: (w * w).sum(), objective, w, lam, solver=solver, return_info=True
        )

    plain, info = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, under = run()
    torch.testing.assert_close(cast, plain, rtol=1e-4, atol=0)
    assert under.residual_norm < 10 * info.residual_norm + 1e-6


def test_differentiating_the_answer_by_a_transform_is_an_error_that_names_the_decorator(h):
    def total(h):
        return implicit_grad(outer, inner, solution(h), h).sum()

    one = torch.ones(3, dtype=D)
    for derivative in (
        lambda: torch.func.grad(total)(h),
        lambda: torch.func.jacrev(total)(h),
        lambda: torch.func.jacfwd(total)(h),
        lambda: torch.func.jvp(total, (h,), (one,)),
        lambda: torch.func.vmap(torch.func.grad(total))(h[None]),
    ):
        with pytest.raises(hypergrad.UnsupportedOperation, match="custom_argmin"):
            derivative()


def test_an_unrelated_transform_around_the_call_does_no_harm(h):
    def unrelated(x):
        return x**2 * implicit_grad(outer, inner, solution(h), h).sum()

    found = torch.func.grad(unrelated)(torch.tensor(3.0, dtype=D))
    torch.testing.assert_close(found, 6 * expected(h).sum(), rtol=1e-9, atol=0)


# Under vmap over tasks


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 6), norm, nn.Linear(6, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


NORMS = {
    "layer": lambda: nn.LayerNorm(6),
    "batch": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "group": lambda: nn.GroupNorm(2, 6),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("solver", [Exact(), CG(rtol=1e-12), hypergrad.GMRES(rtol=1e-12)])
def test_vmap_over_tasks_equals_the_loop_with_an_affine_norm_layer(norm, solver):
    torch.manual_seed(0)
    net = Net(NORMS[norm]()).double()
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    meta = {k: v.detach() for k, v in net.named_parameters()}
    tasks = 3
    x, v = torch.randn(tasks, 7, 3, dtype=D), torch.randn(tasks, 5, 3, dtype=D)
    y, z = torch.randint(2, (tasks, 7)), torch.randint(2, (tasks, 5))

    def one(x, y, v, z, shift):
        params = {k: p + shift * torch.cos(p + shift) for k, p in meta.items()}

        def inner(p, t):
            loss = F.cross_entropy(functional_call(net, p, (x,)), y)
            return loss + 3 * sum(((p[k] - t[k]) ** 2).sum() for k in p)

        def outer(p, t):
            return F.cross_entropy(functional_call(net, p, (v,)), z)

        return implicit_grad(
            outer, inner, params, meta, solver=solver, inner_tol=None, return_info=True
        )

    shifts = torch.tensor([0.1, 0.2, 0.3], dtype=D)
    found, info = vmap(one)(x, y, v, z, shifts)
    assert info.status.shape == (tasks,)
    assert (info.status == Status.CONVERGED).all()
    for i in range(tasks):
        alone, single = one(x[i], y[i], v[i], z[i], shifts[i])
        for k in meta:
            torch.testing.assert_close(found[k][i], alone[k], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(
                info.solution[k][i], single.solution[k], rtol=1e-8, atol=1e-12
            )
        torch.testing.assert_close(info.inner_residual[i], single.inner_residual)
        torch.testing.assert_close(info.outer_value[i], single.outer_value)


def test_vmap_over_an_axis_that_is_not_the_first_and_over_hparams_alone(h):
    hs = torch.stack([h, 2 * h, 3 * h], dim=1)
    found = vmap(lambda t: implicit_grad(outer, inner, solution(t), t), in_dims=1, out_dims=1)(hs)
    want = torch.stack([expected(t) for t in hs.unbind(dim=1)], dim=1)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=0)


def test_nested_vmap_equals_the_loops(h):
    hs = torch.stack([h, 2 * h]), torch.tensor([0.5, 1.0, 2.0], dtype=D)
    grid = vmap(
        lambda t: vmap(lambda s: implicit_grad(outer, inner, solution(s * t), s * t))(hs[1])
    )(hs[0])
    for i, t in enumerate(hs[0]):
        for j, s in enumerate(hs[1]):
            torch.testing.assert_close(grid[i, j], expected(s * t), rtol=1e-9, atol=0)


def test_a_task_that_fails_has_its_own_status_and_does_not_disturb_the_others():
    diagonals = torch.tensor([[2.0, 3.0], [1.0, -2.0], [5.0, 5.0]], dtype=D)
    t = torch.tensor(1.0, dtype=D)

    def one(d, **keywords):
        w = torch.tensor([0.5, 1.0], dtype=D)
        return implicit_grad(
            lambda w, t: w.sum(),
            lambda w, t: (d * w * w).sum() / 2 - t * w[0],
            w,
            t,
            solver=CG(),
            inner_tol=None,
            return_info=True,
            **keywords,
        )

    found, info = vmap(lambda d: one(d, on_failure="ignore"))(diagonals)
    assert info.status.tolist() == [0, Status.NEGATIVE_CURVATURE, 0]
    assert info.success.tolist() == [True, False, True]
    assert info.iterations.tolist()[0] == 2
    assert info.iterations.tolist()[2] == 1
    torch.testing.assert_close(found[[0, 2]], torch.tensor([0.5, 0.2], dtype=D))
    with pytest.warns(ConvergenceWarning, match="^1 of 3 tasks: "):
        vmap(one)(diagonals)
    with pytest.raises(hypergrad.IndefiniteHessian, match=r"^1 of 3 tasks: "):
        vmap(lambda d: one(d, on_failure="raise"))(diagonals)


def test_a_message_counts_the_tasks_that_failed(h):
    shift = torch.zeros(32, dtype=D)
    shift[[3, 7, 20]] = 0.5
    with pytest.warns(ConvergenceWarning, match="^3 of 32 tasks: params does not solve") as caught:
        vmap(lambda s: implicit_grad(outer, inner, solution(h) + s, h))(shift)
    assert len(caught) == 1
    shift[5] = math.nan
    with pytest.raises(hypergrad.NotFinite, match=r"^1 of 32 tasks: "):
        vmap(lambda s: implicit_grad(outer, inner, solution(h) + s, h))(shift)
    found = vmap(lambda s: implicit_grad(outer, inner, solution(h) + s, h, on_failure="ignore"))(
        shift
    )
    assert torch.isnan(found).any(dim=1).nonzero().flatten().tolist() == [5]


def test_aux_leaves_vmap_with_one_entry_per_task(h):
    def one(s):
        return implicit_grad(
            lambda w, h: (outer(w, h), {"s": w * s}), inner, solution(h), h, has_aux=True
        )

    _, aux = vmap(one)(torch.tensor([1.0, 2.0], dtype=D))
    torch.testing.assert_close(aux["s"], torch.stack([solution(h), 2 * solution(h)]))


# implicit_backward


def test_backward_passes_through_hyperparameters_that_are_not_leaves(h):
    log = h.log().requires_grad_()
    loss = implicit_backward(outer, inner, solution(h), log.exp())
    torch.testing.assert_close(log.grad, expected(h) * h, rtol=1e-9, atol=0)
    torch.testing.assert_close(loss, outer(solution(h), h))
    assert not loss.requires_grad


def test_backward_accumulates_and_skips_what_needs_no_gradient(h):
    tree = {"h": h.clone().requires_grad_(), "fixed": torch.ones(3, dtype=D)}
    arguments = (
        lambda w, t: outer(w, t["h"]) + (t["fixed"] * w).sum() - w.sum(),
        lambda w, t: inner(w, t["h"]),
        solution(h),
        tree,
    )
    implicit_backward(*arguments)
    implicit_backward(*arguments)
    torch.testing.assert_close(tree["h"].grad, 2 * expected(h), rtol=1e-9, atol=0)
    assert tree["fixed"].grad is None


def test_backward_without_anything_that_requires_grad_is_an_error(h):
    with pytest.raises(hypergrad.NotConnected, match="requires grad"):
        implicit_backward(outer, inner, solution(h), h)


def test_backward_returns_loss_and_info_or_aux(h):
    t = h.clone().requires_grad_()
    loss, info = implicit_backward(outer, inner, solution(h), t, return_info=True)
    assert torch.equal(loss, info.outer_value)
    loss, aux = implicit_backward(
        lambda w, h: (outer(w, h), 7), inner, solution(h), t, has_aux=True
    )
    assert aux == 7


def test_backward_of_one_leaf_named_twice_adds_both_parts(h):
    t = h.clone().requires_grad_()
    implicit_backward(
        lambda w, t: outer(w, (t["a"] + t["b"]) / 2),
        lambda w, t: inner(w, (t["a"] + t["b"]) / 2),
        solution(h),
        {"a": t, "b": t},
    )
    torch.testing.assert_close(t.grad, expected(h), rtol=1e-9, atol=0)


def test_backward_does_not_touch_the_grad_of_params(h):
    w = solution(h).requires_grad_()
    implicit_backward(outer, inner, w, h.clone().requires_grad_())
    assert w.grad is None
