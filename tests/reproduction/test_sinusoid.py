"""The sinusoid program, run as a user runs it."""

import json
import math

import pytest
import torch

from reproduction.method.sinusoid_tasks import SinusoidTasks
from reproduction.runs.sinusoid import main


@pytest.fixture
def smoke(tmp_path):
    def run(*flags, folder="run"):
        main(["--smoke", "--out", str(tmp_path / folder), *flags])
        return tmp_path / folder

    return run


def test_a_smoke_run_of_sinusoid_ends_with_table_picture_and_files(smoke, capsys):
    folder = smoke()

    shown = capsys.readouterr().out
    for text in ("Mean squared error on 20 unseen sinusoids", "iMAML", "first-order", "±"):
        assert text in shown
    assert (folder / "sinusoid.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text())["method"] == "imaml"
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == ["imaml", "fomaml", "maml"]
    for result in results.values():
        assert all(math.isfinite(mean) for mean, _ in result["figures"].values())
    parameters = torch.load(folder / "parameters.pt", weights_only=True)
    assert sum(leaf.numel() for leaf in parameters.values()) == 1761


def test_two_test_tasks_are_enough_for_the_picture(tmp_path):
    main(["--smoke", "--compare", "--test-tasks", "2", "--out", str(tmp_path)])

    assert (tmp_path / "sinusoid.png").exists()


def test_implicit_solve_takes_at_least_five_products(smoke):
    folder = smoke("--compare")

    assert json.loads((folder / "results.json").read_text())["imaml"]["products"] >= 5


def test_the_same_seed_of_sinusoid_gives_the_same_metrics(smoke):
    first = smoke("--compare", "--seed", "1", folder="first")
    again = smoke("--compare", "--seed", "1", folder="again")
    other = smoke("--compare", "--seed", "2", folder="other")

    metrics = (first / "metrics.jsonl").read_bytes()
    assert metrics == (again / "metrics.jsonl").read_bytes()
    assert metrics != (other / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "maml"),
        ("--method", "fomaml"),
        ("--curvature", "hessian", "--damping", "1.0"),
        ("--inner-solver", "gradient-descent", "--inner-steps", "2", "--clip", "1"),
        ("--time-budget", "0.01"),
    ],
)
def test_other_ways_to_run_it(smoke, flags):
    folder = smoke("--compare", *flags)

    assert (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        (["--method", "anil"], "fomaml"),
        (["--inner-steps", "0"], "a whole number of at least 1"),
        (["--lam", "-1"], "a finite number above 0"),
        (["--lam", "nan"], "a finite number above 0"),
        (["--damping", "x"], "a finite number of at least 0"),
        (["--device", "tpu"], "cpu"),
        (["--method", "maml", "--inner-solver", "gauss-newton"], "gradient-descent"),
        (["--meta-step", "3"], "--meta-step"),
        (["--out", __file__], "folder"),
    ],
)
def test_wrong_arguments_of_sinusoid_exit_with_2_and_one_line(capsys, flags, allowed):
    with pytest.raises(SystemExit) as stop:
        main(flags)

    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert allowed in message


def test_tasks_are_sinusoids_of_finn_et_al():
    tasks = SinusoidTasks(shots=10, queries=7)
    episodes = tasks.sample(500, torch.Generator().manual_seed(0))

    assert episodes.support_x.shape == (500, 10, 1)
    assert episodes.query_y.shape == (500, 7, 1)
    assert episodes.support_x.abs().max() <= 5
    # y = a sin(x - p) = a cos(p) sin(x) - a sin(p) cos(x), a plane in (sin x, cos x).
    x = torch.cat([episodes.support_x, episodes.query_x], 1)
    y = torch.cat([episodes.support_y, episodes.query_y], 1)
    design = torch.cat([x.sin(), -x.cos()], -1).double()
    found = torch.linalg.lstsq(design, y.double()).solution
    torch.testing.assert_close(design @ found, y.double(), rtol=0, atol=1e-5)
    amplitude, phase = found.norm(dim=(1, 2)), torch.atan2(found[:, 1, 0], found[:, 0, 0])
    assert 0.1 - 1e-4 <= amplitude.min() <= amplitude.max() <= 5 + 1e-4
    assert -1e-3 <= phase.min() <= phase.max() <= math.pi + 1e-3


def test_test_tasks_are_judged_at_even_points():
    generator = torch.Generator().manual_seed(0)
    episodes = SinusoidTasks(shots=10, queries=7).sample_for_test(3, generator, 100)

    assert torch.equal(episodes.query_x[1, :, 0], torch.linspace(-5, 5, 100))
