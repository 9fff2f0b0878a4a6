"""The theory, measured: counts, closed forms, orders of growth, and the two programs."""

import gc
import itertools
import json
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from reproduction.studies import inner_steps
from reproduction.studies.theory import __main__ as theory
from reproduction.studies.theory.fits import exponent
from reproduction.studies.theory.peak_memory import peak_bytes
from reproduction.studies.theory.quadratics import LAM, Calls, Quadratic
from reproduction.studies.theory.rows import (
    ROWS,
    full_run,
    gradient_descent,
    implicit_run,
    nesterov,
    solved_truncated,
    truncated_run,
)
from reproduction.studies.theory.sweeps import sweep_rows

PROBLEM = Quadratic.draw(30.0, 40, 0)


def dense_meta_gradient(problem):
    A = problem.hessian + LAM * torch.eye(len(problem.b), dtype=torch.float64)
    phi = torch.linalg.solve(A, problem.b + LAM * problem.theta)
    return LAM * torch.linalg.solve(A, phi - problem.c)


def plain_gradient(problem, steps, step_size, momentum):
    """Unroll with torch alone: no library, no closed form."""
    theta = problem.theta.clone().requires_grad_()
    phi = before = theta
    for _ in range(steps):
        y = phi + momentum * (phi - before)
        slope = problem.hessian @ y - problem.b + LAM * (y - theta)
        phi, before = y - step_size * slope, phi
    return torch.autograd.grad(problem.outer(phi, theta), theta)[0]


# Counts


def test_gradients_and_products_are_counted_one_by_one():
    calls, phi = Calls(), PROBLEM.c.clone().requires_grad_()
    inner = PROBLEM.inner(calls)

    slope = inner.gradient(phi, PROBLEM.theta)
    assert (calls.gradients, calls.products) == (1, 0)
    for k in range(1, 4):
        torch.autograd.grad(slope, phi, torch.ones_like(phi), retain_graph=True)
        assert (calls.gradients, calls.products) == (1, k)
    inner.gradient(phi.detach(), PROBLEM.theta)
    assert (calls.gradients, calls.products, calls.total) == (2, 3, 5)


def test_tapped_objective_has_the_derivatives_of_the_quadratic():
    phi = PROBLEM.c.clone().requires_grad_()
    slope = PROBLEM.inner(Calls()).gradient(phi, PROBLEM.theta)
    (product,) = torch.autograd.grad(slope, phi, PROBLEM.b)

    expected = PROBLEM.hessian @ PROBLEM.c - PROBLEM.b + LAM * (PROBLEM.c - PROBLEM.theta)
    torch.testing.assert_close(slope.detach(), expected)
    torch.testing.assert_close(product, PROBLEM.hessian @ PROBLEM.b + LAM * PROBLEM.b)


@pytest.mark.parametrize("method", [gradient_descent, nesterov])
def test_unrolling_takes_one_product_for_each_gradient(method):
    found = full_run(PROBLEM, 17, method).measure("row", PROBLEM, 1e-2, 0)

    assert (found.gradients, found.products) == (17, 17)


def test_truncation_takes_products_for_what_it_keeps_alone():
    found = truncated_run(PROBLEM, 17, 5).measure("row", PROBLEM, 1e-2, 0)

    assert (found.gradients, found.products) == (17, 5)


def test_implicit_takes_a_product_a_step_and_one_that_judges():
    few, more = (
        implicit_run(PROBLEM, 12, products).measure("row", PROBLEM, 1e-2, 0) for products in (4, 9)
    )

    assert few.gradients == more.gradients <= 12 + 2
    assert (few.products, more.products) == (5, 10)


# Closed forms


def test_exact_meta_gradient_is_that_of_a_dense_solve():
    torch.testing.assert_close(PROBLEM.meta_gradient(), dense_meta_gradient(PROBLEM))
    assert PROBLEM.kappa == pytest.approx(30)
    A = PROBLEM.hessian + LAM * torch.eye(40, dtype=torch.float64)
    assert torch.linalg.cond(A).item() == pytest.approx(30)


@pytest.mark.parametrize("method", [gradient_descent, nesterov])
@pytest.mark.parametrize("steps", [0, 1, 2, 25])
def test_closed_form_of_unrolling_is_what_autograd_finds(method, steps):
    path = PROBLEM.momentum_path(*method(PROBLEM))
    found, _ = next(itertools.islice(path, steps, None))

    expected = plain_gradient(PROBLEM, steps, *method(PROBLEM))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_closed_form_of_truncation_is_what_autograd_finds():
    step_size, _ = gradient_descent(PROBLEM)
    start, theta = PROBLEM.c + 1, PROBLEM.theta.clone().requires_grad_()
    phi = start
    for _ in range(6):
        slope = PROBLEM.hessian @ phi - PROBLEM.b + LAM * (phi - theta)
        phi = phi - step_size * slope
    (expected,) = torch.autograd.grad(PROBLEM.outer(phi, theta), theta)

    torch.testing.assert_close(PROBLEM.truncated(phi.detach(), step_size, 6), expected)


def test_exponent_of_a_power_law_is_found():
    found = exponent([[(x, c * x**0.7) for x in (1, 5, 20)] for c in (1, 2, 9)])

    assert found.value == pytest.approx(0.7)
    assert found.interval == pytest.approx(0, abs=1e-12)
    assert math.isnan(exponent([[(1, 1), (2, 4)]]).interval)


# Orders of growth


@pytest.fixture(scope="module")
def rows():
    found = []
    for kappa, seed in itertools.product((10.0, 32.0, 100.0, 320.0), (0, 1)):
        found += sweep_rows(Quadratic.draw(kappa, 100, seed), 1e-2, seed)
    return found


@pytest.mark.parametrize(
    ("row", "promised"),
    [
        ("MAML, gradient descent", 1.0),
        ("MAML, Nesterov", 0.5),
        ("truncated, gradient descent", 1.0),
        ("implicit, Nesterov and CG", 0.5),
    ],
)
def test_compute_grows_with_the_promised_power_of_the_condition_number(rows, row, promised):
    points = [[(m.kappa, m.total) for m in rows if m.row == row and m.seed == s] for s in (0, 1)]

    assert exponent(points).value == pytest.approx(promised, abs=0.1)


def test_conjugate_gradients_do_no_worse_than_the_square_root(rows):
    points = [(m.kappa, m.total) for m in rows if m.row == "implicit, CG and CG"]

    assert 0.25 < exponent([points]).value < 0.55


def test_more_unknowns_bring_conjugate_gradients_nearer_to_the_square_root():
    def hypergradient(n):
        totals = []
        for kappa in (10.0, 1000.0):
            problem = Quadratic.draw(kappa, n, 0)
            run = ROWS["implicit, CG and CG"](problem, 1e-2)
            totals.append((kappa, run.measure("row", problem, 1e-2, 0).total))
        return exponent([totals]).value

    assert hypergradient(50) + 0.05 < hypergradient(400) < 0.5


def test_every_row_reaches_the_accuracy_with_the_error_that_is_promised(rows):
    assert {m.row for m in rows} == set(ROWS)
    assert all(m.error <= m.accuracy for m in rows)
    assert all(m.own_error < 1e-12 for m in rows if not m.row.startswith("implicit"))


def test_compute_grows_with_the_number_of_digits():
    for name, row in ROWS.items():
        totals = [
            row(PROBLEM, accuracy).measure(name, PROBLEM, accuracy, 0).total
            for accuracy in (1e-1, 1e-3, 1e-5)
        ]
        first, second = (b - a for a, b in itertools.pairwise(totals))
        assert 0 < second < 1.25 * first, name


def test_memory_is_flat_for_implicit_and_one_vector_a_step_for_unrolled():
    def growth(run):
        few, many = (run(steps).peak() for steps in (20, 120))
        return (many - few) / 100 / (8 * 40)  # vectors a step

    implicit_run(PROBLEM, 20, 10).peak()  # what is done once in a process is done
    assert growth(lambda steps: implicit_run(PROBLEM, steps, 10)) == 0
    assert growth(lambda steps: truncated_run(PROBLEM, steps, 10)) == pytest.approx(0, abs=0.02)
    for method in (gradient_descent, nesterov):
        found = growth(lambda steps, method=method: full_run(PROBLEM, steps, method))
        assert found == pytest.approx(1, abs=0.2)


def test_truncation_has_an_error_that_solving_does_not_remove():
    errors = []
    for kappa in (10.0, 100.0):
        problem = Quadratic.draw(kappa, 40, 0)
        found = solved_truncated(problem, 10).measure("row", problem, 1e-2, 0)
        assert found.own_error < 1e-12
        errors.append(found.error)
    assert 0.01 < errors[0] < 0.2 < 0.5 < errors[1] < 1


def test_peak_memory_is_that_of_what_is_live_at_once():
    before = torch.zeros(1000)

    def function():
        for _ in range(5):
            torch.zeros(1000)
        return before.view(10, 100) + torch.zeros(1000).view(10, 100)

    assert peak_bytes(function) == 2 * 4000


@pytest.mark.parametrize("threshold", [1, 40, 100_000])
def test_peak_memory_does_not_depend_on_when_garbage_is_collected(threshold):
    def function():
        cycle = [torch.zeros(1000)]
        cycle.append(cycle)
        del cycle
        garbage = [[] for _ in range(200)]  # enough to set the collector off at low thresholds
        return torch.zeros(1000), garbage

    before = gc.get_threshold()
    gc.set_threshold(threshold)
    try:
        assert peak_bytes(function) == 2 * 4000
    finally:
        gc.set_threshold(*before)
    assert gc.isenabled()


@pytest.mark.parametrize("kind", ["full", "implicit"])
def test_peak_memory_is_what_the_allocator_reports_to_the_profiler(kind):
    problem = Quadratic.draw(30.0, 200, 0)
    run = full_run(problem, 160, nesterov) if kind == "full" else implicit_run(problem, 50, 20)
    run.compute(Calls())  # what is done once in a process is done
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as recorded:
        run.compute(Calls())
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    expected = max(itertools.accumulate(change for _, change in changes))

    assert run.peak() == pytest.approx(expected, rel=0.03)


# The programs


@pytest.mark.slow
def test_smoke_run_of_the_table(tmp_path, capsys):
    first, again = tmp_path / "first", tmp_path / "again"
    for folder in (first, again):
        theory.main(["--smoke", "--seed", "1", "--out", str(folder)])

    assert (first / "theory.png").read_bytes().startswith(b"\x89PNG")
    text = (first / "theory.md").read_text()
    assert text.strip() in capsys.readouterr().out
    fits = json.loads((first / "results.json").read_text())["fits"]
    assert set(fits) == set(ROWS)
    assert all(text.count(f"| {row} |") == 4 for row in fits)
    assert (first / "theory.md").read_text() == (again / "theory.md").read_text()
    assert (first / "results.json").read_bytes() == (again / "results.json").read_bytes()


def test_smoke_run_against_inner_steps(tmp_path, capsys):
    inner_steps.main(["--smoke", "--out", str(tmp_path / "run")])

    folder = tmp_path / "run"
    assert (folder / "inner_steps.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "inner_steps.md").read_text().strip() in capsys.readouterr().out
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    by = {(r["estimator"], r["steps"]): r for r in records}
    assert by["implicit", 64]["error"] < 0.01 < 0.1 < by["implicit", 1]["error"]
    assert by["unrolled", 64]["error"] < 0.02
    assert by["truncated to 8", 64]["error"] > 0.1
    assert by["implicit, Gauss-Newton steps", 8]["error"] < 0.01
    assert by["implicit", 64]["peak"] == pytest.approx(by["implicit", 8]["peak"], rel=0.02)
    assert by["unrolled", 64]["peak"] > 4 * by["unrolled", 8]["peak"]
    results = json.loads((folder / "results.json").read_text())
    assert results["solved"] == [{"lam": 10.0, "solved": 3, "tasks": 3}]


@pytest.mark.parametrize("program", [theory, inner_steps])
def test_theory_refuses_an_output_folder_that_is_a_file(program, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--smoke", "--out", __file__])

    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
