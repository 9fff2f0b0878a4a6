"""Estimators of the hypergradient beside the implicit one, one file each."""

from __future__ import annotations

from ._finite_difference import finite_difference_grad
from ._one_step import one_step_grad
from ._unrolled import unrolled_grad

__all__ = ["finite_difference_grad", "one_step_grad", "unrolled_grad"]
