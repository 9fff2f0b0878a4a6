"""The contract of implicit_grad and implicit_backward, sentence by sentence."""

from __future__ import annotations

import gc
import math
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad import (
    CG,
    ConvergenceWarning,
    Exact,
    Neumann,
    Status,
    implicit_backward,
    implicit_grad,
)

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

D = torch.float64
MATRIX = torch.tensor([[3.0, 1.0, 0.5], [1.0, 2.0, 0.2], [0.5, 0.2, 4.0]], dtype=D)
TARGET = torch.tensor([1.0, -2.0, 0.5], dtype=D)


def inner(w, h):
    """A ridge with a weight for each feature; w* = (M + diag h)^-1 c."""
    return w @ MATRIX @ w / 2 - TARGET @ w + (h * w * w).sum() / 2


def outer(w, h):
    return ((w - 1) ** 2).sum() / 2 + (h**2).sum()


def solution(h):
    return torch.linalg.solve(MATRIX + torch.diag(h), TARGET)


def expected(h):
    h = h.detach().clone().requires_grad_()
    return torch.autograd.grad(outer(solution(h), h), h)[0]


@pytest.fixture
def h():
    return torch.tensor([0.3, 0.7, 1.1], dtype=D)


# Pytrees


def test_the_answer_has_the_structure_of_hparams(h):
    tree = {"a": (h[0].clone(), [h[1:].clone()]), "none": None, "rate": 0.1, "n": torch.tensor(3)}
    w = {"x": solution(h)[:1], "deep": (solution(h)[1:],)}

    def join(w, t):
        return torch.cat([w["x"], w["deep"][0]]), torch.cat([t["a"][0][None], t["a"][1][0]])

    found = implicit_grad(lambda w, t: outer(*join(w, t)), lambda w, t: inner(*join(w, t)), w, tree)
    assert pytree.tree_structure(found) == pytree.tree_structure(tree)
    flat = torch.cat([found["a"][0][None], found["a"][1][0]])
    torch.testing.assert_close(flat, expected(h), rtol=1e-9, atol=0)
    assert found["none"] is None
    assert found["rate"] == 0.1
    assert found["n"].dtype == torch.int64
    assert found["n"] == 0


def test_leaves_that_are_0d_empty_strided_expanded_or_overlapping_are_right():
    lam = torch.tensor(0.4, dtype=D)
    base = torch.arange(8, dtype=D)
    params = {
        "scalar": torch.tensor(0.0, dtype=D),
        "empty": torch.zeros(0, dtype=D),
        "strided": base[::3],  # 0, 3, 6
        "transposed": base[:6].reshape(2, 3).T,
        "expanded": torch.ones(1, dtype=D).expand(3),
        "overlapping": base.as_strided((3, 2), (1, 1)),
    }
    targets = {k: torch.cos(torch.arange(v.numel(), dtype=D)).reshape(v.shape) + 1
               for k, v in params.items()}  # fmt: skip

    def objective(p, lam):
        return sum(((p[k] - targets[k]) ** 2).sum() + lam * (p[k] ** 2).sum() for k in p)

    # Exact at any point: the system has the matrix 2 (1 + lam) I, so b = 1 gives this formula.
    found = implicit_grad(
        lambda p, lam: sum(p[k].sum() for k in p), objective, params, lam, inner_tol=None
    )
    want = -sum(v.sum() for v in params.values()) / (1 + lam)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)


def test_hparams_that_are_strided_or_expanded_are_right(h):
    strided = torch.stack([h, h], dim=1)[:, 0]
    torch.testing.assert_close(
        implicit_grad(outer, inner, solution(h), strided), expected(h), rtol=1e-9, atol=0
    )
    wide = torch.tensor([0.5], dtype=D).expand(3)
    torch.testing.assert_close(
        implicit_grad(outer, inner, solution(wide), wide), expected(wide), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("solver", [None, CG(rtol=1e-12), hypergrad.GMRES(rtol=1e-12)])
def test_a_system_of_several_leaves_keeps_its_off_diagonal_blocks(h, solver):
    w = tuple(solution(h)[i] for i in range(3))
    found = implicit_grad(
        lambda w, h: outer(torch.stack(w), h),
        lambda w, h: inner(torch.stack(w), h),
        w,
        h,
        solver=solver,
    )
    torch.testing.assert_close(found, expected(h), rtol=1e-9, atol=0)


# Dtypes


def test_float32_and_float64_leaves_each_keep_their_dtype():
    p = {"a": torch.tensor([0.5]), "b": torch.tensor([0.25], dtype=D)}
    t = {"a": torch.tensor([1.0]), "b": torch.tensor([3.0], dtype=D)}

    def objective(p, t):
        return ((p["a"] * (1 + t["a"]) - 1) ** 2).sum().double() + (
            (p["b"] * (1 + t["b"]) - 1) ** 2
        ).sum()

    found, info = implicit_grad(
        lambda p, t: p["a"].sum().double() + p["b"].sum(), objective, p, t, return_info=True
    )
    assert found["a"].dtype == torch.float32
    assert found["b"].dtype == D
    torch.testing.assert_close(found["a"], torch.tensor([-0.25]))
    torch.testing.assert_close(found["b"], torch.tensor([-1 / 16], dtype=D))
    assert info.solution["a"].dtype == torch.float32
    assert info.solution["b"].dtype == D


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", [None, CG()])
def test_half_precision_is_solved_in_float32_and_cast_back(dtype, solver):
    lam = torch.tensor([1.0, 3.0], dtype=dtype)
    w = 1 / (1 + lam)
    found, info = implicit_grad(
        lambda w, lam: w.sum(),
        lambda w, lam: ((w - 1) ** 2).sum() / 2 + (lam * w**2).sum() / 2,
        w,
        lam,
        solver=solver,
        inner_tol=3e-2,
        return_info=True,
    )
    assert found.dtype == dtype
    assert info.residual_norm.dtype == torch.float32
    torch.testing.assert_close(found.float(), torch.tensor([-0.25, -0.0625]), rtol=2e-2, atol=0)


def test_complex_leaves_are_refused_by_name(h):
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"hparams\['z'\] is complex"):
        implicit_grad(outer, inner, solution(h), {"z": torch.zeros(2, dtype=torch.complex64)})


def test_leaves_on_two_devices_are_an_error_that_names_both():
    params = {"a": torch.zeros(2), "b": torch.zeros(2, device="meta")}
    with pytest.raises(hypergrad.StructureMismatch, match=r"params\['b'\] is on meta.*\['a'\]"):
        implicit_grad(lambda p, t: p["a"].sum(), lambda p, t: t, params, torch.tensor(1.0))


@pytest.mark.parametrize("place", ["params", "hparams"])
@pytest.mark.parametrize("kind", ["module", "generator", "module in a dict"])
def test_a_module_or_a_generator_is_refused_and_the_cure_named(place, kind, h):
    model = nn.Linear(1, 1)
    bad = {"module": model, "generator": model.parameters(), "module in a dict": {"m": model}}[kind]
    arguments = (bad, h) if place == "params" else (solution(h), bad)
    with pytest.raises(hypergrad.StructureMismatch, match="named_parameters") as error:
        implicit_grad(outer, inner, *arguments)
    assert str(error.value).startswith(place)


# Nothing of the caller's is changed


def test_the_answer_is_detached_and_nothing_of_the_callers_is_changed(h):
    h.requires_grad_()
    w = solution(h).detach().requires_grad_()
    kept = w.detach().clone(), h.detach().clone(), w._version, h._version
    found, info = implicit_grad(outer, inner, w, h, solver=CG(rtol=1e-12), return_info=True)
    assert not found.requires_grad
    for leaf in pytree.tree_leaves(info):
        assert not leaf.requires_grad
    assert w.grad is None
    assert h.grad is None
    assert torch.equal(w, kept[0])
    assert torch.equal(h, kept[1])
    assert (w._version, h._version) == kept[2:]


def test_the_answer_shares_no_memory_with_anything(h):
    both = {"a": torch.ones(3, dtype=D), "b": torch.ones(3, dtype=D), "h": h}
    found = implicit_grad(
        lambda w, t: outer(w, t["h"]) + (t["a"] + t["b"]).sum(),
        lambda w, t: inner(w, t["h"]),
        solution(h),
        both,
    )
    found["a"].mul_(2)  # as clipping by the norm does
    assert torch.equal(found["a"], torch.full((3,), 2.0, dtype=D))
    assert torch.equal(found["b"], torch.ones(3, dtype=D))


@pytest.mark.parametrize("which", ["outer", "inner"])
def test_a_loss_that_changes_a_constant_leaf_in_place_is_an_error_or_leaves_it_alone(which, h):
    tree = {"h": h, "count": torch.tensor(3)}

    def counting(fun):
        def call(w, t):
            t["count"].add_(1)
            return fun(w, t["h"])

        return call

    losses = {"outer": lambda w, t: outer(w, t["h"]), "inner": lambda w, t: inner(w, t["h"])}
    losses[which] = counting({"outer": outer, "inner": inner}[which])
    try:
        implicit_grad(losses["outer"], losses["inner"], solution(h), tree)
    except hypergrad.HypergradError as error:
        named = str(error)
        assert "count" in named
    else:
        assert tree["count"] == 3


def test_each_loss_is_evaluated_once(h):
    calls = {"outer": 0, "inner": 0}

    def counted(name, fun):
        def call(*args):
            calls[name] += 1
            return fun(*args)

        return call

    for solver in (None, CG(rtol=1e-12), hypergrad.GMRES(), Neumann(terms=50)):
        calls.update(outer=0, inner=0)
        implicit_grad(
            counted("outer", outer), counted("inner", inner), solution(h), h, solver=solver
        )
        assert calls == {"outer": 1, "inner": 1}


def test_random_numbers_are_drawn_as_by_one_call_of_each_loss():
    w, t = torch.ones(50, dtype=D), torch.ones(50, dtype=D)

    def noisy(w, t):
        return ((F.dropout(w, 0.5) - t) ** 2).sum() + 0.5 * ((w * t) ** 2).sum()

    torch.manual_seed(3)
    noisy(w, t), noisy(w, t)
    after = torch.get_rng_state()
    for solver in (None, CG(), hypergrad.GMRES()):
        torch.manual_seed(3)
        implicit_grad(noisy, noisy, w, t, solver=solver, inner_tol=None)
        assert torch.equal(torch.get_rng_state(), after)


def test_every_product_sees_the_same_draw_and_two_calls_draw_differently():
    w, t = torch.ones(50, dtype=D), torch.ones(50, dtype=D)
    drawn = []

    def noisy(w, t):
        mask = F.dropout(torch.ones(50, dtype=D), 0.5)
        drawn.append(mask)
        return ((mask * w - t) ** 2).sum() / 2 + (t * w**2).sum() / 2

    def reference(inner_mask):
        # A = diag(mask^2 + t), cross = -mask ... + w, with the outer loss sum(w)
        return -(w - inner_mask) / (inner_mask**2 + t)

    answers = []
    for solver in (None, CG(rtol=1e-12), CG(rtol=1e-12)):
        drawn.clear()
        answers.append(
            implicit_grad(lambda w, t: w.sum(), noisy, w, t, solver=solver, inner_tol=None)
        )
        (mask,) = drawn
        torch.testing.assert_close(answers[-1], reference(mask), rtol=1e-9, atol=1e-12)
    assert not torch.equal(answers[1], answers[2])


# Not connected is not zero


def test_an_outer_loss_without_params_is_not_connected(h):
    with pytest.raises(hypergrad.NotConnected, match="outer does not depend on params"):
        implicit_grad(lambda w, h: (h**2).sum(), inner, solution(h), h)


def test_an_inner_problem_without_one_leaf_is_not_connected_and_names_it(h):
    params = {"used": solution(h), "idle": torch.ones(2, dtype=D)}
    with pytest.raises(hypergrad.NotConnected, match=r"params\['idle'\]"):
        implicit_grad(
            lambda p, h: outer(p["used"], h) + p["idle"].sum(),
            lambda p, h: inner(p["used"], h),
            params,
            h,
        )


def test_a_root_or_fixed_point_without_one_leaf_is_not_connected(h):
    params = {"used": solution(h), "idle": torch.ones(2, dtype=D)}
    for condition in (hypergrad.Root, hypergrad.FixedPoint):
        fun = condition(lambda p, h: {"used": p["used"] * h, "idle": torch.zeros(2, dtype=D)})
        if condition is hypergrad.FixedPoint:  # A is the identity there: connected
            implicit_grad(lambda p, h: p["used"].sum(), fun, params, h, on_failure="ignore")
        else:
            with pytest.raises(hypergrad.NotConnected, match=r"params\['idle'\]"):
                implicit_grad(lambda p, h: p["used"].sum(), fun, params, h)


@pytest.mark.parametrize("which", ["outer", "inner"])
def test_a_module_called_directly_is_named_with_the_cure(which):
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(8, 3, dtype=D), torch.randn(8, 1, dtype=D)
    params, lam = dict(model.named_parameters()), torch.tensor(0.1, dtype=D)

    def penalty(p, lam):
        return lam * sum((v**2).sum() for v in p.values())

    def right(p, lam):
        return F.mse_loss(functional_call(model, p, (x,)), y) + penalty(p, lam)

    def wrong(p, lam):
        return F.mse_loss(model(x), y) + penalty(p, lam)

    losses = (wrong, right) if which == "outer" else (right, wrong)
    for given in (params, {k: v.detach() for k, v in params.items()}):
        with pytest.raises(hypergrad.NotConnected, match=r"functional_call\(module, params, args"):
            implicit_grad(*losses, given, lam, inner_tol=None)


@pytest.mark.parametrize("which", ["outer", "inner"])
def test_a_hyper_module_called_directly_is_named_with_the_cure(which, h):
    net = nn.Linear(1, 3).double()
    hparams = dict(net.named_parameters())
    one = torch.ones(1, dtype=D)

    def weights(t):
        return functional_call(net, t, (one,)).exp()

    def wrong_inner(w, t):
        return inner(w, net(one).exp()) + 0 * weights(t).sum()

    def wrong_outer(w, t):
        return outer(w, net(one).exp())

    losses = {
        "outer": (wrong_outer, lambda w, t: inner(w, weights(t))),
        "inner": (lambda w, t: outer(w, weights(t)), wrong_inner),
    }[which]
    with pytest.raises(hypergrad.NotConnected, match=r"hparams\['weight'\].*functional_call"):
        implicit_grad(*losses, solution(h), hparams, inner_tol=None)


def test_captured_tensors_that_are_no_leaves_of_the_arguments_are_constants(h):
    other = torch.ones(3, dtype=D, requires_grad=True)
    found = implicit_grad(
        lambda w, h: outer(w, h) + (other * w).sum() - w.sum(),
        lambda w, h: inner(w, h) * other[0],
        solution(h),
        h,
    )
    torch.testing.assert_close(found, expected(h), rtol=1e-9, atol=0)
    assert other.grad is None


def test_an_unused_hyperparameter_gets_zeros_and_one_warning_that_names_it(h):
    tree = {"h": h, "idle": torch.ones(2, dtype=D)}
    with pytest.warns(ConvergenceWarning, match=r"hparams\['idle'\]") as caught:
        found = implicit_grad(
            lambda w, t: outer(w, t["h"]), lambda w, t: inner(w, t["h"]), solution(h), tree
        )
    assert len(caught) == 1
    assert torch.equal(found["idle"], torch.zeros(2, dtype=D))
    torch.testing.assert_close(found["h"], expected(h), rtol=1e-9, atol=0)


def test_a_hyperparameter_of_the_outer_loss_alone_has_its_direct_term(h):
    tree = {"h": h, "direct": torch.tensor(2.0, dtype=D)}
    found = implicit_grad(
        lambda w, t: outer(w, t["h"]) + t["direct"] ** 3,
        lambda w, t: inner(w, t["h"]),
        solution(h),
        tree,
    )
    torch.testing.assert_close(found["direct"], torch.tensor(12.0, dtype=D))


# Failure, and its three modes


def unsolved(h):
    return solution(h) + 0.1


def test_an_unsolved_inner_problem_warns_by_default_and_raises_on_request(h):
    with pytest.warns(ConvergenceWarning, match=r"does not solve the inner problem.*inner_tol"):
        implicit_grad(outer, inner, unsolved(h), h)
    with pytest.raises(hypergrad.NotConverged, match="inner_tol"):
        implicit_grad(outer, inner, unsolved(h), h, on_failure="raise")
    found, info = implicit_grad(outer, inner, unsolved(h), h, on_failure="ignore", return_info=True)
    assert torch.isfinite(found).all()
    assert not info.success


def test_inner_tol_none_measures_and_does_not_judge(h):
    _, info = implicit_grad(outer, inner, unsolved(h), h, inner_tol=None, return_info=True)
    assert info.success
    assert 0.01 < info.inner_residual < 10
    _, solved = implicit_grad(outer, inner, solution(h), h, return_info=True)
    assert solved.inner_residual < 1e-12


def test_outer_error_is_the_first_order_error_of_the_outer_loss(h):
    w = solution(h) + 1e-5 * torch.tensor([1.0, -2.0, 0.5], dtype=D)
    _, info = implicit_grad(outer, inner, w, h, inner_tol=None, return_info=True)
    true = outer(w, h) - outer(solution(h), h)
    torch.testing.assert_close(info.outer_error, true, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["params", "hparams"])
@pytest.mark.parametrize("solver", [None, CG(), hypergrad.GMRES(), Neumann()])
def test_a_number_that_is_not_finite_raises_and_is_never_zero(h, bad, place, solver):
    w, t = solution(h), h.clone()
    (w if place == "params" else t)[1] = bad
    for mode in ("warn", "raise"):
        with pytest.raises(hypergrad.NotFinite, match=place):
            implicit_grad(outer, inner, w, t, on_failure=mode, solver=solver)
    found = implicit_grad(outer, inner, w, t, on_failure="ignore", solver=solver)
    assert not torch.isfinite(found).all()
    assert torch.isnan(found).any()


def test_nan_from_the_data_of_a_loss_names_where_it_appeared(h):
    with pytest.raises(hypergrad.NotFinite, match="outer loss"):
        implicit_grad(lambda w, h: outer(w, h) * math.nan, inner, solution(h), h)
    with pytest.raises(hypergrad.NotFinite, match="inner loss"):
        implicit_grad(outer, lambda w, h: inner(w, h) * math.nan, solution(h), h)


@pytest.mark.parametrize(
    ("matrix", "error", "words"),
    [
        ([1.0, -2.0], hypergrad.IndefiniteHessian, "negative curvature"),
        ([1.0, 0.0], hypergrad.SingularHessian, "singular"),
    ],
)
def test_a_bad_matrix_has_its_own_error_and_says_what_to_try(matrix, error, words):
    d = torch.tensor(matrix, dtype=D)
    w, lam = torch.zeros(2, dtype=D), torch.tensor(1.0, dtype=D)
    arguments = (lambda w, t: w.sum(), lambda w, t: (d * w * w).sum() / 2 * t, w, lam)
    with pytest.raises(error, match=words):
        implicit_grad(*arguments, solver=CG(), on_failure="raise")
    with pytest.warns(ConvergenceWarning, match="damping"):
        implicit_grad(*arguments, solver=CG())


def test_a_direction_without_curvature_in_a_regular_matrix_is_not_called_singular():
    d, w = torch.tensor([1.0, -1.0], dtype=D), torch.zeros(2, dtype=D)
    # b = (1, 1) has b.Ab = 0 and Ab != 0, which no positive semidefinite matrix allows.
    with pytest.raises(hypergrad.IndefiniteHessian, match="negative curvature"):
        implicit_grad(
            lambda w, t: w.sum(),
            lambda w, t: (d * w * w).sum() / 2 * t,
            w,
            torch.tensor(1.0, dtype=D),
            solver=CG(),
            on_failure="raise",
        )


def test_an_unknown_mode_is_refused(h):
    with pytest.raises(ValueError, match="'warn', 'raise' or 'ignore'"):
        implicit_grad(outer, inner, solution(h), h, on_failure="print")


def test_a_warning_is_rounded_and_shown_once_in_a_training_loop(h):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for k in range(20):
            w = solution(h) * (1 + 0.1 + 0.004 * k)
            implicit_grad(outer, inner, w, h)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_warning_of_negative_curvature_is_shown_once_in_a_training_loop():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for k in range(2, 6):  # met after k iterations
            d = torch.ones(8, dtype=D)
            d[:k] = torch.arange(1, k + 1)
            d[-1] = -1e-3
            implicit_grad(
                lambda w, t: (w * torch.linspace(1, 2, 8, dtype=D)).sum(),
                lambda w, t, d=d: (d * w * w).sum() / 2 * t,
                torch.zeros(8, dtype=D),
                torch.tensor(1.0, dtype=D),
                solver=CG(),
                inner_tol=None,
            )
    assert len({str(w.message) for w in caught}) == 1


def test_an_inner_solution_at_zero_is_no_failure():
    lam = torch.tensor(2.0, dtype=D)
    implicit_grad(  # pytest turns a warning into an error
        lambda w, lam: ((w - 1) ** 2).sum(),
        lambda w, lam: lam * (w**2).sum(),
        torch.full((3,), 1e-14, dtype=D),
        lam,
    )


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_with_everything_in_order_nothing_is_said(h, dtype):
    weights = torch.linalg.solve(MATRIX + torch.diag(h), TARGET).to(dtype)
    matrix, target = MATRIX.to(dtype), TARGET.to(dtype)

    def objective(w, h):
        return w @ matrix @ w / 2 - target @ w + (h * w * w).sum() / 2

    for solver in (None, CG(), CG(maxiter=2), hypergrad.GMRES(), Neumann(), Exact()):
        implicit_grad(outer, objective, weights, h.to(dtype), solver=solver)


def test_the_inner_problem_must_return_a_scalar(h):
    with pytest.raises(hypergrad.StructureMismatch, match=r"inner must return a scalar.*\(3,\)"):
        implicit_grad(outer, lambda w, h: w * h, solution(h), h)
    with pytest.raises(hypergrad.StructureMismatch, match=r"outer must return a scalar.*\(3,\)"):
        implicit_grad(lambda w, h: w * h, inner, solution(h), h)
    with pytest.raises(hypergrad.StructureMismatch, match=r"outer must return a scalar.*float"):
        implicit_grad(lambda w, h: 1.0, inner, solution(h), h)


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
    found, info = implicit_grad(outer, inner, solution(h), h, solver=solver, return_info=True)
    assert info.iterations == 3
    again, warm = implicit_grad(
        outer, inner, solution(h), h, solver=solver, x0=info.solution, return_info=True
    )
    assert warm.iterations == 0
    assert warm.matvecs <= 2
    torch.testing.assert_close(again, found, rtol=1e-7, atol=0)


def test_the_info_says_what_was_done(h):
    w = {"w": solution(h)}
    arguments = (lambda w, h: outer(w["w"], h), lambda w, h: inner(w["w"], h), w, h)
    _, info = implicit_grad(*arguments, solver=CG(rtol=1e-10), return_info=True)
    assert info.status == Status.CONVERGED
    assert Status(info.status) is Status.CONVERGED
    assert info.success
    assert info.method == "CG"
    assert info.residual_norm < 1e-10
    assert not info.negative_curvature
    A = MATRIX + torch.diag(h)
    u = torch.linalg.solve(A, solution(h) - 1)
    torch.testing.assert_close(info.solution["w"], u, rtol=1e-9, atol=0)
    torch.testing.assert_close(info.outer_value, outer(solution(h), h))
    assert info.aux is None
    assert "CG: CONVERGED" in str(info)
    for leaf in pytree.tree_leaves(info):
        assert isinstance(leaf, torch.Tensor)


def test_aux_comes_back_detached_beside_the_gradient_or_in_the_info(h):
    def with_aux(w, h):
        return outer(w, h), {"fit": w * 2, "text": "seen"}

    grads, aux = implicit_grad(with_aux, inner, solution(h), h, has_aux=True)
    torch.testing.assert_close(grads, expected(h), rtol=1e-9, atol=0)
    torch.testing.assert_close(aux["fit"], solution(h) * 2)
    assert not aux["fit"].requires_grad
    assert aux["text"] == "seen"
    grads, info = implicit_grad(with_aux, inner, solution(h), h, has_aux=True, return_info=True)
    torch.testing.assert_close(info.aux["fit"], solution(h) * 2)
    with pytest.raises(hypergrad.StructureMismatch, match="has_aux"):
        implicit_grad(outer, inner, solution(h), h, has_aux=True)


# Contexts


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("solver", [None, CG(rtol=1e-12), hypergrad.GMRES(rtol=1e-12)])
def test_it_works_whatever_the_grad_mode(h, context, solver):
    with context():
        t = h.clone()  # an inference tensor under inference_mode
        found = implicit_grad(outer, inner, solution(t), t, solver=solver)
    torch.testing.assert_close(found, expected(h), rtol=1e-9, atol=0)


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


def test_differentiating_the_answer_by_what_the_losses_capture_is_an_error(h):
    w = solution(h)

    def by_inner(scale):
        return implicit_grad(outer, lambda w, h: inner(w, h) * scale, w, h).sum()

    def by_outer(scale):
        return implicit_grad(lambda w, h: outer(w, h) * scale, inner, w, h).sum()

    one = torch.tensor(1.0, dtype=D)
    for total in (by_inner, by_outer):
        with pytest.raises(hypergrad.UnsupportedOperation, match="custom_argmin"):
            torch.func.grad(total)(one)
        with pytest.raises(hypergrad.UnsupportedOperation, match="custom_argmin"):
            torch.func.jvp(total, (one,), (one,))


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


# Memory


@pytest.mark.parametrize("solver", [None, CG(), hypergrad.GMRES()])
def test_nothing_of_a_solve_stays_alive_after_it(h, solver):
    log = h.log().requires_grad_()
    w, t = solution(h), log.exp()
    seen = []

    def watched(w, t):
        value = inner(w, t)
        seen.extend([weakref.ref(w), weakref.ref(t), weakref.ref(value)])
        return value

    gc.disable()
    try:
        found, info = implicit_grad(outer, watched, w, t, solver=solver, return_info=True)
        seen += [weakref.ref(w), weakref.ref(t)]
        del w, t, watched
        alive = [ref() for ref in seen if ref() is not None]
    finally:
        gc.enable()
    assert alive == []
    assert torch.isfinite(found).all()
    assert info.success
