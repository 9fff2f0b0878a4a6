"""Every system of the comparison, from the command line, on both problems."""

import builtins
import json
import math

import pytest

from reproduction.method.systems import METHODS, SYSTEMS
from reproduction.runs import omniglot, sinusoid
from reproduction.runs.training import TrainingFailed


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("OMNIGLOT_DIR", raising=False)


SINUSOIDS = ("--tasks-per-step", "3", "--meta-steps", "2")
OMNIGLOT = (
    "--ways", "2", "--queries", "1", "--channels", "3", "--test-tasks", "2",
    "--tasks-per-step", "2", "--meta-steps", "2", "--inner-steps", "2", "--truncate", "1",
)  # fmt: skip
PROGRAMS = {
    "sinusoid": (sinusoid.main, SINUSOIDS),
    "omniglot": (omniglot.main, OMNIGLOT),
    "cropped": (omniglot.main, (*OMNIGLOT, "--pipeline", "cropped")),
}


@pytest.fixture
def smoke(tmp_path):
    def run(program, *flags):
        main, small = PROGRAMS[program]
        main(["--smoke", "--out", str(tmp_path), *small, "--compare", *flags])
        return json.loads((tmp_path / "results.json").read_text())

    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("program", ["sinusoid", "omniglot"])
def test_every_system_trains_on_both_problems(smoke, program, method):
    results = smoke(program, "--method", method)

    assert list(results) == [method]
    assert all(math.isfinite(mean) for mean, _ in results[method]["figures"].values())
    assert (results[method]["products"] is not None) == method.startswith("imaml")


def test_all_systems_are_compared_in_one_run(smoke, capsys):
    results = smoke("cropped", "--compare", "all")

    assert set(results) == set(METHODS)
    shown = capsys.readouterr().out
    assert all(system.name.split(",")[0] in shown for system in SYSTEMS.values())


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (("--inner-solver", "nesterov"), {"inner_solver": "nesterov"}),
        (("--inner-solver", "hessian-free"), {"inner_solver": "hessian-free"}),
        (("--linear-solver", "neumann"), {"linear_solver": "neumann"}),
        (("--linear-solver", "minres"), {"linear_solver": "minres"}),
        (("--linear-solver", "identity"), {"linear_solver": "identity"}),
        (("--curvature", "hessian"), {"curvature": "hessian"}),
        (("--differentiation", "first-order"), {"differentiation": "first-order"}),
        (
            ("--differentiation", "truncated", "--inner-solver", "nesterov", "--truncate", "1"),
            {"differentiation": "truncated", "inner_solver": "nesterov"},
        ),
        (
            ("--no-proximal", "--inner-solver", "gradient-descent"),
            {"proximal": False, "inner_solver": "gradient-descent"},
        ),
    ],
)
def test_one_word_changes_one_choice(smoke, tmp_path, flags, changed):
    smoke("sinusoid", *flags)

    config = json.loads((tmp_path / "config.json").read_text())
    chosen = {**config["recipes"]["imaml"], **config["systems"]["imaml"]}
    usual = sinusoid.read_command_line(["--tasks-per-step", "3"])
    before = {**vars(usual.recipes["imaml"]), **vars(usual.systems["imaml"])}
    assert chosen == {**before, **changed}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "maml", "--inner-solver", "hessian-free", "--proximal"], "through"),
        (["--method", "maml", "--inner-solver", "torchopt-rmsprop"], "torchopt-adam"),
        (["--method", "truncated", "--no-proximal"], "--differentiation unrolled"),
        (["--method", "imaml", "--no-proximal"], "--proximal"),
        (["--linear-solver", "lu"], "neumann"),
    ],
)
def test_choices_that_do_not_go_together_are_one_line(capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        sinusoid.read_command_line(flags)

    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert said in message


def test_without_torchopt_its_flag_says_so(monkeypatch, capsys):
    actual = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "torchopt":
            raise ImportError(name)
        return actual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(SystemExit):
        sinusoid.read_command_line(["--inner-solver", "torchopt-adam"])

    assert "torchopt is not installed" in capsys.readouterr().err


def test_a_comparison_goes_on_where_one_training_fails(smoke, capsys):
    results = smoke("sinusoid", "--inner-lr", "1e30", "--compare", "maml", "fomaml")

    assert list(results) == ["imaml", "fomaml"]  # neither of them takes gradient steps
    assert "left out: maml: a meta-gradient was not finite" in capsys.readouterr().out


def test_where_the_chosen_training_fails_the_program_does(smoke):
    with pytest.raises(TrainingFailed, match="maml"):
        smoke("sinusoid", "--method", "maml", "--inner-lr", "1e30")
