"""Wrong numbers that today's libraries return in silence: here right, or an error, or a warning."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.nn import functional as F

import hypergrad
from hypergrad import (
    CG,
    GMRES,
    ConvergenceWarning,
    Exact,
    Identity,
    Neumann,
    Status,
    custom_argmin,
    implicit_grad,
)

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

D = torch.float64
SOLVERS = [None, Exact(), CG(rtol=1e-12), GMRES(rtol=1e-12), Neumann(terms=3000, rtol=1e-12)]


def scalar(value):
    return torch.tensor(value, dtype=D)


def two_tensors(p, lam):
    """Coupled: the Hessian has off-diagonal blocks between the two tensors."""
    a, b = p
    return (a @ a) / 2 + (b @ b) + lam * (a @ b) + (a - 2 * b).sum()


def solved(lam):
    H = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=D) + lam * scalar([[0.0, 1.0], [1.0, 0.0]])
    x = torch.linalg.solve(H, scalar([-1.0, 2.0]))
    return x[0].expand(2), x[1].expand(2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_dense_solver_keeps_the_blocks_between_two_tensors(solver):
    """torchopt keeps the diagonal blocks alone."""
    lam = scalar(0.5)
    outer = lambda p, lam: p[0].sum() ** 2 + p[1].sum()
    want = grad(lambda lam: outer(solved(lam), lam))(lam)
    hypergradient = implicit_grad(outer, two_tensors, solved(lam), lam, solver=solver)
    torch.testing.assert_close(hypergradient, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_0d_inner_variable_has_its_gradient(solver):
    """torchopt returns 0."""
    lam = scalar(1.0)
    inner = lambda w, lam: (w - 1) ** 2 + lam * w**2
    hypergradient = implicit_grad(lambda w, lam: w, inner, scalar(0.5), lam, solver=solver)
    torch.testing.assert_close(hypergradient, scalar(-0.25))
    fit = custom_argmin(inner, solver=solver)(lambda init, lam: 1 / (1 + lam))
    torch.testing.assert_close(grad(lambda lam: fit(None, lam))(lam), scalar(-0.25))


@pytest.mark.filterwarnings("ignore")
def test_torchopt_does_return_zero_for_a_0d_inner_variable():
    torchopt = pytest.importorskip("torchopt")

    def objective(w, lam):
        return (w - 1) ** 2 + lam * w**2

    @torchopt.diff.implicit.custom_root(grad(objective), argnums=1, has_aux=False)
    def fit(w, lam):
        return 1 / (1 + lam.detach())

    lam = scalar(1.0).requires_grad_()
    try:
        (found,) = torch.autograd.grad(fit(scalar(0.0), lam), lam)
    except (RuntimeError, IndexError, TypeError):
        pytest.skip("this torchopt raises")
    assert abs(found.item() + 0.25) > 0.1


def test_second_derivatives_are_right_where_requires_grad_says_true():
    """torchopt's are wrong. w + w^3 = t, so w' = 1 / (1 + 3 w^2) and w'' = -6 w w'^3."""
    fit = custom_argmin(lambda w, t: (w - t) ** 2 / 2 + w**4 / 4)(_cubic)
    t = scalar(0.7).requires_grad_()
    w = fit(None, t)
    (first,) = torch.autograd.grad(w, t, create_graph=True)
    assert first.requires_grad
    (second,) = torch.autograd.grad(first, t)
    torch.testing.assert_close(first.detach(), 1 / (1 + 3 * w.detach() ** 2))
    torch.testing.assert_close(second, -6 * w.detach() / (1 + 3 * w.detach() ** 2) ** 3)


def _cubic(init, t):
    w = t.clone()
    for _ in range(40):
        w = w - (w - t + w**3) / (1 + 3 * w**2)
    return w


def test_a_captured_hyperparameter_has_its_gradient_or_is_named():
    """torchopt gives none."""
    lam = scalar(1.0).requires_grad_()

    def solve(lam, t):
        fit = custom_argmin(lambda w, t: (w - t) ** 2 + lam * w**2)(
            lambda init, t: t / (1 + lam.detach())
        )
        return fit(None, t)

    (found,) = torch.autograd.grad(solve(lam, scalar(2.0)), lam)
    torch.testing.assert_close(found, scalar(-0.5))
    for derivative in (
        lambda: grad(solve)(scalar(1.0), scalar(2.0)),
        lambda: jvp(lambda lam: solve(lam, scalar(2.0)), (scalar(1.0),), (scalar(1.0),)),
    ):
        with pytest.raises(hypergrad.UnsupportedOperation, match="captures lam"):
            derivative()
    t = scalar(2.0).requires_grad_()
    with pytest.raises(hypergrad.UnsupportedOperation, match="captures lam"):
        torch.autograd.grad(solve(lam, t), t, create_graph=True)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_neumann_series_does_not_diverge_at_its_default_settings(scale):
    """torchopt's errors reach 1e7."""
    d = scalar([1.0, 2.0, 3.0]) * scale
    inner = lambda w, t: (d * w * w).sum() / 2 - t * w.sum()
    hypergradient, info = implicit_grad(
        lambda w, t: w.sum(), inner, 1 / d, scalar(1.0), solver=Neumann(), return_info=True
    )
    torch.testing.assert_close(hypergradient, (1 / d).sum(), rtol=0.02, atol=0)
    assert info.status != Status.DIVERGED


def test_a_neumann_series_with_a_step_that_is_too_long_says_so():
    d = scalar([1.0, 2.0, 30.0])
    arguments = (lambda w, t: w.sum(), lambda w, t: (d * w * w).sum() / 2 - t * w.sum(), 1 / d)
    solver = Neumann(step_size=1.0)
    with pytest.warns(ConvergenceWarning, match="Neumann diverged"):
        implicit_grad(*arguments, scalar(1.0), solver=solver)
    with pytest.raises(hypergrad.Diverged, match="step_size"):
        implicit_grad(*arguments, scalar(1.0), solver=solver, on_failure="raise")


def test_damping_means_the_same_in_every_solver():
    """torchopt's ridge means another system in each."""
    A = scalar([[3.0, 1.0], [1.0, 2.0]])
    b = scalar([1.0, -2.0])
    want = torch.linalg.solve(A + 0.7 * torch.eye(2, dtype=D), b)
    for solver in (
        Exact(damping=0.7),
        CG(rtol=1e-12, damping=0.7),
        GMRES(rtol=1e-12, damping=0.7),
        Neumann(terms=500, rtol=1e-12, damping=0.7),
    ):
        x, info = solver.solve(lambda v: A @ v, b)
        torch.testing.assert_close(x, want, rtol=1e-10, atol=0)
        assert info.residual_norm < 1e-10
        hypergradient = implicit_grad(
            lambda w, t: b @ w, lambda w, t: w @ A @ w / 2 - t * w.sum(), torch.zeros(2, dtype=D),
            scalar(1.0), solver=solver, inner_tol=None,
        )  # fmt: skip
        torch.testing.assert_close(hypergradient, want.sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("solver", [CG(), CG(maxiter=1), GMRES(), GMRES(maxiter=1)])
def test_a_multiple_of_the_identity_is_solved_in_one_step(solver):
    """hypertorch and boat return the iterate before the last: 0."""
    b = torch.ones(5, dtype=D)
    x, info = solver.solve(lambda v: 4 * v, b)
    torch.testing.assert_close(x, b / 4)
    assert info.iterations == 1
    assert info.success
    hypergradient = implicit_grad(
        lambda w, t: w.sum(), lambda w, t: 2 * (w**2).sum() - t * w.sum(), b / 4, scalar(1.0),
        solver=solver,
    )  # fmt: skip
    torch.testing.assert_close(hypergradient, scalar(1.25))


@pytest.mark.parametrize("solver", [*SOLVERS, Identity()])
def test_nan_is_never_turned_into_zero_or_into_a_number(solver):
    """boat makes it 0; a NaN inner solution gives exactly 0 in jaxopt and lineax."""
    inner = lambda w, t: ((w - t) ** 2).sum() / 2
    nan = torch.full((2,), math.nan, dtype=D)
    t = torch.ones(2, dtype=D)
    for outer in (lambda w, t: (w**2).sum(), lambda w, t: w.sum()):  # the second is linear
        with pytest.raises(hypergrad.NotFinite):
            implicit_grad(outer, inner, nan, t, solver=solver)
    hypergradient = implicit_grad(
        lambda w, t: (w**2).sum(), inner, nan, t, solver=solver, on_failure="ignore"
    )
    assert torch.isnan(hypergradient).all()
    if isinstance(solver, Identity):
        return
    fit = custom_argmin(inner, solver=solver)(lambda init, t: t * math.nan)
    for total in (lambda t: (fit(None, t) ** 2).sum(), lambda t: fit(None, t).sum()):
        with pytest.raises(hypergrad.NotFinite):
            grad(total)(t)
        value = total(t.clone().requires_grad_())
        with pytest.raises(hypergrad.NotFinite):
            value.backward()
        with pytest.raises(hypergrad.NotFinite):
            jvp(total, (t,), (t,))
        with pytest.raises(hypergrad.NotFinite):
            vmap(grad(total))(t[None])


@pytest.mark.parametrize("solver", [None, CG(), GMRES()])
def test_the_default_does_not_square_the_condition_number(solver):
    """jaxopt's default returns the wrong sign at 9e6."""
    d = torch.logspace(0, math.log10(9e6), 20, dtype=D)
    Q, _ = torch.linalg.qr(torch.randn(20, 20, dtype=D, generator=torch.manual_seed(0)))
    A = Q @ torch.diag(d) @ Q.T
    c = torch.cos(torch.arange(20, dtype=D))
    w = torch.linalg.solve(A, c)
    hypergradient = implicit_grad(
        lambda w, t: w @ w / 2, lambda w, t: w @ A @ w / 2 - t * (c @ w), w, scalar(1.0),
        solver=solver,
    )  # fmt: skip
    torch.testing.assert_close(hypergradient, w @ w, rtol=1e-3, atol=0)


def test_an_unsolved_inner_problem_is_said():
    arguments = (lambda w, t: w, lambda w, t: (w - 1) ** 2 + t * w**2, scalar(0.6), scalar(1.0))
    with pytest.warns(ConvergenceWarning, match="does not solve the inner problem"):
        implicit_grad(*arguments)


def test_an_unsolved_linear_system_is_said():
    d = torch.logspace(0, 4, 50, dtype=D)
    arguments = (lambda w, t: w.sum(), lambda w, t: (d * w * w).sum() / 2 - t * w.sum(), 1 / d)
    with pytest.warns(ConvergenceWarning, match="ran out of iterations"):
        implicit_grad(*arguments, scalar(1.0), solver=CG(maxiter=5, rtol=1e-8))
    with pytest.raises(hypergrad.NotConverged, match="ran out of iterations"):
        implicit_grad(
            *arguments, scalar(1.0), solver=GMRES(maxiter=5, rtol=1e-8), on_failure="raise"
        )


def test_an_indefinite_matrix_is_said_by_a_solver_that_needs_a_definite_one():
    d = scalar([1.0, -3.0])
    arguments = (lambda w, t: w.sum(), lambda w, t: (d * w * w).sum() / 2 - t * w.sum(), 1 / d)
    with pytest.warns(ConvergenceWarning, match="negative curvature"):
        implicit_grad(*arguments, scalar(1.0), solver=CG())
    for solver in (None, GMRES()):  # these solve the system, and params is no minimum all the same
        with pytest.warns(ConvergenceWarning, match="no minimum of the inner problem"):
            hypergradient = implicit_grad(*arguments, scalar(1.0), solver=solver)
        torch.testing.assert_close(hypergradient, (1 / d).sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", [None, CG(), GMRES()])
def test_a_singular_matrix_without_a_solution_is_said(solver):
    d = scalar([1.0, 0.0])
    w = torch.ones(2, dtype=D)
    arguments = (lambda w, t: w.sum(), lambda w, t: (d * (w - t) ** 2).sum() / 2 + 0 * w.sum(), w)
    with pytest.warns(ConvergenceWarning):
        implicit_grad(*arguments, scalar(1.0), solver=solver)
    with pytest.raises((hypergrad.SingularHessian, hypergrad.NotConverged)):
        implicit_grad(*arguments, scalar(1.0), solver=solver, on_failure="raise")


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("solver", [None, CG(), GMRES(), Neumann(terms=500)])
def test_a_tiny_or_a_huge_right_hand_side_is_solved_as_well_as_one_of_size_one(size, dtype, solver):
    """An absolute tolerance stops after one step in imaml_dev; a tiny one gives NaN in JAX."""
    d = torch.linspace(1, 10, 12, dtype=dtype)
    w = 1 / d
    hypergradient = implicit_grad(
        lambda w, t: w.sum() * size,
        lambda w, t: (d * w * w).sum() / 2 - t * w.sum(),
        w,
        torch.ones((), dtype=dtype),
        solver=solver,
    )
    torch.testing.assert_close(hypergradient / size, w.sum(), rtol=1e-3, atol=0)


def test_dropout_draws_one_mask_for_a_whole_solve():
    """betty draws a new one in each product, so that CG sees another matrix every step."""
    t, w = torch.ones(40, dtype=D), torch.ones(40, dtype=D)
    drawn = []

    def inner(w, t):
        mask = F.dropout(torch.ones(40, dtype=D), 0.5)
        drawn.append(mask)
        return ((mask * w - t) ** 2).sum() / 2 + (w**2).sum() / 2

    hypergradient, info = implicit_grad(
        lambda w, t: w.sum(), inner, w, t, solver=CG(rtol=1e-12), inner_tol=None, return_info=True
    )
    (mask,) = drawn
    torch.testing.assert_close(hypergradient, mask / (mask**2 + 1), rtol=1e-10, atol=0)
    assert info.iterations <= 2  # the matrix has two eigenvalues


def test_dropout_draws_one_mask_for_all_solves_of_one_decorated_answer():
    drawn = []

    def inner(w, t):
        mask = F.dropout(torch.ones(40, dtype=D), 0.5)
        drawn.append(mask)
        return ((mask * w - t) ** 2).sum() / 2 + (w**4).sum() / 4

    fit = custom_argmin(inner, inner_tol=None, solver=CG(rtol=1e-12))(
        lambda init, t: torch.ones(40, dtype=D)
    )
    t = torch.ones(40, dtype=D, requires_grad=True)
    value = fit(None, t).sum()
    (first,) = torch.autograd.grad(value, t, create_graph=True)
    torch.autograd.grad(first.sum(), t)
    used = drawn[-1]
    torch.testing.assert_close(first.detach(), used / (used**2 + 3), rtol=1e-10, atol=0)


def test_the_weights_are_bit_for_bit_what_they_were():
    """betty perturbs them in place and does not undo it exactly."""
    torch.manual_seed(0)
    w, t = torch.randn(100).requires_grad_(), torch.rand(100).requires_grad_()
    kept = w.detach().clone(), t.detach().clone()
    for solver in SOLVERS:
        implicit_grad(
            lambda w, t: (w**3).sum(), lambda w, t: ((w - t) ** 2).sum() + (w**4).sum(), w, t,
            solver=solver, inner_tol=None, on_failure="ignore",
        )  # fmt: skip
    assert torch.equal(w, kept[0])
    assert torch.equal(t, kept[1])
    assert (w._version, t._version) == (0, 0)


def test_the_initial_guess_that_is_also_the_centre_of_a_proximal_term_has_its_gradient():
    """In optimistix the gradient with respect to the initial guess is exactly 0."""
    target = scalar([1.0, 2.0])

    def objective(w, centre):
        return ((w - target) ** 2).sum() + ((w - centre) ** 2).sum()

    fit = custom_argmin(objective)(lambda init, centre: (target + centre) / 2)
    theta = torch.zeros(2, dtype=D)
    found = grad(lambda t: fit(t, t).sum())(theta)
    torch.testing.assert_close(found, torch.full((2,), 0.5, dtype=D))
    with pytest.raises(hypergrad.UnsupportedOperation, match="initial guess"):
        custom_argmin(objective, argnums=0)
    leaf = theta.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="does not require grad"):
        fit(leaf, theta).sum().backward()  # the guess alone has no gradient, and not zero


def test_a_module_called_past_its_arguments_is_no_missing_term():
    """The data term of such an inner problem would be left out of its gradient and Hessian."""
    model = torch.nn.Linear(2, 1).double()
    x = torch.randn(5, 2, dtype=D)
    params = dict(model.named_parameters())

    def inner(p, lam):
        return (model(x) ** 2).mean() + lam * sum((v**2).sum() for v in p.values())

    with pytest.raises(hypergrad.NotConnected, match="functional_call"):
        implicit_grad(lambda p, lam: p["weight"].sum(), inner, params, scalar(1.0), inner_tol=None)


KINKED = {
    "l1": lambda X, y, w, lam: ((X @ w - y) ** 2).mean() / 2 + lam * w.abs().sum(),
    "hinge": lambda X, y, w, lam: torch.relu(1 - y.sign() * (X @ w)).mean() + lam * (w @ w),
    "absolute error": lambda X, y, w, lam: (X @ w - y).abs().mean() + lam * (w @ w),
    "one-sided": lambda X, y, w, lam: (
        ((X @ w - y) ** 2).mean() / 2 + lam * torch.relu(w + 0.3).sum()
    ),
}


def kinked(name, dtype):
    """An objective with kinks, and its solver's idea of the minimiser: on some of them."""
    drawn = torch.Generator().manual_seed(0)
    X = torch.randn(40, 8, dtype=D, generator=drawn)
    y = X @ scalar([1.0, -2.0, 0.5, 0, 0, 0, 0, 0]) + 0.1 * torch.randn(40, generator=drawn)
    X, y = X.to(dtype), y.to(dtype)
    return lambda w, lam: KINKED[name](X, y, w, lam)


@pytest.mark.parametrize("dtype", [torch.float32, D], ids=["float32", "float64"])
@pytest.mark.parametrize("name", KINKED)
@pytest.mark.parametrize("mode", ["backward", "grad", "jvp", "vmap", "raise"])
def test_a_kink_of_the_objective_at_the_minimum_speaks(mode, name, dtype):
    """The gradient jumps there over zero; beside a kink it is no rounding error that is left."""
    objective, lam = kinked(name, dtype), torch.tensor(0.3, dtype=dtype)
    seen = []
    fit = hypergrad.argmin(
        objective,
        solver=hypergrad.inner_solvers.LBFGS(maxiter=60),
        on_failure="raise" if mode == "raise" else "warn",
        callback=seen.append,
    )
    value = lambda lam: (fit(torch.zeros(8, dtype=dtype), lam) ** 2).sum()
    differentiate = {
        "backward": lambda: value(lam.requires_grad_()).backward(),
        "grad": lambda: grad(value)(lam),
        "jvp": lambda: jvp(value, (lam,), (torch.ones_like(lam),)),
        "vmap": lambda: vmap(grad(value))(torch.stack([lam, lam * 1.1])),
        "raise": lambda: grad(value)(lam),
    }[mode]
    if mode == "raise":
        with pytest.raises(hypergrad.NotConverged, match=r"kink there.*hypergrad\.prox"):
            differentiate()
        return
    with pytest.warns(ConvergenceWarning, match=r"kink there.*hypergrad\.prox") as spoken:
        differentiate()
    assert [one.category for one in spoken].count(ConvergenceWarning) == 1
    assert not seen[0].success.any()


def test_tasks_beside_one_at_a_kink_are_not_blamed():
    objective = lambda w, lam, c: ((w - c) ** 2).sum() / 2 + lam * torch.relu(w).sum()
    fit = hypergrad.argmin(objective, callback=lambda info: seen.append(info.success))
    seen, centres = [], scalar([[2.0, -1.0], [0.2, -1.0]])  # in the second task the first is at 0
    with pytest.warns(ConvergenceWarning, match="1 of 2 tasks: .* kink there"):
        vmap(grad(lambda lam, c: (fit(c, lam, c) ** 2).sum()), in_dims=(None, 0))(
            scalar(0.5), centres
        )
    assert seen[0].tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, D], ids=["float32", "float64"])
def test_a_root_at_a_jump_of_its_map_speaks(dtype):
    """An equation that changes its sign without a zero."""
    F = lambda z, t: z + torch.where(z > t, 1.0, -1.0).to(z) - 0.5 * t
    find = hypergrad.inner_solvers.Bisection(lower=-2.0, upper=2.0)
    root = hypergrad.custom_root(F)(lambda init, t: find(F, init, t)[0])
    with pytest.warns(ConvergenceWarning, match="kink there"):
        grad(lambda t: root(torch.zeros_like(t), t) ** 2)(torch.tensor(0.3, dtype=dtype))
