"""A linear solver of the caller's, written from public names: everything but x is measured."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad import Status, implicit_grad
from hypergrad.solvers import LinearSystem, Solution, Solver

F64 = torch.float64
A = torch.tensor([[2.0, 0.5], [0.5, 1.5]], dtype=F64)
H = torch.tensor([1.0, 2.0], dtype=F64)
TASKS = torch.stack([H, 2 * H, 0 * H])


@dataclasses.dataclass(frozen=True)
class Richardson(Solver):
    step_size: float = 0.4
    steps: int = 60
    damping: float = 0.0
    rtol: float | None = None

    def run(self, system: LinearSystem) -> Solution:
        assert not torch.is_grad_enabled()
        x = torch.zeros_like(system.b)
        for _ in range(self.steps):
            image = system.matvec(x) + self.damping * x
            x = x + self.step_size * (system.b - image)
        return Solution(x)


@dataclasses.dataclass(frozen=True)
class Early(Solver):
    """Stops as soon as every task is solved, where the host may look."""

    def run(self, system: LinearSystem) -> Solution:
        x, r, steps = torch.zeros_like(system.b), system.b, 0
        active = torch.linalg.vector_norm(r, dim=-1) > 1e-9
        while steps < 100 and system.goes_on(active):
            x = x + 0.4 * r
            r, steps = system.b - system.matvec(x), steps + 1
            active = torch.linalg.vector_norm(r, dim=-1) > 1e-9
        return Solution(x, residual=r, iterations=torch.full_like(active, steps, dtype=torch.int64))


def inner(x: Tensor, h: Tensor) -> Tensor:
    return x @ A @ x / 2 - h @ x + 0.05 * (x**4).sum()


def outer(x: Tensor, h: Tensor) -> Tensor:
    return (x**2).sum() + h.sum()


def solved(h: Tensor) -> Tensor:
    """Solve the inner problem by Newton's method."""
    x = torch.zeros_like(h)
    for _ in range(30):
        x = x - torch.linalg.solve(A + torch.diag(0.6 * x**2), A @ x - h + 0.2 * x**3)
    return x


SOLVERS = [Richardson(), Early()]


@pytest.mark.parametrize("solver", SOLVERS)
def test_implicit_grad(solver: Solver) -> None:
    x = solved(H)
    g, info = hypergrad.implicit_grad(outer, inner, x, H, solver=solver, return_info=True)
    torch.testing.assert_close(g, hypergrad.implicit_grad(outer, inner, x, H))
    assert info.success
    assert info.residual_norm < 1e-8
    assert info.method == type(solver).__name__


@pytest.mark.parametrize("solver", SOLVERS)
def test_implicit_grad_over_tasks(solver: Solver) -> None:
    x = torch.stack([solved(h) for h in TASKS])

    def one(x: Tensor, h: Tensor) -> Tensor:
        return hypergrad.implicit_grad(outer, inner, x, h, solver=solver)

    expected = torch.stack([one(a, h) for a, h in zip(x, TASKS, strict=True)])
    torch.testing.assert_close(torch.func.vmap(one)(x, TASKS), expected)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian])
def test_custom_argmin(solver: Solver, transform: object) -> None:
    def loss(solver: Solver | None) -> object:
        fit = hypergrad.custom_argmin(inner, solver=solver)(lambda init, h: solved(h))
        return lambda h: outer(fit(torch.zeros_like(h), h), h)

    of_own, expected = (transform(loss(s)) for s in (solver, hypergrad.Exact()))  # type: ignore[operator]
    torch.testing.assert_close(of_own(H), expected(H), rtol=1e-6, atol=1e-9)
    mapped = torch.func.vmap(of_own)(TASKS)
    torch.testing.assert_close(mapped[1], expected(TASKS[1]), rtol=1e-6, atol=1e-9)


def test_the_products_are_counted_and_the_damping_is_in_the_residual() -> None:
    x, info = Richardson(damping=0.5).solve(lambda v: A @ v, H)
    torch.testing.assert_close(A @ x + 0.5 * x, H)
    assert info.matvecs == 61
    assert info.residual_norm < 1e-8
    assert info.success


def test_too_few_steps_are_no_success() -> None:
    solver = Richardson(steps=3)
    _, info = solver.solve(lambda v: A @ v, H)
    assert Status(info.status) is Status.MAX_ITERATIONS
    assert not info.success
    with pytest.raises(hypergrad.NotConverged, match="Richardson"):
        hypergrad.implicit_grad(outer, inner, solved(H), H, solver=solver, on_failure="raise")
    _, info = dataclasses.replace(solver, rtol=0.5).solve(lambda v: A @ v, H)
    assert info.success


def test_zero_and_nan_right_hand_sides() -> None:
    b = torch.stack([H, 0 * H, math.nan * H])
    x, info = torch.func.vmap(lambda b: Richardson().solve(lambda v: A @ v, b))(b)
    assert info.status.tolist() == [Status.CONVERGED, Status.CONVERGED, Status.NOT_FINITE]
    assert info.residual_norm[1] == 0
    assert x[1].tolist() == [0.0, 0.0]
    assert x[2].isnan().all()


def test_what_a_solver_says_itself_is_kept() -> None:
    @dataclasses.dataclass(frozen=True)
    class Stagnant(Solver):
        def run(self, system: LinearSystem) -> Solution:
            status = torch.tensor(int(Status.STAGNATED))
            return Solution(system.b / 2, status, status == status, matvecs=7, method="half")

    x, info = Stagnant().solve(lambda v: 2 * v, torch.ones(3))
    assert x.tolist() == [0.5, 0.5, 0.5]
    assert Status(info.status) is Status.STAGNATED
    assert info.success
    assert info.matvecs == 7
    assert info.method == "half"
    assert info.residual_norm == 0


def test_run_must_return_a_solution() -> None:
    @dataclasses.dataclass(frozen=True)
    class Bare(Solver):
        def run(self, system: LinearSystem) -> Solution:
            return system.b  # type: ignore[return-value]

    with pytest.raises(TypeError, match=r"Bare.run must return a .*Solution\(x\)"):
        Bare().solve(lambda v: v, torch.ones(2))


def test_a_plain_function_is_told_how_to_become_a_solver() -> None:
    def mine(matvec: object, b: Tensor) -> Tensor:
        return b

    with pytest.raises(TypeError) as caught:
        hypergrad.implicit_grad(outer, inner, solved(H), H, solver=mine)  # type: ignore[call-overload]
    for word in ("hypergrad.solvers.Solver", "run(system)", "extending"):
        assert word in str(caught.value)
    with pytest.raises(TypeError) as caught:
        hypergrad.implicit_grad(outer, inner, solved(H), H, solver=hypergrad.CG)  # type: ignore[call-overload]
    assert "extending" not in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Direct(Solver):
    """A factorisation that says nothing but x."""

    def run(self, system: LinearSystem) -> Solution:
        return Solution(torch.linalg.solve(system.dense(), system.b[..., None])[..., 0])


def test_a_saddle_and_uneven_units_are_said_of_a_solution_that_brings_no_evidence():
    t = torch.tensor([1.0, 2.0], dtype=F64)
    saddle = lambda w, t: (w[0] - t[0]) ** 2 - (w[1] - t[1] ** 2) ** 2
    with pytest.raises(hypergrad.IndefiniteHessian):
        implicit_grad(lambda w, t: w.sum(), saddle, t**2, t, solver=Direct(), on_failure="raise")
    scales = torch.tensor([1e5, 1.0, 1e-5], dtype=F64)
    M = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 4.0]], dtype=F64)
    H = scales[:, None] * M * scales
    t = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    inner = lambda w, t: (w @ H @ w) / 2 - (scales * w * t).sum()
    outer = lambda w, t: ((scales * w) ** 2).sum() / 2
    w = torch.linalg.solve(H, scales * t)
    expected = torch.linalg.solve(M, torch.linalg.solve(M, t))
    for solver in (hypergrad.Nystrom(rank=3), Direct()):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = implicit_grad(outer, inner, w, t, solver=solver)
        right = torch.allclose(found, expected, rtol=1e-6)
        assert right != bool(caught)  # right, or said


def test_a_direct_solver_of_ones_own_works_in_jacobians_and_batches():
    target = torch.tensor([1.0, 2.0, 3.0], dtype=F64)

    @hypergrad.custom_argmin(
        lambda w, t: ((w - t**2) ** 2).sum(), solver=Direct(), on_failure="raise"
    )
    def fit(init: None, t: Tensor) -> Tensor:
        return t**2

    of = lambda t: fit(None, t)[:2]
    expected = torch.diag(2 * target)[:2]
    torch.testing.assert_close(torch.func.jacrev(of)(target), expected)
    torch.testing.assert_close(torch.func.jacfwd(of)(target), expected)
    batch = torch.stack([target, 2 * target])
    torch.testing.assert_close(
        torch.func.vmap(torch.func.jacrev(of))(batch), torch.stack([expected, 2 * expected])
    )


@pytest.mark.parametrize(
    ("run", "error", "words"),
    [
        (lambda s: Solution(s.b[:-1]), TypeError, r"x of shape \(3,\)"),
        (lambda s: Solution(s.b.float()), TypeError, "dtype torch.float64"),
        (lambda s: Solution(s.b.tolist()), TypeError, "a tensor x; got list"),
        (lambda s: Solution(s.b.mul_(0.5)), hypergrad.UnsupportedOperation, "system.b in place"),
    ],
)
def test_what_is_no_solution_is_named(run, error, words):
    made = dataclasses.make_dataclass(
        "Mine", [], bases=(Solver,), frozen=True, namespace={"run": lambda self, s: run(s)}
    )
    t = torch.ones(3, dtype=F64)
    with pytest.raises(error, match=words):
        implicit_grad(
            lambda w, t: (w**2).sum(),
            lambda w, t: ((w - t) ** 2).sum(),
            t,
            t.clone(),
            solver=made(),
        )


def test_one_number_stands_for_all_tasks_in_a_figure():
    solution = Solution(torch.zeros(2, 3), hypergrad.Status.CONVERGED, iterations=5)
    assert solution.status.tolist() == [0, 0]
    assert solution.iterations.tolist() == [5, 5]
    assert solution.success.all()


def test_a_solver_without_maxiter_that_falls_short_is_not_told_to_raise_it():
    short = dataclasses.make_dataclass(
        "Short", [], bases=(Solver,), frozen=True,
        namespace={"run": lambda self, s: Solution(0.1 * s.b)},
    )  # fmt: skip
    t = torch.ones(3, dtype=F64)
    with pytest.raises(hypergrad.NotConverged, match="did not reach its tolerance") as caught:
        implicit_grad(
            lambda w, t: w.sum(), lambda w, t: ((w - t) ** 2).sum(), t, t.clone(), solver=short(),
            on_failure="raise",
        )  # fmt: skip
    assert "maxiter" not in str(caught.value)


@pytest.mark.parametrize("method", [hypergrad.CG, hypergrad.GMRES, hypergrad.MINRES])
def test_a_preconditioner_that_writes_in_place_is_named(method):
    t = torch.ones(2, dtype=F64)
    with pytest.raises(hypergrad.UnsupportedOperation, match="preconditioner changes") as caught:
        implicit_grad(
            lambda w, t: (w**2).sum(), lambda w, t: ((w - t) ** 2).sum(), t, t.clone(),
            solver=method(preconditioner=lambda v: v.mul_(2)),
        )  # fmt: skip
    assert caught.value.argument == "preconditioner"
