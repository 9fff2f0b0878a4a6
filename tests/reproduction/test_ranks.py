"""Several processes that share a meta-step, started by torchrun as a user starts them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reproduction.method.episodes import Episodes
from reproduction.runs import experiment, sinusoid
from reproduction.runs.command_line import finish
from reproduction.runs.ranks import Ranks, join

ROOT = Path(__file__).parents[2]
STEPS, STOPPED = 6, 3
FLAGS = [
    "--tasks-per-step", "5", "--meta-steps", str(STEPS), "--validate-every", "1",
    "--test-tasks", "10", "--compare",
]  # fmt: skip


class Watched:
    """Runs the program in this process, and notes what its meta-steps share."""

    def __init__(self, out, interrupt=None):
        self.out, self.gradients, self.reductions = out, [], 0
        average, reduce = Ranks.average, torch.distributed.all_reduce

        def note_average(ranks, *arguments):
            gradient, figures = average(ranks, *arguments)
            self.gradients.append({name: leaf.clone() for name, leaf in gradient.items()})
            if len(self.gradients) == interrupt:
                os.kill(os.getpid(), signal.SIGINT)
            return gradient, figures

        def note_reduction(*arguments, **options):
            self.reductions += 1
            return reduce(*arguments, **options)

        self._patches = [
            (Ranks, "average", average, note_average),
            (torch.distributed, "all_reduce", reduce, note_reduction),
        ]

    def __call__(self, *flags):
        try:
            for owner, name, _, new in self._patches:
                setattr(owner, name, new)
            finish(lambda: sinusoid.main([*FLAGS, "--out", str(self.out), *flags]))
        except SystemExit as stop:
            return stop.code
        finally:
            for owner, name, old, _ in self._patches:
                setattr(owner, name, old)


def in_a_rank(out):
    """Train, stop after Ctrl-C in the second process alone, and go on; write what was seen."""
    rank = int(os.environ["RANK"])
    # One group for all: a second one would meet the first one's addresses in the store.
    with join(torch.device("cpu")) as ranks:
        experiment.join = lambda device: contextlib.nullcontext(ranks)
        _train_in_a_rank(out, rank)


def _train_in_a_rank(out, rank):
    own = out / f"out{rank}"
    first = Watched(own, interrupt=STOPPED - 1 if rank else None)
    status = [first()]
    second = Watched(own)
    status.append(second("--resume", "auto"))
    # The seconds of the first decide when the second method ends, in both processes.
    third = Watched(own)
    status.append(third("--resume", "auto", "--compare", "fomaml"))
    seen = {
        "status": status,
        "gradient": first.gradients[0],
        "last gradient": second.gradients[-1],
        "steps": [len(run.gradients) for run in (first, second, third)],
        "reductions": [run.reductions for run in (first, second, third)],
    }
    torch.save(seen, out / f"seen{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Run two processes."""
    out = tmp_path_factory.mktemp("two")
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         __file__, str(out)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert torchrun.wait(timeout=120) == 0
    finally:
        torchrun.terminate()  # and it ends the two
        torchrun.wait(timeout=60)
    return out


def read(two):
    return [torch.load(two / f"seen{rank}.pt", weights_only=True) for rank in (0, 1)]


def flat(gradient):
    return torch.cat([leaf.flatten() for leaf in gradient.values()])


def test_the_meta_gradient_and_the_metrics_are_those_of_one_process(two, tmp_path):
    alone = Watched(tmp_path)
    assert alone() == 0

    for seen in read(two):
        gradient, expected = flat(seen["gradient"]), flat(alone.gradients[0])
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() < 1e-5 * expected.norm()

    metrics = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path, two / "out0")
    ]
    assert [record["step"] for record in metrics[1]] == list(range(1, STEPS + 1))
    for one, shared in zip(*metrics, strict=True):
        assert one.keys() == shared.keys()
        for name in ("query_loss", "gradient_norm", "not_finite", "validation"):
            assert shared[name] == pytest.approx(one[name], rel=1e-4)
    # Before rounding has moved the parameters; products are counted for a batch as a whole. The two
    # residuals come from solves that end 3e-5 away, and a batch of half the tasks ends elsewhere.
    for name in metrics[0][0].keys() - {"products"}:
        rel = 1e-3 if name.endswith("residual") else 1e-5
        assert metrics[1][0][name] == pytest.approx(metrics[0][0][name], rel=rel)


def test_one_reduction_a_meta_step(two):
    for seen in read(two):
        assert seen["reductions"] == seen["steps"]


def test_ctrl_c_in_one_process_stops_both_after_the_same_step_and_both_go_on(two):
    first, second = read(two)

    assert first["status"] == second["status"] == [130, 0, 0]
    assert first["steps"][:2] == second["steps"][:2] == [STOPPED, STEPS - STOPPED]
    assert torch.equal(flat(first["last gradient"]), flat(second["last gradient"]))


def test_a_time_budget_ends_both_after_the_same_step(two):
    first, second = read(two)

    assert first["steps"][2] == second["steps"][2] > 0


def test_only_the_first_process_writes(two):
    assert sorted(path.name for path in two.iterdir()) == ["out0", "seen0.pt", "seen1.pt"]


def test_parts_of_a_batch_are_the_batch():
    batch = Episodes(*(torch.arange(7.0) for _ in range(4)))

    for size in (1, 2, 3, 7):
        parts = [Ranks(rank, size).share(batch).query_x for rank in range(size)]
        assert torch.equal(torch.cat(parts), batch.query_x)
        assert min(map(len, parts)) >= 1


def test_fewer_tasks_than_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "6")

    with pytest.raises(SystemExit) as stop:
        sinusoid.main(["--tasks-per-step", "5"])

    assert stop.value.code == 2
    assert "--tasks-per-step: at least 6, one for each process, not 5" in capsys.readouterr().err


if __name__ == "__main__":
    in_a_rank(Path(sys.argv[1]))
