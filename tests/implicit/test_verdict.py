"""How an answer is judged: what is measured, warned of and raised."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import hypergrad
from hypergrad import CG, ConvergenceWarning, Exact, Neumann, implicit_grad
from tests.weighted_ridge import MATRIX, TARGET, expected, inner, outer, solution

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
D = torch.float64


@pytest.fixture
def h():
    return torch.tensor([0.3, 0.7, 1.1], dtype=D)


def test_an_unused_hyperparameter_gets_zeros_and_one_warning_that_names_it(h):
    tree = {"h": h, "idle": torch.ones(2, dtype=D)}
    with pytest.warns(ConvergenceWarning, match=r"hparams\['idle'\]") as caught:
        hypergradient = implicit_grad(
            lambda w, t: outer(w, t["h"]), lambda w, t: inner(w, t["h"]), solution(h), tree
        )
    assert len(caught) == 1
    assert torch.equal(hypergradient["idle"], torch.zeros(2, dtype=D))
    torch.testing.assert_close(hypergradient["h"], expected(h), rtol=1e-9, atol=0)


def unsolved(h):
    return solution(h) + 0.1


def test_an_unsolved_inner_problem_warns_by_default_and_raises_on_request(h):
    with pytest.warns(ConvergenceWarning, match=r"does not solve the inner problem.*inner_tol"):
        implicit_grad(outer, inner, unsolved(h), h)
    with pytest.raises(hypergrad.NotConverged, match="inner_tol"):
        implicit_grad(outer, inner, unsolved(h), h, on_failure="raise")
    hypergradient, info = implicit_grad(
        outer, inner, unsolved(h), h, on_failure="ignore", return_info=True
    )
    assert torch.isfinite(hypergradient).all()
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
    hypergradient = implicit_grad(outer, inner, w, t, on_failure="ignore", solver=solver)
    assert not torch.isfinite(hypergradient).all()
    assert torch.isnan(hypergradient).any()


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
@pytest.mark.parametrize("size", [1e-12, 1e-9, 1e-6, 1e-3])
@pytest.mark.parametrize("kink", [0.0, 3.0])
def test_params_that_are_nothing_beside_the_solution_are_unsolved(kink, size, dtype):
    """A start of 1e-9 passed for a solution at zero, with an error of 1e-16."""
    inner = lambda w, t: (w**2).sum() / 2 - t * w.sum() + kink * w.abs().sum()
    start, t = torch.full((3,), size, dtype=dtype), torch.tensor(2.0, dtype=dtype)
    with pytest.raises(hypergrad.NotConverged, match="kink there" if kink else "does not solve"):
        implicit_grad(lambda w, t: ((w - 1) ** 2).sum(), inner, start, t, on_failure="raise")


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_with_everything_in_order_nothing_is_said(h, dtype):
    weights = torch.linalg.solve(MATRIX + torch.diag(h), TARGET).to(dtype)
    matrix, target = MATRIX.to(dtype), TARGET.to(dtype)

    def objective(w, h):
        return w @ matrix @ w / 2 - target @ w + (h * w * w).sum() / 2

    for solver in (None, CG(), CG(maxiter=2), hypergrad.GMRES(), Neumann(), Exact()):
        implicit_grad(outer, objective, weights, h.to(dtype), solver=solver)
