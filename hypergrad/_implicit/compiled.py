"""A hypergradient by a compiled program: the same call, traced once and replayed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .._autograd.torch_pytrees import pytree
from .._autograd.trace import being_traced, detached
from .._autograd.transforms import transforms_active
from .._autograd.vmaps import Vmaps, outside, outside_of_vmaps
from .._compiled.session import Body, Replayed, Session
from .._info import SolveInfo
from ..conditions._base import Condition
from .causes import Place
from .hypergradient import Call, Hypergradient, Measured
from .solve_in_trace import alike, solving_by
from .verdict import Case

#: The figures of a `SolveInfo` that a program computes.
_FIGURES = [
    field.name
    for field in dataclasses.fields(SolveInfo)
    if field.name not in ("solution", "aux", "method")
]


def replayed(call: Call, session: Session) -> Hypergradient | None:
    """Compute a hypergradient by a program.

    Parameters
    ----------
    call : Call
        The call.
    session : Session
        Where programs are kept.

    Returns
    -------
    hypergradient : Hypergradient or None
        None: it is to be computed as without a compiler.
    """
    vmaps, problem = Vmaps.around(), call.problem
    condition = problem.condition
    chain = condition.chain()
    if chain is None:
        cause = f"the functions of {_named(condition)} are not followed"
        session.fall_back(("implicit_grad", type(condition)), cause)
        return None
    if being_traced() or (vmaps is None and transforms_active()):
        return None
    followed = [None if first is None else first + 1 for first in chain]
    stages = [(call.outer, None), *zip(condition.functions(), followed, strict=True)]

    def body(functions: list[Any], tensors: list[Tensor]) -> Body:
        outer, *inner = functions
        own = dataclasses.replace(problem, condition=condition.with_functions(inner))
        same = dataclasses.replace(call, outer=outer, problem=own)
        n = len(problem.tensors)
        return _flat(same.measured(vmaps, tensors[:n], tensors[n:] or None)[0])

    choices, memory = call.choices, call.choices.memory
    known = None if memory is None else memory.export()

    def again() -> None:  # what is learnt of a system is learnt once
        if memory is not None and known is not None:
            memory.load(known)

    kept = dataclasses.replace(choices, solver=alike(choices.solver), memory=None)
    with solving_by(choices.solver):
        replay = session.replay(
            "implicit_grad",
            (kept, id(memory), call.has_aux, type(condition), condition.symmetric),
            stages,
            problem.arguments([detached(t) for t in problem.tensors]),
            [*problem.tensors, *(call.x0 or ())],
            body,
            vmaps,
            again,
        )
    if replay is None:
        return None
    measured = _measured(call, replay)
    if session.is_due(replay.program):
        again()
        present = outside_of_vmaps(call.answer)
        plain = [t if vmaps is None else vmaps.unwrapped(t) for t in present.leaves]
        with outside(vmaps):
            rtol = getattr(choices.solver, "rtol", None) or 0.0
            session.agree(replay.program, measured.leaves, plain, rtol)
        return present
    with outside(vmaps):
        call.remember(measured)
        call.judge(measured)
        return call.handed_back(measured, vmaps, replay.lifted)


def _named(condition: Condition) -> str:
    """Name a condition that has functions of which nothing is known."""
    kind = type(condition).__name__
    if getattr(condition, "products", "exact") != "exact":
        return f'{kind}(products="difference")'
    return f"{kind} with batches" if getattr(condition, "batches", None) is not None else kind


def _flat(measured: Measured) -> Body:
    """List the tensors of a hypergradient and its evidence, and what is none."""
    case, info = measured.case, measured.info
    aux, spec = pytree.tree_flatten(measured.aux)
    constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in aux]
    # Of a warning, whose text has no figures, they are not asked for.
    wanted = case.choices.figures or case.choices.on_failure == "raise"
    eigenvalues = case.eigenvalues() if wanted else info.residual_norm.new_full((2,), math.nan)
    connected = [[part is not None for part in terms] for terms in measured.terms]
    tensors = [
        *(getattr(info, name) for name in _FIGURES),
        measured.u, measured.sound, case.cause, eigenvalues, case.condition(),
        case.params(), *measured.leaves,
        *(leaf for leaf in aux if isinstance(leaf, Tensor)),
        *(() if measured.rows is None else (measured.rows,)),
    ]  # fmt: skip
    leaves = len(measured.leaves)
    return Body(tensors, (info.method, case.kink, case.noisy, leaves, connected, constants, spec))


def _measured(call: Call, replay: Replayed) -> Measured:
    """Put a hypergradient and its evidence together again."""
    tensors = replay.tensors
    method, kink, noisy, count, connected, constants, spec = replay.program.static
    figures = dict(zip(_FIGURES, tensors, strict=False))
    u, sound, cause, eigenvalues, condition, params, *rest = tensors[len(_FIGURES) :]
    leaves, others = rest[:count], iter(rest[count:])
    aux = [next(others) if held is None else held[0] for held in constants]

    direct, indirect = ([u if some else None for some in terms] for terms in connected)

    def places() -> Iterator[Place]:
        outside_of_vmaps(call.answer)  # which raises, and names the place
        return iter(())

    return Measured(
        leaves=leaves,
        u=u,
        info=SolveInfo(**figures, solution=None, aux=None, method=method),
        aux=pytree.tree_unflatten(aux, spec),
        case=Case(
            call.choices,
            kink,
            noisy,
            cause,
            lambda: eigenvalues.expand(*cause.shape, 2),
            lambda: condition,
            lambda: params,
            places,
        ),
        sound=sound,
        terms=(direct, indirect),
        rows=next(others, None),
    )
