"""The flags that both programs share, and how a program ends."""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias, get_args

import torch

from reproduction.method.inner import Curvature
from reproduction.method.recorded import NotRecordable
from reproduction.method.systems import (
    METHODS,
    SYSTEMS,
    Differentiation,
    LinearSolverName,
    Method,
    Recipe,
    SolverName,
    System,
    refuse,
)
from reproduction.runs.checkpoint import CheckpointError
from reproduction.runs.ranks import count, is_first, own_device
from reproduction.runs.resume import Refused, ResumePoint
from reproduction.runs.run_folder import WriteFailed
from reproduction.runs.tensorboard_sink import is_installed
from reproduction.runs.training import TrainingFailed

Precision: TypeAlias = Literal["float32", "bfloat16"]

LARGEST = torch.finfo(torch.float32).max
MOST_THREADS, MOST_SIZE = 1024, 10_000  # beyond every machine, and every task
SMOKE_META_STEPS, SMOKE_TASKS_PER_STEP, SMOKE_TEST_TASKS = 4, 4, 20


@dataclass(frozen=True)
class Settings:
    """What the command line says, in types."""

    method: Method
    compare: tuple[Method, ...]
    shots: int
    queries: int
    damping: float
    truncate: int
    momentum: float
    clip: float
    meta_steps: int
    time_budget: float | None
    validate_every: int
    test_tasks: int
    seed: int
    device: torch.device
    threads: int
    precision: Precision
    cuda_graphs: bool
    out: Path
    start_from: Path | None
    resume: ResumePoint
    force: bool
    checkpoint_every: int | None
    tensorboard: bool
    validation_only: bool
    smoke: bool
    recipes: dict[Method, Recipe]
    systems: dict[Method, System]
    further: dict[str, Any] = field(default_factory=dict)
    """The flags of one program alone."""


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        """Print the message without the usage, and exit."""
        self.exit(2, f"{self.prog}: {message}\n" if is_first() else None)


def whole(least: int, most: int = 10**9) -> Callable[[str], int]:
    """Make the type of a flag that takes whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}, not {text!r}"
            )
        if int(text) > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {text}")
        return int(text)

    return parse


def real(*, above: float | None = None, least: float | None = None) -> Callable[[str], float]:
    """Make the type of a flag that takes finite numbers above, or from, a bound."""
    bound = f"above {above:g}" if above is not None else f"of at least {least:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        low = value > above if above is not None else value >= (least or 0.0)
        if not (low and value <= LARGEST):
            raise argparse.ArgumentTypeError(f"must be a finite number {bound}, not {text!r}")
        return value

    return parse


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"must be a file, not {text!r}")
    return Path(text)


def _resume_point(text: str) -> ResumePoint:
    if text == "auto":
        return "auto"
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"must be auto or a checkpoint's file, not {text!r}")
    return Path(text)


def make_parser(program: str, description: str, defaults: Mapping[str, Any]) -> OneLineParser:
    """Make a parser with the shared flags.

    Parameters
    ----------
    program
        The name to start error messages with.
    description
        For ``--help``.
    defaults
        Defaults of the flags that differ between the programs.

    Returns
    -------
    OneLineParser
        The parser, to which a program may add flags of its own.
    """
    parser = OneLineParser(
        prog=program, description=description, allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--method", choices=METHODS, default="imaml", help="the system that is trained")
    add("--compare", nargs="*", choices=(*METHODS, "all"), metavar="METHOD",
        help="methods trained after it for the same time, counted as in --time-budget; "
        "no name: none")  # fmt: skip
    for flag, kind, text in (
        ("--inner-steps", whole(1), "steps of adaptation"),
        ("--inner-lr", real(above=0), "rate of gradient descent in the adaptation"),
        ("--lam", real(above=0), "strength of the proximal term"),
        ("--lr", real(above=0), "Adam's rate at the start, which falls to zero along a cosine"),
        ("--tasks-per-step", whole(1, MOST_SIZE), "tasks in a meta-step"),
        ("--cg-steps", whole(1), "steps of CG, or terms of the Neumann series, at most"),
        ("--head-steps", whole(0), "Newton steps on the last layer alone, before the others"),
    ):
        add(flag, type=kind, default=argparse.SUPPRESS, help=f"{text} (default: the method's own)")
    for flag, names, text in (
        ("--differentiation", Differentiation, "how the meta-gradient is computed"),
        ("--inner-solver", SolverName, "how a task is adapted to"),
        ("--linear-solver", LinearSolverName, "how the system of an implicit gradient is solved"),
        ("--curvature", Curvature, "A in that system, and in Hessian-free steps"),
    ):
        add(flag, choices=get_args(names), default=argparse.SUPPRESS,
            help=f"{text} (default: the method's own)")  # fmt: skip
    add("--proximal", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
        help="proximal term in gradient steps (default: the method's own)")  # fmt: skip
    add("--learn-lam", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
        help="a meta-learnt lam for each weight and bias (default: the method's own)")  # fmt: skip
    add("--compile", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
        help="trace an implicit gradient at the first meta-step, and replay it from then on "
        "(default: on the CPU, the method's own)")  # fmt: skip
    add("--momentum", type=real(least=0), default=0.9, help="of Nesterov's inner steps")
    add("--truncate", type=whole(1), default=5, metavar="STEPS",
        help="the last inner steps, through which truncated back-propagation goes")  # fmt: skip
    add("--damping", type=real(least=0), default=0.0, help="added to A")
    add("--clip", type=real(above=0), default=10.0, help="norm of a task's meta-gradient, at most")
    add(
        "--shots",
        type=whole(1, MOST_SIZE),
        help="examples a task gives to adapt to (for each class)",
    )
    add(
        "--queries", type=whole(1, MOST_SIZE), help="queries of a task in training (for each class)"
    )
    add("--meta-steps", type=whole(1), help="meta-steps")
    add("--time-budget", type=real(above=0), metavar="SECONDS",
        help="stop training after so many seconds, validation left out: the processor's own, but "
        "the clock's on a GPU and with several threads; then no run is like another")  # fmt: skip
    add("--validate-every", type=whole(1), metavar="STEPS", help="meta-steps between validations")
    add(
        "--test-tasks", type=whole(2, 10**6), default=600, help="unseen tasks behind the last table"
    )
    add("--validation-only", action="store_true",
        help="no test: for a search, whose choices are made on validation tasks")  # fmt: skip
    add(
        "--seed",
        type=whole(0, 2**63 - 1),
        default=0,
        help="of initial parameters and training tasks",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add(
        "--threads",
        type=whole(1, MOST_THREADS),
        default=1,
        help="CPU threads; small networks gain by no more",
    )
    add("--precision", choices=get_args(Precision), default="float32",
        help="of the network's layers, by autocast; "
        "parameters and solvers stay in float32")  # fmt: skip
    add("--cuda-graphs", action="store_true",
        help="on a GPU: launch the kernels of a meta-step as one, checked at first")  # fmt: skip
    add("--out", type=Path, help="output folder (default: runs/PROBLEM-METHOD-seedSEED)")
    add("--start-from", type=_file, metavar="FILE",
        help="begin from the parameters.pt of a training, of imaml-head too")  # fmt: skip
    add("--resume", type=_resume_point, metavar="auto|FILE",
        help="go on from the newest good checkpoint in the output folder, or a file")  # fmt: skip
    add("--force", action="store_true",
        help="resume under another configuration, or replace a run that did not end")  # fmt: skip
    add("--checkpoint-every", type=whole(1), metavar="STEPS",
        help="meta-steps between checkpoints (default: one at each validation)")  # fmt: skip
    add("--tensorboard", action="store_true", help="write the records for TensorBoard too")
    add("--smoke", action="store_true", help="a run of seconds, to see that everything works")
    parser.set_defaults(**defaults)
    return parser


def read_settings(
    parser: OneLineParser,
    recipes: Mapping[Method, Recipe],
    problem: str,
    arguments: list[str] | None = None,
) -> Settings:
    """Parse the command line; wrong arguments end the program with status 2.

    Parameters
    ----------
    parser
        From `make_parser`.
    recipes
        What each method uses where no flag says otherwise.
    problem
        Part of the name of the output folder.
    arguments
        The command line; None: that of the process.

    Returns
    -------
    Settings
        The settings.
    """
    given = vars(parser.parse_args(arguments))
    recipe_flags, system_flags = (
        {name: given.pop(name) for name in kind.__dataclass_fields__ if name in given}
        for kind in (Recipe, System)
    )
    own = {method: replace(recipe, **recipe_flags) for method, recipe in recipes.items()}
    systems = {method: replace(SYSTEMS[method], **system_flags) for method in own}
    named = [m for name in given.pop("compare") for m in (METHODS if name == "all" else (name,))]
    compare = tuple(dict.fromkeys(m for m in named if m != given["method"]))
    for method in (given["method"], *compare):
        if wrong := refuse(method, own[method], systems[method]):
            parser.error(wrong)
    if given["device"] == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; cpu and auto are possible")
    if given["device"] == "auto":
        given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if given["cuda_graphs"] and given["device"] != "cuda":
        parser.error("--cuda-graphs: they are for a GPU, and this is a run on the CPU")
    if given["cuda_graphs"] and recipe_flags.get("compile"):
        parser.error("--compile: not with --cuda-graphs, which record what is not compiled")
    if given["device"] == "cuda" and count() > torch.cuda.device_count():
        parser.error(
            f"--device cuda: {count()} processes, at most {torch.cuda.device_count()}, a GPU each"
        )
    if given["device"] == "cuda" and "compile" not in recipe_flags:  # not measured there
        own = {method: replace(recipe, compile=False) for method, recipe in own.items()}
    given["device"] = own_device(given["device"])
    out = given.pop("out") or Path("runs", f"{problem}-{given['method']}-seed{given['seed']}")
    if out.exists() and not out.is_dir():
        parser.error(f"--out {out}: a file is there; the name of a folder is needed")
    if given["tensorboard"] and not is_installed():
        parser.error("--tensorboard: TensorBoard is not installed: pip install tensorboard")
    if given["smoke"]:
        given["meta_steps"] = min(given["meta_steps"], SMOKE_META_STEPS)
        given["validate_every"] = min(given["validate_every"], SMOKE_META_STEPS // 2)
        given["test_tasks"] = min(given["test_tasks"], SMOKE_TEST_TASKS)
        own = {
            method: replace(r, tasks_per_step=min(r.tasks_per_step, SMOKE_TASKS_PER_STEP))
            for method, r in own.items()
        }
    for method in (given["method"], *compare):
        if own[method].tasks_per_step < count():
            parser.error(
                f"--tasks-per-step: at least {count()}, one for each process, "
                f"not {own[method].tasks_per_step}"
            )
    shared = {name: given.pop(name) for name in Settings.__dataclass_fields__ if name in given}
    return Settings(**shared, compare=compare, out=out, recipes=own, systems=systems, further=given)


def finish(program: Callable[[], None], expected: tuple[type[Exception], ...] = ()) -> NoReturn:
    """Run a program and exit.

    The status is 130 after Ctrl-C, 2 where what is asked for was refused, and 1, with one line,
    after an expected error.

    Parameters
    ----------
    program
        What to run.
    expected
        Errors whose message is all that a user needs, beside those of training and files.
    """
    known: tuple[type[Exception], ...]
    known = (
        TrainingFailed, CheckpointError, WriteFailed, Refused, NotRecordable, *expected
    )  # fmt: skip
    try:
        program()
    except KeyboardInterrupt as error:
        _complain(str(error) or "interrupted; what was measured so far is in the output folder")
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, known):
            raise
        _complain(str(error))
        sys.exit(2 if isinstance(error, Refused) else 1)
    sys.exit(0)


def _complain(text: str) -> None:
    if is_first():
        print(text, file=sys.stderr)
