"""What is measured in a process of its own, since a thread pool would disturb the others."""

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

from benchmarks.timing import Quartiles


def has(package: str) -> bool:
    """Whether a package is installed; else say that its rows are left out."""
    installed = find_spec(package) is not None
    if not installed:
        print(f'{package} is not installed, so its rows are left out: pip install ".[bench-jax]"')
    return installed


def measured(module: str, *arguments: Any) -> tuple[dict[str, Quartiles], dict]:
    """Run a module that prints one line of JSON: its figures, and what else it says."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    fields = json.loads(done.stdout.splitlines()[-1])
    figures = {side: Quartiles(**figure) for side, figure in fields.pop("figures").items()}
    return figures, fields
