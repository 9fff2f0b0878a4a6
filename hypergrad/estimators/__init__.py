"""Estimators of the hypergradient beside the implicit one, one file each."""

from __future__ import annotations

from ._evolution import EvolutionInfo, evolution_strategies_grad
from ._finite_difference import finite_difference_grad
from ._one_step import one_step_grad
from ._penalty import penalty_grad
from ._unrolled import unrolled_grad
from ._value_function import ValueFunctionInfo, value_function_grad

__all__ = [
    "EvolutionInfo",
    "ValueFunctionInfo",
    "evolution_strategies_grad",
    "finite_difference_grad",
    "one_step_grad",
    "penalty_grad",
    "unrolled_grad",
    "value_function_grad",
]
