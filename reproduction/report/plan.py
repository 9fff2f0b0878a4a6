"""The declared list of runs, in the order in which they make the tables whole."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from reproduction.method.evaluations import evaluations_a_task, expected_products
from reproduction.method.systems import METHODS, SYSTEMS, Method
from reproduction.runs import sinusoid

Program: TypeAlias = Literal["sinusoid", "omniglot", "inner_steps", "adaptation"]
MODULES: dict[Program, str] = {
    "sinusoid": "reproduction.runs.sinusoid",
    "omniglot": "reproduction.runs.omniglot",
    "inner_steps": "reproduction.studies.inner_steps",
    "adaptation": "reproduction.studies.adaptation",
}
TRAININGS: frozenset[Program] = frozenset({"sinusoid", "omniglot"})
"""Those that keep checkpoints; the others measure in one go, and begin anew."""
MEASUREMENTS: dict[Program, str] = {
    "inner_steps": "Sinusoids, against the number of inner steps",
    "adaptation": "Omniglot, against the number of inner steps",
}
"""Titles."""

SEEDS = range(5)
SINUSOID_SECONDS, LONGER_SINUSOID_SECONDS = 20, 60
SINUSOID_EVALUATIONS = 200_000
LONGER_SINUSOIDS: tuple[Method, ...] = (
    "imaml-head",
    "imaml",
    "imaml-hf",
    "maml",
    "maml-nesterov",
    "fomaml",
)
"""Those that 20 seconds did not tell apart from `imaml`."""
SINUSOID_SHOTS, SINUSOID_PRODUCTS, TRUNCATE = 10, 20, 5  # what the program takes by itself
LONG_MINUTES, LONGEST_HEAD_MINUTES = 25, 240
LONGEST_MINUTES, LONGEST_PROCESSES = 100, 2  # two hours by the clock, validation included
FULL_MINUTES, NETWORK_MINUTES = 20, 60
SETTING_MINUTES, CROPPED_MINUTES = 20, 20
# MAML and iMAML first, then the others; `imaml-head` has longer runs of its own.
ORDER: tuple[Method, ...] = (
    "imaml", "maml", "imaml-hf", "imaml-gd", "fomaml", "maml-nesterov", "reptile",
    "truncated", "imaml-neumann",
)  # fmt: skip
BESIDE_HEADS: tuple[Method, ...] = ("maml", "fomaml")
ENDLESS = "1000000"


@dataclass(frozen=True)
class Planned:
    """One run of one program.

    Parameters
    ----------
    name
        Its folder below the output folder, by which ``--only`` finds it.
    program
        Which.
    arguments
        Its command line, without the folders; "{runs}" stands for that of all runs.
    seconds
        About so many of the processor it takes, validation and test included.
    processes
        How many share its meta-steps.
    after
        The run whose files it reads, and waits for.
    """

    name: str
    program: Program
    arguments: tuple[str, ...]
    seconds: float
    processes: int = 1
    after: str | None = None

    @property
    def table(self) -> str:
        """Name the table that the run belongs to."""
        return self.name.rpartition("/")[0]


def plan() -> list[Planned]:
    """Return every run, the most wanted first.

    Returns
    -------
    list of Planned
        Each name once.
    """
    long = _omniglot("imaml", 5, 1, LONG_MINUTES)
    return [
        *_heads(),
        *(
            _omniglot(method, ways, 1, LONG_MINUTES, validate_every=200)
            for ways in (5, 20)
            for method in BESIDE_HEADS
        ),
        long,
        *_sinusoids_at_equal_time("equal-time", METHODS, SINUSOID_SECONDS),
        Planned("inner-steps/sinusoid", "inner_steps", ("--seed", "0"), 120),
        Planned(
            "inner-steps/omniglot", "adaptation", (f"{{runs}}/{long.name}",), 180, after=long.name
        ),
        *_sinusoids_at_equal_evaluations(),
        *_sinusoids_at_equal_time(
            f"equal-time-{LONGER_SINUSOID_SECONDS}-seconds",
            LONGER_SINUSOIDS,
            LONGER_SINUSOID_SECONDS,
        ),
        *(_omniglot("imaml", ways, 1, NETWORK_MINUTES, validate_every=200) for ways in (5, 20)),
        _omniglot("imaml-head", 5, 1, NETWORK_MINUTES, cropped=True),
        *(_omniglot(method, 5, 1, FULL_MINUTES) for method in ORDER),
        _omniglot("imaml", 5, 1, LONGEST_MINUTES, processes=LONGEST_PROCESSES, validate_every=400),
        *(
            _omniglot(method, ways, shots, SETTING_MINUTES, validate_every=validate_every)
            for ways, shots, validate_every in ((5, 5, 100), (20, 1, 100), (20, 5, 50))
            for method in ("imaml", "maml")
        ),
        _omniglot("imaml", 5, 1, CROPPED_MINUTES, cropped=True),
    ]


def _heads() -> Iterator[Planned]:
    """Return the runs of `imaml-head`: a seed of each setting first, then the others."""

    def run(ways: int, shots: int, seed: int, minutes: int = LONG_MINUTES) -> Planned:
        every = 200 if minutes == LONG_MINUTES else 1000
        return _omniglot("imaml-head", ways, shots, minutes, seed=seed, validate_every=every)

    for ways, shots in ((5, 1), (20, 1), (5, 5), (20, 5)):
        yield run(ways, shots, 0)
    for seeds in (SEEDS[1:3], SEEDS[3:]):
        for ways in (5, 20):
            for seed in seeds:
                yield run(ways, 1, seed)
    for ways in (5, 20):
        yield run(ways, 1, 0, LONGEST_HEAD_MINUTES)


def _sinusoids_at_equal_time(
    table: str, methods: Sequence[Method], seconds: int
) -> Iterator[Planned]:
    for seed in SEEDS:
        for method in methods:
            yield Planned(
                f"sinusoid/{table}/{method}-seed{seed}",
                "sinusoid",
                (
                    "--method", method, "--seed", str(seed), "--compare",
                    "--meta-steps", ENDLESS, "--time-budget", str(seconds),
                    "--validate-every", "50",
                ),
                seconds + 10,
            )  # fmt: skip


def _sinusoids_at_equal_evaluations() -> Iterator[Planned]:
    for seed in SEEDS:
        for method in METHODS:
            steps = sinusoid_steps(method, SINUSOID_EVALUATIONS)
            yield Planned(
                f"sinusoid/equal-evaluations/{method}-seed{seed}",
                "sinusoid",
                (
                    "--method", method, "--seed", str(seed), "--compare",
                    "--meta-steps", str(steps), "--validate-every", "50",
                ),
                30,
            )  # fmt: skip


def sinusoid_steps(method: Method, evaluations: int) -> int:
    """Return how many meta-steps of a method take so many evaluations.

    Parameters
    ----------
    method
        Which, by its own recipe.
    evaluations
        See `evaluations`.

    Returns
    -------
    int
        Meta-steps, at least one.
    """
    recipe, system = sinusoid.RECIPES[method], SYSTEMS[method]
    a_task = evaluations_a_task(
        recipe,
        system,
        outputs=SINUSOID_SHOTS,
        truncate=TRUNCATE,
        products=expected_products(system, SINUSOID_PRODUCTS),
    )
    return max(1, round(evaluations / (recipe.tasks_per_step * a_task)))


def _omniglot(
    method: Method,
    ways: int,
    shots: int,
    minutes: int,
    *,
    cropped: bool = False,
    processes: int = 1,
    validate_every: int = 100,
    seed: int | None = None,
) -> Planned:
    # On 5 ways ten queries a class did better than five, on validation tasks at equal time.
    queries = 10 if ways == 5 and not cropped else 5
    pipeline = ("--pipeline", "cropped") if cropped else ()
    setting = f"{ways}-way-{shots}-shot" + ("-cropped" if cropped else "")
    length = f"{minutes}-minutes" + (f"-on-{processes}-cores" if processes > 1 else "")
    return Planned(
        f"omniglot/{setting}/{length}/{method}" + ("" if seed is None else f"-seed{seed}"),
        "omniglot",
        (
            "--method", method, "--ways", str(ways), "--shots", str(shots), "--compare",
            "--meta-steps", ENDLESS, "--time-budget", str(60 * minutes),
            "--queries", str(queries), "--validate-every", str(validate_every), *pipeline,
            *(() if seed is None else ("--seed", str(seed))),
        ),
        60 * minutes * 1.15 + 60,
        processes,
    )  # fmt: skip
