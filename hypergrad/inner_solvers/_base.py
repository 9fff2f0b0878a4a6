"""The base of the inner solvers.

A solver works on flat vectors, ``(*tasks, n)`` outside of the caller's vmaps, with numbers
``(*tasks, 1)``. No branch looks at one task, only at whether any is still at work, and a task that
has stopped is frozen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .._autograd.refusals import never_compiled, refuse_derivatives
from .._autograd.torch_pytrees import pytree
from .._autograd.trace import being_traced, detached
from .._autograd.vmaps import Vmaps, outside, outside_of_vmaps
from .._compiled.session import compiling
from .._errors import UnsupportedOperation
from .._mistakes import Fields, refuse_signatures
from .._pytrees import Layout, Tree, refuse_meta
from ..solvers._fields import at_least, positive
from ._evaluator import Evaluator
from ._fixed_steps import FixedSteps
from ._info import InnerInfo
from ._progress import Progress
from ._replay import replayed


class InnerSolver(Fields, ABC):
    """A method for inner problems, as a value: frozen, printable and shareable.

    Every one has the fields `maxiter`, most iterations, and `tol`, the relative residual at which
    a task stops: the residual divided by the curvature that the last ten iterations have seen and
    by the norm of the parameters, an estimate of their relative distance to the solution. None is
    what the dtype can reach (1e-8 in float64, 1e-5 in float32). Where there is a `step_size`, 0
    means not to look: exactly `maxiter` steps.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import inner_solvers
    >>> loss = lambda w, t: ((w - t) ** 2).sum()
    >>> for solver in (inner_solvers.LBFGS(), inner_solvers.Nesterov(tol=1e-4)):
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
        if isinstance(step, int | float):
            positive("step_size", step)

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
            The solution, shaped like `init` and detached.
        info : InnerInfo
            How it ended.

        Raises
        ------
        TypeError
            If `fun` does not take its arguments.
        RuntimeError
            Whatever `fun` raises.
        """
        try:
            return self._solve(fun, init, args)
        except TypeError as error:
            names = [f"args[{i}]" for i in range(len(args))]
            refuse_signatures("fun", fun, ("params", *names), error)
            raise
        except RuntimeError:
            refuse_meta(Tree("init", init))
            raise

    @never_compiled
    def _solve(self, fun: Callable[..., Any], init: Any, args: Any) -> tuple[Any, InnerInfo]:
        tree = Tree("init", init)
        layout = Layout(tree, tree.variables)
        leaves = pytree.tree_leaves((init, args, getattr(self, "step_size", None)))
        sources = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
        args = pytree.tree_map_only(Tensor, detached, args)

        def solved(vmaps: Vmaps | None) -> tuple[Any, InnerInfo]:
            evaluator = Evaluator(fun, tree, layout, args, vmaps)
            leaves, info = self._ended(evaluator)
            return handed_back(tree, leaves, info, vmaps, [*sources, *evaluator.captured])

        session = compiling()
        steps = None if session is None else replayed(self, session, fun, init, args)
        if session is None or steps is None:
            return outside_of_vmaps(solved)
        vmaps = Vmaps.around()
        if session.is_due(steps.replay.program):
            as_it_is: tuple[Any, InnerInfo] = outside_of_vmaps(solved)
            plain = tree.match("params", as_it_is[0])
            if vmaps is not None:
                plain = [vmaps.unwrapped(t) for t in plain]
            with outside(vmaps):
                session.agree(steps.replay, steps.leaves, plain)
            return as_it_is
        with outside(vmaps):
            return handed_back(
                tree, steps.leaves, steps.info, vmaps, [*sources, *steps.replay.lifted]
            )

    def _ended(self, evaluator: Evaluator) -> tuple[list[Tensor], InnerInfo]:
        """Solve a problem: the solution, with task dimensions in front, and how it ended."""
        with torch.no_grad():
            x, progress = self._run(evaluator, evaluator.start())
        leaves = [leaf.contiguous() for leaf in evaluator.layout.split(x)]
        return leaves, progress.info(type(self).__name__)

    @abstractmethod
    def _run(self, evaluator: Evaluator, x: Tensor) -> tuple[Tensor, Progress | FixedSteps]:
        """Solve a flat problem."""


def handed_back(
    tree: Tree,
    leaves: list[Tensor],
    info: InnerInfo,
    vmaps: Vmaps | None,
    sources: list[Tensor],
) -> tuple[Any, InnerInfo]:
    """Shape a solution like the caller's argument, inside of the caller's vmaps again."""
    with nullcontext() if vmaps is None else vmaps.entered():
        if vmaps is not None:
            leaves, info = vmaps.wrapped_tree((leaves, info))
        leaves = refuse_derivatives(leaves, sources, _not_differentiable, plain=being_traced())
    return tree.rebuild(leaves), info


def _not_differentiable() -> Exception:
    return UnsupportedOperation(
        "What an inner solver returns is detached: its derivative would go through the iterations. "
        "Call it inside a function that custom_argmin (or custom_root, custom_fixed_point) "
        "decorates, or unroll steps with unrolled_grad."
    )
