"""Meta-steps of implicit MAML, in gradients a task."""

import functools
import shutil
import statistics
from collections.abc import Callable

import torch

from benchmarks import imaml_sides, own_process
from benchmarks.imaml import MetaStep
from benchmarks.results import OURS, Row, Settings
from benchmarks.timing import in_units, seconds

STEPS = 16
# A loop takes the same time for every task, so it is timed for the first few.
SINUSOID_LOOP, OMNIGLOT_LOOP = 8, 2
# Where jax is timed too: a call of its step on Omniglot takes as long as all sides here together.
WITH_JAX, FEWER = ("sinusoid-8", "sinusoid-32", "sinusoid-256", "omniglot-8"), 10


def benchmarks() -> dict[str, Callable[[Settings], list[Row]]]:
    return {
        **{
            f"sinusoid-{tasks}": functools.partial(
                measure, f"sinusoid-{tasks}", MetaStep.sinusoid, tasks, SINUSOID_LOOP
            )
            for tasks in (8, 32, 256)
        },
        **{
            f"omniglot-{tasks}": functools.partial(
                measure, f"omniglot-{tasks}", MetaStep.omniglot, tasks, OMNIGLOT_LOOP
            )
            for tasks in (8, 32)
        },
    }


def measure(
    name: str,
    make: Callable[[int, int], MetaStep],
    tasks: int,
    looped: int,
    settings: Settings,
) -> list[Row]:
    step = make(2, 2) if settings.quick else make(tasks, STEPS)
    few = step.first(looped)
    leaves = {key: leaf.clone().requires_grad_() for key, leaf in step.meta.items()}
    task = step.task(0)

    def gradient() -> None:
        value = step.training_loss(leaves, task.support_x, task.support_y)
        torch.autograd.grad(value, list(leaves.values()))

    batched, loops = dict(imaml_sides.BATCHED), imaml_sides.LOOPS
    if name.startswith("sinusoid") and shutil.which("c++"):
        batched |= imaml_sides.SMALL
    sides = {side: functools.partial(run, step) for side, run in batched.items()}
    sides |= {side: functools.partial(run, few) for side, run in loops.items()}
    parts = {side: len(step) if side in batched else len(few) for side in sides}
    taken = seconds(
        {"gradient": gradient, **sides},
        rounds=settings.rounds,
        warm_up=1 if settings.quick else 2,
        threads=settings.threads,
    )
    found = in_units(taken, "gradient", parts)
    row = functools.partial(
        Row,
        name,
        unit="gradients a task",
        rounds=settings.rounds,
        threads=settings.threads,
        unit_ms=1e3 * statistics.median(taken["gradient"]),
    )
    # Of all tasks, and in float64: a unit of a network that is at zero in float32 may be on the
    # other side there, by rounding alone, and then the task has another meta-gradient.
    judged, exact = step.in_float64(), step.exact()
    judge = f"{len(step)} tasks, float64"
    made = int(imaml_sides.with_info(judged)[1].matvecs.max())
    for first in {"hypergrad, compiled", *imaml_sides.SMALL} & {*batched}:
        batched[first](judged)
    answer = []
    for side, run in {**batched, **loops}.items():
        error = ((run(judged) - exact).norm() / exact.norm()).item()
        by_us = side.startswith(OURS)
        products = None if side == "higher, unrolled" else made if by_us else imaml_sides.CG_STEPS
        answer.append(row(side, figure=found[side], error=error, products=products, judged=judge))
    if settings.threads == 1 and name in WITH_JAX and own_process.has("jax"):
        answer += by_jax(name, step, settings.rounds, judge)
    return answer


def by_jax(name: str, step: MetaStep, rounds: int, judge: str) -> list[Row]:
    """The same by jax, and the batched step by hand beside it, which links the two processes."""
    kind = name.split("-")[0]
    rounds = min(rounds, FEWER) if kind == "omniglot" else rounds
    figures, said = own_process.measured(
        "benchmarks.imaml_jax", kind, len(step), step.steps, rounds
    )
    compiled = {
        "error": said["error"],
        "judged": judge,
        "note": f"compiled in {said['compilation']:.0f} s",
    }
    return [
        Row(
            name,
            side,
            "gradients a task",
            figure,
            rounds,
            products=imaml_sides.CG_STEPS,
            **(compiled if side.startswith("jax") else {}),
        )
        for side, figure in figures.items()
    ]
