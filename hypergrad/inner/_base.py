"""What the inner solvers share.

A solver works on flat vectors, ``(*tasks, n)`` outside of the caller's vmaps, with numbers
``(*tasks, 1)``. No branch looks at one task, only at whether any is still at work, and a task that
has stopped is frozen.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._errors import UnsupportedOperation
from .._problem import TakesDerivatives
from .._trace import being_traced
from .._transforms import forward_mode_active, never_compiled, refuse_derivatives
from .._tree import Layout, Tree
from .._vmaps import Vmaps
from ..solvers._base import at_least
from ._evaluator import Evaluator
from ._info import InnerInfo
from ._progress import Progress


class InnerSolver(ABC):
    """A method for inner problems, as a value: frozen, printable and shareable.

    Every one has the fields `maxiter`, most iterations, and `tol`, the relative residual at which
    a task stops: the residual divided by the curvature that the last ten iterations have seen and
    by the norm of the parameters, an estimate of their relative distance to the solution. None is
    what the dtype can reach (1e-8 in float64, 1e-5 in float32).

    Examples
    --------
    >>> import torch
    >>> from hypergrad import inner
    >>> loss = lambda w, t: ((w - t) ** 2).sum()
    >>> for solver in (inner.LBFGS(), inner.Nesterov(tol=1e-4)):
    ...     w, info = solver(loss, torch.zeros(2), torch.ones(2))
    ...     print(info.method, info.success.item(), torch.allclose(w, torch.ones(2)))
    LBFGS True True
    Nesterov True True
    """

    maxiter: int
    tol: float | None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        at_least("maxiter", self.maxiter, 1)
        at_least("tol", self.tol, 0.0)
        step = getattr(self, "step_size", None)
        if isinstance(step, int | float) and not 0 < step < math.inf:
            raise ValueError(f"step_size must be positive and finite; got {step!r}.")

    def __call__(self, fun: Callable[..., Any], init: Any, *args: Any) -> tuple[Any, InnerInfo]:
        """Solve the inner problem.

        Parameters
        ----------
        fun : callable
            ``fun(params, *args)``: a scalar objective, which must not be random; of `Anderson` a
            map.
        init : pytree of Tensor
            Where the iteration starts.
        *args
            Passed on to `fun`.

        Returns
        -------
        params : pytree of Tensor
            The answer, shaped like `init` and detached.
        info : InnerInfo
            How it ended.
        """
        return self._solve(fun, init, args)

    @never_compiled
    def _solve(self, fun: Callable[..., Any], init: Any, args: Any) -> tuple[Any, InnerInfo]:
        tree = Tree("init", init)
        layout = Layout(tree, tree.variables)
        given = pytree.tree_leaves((init, args, getattr(self, "step_size", None)))
        sources = [t for t in given if isinstance(t, Tensor) and t.is_floating_point()]
        vmaps = None if forward_mode_active() else Vmaps.around()
        if vmaps is not None:
            evaluator = Evaluator(fun, tree, layout, args, vmaps)
            try:
                with vmaps.left():
                    return self._answer(evaluator, sources)
            except TakesDerivatives:
                pass  # it is solved inside of the vmaps
        return self._answer(Evaluator(fun, tree, layout, args), sources)

    def _answer(self, evaluator: Evaluator, sources: list[Tensor]) -> tuple[Any, InnerInfo]:
        with torch.no_grad():
            x, progress = self._run(evaluator, evaluator.start())
        info = progress.info(type(self).__name__)
        leaves = [leaf.contiguous() for leaf in evaluator.layout.split(x)]
        with evaluator.inside():
            leaves, info = evaluator.wrapped((leaves, info))
            leaves = refuse_derivatives(
                leaves, [*sources, *evaluator.captured], _not_differentiable, plain=being_traced()
            )
        return evaluator.tree.rebuild(leaves), info

    @abstractmethod
    def _run(self, evaluator: Evaluator, x: Tensor) -> tuple[Tensor, Progress]:
        """Solve a flat problem."""


def _not_differentiable() -> Exception:
    return UnsupportedOperation(
        "What an inner solver returns is detached: its derivative would go through the iterations. "
        "Call it inside a function that custom_argmin (or custom_root, custom_fixed_point) "
        "decorates, or unroll steps with unrolled_grad."
    )
