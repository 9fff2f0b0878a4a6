"""Types that the overloads of the public functions share: for type checkers, and for readers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypedDict, TypeVar

from torch import Tensor

from .._warnings import OnFailure
from ..conditions._base import Condition
from ..solvers import Solver

#: The types of the inner and the outer variables, and so of a solution and of a gradient.
Params = TypeVar("Params")
Hparams = TypeVar("Hparams")

# In every overload the same: where they differ, a lambda makes type checkers return Any.
Outer: TypeAlias = Callable[[Params, Hparams], Tensor | tuple[Tensor, Any]]
Objective: TypeAlias = Callable[[Params, Hparams], Tensor]
Inner: TypeAlias = Callable[[Params, Hparams], Tensor] | Condition


class Options(TypedDict, total=False):
    """The keywords of `implicit_grad` that do not change what it returns."""

    solver: Solver | None
    x0: Any
    inner_tol: float | None
    on_failure: OnFailure
    compile: bool


class RuleOptions(TypedDict, total=False):
    """The options of `root_vjp` and `root_jvp`."""

    solver: Solver | None
    on_failure: OnFailure
