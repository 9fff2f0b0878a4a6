"""RELIABILITY.md, rows 35 to 42, in its order: what happens to the files of a program."""

import errno
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import hypergrad
from reproduction.omniglot.archive import OmniglotError, read_npz, read_zip
from reproduction.runs import omniglot, run_folder, sinusoid
from reproduction.runs.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from reproduction.runs.checkpoint_series import CheckpointSeries
from reproduction.runs.command_line import finish
from reproduction.runs.run_folder import RunFolder, WriteFailed

ROOT = Path(__file__).parents[2]
TINY = (
    "--method", "imaml", "--inner-solver", "gradient-descent", "--inner-steps", "1",
    "--cg-steps", "2", "--queries", "2", "--tasks-per-step", "2", "--test-tasks", "2",
    "--meta-steps", "6", "--validate-every", "3",
)  # fmt: skip


@pytest.fixture(autouse=True)
def cheap_pictures(monkeypatch):
    monkeypatch.delenv("OMNIGLOT_DIR", raising=False)
    for program in (sinusoid, omniglot):
        monkeypatch.setattr(program, "draw", lambda *arguments: None)
        monkeypatch.setattr(program, "save_figure", lambda figure: lambda path: path.touch())


@pytest.fixture
def interrupt(monkeypatch):
    """Send Ctrl-C in the middle of a meta-step; count over the whole program."""

    def arm(step, program=sinusoid.SinusoidBenchmark):
        draw, seen = program.sample, []

        def sample(self, tasks, generator):
            seen.append(1)
            if len(seen) == step:
                os.kill(os.getpid(), signal.SIGINT)
            return draw(self, tasks, generator)

        monkeypatch.setattr(program, "sample", sample)

    return arm


def run(out, *flags, program=sinusoid):
    """Run a program as its command line does, and return its exit status."""
    with pytest.raises(SystemExit) as stop:
        finish(lambda: program.main(["--out", str(out), *TINY, "--compare", *flags]))
    return stop.value.code


def files(folder):
    return [path.name for path in CheckpointSeries(folder).find()]


def small(step):
    return Checkpoint({}, {"step": step}, {"weights": torch.full((3,), float(step))})


def assert_same_outcome(one, other):
    """Compare everything that a training leaves, bit for bit."""
    metrics = (one / "metrics.jsonl").read_bytes()
    assert metrics
    assert metrics == (other / "metrics.jsonl").read_bytes()
    best = [torch.load(f / "parameters.pt", weights_only=True) for f in (one, other)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    last = [CheckpointSeries(folder).read_newest()[0] for folder in (one, other)]
    assert last[0].tensors.keys() == last[1].tensors.keys()
    for name, tensor in last[0].tensors.items():
        assert torch.equal(tensor, last[1].tensors[name]), name


# 35: kill -9 at any moment of a checkpoint's writing

KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from reproduction.runs.checkpoint import Checkpoint
from reproduction.runs.checkpoint_series import CheckpointSeries

series = CheckpointSeries(Path(sys.argv[1]))

def write(step, numbers):
    tensors = {"weights": torch.full((numbers,), float(step))}
    series.write(step, Checkpoint({}, {"step": step}, tensors))

def look(wrong, least):
    found, complaints = series.read_newest()
    step = found.figures["step"]
    if complaints or step < least or not (found.tensors["weights"] == step).all():
        wrong.append([step, least, complaints])
    return step

def in_child(work):
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    return child

def at_moment(moment):
    # Ends this process before or after one of the system's calls that writing makes.
    seen = 0
    def count(frame, event, argument):
        nonlocal seen
        module = getattr(argument, "__module__", None)
        kind = type(getattr(argument, "__self__", None)).__name__
        seen += event != "call" and (module in ("posix", "io") or kind.startswith("Buffered"))
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(count)

write(1, 10)
write(2, 10)
wrong, step, moment, killed = [], 2, 0, True
while killed:
    moment += 1
    def work():
        at_moment(moment)
        write(step + 1, 10)
        sys.setprofile(None)
    killed = os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) != 0
    step = look(wrong, step)
    previous = series.find()[1]
    if not previous.name.endswith(f"{step - 1:09}.checkpoint"):
        wrong.append(str(previous))

draw, rounds = random.Random(0), 12
for _ in range(rounds):
    reader, writer = os.pipe()
    def work():
        for s in range(step + 1, step + 10**6):
            write(s, 10**6)
            os.write(writer, b".")
    child = in_child(work)
    time.sleep(draw.uniform(0, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(writer)
    done = 0
    while piece := os.read(reader, 1000):
        done += len(piece)
    os.close(reader)
    step = look(wrong, step + done)
write(step + 1, 10)
print(json.dumps({"moments": moment, "wrong": wrong, "left": os.listdir(series.path)}))
"""


def test_row_35_kill_9_at_any_moment_of_a_checkpoints_writing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip

    outcome = json.loads(done.stdout)
    assert outcome["wrong"] == []
    assert outcome["moments"] > 40
    # The last two are kept, and nothing that was half-written.
    assert len(outcome["left"]) == 2


def test_row_35_file_and_folder_are_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    seen = []
    sync, rename = os.fsync, Path.replace

    def note_sync(handle):
        seen.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        sync(handle)

    def note_rename(self, target):
        seen.append("rename")
        return rename(self, target)

    monkeypatch.setattr(run_folder.os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_rename)
    CheckpointSeries(tmp_path).write(1, small(1))

    assert seen == ["file", "rename", "folder"]


def test_row_35_the_last_two_are_kept(tmp_path):
    series = CheckpointSeries(tmp_path)
    for step in (3, 6, 9, 12):
        series.write(step, small(step))
    assert files(tmp_path) == ["step-000000012.checkpoint", "step-000000009.checkpoint"]

    # A training that goes on from 6 has given up 9 and 12.
    series.write(6, small(6))
    series.write(7, small(7))
    assert files(tmp_path) == ["step-000000007.checkpoint", "step-000000006.checkpoint"]


# 36: disk full, truncated, a flipped bit


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"), [(truncate, "is truncated: "), (flip, "is damaged, a bit flipped")]
)
def test_row_36_resume_falls_back_to_the_previous_good_one(tmp_path, capsys, damage, says):
    assert run(tmp_path / "whole") == run(tmp_path / "damaged") == 0
    newest = CheckpointSeries(tmp_path / "damaged").find()[0]
    damage(newest)
    capsys.readouterr()

    assert run(tmp_path / "damaged", "--resume", "auto") == 0

    shown = capsys.readouterr().out
    assert f"{newest} {says}" in shown
    assert "the one before it is used\ngoing on after 3 meta-steps" in shown
    assert_same_outcome(tmp_path / "whole", tmp_path / "damaged")


def test_row_36_no_good_one_left_is_an_error_and_not_a_new_beginning(tmp_path, capsys):
    assert run(tmp_path) == 0
    newest, older = CheckpointSeries(tmp_path).find()
    truncate(newest)
    flip(older)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    capsys.readouterr()

    assert run(tmp_path, "--resume", "auto") == 1

    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "6.checkpoint is truncated" in message
    assert "3.checkpoint is damaged" in message
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    # A file that is named is the one that is meant.
    assert run(tmp_path, "--resume", str(older)) == 1


def test_row_36_every_flipped_bit_and_every_length_is_seen():
    content = small(7).encode()
    assert Checkpoint.decode(content, "c").figures == {"step": 7}

    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << random.Random(place).randrange(8)
        with pytest.raises(CheckpointError, match=r"damaged|truncated|format"):
            Checkpoint.decode(bytes(damaged), "c")
        with pytest.raises(CheckpointError, match=r"truncated|first line is damaged"):
            Checkpoint.decode(content[:place], "c")
    with pytest.raises(CheckpointError, match=r"damaged: [\d,]+ bytes where"):
        Checkpoint.decode(content + b"\0", "c")


def test_row_36_a_full_disk_leaves_the_previous_one(tmp_path):
    series = CheckpointSeries(tmp_path)
    series.write(1, small(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = Checkpoint({}, {"step": 2}, {"weights": torch.zeros(10**5)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(WriteFailed, match="File too large; nothing was kept of it"):
            series.write(2, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert os.listdir(series.path) == ["step-000000001.checkpoint"]
    assert series.read_newest()[0].figures == {"step": 1}


def test_row_36_a_full_disk_ends_the_program_in_one_line(tmp_path, capsys, monkeypatch):
    sync = os.fsync

    def full(handle):
        if len(files(tmp_path)) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    with monkeypatch.context() as disk:
        disk.setattr(run_folder.os, "fsync", full)
        assert run(tmp_path) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "cannot be written: No space left on device; the one before it is as it was" in message

    assert run(tmp_path, "--resume", "auto") == 0


# 37: hostile checkpoint or archive


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def signed(body):
    """Return a checkpoint of any body, with a first line that fits it."""
    digest = hashlib.sha256(body).hexdigest()
    return f"imaml-checkpoint 1 {digest} {len(body)}\n".encode() + body


@pytest.mark.parametrize("sign", [bytes, signed], ids=["bare", "signed"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch", "zip"])
def test_row_37_no_checkpoint_executes_or_unpacks_anything(tmp_path, kind, sign):
    outside = tmp_path / "outside"
    buffer = io.BytesIO()
    if kind == "pickle":
        pickle.dump(Attack(outside), buffer)
    elif kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("../outside", b"")
    else:
        new = kind == "torch"
        torch.save({"a": Attack(outside)}, buffer, _use_new_zipfile_serialization=new)
    path = tmp_path / "run" / "hostile.checkpoint"
    path.parent.mkdir()
    path.write_bytes(sign(buffer.getvalue()))

    with pytest.raises(CheckpointError, match="no checkpoint of these programs"):
        read_checkpoint(path)
    assert run(path.parent, "--resume", str(path)) == 1

    assert not outside.exists()
    assert os.listdir(path.parent) == ["hostile.checkpoint"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"configuration": {}, "figures": {}, "tensors": [["w", "float32", [1000000000000]]]}\n',
        b'{"configuration": {}, "figures": {}, "tensors": [["w", "float32", [-1, -4]]]}\n0123',
        b'{"configuration": {}, "figures": {}, "tensors": [["w", "float32", [true]]]}\n0123',
        b'{"configuration": {}, "figures": {}, "tensors": [["w", "object", [1]]]}\n0123',
        b'{"configuration": {}, "figures": {}, "tensors": [["w"]]}\n',
        b'{"configuration": {}, "figures": {}, "tensors": []}\nleft over',
        b'{"configuration": [], "figures": 3, "tensors": {}}\n',
        b"[" * 10**6,
        b"1" * 10**5 + b"\n",
    ],
)
def test_row_37_absurd_contents_are_refused(body):
    with pytest.raises(CheckpointError, match="no checkpoint of these programs"):
        Checkpoint.decode(signed(body), "c")


def test_row_37_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_checkpoint(tmp_path / name)


def test_row_37_a_planted_link_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    series = CheckpointSeries(tmp_path)
    series.path.mkdir()
    (series.path / "step-000000001.checkpoint").symlink_to(victim)

    series.write(1, small(1))

    assert victim.read_text() == "untouched"
    assert series.read_newest()[0].figures == {"step": 1}


def test_row_37_a_training_of_another_network_is_refused(tmp_path, capsys):
    assert run(tmp_path) == 0
    checkpoint, _ = CheckpointSeries(tmp_path).read_newest()
    for name, change in {
        "params/0.weight": torch.zeros(3),
        "random/torch": torch.zeros(3, dtype=torch.uint8),
        "adam step/0.bias": torch.zeros(2, 2),
    }.items():
        tensors = {**checkpoint.tensors, name: change}
        CheckpointSeries(tmp_path).write(
            9, Checkpoint(checkpoint.configuration, checkpoint.figures, tensors)
        )
        capsys.readouterr()
        assert run(tmp_path, "--resume", "auto") == 1
        assert capsys.readouterr().err.startswith("the checkpoint ")


def test_row_37_an_archive_that_lies_about_its_sizes_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/character01/0001_01.png", bytes(50_000_000))
    honest = (50_000_000).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(honest, (500).to_bytes(4, "little")))
    tracemalloc.start()
    try:
        with pytest.raises(OmniglotError, match="not a sound zip archive"):
            read_zip(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_row_37_an_array_that_lies_about_its_shape_is_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|b1", "fortran_order": False, "shape": (10**9, 20, 105, 105)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())

    with pytest.raises(OmniglotError, match="cannot be read as"):
        read_npz(tmp_path / "a.npz")


# 38: resume


@pytest.mark.parametrize("method", ["imaml", "maml"])
def test_row_38_resuming_gives_the_same_bits(tmp_path, interrupt, method):
    assert run(tmp_path / "whole", "--method", method) == 0
    for step in (2, 3):  # between two validations; then, of the four left, at the end of one
        interrupt(step)
        resume = ["--resume", "auto"] if step == 3 else []
        assert run(tmp_path / "parts", "--method", method, *resume) == 130
    assert files(tmp_path / "parts")[0] == "step-000000005.checkpoint"

    assert run(tmp_path / "parts", "--method", method, "--resume", "auto") == 0

    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("program", [sinusoid, omniglot])
def test_row_38_resuming_the_head_gives_the_same_bits(tmp_path, interrupt, program):
    flags = (
        "--method", "imaml-head", "--inner-solver", "newton", "--cg-steps", "60",
        "--meta-steps", "4", "--validate-every", "2", "--smoke",
    )  # fmt: skip
    benchmark = {sinusoid: sinusoid.SinusoidBenchmark, omniglot: omniglot.OmniglotBenchmark}
    assert run(tmp_path / "whole", *flags, program=program) == 0
    interrupt(3, benchmark[program])
    assert run(tmp_path / "parts", *flags, program=program) == 130

    assert run(tmp_path / "parts", *flags, "--resume", "auto", program=program) == 0

    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")
    assert "strength" in torch.load(tmp_path / "parts" / "parameters.pt", weights_only=True)


def test_row_38_resuming_omniglot_gives_the_same_bits(tmp_path, interrupt):
    flags = ("--smoke", "--ways", "2", "--meta-steps", "4", "--validate-every", "2")
    assert run(tmp_path / "whole", *flags, program=omniglot) == 0
    interrupt(3, omniglot.OmniglotBenchmark)
    assert run(tmp_path / "parts", *flags, program=omniglot) == 130

    assert run(tmp_path / "parts", *flags, "--resume", "auto", program=omniglot) == 0

    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


def test_row_38_the_methods_to_compare_resume_too(tmp_path, interrupt):
    flags = ("--smoke", "--compare", "fomaml")  # smoke: both methods take the same steps
    assert run(tmp_path / "whole", *flags) == 0
    interrupt(6)  # four steps of the first, then the second step of the second
    assert run(tmp_path / "parts", *flags) == 130

    assert run(tmp_path / "parts", *flags, "--resume", "auto") == 0

    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")
    assert_same_outcome(tmp_path / "whole" / "fomaml", tmp_path / "parts" / "fomaml")


def test_row_38_records_after_the_checkpoint_are_dropped(tmp_path, interrupt):
    assert run(tmp_path / "whole", "--validate-every", "1") == 0
    interrupt(4)
    assert run(tmp_path / "parts", "--validate-every", "1") == 130
    # As if it had been killed after the record of step 5 and before its checkpoint.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 5, "validation": 0.0}\n')

    assert run(tmp_path / "parts", "--validate-every", "1", "--resume", "auto") == 0

    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


def test_row_38_the_best_before_the_stop_stays_the_best(tmp_path, interrupt, monkeypatch):
    figures = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0] * 2)
    monkeypatch.setattr(sinusoid.SinusoidBenchmark, "validate", lambda *given: next(figures))
    assert run(tmp_path / "whole", "--validate-every", "1") == 0
    interrupt(3)
    assert run(tmp_path / "parts", "--validate-every", "1") == 130

    assert run(tmp_path / "parts", "--validate-every", "1", "--resume", "auto") == 0

    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


def test_row_38_a_finished_run_is_not_trained_again(tmp_path, capsys):
    assert run(tmp_path) == 0
    before = (tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "results.json").read_bytes()

    assert run(tmp_path, "--resume", "auto") == 0

    assert "going on after 6 meta-steps" in capsys.readouterr().out
    assert before == (
        (tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "results.json").read_bytes()
    )  # fmt: skip


def test_row_38_resuming_where_nothing_is_begins(tmp_path, capsys):
    assert run(tmp_path, "--resume", "auto") == 0
    assert "starting at the beginning" in capsys.readouterr().out
    assert run(tmp_path / "other") == 0
    assert_same_outcome(tmp_path, tmp_path / "other")


# 39: another configuration or version


def test_row_39_another_configuration_is_refused_with_the_difference(tmp_path, capsys):
    assert run(tmp_path) == 0
    capsys.readouterr()
    before = (tmp_path / "config.json").read_bytes()
    flags = ("--lr", "0.5", "--seed", "3", "--resume", "auto")

    assert run(tmp_path, *flags) == 2

    difference = ("recipes.lr: 0.02 in the checkpoint, 0.5 now", "seed: 0 in the checkpoint, 3 now")
    lines = capsys.readouterr().err.splitlines()
    assert "--force goes on all the same" in lines[0]
    assert [line.strip() for line in lines[1:]] == list(difference)
    assert (tmp_path / "config.json").read_bytes() == before

    assert run(tmp_path, *flags, "--force") == 0
    shown = capsys.readouterr().out
    assert all(f"although {line}" in shown for line in difference)


@pytest.mark.parametrize(
    ("module", "name"), [(hypergrad, "hypergrad"), (torch, "torch")], ids=["hypergrad", "torch"]
)
def test_row_39_another_version_is_refused(tmp_path, capsys, monkeypatch, module, name):
    assert run(tmp_path) == 0
    was = module.__version__
    monkeypatch.setattr(module, "__version__", "0.0.1")

    assert run(tmp_path, "--resume", "auto") == 2

    assert f"versions.{name}: {was} in the checkpoint, 0.0.1 now" in capsys.readouterr().err


def test_row_39_what_changes_no_number_is_not_compared(tmp_path):
    assert run(tmp_path) == 0
    flags = ("--checkpoint-every", "2", "--compare", "fomaml", "--smoke")
    assert run(tmp_path, *flags[:2], "--resume", "auto") == 0
    assert run(tmp_path, *flags[:2], "--resume", str(CheckpointSeries(tmp_path).find()[0])) == 0


def test_row_39_a_run_that_did_not_end_is_not_overwritten(tmp_path, capsys, interrupt):
    interrupt(4)
    assert run(tmp_path) == 130
    kept = files(tmp_path)

    assert run(tmp_path) == 2
    assert "did not end: --resume auto goes on with it" in capsys.readouterr().err
    assert files(tmp_path) == kept

    assert run(tmp_path, "--force") == 0
    assert run(tmp_path) == 0


def test_row_39_a_run_that_stopped_in_a_later_method_did_not_end(tmp_path, capsys, interrupt):
    interrupt(10)  # six meta-steps of the first method, three of the second
    assert run(tmp_path, "fomaml") == 130
    assert (tmp_path / "results.json").exists()

    assert run(tmp_path, "fomaml") == 2
    assert "did not end" in capsys.readouterr().err
    assert run(tmp_path, "fomaml", "--resume", "auto") == 0
    assert run(tmp_path, "fomaml") == 0


def test_row_39_a_file_of_another_run_does_not_replace_one_that_did_not_end(
    tmp_path, capsys, interrupt
):
    assert run(tmp_path / "other") == 0
    interrupt(4)
    assert run(tmp_path / "own") == 130
    kept = files(tmp_path / "own")
    file = ("--resume", str(CheckpointSeries(tmp_path / "other").find()[0]))

    assert run(tmp_path / "own", *file) == 2
    assert "did not end" in capsys.readouterr().err
    assert files(tmp_path / "own") == kept
    assert run(tmp_path / "new", *file) == 0
    assert run(tmp_path / "own", *file, "--force") == 0


# 40: Ctrl-C


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_row_40_a_request_during_the_last_validation_counts(tmp_path, monkeypatch, number):
    validate, seen = sinusoid.SinusoidBenchmark.validate, []

    def last(self, *given):
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), number)
        return validate(self, *given)

    monkeypatch.setattr(sinusoid.SinusoidBenchmark, "validate", last)
    assert run(tmp_path, "fomaml") == 130
    assert files(tmp_path)[0] == "step-000000006.checkpoint"
    assert not (tmp_path / "fomaml").exists()


def test_row_40_ctrl_c_saves_a_checkpoint_and_exits_with_130(tmp_path):
    program = subprocess.Popen(
        [sys.executable, "-m", "reproduction.runs.sinusoid", "--compare", "--out", str(tmp_path),
         "--meta-steps", "100000", "--validate-every", "100000", "--checkpoint-every", "5"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not files(tmp_path) and program.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        program.send_signal(signal.SIGINT)
        _, message = program.communicate(timeout=60)
    finally:
        program.kill()

    assert program.returncode == 130
    step = CheckpointSeries(tmp_path).read_newest()[0].figures["step"]
    assert step >= 5
    assert message == f"interrupted after {step} meta-steps; --resume auto goes on from there\n"


def test_row_40_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    def sample(self, tasks, generator):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one did not stop it")

    monkeypatch.setattr(sinusoid.SinusoidBenchmark, "sample", sample)

    assert run(tmp_path) == 130
    assert files(tmp_path) == []


# 41: downloads (broken off, wrong checksum and two threads at once: test_omniglot_data.py)

FETCH = """
import sys
from pathlib import Path
from reproduction.omniglot.archive import Archive, download
name, md5, url, folder = sys.argv[1:]
print(download(Archive(name, md5), Path(folder), base_url=url))
"""


def test_row_41_two_processes_at_once_and_one_killed(tmp_path):
    content = random.Random(0).randbytes(3 << 20)
    started = threading.Semaphore(0)
    go_on = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: 2 << 20])
            started.release()
            go_on.wait(60)
            try:
                self.wfile.write(content[2 << 20 :])
            except OSError:
                assert len(processes) == 3  # the one that was killed does not listen

        def log_message(self, format, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    target = tmp_path / "a.zip"
    command = [
        sys.executable, "-c", FETCH, "a", hashlib.md5(content).hexdigest(),
        f"http://127.0.0.1:{server.server_port}", str(tmp_path),
    ]  # fmt: skip
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    try:
        for _ in processes:
            assert started.acquire(timeout=60)
        processes[0].kill()
        processes[0].wait()
        assert not target.exists()  # all three are in the middle of it
        go_on.set()
        answers = [process.communicate(timeout=60)[0].strip() for process in processes[1:]]
    finally:
        go_on.set()
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
        server.shutdown()
        server.server_close()

    assert answers == [str(target)] * 2
    assert target.read_bytes() == content
    assert len([name for name in os.listdir(tmp_path) if not name.startswith(".")]) == 1


# 42: wrong arguments


@pytest.mark.parametrize(
    ("program", "flags", "allowed"),
    [
        (omniglot, ["--ways", "0"], "a whole number of at least 2"),
        (omniglot, ["--shots", "20"], "at most 20, the drawings of a character"),
        (omniglot, ["--shots", "16", "--queries", "5"], "at most 20, the drawings of a character"),
        (sinusoid, ["--device", "tpu"], "'auto', 'cpu', 'cuda'"),
        (sinusoid, ["--shots", "0"], "a whole number of at least 1"),
        (sinusoid, ["--seed", "-1"], "a whole number of at least 0"),
        (sinusoid, ["--seed", str(2**64)], "must be at most 9223372036854775807"),
        (sinusoid, ["--threads", "2147483648"], "must be at most 1024"),
        (sinusoid, ["--shots", "99999999999999"], "must be at most 10000"),
        (sinusoid, ["--lr", "1e300"], "must be a finite number above 0"),
        (omniglot, ["--channels", "99999999999999"], "must be at most 10000"),
        (sinusoid, ["--checkpoint-every", "0"], "a whole number of at least 1"),
        (sinusoid, ["--resume", "nothing.checkpoint"], "must be auto or a checkpoint's file"),
        (sinusoid, ["--resume"], "expected one argument"),
    ],
)
def test_row_42_wrong_arguments_are_one_line_and_status_2(capsys, program, flags, allowed):
    with pytest.raises(SystemExit) as stop:
        program.main(flags)

    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert allowed in message


def test_row_42_a_device_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(SystemExit) as stop:
        sinusoid.main(["--device", "cuda"])

    assert stop.value.code == 2
    assert "cpu and auto are possible\n" in capsys.readouterr().err


def test_row_42_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")

    assert run(tmp_path / "file" / "run") == 1

    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "cannot be written to: Not a directory" in message


def test_a_folder_keeps_no_file_half_written(tmp_path):
    (tmp_path / ".a.json.x.part").write_text("half")

    RunFolder(tmp_path).write_json("a.json", {})

    assert os.listdir(tmp_path) == ["a.json"]
