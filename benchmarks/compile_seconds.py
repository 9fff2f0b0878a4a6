"""What the first compiled meta-step of iMAML takes: ``python -m benchmarks.compile_seconds``.

Seconds by the clock until a meta-step of eight tasks is compiled and has been compared with the
same step as it is, imports left out; each in a process of its own, with an empty cache of Inductor.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import torch

ROWS = (("sinusoid", "aten"), ("omniglot", "aten"), ("sinusoid", "inductor"))
TASKS, STEPS = 8, 16


def main() -> None:
    """Print a row for each network and backend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", nargs="*", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.row:
        print(*chosen.row, f"{taken(*chosen.row):.1f} s")
        return
    for row in ROWS:
        with tempfile.TemporaryDirectory() as cache:
            subprocess.run(
                [sys.executable, "-m", "benchmarks.compile_seconds", *row],
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                check=True,
            )


def taken(network: str, backend: str) -> float:
    """Seconds of the calls that compile, beyond what the step takes as it is."""
    from benchmarks import imaml_sides
    from benchmarks.imaml import MetaStep

    torch.set_num_threads(1)
    step = {"sinusoid": MetaStep.sinusoid, "omniglot": MetaStep.omniglot}[network](TASKS, STEPS)
    compiled = imaml_sides.compiled if backend == "aten" else imaml_sides.by_inductor
    plain, calls = imaml_sides.by_hypergrad_alone, 0
    plain(step)
    begun = time.perf_counter()
    plain(step)
    once = time.perf_counter() - begun
    begun = time.perf_counter()
    while not any(program.checked for program in compiled.session.programs):
        compiled(step)
        calls += 1
    return time.perf_counter() - begun - calls * once


if __name__ == "__main__":
    main()
