"""What is measured: sweeps over the condition number, the accuracy and the number of steps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from reproduction.studies.theory.peak_memory import peak_bytes
from reproduction.studies.theory.quadratics import Calls, Quadratic
from reproduction.studies.theory.rows import (
    ROWS,
    Measurement,
    Run,
    full_run,
    gradient_descent,
    implicit_run,
    nesterov,
    solved_truncated,
    truncated_run,
)


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Parameters
    ----------
    n
        Unknowns of a problem.
    problems
        Problems at each condition number; the first one's memory is measured too.
    kappas, accuracy
        Condition numbers, and the relative error that is asked for there.
    accuracies, middle
        Relative errors that are asked for, at this condition number.
    kept
        Numbers of steps that truncation keeps.
    steps
        Numbers of steps at which memory is measured, at the condition number `middle`.
    """

    n: int = 200
    problems: int = 5
    kappas: tuple[float, ...] = tuple(10 ** (k / 2) for k in range(2, 7))
    accuracy: float = 1e-2
    accuracies: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
    middle: float = 100.0
    kept: tuple[int, ...] = (10, 50)
    steps: tuple[int, ...] = (10, 40, 160, 640)


@dataclass
class Findings:
    """All measurements.

    Parameters
    ----------
    plan
        What was asked for.
    over_kappa, over_accuracy
        One measurement for each row, seed, and condition number or accuracy.
    truncation
        The answers after a fixed number of differentiated steps, at solved inner points.
    memory
        Peak bytes against the number of inner steps: (row, steps, bytes).
    products_memory
        The same against the steps of conjugate gradients, with and without evidence.
    gradient_memory
        Peak bytes of one inner gradient.
    """

    plan: Plan
    over_kappa: list[Measurement] = field(default_factory=list)
    over_accuracy: list[Measurement] = field(default_factory=list)
    truncation: list[Measurement] = field(default_factory=list)
    memory: list[tuple[str, int, int]] = field(default_factory=list)
    products_memory: list[tuple[str, int, int]] = field(default_factory=list)
    gradient_memory: int = 0


def measure(plan: Plan, seed: int, progress: Callable[[str], None]) -> Findings:
    """Make all sweeps.

    Parameters
    ----------
    plan
        How much.
    seed
        The problems' own seeds are 1000 times it, and the following numbers.
    progress
        Told what is being measured.

    Returns
    -------
    Findings
        The measurements.
    """
    findings = Findings(plan)
    for number in range(plan.problems):
        own = 1000 * seed + number
        for kappa in plan.kappas:
            progress(f"condition number {kappa:.0f}, problem {number}")
            problem = Quadratic.draw(kappa, plan.n, own)
            found = sweep_rows(problem, plan.accuracy, own, peak=number == 0)
            findings.over_kappa += found
            for kept in plan.kept:
                run = solved_truncated(problem, kept)
                findings.truncation.append(
                    run.measure(f"truncated to {kept}", problem, plan.accuracy, own)
                )
        progress(f"accuracies, problem {number}")
        problem = Quadratic.draw(plan.middle, plan.n, own)
        for accuracy in plan.accuracies:
            findings.over_accuracy += sweep_rows(problem, accuracy, own)
    progress("memory against steps")
    problem = Quadratic.draw(plan.middle, plan.n, 1000 * seed)
    inner = problem.inner(Calls())
    findings.gradient_memory = peak_bytes(lambda: inner.gradient(problem.theta, problem.theta))
    for steps in plan.steps:
        for row, run in fixed_runs(problem, steps, plan.kept[0]):
            findings.memory.append((row, steps, run.peak()))
        for row, evidence in (("without evidence", False), ("with evidence", True)):
            run = implicit_run(problem, plan.steps[0], steps, evidence=evidence)
            findings.products_memory.append((row, steps, run.peak()))
    return findings


def sweep_rows(
    problem: Quadratic, accuracy: float, seed: int, *, peak: bool = False
) -> list[Measurement]:
    """Measure every row on one problem."""
    found = []
    for name, row in ROWS.items():
        run = row(problem, accuracy)
        measured = run.measure(name, problem, accuracy, seed)
        found.append(replace(measured, peak=run.peak()) if peak else measured)
    return found


def fixed_runs(problem: Quadratic, steps: int, kept: int) -> Iterator[tuple[str, Run]]:
    """Make runs of so many inner steps, whatever their accuracy."""
    yield "MAML, gradient descent", full_run(problem, steps, gradient_descent)
    yield "MAML, Nesterov", full_run(problem, steps, nesterov)
    yield f"truncated to {kept}, gradient descent", truncated_run(problem, steps, kept)
    yield "implicit, Nesterov and CG", implicit_run(problem, steps, kept)
