"""The fields of solvers: their bounds, and the meaning of a tolerance that is left out."""

from __future__ import annotations

import math

import torch

# The tolerance for ``rtol=None``, by the dtype in which products are formed.
_REACHABLE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def tolerance(rtol: float | None, dtype: torch.dtype) -> float:
    """Take `rtol`, or where it is None one that the dtype can reach."""
    return _REACHABLE[dtype] if rtol is None else rtol


def at_least(name: str, value: float | None, bound: float) -> None:
    """Raise ValueError unless the field is None or at least the bound."""
    if value is not None and not value >= bound:
        raise ValueError(f"{name} must be at least {bound}; got {value!r}.")


def positive(name: str, value: float | None) -> None:
    """Raise ValueError if a number that was given is not positive and finite."""
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {value!r}.")


def finite(name: str, value: float) -> None:
    """Raise ValueError unless the field is a finite number."""
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number; got {value!r}.")
