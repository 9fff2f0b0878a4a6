"""Carries a list of runs out: several at a time, until it is done or the time is over.

A run is a program of its own in a folder of its own. `run.json` beside its files says how it
ended, so that a later call skips what is finished and goes on with what was broken off.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from rich.console import Console

from reproduction.report.hardware import describe_hardware
from reproduction.report.plan import MODULES, TRAININGS, Planned
from reproduction.runs.resume import Refused
from reproduction.runs.run_folder import RunFolder

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

State: TypeAlias = Literal["to do", "broken off", "finished", "failed"]

UNFINISHED: frozenset[State] = frozenset({"to do", "broken off"})
INTERRUPTED, NOT_TRAINED = 130, 1
POLL_SECONDS = 0.2


def state_of(out: Path, planned: Planned) -> State:
    """Say how far a run is.

    Parameters
    ----------
    out
        The folder of all runs.
    planned
        Which run.

    Returns
    -------
    str
        'to do', 'broken off', 'finished' or 'failed'.

    Raises
    ------
    Refused
        If its folder holds a run with other arguments.
    """
    found = read_state(out / planned.name)
    if not found:
        return "to do"
    refuse_other_arguments(out / planned.name, found, planned)
    state: State = found["state"]
    return state


def refuse_other_arguments(folder: Path, found: dict[str, Any], planned: Planned) -> None:
    """Refuse a folder that holds another run than its name says.

    Parameters
    ----------
    folder
        Of the run, for the message.
    found
        What its `run.json` says.
    planned
        What it should be.

    Raises
    ------
    Refused
        If it has other arguments.
    """
    if tuple(found["arguments"]) != planned.arguments:
        raise Refused(
            f"{folder} holds a run with other arguments "
            f"({' '.join(found['arguments'])}): remove it, or choose another --out"
        )


def read_state(folder: Path) -> dict[str, Any]:
    """Return what `run.json` of a folder says; nothing where there is none."""
    path = folder / "run.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


@dataclass(frozen=True)
class Runner:
    """How runs are carried out.

    Parameters
    ----------
    out
        The folder of all runs.
    further
        Arguments that each program is given besides its run's own, by program.
    jobs
        How many processes at a time; a run that wants more is carried out alone.
    budget
        Seconds of the clock after which those that still run are broken off. None: never.
    console
        Where it is said what happens.
    patience
        Seconds that a run which is asked to stop has for its checkpoint. Then it is asked again,
        which stops it at once: the first request is lost on a program that is still being loaded.
    """

    out: Path
    further: dict[str, tuple[str, ...]]
    jobs: int
    budget: float | None
    console: Console
    patience: float = 60.0
    troubled: list[str] = field(default_factory=list)
    """The runs that ended badly, by their own fault or the machine's."""

    def carry_out(self, runs: Sequence[Planned]) -> None:
        """Carry out what is not finished, in the order given.

        Parameters
        ----------
        runs
            The list.

        Raises
        ------
        KeyboardInterrupt
            After Ctrl-C, with the running ones broken off at a checkpoint.
        """
        waiting = [run for run in runs if state_of(self.out, run) in UNFINISHED]
        end = time.monotonic() + (self.budget or float("inf"))
        active: list[_Active] = []
        try:
            while waiting or active:
                active = [one for one in active if not one.ended(self)]
                if time.monotonic() >= end:
                    break
                while (run := _ready(active, waiting)) and self._has_room(active, run):
                    waiting.remove(run)
                    if state_of(self.out, run) in UNFINISHED:  # another call may have been here
                        active += self._start(run)
                time.sleep(POLL_SECONDS)
        finally:
            for one in active:
                one.process.send_signal(signal.SIGINT)
            for one in active:
                one.stop(self)
        if waiting:
            self.say(f"the time is over; {len(waiting)} runs were not begun")

    def say(self, text: str) -> None:
        """Show one line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def note(self, run: Planned, state: State, message: str = "") -> None:
        """Write how a run stands."""
        found = {
            "name": run.name,
            "program": run.program,
            "arguments": list(run.arguments),
            "state": state,
            "message": message,
            "hardware": describe_hardware(),
        }
        RunFolder(self.out / run.name).write_json("run.json", found)

    def _has_room(self, active: "Sequence[_Active]", run: Planned) -> bool:
        busy = sum(one.run.processes for one in active)
        return not active or busy + run.processes <= self.jobs

    def _start(self, run: Planned) -> "list[_Active]":
        """Begin a run, or go on with it; nothing where another call is at it."""
        folder = self.out / run.name
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
        if not _taken(lock):
            lock.close()
            self.say(f"another call is at {run.name}")
            return []
        began = "going on with" if read_state(folder) else "beginning"
        self.note(run, "broken off")  # which it is if this process is killed
        self.say(f"{began} {run.name}")
        output = (folder / "output.txt").open("a")
        output.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [
                sys.executable, *_torchrun(run.processes), "-m", MODULES[run.program],
                *(part.format(runs=self.out) for part in run.arguments),
                *self.further.get(run.program, ()), "--out", str(folder),
                *(("--resume", "auto") if run.program in TRAININGS else ()),
            ],
            stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            preexec_fn=_listen if os.name == "posix" else None,
            pass_fds=[lock.fileno()] if os.name == "posix" else (),
        )  # fmt: skip
        return [_Active(run, process, output, output.tell(), lock)]


def _ready(active: "Sequence[_Active]", waiting: Sequence[Planned]) -> Planned | None:
    """Find the first run that does not wait for another one's files."""
    open_runs = {one.run.name for one in active} | {run.name for run in waiting}
    return next((run for run in waiting if run.after not in open_runs), None)


def _torchrun(processes: int) -> tuple[str, ...]:
    """Say what comes before "-m" in the command line of a program with so many processes."""
    if processes == 1:
        return ()
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")


def _taken(lock: IO[str]) -> bool:
    """Lock a file for this process and those that it starts, if no other one has."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _listen() -> None:
    """Take interrupts, which a shell lets what it starts in the background ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class _Active:
    """A run that is under way."""

    run: Planned
    process: subprocess.Popen[bytes]
    output: IO[str]
    begins: int
    lock: IO[str]

    def ended(self, runner: Runner, *, asked: bool = False) -> bool:
        """Look whether it has ended, because it was asked to or not, and write down how."""
        status = self.process.poll()
        if status is None:
            return False
        self.output.close()
        written = (runner.out / self.run.name / "output.txt").read_bytes()[self.begins :]
        lines = written.decode(errors="replace").strip().splitlines()
        # torchrun has a status and a last line of its own.
        failures = [line for line in lines if "was not finite" in line]
        stopped = any(line.startswith("interrupted") for line in lines)
        state: State = "finished" if status == 0 else "broken off"
        if status == NOT_TRAINED and failures:
            state = "failed"  # as it would again; a full disk, say, may be another tomorrow
        said = [*failures[:1], *lines[-1:], f"exit status {status}"][0]
        as_wanted = status in {0, INTERRUPTED} or (state == "broken off" and (asked or stopped))
        message = "" if as_wanted else said
        runner.note(self.run, state, message)
        if message:
            runner.troubled.append(self.run.name)
        self.lock.close()
        runner.say(f"{state}: {self.run.name}" + (f" ({message})" if message else ""))
        return True

    def stop(self, runner: Runner) -> None:
        """Wait for it after an interrupt."""
        for insist in (lambda: self.process.send_signal(signal.SIGINT), self.process.kill):
            try:
                self.process.wait(runner.patience)
                break
            except subprocess.TimeoutExpired:
                insist()
        self.process.wait()
        self.ended(runner, asked=True)
