"""The benchmarks, run as a user runs them, in seconds."""

import json

import pytest
import torch

pytest.importorskip("matplotlib")


@pytest.fixture
def run(tmp_path, monkeypatch):
    from benchmarks.__main__ import main

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def bench(*flags):
        main(["--quick", "--out", str(tmp_path), *flags])
        return json.loads((tmp_path / "results.json").read_text())["rows"]

    return bench


@pytest.mark.slow
def test_quick_run_measures_every_side_with_its_error(run, tmp_path):
    rows = run("--only", "logistic-500-float64", "--only", "sinusoid-8", "--only", "omniglot-8")

    sides = {row["side"] for row in rows}
    for peer in ("hypergrad", "by hand", "torchopt", "higher"):
        assert any(side.startswith(peer) for side in sides), peer
    for row in rows:
        assert 0 < row["figure"]["low"] <= row["figure"]["median"] <= row["figure"]["high"]
        if not row["side"].startswith("one product"):
            assert row["error"] is not None
    # On so small a problem twenty steps solve the system, by whoever makes them.
    errors = {r["side"]: r["error"] for r in rows if r["benchmark"] == "logistic-500-float64"}
    for side in ("hypergrad", "by hand, autograd", "by hand, closed-form products", "torchopt, CG"):
        assert errors[side] < 1e-3, side
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    for row in rows:
        judged = "" if row["benchmark"].startswith("logistic") else "2 tasks, float64"
        assert row["judged"] == judged or row["error"] is None
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert sum(line.startswith("| hypergrad |") for line in lines) == 3
    assert sum(line.startswith(":::{dropdown}") for line in lines) == 3


def test_a_single_benchmark_is_run_again_and_the_others_kept(run, tmp_path):
    first = run("--only", "import", "--only", "memory")
    again = run("--only", "import")

    assert [row["benchmark"] for row in again] == [row["benchmark"] for row in first]
    assert [r for r in again if r["benchmark"] == "memory"] == [
        r for r in first if r["benchmark"] == "memory"
    ]


def test_an_unknown_benchmark_is_refused(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--only", "nothing")
    assert "logistic-500-float32" in capsys.readouterr().err


def test_the_estimators_are_measured_against_the_exact_hypergradient(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    from benchmarks.estimators import main

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    main(["--quick", "--out", str(tmp_path)])

    table = capsys.readouterr().out
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    errors = {row[0][2:]: float(row[2]) for row in rows if row[0] != "| ---"}
    assert {"implicit, CG", "unrolled", "evolution strategies"} < set(errors)
    assert 0.1 < errors["T1-T2"] < 1
    assert errors["finite difference"] == errors["T1-T2"]  # up to the rounding of the table
    assert (tmp_path / "estimators.png").read_bytes().startswith(b"\x89PNG")
