"""What a solve shows of itself while it runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import hypergrad
from hypergrad.solvers import (
    CG,
    GMRES,
    LSMR,
    MINRES,
    Auto,
    BiCGSTAB,
    Iteration,
    Neumann,
    NormalCG,
    _watch,
)
from tests.problems import F64, data

n = 150
M = data(0, n, n, dtype=F64)
A = M @ M.T / n + torch.eye(n, dtype=F64)
b = data(1, n, dtype=F64)

SOLVERS = [CG, MINRES, BiCGSTAB, GMRES, NormalCG, LSMR, Neumann]


def solve(solver, b):
    return solver.solve(lambda v: A @ v, b, rmatvec=lambda v: A.T @ v)


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_callback_is_told_of_every_iteration(kind):
    seen: list[Iteration] = []
    x, info = solve(kind(callback=seen.append), b)
    assert [one.iteration for one in seen] == list(range(1, int(info.iterations) + 1))
    assert seen[-1].residual_norm == pytest.approx(float(info.residual_norm), rel=1e-3)
    products = [one.products for one in seen]
    assert products == sorted(products)
    assert 0 < products[-1] <= int(info.matvecs)
    assert torch.equal(x, solve(kind(), b)[0])


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_callback_under_vmap_is_called_once_an_iteration_with_the_worst_task(kind):
    seen: list[Iteration] = []
    both = torch.stack([b, A @ A @ b])
    _, info = torch.func.vmap(lambda one: solve(kind(callback=seen.append), one))(both)
    assert len(seen) == int(info.iterations.max())
    alone: list[list[float]] = []
    for one in both:
        sizes: list[float] = []
        solve(kind(callback=lambda it, sizes=sizes: sizes.append(it.residual_norm)), one)
        alone.append(sizes)
    worst = max(sizes[0] for sizes in alone)
    assert seen[0].residual_norm == pytest.approx(worst, rel=1e-8)


def test_the_default_solver_tells_of_the_method_that_it_takes():
    seen: list[Iteration] = []
    _, info = Auto(dense_below=0, callback=seen.append).solve(lambda v: A @ v, b)
    assert len(seen) == int(info.iterations) > 0


def test_a_callback_that_raises_ends_the_hypergradient():
    class Enough(Exception):
        pass

    calls = 0

    def stop(seen: Iteration) -> None:
        nonlocal calls
        calls += 1
        if seen.iteration == 3:
            raise Enough

    def inner(w, h):
        return w @ A @ w / 2 - (b * h) @ w

    h = torch.ones((), dtype=F64)
    with pytest.raises(Enough):
        hypergrad.implicit_grad(lambda w, h: w.sum(), inner, b, h, solver=CG(callback=stop))
    assert calls == 3


def test_what_the_host_may_not_look_at_is_refused_by_name():
    def inner(w, h):
        return h * (w**2).sum()

    w, h = torch.ones(3), torch.tensor(1.0)
    for fields in ({"callback": print}, {"progress": True}):
        solver = CG(maxiter=3, rtol=0.0, **fields)
        with pytest.raises(hypergrad.UnsupportedOperation, match="callback and progress"):
            hypergrad.implicit_grad(
                lambda w, h: w.sum(), inner, w, h, solver=solver, on_failure="ignore"
            )


def test_progress_is_silent_for_a_short_solve_and_one_line_for_a_long_one(capsys, monkeypatch):
    solve(CG(progress=True), b)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(_watch, "_PATIENCE", 0.0)
    monkeypatch.setattr(_watch, "_EVERY", 0.0)
    _, info = solve(CG(progress=True), b)
    out, text = capsys.readouterr()
    assert out == ""
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert text.count("\r") == int(info.iterations)
    assert f"CG: iteration {int(info.iterations)}, residual " in text


def test_progress_ends_its_line_before_an_error(capsys, monkeypatch):
    monkeypatch.setattr(_watch, "_PATIENCE", 0.0)

    def stop(seen: Iteration) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        solve(CG(progress=True, callback=stop), b)
    assert capsys.readouterr().err.endswith("\n")


def test_an_iteration_is_a_frozen_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Iteration(1, 0.5, 2).products = 3


@pytest.mark.parametrize("fields", [{"callback": 3}, {"progress": "yes"}])
@pytest.mark.parametrize("kind", [CG, Neumann, Auto])
def test_what_is_no_callback_and_no_flag_is_refused(kind, fields):
    with pytest.raises(TypeError, match=next(iter(fields))):
        kind(**fields)
