"""A hypergradient by a compiled program: the same call, traced once and replayed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .._autograd.host import every_task
from .._autograd.recording import refuse_past_arguments
from .._autograd.torch_pytrees import pytree
from .._autograd.trace import being_traced, detached
from .._autograd.transforms import is_batched, transforms_active
from .._autograd.vmaps import Vmaps, outside, outside_of_vmaps
from .._compiled.capture import Stage
from .._compiled.session import Body, Session
from .._errors import NotConnected
from .._info import SolveInfo
from ..conditions._base import Condition
from ..conditions._inner_problem import Problem
from ..solvers._base import Solver
from .causes import Place
from .choices import Choices
from .hypergradient import Call, Hypergradient, Measured
from .solve_in_trace import alike, solving_by
from .verdict import Case

#: The figures of a `SolveInfo` that a program computes.
_FIGURES = [
    field.name
    for field in dataclasses.fields(SolveInfo)
    if field.name not in ("solution", "aux", "method")
]

C = TypeVar("C", bound="_Posed")


class _Posed(Protocol):
    """A call on an inner problem."""

    @property
    def problem(self) -> Problem:
        """The inner problem."""

    @property
    def choices(self) -> Choices:
        """The caller's choices."""


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
    cause = refused(call.choices.solver, condition, chain, vmaps)
    if chain is None or cause is not None:
        session.refuse("implicit_grad", str(cause))
        return None

    def body(functions: list[Any], tensors: list[Tensor]) -> Body:
        outer, *inner = functions
        n = len(problem.tensors)
        own = dataclasses.replace(problem, condition=condition.with_functions(inner))
        if not any(map(is_batched, problem.tensors)):  # tasks may share the inner problem
            lead = 0 if vmaps is None else len(vmaps.sizes)
            own = posed_at(own, [t[(0,) * lead] for t in tensors[:n]])
        same = dataclasses.replace(call, outer=outer, problem=own)
        return flat(same.measured(vmaps, tensors[:n], tensors[n:] or None)[0])

    choices, memory = call.choices, call.choices.memory
    known = None if memory is None else memory.export()
    kept = dataclasses.replace(choices, solver=kept_solver(choices, session), memory=None)

    def again() -> None:  # what is learnt of a system is learnt once
        if memory is not None and known is not None:
            memory.load(known)

    with solving_by(choices.solver):
        replay = session.replay(
            "implicit_grad",
            (kept, id(memory), call.has_aux, kind_of(problem)),
            stages(call.outer, condition, chain),
            problem.arguments(variables(problem, plain=vmaps is None)),
            [*problem.tensors, *(call.x0 or ())],
            body,
            vmaps,
            again,
        )
    if replay is None:
        again()
        return None
    if reaches_past_arguments(problem, replay.lifted):
        again()
        return None  # which raises, and says by which function
    measured = put_together(
        Body(replay.tensors, replay.program.static),
        call.choices,
        replay.values[0][1] if call.has_aux else None,
        lambda: outside_of_vmaps(call.answer),
    )
    if session.is_due(replay.program):
        again()
        present = outside_of_vmaps(call.answer)
        learnt = None if memory is None else memory.export()

        def moved() -> list[Tensor]:
            again()
            try:
                with nullcontext() if vmaps is None else vmaps.entered():
                    there = outside_of_vmaps(nudged(call).answer)
            finally:
                if memory is not None and learnt is not None:
                    memory.load(learnt)
            return [t if vmaps is None else vmaps.unwrapped(t) for t in there.leaves]

        plain = [t if vmaps is None else vmaps.unwrapped(t) for t in present.leaves]
        with outside(vmaps):
            rtol = getattr(choices.solver, "rtol", None) or 0.0  # both end somewhere within it
            left = max(float(measured.info.residual_norm.nan_to_num(0.0).max()), rtol)
            sure = every_task(present.info.success)
            session.agree(replay, measured.leaves, plain, moved, left, sure=sure)
        return present
    with outside(vmaps):
        if not every_task(measured.sound):
            again()
            return None  # which is said, or is right, in the order of the call as it is
        call.remember(measured)
        call.judge(measured)
        return call.handed_back(measured, vmaps, replay.lifted)


def stages(outer: Any, condition: Condition, chain: Sequence[int | None]) -> list[Stage]:
    """List the functions of a call, the outer one first, each with that whose value it takes."""
    followed = [None if first is None else first + 1 for first in chain]
    return [(outer, None), *zip(condition.functions(), followed, strict=True)]


def kept_solver(choices: Choices, session: Session) -> Solver:
    """Take the solver by which a program is kept: CUDA graphs record it with its tolerance."""
    return choices.solver if session.backend == "cudagraphs" else alike(choices.solver)


def refused(
    solver: Solver, condition: Condition, chain: Any, vmaps: Vmaps | None = None
) -> str | None:
    """Say why a call is not to be compiled, as far as its arguments tell."""
    if chain is None:
        return f"a condition {type(condition).__name__} with these arguments cannot be captured"
    if being_traced():
        return "it is called by a function that the library differentiates"
    if vmaps is None and transforms_active():
        return "it is called inside a torch.func transform other than vmap"
    if type(solver).__module__.partition(".")[0] != __name__.partition(".")[0]:
        return f"its solver {type(solver).__name__} is none of the library's"
    for name, value in vars(solver).items():
        if callable(value) or isinstance(value, Tensor):
            return f"what its solver's {name} does cannot be captured"
    return None


def kind_of(problem: Problem) -> Hashable:
    """List what a program depends on beside tensors and functions: which tensors are variables."""
    condition: Any = problem.condition
    values = [getattr(condition, field.name) for field in dataclasses.fields(condition)]
    plain = tuple(value for value in values if not callable(value))
    trees = tuple((tuple(t.places), tuple(t.where), tuple(t.same)) for t in problem.trees)
    return type(condition), plain, trees, problem.outer


def variables(problem: Problem, *, plain: bool) -> list[Tensor]:
    """Copy the tensors of a problem, as its functions are given them."""
    tensors = [detached(t) for t in problem.tensors]
    if plain:
        for place in (*problem.inner, *problem.outer):
            tensors[place].requires_grad_()
    return tensors


def reaches_past_arguments(problem: Problem, lifted: Sequence[Tensor]) -> bool:
    """Say whether a captured tensor is one of the arguments."""
    tracked = [t for t in lifted if t.requires_grad]
    if not tracked:
        return False
    try:
        refuse_past_arguments("inner", tracked, [], problem.trees)
    except NotConnected:
        return True
    return False


def posed_at(problem: Problem, tensors: Sequence[Tensor]) -> Problem:
    """Pose a problem with other tensors."""
    trees, start = [], 0
    for tree in problem.trees:
        stop = start + len(tree.tensors)
        trees.append(tree.replaced(tensors[start:stop]))
        start = stop
    return dataclasses.replace(problem, params=trees[0], args=tuple(trees[1:]))


def nudged(call: C) -> C:
    """Move the inner variables by a rounding."""

    def moved(tensor: Tensor) -> Tensor:
        signs = 1 - 2 * (torch.arange(tensor.numel(), device=tensor.device) % 2)
        change = torch.finfo(tensor.dtype).eps * signs.to(tensor.dtype).view(tensor.shape)
        return detached(tensor) * (1 + change)

    tensors = call.problem.tensors
    for place in call.problem.inner:
        tensors[place] = moved(tensors[place])
    return dataclasses.replace(  # type: ignore[type-var]
        call,
        problem=posed_at(call.problem, tensors),
        choices=dataclasses.replace(call.choices, on_failure="ignore"),
    )


def flat(measured: Measured) -> Body:
    """List the tensors of a hypergradient and its evidence, and what is none."""
    case, info = measured.case, measured.info
    aux = pytree.tree_leaves(measured.aux)
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
    return Body(tensors, (info.method, case.kink, case.noisy, leaves, connected))


def put_together(body: Body, choices: Choices, aux: Any, answer: Callable[[], Any]) -> Measured:
    """Put a hypergradient and its evidence together again.

    Parameters
    ----------
    body : Body
        What `flat` has made of it.
    choices : Choices
        The caller's.
    aux : pytree
        What the outer loss has returned beside its value, with any tensors.
    answer : callable
        Makes the call as it is: it raises, and names the place that is not finite.

    Returns
    -------
    measured : Measured
        The same.
    """
    method, kink, noisy, count, connected = body.static
    figures = dict(zip(_FIGURES, body.tensors, strict=False))
    u, sound, cause, eigenvalues, condition, params, *rest = body.tensors[len(_FIGURES) :]
    leaves, of_aux = rest[:count], iter(rest[count:])
    if aux is not None:
        aux = pytree.tree_map_only(Tensor, lambda _: next(of_aux), aux)

    direct, indirect = ([u if some else None for some in terms] for terms in connected)

    def places() -> Iterator[Place]:
        answer()
        return iter(())

    return Measured(
        leaves=leaves,
        u=u,
        info=SolveInfo(**figures, solution=None, aux=None, method=method),
        aux=aux,
        case=Case(
            choices,
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
        rows=next(of_aux, None),
    )
