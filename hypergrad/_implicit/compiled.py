"""A hypergradient by a compiled program: the same call, traced once and replayed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._autograd.trace import being_traced, detached
from .._autograd.transforms import transforms_active
from .._autograd.vmaps import Vmaps, outside, outside_of_vmaps
from .._compiled.session import Body, Session
from .causes import Place
from .verdict import Case

if TYPE_CHECKING:
    from .hypergradient import Call, Hypergradient


def compiled(call: Call, session: Session) -> Hypergradient | None:
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
    vmaps, condition = Vmaps.around(), call.problem.condition
    chain = condition.chain()
    if chain is None or being_traced() or (vmaps is None and transforms_active()):
        return None
    problem, n = call.problem, len(call.problem.tensors)
    followed = [None if first is None else first + 1 for first in chain]
    stages = [(call.outer, None), *zip(condition.functions(), followed, strict=True)]
    tensors = [*problem.tensors, *(call.x0 or ())]

    def body(functions: list[Any], tensors: list[Tensor]) -> Body:
        outer, *inner = functions
        own = dataclasses.replace(problem, condition=condition.with_functions(inner))
        same = dataclasses.replace(call, outer=outer, problem=own)
        start = None if call.x0 is None else tensors[n:]
        measured, _ = same.measured(vmaps, tensors[:n], start)
        case = measured.case
        figures = case.cause, case.eigenvalues(), case.condition(), case.params()
        known = [[True if term is None else None for term in terms] for terms in measured.terms]
        tensor_parts = dataclasses.replace(measured, case=None, terms=None)
        parts = {f.name: getattr(measured, f.name) for f in dataclasses.fields(measured)}
        del parts["case"], parts["terms"], tensor_parts
        return Body((parts, figures), (case.kink, case.noisy, known))

    arguments = problem.arguments([detached(t) for t in problem.tensors])
    key = call.choices, call.has_aux, call.x0 is None, type(condition)
    replayed = session.replay("implicit_grad", key, stages, arguments, tensors, body, vmaps)
    if replayed is None:
        return None
    parts, (cause, eigenvalues, F, params) = replayed.tensors
    kink, noisy, known = replayed.program.static

    def places() -> Iterator[Place]:
        outside_of_vmaps(call.answer)  # which raises, and names the place
        return iter(())

    case = Case(
        call.choices, kink, noisy, cause, lambda: eigenvalues, lambda: F, lambda: params, places
    )
    terms = [[None if none else parts["sound"] for none in part] for part in known]
    measured = _measured(parts, case, terms)
    if session.is_due(replayed.program):
        present = outside_of_vmaps(call.answer)
        whole = [t if vmaps is None else vmaps.unwrapped(t) for t in present.leaves]
        with outside(vmaps):
            session.agree(replayed.program, measured.leaves, whole)
        return present
    with outside(vmaps):
        call.judge(measured)
        return call.handed_back(measured, vmaps, ())


def _measured(parts: dict[str, Any], case: Case, terms: Any) -> Any:
    from .hypergradient import Measured

    return Measured(**parts, case=case, terms=tuple(terms))
