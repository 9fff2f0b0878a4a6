"""Meta-steps of implicit MAML, in gradients a task."""

import functools
from collections.abc import Callable

import torch

from benchmarks import imaml_sides
from benchmarks.imaml import MetaStep
from benchmarks.results import OURS, Row, Settings
from benchmarks.timing import in_units, seconds

STEPS = 16
# A loop takes the same time for every task, so it is timed for the first few.
SINUSOID_LOOP, OMNIGLOT_LOOP, JUDGED = 8, 2, 2


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
    few, judged = step.first(looped), step.first(1 if settings.quick else JUDGED)
    leaves = {key: leaf.clone().requires_grad_() for key, leaf in step.meta.items()}
    task = step.task(0)

    def gradient() -> None:
        value = step.training_loss(leaves, task.support_x, task.support_y)
        torch.autograd.grad(value, list(leaves.values()))

    sides = {side: functools.partial(run, step) for side, run in imaml_sides.BATCHED.items()}
    sides |= {side: functools.partial(run, few) for side, run in imaml_sides.LOOPS.items()}
    parts = {side: len(step) if side in imaml_sides.BATCHED else len(few) for side in sides}
    found = in_units(
        seconds(
            {"gradient": gradient, **sides},
            rounds=settings.rounds,
            warm_up=1 if settings.quick else 2,
            threads=settings.threads,
        ),
        "gradient",
        parts,
    )
    exact = judged.exact()
    answer = []
    for side, run in {**imaml_sides.BATCHED, **imaml_sides.LOOPS}.items():
        error = ((run(judged).double() - exact).norm() / exact.norm()).item()
        made = int(imaml_sides.with_info(judged)[1].matvecs.max())
        products = {"higher, unrolled": None, OURS: made, "hypergrad, by examples/imaml": made}
        answer.append(
            Row(
                name,
                side,
                "gradients a task",
                found[side],
                settings.rounds,
                settings.threads,
                error,
                products.get(side, imaml_sides.CG_STEPS),
            )
        )
    return answer
