"""A Jacobian by a compiled program: the same call, traced once and replayed."""

from __future__ import annotations

import dataclasses
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .._autograd.host import every_task
from .._autograd.torch_pytrees import pytree
from .._compiled.capture import NotCaptured
from .._compiled.session import Body, Replayed, Session
from .._info import SolveInfo
from .blocks import joined
from .compiled import (
    flat,
    kept_solver,
    kind_of,
    nudged,
    posed_at,
    put_together,
    reaches_past_arguments,
    refused,
    stages,
    variables,
)
from .hypergradient import Measured
from .jacobian_call import JacobianCall
from .solve_in_trace import solving_by

#: A Jacobian of more blocks is not compiled: their arithmetic takes the time, and a graph of them
#: would be long.
_BLOCKS = 4


def replayed_jacobian(call: JacobianCall, session: Session) -> tuple[Any, SolveInfo] | None:
    """Compute a Jacobian by a program.

    Parameters
    ----------
    call : JacobianCall
        The call.
    session : Session
        Where programs are kept.

    Returns
    -------
    answer : tuple or None
        The Jacobian and its evidence. None: it is to be computed as without a compiler.
    """
    problem, choices = call.problem, call.choices
    condition = problem.condition
    chain = condition.chain()
    cause = refused(choices.solver, condition, chain)
    if chain is None or cause is not None:
        session.refuse("jacobian", str(cause))
        return None
    start = list(call.x0 or ())
    if call.x0 is not None and not (start and all(isinstance(t, Tensor) for t in start)):
        return None  # which raises

    def body(functions: list[Any], tensors: list[Tensor]) -> Body:
        outers, *inner = functions
        n = len(problem.tensors)
        own = dataclasses.replace(problem, condition=condition.with_functions(inner))
        own = posed_at(own, tensors[:n])
        same = dataclasses.replace(call, outers=outers, problem=own, x0=tensors[n:] or None)
        return _flat(same, tensors[:n])

    kept = dataclasses.replace(choices, solver=kept_solver(choices, session))
    with solving_by(choices.solver):
        replay = session.replay(
            "jacobian",
            (kept, call.has_aux, call.memory, kind_of(problem)),
            stages(call.outers, condition, chain),
            problem.arguments(variables(problem, plain=True)),
            [*problem.tensors, *start],
            body,
            None,
        )
    if replay is None or reaches_past_arguments(problem, replay.lifted):
        return None
    blocks, values, aux = _blocks(call, replay)
    if session.is_due(replay.program):
        return _compared(call, session, replay, blocks)
    if not all(every_task(block.sound) for block in blocks):
        return None  # which is said, or is right, in the order of the call as it is
    _, spec, shapes = replay.program.static
    outcome = joined(blocks, problem, choices, values, aux)
    return call.handed_back(*outcome, replay.lifted, spec, shapes)


def _flat(call: JacobianCall, tensors: list[Tensor]) -> Body:
    """List the tensors of a Jacobian and its evidence, and what is none."""
    begun = call.begun(tensors)
    if begun.lin.one_by_one or begun.outputs.one_by_one:
        raise NotCaptured("its products are formed one by one")
    outputs, size = begun.outputs, begun.block()
    if len(outputs.values) > _BLOCKS * size:
        raise NotCaptured(
            f"its {len(outputs.values)} outputs are solved for in more than {_BLOCKS} blocks, "
            "whose arithmetic takes the time"
        )
    parts = [flat(block) for block in begun.blocks(call.start(begun, call.x0))]
    aux = [leaf for leaf in pytree.tree_leaves(outputs.aux) if isinstance(leaf, Tensor)]
    statics = [(len(part.tensors), part.static) for part in parts]
    made = [*(t for part in parts for t in part.tensors), outputs.values, *aux]
    return Body(made, (statics, outputs.spec, [part.shape for part in outputs.parts]))


def _blocks(call: JacobianCall, replay: Replayed) -> tuple[list[Measured], Tensor, Any]:
    """Put the blocks of a Jacobian, its outputs, and what came beside them together again."""
    statics, *_ = replay.program.static
    tensors = iter(replay.tensors)
    blocks = [
        put_together(Body(list(islice(tensors, count)), static), call.choices, None, call.answer)
        for count, static in statics
    ]
    values = next(tensors)
    aux = replay.values[0][1] if call.has_aux else None
    return blocks, values, pytree.tree_map_only(Tensor, lambda _: next(tensors), aux)


def _compared(
    call: JacobianCall, session: Session, replay: Replayed, blocks: list[Measured]
) -> tuple[Any, SolveInfo]:
    """Make the call as it is, and compare it with its replay."""
    present = call.solved()
    ours = [torch.cat(parts) for parts in zip(*(b.leaves for b in blocks), strict=True)]
    rtol = getattr(call.choices.solver, "rtol", None) or 0.0  # both end somewhere within it
    left = max(rtol, *(float(b.info.residual_norm.nan_to_num(0.0).max()) for b in blocks))
    sure = every_task(present.info.success)
    session.agree(
        replay, ours, present.leaves, lambda: nudged(call).solved().leaves, left, sure=sure
    )
    return call.handed_back(*present)
