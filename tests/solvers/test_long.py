"""Long systems, whose iterations change their vectors in place."""

from __future__ import annotations

import pytest
import torch

from hypergrad import CG, Status
from hypergrad.solvers import _cg_in_numbers, _long
from hypergrad.solvers._cg_in_numbers import in_numbers
from hypergrad.solvers._long import pieces
from tests.problems import F64, data, relative_error

n = 20_000
F32 = torch.float32


def spread(dtype: torch.dtype, low: float = 1.0) -> torch.Tensor:
    return torch.linspace(low, 50.0, n, dtype=F64).to(dtype)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_in_place_and_out_of_place_agree_to_the_bit(dtype, preconditioned, monkeypatch):
    modes, b = spread(dtype), data(0, n, dtype=dtype)
    before = b.clone()
    solver = CG(
        maxiter=12, rtol=0.0, preconditioner=(lambda v: v / (1 + modes)) if preconditioned else None
    )
    x, info = solver.solve(lambda v: modes * v, b)
    assert torch.equal(b, before)
    monkeypatch.setattr(_long, "_LONG", 10**9)
    monkeypatch.setattr(_cg_in_numbers, "_TOGETHER", 1)
    expected, other = solver.solve(lambda v: modes * v, b)
    assert torch.equal(x, expected)
    assert torch.equal(info.residual_norm, other.residual_norm)


def test_a_product_that_returns_its_argument_is_no_trap():
    b = data(1, n, dtype=F32)
    x, info = CG().solve(lambda v: v, b)
    assert torch.allclose(x, b)
    assert info.success
    x, info = CG(damping=1.0, preconditioner=lambda v: v).solve(lambda v: v, b)
    assert torch.allclose(x, b / 2)


def test_where_curvature_turns_negative_the_best_iterate_is_the_answer(monkeypatch):
    modes, b = spread(F64), data(2, n, dtype=F64)
    modes[0], b[0] = -1e-3, 30.0
    x, info = CG().solve(lambda v: modes * v, b)
    assert Status(int(info.status)) is Status.NEGATIVE_CURVATURE
    monkeypatch.setattr(_long, "_LONG", 10**9)
    expected, other = CG().solve(lambda v: modes * v, b)
    assert relative_error(x, expected) < 1e-12
    assert int(info.iterations) == int(other.iterations)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 12, 30])
def test_the_way_measured_in_numbers_is_that_between_the_answers(steps, monkeypatch):
    modes, b, F = spread(F64, 0.05), data(3, n, dtype=F64), data(4, n, dtype=F64)

    def run():
        return in_numbers(lambda v: modes * v, None, b.clone(), 0.0, steps, F)

    part = run()
    monkeypatch.setattr(_cg_in_numbers, "is_long", lambda v: False)
    expected = run()
    assert part.observer._ways is not None
    assert expected.observer._ways is None
    inverse, true = (p.observer.inverse(p.x) for p in (part, expected))
    assert float(inverse) == pytest.approx(float(true), rel=1e-6)
    assert relative_error(part.observer.step, expected.observer.step) < 1e-12
    assert relative_error(part.observer.left, expected.observer.left) < 1e-12


def test_the_way_is_right_where_orthogonality_is_lost():
    """In float32, many steps on: within a factor, as an estimate of an inverse has to be."""
    modes, b, F = spread(F32, 0.02), data(5, n, dtype=F32), data(6, n, dtype=F32)
    answers = []

    part = in_numbers(lambda v: modes * v, None, b.clone(), 0.0, 64, F)
    for steps in (32, 64):
        answers.append(in_numbers(lambda v: modes * v, None, b.clone(), 0.0, steps, None))
    way = (answers[1].x - answers[0].x).norm()
    older = part.observer._ways[0]
    assert older.square**0.5 == pytest.approx(float(way), rel=0.5)


def test_pieces_of_vast_vectors_are_all_of_them():
    v, one = torch.arange(2_500_000), torch.ones(1)
    cut = list(pieces(v, one))
    assert len(cut) == 3
    assert torch.equal(torch.cat([piece for piece, _ in cut]), v)
    assert all(same is one for _, same in cut)
    assert len(list(pieces(torch.ones(2, 5)))) == 1
