"""The program that counts negative curvature, run as a user runs it."""

import json
import math

import pytest

from reproduction.studies.curvature import main


def run(folder, *flags):
    main(["--smoke", "--out", str(folder), *flags])
    return folder


def test_a_smoke_run_of_curvature_ends_with_table_picture_and_records(tmp_path, capsys):
    folder = run(tmp_path / "run")

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {r["step"] for r in records} == {0, 4}
    assert len(records) == 4 * 2 * 16  # trainings, points, and inner solver x lambda x matrix
    definite = [r for r in records if r["curvature"] == "gauss-newton"]
    assert all(r["negative_curvature"] == 0 and r["linear_residual"] < 1e-2 for r in definite)
    start = [r for r in records if r["curvature"] == "hessian" and r["step"] == 0]
    assert all(r["negative_curvature"] > 0.3 for r in start)
    assert (folder / "curvature.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "curvature.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert text.count("| hessian |") == text.count("| gauss-newton |") == 2
    results = json.loads((folder / "results.json").read_text())
    assert len(results) == 4
    assert all(math.isfinite(result["error"]) for result in results.values())


def test_the_same_seed_of_curvature_gives_the_same_metrics(tmp_path):
    first, again = (run(tmp_path / name, "--seed", "1") for name in ("first", "again"))

    for name in ("metrics.jsonl", "results.json", "curvature.md"):
        assert (first / name).read_bytes() == (again / name).read_bytes()


def test_curvature_refuses_an_output_folder_that_is_a_file(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--smoke", "--out", __file__])

    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
