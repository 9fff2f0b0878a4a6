"""What a run was started with: all that its numbers depend on."""

import dataclasses
import json
from typing import Any

import torch

import hypergrad
from reproduction.method.systems import Method
from reproduction.runs.command_line import Settings

# These change where a run writes and what it says, and not one number of it.
WITHOUT_EFFECT = {
    "out", "compare", "resume", "force", "checkpoint_every", "tensorboard", "validation_only",
    "further.data_dir", "further.download",
}  # fmt: skip

# What was done before there was such a choice: a run of that time goes on.
BEFORE = {
    "recipes.head_steps": 0,
    "recipes.learn_lam": False,
    "start_from": None,
    "further.network": None,
}


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    return {"hypergrad": hypergrad.__version__, "torch": torch.__version__}


def describe(
    settings: Settings, method: Method, benchmark: object, processes: int
) -> dict[str, Any]:
    """Describe one method's training by all that its numbers depend on.

    Parameters
    ----------
    settings
        The settings.
    method
        Which of the methods.
    benchmark
        The tasks; their class is named.
    processes
        How many share a meta-step.

    Returns
    -------
    dict
        Values that JSON knows, by dotted names.
    """
    whole = dataclasses.asdict(settings)
    whole["recipes"] = whole["recipes"][method]
    whole |= {
        "method": method,
        "device": settings.device.type,
        "benchmark": type(benchmark).__name__,
        "processes": processes,
        "versions": versions(),
    }
    flat = _flatten(json.loads(json.dumps(whole, default=str)))
    return {
        name: value
        for name, value in flat.items()
        if name not in WITHOUT_EFFECT and not (name in BEFORE and value == BEFORE[name])
    }


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, part in value.items():
        if isinstance(part, dict):
            flat |= _flatten(part, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = part
    return flat
