"""Constrained inner problems by their Karush-Kuhn-Tucker conditions."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from hypergrad import CG, KKT, implicit_grad
from tests.constrained import equality_qp, inequality_qp, kkt_ball, regression
from tests.problems import F64, relative_error

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


def answer(problem, **options):
    params = problem.solve(problem.hparams)
    return implicit_grad(problem.outer, problem.condition, params, problem.hparams, **options)


def test_cg_says_that_a_kkt_matrix_is_indefinite():
    with pytest.raises(hypergrad.IndefiniteHessian, match="MINRES"):
        answer(equality_qp(), solver=CG(), on_failure="raise")


@pytest.mark.parametrize("fault", ["sign of nu", "sign of lam", "infeasible", "not complementary"])
def test_a_point_that_is_no_kkt_point_is_noticed(fault):
    problem = inequality_qp()
    x, nu, lam = problem.solve(problem.hparams)
    H, c, _ = regression()
    if fault == "sign of nu":
        params = x, -nu, lam
    elif fault == "sign of lam":
        params = x, nu, -lam
    elif fault == "infeasible":
        # Stationary with lam = 0, so that every product lam g is zero, but outside the box.
        free = torch.linalg.solve(H, c)
        params, nu = (free, torch.zeros_like(nu), torch.zeros_like(lam)), None
    else:
        # Stationary too: opposite faces of the box pull with the same force.
        params = x, nu, lam + 1.0 * torch.tensor([1, 0, 0, 0, 0, 0] * 2, dtype=F64)
    condition = problem.condition
    if fault == "infeasible":
        condition = KKT(condition.f, inequalities=condition.inequalities)
        params = params[0], None, params[2]
    with pytest.raises(hypergrad.NotConverged, match="does not solve the inner problem"):
        implicit_grad(
            lambda p, h: p[0].square().sum(),
            condition,
            params,
            problem.hparams,
            on_failure="raise",
        )


def test_kkt_params_of_another_structure_are_named():
    problem = inequality_qp()
    x, nu, lam = problem.solve(problem.hparams)
    cases = [
        ((x, nu), r"must be \(x, nu, lam\)"),
        ((x, nu, lam[:3]), "one multiplier for each constraint"),
        ((x, nu, {"a": lam}), "lam must have the structure"),
        ((x, None, lam), "nu and what equalities returns must be tensors"),
    ]
    for params, words in cases:
        with pytest.raises(hypergrad.StructureMismatch, match=words):
            implicit_grad(lambda p, h: p[0].sum(), problem.condition, params, problem.hparams)
    with pytest.raises(hypergrad.StructureMismatch, match="no equalities, so nu"):
        implicit_grad(
            lambda p, h: p[0].sum(),
            KKT(problem.condition.f, inequalities=problem.condition.inequalities),
            (x, nu, lam),
            problem.hparams,
        )


def test_kkt_takes_pytrees_of_variables_and_constraints_and_empty_multipliers():
    problem = inequality_qp()
    x, nu, lam = problem.solve(problem.hparams)
    join = lambda x: torch.cat([x["a"], x["b"]])
    condition = KKT(
        lambda x, h: problem.condition.f(join(x), h),
        equalities=lambda x, h: [problem.condition.equalities(join(x), h)],
        inequalities=lambda x, h: dict(
            zip("ul", problem.condition.inequalities(join(x), h).split(6), strict=True)
        ),
    )
    params = {"a": x[:2], "b": x[2:]}, [nu], {"u": lam[:6], "l": lam[6:]}
    hypergradient = implicit_grad(
        lambda p, h: problem.outer((join(p[0]),), h), condition, params, problem.hparams
    )
    assert relative_error(hypergradient, problem.hypergradient(problem.hparams)) < 1e-9

    problem = kkt_ball()
    w, _, lam = problem.solve(problem.hparams)
    params = w, torch.zeros(0, dtype=F64), lam
    hypergradient = implicit_grad(problem.outer, problem.condition, params, problem.hparams)
    assert relative_error(hypergradient, problem.hypergradient(problem.hparams)) < 1e-9


@pytest.mark.parametrize("made", [equality_qp, inequality_qp, kkt_ball])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_multipliers_of_a_solution_are_those_of_its_closed_form(made, dtype):
    problem = made(dtype)
    x, nu, lam = problem.solve(problem.hparams)
    found = problem.condition.multipliers(x, problem.hparams)
    rtol = 1e-10 if dtype == F64 else 1e-4
    for one, expected in zip(found, (nu, lam), strict=True):
        assert (one is None) == (expected is None)
        if expected is not None:
            assert one.dtype == dtype
            torch.testing.assert_close(one, expected, rtol=rtol, atol=rtol)
    grads = implicit_grad(
        lambda p, h: p[0].square().sum(), problem.condition, (x, *found), problem.hparams,
        on_failure="raise",
    )  # fmt: skip
    expected = implicit_grad(
        lambda p, h: p[0].square().sum(), problem.condition, (x, nu, lam), problem.hparams
    )
    assert relative_error(grads, expected) < 1e3 * rtol


def test_multipliers_do_not_depend_on_the_units_of_a_constraint():
    problem = inequality_qp()
    x, _, lam = problem.solve(problem.hparams)
    units = torch.logspace(-8, 8, 12, dtype=F64)
    kkt = problem.condition
    scaled = KKT(kkt.f, kkt.equalities, lambda x, h: units * kkt.inequalities(x, h))
    _, found = scaled.multipliers(x, problem.hparams)
    torch.testing.assert_close(found * units, lam, rtol=1e-6, atol=1e-8)


def test_multipliers_have_the_structure_of_the_constraints_and_are_mapped():
    H, c, _ = regression()

    def box(x, top):
        return {"low": -x["w"] - 0.5, "high": x["w"].reshape(2, 3) - top}

    kkt = KKT(lambda x, top: x["w"] @ H @ x["w"] / 2 - c @ x["w"], inequalities=box)
    x = {"w": inequality_qp().solve(inequality_qp().hparams)[0].clamp(-0.5, 0.4)}
    top = torch.tensor(0.4, dtype=F64)
    _, lam = kkt.multipliers(x, top)
    assert {name: value.shape for name, value in lam.items()} == {"low": (6,), "high": (2, 3)}
    xs = {"w": torch.stack([x["w"], x["w"] / 2])}
    mapped = torch.vmap(lambda x: kkt.multipliers(x, top)[1])(xs)
    torch.testing.assert_close(mapped["high"][0], lam["high"])
    torch.testing.assert_close(mapped["low"][1], kkt.multipliers({"w": xs["w"][1]}, top)[1]["low"])


def test_multipliers_of_a_point_that_is_no_solution_do_not_make_it_one():
    problem = inequality_qp()
    x, _, _ = problem.solve(problem.hparams)
    wrong = x + 0.1
    params = (wrong, *problem.condition.multipliers(wrong, problem.hparams))
    with pytest.raises(hypergrad.NotConverged):
        implicit_grad(
            lambda p, h: p[0].sum(), problem.condition, params, problem.hparams, on_failure="raise"
        )
