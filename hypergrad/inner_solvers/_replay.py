"""Fixed inner steps by a compiled program: all of them traced once, in one graph, and replayed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .._autograd.torch_pytrees import pytree
from .._autograd.trace import being_traced, detached
from .._autograd.transforms import transforms_active
from .._autograd.vmaps import Vmaps
from .._compiled.session import Body, Replayed, Session
from .._pytrees import Layout, Tree
from ._evaluator import Evaluator
from ._info import InnerInfo

if TYPE_CHECKING:
    from ._base import InnerSolver

#: So many steps are traced at most; a graph holds them one after the other.
_MOST = 200
_FIGURES = [field.name for field in dataclasses.fields(InnerInfo) if field.name != "method"]


class Steps(NamedTuple):
    """Where the steps ended, with task dimensions in front.

    Attributes
    ----------
    leaves : list of Tensor
        The solution.
    info : InnerInfo
        How it ended.
    replay : Replayed
        How they were made.
    """

    leaves: list[Tensor]
    info: InnerInfo
    replay: Replayed


def replayed(
    solver: InnerSolver, session: Session, fun: Callable[..., Any], init: Any, args: tuple[Any, ...]
) -> Steps | None:
    """Make the steps of a solver by a program.

    Parameters
    ----------
    solver : InnerSolver
        The method.
    session : Session
        Where programs are kept.
    fun : callable
        The objective.
    init : pytree of Tensor
        Where it starts.
    args : tuple
        The objective's further arguments.

    Returns
    -------
    steps : Steps or None
        None: they are to be made as without a compiler.
    """
    vmaps, name = Vmaps.around(), type(solver).__name__
    fields = {f.name: getattr(solver, f.name) for f in dataclasses.fields(solver)}  # type: ignore[arg-type]
    step = fields.pop("step_size", None)
    if solver.tol != 0 or step is None or solver.maxiter > _MOST:
        cause = f"its steps are not fixed: pass a step_size, tol=0 and at most {_MOST} for maxiter"
        session.fall_back((name, type(solver)), cause)
        return None
    if any(map(callable, fields.values())):
        session.fall_back((name, type(solver)), "a function that it holds is not followed")
        return None
    if being_traced() or (vmaps is None and transforms_active()):
        return None
    leaves, spec = pytree.tree_flatten((init, args))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    of_step = [step] if isinstance(step, Tensor) else []

    def rebuilt(tensors: Sequence[Tensor]) -> tuple[Any, tuple[Any, ...]]:
        given = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        init, args = pytree.tree_unflatten(given, spec)
        return init, args

    def body(functions: list[Any], tensors: list[Tensor]) -> Body:
        wrapped = tensors if vmaps is None else [vmaps.wrapped(t) for t in tensors]
        init, args = rebuilt(wrapped[: len(places)])
        own = solver
        if of_step:
            own = dataclasses.replace(solver, step_size=wrapped[-1])  # type: ignore[type-var]
        tree = Tree("init", init)
        evaluator = Evaluator(functions[0], tree, Layout(tree, tree.variables), args, vmaps)
        ended, info = own._ended(evaluator)
        return Body([*ended, *(getattr(info, name) for name in _FIGURES)], info.method)

    tensors = [leaves[place] for place in places]
    init, args = rebuilt([detached(t) for t in tensors])
    key = type(solver), *fields.items(), None if of_step else step
    given = [*tensors, *of_step]
    replay = session.replay(name, key, [(fun, None)], (init, *args), given, body, vmaps)
    if replay is None:
        return None
    count = len(replay.tensors) - len(_FIGURES)
    figures = dict(zip(_FIGURES, replay.tensors[count:], strict=True))
    info = InnerInfo(**figures, method=replay.program.static)
    return Steps(replay.tensors[:count], info, replay)
