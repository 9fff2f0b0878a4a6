"""The comparison with other searches: one function for all, which is the true one, and a budget."""

import itertools
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import hypergrad
from benchmarks import worth_it
from benchmarks.worth_it_page import at, compared, table, winners
from benchmarks.worth_it_problems import (
    COUNTS,
    DATA,
    FEATURES,
    HIGH,
    LOW,
    coefficients,
    problem,
)
from benchmarks.worth_it_searches import METHODS, SOLVER, search, solved

F64 = torch.float64


@pytest.fixture(params=list(METHODS))
def method(request):
    if request.param == "TPE":
        pytest.importorskip("optuna", reason="the extra bench brings Optuna")
    return request.param


def drawn(count, seed=0):
    draws = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return LOW + (HIGH - LOW) * draws


def ridge(task, log_decay):
    """The minimiser in the features' own units, with a decay for each, by the normal equations."""
    x, y = task.train
    decays = log_decay.exp().repeat_interleave(FEATURES // task.count)
    ones = torch.ones(len(x), 1, dtype=F64)
    matrix = torch.cat([x, ones], dim=1)
    hessian = 2 * matrix.T @ matrix / len(x) + torch.cat([decays, torch.zeros(1)]).diag()
    return torch.linalg.solve(hessian, 2 * matrix.T @ y / len(x))


def in_units_of_the_losses(task, v, log_decay):
    return torch.cat([v[:-1] / coefficients(torch.ones(FEATURES + 1), log_decay), v[-1:]])


@pytest.mark.parametrize("count", COUNTS)
def test_the_inner_solution_is_that_of_ridge_regression(count):
    task, log_decay = problem("diabetes", count, seed=0), drawn(count)
    _, w, value = solved(task, log_decay)
    v = ridge(task, log_decay)
    x, _ = task.train
    fitted = x @ coefficients(w, log_decay) + w[-1]
    torch.testing.assert_close(fitted, x @ v[:-1] + v[-1], rtol=1e-5, atol=1e-5)
    exact = task.validation(in_units_of_the_losses(task, v, log_decay), log_decay).item()
    assert value == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("name", ["breast_cancer", "digits"])
def test_the_inner_solution_is_that_of_scikit_learn(name):
    from sklearn.linear_model import LogisticRegression

    task, log_decay = problem(name, 1, seed=0), torch.tensor([-6.0], dtype=F64)
    _, w, _ = solved(task, log_decay)
    x, y = task.train
    C = 1 / (len(x) * log_decay.exp().item())
    model = LogisticRegression(C=C, tol=1e-10, max_iter=5000).fit(x.numpy(), y.numpy())
    expected = torch.from_numpy(model.decision_function(x.numpy()))
    torch.testing.assert_close(
        x @ coefficients(w, log_decay) + w[-1], expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", list(DATA))
def test_equal_decays_are_one_function_at_every_count(name):
    values = {
        count: solved(problem(name, count, seed=0), torch.full((count,), -5.0, dtype=F64))[-1]
        for count in COUNTS
    }
    assert all(value == pytest.approx(values[1], rel=1e-6) for value in values.values())


def test_every_method_minimises_the_true_value_from_the_same_start(method):
    task = problem("diabetes", 10, seed=0)
    points = list(itertools.islice(METHODS[method](task, 0), 4))
    assert torch.equal(points[0][0], task.start)
    assert len({tuple(log_decay.tolist()) for log_decay, *_ in points}) == 4
    for log_decay, _, value in points:
        assert log_decay.min() >= LOW
        assert log_decay.max() <= HIGH
        v = in_units_of_the_losses(task, ridge(task, log_decay), log_decay)
        assert value == pytest.approx(task.validation(v, log_decay).item(), rel=1e-5)


def test_the_hypergradient_is_the_slope_of_the_values():
    task, log_decay = problem("breast_cancer", 10, seed=0), drawn(10).requires_grad_()
    fit = hypergrad.argmin(task.inner, solver=SOLVER)
    value = task.validation(fit(task.zeros, log_decay), log_decay)
    (gradient,) = torch.autograd.grad(value, log_decay)
    direction = drawn(10, seed=1)
    up, down = (solved(task, log_decay.detach() + s * 1e-4 * direction)[-1] for s in (1, -1))
    assert float(gradient @ direction) == pytest.approx((up - down) / 2e-4, rel=1e-3)


def test_a_search_keeps_its_budget(method):
    list(itertools.islice(METHODS[method](problem("diabetes", 1, seed=0), 0), 3))  # warm
    result = search(problem("diabetes", 1, seed=0), method, seed=0, seconds=0.4)
    assert 1 <= len(result.bests) <= result.points
    assert 0 < result.bests[0].seconds <= result.bests[-1].seconds <= result.seconds <= 0.4
    values = [best.validation for best in result.bests]
    assert values == sorted(values, reverse=True)


def test_a_budget_that_ends_before_the_first_point_is_refused():
    with pytest.raises(ValueError, match="not one point within 1e-09"):
        search(problem("diabetes", 1, seed=0), "random search", seed=0, seconds=1e-9)


def test_the_benchmark_is_run_stored_gone_on_with_and_drawn(tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna", reason="the extra bench brings Optuna")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    out, drawing = tmp_path / "figures", tmp_path / "picture.png"
    stores = ["--out", str(out), "--picture", str(drawing)]
    measures = [*stores, "--seconds", "0.3", "--data", "diabetes", "--counts", "10"]

    worth_it.main([*measures, "--seeds", "1"])
    first = json.loads((out / "diabetes.json").read_text())["runs"]
    assert [of_it["method"] for of_it in first] == list(METHODS)
    assert all(point[0] <= 0.3 for of_it in first for point in of_it["curve"])
    worth_it.main([*measures, "--seeds", "2"])
    both = json.loads((out / "diabetes.json").read_text())["runs"]
    assert both[: len(first)] == first
    assert [of_it["seed"] for of_it in both] == [0] * len(METHODS) + [1] * len(METHODS)

    page = (out / "table.md").read_text()
    assert page.startswith("Means of 2 splits, 0.3 processor seconds a run.\n\n| data | decays")
    assert [line.split(" | ")[1] for line in page.splitlines()[4:]] == ["10"]
    drawing.unlink()
    worth_it.main([*stores, "--draw"])
    assert (out / "table.md").read_text() == page
    assert page in capsys.readouterr().out
    assert drawing.read_bytes().startswith(b"\x89PNG")


def stored_runs(ends):
    """Figures of two splits: the validation loss at the end of each method."""
    runs = [
        {"count": 1, "seed": seed, "method": name, "points": 7, "curve": [[0.1, end, 2 * end]]}
        for seed, of_it in enumerate(ends)
        for name, end in zip(METHODS, of_it, strict=True)
    ]
    return {"data": "digits", "seconds": 1.0, "runs": runs}


def test_a_lead_of_less_than_a_hundredth_is_a_tie():
    assert winners(stored_runs([(1.0, 0.5, 0.7), (0.4, 0.3, 0.2999)]), 1) == "TPE 1, tie 1"
    line = table([stored_runs([(1.0, 0.5, 0.75), (1.0, 0.5, 0.25)])]).splitlines()[-1]
    assert line == (
        "| digits, even or odd | 1 | 1.000 / 2.000 (7) | 0.500 / 1.000 (7) | 0.500 / 1.000 (7) | "
        "TPE 1, hypergradients 1 |"
    )


def test_a_split_that_lacks_a_method_is_left_out():
    figures = stored_runs([(1.0, 0.5, 0.75), (1.0, 0.5, 0.25)])
    assert compared(figures) == figures
    unfinished = {**figures, "runs": figures["runs"][:-1]}
    assert compared(unfinished)["runs"] == figures["runs"][:3]


def test_the_stored_figures_are_of_five_splits_and_their_table_is_beside_them():
    folder = Path(__file__).parents[2] / worth_it.FIGURES
    stored = [json.loads((folder / f"{name}.json").read_text("utf-8")) for name in sorted(DATA)]
    expected = sorted(itertools.product(range(5), COUNTS, METHODS))
    for figures in stored:
        runs = [(run["seed"], run["count"], run["method"]) for run in figures["runs"]]
        assert sorted(runs) == expected
    assert (folder / "table.md").read_text("utf-8") == table(stored)


def test_a_curve_is_a_step_function_of_time():
    import numpy as np

    values = at([[0.2, 3.0, 1.0], [0.5, 2.0, 1.0]], np.array([0.1, 0.2, 0.4, 0.5, 9.0]))
    assert np.isnan(values[0])
    assert values[1:].tolist() == [3.0, 3.0, 2.0, 2.0]
