"""The caller's choices about a linear solve."""

from __future__ import annotations

import dataclasses
import functools

from .._warnings import OnFailure
from ..conditions._base import Condition
from ..solvers._base import Solver
from ..solvers._recycle import Memory


@dataclasses.dataclass(frozen=True)
class Choices:
    """The caller's choices about a linear solve.

    Attributes
    ----------
    solver : Solver
        The method.
    inner_tol : float or None
        Above this relative inner residual the inner problem counts as unsolved.
    on_failure : {"warn", "raise", "ignore"}
        What to do about a failure.
    figures : bool
        Whether all figures are wanted, those that nothing is judged by too.
    memory : Memory or None
        What the loop around keeps of the system.
    """

    solver: Solver
    inner_tol: float | None
    on_failure: OnFailure
    figures: bool
    memory: Memory | None = None

    @functools.cached_property
    def judged(self) -> bool:
        """Whether evidence is wanted at all."""
        return self.figures or self.on_failure != "ignore"

    @functools.cached_property
    def spends(self) -> bool:
        """Whether evidence may cost products: not where nothing is judged or said."""
        return self.on_failure != "ignore" or self.inner_tol is not None

    @functools.cached_property
    def looks(self) -> bool:
        """Whether the host may read values while a system is solved; a GPU is waited for."""
        return self.on_failure != "ignore" or getattr(self.solver, "rtol", None) != 0


def needs_product(solver: Solver, condition: Condition, *, transpose: bool) -> bool:
    """Say whether a solve, with the transpose of A or with A, forms products with A itself."""
    return (not transpose or solver.needs_transpose) and not condition.symmetric
