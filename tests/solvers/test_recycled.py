"""Conjugate gradients along a loop: fewer products, the same answers, and the same evidence."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad import CG, SolveInfo, Status
from hypergrad.solvers._recycle import Memory, recycling
from hypergrad.solvers._recycled import CEILING, EVERY
from tests.problems import F64, data, relative_error
from tests.systems import definite, hypergradient_with, spread, with_spectrum

QUIET = {"on_failure": "ignore", "inner_tol": 1e-3, "return_info": True}


def _along(memory: Memory, A: Tensor, b: Tensor, solver: CG, **options) -> SolveInfo:
    """The evidence of one step of a loop, whose linear system is ``A u = b``."""
    with recycling(memory):
        info: SolveInfo = hypergradient_with(A, b, solver, **{**QUIET, **options})[1]
    return info


def _true_residual(A: Tensor, info: SolveInfo, b: Tensor) -> Tensor:
    left = b.double() - A.double() @ info.solution.double()
    return left.norm() / b.double().norm()


def _scaled(n: int, k: int, dtype: torch.dtype = F64) -> Tensor:
    """A matrix whose unknowns have units of their own, a little different at each step."""
    C = with_spectrum(spread(n, 1, 3))
    s = torch.logspace(0, 0.9, n, dtype=F64) * (1 + 0.01 * data(k, n, dtype=F64))
    return (s[:, None] * C * s).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
def test_each_answer_along_a_loop_is_as_good_as_was_asked_for(dtype, rtol):
    memory, b = Memory(), data(0, 80, dtype=dtype)
    made = cold = 0
    for k in range(40):
        A, b = _scaled(80, k, dtype), b + 0.01 * data(k + 50, 80, dtype=dtype)
        info = _along(memory, A, b, CG(rtol=rtol, recycle=True))
        assert info.success
        assert info.status == Status.CONVERGED
        assert _true_residual(A, info, b) <= 1.1 * rtol
        torch.testing.assert_close(
            info.residual_norm.double(), _true_residual(A, info, b), rtol=0.1, atol=0
        )
        expected = torch.linalg.solve(A.double(), b.double())
        assert relative_error(info.solution, expected) <= 2 * float(info.error_estimate)
        if k >= 20:
            made += int(info.matvecs)
            cold += int(hypergradient_with(A, b, CG(rtol=rtol), **QUIET)[1].matvecs)
    assert memory.scaling == 2  # the diagonal was estimated, and has proved its worth
    assert 3 * made < cold


def test_a_diagonal_that_does_not_help_is_dropped_and_not_tried_at_each_step():
    """The diagonal of a random rotation of the spectrum is nearly constant."""
    A, memory = with_spectrum(spread(80, 1, 300)), Memory()
    b, made, warm, last = data(0, 80, dtype=F64), 0, 0, None
    tried = []
    for k in range(40):
        b = b + 0.02 * data(k + 50, 80, dtype=F64)
        made += int(_along(memory, A, b, CG(rtol=1e-4, recycle=True)).matvecs)
        tried.append(memory.scaling)
        info = hypergradient_with(A, b, CG(rtol=1e-4), x0=last, **QUIET)[1]
        warm, last = warm + int(info.matvecs), info.solution
    assert 1 in tried
    assert 2 not in tried
    assert memory.scaling == 0
    assert made <= 1.15 * warm


def test_the_tolerance_follows_how_well_the_inner_problem_was_solved():
    A, b = definite(60, condition=30.0), data(0, 60, dtype=F64)
    theta = torch.ones(60, dtype=F64)

    def inner(w: Tensor, t: Tensor) -> Tensor:
        return (w - t) @ A @ (w - t) / 2

    def residual(off: float, solver: CG) -> float:
        memory = Memory()
        for k in range(4):
            slope = b + 0.1 * data(k, 60, dtype=F64)
            w = theta + off * data(9, 60, dtype=F64)
            with recycling(memory):
                _, info = hypergrad.implicit_grad(
                    lambda w, t, slope=slope: slope @ w, inner, w, theta, solver=solver, **QUIET
                )
            left = slope - A @ info.solution
            torch.testing.assert_close(info.residual_norm, left.norm() / slope.norm())
        return float(info.residual_norm)

    recycles = CG(recycle=True)
    assert residual(0.0, recycles) <= 1e-6
    assert 1e-6 < residual(1e-3, recycles) <= 5e-3
    assert 1e-3 < residual(0.3, recycles) <= CEILING
    assert residual(0.3, CG(rtol=1e-5, recycle=True)) <= 1e-5
    assert residual(0.3, CG(rtol=0.0, maxiter=60, recycle=True)) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_evidence_of_a_start_that_leaves_nothing_to_do_is_that_of_a_whole_solve(dtype):
    """An inner solution that is off by 1e-4, and a system that does not change."""
    A, b = definite(50, condition=100.0, dtype=dtype), data(0, 50, dtype=dtype)
    theta, memory = torch.ones(50, dtype=dtype), Memory()
    w = theta + 1e-4 * data(3, 50, dtype=dtype)

    def inner(w: Tensor, t: Tensor) -> Tensor:
        return (w - t) @ A @ (w - t) / 2

    def outer(w: Tensor, t: Tensor) -> Tensor:
        return b @ w

    options = {**QUIET, "on_failure": "warn"}
    for solver in (CG(rtol=1e-3, recycle=True), CG(rtol=1e-4, maxiter=60, recycle=True)):
        for _ in range(3):
            with recycling(memory):
                _, info = hypergrad.implicit_grad(outer, inner, w, theta, solver=solver, **options)
        plain = CG(rtol=solver.rtol, maxiter=solver.maxiter)
        _, whole = hypergrad.implicit_grad(outer, inner, w, theta, solver=plain, **options)
        assert info.iterations <= 1
        assert info.matvecs <= 4
        assert info.success
        true = float((w - theta).norm() / w.norm())
        assert true / 2 <= float(info.inner_residual) <= 20 * true
        exact = torch.linalg.solve(A.double(), b.double())
        error = relative_error(info.solution, exact)
        assert error / 2 <= float(info.error_estimate) < 1
        assert float(info.error_estimate) <= 30 * float(whole.error_estimate)
        low, high = info.eigenvalues.tolist()
        assert 0.99 <= low <= high <= 101


@pytest.mark.parametrize("tasks", [False, True], ids=["one", "two tasks"])
def test_a_matrix_that_turns_indefinite_where_the_right_hand_side_reaches_speaks_at_once(tasks):
    memory, values = Memory(), spread(30, 1, 5)
    b = data(0, 30, dtype=F64)

    def info(A: Tensor) -> SolveInfo:
        def one(A: Tensor) -> SolveInfo:
            return hypergradient_with(A, b, CG(maxiter=10, recycle=True), **QUIET)[1]

        return torch.func.vmap(one)(A) if tasks else one(A)

    for k in range(30):
        lowest = 0.3 - 0.02 * k
        A = with_spectrum(torch.tensor([lowest]), values[1:])
        good = with_spectrum(values)
        with recycling(memory):
            found = info(torch.stack([A, good]) if tasks else A)
        mine = found.negative_curvature.flatten()[0], found.success.flatten()[0]
        if abs(lowest) > 1e-9:
            assert bool(mine[0]) == (lowest < 0), k
            assert bool(mine[1]) == (lowest > 0), k
        if tasks:
            assert found.success[1]


def test_a_saddle_that_no_right_hand_side_reaches_speaks_within_so_many_steps():
    A, b = torch.diag(spread(30, 1, 5)), data(0, 30, dtype=F64)
    b[0], memory, spoke = 0.0, Memory(), []
    for k in range(3 * EVERY):
        A[0, 0] = 1.0 - 0.05 * k
        b = b * (1 + 1e-4)
        spoke.append(bool(_along(memory, A, b, CG(recycle=True)).negative_curvature))
    first = spoke.index(True)
    assert 20 < first <= 21 + EVERY
    assert all(spoke[first:])
    A[0, 0] = 1.0
    assert _along(memory, A, b, CG(recycle=True)).success  # and is taken back


def test_a_start_is_never_worse_than_zero_and_what_failed_is_no_start():
    A, b, memory = definite(20, condition=5.0), data(0, 20, dtype=F64), Memory()
    solver = CG(rtol=1e-6, recycle=True)
    _along(memory, A, b, solver)
    assert _along(memory, A, -1e6 * b, solver).iterations == 0  # a multiple of the last one
    info = _along(memory, A, data(7, 20, dtype=F64), solver)
    assert info.success
    nothing = _along(memory, A, 0 * b, solver)
    assert nothing.success
    assert not nothing.solution.any()
    assert _along(memory, A, b, solver).success
    info = _along(memory, -A, b, solver)
    assert info.negative_curvature
    assert not info.success
    again = _along(memory, A, b, solver)
    torch.testing.assert_close(again.solution, torch.linalg.solve(A, b), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_where_nothing_may_be_looked_at_it_starts_from_the_last_answer(dtype):
    memory, b = Memory(), data(0, 40, dtype=dtype)
    options = {"on_failure": "ignore", "return_info": True}
    errors = []
    for k in range(12):
        A = definite(40, condition=50.0, dtype=dtype) * (1 + 0.01 * k)
        info = _along(memory, A, b, CG(maxiter=8, rtol=0.0, recycle=True), **options)
        ratio = float(info.residual_norm / _true_residual(A, info, b))
        assert 1 / 3 < ratio < 3  # at the rounding floor too
        errors.append(relative_error(info.solution, torch.linalg.solve(A, b)))
    assert errors[-1] < 0.01 * errors[0]


def test_tasks_of_a_batch_are_recycled_each_from_its_own():
    b, memory, products = data(0, 3, 50, dtype=F64), Memory(), []
    for k in range(12):
        A = torch.stack([_scaled(50, 3 * k + i) * 10.0**i for i in range(3)])

        def one(A: Tensor, b: Tensor) -> SolveInfo:
            return hypergradient_with(A, b, CG(rtol=1e-4, recycle=True), **QUIET)[1]

        with recycling(memory):
            info = torch.func.vmap(one)(A, b)
        left = b - (A @ info.solution[..., None])[..., 0]
        size = left.norm(dim=-1) / b.norm(dim=-1)
        assert (size <= 1.02e-4).all()
        torch.testing.assert_close(info.residual_norm, size, rtol=0.02, atol=0)
        assert info.success.all()
        products.append(int(info.matvecs[0]))
    assert max(products[-3:]) * 3 < products[0]


def test_a_network_in_float32_says_how_far_its_recycled_hypergradients_are_off():
    """Judged against a factorisation in float64 at the same parameters."""
    x, y = data(0, 60, 3, dtype=torch.float32), data(1, 60, dtype=torch.float32)
    shapes = {"a": (3, 8), "b": (8, 8), "c": (8,)}
    init = {name: 0.3 * data(2, *shape, dtype=torch.float32) for name, shape in shapes.items()}

    def predict(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    def inner(p: dict[str, Tensor], h: Tensor) -> Tensor:
        fit = (predict(p, x.to(h.dtype)) - y.to(h.dtype))[:40].square().mean()
        return fit + h.exp() * sum(q.square().sum() for q in p.values())

    def outer(p: dict[str, Tensor], h: Tensor) -> Tensor:
        return (predict(p, x.to(h.dtype)) - y.to(h.dtype))[40:].square().mean()

    loop = hypergrad.Bilevel(
        outer, inner, init, torch.tensor(-3.0),
        inner_optimizer=lambda v: torch.optim.LBFGS(v, max_iter=10, line_search_fn="strong_wolfe"),
        outer_optimizer=lambda v: torch.optim.SGD(v, lr=0.3),
        method=hypergrad.Alternating(inner_steps=3),
    )  # fmt: skip
    products = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hypergrad.ConvergenceWarning)
        for k in range(17):
            before = loop.hparams.clone()
            info = loop.step()
            products.append(int(info.info.matvecs))
            if k % 4:
                continue
            p = {name: q.double() for name, q in loop.params.items()}
            exact, true = hypergrad.implicit_grad(
                outer, inner, p, before.double(), solver=hypergrad.Exact(),
                on_failure="ignore", return_info=True,
            )  # fmt: skip
            error = relative_error(info.grads, exact)
            off = float(info.info.error_estimate)
            assert error <= 1.5 * off + float(true.error_estimate), k
    assert sum(products[-8:]) < 8 * products[0]


def test_a_goal_that_hides_an_error_in_small_rows_is_not_kept_to():
    """As in a loop over pixels that are hardly ever used, whose inner problem is left unsolved."""
    scale = torch.logspace(-3, 0, 24)
    x, y = data(0, 300, 24, dtype=torch.float32) * scale, data(1, 300, dtype=torch.float32)

    def inner(w: Tensor, h: Tensor) -> Tensor:
        return (x[:200] @ w - y[:200]).square().mean() + 1e-3 * (h.exp() * w.square()).sum()

    loop = hypergrad.Bilevel(
        lambda w, h: (x[200:] @ w - y[200:]).square().mean(),
        inner,
        torch.zeros(24),
        torch.zeros(24),
        inner_optimizer=lambda v: torch.optim.Adam(v, lr=0.03),
        outer_optimizer=lambda v: torch.optim.Adam(v, lr=0.1),
        method=hypergrad.Alternating(inner_steps=20, inner_tol=None, solver=CG(recycle=True)),
    )
    A = 2 / 200 * x[:200].T @ x[:200]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            h = loop.hparams.clone()
            info = loop.step()
            w = loop.params
            b = 2 / 100 * x[200:].T @ (x[200:] @ w - y[200:])
            u = torch.linalg.solve((A + 2e-3 * h.exp().diag()).double(), b.double())
            true = -2e-3 * h.exp() * w * u
            assert relative_error(info.grads, true.float()) < 0.1


def test_a_resumed_loop_with_a_memory_is_bit_equal(tmp_path):
    A = _scaled(80, 0)

    def inner(w: Tensor, h: Tensor) -> Tensor:
        return (w - h.sin()) @ A @ (w - h.sin()) / 2 / 60

    def outer(w: Tensor, h: Tensor) -> Tensor:
        return (w - 0.3).square().sum() + (w**4).sum()

    def made() -> hypergrad.Bilevel:
        return hypergrad.Bilevel(
            outer, inner, torch.zeros(80, dtype=F64), data(0, 80, dtype=F64),
            inner_optimizer=lambda v: torch.optim.LBFGS(v, max_iter=30),
            outer_optimizer=lambda v: torch.optim.SGD(v, lr=0.01),
            method=hypergrad.Alternating(
                inner_steps=3, solver=CG(maxiter=200, rtol=1e-5, recycle=True), inner_tol=None
            ),
        )  # fmt: skip

    run, seen = made(), []
    for k in range(16):
        if k in (3, 7, 11):  # amid probes, on trial, in use
            torch.save(run.state_dict(), tmp_path / f"{k}.pt")
        info = run.step()
        seen.append((info.grads, info.info.matvecs))
    assert run._levels.memory.scaling == 2
    for k in (3, 7, 11):
        again = made()
        again.load_state_dict(torch.load(tmp_path / f"{k}.pt", weights_only=True))
        for grads, products in seen[k:]:
            info = again.step()
            assert info.grads.equal(grads)
            assert info.info.matvecs == products
        assert again.hparams.equal(run.hparams)
    old = torch.load(tmp_path / "7.pt", weights_only=True)
    del old["memory"]  # a state of before there was one
    again = made()
    again.load_state_dict(old)
    first = again.step()
    torch.testing.assert_close(first.grads, seen[7][0], rtol=1e-3, atol=1e-6)
    assert int(first.info.iterations) < int(seen[0][1])
