"""RELIABILITY.md, rows 1 to 34, in its order: what can go wrong, and what happens then."""

from __future__ import annotations

import gc
import math
import re
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import hypergrad
from hypergrad import (
    CG,
    GMRES,
    LSMR,
    MINRES,
    Auto,
    BiCGSTAB,
    ConvergenceWarning,
    Exact,
    FixedPoint,
    GaussNewton,
    Neumann,
    NormalCG,
    Root,
    Status,
    check_hypergrad,
    custom_argmin,
    custom_root,
    implicit_backward,
    implicit_grad,
    root_jvp,
    root_vjp,
    unrolled_grad,
)

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

D = torch.float64
KRYLOV = [CG, MINRES, GMRES, BiCGSTAB, NormalCG, LSMR]
ITERATIVE = pytest.mark.parametrize("method", KRYLOV, ids=lambda method: method.__name__)


def t(value):
    return torch.tensor(value, dtype=D)


def with_spectrum(values, seed=0):
    """A symmetric matrix with these eigenvalues."""
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=D, generator=torch.Generator().manual_seed(seed))).Q
    return Q * torch.as_tensor(values, dtype=D) @ Q.T


def ones(n=8):
    return torch.ones(n, dtype=D)


def solve(solver, A, b, **options):
    return solver.solve(lambda v: A @ v, b, rmatvec=lambda v: A.T @ v, **options)


def off(A, x, b):
    """The true relative residual."""
    return float((b - A @ x).norm() / b.norm())


def quadratic(A, c, b, at=None, **options):
    """d/dt of b.w at the minimum of w.Aw/2 - t c.w, for t = 1: b.A^-1 c."""
    w = torch.linalg.solve(A, c) if at is None else at
    inner = lambda w, s: w @ A @ w / 2 - s * (c @ w)
    return implicit_grad(lambda w, s: b @ w, inner, w, torch.ones_like(c[0]), **options)


def bowl(w, h):
    """Minimal at w = 1 / (1 + h), with derivative -1 / (1 + h)^2."""
    return ((w - 1) ** 2).sum() + (h * w**2).sum()


def total(w, h):
    return w.sum()


H = t([1.0, 3.0])
W = 1 / (1 + H)
SLOPE = -(W**2)


class Counting:
    """A product that counts how often it is formed."""

    def __init__(self, A):
        self.A, self.count = A, 0

    def __call__(self, v):
        self.count += 1
        return self.A @ v


# Solving


def test_row_01_params_that_do_not_solve_the_inner_problem_are_measured_and_said():
    A, c = torch.diag(t([0.5, 2.0, 4.0])), t([1.0, 2.0, 3.0])
    at = torch.linalg.solve(A, c) * 1.1
    with pytest.warns(ConvergenceWarning, match="does not solve the inner problem.*=0.001"):
        _, info = quadratic(A, c, c, at, solver=CG(), return_info=True)
    assert not info.success
    off = at - torch.linalg.solve(A, c)  # the Newton step, relative to params
    torch.testing.assert_close(info.inner_residual, off.norm() / at.norm())
    with pytest.raises(hypergrad.NotConverged) as error:
        quadratic(A, c, c, at, solver=CG(), on_failure="raise")
    text = str(error.value)
    assert f"residual is {float(info.inner_residual):.3g} and inner_tol is 0.001" in text
    assert "condition's norm divided by the lowest curvature" in text
    assert "lowest curvature seen is 0.5" in text
    assert "Solve the inner problem further" in text


def test_row_01_measuring_costs_no_evaluation_and_inner_tol_none_does_not_judge():
    calls = []
    inner = lambda w, h: calls.append(1) or bowl(w, h)
    _, info = implicit_grad(total, inner, W * 1.1, H, inner_tol=None, return_info=True)
    assert calls == [1]
    assert info.success
    assert 0.05 < info.inner_residual < 0.2


def test_row_02_negative_curvature_stops_there_and_keeps_the_best_iterate():
    A, b = with_spectrum([-0.5, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 8.0], seed=2), ones()
    x, info = solve(CG(), A, b)
    assert info.status == Status.NEGATIVE_CURVATURE
    assert info.negative_curvature
    assert not info.success
    assert float(info.residual_norm) == pytest.approx(off(A, x, b))
    tries = [solve(CG(maxiter=k), A, b)[0] for k in range(1, int(info.iterations) + 1)]
    best = min(tries, key=lambda y: off(A, y, b))
    assert best is tries[1]  # neither none at all nor the last
    torch.testing.assert_close(x, best)
    with pytest.raises(hypergrad.IndefiniteHessian) as error:
        quadratic(A, b, b, solver=CG(), on_failure="raise")
    for cure in ("damping", "MINRES", "GaussNewton", f"{float(info.residual_norm):.3g}"):
        assert cure in str(error.value)


def test_row_02_negative_curvature_of_one_task_does_not_disturb_the_others():
    diagonals = t([[2.0, 3.0, 4.0], [1.0, -2.0, 3.0], [5.0, 5.0, 1.0]])
    one = lambda d: CG().solve(lambda v: d * v, ones(3))
    x, info = vmap(one)(diagonals)
    assert info.status.tolist() == [0, Status.NEGATIVE_CURVATURE, 0]
    for i in (0, 2):
        alone, single = one(diagonals[i])
        torch.testing.assert_close(x[i], alone, rtol=1e-14, atol=0)
        assert info.iterations[i] == single.iterations
    with pytest.warns(ConvergenceWarning, match=r"^1 of 3 tasks: .*negative curvature"):
        vmap(lambda d: quadratic(torch.diag(d), ones(3), ones(3), 1 / d, solver=CG()))(diagonals)


@pytest.mark.parametrize("solver", [MINRES(rtol=1e-10), Auto(rtol=1e-10)], ids=repr)
def test_row_03_a_symmetric_indefinite_system_is_solved_to_tolerance(solver):
    A, b = with_spectrum([-3.0, -2.0, -0.5, 0.7, 1.0, 2.0, 4.0, 5.0]), ones()
    x, info = solve(solver, A, b)
    assert info.status == Status.CONVERGED
    assert off(A, x, b) <= 1e-10
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-10)


def test_row_03_auto_goes_from_cg_to_minres_where_the_condition_is_symmetric():
    A, b = with_spectrum([-3.0, -2.0, -0.5, 0.7, 1.0, 2.0, 4.0, 5.0]), ones()
    solver = Auto(rtol=1e-10, dense_below=0)
    with pytest.warns(ConvergenceWarning, match="no minimum of the inner problem"):
        found, info = quadratic(A, b, b, solver=solver, return_info=True)
    assert info.status == Status.CONVERGED
    assert info.residual_norm <= 1e-10
    assert info.method == "Auto: CG, then MINRES"
    assert info.negative_curvature
    assert not info.success
    torch.testing.assert_close(found, b @ torch.linalg.solve(A, b), rtol=1e-8, atol=0)


SINGULAR = with_spectrum([0.0, 0.0, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("solver", [CG(), MINRES(), NormalCG(), LSMR(), Exact()], ids=repr)
def test_row_04_a_singular_consistent_system_gets_the_answer_of_minimum_norm(solver):
    least = SINGULAR @ ones()  # in the range, so of minimum norm
    x, info = solve(solver, SINGULAR, SINGULAR @ least)
    assert info.status == Status.CONVERGED
    torch.testing.assert_close(x, least, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", [GMRES(), BiCGSTAB()], ids=repr)
def test_row_04_on_a_singular_consistent_system_gmres_and_bicgstab_are_right_or_say_so(solver):
    b = SINGULAR @ ones()
    x, info = solve(solver, SINGULAR, b)
    assert x.isfinite().all()
    assert off(SINGULAR, x, b) <= 1e-6 or info.status == Status.SINGULAR


@pytest.mark.parametrize(
    "solver",
    [*[method() for method in KRYLOV], Exact(), Auto(), Auto(dense_below=0)],
    ids=repr,
)
def test_row_04_a_singular_inconsistent_system_is_said_and_never_nan(solver):
    x, info = solve(solver, SINGULAR, torch.arange(1.0, 9.0, dtype=D))
    assert x.isfinite().all()
    assert info.status == Status.SINGULAR
    assert not info.success
    b = torch.arange(1.0, 9.0, dtype=D)
    with pytest.raises(hypergrad.SingularHessian, match=r"singular.*residual 0\.\d+.*damping"):
        quadratic(SINGULAR, b, b, ones(), solver=solver, inner_tol=None, on_failure="raise")


UPPER = t([[2.0, 1.0], [0.0, 3.0]])


@pytest.mark.parametrize("solver", [CG(), MINRES()], ids=repr)
@pytest.mark.parametrize("condition", [Root, FixedPoint])
def test_row_05_a_matrix_that_is_not_symmetric_is_refused_before_solving(solver, condition):
    calls = []
    F_ = lambda w, s: calls.append(1) or UPPER @ w - s
    name = type(solver).__name__
    with pytest.raises(hypergrad.UnsupportedOperation, match=rf"{name} needs a symmetric.*GMRES"):
        implicit_grad(total, condition(F_), torch.linalg.solve(UPPER, H), H, solver=solver)
    assert calls == []


def test_row_05_a_false_claim_of_symmetry_is_found_by_a_probe_when_asked_to_check():
    F_ = lambda w, s: UPPER @ w - s * ones(2)
    find = lambda s: torch.linalg.solve(UPPER, s * ones(2))
    arguments = (lambda w, s: w[0] + 3 * w[1] ** 2, Root(F_, symmetric=True), find, t(1.0))
    report = check_hypergrad(*arguments, solver=CG(maxiter=50))
    assert not report.ok
    assert re.search(r"u\.Av and v\.Au differ by \d.*symmetric=False", report.reason)


@pytest.mark.parametrize(
    "solver",
    [*[method(maxiter=2, rtol=1e-10) for method in KRYLOV], Neumann(terms=2, rtol=1e-10)],
    ids=repr,
)
def test_row_06_iterations_that_run_out_are_said_with_the_true_residual(solver):
    A, b = with_spectrum(torch.logspace(0, 3, 8)), ones()
    x, info = solve(solver, A, b)
    assert info.status == Status.MAX_ITERATIONS
    assert not info.success
    assert float(info.residual_norm) == pytest.approx(off(A, x, b))
    with pytest.raises(hypergrad.NotConverged) as error:
        quadratic(A, b, b, solver=solver, on_failure="raise")
    field = "terms" if isinstance(solver, Neumann) else "maxiter"
    figure = f"after 2 iterations, at relative residual {off(A, x, b):.3g}. Raise {field}"
    assert f"{info.method} ran out of iterations {figure}" in str(error.value)
    with pytest.warns(ConvergenceWarning, match=f"{info.method} ran out of iterations"):
        quadratic(A, b, b, solver=solver)


@pytest.mark.parametrize("method", [CG, MINRES, GMRES, BiCGSTAB, NormalCG])
def test_row_07_stagnation_at_the_precision_of_the_dtype_is_said(method):
    A, b = with_spectrum(torch.logspace(0, 2, 30)), ones(30)
    x, info = solve(method(rtol=1e-19), A, b)
    assert info.status == Status.STAGNATED
    assert not info.success
    assert off(A, x, b) < 1e-9
    assert float(info.residual_norm) == pytest.approx(off(A, x, b), rel=0.5)
    with pytest.raises(hypergrad.NotConverged, match=r"stagnated.*residual \d.*float64"):
        quadratic(A, b, b, solver=method(rtol=1e-19), on_failure="raise")


def test_row_08_a_neumann_series_that_diverges_is_noticed_and_a_safe_step_named():
    A, b = with_spectrum(torch.linspace(1, 100, 8)), ones()
    _, info = solve(Neumann(step_size=0.1), A, b)
    assert info.status == Status.DIVERGED
    assert info.iterations < 20
    with pytest.raises(hypergrad.Diverged) as error:
        quadratic(A, b, b, solver=Neumann(step_size=0.1), on_failure="raise")
    largest = re.search(r"largest eigenvalue is (\d[\d.e+-]*):", str(error.value))
    assert 50 < float(largest[1]) < 101
    safe = re.search(r"step_size of (\d[\d.e+-]*) is safe", str(error.value))
    assert 1e-3 < float(safe[1]) < 2 / 100
    _, again = solve(Neumann(step_size=float(safe[1]), terms=5000, rtol=1e-6), A, b)
    assert again.status == Status.CONVERGED


@pytest.mark.parametrize("largest", [1e-4, 1.0, 1e5])
def test_row_08_the_default_step_size_is_estimated_and_safe(largest):
    A, b = with_spectrum(torch.linspace(0.1, 1, 8) * largest), ones()
    x, info = solve(Neumann(terms=2000, rtol=1e-6), A, b)
    assert info.status == Status.CONVERGED
    assert off(A, x, b) <= 1e-6


def _spoilt(where):
    """A problem that is not finite in one place: outer, inner, params, hparams."""
    params, hparams = {"a": W.clone(), "b": W.clone()}, {"x": H.clone(), "y": H.clone()}
    outer = lambda p, h: (p["a"] ** 2).sum() + p["b"].sum()
    inner = lambda p, h: bowl(p["a"], h["x"]) + bowl(p["b"], h["y"])
    if where == "outer":
        return lambda p, h: outer(p, h) * math.inf, inner, params, hparams
    if where == "gradient":
        return lambda p, h: outer(p, h) + (p["b"] - W).abs().sqrt().sum(), inner, params, hparams
    if where == "condition":
        return outer, lambda p, h: inner(p, h) + (p["b"] - W).abs().sqrt().sum(), params, hparams
    if where == "product":  # a gradient of zero with an infinite slope
        flat = lambda p, h: inner(p, h) + ((p["b"] - W).abs() ** 1.5).sum()
        return outer, flat, params, hparams
    (params if where == "params" else hparams)["b" if where == "params" else "y"][1] = math.nan
    return outer, inner, params, hparams


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("outer", "^the outer loss holds NaN"),
        ("gradient", r"^the gradient of the outer loss by params\['b'\] holds"),
        ("condition", r"^the inner condition \(its gradient\) at params\['b'\] holds"),
        ("product", r"^the product with the inner Hessian at params\['b'\] holds"),
        ("params", r"^params\['b'\] holds"),
        ("hparams", r"^hparams\['y'\] holds"),
    ],
)
@pytest.mark.parametrize("solver", [None, CG(), GMRES()], ids=repr)
def test_row_09_a_number_that_is_not_finite_is_named_with_its_place_and_leaf(where, words, solver):
    for mode in ("warn", "raise"):
        with pytest.raises(hypergrad.NotFinite, match=words):
            implicit_grad(*_spoilt(where), solver=solver, on_failure=mode)


def test_row_09_a_right_hand_side_that_is_not_finite_is_named():
    with pytest.raises(hypergrad.NotFinite, match=r"^the right-hand side"):
        root_vjp(lambda x, a: x - a, W, (W,), t([math.nan, 1.0]))


@pytest.mark.parametrize(
    "solver", [*[method() for method in KRYLOV], Exact(), Neumann(), Auto()], ids=repr
)
def test_row_10_a_right_hand_side_of_zero_gives_exact_zeros_without_a_product(solver):
    product = Counting(torch.eye(3))
    x, info = solver.solve(product, torch.zeros(3), x0=torch.ones(3), rmatvec=product)
    assert product.count == info.matvecs == 0
    assert torch.equal(x, torch.zeros(3))
    assert info.status == Status.CONVERGED


def test_row_10_an_outer_loss_at_its_own_minimum_is_fine_and_one_without_params_is_not():
    outer = lambda w, h: ((w - W) ** 2).sum() + (h**2).sum()
    hypergradient, info = implicit_grad(outer, bowl, W, H, solver=CG(), return_info=True)
    assert torch.equal(hypergradient, 2 * H)
    assert info.success
    with pytest.raises(hypergrad.NotConnected, match=r"outer does not depend on params.*detach"):
        implicit_grad(lambda w, h: (w.detach() + h).sum(), bowl, W, H)


@ITERATIVE
@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100], ids=["1e-30", "1e30"])  # exact scalings
def test_row_11_a_right_hand_side_of_any_size_is_solved_to_the_same_accuracy(method, dtype, scale):
    A, b = with_spectrum(torch.linspace(1, 9, 8)).to(dtype), torch.ones(8, dtype=dtype)
    want, plain = solve(method(), A, b)
    x, info = solve(method(), A, b * scale)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(x / scale, want, rtol=1e3 * eps, atol=1e2 * eps)
    assert info.status == plain.status == Status.CONVERGED
    assert abs(info.iterations - plain.iterations) <= 1


@ITERATIVE
def test_row_12_an_x0_that_is_already_the_answer_takes_no_iteration(method):
    A, b = with_spectrum(torch.linspace(1, 9, 8)), ones()
    first, _ = solve(method(rtol=1e-8), A, b)
    x, info = solve(method(rtol=1e-8), A, b, x0=first)
    assert info.iterations == 0
    assert info.status == Status.CONVERGED
    torch.testing.assert_close(x, first, rtol=1e-14, atol=0)
    _, seen = quadratic(A, b, b, solver=method(rtol=1e-8), x0=first, return_info=True)
    assert seen.iterations == 0


def test_row_13_exact_refuses_a_system_too_large_for_memory_before_it_allocates():
    def never(v):
        raise AssertionError("a product was formed")

    words = r"1000000 x 1000000.* 1\.49e\+04 GiB, and [\d.]+ GiB are free\. Use CG"
    with pytest.raises(hypergrad.UnsupportedOperation, match=words):
        Exact().solve(never, torch.ones(10**6))
    inner = lambda w, h: ((w - h) ** 2).sum()
    with pytest.raises(hypergrad.UnsupportedOperation, match=words):
        implicit_grad(total, inner, torch.ones(10**6), torch.tensor(1.0), solver=Exact())


@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_row_13a_with_everything_in_order_nothing_is_said_at_the_defaults(dtype):
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(n, generator=generator).to(dtype) for n in ((80, 30), (80,)))
    y, x_val = x.sum(1) + noise, x[::2] + 0.1
    inner = lambda w, s: ((x @ w - y) ** 2).mean() + s.exp() * (w**2).sum()
    outer = lambda w, s: ((x_val @ w - x_val.sum(1)) ** 2).mean()

    @custom_argmin(inner)
    def fit(init, s):
        eye = torch.eye(30, dtype=dtype)
        return torch.linalg.solve(x.T @ x / 80 + s.exp() * eye, x.T @ y / 80)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s = torch.tensor(-2.0, dtype=dtype, requires_grad=True)
        w = fit(None, s).detach()
        want = implicit_grad(outer, inner, w, s)
        for solver in (*[method() for method in KRYLOV], Exact(), Auto(), Auto(dense_below=0)):
            close = {"rtol": 1e-2, "atol": 0}
            torch.testing.assert_close(
                implicit_grad(outer, inner, w, s, solver=solver), want, **close
            )
        implicit_backward(outer, inner, w, s)
        outer(fit(None, s), s).backward()
        torch.testing.assert_close(s.grad, 2 * want, rtol=1e-4, atol=0)
        step = lambda w, s: w - 0.2 * grad(inner)(w, s)
        unrolled_grad(outer, step, torch.zeros_like(w), s, steps=50)
        vmap(lambda s: implicit_grad(outer, inner, fit(None, s), s))(torch.stack([s, s + 1]))


# Values and structures


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_14_half_precision_keeps_vectors_and_sums_in_float32_and_casts_back(dtype):
    # In half precision itself the residual would not shrink by a thousandth: 1 - 0.001 rounds.
    x, info = Neumann(terms=2000, step_size=1.0).solve(lambda v: v * 1e-3, torch.ones(4).to(dtype))
    assert x.dtype == dtype
    assert info.residual_norm.dtype == torch.float32
    want = torch.full((4,), 1e3 * (1 - 0.999**2000))
    torch.testing.assert_close(x.float(), want, rtol=2e-2, atol=0)
    for solver in (None, *[method() for method in KRYLOV]):
        h = H.to(dtype)
        options = {"solver": solver, "inner_tol": 3e-2, "return_info": True}
        hypergradient, info = implicit_grad(total, bowl, 1 / (1 + h), h, **options)
        assert hypergradient.dtype == info.solution.dtype == dtype
        torch.testing.assert_close(hypergradient.double(), SLOPE, rtol=3e-2, atol=0)


@pytest.mark.parametrize("solver", [None, CG(), GMRES()], ids=repr)
def test_row_15_leaves_of_several_float_dtypes_each_keep_their_own(solver):
    h = {"half": H.bfloat16(), "single": H.float(), "double": H}
    w = {k: 1 / (1 + v) for k, v in h.items()}
    both = lambda fun: lambda w, h: sum(fun(w[k], h[k]).double() for k in h)
    options = {"solver": solver, "inner_tol": 0.05, "return_info": True}
    hypergradient, info = implicit_grad(both(total), both(bowl), w, h, **options)
    for k, tolerance in {"half": 3e-2, "single": 1e-2, "double": 1e-2}.items():
        assert hypergradient[k].dtype == info.solution[k].dtype == h[k].dtype
        torch.testing.assert_close(hypergradient[k].double(), SLOPE, rtol=tolerance, atol=0)


def test_row_15_a_vector_of_the_wrong_dtype_is_an_error_that_names_both():
    words = r"has dtype torch.float32, but params has dtype torch.float64"
    with pytest.raises(hypergrad.StructureMismatch, match=f"^cotangent {words}"):
        root_vjp(lambda x, a: x - a, W, (W,), W.float())
    with pytest.raises(hypergrad.StructureMismatch, match=f"^x0 {words}"):
        implicit_grad(total, bowl, W, H, x0=W.float())
    with pytest.raises(hypergrad.StructureMismatch, match=rf"^F\(params, ...\) {words}"):
        implicit_grad(total, Root(lambda w, h: (w - h).float()), W, H)
    with pytest.raises(hypergrad.StructureMismatch, match=r"tangents for args\[0\] has dtype"):
        root_jvp(lambda x, a: x - a, W, (W,), (W.float(),))
    with pytest.raises(hypergrad.StructureMismatch, match=r"^matvec\(v\) has dtype"):
        CG().solve(lambda v: v.float(), W)


def test_row_16_complex_leaves_are_refused_by_name():
    z = {"z": torch.ones(2, dtype=torch.complex64)}
    words = r"\['z'\] is complex \(torch.complex64\).*view_as_real"
    with pytest.raises(hypergrad.UnsupportedOperation, match=f"params{words}"):
        implicit_grad(lambda p, h: p["z"].abs().sum(), lambda p, h: p["z"].abs().sum(), z, H)
    with pytest.raises(hypergrad.UnsupportedOperation, match=f"hparams{words}"):
        implicit_grad(total, bowl, W, z)
    with pytest.raises(hypergrad.UnsupportedOperation, match=f"b{words}"):
        CG().solve(lambda v: v, z)


def test_row_17_leaves_on_two_devices_are_an_error_that_names_both():
    params = {"a": torch.zeros(2), "b": torch.zeros(2, device="meta")}
    words = r"\['b'\] is on meta but {}\['a'\] is on cpu; move them to one device"
    with pytest.raises(hypergrad.StructureMismatch, match="params" + words.format("params")):
        implicit_grad(lambda p, h: p["a"].sum(), lambda p, h: h, params, torch.tensor(1.0))
    with pytest.raises(hypergrad.StructureMismatch, match="b" + words.format("b")):
        CG().solve(lambda v: v, params)


@pytest.mark.parametrize("devices", [("cpu", "meta"), ("meta", "cpu")])
def test_row_17_params_and_hparams_on_two_devices_are_an_error_that_names_both(devices):
    p, h = (torch.ones(3, device=device) for device in devices)
    bowl = lambda p, h: (h * p * p).sum()
    words = rf"is on {devices[1]} but params is on {devices[0]}; move"
    for call in (
        lambda: implicit_grad(lambda p, h: p.sum(), bowl, p, h),
        lambda: implicit_grad(bowl, lambda p, h: (p * p).sum(), p, h),
        lambda: custom_argmin(bowl)(lambda init, h: p)(None, h.requires_grad_()),
        lambda: hypergrad.root_vjp(lambda p, h: h * p, p, (h.detach(),), p),
        lambda: hypergrad.unrolled_grad(bowl, lambda p, h: h * p, p, h, steps=2),
    ):
        with pytest.raises(hypergrad.StructureMismatch, match=words):
            call()


@pytest.mark.parametrize("solver", [None, CG(), GMRES()], ids=repr)
def test_row_18_leaves_that_are_0d_empty_strided_expanded_or_overlapping_are_right(solver):
    base = torch.linspace(0.5, 4, 8, dtype=D)
    h = {
        "scalar": t(2.0),
        "empty": torch.zeros(0, dtype=D),
        "strided": base[::3],
        "transposed": base[:6].reshape(2, 3).T,
        "expanded": ones(1).expand(3),
        "overlapping": base.as_strided((3, 2), (1, 1)),
    }
    w = {k: v.as_strided(v.shape, v.stride()) for k, v in h.items()}  # laid out alike
    want = {k: -v / (1 + h[k]) for k, v in w.items()}
    every = lambda fun: lambda w, h: sum(fun(w[k], h[k]) for k in h)
    # The Hessian does not depend on w, so that the formula holds at any point.
    hypergradient = implicit_grad(every(total), every(bowl), w, h, solver=solver, inner_tol=None)
    for k in h:
        torch.testing.assert_close(hypergradient[k], want[k], rtol=1e-5, atol=1e-8)


def test_row_19_integers_bools_none_and_numbers_are_constants_and_come_back():
    h = {"h": H, "n": torch.tensor([7]), "yes": torch.tensor(True), "none": None, "k": 2, "s": "x"}
    w = {"w": W, "n": torch.tensor(3), "none": None, "k": 2.5}
    outer = lambda w, h: w["w"].sum() * (w["n"] - h["k"])
    inner = lambda w, h: bowl(w["w"], h["h"]) * w["k"] * h["n"][0]
    hypergradient, info = implicit_grad(outer, inner, w, h, return_info=True)
    torch.testing.assert_close(hypergradient["h"], SLOPE)
    assert (hypergradient["none"], hypergradient["k"], hypergradient["s"]) == (None, 2, "x")
    for name in ("n", "yes"):
        assert hypergradient[name].dtype == h[name].dtype
        assert not hypergradient[name].any()
    assert (info.solution["none"], info.solution["k"]) == (None, 2.5)
    assert info.solution["n"] == 0


class Tied(nn.Module):
    """Two linear maps that share their weight, a frozen bias and a buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight
        self.shift = nn.Parameter(torch.tensor([0.3, -0.1]), requires_grad=False)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, x):
        return self.b(torch.tanh(self.a(x) + self.shift)) * self.scale


def test_row_20_frozen_parameters_and_buffers_are_untouched_and_tied_weights_summed_once():
    torch.manual_seed(0)
    net, x, s = Tied().double(), torch.randn(6, 2, dtype=D), t(0.5)
    params = dict(net.named_parameters())
    kept = {k: (v.clone(), v._version) for k, v in net.state_dict().items()}

    def loss(p, s):
        fit = (functional_call(net, p, (x,)) ** 2).mean()
        return fit + s * (p["a.weight"] ** 2).sum() + (p["shift"] ** 2).sum()

    outer = lambda p, s: functional_call(net, p, (x,)).sum() + p["shift"].sum()
    options = {"inner_tol": None, "return_info": True, "on_failure": "raise"}
    hypergradient, info = implicit_grad(outer, loss, params, s, **options)
    of = lambda fun: lambda v: fun({"a.weight": v, "shift": net.shift.detach()}, s)
    v = net.a.weight.detach()  # the one variable that there is
    A, b = hessian(of(loss))(v).reshape(4, 4), grad(of(outer))(v).flatten()
    torch.testing.assert_close(hypergradient, -2 * v.flatten() @ torch.linalg.solve(A, b))
    assert not info.solution["shift"].any()
    for k, tensor in net.state_dict().items():
        assert torch.equal(tensor, kept[k][0])
        assert tensor._version == kept[k][1]
    assert all(p.grad is None for p in net.parameters())


def test_row_21_a_hyperparameter_that_neither_loss_uses_gets_zeros_and_one_warning():
    h = {"h": H, "idle": [ones(3), ones(2)]}
    with pytest.warns(ConvergenceWarning) as caught:
        hypergradient = implicit_grad(total, lambda w, h: bowl(w, h["h"]), W, h)
    (warning,) = caught
    assert "Neither outer nor inner depends on hparams['idle'][0], hparams['idle'][1]" in str(
        warning.message
    )
    assert warning.filename == __file__
    assert [g.tolist() for g in hypergradient["idle"]] == [[0, 0, 0], [0, 0]]
    torch.testing.assert_close(hypergradient["h"], SLOPE)


def test_row_22_a_hyperparameter_of_the_outer_loss_has_its_direct_term():
    outer = lambda w, h: w.sum() + (h["both"] ** 3).sum() + h["outer"] ** 2
    h = {"both": H, "outer": t(3.0), "inner": H.clone()}
    inner = lambda w, h: bowl(w, (h["both"] + h["inner"]) / 2)
    hypergradient = implicit_grad(outer, inner, W, h)
    torch.testing.assert_close(hypergradient["outer"], t(6.0))
    torch.testing.assert_close(hypergradient["both"], 3 * H**2 + SLOPE / 2)
    torch.testing.assert_close(hypergradient["inner"], SLOPE / 2)


def test_row_23_a_captured_tensor_is_differentiated_by_the_decorators_or_named():
    def find(lam, s):
        fit = custom_argmin(lambda w, s: (w - s) ** 2 + lam * w**2)
        return fit(lambda init, s: s / (1 + lam.detach()))(None, s)

    lam = t(1.0).requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(find(lam, t(2.0)), lam)[0], t(-0.5))
    s = t(2.0).requires_grad_()
    for derivative in (
        lambda: grad(find)(t(1.0), t(2.0)),
        lambda: jvp(lambda lam: find(lam, t(2.0)), (t(1.0),), (t(1.0),)),
        lambda: torch.autograd.grad(find(lam, s), s, create_graph=True),
    ):
        with pytest.raises(hypergrad.UnsupportedOperation, match="captures lam"):
            derivative()


def test_row_23_a_captured_tensor_is_a_constant_of_implicit_grad_and_a_captured_leaf_an_error():
    other, h = t(2.0).requires_grad_(), H.clone().requires_grad_()
    hypergradient = implicit_grad(total, lambda w, h: other * bowl(w, h), W, h)
    torch.testing.assert_close(hypergradient, SLOPE)
    assert other.grad is None
    for outer, inner in (
        (total, lambda w, s: bowl(w, h) + 0 * s.sum()),
        (lambda w, s: w.sum() * h.sum(), bowl),
    ):
        with pytest.raises(hypergrad.NotConnected, match="reaches hparams past its arguments"):
            implicit_grad(outer, inner, W, h)


def test_row_24_another_structure_or_shape_is_an_error_with_the_path_and_both_shapes():
    p = {"w": W}
    root = lambda x, a: {"w": x["w"] - a["k"]}
    shapes = r"\['w'\] has shape \(1,\), but params\['w'\] has shape \(2,\)"
    short, F_ = {"w": W[:1]}, Root(lambda p, h: {"w": p["w"][:1]})
    of_w = lambda fun: lambda p, h: fun(p["w"], h)
    for words, call in (
        (r"outer must return a scalar.*\(2,\)", lambda: implicit_grad(lambda w, h: w, bowl, W, H)),
        (rf"F\(params, ...\){shapes}", lambda: implicit_grad(of_w(total), F_, p, H)),
        (rf"x0{shapes}", lambda: implicit_grad(of_w(total), of_w(bowl), p, H, x0=short)),
        (rf"cotangent{shapes}", lambda: root_vjp(root, p, ({"k": W},), short)),
        (
            r"args\[0\]\['k'\] has shape \(1,\), but args\[0\]\['k'\] has shape \(2,\)",
            lambda: root_jvp(root, p, ({"k": W},), ({"k": W[:1]},)),
        ),
        ("x0 must have the structure of params", lambda: implicit_grad(total, bowl, W, H, x0=p)),
        ("tangents for args.0. must have", lambda: root_jvp(root, p, ({"k": W},), (W,))),
        (
            r"F\(params, ...\) must have the structure of params",
            lambda: implicit_grad(total, Root(lambda w, h: {"w": w}), W, H),
        ),
    ):
        with pytest.raises(hypergrad.StructureMismatch, match=words):
            call()


@pytest.mark.parametrize("which", ["outer", "inner"])
def test_row_25_a_loss_that_changes_a_constant_in_place_is_an_error_that_names_it(which):
    h = {"h": H, "count": torch.tensor(3)}

    def losses(name, fun):
        return lambda w, h: (h["count"].add_(name == which), fun(w, h["h"]))[1]

    with pytest.raises(hypergrad.UnsupportedOperation, match=r"changes hparams\['count'\] in pl"):
        implicit_grad(losses("outer", total), losses("inner", bowl), W, h)
    assert h["count"] == 3


def test_row_25_our_own_code_changes_nothing_of_the_callers():
    w, h = W.clone().requires_grad_(), H.clone().requires_grad_()
    fit = custom_argmin(bowl)(lambda init, h: 1 / (1 + h))
    kept = [(v, v.detach().clone(), v._version) for v in (w, h)]
    for solver in (None, *[method() for method in KRYLOV], Neumann(terms=200)):
        implicit_grad(total, bowl, w, h, solver=solver, x0=w.detach())
    torch.autograd.grad(fit(w.detach(), h).sum(), h)
    grad(lambda h: fit(w.detach(), h).sum())(h)
    for tensor, value, version in kept:
        assert torch.equal(tensor, value)
        assert tensor._version == version
        assert tensor.grad is None


# Networks


@pytest.mark.parametrize("solver", [None, CG(rtol=1e-12), GMRES(rtol=1e-12)], ids=repr)
def test_row_26_dropout_is_drawn_once_for_a_whole_solve_and_as_by_one_call_of_each(solver):
    drawn = []

    def noisy(w, h):
        drawn.append(F.dropout(ones(40), 0.5))
        return ((drawn[-1] * w - h) ** 2).sum() / 2 + (w**2).sum() / 2

    outer = lambda w, h: F.dropout(w, 0.0).sum() + 0 * torch.rand(3).sum()
    torch.manual_seed(3)
    outer(ones(40), ones(40)), noisy(ones(40), ones(40))
    after = torch.get_rng_state()
    drawn.clear()
    torch.manual_seed(3)
    hypergradient = implicit_grad(outer, noisy, ones(40), ones(40), solver=solver, inner_tol=None)
    assert torch.equal(torch.get_rng_state(), after)
    (mask,) = drawn
    torch.testing.assert_close(hypergradient, mask / (mask**2 + 1), rtol=1e-9, atol=0)


def test_row_26_all_derivatives_of_one_decorated_answer_see_one_draw():
    drawn = []

    def noisy(w, h):
        drawn.append(F.dropout(ones(40), 0.5))
        return ((drawn[-1] * w - h) ** 2).sum() / 2 + (w**4).sum() / 4

    fit = custom_argmin(noisy, inner_tol=None, solver=CG(rtol=1e-12))(lambda init, h: ones(40))
    h = ones(40).requires_grad_()
    (first,) = torch.autograd.grad(fit(None, h).sum(), h, create_graph=True)
    torch.autograd.grad(first.sum(), h)
    assert all(torch.equal(mask, drawn[-1]) for mask in drawn[-2:])
    torch.testing.assert_close(first.detach(), drawn[-1] / (drawn[-1] ** 2 + 3))


@pytest.mark.parametrize("which", ["outer", "inner"])
def test_row_26_check_hypergrad_names_a_loss_that_is_not_deterministic(which):
    noisy = lambda fun: lambda w, h: fun(F.dropout(w, 0.5), h)
    losses = (noisy(total), bowl) if which == "outer" else (total, noisy(bowl))
    torch.manual_seed(0)
    report = check_hypergrad(*losses, lambda h: 1 / (1 + h) * ones(20), ones(20) * 2)
    assert not report.ok
    assert report.blame == "loss not deterministic"
    assert which in report.reason


@pytest.mark.parametrize("which", ["outer", "inner"])
def test_row_27_batch_norm_with_running_statistics_is_an_error_and_its_buffers_are_kept(which):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    x, params = torch.randn(6, 2, dtype=D), {k: v.detach() for k, v in net.named_parameters()}
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    runs = lambda p, s: (functional_call(net, p, (x,)) ** 2).sum()
    small = lambda p, s: sum((v**2).sum() for v in p.values()) * s
    losses = (runs, small) if which == "outer" else (small, lambda p, s: runs(p, s) + small(p, s))
    fit = custom_argmin(lambda p, s: runs(p, s) + small(p, s))(lambda init, s: params)
    for call in (
        lambda: implicit_grad(*losses, params, t(0.1)),
        lambda: fit(None, t(0.1).requires_grad_())["0.bias"].sum().backward(),
    ):
        cures = r"running statistics.*eval\(\).*track_running_stats=False.*GroupNorm"
        with pytest.raises(hypergrad.UnsupportedOperation, match=cures):
            call()
    for k, v in net.state_dict().items():
        assert torch.equal(v, kept[k])


def test_row_27_batch_norm_with_running_statistics_is_the_same_error_under_transforms():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    xs, params = torch.randn(2, 6, 2, dtype=D), {k: v.detach() for k, v in net.named_parameters()}
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    small = lambda p, x, s: sum((v**2).sum() for v in p.values()) * s
    runs = lambda p, x, s: (functional_call(net, p, (x,)) ** 2).sum() + small(p, x, s)
    fit = custom_argmin(runs)(lambda init, x, s: params)

    def once(x):
        by_x = lambda p, s: runs(p, x, s)
        return implicit_grad(lambda p, s: small(p, x, s), by_x, params, t(0.1))

    for call in (
        lambda: vmap(once)(xs),
        lambda: grad(lambda s: fit(None, xs[0], s)["0.bias"].sum())(t(0.1)),
        lambda: vmap(grad(lambda x: fit(None, x, t(0.1))["0.bias"].sum()))(xs),
    ):
        with pytest.raises(hypergrad.UnsupportedOperation, match=r"running statistics.*eval\(\)"):
            call()
    for k, v in net.state_dict().items():
        assert torch.equal(v, kept[k])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_row_29_it_works_under_no_grad_and_inference_mode(context):
    with context():
        h = H.clone()
        torch.testing.assert_close(implicit_grad(total, bowl, 1 / (1 + h), h), SLOPE)
        torch.testing.assert_close(
            custom_argmin(bowl)(lambda init, h: 1 / (1 + h))(None, H), W, rtol=0, atol=0
        )


def test_row_29_autocast_reaches_the_losses_and_not_the_linear_algebra():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    A, lam = x.T @ x, torch.tensor(0.5)
    w = torch.linalg.solve(A + lam * torch.eye(5), A.sum(1))
    by_sums = lambda w, s: ((x * (w - 1)).sum(1) ** 2).sum() / 2 + s * (w * w).sum() / 2
    by_matmul = lambda w, s: ((x @ (w - 1)) ** 2).sum() / 2 + s * (w * w).sum() / 2
    want = implicit_grad(total, by_sums, w, lam)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for solver in (None, CG(), GMRES()):
            exact = implicit_grad(total, by_sums, w, lam, solver=solver)
            torch.testing.assert_close(exact, want, rtol=1e-4, atol=0)
        rounded = implicit_grad(total, by_matmul, w, lam, inner_tol=None)
        torch.testing.assert_close(rounded, want, rtol=0.05, atol=0)


def test_row_29_inside_another_transform_it_works_or_says_what_to_use():
    found = vmap(lambda h: implicit_grad(total, bowl, 1 / (1 + h), h))(torch.stack([H, 2 * H]))
    torch.testing.assert_close(found[0], SLOPE)
    unrelated = lambda s: s**2 * implicit_grad(total, bowl, W, H).sum()
    torch.testing.assert_close(grad(unrelated)(t(3.0)), 6 * SLOPE.sum())
    answer = lambda h: implicit_grad(total, bowl, 1 / (1 + h), h).sum()
    for derivative in (grad(answer), lambda h: jvp(answer, (h,), (h,)), hessian(answer)):
        with pytest.raises(hypergrad.UnsupportedOperation, match=r"detached.*custom_argmin"):
            derivative(H)


def test_row_29_checkpointing_around_a_call_evaluates_each_loss_once():
    counts = {"outer": 0, "inner": 0, "fit": 0}

    def counted(name, f):
        def call(*args):
            counts[name] += 1
            return f(*args)

        return call

    def both(h):
        @custom_argmin(bowl)
        def fit(init, h):  # it takes derivatives itself
            counts["fit"] += 1
            w = torch.zeros(2, dtype=D, requires_grad=True)
            (g,) = torch.autograd.grad(bowl(w, h), w, create_graph=True)
            H = torch.stack([torch.autograd.grad(x, w, retain_graph=True)[0] for x in g])
            return (w - torch.linalg.solve(H, g)).detach()

        w = fit(None, h)
        return w * implicit_grad(counted("outer", total), counted("inner", bowl), w, h)

    h = H.clone().requires_grad_()
    found = checkpoint(both, h, use_reentrant=False)
    assert counts == {"outer": 1, "inner": 1, "fit": 1}
    torch.testing.assert_close(found.detach(), W * SLOPE)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), h)[0], -SLOPE / (1 + H) ** 2)


# Compositions


def quartic(w, a, b):
    """Minimal where w + w^3 = a, b weighing the second term."""
    return ((w - a) ** 2 / 2 + b * w**4 / 4).sum()


@custom_argmin(quartic)
def newton(init, a, b):
    w = a.clone()
    for _ in range(60):
        w = w - (w - a + b * w**3) / (1 + 3 * b * w**2)
    return w


def test_row_31_second_and_mixed_derivatives_and_gradcheck_pass():
    a, b = t([0.7, -1.2]).requires_grad_(), t([1.0, 0.5]).requires_grad_()
    fun = lambda a, b: newton(None, a, b)
    assert torch.autograd.gradcheck(fun, (a, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fun, (a, b), check_fwd_over_rev=True)
    a, b = a.detach(), b.detach()
    w = fun(a, b)
    slope = 1 / (1 + 3 * b * w**2)
    ((aa, ab), (ba, _)) = hessian(lambda a, b: fun(a, b).sum(), argnums=(0, 1))(a, b)
    torch.testing.assert_close(aa.diagonal(), -6 * b * w * slope**3)
    torch.testing.assert_close(ab, ba.T)
    mixed = -3 * w**2 * slope**2 + 6 * b * w * slope**3 * w**3
    torch.testing.assert_close(ab.diagonal(), mixed)


def test_row_31_a_second_derivative_that_would_be_wrong_raises():
    squares = GaussNewton(lambda w, h: w**2, lambda z, h: ((z - h) ** 2).sum())
    fit = custom_argmin(squares)(lambda init, h: h.sqrt())
    torch.testing.assert_close(grad(lambda h: fit(None, h).sum())(H), H.sqrt() / (2 * H))
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"GaussNewton.*Use Minimum"):
        hessian(lambda h: fit(None, h).sum())(H)
    normed = lambda w, h: (F.layer_norm(w, (4,)) ** 4).sum() + ((w - h) ** 2).sum()
    layer = custom_argmin(normed, on_failure="ignore")(lambda init, h: h.clone())
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"layer_norm.*GroupNorm"):
        hessian(lambda h: layer(None, h).sum())(t([1.0, 2.0, 4.0, 3.0]))


NORMS = {
    "layer": lambda: nn.LayerNorm(4),
    "batch": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "group": lambda: nn.GroupNorm(2, 4),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("solver", [Exact(), CG(rtol=1e-12), MINRES(rtol=1e-12)], ids=repr)
@pytest.mark.parametrize("form", ["objective", "gradient"])
def test_row_32_vmap_over_tasks_equals_the_loop_with_affine_norm_layers(norm, solver, form):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), NORMS[norm](), nn.Tanh(), nn.Linear(4, 1)).double()
    meta = {k: v.detach() + 0.3 * torch.randn_like(v) for k, v in net.named_parameters()}
    x, y = torch.randn(3, 6, 2, dtype=D), torch.randn(3, 6, 1, dtype=D)

    def one(x, y):
        fit = lambda p: ((functional_call(net, p, (x,)) - y) ** 2).mean()
        near = lambda p, m: fit(p) + 4 * sum(((p[k] - m[k]) ** 2).sum() for k in p)
        params = {k: v + 0.1 * torch.cos(v) for k, v in meta.items()}
        options = {"solver": solver, "inner_tol": None, "return_info": True}
        inner = near if form == "objective" else Root(grad(near), symmetric=True)
        return implicit_grad(lambda p, m: fit(p) ** 2, inner, params, meta, **options)

    found, info = vmap(one)(x, y)
    assert info.status.tolist() == [Status.CONVERGED] * 3
    for i in range(3):
        alone, single = one(x[i], y[i])
        for k in meta:
            torch.testing.assert_close(found[k][i], alone[k], rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(info.inner_residual[i], single.inner_residual)


@pytest.mark.parametrize("norm", NORMS)
def test_row_32_a_decorated_solver_with_an_affine_norm_layer_equals_the_loop_too(norm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), NORMS[norm](), nn.Tanh(), nn.Linear(4, 1)).double()
    meta = {k: v.detach() + 0.3 * torch.randn_like(v) for k, v in net.named_parameters()}
    x, y = torch.randn(3, 6, 2, dtype=D), torch.randn(3, 6, 1, dtype=D)

    def near(p, m, x, y):
        fit = ((functional_call(net, p, (x,)) - y) ** 2).mean()
        return fit + 4 * sum(((p[k] - m[k]) ** 2).sum() for k in p)

    for fit in (custom_argmin(near, inner_tol=None), custom_root(grad(near), inner_tol=None)):
        find = fit(lambda init, m, x, y: {k: v + 0.1 * torch.cos(v) for k, v in m.items()})
        slope = grad(lambda m, x, y, f=find: sum(v.sin().sum() for v in f(None, m, x, y).values()))
        found = vmap(slope, in_dims=(None, 0, 0))(meta, x, y)
        loop = [slope(meta, x[i], y[i]) for i in range(3)]
        for k in meta:
            want = torch.stack([one[k] for one in loop])
            torch.testing.assert_close(found[k], want, rtol=1e-8, atol=1e-11)


def test_row_32_each_task_has_a_status_of_its_own():
    shifts = t([0.0, 0.5, 0.0])
    one = lambda s: implicit_grad(total, bowl, W + s, H, on_failure="ignore", return_info=True)
    found, info = vmap(one)(shifts)
    assert info.success.tolist() == [True, False, True]
    torch.testing.assert_close(found[[0, 2]], torch.stack([SLOPE, SLOPE]))
    with pytest.warns(ConvergenceWarning, match="^1 of 3 tasks: params does not solve"):
        vmap(lambda s: implicit_grad(total, bowl, W + s, H))(shifts)
    with pytest.raises(hypergrad.NotFinite, match=r"^1 of 3 tasks: params"):
        vmap(lambda s: implicit_grad(total, bowl, W + s, H))(shifts * math.nan ** (shifts > 0))


def test_row_33_eight_threads_give_the_serial_answers():
    solvers = [None, *[method(rtol=1e-10) for method in KRYLOV], Neumann(terms=300)]

    def job(i):
        A = with_spectrum(torch.linspace(1, 5, 8), seed=i)
        a = torch.linspace(-1, 1, 4, dtype=D) * (i + 1)
        one = lambda s: quadratic(A, ones(), ones(), s * ones(), inner_tol=None, solver=solvers[i])
        curved = grad(lambda a: (newton(None, a, ones(4)) ** 2).sum())(a)
        return torch.cat([vmap(one)(t([1.0, 2.0])), curved])

    found, errors = [[] for _ in range(8)], []

    def work(i):
        try:
            found[i] = [job(i) for _ in range(3)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for i in range(8):
        want = job(i)
        for answer in found[i]:
            torch.testing.assert_close(answer, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("solver", [None, *[method() for method in KRYLOV]], ids=repr)
def test_row_34_nothing_of_a_solve_stays_alive_after_it(solver):
    w, h, seen = W.clone(), H.clone().requires_grad_().exp(), []

    def watched(w, h):
        value = bowl(w, h)
        seen.extend(weakref.ref(v) for v in (w, h, value))
        return value

    gc.disable()  # so that a cycle would be found
    try:
        hypergradient, info = implicit_grad(
            total, watched, w, h, solver=solver, inner_tol=None, return_info=True
        )
        seen += [weakref.ref(w), weakref.ref(h)]
        del w, h, watched
        alive = [ref() for ref in seen if ref() is not None]
    finally:
        gc.enable()
    assert alive == []
    assert all(leaf.grad_fn is None for leaf in pytree.tree_leaves([hypergradient, info]))


def test_row_34_memory_is_flat_in_the_number_of_inner_steps():
    def kept(steps):
        """Iterates that the differentiable answer keeps alive, and the bytes that it saves."""
        iterates, saved = [], []

        @custom_argmin(bowl, inner_tol=None)
        def fit(init, h):
            w = torch.zeros_like(h).requires_grad_()
            for _ in range(steps):
                w = w - 0.1 * torch.autograd.grad(bowl(w, h), w, create_graph=True)[0]
                iterates.append(weakref.ref(w))
            return w

        h = H.clone().requires_grad_()
        value = fit(None, h).sum()
        gc.collect()
        stack, nodes = [value.grad_fn], set()
        while stack:
            node = stack.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                saved += getattr(node, "saved_tensors", ())
                stack += [n for n, _ in node.next_functions]
        return (
            sum(ref() is not None for ref in iterates),
            len(nodes),
            sum(v.nbytes for v in saved),
        )

    few, many = kept(5), kept(100)
    assert few == many
    assert few[0] <= 1


def test_row_09_a_nan_that_is_ignored_is_no_success():
    params, hparams = t(torch.nan), t(1.0)
    inner = lambda w, h: (w - 1) ** 2 + h * w**2
    grads, info = hypergrad.implicit_grad(
        lambda w, h: w, inner, params, hparams, on_failure="ignore", return_info=True
    )
    assert grads.isnan()
    assert not info.success


def test_row_16_a_complex_loss_is_refused():
    with pytest.raises(hypergrad.UnsupportedOperation, match="complex"):
        hypergrad.implicit_grad(
            lambda w, h: w, lambda w, h: w**2 * (1 + 1j) + h * w, t(1.0), t(1.0)
        )


def test_row_25_a_change_past_autograd_is_an_error_that_names_the_leaf():
    def inner(w, h):
        with torch.no_grad():
            w.add_(1)
        return (w - 1) ** 2 + h * w**2

    with pytest.raises(hypergrad.UnsupportedOperation, match="params in place"):
        hypergrad.implicit_grad(lambda w, h: w, inner, t(0.5), t(1.0))


def test_row_29_a_decorated_solver_runs_under_inference_mode():
    fit = hypergrad.custom_argmin(lambda w, h: (w - 1) ** 2 + h * w**2)(lambda i, h: 1 / (1 + h))
    with torch.inference_mode():
        assert fit(None, t(1.0).clone()) == 0.5


def test_row_01_the_error_gives_the_norm_of_the_condition_and_its_scale():
    inner = lambda w, h: (w - 1) ** 2 + h * w**2
    with pytest.raises(hypergrad.NotConverged) as caught:
        hypergrad.implicit_grad(lambda w, h: w, inner, t(0.75), t(1.0), on_failure="raise")
    # F = 4 w - 2 = 1, curvature 4: the scale is 4 * 0.75.
    assert "norm of the condition is 1;" in str(caught.value)
    assert "is 3)" in str(caught.value)
    assert "residual is 0.333" in str(caught.value)


def test_row_30_a_module_wrapped_for_several_processes_is_refused(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
        params = {name: p.detach() for name, p in wrapped.named_parameters()}
        x = torch.ones(3, 2)

        def inner(params, h):
            fitted = functional_call(wrapped, params, (x,)).square().sum()
            return fitted + h * sum((p**2).sum() for p in params.values())

        outer = lambda params, h: sum(p.sum() for p in params.values())
        fit = hypergrad.custom_argmin(inner)(lambda init, h: init)
        for use in (
            lambda: hypergrad.implicit_grad(outer, inner, params, torch.tensor(1.0)),
            lambda: fit(params, torch.tensor(1.0)),
        ):
            with pytest.raises(hypergrad.UnsupportedOperation, match="DistributedDataParallel"):
                use()
    finally:
        torch.distributed.destroy_process_group()
