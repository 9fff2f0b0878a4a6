"""Peak memory of a whole iMAML meta-step against the number of inner steps.

The Omniglot network, 5-way 1-shot, eight tasks; bytes live in torch's allocator; a fresh process
for each point.
"""

import subprocess
import sys
from collections.abc import Callable

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import hypergrad
from benchmarks.allocator import peak_bytes as allocated
from benchmarks.imaml import OMNIGLOT_LAM, OMNIGLOT_LR
from benchmarks.results import OURS, Row, Settings
from benchmarks.timing import Quartiles
from reproduction.method.inner import GradientDescent
from reproduction.method.meta import MetaLearner
from reproduction.method.models import OmniglotConvNet
from reproduction.method.systems import Differentiation
from reproduction.omniglot.data import draw_characters, sample_tasks

TASKS, STEPS = 8, (4, 16, 64)


def peak_bytes(differentiation: Differentiation, steps: int) -> int:
    """Most bytes live at once during a meta-step, beyond those live before it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = OmniglotConvNet(5)
    meta = {name: p.detach() for name, p in network.named_parameters()}
    learner = MetaLearner(
        model=lambda params, x: functional_call(network, params, (x,)),
        loss=cross_entropy,
        differentiation=differentiation,
        inner_solver=GradientDescent(steps, OMNIGLOT_LR),
        lam=OMNIGLOT_LAM,
        linear_solver=hypergrad.CG(maxiter=5),
    )
    images = draw_characters(40).float()
    generator = torch.Generator().manual_seed(0)
    tasks = sample_tasks(images, tasks=TASKS, ways=5, shots=1, queries=5, generator=generator)
    learner.meta_gradient(meta, tasks)
    return allocated(lambda: learner.meta_gradient(meta, tasks))


def benchmarks() -> dict[str, Callable[[Settings], list[Row]]]:
    return {"memory": measure}


def measure(settings: Settings) -> list[Row]:
    """Measure each point in a process of its own."""
    rows = []
    for differentiation, side in (("implicit", OURS), ("unrolled", "hypergrad, unrolled")):
        for steps in STEPS[:1] if settings.quick else STEPS:
            command = [sys.executable, "-m", "benchmarks.memory", differentiation, str(steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peak = int(done.stdout.split()[-1]) / 1e6
            figure = Quartiles(peak, peak, peak)
            rows.append(Row("memory", side, "MB", figure, 1, note=f"{steps} inner steps"))
    return rows


if __name__ == "__main__":
    print(peak_bytes(sys.argv[1], int(sys.argv[2])))  # type: ignore[arg-type]
