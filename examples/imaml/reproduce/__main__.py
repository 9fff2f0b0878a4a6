"""Reproduce iMAML as the paper has it: ``python -m examples.imaml.reproduce``.

Carries out a declared list of runs of the two programs, as many as the time allows, and writes what
has run so far as Markdown, JSON and pictures. A later call goes on where this one ends.
"""

import argparse
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import get_args

from rich.console import Console

from examples.imaml.command_line import OneLineParser, finish, real, whole
from examples.imaml.omniglot_data import DATA_DIR_VARIABLE, find_data_dir
from examples.imaml.reproduce.earlier import read_earlier, together
from examples.imaml.reproduce.plan import Planned, Program, plan
from examples.imaml.reproduce.records import Measured, Record, read_measured, read_records
from examples.imaml.reproduce.report import write_report
from examples.imaml.reproduce.runner import Runner, state_of

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
    add("--out", type=Path, default=Path("runs", "reproduce"), help="folder of the runs")
    add("--results", type=Path, default=Path("results"), help="folder of the report")
    add("--data-dir", type=Path, help=f"Omniglot's archives (default: {DATA_DIR_VARIABLE})")
    add("--smoke", action="store_true", help="each run takes seconds, to see that all works")
    given = parser.parse_args(arguments)
    runs = [run for run in plan() if fnmatch(run.name, given.only)]
    if not runs:
        parser.error(f"--only {given.only}: no run has such a name; --list shows them")
    for flag, path in (("--out", given.out), ("--results", given.results)):
        if path.exists() and not path.is_dir():
            parser.error(f"{flag} {path}: a file is there; the name of a folder is needed")
    return given, runs


def main(arguments: list[str] | None = None) -> None:
    """Carry out the runs, and write the report."""
    given, runs = read_command_line(arguments)
    console = Console()
    further: dict[str, tuple[str, ...]] = {}
    if given.smoke:
        further = dict.fromkeys(get_args(Program), ("--smoke",))
    elif given.data_dir:
        further = dict.fromkeys(NEED_OMNIGLOT, ("--data-dir", str(given.data_dir)))
    runner = Runner(given.out, further, given.jobs, given.budget, console)
    if given.list:
        for run in runs:
            runner.say(f"{state_of(given.out, run):>10}  {run.name}  about {run.seconds:.0f} s")
        return
    try:
        if not given.report:
            if not (given.smoke or find_data_dir(given.data_dir)):
                runner.say(f"no folder for Omniglot (--data-dir, {DATA_DIR_VARIABLE}): left out")
                runs = [run for run in runs if run.program not in NEED_OMNIGLOT]
            runner.carry_out(runs)
    finally:
        write_report(*_found(given), given.results)
    runner.say(f"Report: {given.results / 'README.md'}")


def _found(given: argparse.Namespace) -> tuple[list[Record], list[Measured], list[Planned]]:
    """Everything that has run: here or, as an earlier report has it, elsewhere."""
    every = plan()
    records, measured = read_records(given.out, every), read_measured(given.out, every)
    if not given.smoke:
        earlier_records, earlier_measured = read_earlier(given.results)
        records = together(records, earlier_records, every)
        measured = together(measured, earlier_measured, every)
    return records, measured, every


if __name__ == "__main__":
    finish(main)
