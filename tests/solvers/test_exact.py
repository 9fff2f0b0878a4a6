"""A dense factorisation: its products, its memory, rank and spectrum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad import Auto, Exact, Status
from tests.problems import F64, data, relative_error
from tests.systems import Counting, indefinite, solve, spread, with_spectrum


def test_exact_forms_as_many_products_as_there_are_unknowns():
    seen = []

    def product(v: Tensor) -> Tensor:
        seen.append(v)
        return 2 * v

    _, info = Exact().solve(product, torch.ones(7, dtype=F64))
    assert info.matvecs == 7
    assert len(seen) == 1  # all of them at once


def test_exact_gives_the_minimum_norm_where_a_singular_matrix_is_not_symmetric():
    A = data(30, 7, 4, dtype=F64) @ data(31, 4, 7, dtype=F64)
    b = A @ data(32, 7, dtype=F64)
    x, info = Exact().solve(lambda v: A @ v, b)
    assert relative_error(x, torch.linalg.pinv(A) @ b) < 1e-8
    assert info.success


def test_exact_refuses_a_system_that_memory_cannot_hold_before_it_starts(monkeypatch):
    monkeypatch.setattr("hypergrad.solvers._exact.free_gib", lambda device: 1e-3)
    product = Counting(torch.eye(2000))
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"2000.*GiB.*0\.001.*CG"):
        Exact().solve(product, torch.ones(2000))
    assert product.count == 0


def test_the_memory_that_is_free_is_known_without_proc(monkeypatch):
    from hypergrad.solvers import _exact

    known = _exact.free_gib(torch.device("cpu"))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(_exact, "open", refuse, raising=False)
    free = _exact.free_gib(torch.device("cpu"))
    assert 0 < free < math.inf
    assert 0 < known < math.inf
    monkeypatch.setattr(_exact.os, "sysconf", refuse)
    assert _exact.free_gib(torch.device("cpu")) == math.inf


@pytest.mark.parametrize("n", [1, 6, 128, 129])
def test_exact_gives_the_spectrum_of_a_small_symmetric_matrix(n):
    A, theta = with_spectrum(torch.linspace(1, 9, n).to(F64)), torch.ones(n, dtype=F64)
    _, info = hypergrad.implicit_grad(
        lambda w, t: w.sum(),
        lambda w, t: (w - t) @ A @ (w - t) / 2,
        theta.clone(),
        theta,
        solver=Exact(damping=0.5),
        return_info=True,
    )
    if n > 128:
        assert info.eigenvalues.isnan().all()
    else:
        expected = torch.linalg.eigvalsh(A)[[0, -1]] + 0.5
        torch.testing.assert_close(info.eigenvalues, expected)


def test_right_hand_sides_that_share_a_matrix_share_its_factorisation():
    n, counts = 60, []
    A, t = indefinite(n), data(42, n, dtype=F64)
    for solver in (Exact(), Auto(dense_below=2)):

        @hypergrad.custom_root(
            hypergrad.Root(lambda w, t: A @ (w - t), symmetric=True),
            solver=solver,
            callback=counts.append,
        )
        def fit(init: None, t: Tensor) -> Tensor:
            return t.clone()

        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            found = jacobian(lambda t: fit(None, t))(t)
            torch.testing.assert_close(found, torch.eye(n, dtype=F64), rtol=0, atol=1e-9)
            info = counts.pop()
            assert not counts
            assert info.method == "Exact"
            assert info.success.shape == (n,)
            assert set(info.matvecs.tolist()) == {n}


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_exact_at_the_rounding_floor_is_a_success_and_an_inconsistent_system_none(dtype):
    for n in (6, 50, 200):
        A = with_spectrum(spread(n, 1, 9e4), dtype=dtype)
        b = data(44, n, dtype=dtype)
        x, info = solve(Exact(), A, b)
        assert info.success
        true = torch.linalg.solve(A.to(F64), b.to(F64))
        assert relative_error(x, true) < (1e-9 if dtype == F64 else 2e-3)
        A = with_spectrum([0.0], spread(n - 1, 1, 9), dtype=dtype)
        _, info = solve(Exact(), A, b)
        assert info.status == Status.SINGULAR
        assert not info.success
