"""What ``import hypergrad`` takes after ``import torch``, in a fresh process each time."""

import os
import subprocess
import sys
from collections.abc import Callable

from benchmarks.results import OURS, Row, Settings
from benchmarks.timing import Quartiles

_PROGRAM = """
import sys, time
import torch
before, start = set(sys.modules), time.process_time()
import hypergrad
took = time.process_time() - start
new = set(sys.modules) - before
print(1e3 * took, any(name.startswith("torch._dynamo") for name in new))
"""


def benchmarks() -> dict[str, Callable[[Settings], list[Row]]]:
    return {"import": measure}


def measure(settings: Settings) -> list[Row]:
    times, compilers = [], 0
    # Compiled code is kept, as it is after the first import of an installed package.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, env=environment)
    for _ in range(2 if settings.quick else 10):
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        took, compiler = done.stdout.split()
        times.append(float(took))
        compilers += compiler == "True"
    note = "torch._dynamo comes with it" if compilers else "without torch._dynamo"
    return [Row("import", OURS, "ms", Quartiles.of(times), len(times), note=note)]
