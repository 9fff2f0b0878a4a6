"""`check_hypergrad`: silent where all is well, and it blames what was spoilt."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.func import functional_call

import hypergrad
from hypergrad import CG, Exact, FixedPoint, GaussNewton, Identity, Root, check_hypergrad
from tests.problems import (
    EVERY,
    F64,
    WELL_POSED,
    affine,
    data,
    equilibrium,
    flat,
    ill_conditioned_ridge,
    imaml,
    logistic,
    per_feature_ridge,
    relative_error,
    ridge,
    ridge_data,
)


def check(problem, **changes):
    given = {"outer": problem.outer, "inner": problem.condition, "solve": problem.solve}
    given |= {"hparams": problem.hparams, **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return check_hypergrad(**given)


def gradient_descent(problem, init, steps, rate):
    """Plain steps on the inner objective, with the derivative through them."""

    def solve(hparams):
        w = init.clone().requires_grad_()
        for _ in range(steps):
            (slope,) = torch.autograd.grad(problem.inner(w, hparams), w, create_graph=True)
            w = w - rate * slope
        return w

    return solve


def blamed(report, part, *words):
    assert not report.ok
    assert report.blame == part
    for word in words:
        assert word in report.reason
    assert part in str(report)
    return True


@pytest.mark.parametrize("make", EVERY, ids=lambda make: make.__name__)
def test_ok_in_float64(make):
    problem = make()
    report = check(problem)
    assert report.ok
    assert report.blame is None
    assert report.relative_error < 1e-9
    assert report.unrolled_error < 1e-9
    assert not report.notes
    if all("random" not in label for label in report.labels):
        expected = flat(problem.hypergradient(problem.hparams))
        torch.testing.assert_close(report.implicit, expected)
        torch.testing.assert_close(report.differences, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", WELL_POSED, ids=lambda make: make.__name__)
def test_ok_in_float32_with_a_note(make):
    report = check(make(torch.float32))
    assert report.ok
    assert any("float32" in note for note in report.notes)
    assert report.tolerance > 2e-3


@pytest.mark.parametrize("make", [ridge, logistic, imaml], ids=lambda make: make.__name__)
@pytest.mark.parametrize("solver", [CG(rtol=1e-10), Exact()], ids=repr)
def test_ok_with_the_solvers_of_a_symmetric_matrix(make, solver):
    assert check(make(), solver=solver).ok


def test_a_system_that_float32_cannot_solve_is_no_success():
    report = check(ill_conditioned_ridge(torch.float32))
    assert report.ok or blamed(report, "linear system not solved")


def test_an_inner_solver_that_stops_early():
    problem = ridge()
    w = torch.zeros(5, dtype=F64)
    assert check(problem, solve=gradient_descent(problem, w, 2000, 0.02)).ok
    report = check(problem, solve=gradient_descent(problem, w, 5, 0.02))
    assert blamed(report, "inner problem not solved", "relative inner residual", "Newton")
    assert report.unrolled_error < 1e-6  # the differences are those of the few steps


def test_an_inner_solver_that_stops_a_little_early():
    problem = ridge()
    w = torch.zeros(5, dtype=F64)
    report = check(problem, solve=gradient_descent(problem, w, 25, 0.02))
    assert float(report.info.inner_residual) < 1e-2
    assert blamed(report, "inner problem not solved")


@pytest.mark.parametrize(
    ("solver", "word"),
    [
        (CG(maxiter=2), "relative residual"),
        (CG(rtol=1e-10, damping=1.0), "damping=1"),
        (Identity(), "identity"),
    ],
    ids=repr,
)
def test_a_linear_system_that_is_not_solved(solver, word):
    report = check(ridge(), solver=solver)
    assert blamed(report, "linear system not solved", word)


def test_a_linear_solve_without_success_is_quoted():
    report = check(ridge(), solver=CG(maxiter=2, rtol=1e-9))
    assert blamed(report, "linear system not solved", "maxiter", "MAX_ITERATIONS")


def test_a_hyperparameter_that_the_inner_loss_captures():
    problem = per_feature_ridge()
    captured = problem.hparams

    def inner(w, hparams):
        return problem.inner(w, captured)

    report = check(problem, inner=inner)
    assert blamed(report, "hyperparameter not connected", "hparams['log_penalty']", "captures")


def test_one_of_two_hyperparameters_that_the_inner_loss_captures():
    X, y = ridge_data()
    hparams = {"decay": torch.tensor(2.0, dtype=F64), "shift": torch.tensor(0.3, dtype=F64)}

    def objective(w, decay, shift):
        return (X @ w + shift - y).square().sum() / 2 + decay * (w @ w) / 2

    def solve(h):
        return torch.linalg.solve(X.T @ X + h["decay"] * torch.eye(5), X.T @ (y - h["shift"]))

    def outer(w, h):
        return (w - 1).square().sum() + h["decay"]

    def right(w, h):
        return objective(w, h["decay"], h["shift"])

    def wrong(w, h):
        return objective(w, h["decay"], hparams["shift"])

    assert check_hypergrad(outer, right, solve, hparams).ok
    report = check_hypergrad(outer, wrong, solve, hparams)
    assert blamed(report, "hyperparameter not connected", "hparams['shift']")
    assert "hparams['decay']" not in report.reason


def test_a_captured_hyperparameter_that_requires_grad():
    problem = ridge()
    lam = problem.hparams.clone().requires_grad_()
    report = check(problem, inner=lambda w, _: problem.inner(w, lam), hparams=lam)
    assert blamed(report, "hyperparameter not connected", "hparams")
    assert lam.grad is None


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_hyperparameters_used_through_detach(where):
    problem = ridge()
    loss = getattr(problem, where)
    report = check(problem, **{where: lambda w, lam: loss(w, lam.detach())})
    assert blamed(report, "hyperparameter not connected", "hparams", ".detach()")


def test_a_hyperparameter_that_is_detached_in_one_of_two_places():
    problem = ridge()

    def inner(w, lam):
        return problem.inner(w, lam / 2 + lam.detach() / 2)

    report = check(problem, inner=inner)
    assert blamed(report, "hyperparameter not connected", ".detach()")


def test_a_hyperparameter_that_the_inner_loss_captures_in_part():
    problem = ridge()
    captured = problem.hparams
    report = check(problem, inner=lambda w, lam: problem.inner(w, lam / 2 + captured / 2))
    assert blamed(report, "hyperparameter not connected", "in the same way")


def test_a_solve_that_returns_a_constant():
    problem = ridge()
    w = problem.solve(problem.hparams)
    report = check(problem, solve=lambda lam: w)
    assert blamed(report, "hyperparameter not connected", "same params")
    assert any("detached" in note for note in report.notes)


def test_a_hyperparameter_of_the_solver_alone():
    problem = ridge()
    hparams = {"lam": problem.hparams, "rate": torch.tensor(0.01, dtype=F64)}

    def solve(h):
        w = torch.zeros(5, dtype=F64)
        return gradient_descent(problem_of(h["lam"]), w, 3, h["rate"])(h["lam"])

    def problem_of(lam):
        return problem

    report = check(
        problem,
        outer=lambda w, h: problem.outer(w, h["lam"]) + 0 * h["rate"],
        inner=lambda w, h: problem.inner(w, h["lam"]),
        solve=solve,
        hparams=hparams,
    )
    assert not report.ok
    assert report.blame in ("hyperparameter not connected", "inner problem not solved")


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_dropout_in_a_loss(where):
    problem = ridge()
    loss = getattr(problem, where)

    def with_dropout(w, lam):
        return loss(torch.nn.functional.dropout(w, 0.5), lam)

    report = check(problem, **{where: with_dropout})
    assert blamed(report, "loss not deterministic", where, "eval()")


def test_a_solve_that_is_not_deterministic():
    problem = ridge()
    generator = np.random.default_rng(0)

    def solve(lam):
        return problem.solve(lam) * (1 + 1e-3 * generator.standard_normal())

    assert blamed(check(problem, solve=solve), "solve not deterministic", "seed")


def test_a_solve_that_draws_from_torch_sees_one_draw():
    problem = ridge()

    def solve(lam):
        return problem.solve(lam) * (1 + 1e-13 * torch.randn((), dtype=F64))

    assert check(problem, solve=solve).ok


def test_a_solve_that_is_not_smooth():
    problem = ridge()

    def solve(lam):
        return problem.solve(lam) + 1e-4 * torch.floor(1e5 * lam)

    report = check(problem, solve=solve, inner=problem.inner)
    assert not report.ok
    assert report.blame in ("solve not smooth", "inner problem not solved")


def test_a_jump_in_the_outer_loss_is_not_smooth():
    problem = ridge()
    report = check(problem, outer=lambda w, lam: problem.outer(w, lam) + torch.floor(1e5 * w).sum())
    assert blamed(report, "solve not smooth", "step sizes")


@pytest.mark.parametrize("solver", [None, CG(rtol=1e-8)], ids=repr)
def test_a_root_that_is_declared_symmetric_and_is_not(solver):
    problem = affine()

    def F(x, hparams):
        return x - problem.inner(x, hparams)

    assert check(problem, inner=Root(F)).ok
    report = check(problem, inner=Root(F, symmetric=True), solver=solver)
    assert blamed(report, "implicit gradient", "u.Av")  # of methods that make no use of it, too


def test_a_fixed_point_that_is_declared_symmetric_and_is_not():
    problem = affine()
    report = check(problem, inner=FixedPoint(problem.inner, symmetric=True), solver=CG(rtol=1e-9))
    assert blamed(report, "implicit gradient", "FixedPoint", "symmetric=False")


def test_a_custom_function_with_a_wrong_backward():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    problem = ridge()
    report = check(problem, outer=lambda w, lam: problem.outer(Wrong.apply(w), lam))
    assert blamed(report, "implicit gradient", "outer", "backward")


def test_gauss_newton_where_the_residuals_are_large():
    x = data(40, 8, dtype=F64)

    def outputs(w, lam):
        return (w * x).sin()

    def loss(z, lam):
        return (z - 3).square().sum() / 2

    def regulariser(w, lam):
        return lam * w * w / 2

    def objective(w, lam):
        return loss(outputs(w, lam), lam) + regulariser(w, lam)

    def solve(lam):
        w = torch.zeros((), dtype=F64)
        slope = torch.func.grad(objective)
        for _ in range(200):
            w = w - 0.1 * slope(w, lam)
        return w

    lam = torch.tensor(5.0, dtype=F64)
    assert check_hypergrad(lambda w, lam: w, objective, solve, lam).ok
    inner = GaussNewton(outputs, loss, regulariser)
    report = check_hypergrad(lambda w, lam: w, inner, solve, lam)
    assert blamed(report, "implicit gradient", "Gauss-Newton")


def test_params_that_a_loss_does_not_use():
    problem = ridge()
    report = check(problem, outer=lambda w, lam: lam**2)
    assert blamed(report, "params not connected", "outer does not depend on params")


def test_numbers_that_are_not_finite():
    problem = ridge()
    report = check(problem, outer=lambda w, lam: (w - 100).log().sum())
    assert blamed(report, "not finite", "outer loss")


def test_a_network_with_a_frozen_layer_trained_in_place():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    ).double()
    net[0].requires_grad_(False)
    x, y = torch.randn(20, 3, dtype=F64), torch.randn(20, 1, dtype=F64)
    start = [p.detach().clone() for p in net.parameters()]

    def inner(params, log_decay):
        error = (functional_call(net, params, (x,)) - y).square().mean()
        return error + log_decay.exp() * sum(p.square().sum() for p in params.values())

    def outer(params, log_decay):
        return (functional_call(net, params, (-x,)) - y).square().mean()

    def solve(log_decay):
        with torch.no_grad():
            for p, value in zip(net.parameters(), start, strict=True):
                p.copy_(value)
        last = list(net[2].parameters())
        optimizer = torch.optim.LBFGS(
            last,
            max_iter=200,
            tolerance_grad=1e-12,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure():
            optimizer.zero_grad()
            loss = inner(dict(net.named_parameters()), log_decay)
            loss.backward()
            return loss

        optimizer.step(closure)
        return dict(net.named_parameters())

    report = check_hypergrad(outer, inner, solve, torch.tensor(-1.0, dtype=F64))
    assert report.ok
    assert any("unrolled" in note for note in report.notes)


def test_many_hyperparameters_are_checked_along_random_directions():
    report = check(equilibrium())
    assert len(report.labels) == 6
    assert "hparams['W'], a random direction" in report.labels


def test_nothing_of_the_callers_is_changed():
    problem = per_feature_ridge()
    leaf = problem.hparams["log_penalty"].clone().requires_grad_()
    kept, version = leaf.detach().clone(), leaf._version

    def solve(hparams):
        answer = problem.solve(hparams)
        hparams["log_penalty"].zero_() if not hparams["log_penalty"].requires_grad else None
        torch.rand(3)
        return answer

    state = torch.get_rng_state()
    assert check(problem, hparams={"log_penalty": leaf}, solve=solve).ok
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(leaf, kept)
    assert leaf._version == version
    assert leaf.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_other_grad_modes(mode):
    problem = ridge()
    w = torch.zeros(5, dtype=F64)
    with mode():
        report = check(problem, solve=gradient_descent(problem, w, 2000, 0.02))
    assert report.ok


def test_running_statistics_are_refused_and_kept():
    problem = ridge()
    norm = torch.nn.BatchNorm1d(5).double()
    before = {name: t.clone() for name, t in norm.state_dict().items()}

    def outer(w, lam):
        return norm(torch.stack([w, 2 * w])).square().sum()

    with pytest.raises(hypergrad.UnsupportedOperation, match="eval"):
        check(problem, outer=outer)
    assert all(torch.equal(norm.state_dict()[name], t) for name, t in before.items())


def test_inside_a_function_transform_it_says_so():
    problem = ridge()

    def inside(lam):
        check(problem, hparams=lam)
        return lam

    with pytest.raises(hypergrad.UnsupportedOperation, match="outside"):
        torch.func.vmap(inside)(torch.ones(3, dtype=F64))


def test_the_warnings_of_a_decorated_solver_are_kept_inside():
    problem = ridge()
    fit = problem.decorated(solver=CG(maxiter=1, rtol=1e-12))
    assert check(problem, solve=fit).ok


def test_what_a_solver_raises_is_raised():
    def solve(lam):
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        check(ridge(), solve=solve)
    with pytest.raises(hypergrad.StructureMismatch, match="floating-point"):
        check_hypergrad(ridge().outer, ridge().inner, ridge().solve, torch.tensor(1))


def test_a_tolerance_of_ones_own():
    problem = ridge()
    w = torch.zeros(5, dtype=F64)
    solve = gradient_descent(problem, w, 100, 0.02)
    expected = problem.hypergradient(problem.hparams)
    params = solve(problem.hparams).detach()
    found = hypergrad.implicit_grad(problem.outer, problem.inner, params, problem.hparams)
    assert relative_error(found, expected) < 0.1
    assert check(problem, solve=solve, rtol=0.2).ok


# Found by trying to break it


A = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=F64))


def inner_of_three(w, theta):
    return w @ (A.to(w.dtype) @ w) / 2 - theta * w.sum()


def solve_of_three(theta):
    return theta / A.diag().to(theta.dtype)


def outer_of_three(w, theta):
    return (w - 1).square().sum() / 2


def check_three(theta=2.0, dtype=F64, **changes):
    given = {"outer": outer_of_three, "inner": inner_of_three, "solve": solve_of_three}
    theta = torch.tensor(theta, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return check_hypergrad(**(given | {"hparams": theta} | changes))


BEST = float((1 / A.diag()).sum() / (1 / A.diag().square()).sum())  # of the outer problem


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_hypergradient_of_zero_at_an_optimum_of_the_outer_problem(dtype):
    assert check_three(BEST, dtype).ok

    def steps(theta):
        w = torch.zeros(3, dtype=dtype)
        for _ in range(150):
            w = w - 0.2 * torch.func.grad(inner_of_three)(w, theta)
        return w

    assert check_three(BEST, dtype, solve=steps).ok


def test_a_fault_at_an_optimum_of_the_outer_problem_still_speaks():
    report = check_three(BEST, inner=lambda w, h: inner_of_three(w, (h + h.detach()) / 2))
    assert blamed(report, "hyperparameter not connected", ".detach()")
    report = check_three(BEST, inner=lambda w, h: inner_of_three(w, (h + BEST) / 2))
    assert blamed(report, "hyperparameter not connected", "in the same way")
    report = check_three(BEST, inner=lambda w, h: inner_of_three(w, BEST))
    assert blamed(report, "hyperparameter not connected", "captures")


@pytest.mark.parametrize("seed", range(20))
def test_dropout_of_two_unknowns_whose_masks_may_be_equal_by_chance(seed):
    def drop(w):
        return torch.nn.functional.dropout(w, 0.5)

    given = {
        "solve": lambda h: h * torch.ones(2, dtype=F64),
        "inner": lambda w, h: (w - h) @ (w - h),
    }
    torch.manual_seed(seed)
    state = torch.get_rng_state()
    report = check_three(outer=lambda w, h: (drop(w) - 1).square().sum(), **given)
    assert blamed(report, "loss not deterministic", "outer")
    report = check_three(**given | {"inner": lambda w, h: (w - h) @ (drop(w) - h)})
    assert blamed(report, "loss not deterministic", "inner")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dropout_that_is_switched_off_is_no_randomness():
    dropout = torch.nn.Dropout(0.5).eval()
    assert check_three(outer=lambda w, h: outer_of_three(dropout(w), h)).ok


@pytest.mark.parametrize("size", [1e-150, 1e-30, 1e-8, 1e8, 1e30])
def test_problems_of_any_size(size):
    assert check_three(outer=lambda w, h: size * outer_of_three(w, h)).ok
    assert check_three(inner=lambda w, h: size * inner_of_three(w, h)).ok
    assert check_three(
        2 / size,
        inner=lambda w, h: inner_of_three(w, size * h),
        solve=lambda h: solve_of_three(size * h),
    ).ok
    assert check_three(
        outer=lambda w, h: outer_of_three(w / size, h),
        inner=lambda w, h: inner_of_three(w / size, h),
        solve=lambda h: size * solve_of_three(h),
    ).ok


def test_hyperparameters_of_mixed_sizes_types_and_shapes():
    hparams = {
        "large": torch.tensor(1e9, dtype=F64),
        "small": torch.tensor(1e-9, dtype=F64),
        "empty": torch.zeros(0, dtype=F64),
        "half": torch.tensor([0.5], dtype=torch.float32),
        "count": torch.tensor(3),
        "none": None,
        "number": 2.0,
    }

    def theta(h):
        parts = h["large"] / 1e9, h["small"] * 1e9, h["half"].to(F64).sum()
        return sum(parts) * h["number"] + h["empty"].sum()

    report = check_three(
        hparams=hparams,
        outer=lambda w, h: outer_of_three(w, h) * h["count"],
        inner=lambda w, h: inner_of_three(w, theta(h)),
        solve=lambda h: solve_of_three(theta(h)),
    )
    assert report.ok
    assert report.labels == ("hparams['large']", "hparams['small']", "hparams['half'][0]")


def test_a_leaf_that_nothing_uses_is_noted():
    hparams = {"theta": torch.tensor(2.0, dtype=F64), "unused": torch.tensor(1.0, dtype=F64)}
    report = check_three(
        hparams=hparams,
        inner=lambda w, h: inner_of_three(w, h["theta"]),
        solve=lambda h: solve_of_three(h["theta"]),
    )
    assert report.ok
    assert any("hparams['unused']" in note for note in report.notes)


def test_a_solve_that_starts_from_its_last_answer():
    last = [torch.zeros(3, dtype=F64)]

    def solve(theta, steps):
        w = last[0]
        for _ in range(steps):
            w = w - 0.2 * torch.func.grad(inner_of_three)(w, theta)
        last[0] = w.detach()
        return w

    assert blamed(check_three(solve=lambda h: solve(h, 8)), "solve not deterministic", "seed")
    assert check_three(solve=lambda h: solve(h, 200)).ok


@pytest.mark.parametrize("wrap", [torch.Tensor.requires_grad_, torch.nn.Parameter])
def test_a_solve_that_returns_leaves_that_require_grad(wrap):
    assert check_three(solve=lambda h: wrap(solve_of_three(h.detach()))).ok


def test_a_solve_that_leaves_pytorch():
    report = check_three(solve=lambda h: torch.tensor(float(h) / A.diag().numpy()))
    assert report.ok
    assert any("detached" in note for note in report.notes)


def test_a_solve_that_cuts_a_part_of_its_graph():
    report = check_three(solve=lambda h: solve_of_three(h) / h * h.detach())
    assert report.ok
    assert any("through solve" in note for note in report.notes)


def test_a_kink_in_the_solution():
    report = check_three(
        1.0,
        inner=lambda w, h: (w - 1).square().sum() / 2 + h * w.abs().sum(),
        solve=lambda h: torch.relu(1 - h) * torch.ones(3, dtype=F64),
        outer=lambda w, h: (w - 1).square().sum(),
    )
    assert blamed(report, "solve not smooth", "kink", "one side")
    assert "NOT CHECKED" in str(report)


def test_the_edge_of_a_domain():
    report = check_three(solve=lambda h: solve_of_three(h) * torch.where(h > 2, torch.nan, 1.0))
    assert blamed(report, "not finite", "a step of", "logarithm")


def test_a_loss_whose_digits_are_lost_to_a_constant():
    report = check_three(outer=lambda w, h: outer_of_three(w, h) + 1e13)
    assert blamed(report, "lost in rounding", "Leave out of outer")


def test_a_matrix_of_zeros_is_not_taken_for_a_captured_value():
    report = check_three(
        outer=lambda w, h: w.sum(), inner=lambda w, h: ((w - h) ** 4).sum(), solve=torch.clone
    )
    assert blamed(report, "linear system not solved", "singular")


def test_a_solver_that_descends_a_wrong_gradient():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    def inner(w, h):
        return inner_of_three(w, h) + Halved.apply(w).square().sum()

    def solve(h):  # where the gradient that autograd gives is zero
        return h / (A.diag() + 1)

    assert blamed(check_three(inner=inner, solve=solve), "implicit gradient", "difference of its")


def test_faults_of_the_call_are_errors_that_name_them():
    with pytest.raises(hypergrad.StructureMismatch, match="return missing"):
        check_three(solve=lambda h: None)
    with pytest.raises(hypergrad.StructureMismatch, match=r"torch\.tensor"):
        check_three(hparams=2.0)
    with pytest.raises(hypergrad.UnsupportedOperation, match="complex"):
        check_three(hparams=torch.tensor(1j))
    with pytest.raises(hypergrad.UnsupportedOperation, match="in place"):
        check_three(outer=lambda w, h: outer_of_three(w.mul_(2), h))

    def picky(h):
        if h != 2:
            raise ValueError("only 2")
        return solve_of_three(h)

    with pytest.raises(ValueError, match="only 2") as caught:
        check_three(solve=picky)
    assert "small step" in caught.value.__notes__[0]


def test_the_report_can_be_read():
    text = str(check(ridge()))
    assert text.startswith("hypergradient: ok")
    for word in ("implicit", "difference", "unrolled", "hparams", "linear solve"):
        assert word in text


def test_a_step_size_of_the_solver_alone_is_no_fault():
    hparams = {"theta": torch.tensor(2.0, dtype=F64), "rate": torch.tensor(0.2, dtype=F64)}

    def solve(h):
        w = torch.zeros(3, dtype=F64)
        for _ in range(200):
            w = w - h["rate"] * torch.func.grad(inner_of_three)(w, h["theta"])
        return w

    assert check_three(
        hparams=hparams, solve=solve, inner=lambda w, h: inner_of_three(w, h["theta"])
    ).ok
