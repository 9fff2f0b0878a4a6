"""The reproduction: a list of runs that is carried out, broken off and gone on with; the report."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from rich.console import Console
from scipy import stats

from reproduction.method.evaluations import evaluations_a_task, expected_products
from reproduction.method.systems import METHODS, SYSTEMS
from reproduction.report import __main__ as reproduce
from reproduction.report.earlier import read_earlier, together
from reproduction.report.first_pictures import draw_accuracies, draw_learning
from reproduction.report.plan import (
    SINUSOID_EVALUATIONS,
    SINUSOID_PRODUCTS,
    SINUSOID_SHOTS,
    TRUNCATE,
    Planned,
    plan,
    sinusoid_steps,
)
from reproduction.report.records import Measured, Record, read_records
from reproduction.report.report import write_report
from reproduction.report.runner import Runner, read_state, state_of
from reproduction.report.spread import paired, spread
from reproduction.runs.resume import Refused
from reproduction.runs.sinusoid import RECIPES, read_command_line

TINY = (
    "--method", "maml", "--compare", "--tasks-per-step", "2", "--test-tasks", "3",
    "--validate-every", "20",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("OMNIGLOT_DIR", raising=False)


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path / "runs", {}, jobs=1, budget=None, console=Console(quiet=True))


def tiny(name, *further, processes=1):
    return Planned(f"sinusoid/equal-time/{name}", "sinusoid", (*TINY, *further), 1, processes)


# The list


def test_each_run_has_a_name_of_its_own_and_a_command_line_that_is_understood():
    runs = plan()

    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        if run.program == "sinusoid":
            settings = read_command_line(list(run.arguments))
            assert settings.compare == ()
            assert f"{settings.method}-seed{settings.seed}" == run.name.rpartition("/")[2]


@pytest.mark.parametrize("method", METHODS)
def test_equal_evaluations_are_equal_to_one_meta_step(method):
    a_task = evaluations_a_task(
        RECIPES[method], SYSTEMS[method], outputs=SINUSOID_SHOTS, truncate=TRUNCATE,
        products=expected_products(SYSTEMS[method], SINUSOID_PRODUCTS),
    )  # fmt: skip
    a_step = RECIPES[method].tasks_per_step * a_task
    taken = a_step * sinusoid_steps(method, SINUSOID_EVALUATIONS)

    assert abs(taken - SINUSOID_EVALUATIONS) <= a_step / 2


def test_the_list_takes_what_the_program_takes_by_itself():
    settings = read_command_line([])

    assert settings.shots == SINUSOID_SHOTS
    assert settings.recipes["imaml"].cg_steps == SINUSOID_PRODUCTS
    assert settings.truncate == TRUNCATE


# Carrying it out


def test_smoke_run_writes_tables_and_pictures_and_is_done_once(tmp_path, capsys):
    folders = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]

    def run(only):
        reproduce.main(["--smoke", "--jobs", "2", "--only", only, *folders])

    run("omniglot/5-way-1-shot/20-minutes/maml")
    run("sinusoid/equal-time/fomaml-seed0")

    assert capsys.readouterr().out.count("beginning") == 2
    results = tmp_path / "results"
    text = (results / "README.md").read_text()
    for part in ("2 are finished", "| `fomaml` | 1 |", "| `maml` | 0 |", "98.7 ± 0.4", "torch",
                 "<summary>5-way 1-shot</summary>", "not run yet"):  # fmt: skip
        assert part in text
    assert os.uname().nodename not in text
    for name in ("sinusoids.png", "accuracies.png", "learning.png"):
        assert f"({name})" in text
        assert (results / name).read_bytes().startswith(b"\x89PNG")
    written = json.loads((results / "results.json").read_text())
    assert [run["method"] for run in written["runs"]] == ["fomaml", "maml"]
    assert len(written["not_begun"]) == len(plan()) - 2

    run("sinusoid/equal-time/fomaml-seed0")
    assert "beginning" not in capsys.readouterr().out
    assert (results / "README.md").read_text() == text


@pytest.fixture
def interruptible():
    """Take Ctrl-C, which a test run in the background of a shell was started to ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_broken_off_is_gone_on_with_to_the_same_end(runner, tmp_path, processes):
    run = tiny("run", "--meta-steps", "150", processes=processes)
    checkpoints = runner.out / run.name / "checkpoints"

    def interrupt():
        while not any(checkpoints.glob("*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        runner.carry_out([run])
    assert state_of(runner.out, run) == "broken off"
    assert read_state(runner.out / run.name)["message"] == ""
    (record,) = read_records(runner.out, [run])
    assert 0 < record.meta_steps < 150
    assert record.figures == {}

    runner.carry_out([run])
    assert state_of(runner.out, run) == "finished"
    whole = Runner(tmp_path / "whole", {}, 1, None, Console(quiet=True))
    whole.carry_out([run])
    first, second = ((r.out / run.name / "metrics.jsonl").read_bytes() for r in (runner, whole))
    assert first == second
    assert json.loads((runner.out / run.name / "config.json").read_text())["processes"] == processes


def test_two_calls_on_one_folder_are_never_at_one_run(tmp_path):
    run = tiny("run", "--meta-steps", "60")
    consoles = [Console(record=True, file=io.StringIO(), width=200) for _ in range(2)]
    runners = [Runner(tmp_path, {}, 1, None, console) for console in consoles]
    first = threading.Thread(target=runners[0].carry_out, args=([run],))
    first.start()
    while not (tmp_path / run.name / "run.json").exists():
        time.sleep(0.01)
    runners[1].carry_out([run])
    first.join()

    assert state_of(tmp_path, run) == "finished"
    runners[1].carry_out([run])  # which is done, and the lock is open
    said = consoles[1].export_text().splitlines()
    assert said == [f"another call is at {run.name}"]


def test_when_the_time_is_over_nothing_new_begins(tmp_path):
    runs = [tiny(f"run{k}", "--meta-steps", "100000") for k in range(3)]
    # So early that the programs are still being loaded, and may miss the first request.
    runner = Runner(tmp_path, {}, jobs=2, budget=0.5, console=Console(quiet=True), patience=5.0)
    runner.carry_out(runs)

    assert [state_of(tmp_path, run) for run in runs] == ["broken off", "broken off", "to do"]


def test_a_run_waits_for_the_one_whose_files_it_reads(tmp_path):
    first, free = (tiny(name, "--meta-steps", "40") for name in ("first", "free"))
    second = replace(tiny("second", "--meta-steps", "2"), after=first.name)
    console = Console(record=True, file=io.StringIO(), width=200)
    Runner(tmp_path, {}, jobs=2, budget=None, console=console).carry_out([first, second, free])

    said = [line.rpartition("/")[2] for line in console.export_text().splitlines()]
    assert said[:2] == ["first", "free"]  # begun
    assert said.index("second") > 1
    assert [state_of(tmp_path, run) for run in (first, second, free)] == ["finished"] * 3


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_has_room_for_its_processes_or_is_carried_out_alone(tmp_path, jobs):
    runs = [tiny(f"run{k}", "--meta-steps", "100000", processes=k) for k in (2, 1)]
    runner = Runner(tmp_path, {}, jobs, budget=0.5, console=Console(quiet=True), patience=5.0)
    runner.carry_out(runs)

    assert [state_of(tmp_path, run) for run in runs] == ["broken off", "to do"]


def test_a_training_that_fails_is_a_result_and_is_not_tried_again(runner, tmp_path):
    run = tiny("run", "--inner-lr", "1e30", "--meta-steps", "3")
    runner.carry_out([run])
    assert "was not finite" in read_state(runner.out / run.name)["message"]
    before = (runner.out / run.name / "output.txt").read_bytes()
    runner.carry_out([run])

    assert (runner.out / run.name / "output.txt").read_bytes() == before
    write_report(read_records(runner.out, [run]), [], [run], tmp_path / "results")
    assert (
        "no figure; maml: a meta-gradient was not finite"
        in (tmp_path / "results" / "README.md").read_text()
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_that_fails_is_told_from_one_that_is_broken_off(runner, processes):
    run = tiny("run", "--smoke", "--inner-lr", "1e30", processes=processes)
    runner.carry_out([run])

    assert state_of(runner.out, run) == "failed"
    assert read_state(runner.out / run.name)["message"].startswith("maml: a meta-gradient was not")
    assert runner.troubled == [run.name]


def run_of_seconds(tmp_path, *flags):
    only = ["--only", "sinusoid/equal-time/fomaml-seed0", "--jobs", "1"]
    folders = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    reproduce.main([*only, *folders, *flags])


def test_runs_of_seconds_are_never_taken_for_real_ones(tmp_path):
    run_of_seconds(tmp_path, "--smoke")

    assert "no figure on this page means anything" in (tmp_path / "results/README.md").read_text()
    with pytest.raises(Refused, match="with other arguments"):
        run_of_seconds(tmp_path, "--list")
    with pytest.raises(Refused, match=r"runs of seconds \(--smoke\): choose another --results"):
        run_of_seconds(tmp_path, "--report")
    written = (tmp_path / "results" / "results.json").read_bytes()
    with pytest.raises(Refused, match="with other arguments"):
        reproduce.main(["--report", "--out", str(tmp_path / "runs"),
                        "--results", str(tmp_path / "others")])  # fmt: skip
    assert (tmp_path / "results" / "results.json").read_bytes() == written


def test_a_report_of_real_runs_is_not_replaced_by_one_of_seconds(tmp_path):
    report(tmp_path / "results", [record("imaml", 0, 0.1)])
    written = (tmp_path / "results" / "results.json").read_bytes()

    with pytest.raises(Refused, match="is the report of real runs"):
        run_of_seconds(tmp_path, "--smoke")
    assert (tmp_path / "results" / "results.json").read_bytes() == written


@pytest.mark.parametrize(
    "content", ["", '{"runs": [{"na', '{"runs": [{"colour": "red"}]}', '{"runs": [3]}', "[]"]
)
def test_an_earlier_report_that_cannot_be_read_is_refused_and_kept(tmp_path, content):
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "results.json"
    path.write_text(content)

    with pytest.raises(Refused, match="cannot be read"):
        run_of_seconds(tmp_path, "--report")
    assert path.read_text() == content


def test_an_earlier_record_without_its_hardware_is_shown(tmp_path):
    text = report(tmp_path, [record("imaml", 0, 0.1, hardware={}, versions={})])

    assert "unknown, unknown cores; unknown, Python unknown, torch unknown" in text


def test_what_ends_badly_is_said_in_the_end(tmp_path):
    blocked = tmp_path / "runs" / "sinusoid/equal-time/fomaml-seed0"
    blocked.mkdir(parents=True)
    (blocked / "checkpoints").write_text("a file where a folder should be")

    with pytest.raises(
        reproduce.RunsFailed, match="1 runs ended badly: sinusoid/equal-time/fomaml"
    ):
        run_of_seconds(tmp_path, "--smoke")


def test_sigterm_breaks_runs_off_at_a_checkpoint(tmp_path):
    program = subprocess.Popen(
        [sys.executable, "-m", "reproduction.report", "--only",
         "sinusoid/equal-time/maml-seed0", "--jobs", "1", "--out", str(tmp_path / "runs"),
         "--results", str(tmp_path / "results")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    folder = tmp_path / "runs" / "sinusoid/equal-time/maml-seed0"
    try:
        end = time.monotonic() + 120
        while not list(folder.glob("checkpoints/*")) and time.monotonic() < end:
            time.sleep(0.05)
        program.send_signal(signal.SIGTERM)
        said, _ = program.communicate(timeout=60)
    finally:
        program.kill()

    assert program.returncode == 130
    assert "broken off: sinusoid/equal-time/maml-seed0\n" in said
    assert (tmp_path / "results" / "README.md").exists()


def test_a_folder_with_other_arguments_is_refused(runner):
    runner.note(tiny("run"), "finished")

    with pytest.raises(Refused, match="other arguments"):
        runner.carry_out([tiny("run", "--meta-steps", "3")])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--only", "no-such-run"], "--list"),
        (["--budget", "-3"], "a finite number above 0"),
        (["--jobs", "0"], "a whole number of at least 1"),
        (["--results", __file__], "folder"),
        (["--rep"], "--rep"),
    ],
)
def test_wrong_arguments_of_reproduce_exit_with_2_and_one_line(capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(flags)

    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert said in message


# The report


def record(method, seed, error, table="sinusoid/equal-time", **changed):
    values = {
        "name": f"{table}/{method}-seed{seed}", "table": table, "method": method,
        "state": "finished", "message": "", "seed": seed, "ways": None, "shots": 10,
        "recipe": dict(vars(RECIPES[method])), "meta_steps": 100, "tasks": 2500,
        "seconds": 20.0, "evaluations": 27_500.0, "clock": "processor",
        "figures": {"before": (4.0, 0.2), "after": (error, 0.01)},
        "curve": [(10.0, 50, 0.5), (20.0, 100, error)], "products": None,
        "negative_curvature": None, "linear_residual": None,
        "versions": {"torch": "2.13.0", "hypergrad": "0.1.0"},
        "hardware": {
            "processor": "A Processor", "cores": 2, "gpus": [], "system": "Linux", "python": "3.11",
        },
    }  # fmt: skip
    return Record(**{**values, **changed})


def report(tmp_path, records):
    tmp_path.mkdir(exist_ok=True)
    write_report(records, [], plan(), tmp_path)
    return (tmp_path / "README.md").read_text()


def test_systems_are_compared_seed_by_seed(tmp_path):
    reference = [0.10, 0.12, 0.09, 0.11, 0.08]
    worse = [e + d for e, d in zip(reference, (0.10, 0.11, 0.09, 0.10, 0.12), strict=True)]
    level = [e + d for e, d in zip(reference, (0.10, -0.11, 0.02, 0.05, -0.05), strict=True)]
    text = report(
        tmp_path,
        [
            record(method, seed, error)
            for method, errors in (("imaml", reference), ("maml", worse), ("fomaml", level))
            for seed, error in enumerate(errors)
        ],
    )

    assert "| 0.100 ± 0.016 | 0.100, 0.120, 0.090, 0.110, 0.080 | - | - |" in text
    maml = next(x for x in text.splitlines() if x.startswith("| `maml` | 5"))
    fomaml = next(x for x in text.splitlines() if x.startswith("| `fomaml` | 5"))
    assert "+0.104 ± 0.014 | worse |" in maml
    assert "| no |" in fomaml


def test_on_the_way_systems_are_compared_at_evaluations_that_all_have_made(tmp_path):
    few = record("maml", 0, 0.2, evaluations=10_000.0, curve=[(10.0, 50, 0.6), (20.0, 100, 0.2)])
    many = record(
        "imaml", 0, 0.1, evaluations=20_000.0,
        curve=[(5.0, 25, 0.9), (10.0, 50, 0.8), (20.0, 100, 0.1)],
    )  # fmt: skip
    text = report(tmp_path, [few, many])

    assert "at 10 k evaluations |" in text
    lines = [line for line in text.splitlines() if line.startswith("| `") and "| 1 |" in line]
    assert {line.split("`")[1]: line.split("| ")[-1] for line in lines} == {
        "imaml": "0.800 |", "maml": "0.200 |",
    }  # fmt: skip


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_are_no_ranking(tmp_path, seeds):
    text = report(
        tmp_path,
        [
            record(method, seed, error)
            for method, error in (("imaml", 0.1), ("maml", 9.0))
            for seed in range(seeds)
        ],
    )

    assert "| +8.900 | no: too few seeds |" in text


def test_what_is_broken_off_says_after_how_long_and_takes_no_part_in_means(tmp_path):
    text = report(
        tmp_path,
        [
            record("imaml", 0, 0.1),
            record("imaml", 1, 0.7, state="broken off", figures={}, seconds=90.0),
        ],
    )

    assert "`imaml`, seed 1: broken off after 1.5 minutes of meta-steps (100)" in text
    assert "| `imaml` | 1 |" in text


def test_accuracies_stand_beside_the_published_ones(tmp_path):
    maml = record(
        "maml", 0, 0.0, table="omniglot/5-way-1-shot/20-minutes", ways=5, shots=1,
        seconds=1200.0, curve=[(600.0, 50, 0.5), (1200.0, 100, 0.93)],
        figures={"together": (0.94, 0.004), "one at a time": (0.92, 0.005)},
    )  # fmt: skip
    long = replace(maml, table="omniglot/5-way-1-shot/40-minutes-on-2-cores", seconds=2400.0)
    text = report(tmp_path, [maml, replace(long, method="imaml", processes=2)])

    assert "**Omniglot, 5-way 1-shot, 20 minutes each.**" in text
    assert "**Omniglot, 5-way 1-shot, 40 minutes on 2 cores.**" in text
    assert "| iMAML, Gauss-Newton, here | 94.00 ± 0.40 (40 min on 2 cores) | - | - | - |" in text
    assert "20.0 | 93.0 | 94.00 ± 0.40 | 92.00 ± 0.50 | 98.7 ± 0.4 |" in text
    assert "| MAML, GD, here | 94.00 ± 0.40 (20 min) | - | - | - |" in text


def of_characters(method, seed, accuracy, minutes, setting=(5, 1), **changed):
    ways, shots = setting
    return record(
        method, seed, 0.0, table=f"omniglot/{ways}-way-{shots}-shot/{minutes}-minutes", ways=ways,
        shots=shots, seconds=60.0 * minutes,
        curve=[(30.0, 50, 0.5), (60.0 * minutes, 99, accuracy)],
        figures={"together": (accuracy, 0.004), "one at a time": (0.5, 0.005)}, **changed,
    )  # fmt: skip


def test_the_page_begins_with_four_settings_and_four_systems(tmp_path):
    heads = [of_characters("imaml-head", seed, 0.98 + 0.001 * seed, 25) for seed in range(5)]
    text = report(
        tmp_path,
        [
            *heads,
            of_characters("imaml-head", 0, 0.991, 240),
            of_characters("imaml", 0, 0.90, 5),
            of_characters("imaml", 0, 0.93, 20),
            of_characters("imaml", 0, 0.95, 60),
            of_characters("maml", 0, 0.7, 25, state="broken off", message=""),
            of_characters("maml", 0, 0.85, 20, setting=(20, 1)),
            of_characters("imaml-hf", 0, 0.99, 25),  # not a column
        ],
    )

    rows = [line for line in text.splitlines() if line.startswith("| ")]
    head, _, first, published, *_ = rows
    names = ["setting", "", "iMAML, last layer", "iMAML, whole network", "MAML", "first-order MAML"]
    cells = lambda row: [cell.strip() for cell in row.strip("|").split("|")]
    assert cells(head) == names
    assert cells(first) == [
        "5-way 1-shot", "here",
        "98.2, from 98.0 to 98.4 (25 min, 5 seeds); 99.1 ± 0.4 (240 min)",
        "93.0 ± 0.4 (20 min); 95.0 ± 0.4 (60 min)", "not run yet", "not run yet",
    ]  # fmt: skip
    assert cells(published) == [
        "", "published", "-", "99.16 ± 0.35 by gradient descent; 99.5 ± 0.26 Hessian-free",
        "98.7 ± 0.4", "98.3 ± 0.5",
    ]  # fmt: skip
    twenty = next(row for row in rows if row.startswith("| 20-way 1-shot | here"))
    assert cells(twenty)[2:] == ["not run yet", "not run yet", "85.0 ± 0.4 (20 min)", "not run yet"]
    assert len([row for row in rows if "| here |" in row]) == 4


def test_a_new_run_is_on_the_page_when_it_is_written_again(tmp_path):
    first = report(tmp_path, [of_characters("imaml", 0, 0.93, 20)])
    again = report(
        tmp_path, [of_characters("imaml", 0, 0.93, 20), of_characters("imaml-head", 0, 0.98, 25)]
    )

    assert "98.0 ± 0.4 (25 min)" not in first
    assert "98.0 ± 0.4 (25 min)" in again


def test_the_first_pictures_have_units_chance_and_budgets():
    records = [of_characters("imaml-head", seed, 0.98, 25) for seed in range(2)]
    records += [of_characters("maml", 0, 0.9, 20, setting=(20, 1))]
    accuracies, learning = draw_accuracies(records), draw_learning(records)

    titles = [axes.get_title() for axes in accuracies.axes]
    assert titles[0] == "5-way 1-shot (chance: 20%)"
    assert {text.get_text() for text in accuracies.axes[0].texts} == {"25 min"}
    assert {text.get_text() for text in accuracies.axes[2].texts} == {"20 min"}
    assert accuracies.axes[0].get_ylabel().endswith("%")
    left, right = learning.axes
    assert [line.get_label() for line in right.lines] == ["MAML, 20 min", "chance"]
    assert right.lines[-1].get_ydata()[0] == 5
    assert len(left.lines) == 3  # two seeds, and chance
    assert left.get_xlabel().startswith("minutes")
    assert left.get_ylabel().endswith("%")


def test_every_part_that_is_folded_ends(tmp_path):
    text = report(tmp_path, [record("imaml", 0, 0.1), of_characters("maml", 0, 0.9, 20)])

    opened = 0
    for line in text.splitlines():
        opened += (line == "<details>") - (line == "</details>")
        assert opened in {0, 1}
        assert not (opened and line.startswith("#"))  # a heading would end the part
    assert opened == 0


def test_what_people_say_is_put_below_the_table(tmp_path):
    (tmp_path / "comments").mkdir()
    (tmp_path / "comments" / "sinusoid-equal-time.md").write_text("Found by hand.\n")

    assert "Found by hand." in report(tmp_path, [record("imaml", 0, 0.1)])


def test_a_report_keeps_what_an_earlier_one_says_on_runs_that_are_not_here(tmp_path):
    curve = tmp_path / "elsewhere" / "inner_steps.png"
    curve.parent.mkdir()
    curve.write_bytes(b"a picture")
    steps = Measured("inner-steps/sinusoid", "Steps", "| a | table |", curve, [{"steps": 1}], {})
    earlier = [
        record("imaml", 0, 0.1),
        record("maml", 0, 0.2),
        record("imaml", 1, 0.3, state="broken off", figures={}),
        record("imaml", 9, 0.4),  # declared no more
    ]
    results = tmp_path / "results"
    write_report(earlier, [steps], plan(), results)
    curve.unlink()
    here = [
        record("maml", 0, 0.2, state="broken off", figures={}),
        record("imaml", 1, 0.5),
        record("imaml", 2, 0.6),
    ]
    records, measured = read_earlier(results)
    records, measured = together(here, records, plan()), together([], measured, plan())

    assert [(r.name[-11:], r.state, r.figures.get("after", (0,))[0]) for r in records] == [
        ("imaml-seed0", "finished", 0.1), ("/maml-seed0", "finished", 0.2),
        ("imaml-seed1", "finished", 0.5), ("imaml-seed2", "finished", 0.6),
    ]  # fmt: skip
    assert records[0] == earlier[0]
    write_report(records, measured, plan(), results)
    assert "| a | table |" in (results / "README.md").read_text()
    assert (results / "inner_steps.png").read_bytes() == b"a picture"


def test_nothing_has_run(tmp_path):
    assert "Nothing has run yet." in report(tmp_path, [])


def test_intervals_are_student_s():
    one, other = {0: 0.3, 1: 0.5, 2: 0.2, 3: 0.9}, {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4, 7: 9.0}
    found = paired(one, other)

    expected = stats.ttest_rel([one[k] for k in range(4)], [other[k] for k in range(4)])
    low, high = expected.confidence_interval(0.95)
    assert found.mean - found.interval == pytest.approx(low, abs=1e-3)
    assert found.mean + found.interval == pytest.approx(high, abs=1e-3)
    assert found.count == 4
    assert math.isnan(spread([1.0]).interval)
    assert not spread([1.0]).is_apart_from_zero
