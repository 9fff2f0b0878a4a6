"""Peak memory of a whole iMAML meta-step against the number of inner steps.

The Omniglot network, 5-way 1-shot, eight tasks; bytes live in torch's allocator, as the
profiler reports every allocation; a fresh process for each point.
"""

import subprocess
import sys

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

import hypergrad
from examples.imaml.inner import GradientDescent
from examples.imaml.meta import MetaLearner
from examples.imaml.models import OmniglotConvNet
from examples.imaml.omniglot_data import draw_characters, sample_tasks
from examples.imaml.systems import Differentiation

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
        inner_solver=GradientDescent(steps, 0.1),
        lam=2.0,
        linear_solver=hypergrad.CG(maxiter=5),
    )
    images = draw_characters(40).float()
    generator = torch.Generator().manual_seed(0)
    tasks = sample_tasks(images, tasks=TASKS, ways=5, shots=1, queries=5, generator=generator)
    learner.meta_gradient(meta, tasks)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        learner.meta_gradient(meta, tasks)
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def main() -> None:
    """Measure each point in a process of its own, and print."""
    print(f"peak memory of a meta-step, Omniglot network, {TASKS} tasks, in MB")
    for method, differentiation in (("imaml", "implicit"), ("maml", "unrolled")):
        points = []
        for steps in STEPS:
            command = [sys.executable, "-m", "benchmarks.memory", differentiation, str(steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            points.append(int(done.stdout.split()[-1]) / 1e6)
        row = ", ".join(f"{s} steps {p:.2f}" for s, p in zip(STEPS, points, strict=True))
        print(f"  {method}: {row}; last to first {points[-1] / points[0]:.4f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(peak_bytes(sys.argv[1], int(sys.argv[2])))  # type: ignore[arg-type]
    else:
        main()
