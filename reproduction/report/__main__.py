"""Reproduce iMAML as the paper has it: ``python -m reproduction.report``.

Carries out a declared list of runs of the two programs, as many as the time allows, and writes what
has run so far as Markdown, JSON and pictures. A later call goes on where this one ends.
"""

import argparse
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console

from reproduction.omniglot.data import DATA_DIR_VARIABLE, find_data_dir
from reproduction.report.earlier import read_earlier, together
from reproduction.report.plan import Planned, Program, plan
from reproduction.report.records import read_measured, read_records
from reproduction.report.report import write_report
from reproduction.report.runner import Runner, state_of
from reproduction.runs.command_line import OneLineParser, finish, real, whole

NEED_OMNIGLOT: tuple[Program, ...] = ("omniglot", "adaptation")


def read_command_line(
    arguments: list[str] | None = None,
) -> tuple[argparse.Namespace, list[Planned]]:
    """Read the command line.

    Parameters
    ----------
    arguments
        The command line; None: that of the process.

    Returns
    -------
    given : argparse.Namespace
        The flags.
    runs : list of Planned
        Those that ``--only`` names.
    """
    parser = OneLineParser(
        prog="reproduce", description="Run the whole comparison, and report what has run so far.",
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--budget", type=real(above=0), metavar="SECONDS",
        help="after so many seconds of the clock runs are broken off at a checkpoint")  # fmt: skip
    add("--jobs", type=whole(1), default=os.cpu_count() or 1, help="processes at a time")
    add("--only", default="*", metavar="PATTERN", help="runs whose names match, with * and ?")
    add("--list", action="store_true", help="show the runs and how they stand, and end")
    add("--report", action="store_true", help="write the report alone")
    add("--out", type=Path, help="folder of the runs (default: runs/reproduce, or -smoke)")
    add("--results", type=Path,
        help="folder of the report (default: results; with --smoke beside the runs)")  # fmt: skip
    add("--data-dir", type=Path, help=f"Omniglot's archives (default: {DATA_DIR_VARIABLE})")
    add("--smoke", action="store_true", help="each run takes seconds, to see that all works")
    given = parser.parse_args(arguments)
    folder = Path("runs", "reproduce-smoke" if given.smoke else "reproduce")
    given.out = given.out or folder
    given.results = given.results or (folder / "results" if given.smoke else Path("results"))
    runs = [run for run in _declared(given) if fnmatch(run.name, given.only)]
    if not runs:
        parser.error(f"--only {given.only}: no run has such a name; --list shows them")
    for flag, path in (("--out", given.out), ("--results", given.results)):
        if path.exists() and not path.is_dir():
            parser.error(f"{flag} {path}: a file is there; the name of a folder is needed")
    if given.data_dir and not any(given.data_dir.glob("images_background*")):
        parser.error(f"--data-dir {given.data_dir}: no images_background there, of Omniglot")
    return given, runs


def main(arguments: list[str] | None = None) -> None:
    """Carry out the runs, and write the report."""
    given, runs = read_command_line(arguments)
    console = Console()
    further: dict[str, tuple[str, ...]] = {}
    if given.data_dir and not given.smoke:
        further = dict.fromkeys(NEED_OMNIGLOT, ("--data-dir", str(given.data_dir)))
    runner = Runner(given.out, further, given.jobs, given.budget, console)
    if given.list:
        for run in runs:
            runner.say(f"{state_of(given.out, run):>10}  {run.name}  about {run.seconds:.0f} s")
        return
    earlier = read_earlier(given.results, smoke=given.smoke)
    try:
        with _ended_like_ctrl_c():
            if not given.report:
                if not (given.smoke or find_data_dir(given.data_dir)):
                    runner.say(
                        f"no folder for Omniglot (--data-dir, {DATA_DIR_VARIABLE}): left out"
                    )
                    runs = [run for run in runs if run.program not in NEED_OMNIGLOT]
                runner.carry_out(runs)
    finally:
        declared = _declared(given)
        records, measured = read_records(given.out, declared), read_measured(given.out, declared)
        records, measured = (
            together(records, earlier[0], declared),
            together(measured, earlier[1], declared),
        )
        write_report(records, measured, declared, given.results, smoke=given.smoke)
    runner.say(f"Report: {given.results / 'README.md'}")
    if runner.troubled:
        raise RunsFailed(f"{len(runner.troubled)} runs ended badly: {', '.join(runner.troubled)}")


class RunsFailed(RuntimeError):
    """A run ended badly, by its own fault or the machine's."""


def _declared(given: argparse.Namespace) -> list[Planned]:
    if not given.smoke:
        return plan()
    return [replace(run, arguments=(*run.arguments, "--smoke")) for run in plan()]


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, and a terminal that is closed, end the runs at a checkpoint as Ctrl-C does."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            if number := getattr(signal, name, None):
                before[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    finish(main, expected=(RunsFailed,))
