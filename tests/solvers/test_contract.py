"""What every linear solver promises, as one matrix: each method in each case that is its own.

A case is a function of a method. It says which methods it is for, and which matrices it needs:
by default those that the method is made for.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad import (
    CG,
    GMRES,
    LSMR,
    MINRES,
    Auto,
    BiCGSTAB,
    Exact,
    Identity,
    Neumann,
    NormalCG,
    Nystrom,
    Status,
)
from tests.problems import F64, WELL_POSED, data, relative_error
from tests.systems import (
    Counting,
    definite,
    hypergradient_with,
    indefinite,
    residual,
    semidefinite,
    skewed,
    solve,
    spread,
    with_spectrum,
)

DTYPES = (F64, torch.float32)


@dataclasses.dataclass(frozen=True)
class Method:
    """A solver as the cases see it: how it is made, and the matrices that it is for."""

    make: Callable[..., Any]
    kind: str = "definite"
    budget: str = "maxiter"  # the field that bounds its steps

    def __call__(self, *, steps: int | None = None, **fields: Any) -> Any:
        return self.make(**fields, **({} if steps is None else {self.budget: steps}))

    def matrix(
        self, n: int, seed: int = 0, condition: float = 10.0, dtype: torch.dtype = F64
    ) -> Tensor:
        """A matrix of its kind; the condition number is that of a definite one."""
        if self.kind == "definite":
            return definite(n, seed, condition, dtype)
        return (indefinite if self.kind == "indefinite" else skewed)(n, seed, dtype)


METHODS = {
    "Exact": Method(Exact),
    "CG": Method(CG),
    "GMRES": Method(GMRES),
    "Neumann": Method(functools.partial(Neumann, terms=600), budget="terms"),
    "MINRES": Method(MINRES, "indefinite"),
    "BiCGSTAB": Method(BiCGSTAB, "skewed"),
    "NormalCG": Method(NormalCG, "skewed"),
    "LSMR": Method(LSMR, "skewed"),
    "Auto": Method(functools.partial(Auto, dense_below=0), "skewed"),
    "Auto, dense": Method(Auto, "skewed"),
}
ALL = tuple(METHODS)
KRYLOV = ("CG", "GMRES", "MINRES", "BiCGSTAB", "NormalCG", "LSMR")
STEPWISE = (*KRYLOV, "Neumann")
MINIMUM_NORM = ("Exact", "CG", "MINRES", "NormalCG", "LSMR", "Auto, dense")
CASES: list[tuple[str, Callable[[str, Method], None]]] = []


def case(of: Iterable[str] = ALL) -> Callable[[Any], Any]:
    """Enter a function of a method's name and a method into the matrix, for some methods."""

    def enter(promise: Any) -> Any:
        CASES.extend((name, promise) for name in of)
        return promise

    return enter


def solve_batch(solver: Any, A: Tensor, b: Tensor) -> Any:
    return torch.func.vmap(functools.partial(solve, solver))(A, b)


# The system and its solution


@case()
def right_on_a_pytree(name, method):
    shapes = {"matrix": (2, 2), "scalar": (), "pair": (2,)}

    def split(v: Tensor) -> dict[str, Tensor]:
        return {"matrix": v[:4].view(2, 2), "scalar": v[4], "pair": v[5:]}

    def joined(tree: dict[str, Tensor]) -> Tensor:
        return torch.cat([tree[leaf].reshape(-1) for leaf in shapes])

    for dtype in DTYPES:
        A, b = method.matrix(7, dtype=dtype), data(1, 7, dtype=dtype)
        x, info = method().solve(
            lambda tree, A=A: split(A @ joined(tree)),
            split(b),
            rmatvec=lambda tree, A=A: split(A.T @ joined(tree)),
        )
        assert {leaf: value.shape for leaf, value in x.items()} == shapes
        assert all(value.dtype == dtype for value in x.values())
        assert info.success
        expected = torch.linalg.solve(A.to(F64), b.to(F64)).to(dtype)
        assert relative_error(joined(x), expected) < (1e-5 if dtype == F64 else 1e-3)
        torch.testing.assert_close(info.solution, x, rtol=0, atol=0)


@case()
def the_reported_residual_is_the_true_one(name, method):
    A, b = method.matrix(12), data(21, 12, dtype=F64)
    x, info = solve(method(), A, b)
    assert float(info.residual_norm) == pytest.approx(residual(A, x, b), rel=1e-3, abs=1e-15)


@case()
def leaves_of_several_dtypes_keep_their_own(name, method):
    b = {"half": torch.ones(2, dtype=torch.float32), "full": torch.ones(3, dtype=F64)}
    product = functools.partial(pytree.tree_map, lambda leaf: 4 * leaf)
    x, info = method().solve(product, b, rmatvec=product)
    expected = pytree.tree_map(lambda leaf: leaf / 4, b)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=0)
    assert info.residual_norm.dtype == F64


@case()
def half_precision_is_solved_to_what_it_can_hold(name, method):
    for dtype in (torch.bfloat16, torch.float16):
        A, b = definite(20, dtype=dtype), data(12, 20, dtype=dtype)
        x, info = solve(method(), A, b)
        assert x.dtype == dtype
        assert info.success
        assert residual(A.to(F64), x.to(F64), b.to(F64)) < 3e-2


@case()
def empty_and_strided_leaves_are_like_any_other(name, method):
    A = method.matrix(6)
    b = {
        "empty": torch.zeros(0, 3, dtype=F64),
        "strided": data(13, 3, 2, dtype=F64).T,
        "expanded": torch.tensor(0.5, dtype=F64).expand(2)[:0],
    }

    def product(v: dict[str, Tensor], A: Tensor = A) -> dict[str, Tensor]:
        return {**v, "strided": (A @ v["strided"].reshape(-1)).view(2, 3)}

    x, info = method().solve(product, b, rmatvec=lambda v: product(v, A.T))
    expected = torch.linalg.solve(A, b["strided"].reshape(-1)).view(2, 3)
    assert relative_error(x["strided"], expected) < 1e-5
    assert x["empty"].shape == (0, 3)
    assert info.success


@case()
def damping_shifts_the_matrix(name, method):
    for damping in (-0.3, 2.5):
        A, b = method.matrix(7), data(2, 7, dtype=F64)
        damped = A + damping * torch.eye(7, dtype=F64)
        solver = method(damping=damping, **({} if name == "Exact" else {"rtol": 1e-10}))
        x, info = solve(solver, A, b)
        assert info.status == Status.CONVERGED
        assert relative_error(x, torch.linalg.solve(damped, b)) < 1e-8
        assert float(info.residual_norm) == pytest.approx(residual(damped, x, b), abs=1e-13)
        if method.kind == "definite":  # the hypergradient of `hypergradient_with` is A u
            assert relative_error(hypergradient_with(A, b, solver), A @ x) < 1e-8


@case(["Exact", "GMRES"])
def damping_shifts_a_matrix_that_is_not_symmetric(name, method):
    A, b = data(3, 6, 6, dtype=F64) + 8 * torch.eye(6, dtype=F64), data(4, 6, dtype=F64)
    for damping in (-0.5, 3.0):
        solver = method(damping=damping, **({} if name == "Exact" else {"rtol": 1e-12}))
        x, _ = solve(solver, A, b)
        expected = torch.linalg.solve(A + damping * torch.eye(6, dtype=F64), b)
        assert relative_error(x, expected) < 1e-10


@case()
def nothing_of_the_callers_is_changed(name, method):
    tensors = A, b, x0 = method.matrix(6), data(14, 6, dtype=F64), data(15, 6, dtype=F64)
    before, versions = [t.clone() for t in tensors], [t._version for t in tensors]
    solve(method(), A, b, x0=x0)
    assert all(torch.equal(t, old) for t, old in zip(tensors, before, strict=True))
    assert [t._version for t in tensors] == versions


# Tolerances and budgets


@case(KRYLOV)
def a_tolerance_is_met_at_the_first_iterate_that_meets_it(name, method):
    A, b = method.matrix(40, condition=1e3), data(16, 40, dtype=F64)
    x, info = solve(method(rtol=1e-3), A, b)
    assert residual(A, x, b) <= 1e-3
    assert info.status == Status.CONVERGED
    earlier, before = solve(method(rtol=1e-3, maxiter=int(info.iterations) - 1), A, b)
    assert residual(A, earlier, b) > 1e-3
    assert before.status == Status.MAX_ITERATIONS


@case(KRYLOV)
def the_looser_of_rtol_and_atol_decides(name, method):
    A, b = method.matrix(40, condition=1e3), 100 * data(16, 40, dtype=F64)
    size = float(b.norm())

    def iterations(**fields: float) -> int:
        return int(solve(method(**fields), A, b)[1].iterations)

    loose, tight = iterations(rtol=1e-2), iterations(rtol=1e-8)
    assert loose < tight
    assert iterations(rtol=1e-8, atol=1e-2 * size) == loose
    assert iterations(rtol=1e-2, atol=1e-8 * size) == loose
    assert iterations(rtol=1e-8, atol=1e-12 * size) == tight
    assert iterations(rtol=0.0, atol=1e-2 * size) == loose


@case(KRYLOV)
def a_right_hand_side_within_atol_needs_no_iteration(name, method):
    A, b = method.matrix(40), data(6, 40, dtype=F64)
    x, info = solve(method(atol=1.1 * float(b.norm())), A, b)
    assert not x.any()
    assert info.iterations == info.matvecs == 0
    assert info.success
    assert info.residual_norm == 1


@case(STEPWISE)
def a_missed_tolerance_is_a_failure(name, method):
    A, b = method.matrix(40, condition=1e3), data(17, 40, dtype=F64)
    solver = method(rtol=1e-10, steps=3)
    x, info = solve(solver, A, b)
    assert info.status == Status.MAX_ITERATIONS
    assert not info.success
    assert info.iterations == 3
    assert float(info.residual_norm) == pytest.approx(residual(A, x, b), rel=1e-9)
    if method.kind != "definite":
        return
    with pytest.raises(hypergrad.NotConverged, match="residual") as error:
        hypergradient_with(A, b, solver, on_failure="raise")
    assert f"{residual(A, x, b):.3g}" in str(error.value)  # the figure that went wrong
    assert method.budget in str(error.value)  # and what to try
    with pytest.warns(hypergrad.ConvergenceWarning, match="ran out of iterations") as caught:
        hypergradient_with(A, b, solver)
    assert not re.search(r"\de-?\d", str(caught[0].message))  # figures are in the info


@case(STEPWISE)
def a_budget_that_runs_out_is_no_failure(name, method):
    A, b = method.matrix(40, condition=1e3), data(17, 40, dtype=F64)
    solver = method(steps=3)
    x, info = solve(solver, A, b)
    assert info.status == Status.MAX_ITERATIONS
    assert info.success
    assert info.iterations == 3
    assert float(info.residual_norm) == pytest.approx(residual(A, x, b), rel=1e-9)
    assert residual(A, x, b) <= 1 or name == "CG"  # which bounds the error, and not the residual
    if method.kind == "definite":
        hypergradient = hypergradient_with(A, b, solver, on_failure="raise")
        assert relative_error(hypergradient, A @ x) < 1e-9


@case(KRYLOV)
def a_tolerance_below_the_rounding_floor_is_no_success(name, method):
    A, b = method.matrix(40, condition=1e4), data(18, 40, dtype=F64)
    x, info = solve(method(rtol=1e-18), A, b)
    assert not info.success
    assert residual(A, x, b) < 1e-9  # the best iterate
    if method.kind == "definite":
        assert info.status == Status.STAGNATED
        assert float(info.residual_norm) == pytest.approx(residual(A, x, b), rel=0.5)
    else:
        assert info.residual_norm < 1e-12


@case(STEPWISE)
def products_are_counted_exactly(name, method):
    for dtype in DTYPES:
        A, b = method.matrix(12, dtype=dtype), data(20, 12, dtype=dtype)
        for fields in ({}, {"rtol": 1e-12}, {"damping": 1.0}):
            for x0 in (None, torch.ones(12, dtype=dtype)):
                product, transposed = Counting(A), Counting(A.T)
                _, info = method(**fields).solve(product, b, x0=x0, rmatvec=transposed)
                assert info.matvecs == product.count + transposed.count
                assert 0 < info.iterations < info.matvecs


# Starting values


@case(STEPWISE)
def x0_that_is_the_solution_is_kept_without_an_iteration(name, method):
    for fields in ({"rtol": 1e-8}, {})[
        : 1 if name == "Neumann" else 2
    ]:  # which makes all its steps
        A, b = method.matrix(40), data(4, 40, dtype=F64)
        exact = torch.linalg.solve(A, b)
        x, info = solve(method(**fields), A, b, x0=exact)
        assert info.iterations == 0
        assert info.matvecs <= 10  # the residual, and the power iterations of Neumann
        assert info.status == Status.CONVERGED
        torch.testing.assert_close(x, exact, rtol=1e-15, atol=0)


@case(KRYLOV)
def x0_near_the_solution_saves_iterations(name, method):
    A, b = method.matrix(40, condition=1e3), data(23, 40, dtype=F64)
    near = torch.linalg.solve(A, b) * (1 + 1e-6 * data(24, 40, dtype=F64))
    _, cold = solve(method(rtol=1e-8), A, b)
    x, warm = solve(method(rtol=1e-8), A, b, x0=near)
    assert warm.iterations < cold.iterations
    assert residual(A, x, b) <= 1e-8


@case(STEPWISE)
def any_x0_leads_to_the_solution(name, method):
    A, b = method.matrix(12), data(25, 12, dtype=F64)
    exact = torch.linalg.solve(A, b)
    for x0 in (data(26, 12, dtype=F64), 1e3 * data(26, 12, dtype=F64)):
        x, info = solve(method(rtol=1e-8), A, b, x0=x0)
        assert info.status == Status.CONVERGED
        assert residual(A, x, b) <= 1e-8
        assert relative_error(x, exact) < 1e-6
        far, _ = solve(method(rtol=1e-10), A, b, x0=x0)
        assert relative_error(far, exact) < 1e-8


# Sizes


@case()
def a_zero_right_hand_side_gives_zeros_without_a_product(name, method):
    for dtype in DTYPES:
        product = Counting(definite(5, dtype=dtype))
        zeros = torch.zeros(5, dtype=dtype)
        x, info = method().solve(product, zeros, rmatvec=product)
        assert torch.equal(x, zeros)
        assert product.count == 0
        assert info.matvecs == info.iterations == 0
        assert info.status == Status.CONVERGED
        assert info.success
        assert info.residual_norm == 0
        x, info = solve(method(), definite(5, dtype=dtype), zeros, x0=torch.ones_like(zeros))
        assert torch.equal(x, zeros)
        assert info.status == Status.CONVERGED


@case()
def a_tiny_or_huge_right_hand_side_loses_no_accuracy(name, method):
    for dtype in DTYPES:
        A, b = method.matrix(10, dtype=dtype), data(28, 10, dtype=dtype)
        unit, info = solve(method(), A, b)
        assert info.success
        for scale in (1e-30, 1e30):
            x, info = solve(method(), A, b * scale)
            assert info.status == Status.CONVERGED or name == "Neumann"
            assert info.success
            close = 1e-8 if dtype == F64 else 1e-4
            assert relative_error(x.to(F64) / scale, unit.to(F64)) < close
            assert residual(A.to(F64), x.to(F64) / scale, b.to(F64)) < 1.1e-4
            if name in KRYLOV and dtype == F64:
                assert residual(A, x / scale, b) <= 1e-6


@case(KRYLOV)
def a_tiny_or_huge_matrix_is_no_singular_one(name, method):
    for dtype in DTYPES:
        A, b = method.matrix(12, dtype=dtype), data(5, 12, dtype=dtype)
        for scale in (1e-12, 1e12):
            x, info = solve(method(), scale * A, b)
            assert info.status == Status.CONVERGED
            close = 1e-5 if dtype == F64 else 1e-3
            assert relative_error(scale * x, torch.linalg.solve(A, b)) < close


# Matrices that not every method can solve


@case(["Exact", "GMRES", "MINRES", "NormalCG", "LSMR", "Auto", "Auto, dense"])
def a_symmetric_indefinite_system_is_solved(name, method):
    for dtype in DTYPES:
        for seed in range(3):
            A, b = indefinite(40, seed, dtype), data(seed + 9, 40, dtype=dtype)
            x, info = solve(method(), A, b)
            assert info.status == Status.CONVERGED
            expected = torch.linalg.solve(A.to(F64), b.to(F64)).to(dtype)
            assert relative_error(x, expected) < (1e-5 if dtype == F64 else 2e-3)
    if name in ("Exact", "GMRES"):  # to as many digits as are asked for
        A, b = indefinite(6), data(8, 6, dtype=F64)
        x, info = solve(method(**({} if name == "Exact" else {"rtol": 1e-10})), A, b)
        assert info.success
        assert relative_error(x, torch.linalg.solve(A, b)) < 1e-8


@case(MINIMUM_NORM)
def a_singular_consistent_system_gets_the_solution_of_minimum_norm(name, method):
    below = 1 if name == "CG" else -1  # conjugate gradients take no negative eigenvalues
    for dtype in DTYPES:
        for n in (8, 60):
            low, high = spread(n // 3, 1, 4), spread(n - 2 * (n // 3), 1, 9)
            A = with_spectrum([0.0] * (n // 3), below * low, high)
            expected = A @ data(3, n, dtype=F64)  # in the range of A
            x, info = solve(method(), A.to(dtype), (A @ expected).to(dtype))
            assert info.status == Status.CONVERGED
            assert relative_error(x, expected.to(dtype)) < (1e-5 if dtype == F64 else 2e-3)


@case(["Exact", "CG"])
def a_semidefinite_system_gets_the_solution_of_minimum_norm_to_many_digits(name, method):
    for seed in range(4):
        A = semidefinite(8, 5, seed)
        b = A @ data(seed + 10, 8, dtype=F64)
        x, info = solve(method(**({} if name == "Exact" else {"rtol": 1e-10})), A, b)
        assert relative_error(x, torch.linalg.pinv(A, hermitian=True) @ b) < 1e-8
        assert info.status == Status.CONVERGED


@case(["Exact", "CG", "GMRES"])
def a_singular_inconsistent_system_is_named_as_such_and_never_nan(name, method):
    for fields in [{}] if name == "Exact" else [{}, {"rtol": 1e-8}, {"maxiter": 100}]:
        for seed in range(6):
            A, b = semidefinite(8, 5, seed), data(seed + 20, 8, dtype=F64)
            x, info = solve(method(**fields), A, b)
            assert info.status == Status.SINGULAR
            assert not info.success
            assert x.isfinite().all()
            assert residual(A, x, b) <= 1 + 1e-9
            with pytest.raises(hypergrad.SingularHessian, match="damping"):
                hypergradient_with(A, b, method(**fields), on_failure="raise")


@case(["MINRES", "NormalCG", "LSMR", "Auto, dense"])
def a_singular_inconsistent_system_is_named_and_solved_by_least_squares(name, method):
    options = [{}, {"rtol": 1e-8}, {"maxiter": 500}] if name == "MINRES" else [{}]
    for dtype, n, seed in itertools.product(DTYPES, (8, 60), range(3)):
        A = with_spectrum([0.0] * (n // 3), spread(n - n // 3, 1, 9), seed=seed, dtype=dtype)
        b = data(seed + 20, n, dtype=dtype)
        least = b - A @ (torch.linalg.pinv(A.to(F64), rtol=1e-5) @ b.to(F64)).to(dtype)
        for fields in options:
            x, info = solve(method(**fields), A, b)
            assert info.status == Status.SINGULAR
            assert not info.success
            assert x.isfinite().all()
            assert residual(A, x, b) <= 1.01 * float(least.norm() / b.norm())
            assert x.norm() < 100 * b.norm()  # the least eigenvalue but zero is 1


@case()
def the_zero_matrix_is_singular(name, method):
    x, info = solve(method(), torch.zeros(3, 3, dtype=F64), torch.ones(3, dtype=F64))
    assert info.residual_norm == 1
    assert x.isfinite().all()
    if name != "Neumann":
        assert info.status == Status.SINGULAR
        assert not info.success
    if name in KRYLOV:
        assert not x.any()


@case()
def a_number_that_is_not_finite_is_never_turned_into_a_solution(name, method):
    eye, ones = torch.eye(4, dtype=F64), torch.ones(4, dtype=F64)
    for bad in (math.nan, math.inf):
        inside, beside, entry = eye.clone(), eye.clone(), ones.clone()
        inside[1, 1] = beside[1, 2] = entry[1] = bad
        for A, b in ((inside, ones), (beside, ones), (eye, entry), (eye, bad * ones)):
            x, info = solve(method(), A, b)
            assert info.status == Status.NOT_FINITE
            assert not info.success
            assert x.isnan().all()
            assert info.residual_norm != 0


# Preconditioners


@case(KRYLOV)
def an_inexact_preconditioner_saves_iterations_and_keeps_the_solution(name, method):
    scales = spread(40, 1, 1e3)
    A, b = scales.diag() + with_spectrum(spread(40, 0.1, 0.5)), data(8, 40, dtype=F64)
    _, before = solve(method(rtol=1e-10), A, b)
    x, info = solve(method(rtol=1e-10, preconditioner=lambda v: v / scales), A, b)
    assert info.status == Status.CONVERGED
    assert relative_error(x, torch.linalg.solve(A, b)) < 1e-7
    assert 2 * info.iterations < before.iterations
    assert residual(A, x, b) <= 1e-10
    assert float(info.residual_norm) == pytest.approx(residual(A, x, b), abs=1e-13)


# Batches of tasks


@case()
def each_task_of_a_batch_stops_as_if_it_were_alone(name, method):
    # Tasks of different difficulty at a loose tolerance: one that went on would be more accurate.
    A = torch.stack([method.matrix(12, seed, 10.0 ** (seed / 2 + 0.5)) for seed in range(4)])
    A[0] = torch.eye(12, dtype=F64) if method.kind != "definite" else A[0]
    b = data(35, 4, 12, dtype=F64) * torch.tensor([1e-9, 1.0, 1e9, 1.0], dtype=F64)[:, None]
    solver = method() if name == "Exact" else method(rtol=1e-2)
    x, info = solve_batch(solver, A, b)
    for task in range(4):
        alone, single = solve(solver, A[task], b[task])
        assert relative_error(x[task], alone) < (1e-10 if method.kind == "definite" else 1e-6)
        assert info.status[task] == single.status
        assert info.success[task] == single.success
        assert info.iterations[task] == single.iterations
        assert float(info.residual_norm[task]) == pytest.approx(
            float(single.residual_norm), rel=1e-8, abs=1e-14
        )
    if name not in ("Exact", "Auto, dense"):
        assert info.iterations[0] < info.iterations[3]
        assert info.matvecs[0] == info.matvecs[3] >= info.iterations[3]


@case([*KRYLOV, "Exact", "Auto"])
def a_task_that_fails_does_not_disturb_the_others(name, method):
    n = 40
    kinds = {
        "easy": torch.eye(n, dtype=F64),
        "indefinite": with_spectrum(-spread(5, 1, 2), spread(35, 1, 3), seed=1),
        "huge": 1e9 * with_spectrum(spread(n, 1, 4), seed=2),
        "singular": with_spectrum([0.0] * 10, spread(30, 1, 3), seed=3),
        "not finite": torch.full((n, n), math.nan, dtype=F64),
        "zero": torch.zeros(n, n, dtype=F64),
        "again": with_spectrum(spread(n, 1, 3), seed=4),
    }
    A = torch.stack(list(kinds.values()))
    b = data(35, len(kinds), n, dtype=F64)
    b[0] *= 1e-9
    solver = method() if name == "Exact" else method(rtol=1e-2)
    x, info = solve_batch(solver, A, b)
    close = 1e-2 if name == "BiCGSTAB" else 1e-6  # it is sensitive to rounding
    for task, kind in enumerate(kinds):
        alone, single = solve(solver, A[task], b[task])
        assert info.status[task] == single.status, kind
        assert info.success[task] == single.success, kind
        if kind == "singular":  # when that is noticed, is up to rounding
            assert x[task].isfinite().all()
            continue
        assert info.iterations[task] == single.iterations, kind
        if kind not in ("zero", "not finite"):
            assert (x[task] - alone).norm() <= close * alone.norm(), kind
        torch.testing.assert_close(
            info.residual_norm[task], single.residual_norm, rtol=close, atol=1e-12, equal_nan=True
        )
    status = dict(zip(kinds, info.status.tolist(), strict=True))
    assert status["easy"] == status["again"] == Status.CONVERGED
    assert status["not finite"] == Status.NOT_FINITE
    assert status["zero"] == Status.SINGULAR
    assert status["singular"] != Status.CONVERGED
    if name == "CG":
        assert status["indefinite"] == Status.NEGATIVE_CURVATURE
        assert info.negative_curvature.tolist() == [kind == "indefinite" for kind in kinds]


@case(["Exact", "CG", "GMRES"])
def a_task_that_fails_at_the_default_tolerance_does_not_disturb_the_others(name, method):
    good = definite(6, condition=100)
    kinds = {
        "good": good,
        "negative": good - 5 * torch.eye(6, dtype=F64),
        "not finite": good * math.nan,
        "singular": torch.diag(torch.tensor([0.0, 1, 2, 3, 4, 5], dtype=F64)),
        "again": 3 * good,
    }
    b = data(36, 6, dtype=F64)
    x, info = solve_batch(method(), torch.stack(list(kinds.values())), b.expand(5, 6))
    status = dict(zip(kinds, info.status.tolist(), strict=True))
    for task, (kind, A) in enumerate(kinds.items()):
        alone, single = solve(method(), A, b)
        assert status[kind] == single.status
        # GMRES is free to add to its solution what a singular matrix does not see.
        torch.testing.assert_close(A @ x[task], A @ alone, rtol=1e-8, atol=1e-8, equal_nan=True)
    assert status["good"] == status["again"] == Status.CONVERGED
    assert relative_error(x[0], torch.linalg.solve(good, b)) < 1e-4
    assert status["not finite"] == Status.NOT_FINITE
    assert status["singular"] == Status.SINGULAR
    if name == "CG":
        assert status["negative"] == Status.NEGATIVE_CURVATURE
        assert info.negative_curvature.tolist() == [False, True, False, False, False]


@case()
def zero_right_hand_sides_in_a_batch_are_exact_zeros(name, method):
    A = torch.stack([definite(5), math.nan * definite(5), definite(5)])
    b = torch.stack([torch.zeros(5, dtype=F64), torch.zeros(5, dtype=F64), torch.ones(5).to(F64)])
    x, info = solve_batch(method(), A, b)
    assert not x[:2].any()
    assert info.status[:2].tolist() == [0, 0]
    assert info.success.all()
    assert residual(A[2], x[2], b[2]) < 1e-5


@case()
def two_batch_dimensions_are_two_nested_loops(name, method):
    A = torch.stack([method.matrix(5, seed) for seed in range(6)]).view(2, 3, 5, 5)
    b = data(37, 2, 3, 5, dtype=F64)
    x, info = torch.func.vmap(functools.partial(solve_batch, method()))(A, b)
    assert info.status.shape == (2, 3)
    assert relative_error(x, torch.linalg.solve(A, b[..., None])[..., 0]) < 1e-5


@case()
def tasks_may_share_the_matrix_or_the_right_hand_side(name, method):
    A, b = torch.stack([method.matrix(5, seed) for seed in range(3)]), data(38, 3, 5, dtype=F64)
    shared, _ = torch.func.vmap(lambda b: solve(method(), A[0], b))(b)
    assert relative_error(shared, torch.linalg.solve(A[0], b.T).T) < 1e-5
    same, _ = torch.func.vmap(lambda A: solve(method(), A, b[0]))(A)
    assert relative_error(same, torch.linalg.solve(A, b[0].expand(3, 5))) < 1e-5


@pytest.mark.parametrize(
    ("name", "promise"),
    [pytest.param(name, promise, id=f"{promise.__name__}-{name}") for name, promise in CASES],
)
def test_a_solver_keeps_its_contract(name, promise):
    promise(name, METHODS[name])


# The closed forms


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        pytest.param(name, problem, id=f"{name}-{problem.__name__}")
        for name in KRYLOV
        for problem in WELL_POSED
        if problem().symmetric or name not in ("CG", "MINRES")
    ],
)
def test_each_iterative_solver_finds_the_closed_forms_that_fit_it(name, problem):
    problem = problem()
    hypergradient, info = hypergrad.implicit_grad(
        problem.outer,
        problem.condition,
        problem.solve(problem.hparams),
        problem.hparams,
        solver=METHODS[name](rtol=1e-10),
        on_failure="raise",
        return_info=True,
    )
    assert relative_error(hypergradient, problem.hypergradient(problem.hparams)) < 1e-6
    assert info.status == Status.CONVERGED
    assert info.method == name


# Solvers and infos as values

VALUES = [
    *(CG(), GMRES(), Neumann(), Exact(), Identity(), MINRES()),
    *(BiCGSTAB(), NormalCG(), LSMR(), Auto(), Nystrom(rank=4)),
]
EACH_VALUE = pytest.mark.parametrize("solver", VALUES, ids=lambda s: type(s).__name__)


@EACH_VALUE
def test_a_solver_is_a_frozen_printable_comparable_value(solver):
    name = next(iter(dataclasses.fields(solver))).name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(solver, name, 1)
    again = dataclasses.replace(solver)
    assert solver == again
    assert hash(solver) == hash(again)
    changed = dataclasses.replace(solver, **{name: 3})
    assert changed != solver
    assert f"{name}=3" in repr(changed)
    assert eval(repr(changed), vars(hypergrad)) == changed


@EACH_VALUE
def test_every_leaf_of_an_info_is_a_tensor_with_fixed_dtype(solver):
    _, info = solver.solve(lambda v: 2 * v, torch.ones(3), rmatvec=lambda v: 2 * v)
    assert all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(info))
    assert info.status.dtype == info.iterations.dtype == info.matvecs.dtype == torch.int64
    assert info.success.dtype == info.negative_curvature.dtype == torch.bool
    assert info.eigenvalues.shape == (2,)
    assert info.method == type(solver).__name__ or isinstance(solver, Auto)
    assert Status(info.status) is Status.CONVERGED or isinstance(solver, Neumann)
    assert info.method in str(info)
    assert Status(info.status).name in str(info)
    _, many = solve_batch(solver, torch.eye(3).expand(4, 3, 3), torch.ones(4, 3))
    assert all(leaf.shape[0] == 4 for leaf in pytree.tree_leaves(many))
    assert "4 tasks" in str(many)
    assert "\n" not in str(many)


KRYLOV_SOLVERS = [METHODS[name].make for name in KRYLOV]


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        *[(m, "maxiter", n) for m in [*KRYLOV_SOLVERS, Auto] for n in (0, -3)],
        *[(m, "rtol", r) for m in [*KRYLOV_SOLVERS, Auto, Neumann] for r in (-1e-3, math.nan)],
        *[(m, "atol", a) for m in [*KRYLOV_SOLVERS, Auto] for a in (-1.0, math.nan)],
        *[
            (m, "damping", d)
            for m in [*KRYLOV_SOLVERS, Auto, Neumann, Exact]
            for d in (math.nan, math.inf)
        ],
        (GMRES, "restart", 0),
        (Neumann, "terms", 0),
        *[(Neumann, "step_size", s) for s in (0.0, -1.0, math.nan)],
        *[(Identity, "scale", s) for s in (0.0, math.nan, math.inf)],
        (Auto, "dense_below", -1),
        (Nystrom, "rank", 0),
        (functools.partial(Nystrom, 3), "damping", -1.0),
    ],
)
def test_a_field_that_means_nothing_is_refused(make, field, value):
    with pytest.raises(ValueError, match=field):
        make(**{field: value})
