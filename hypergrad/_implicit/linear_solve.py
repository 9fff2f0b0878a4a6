"""The linear solve of a linearised problem: its answer, the evidence for it, and the judgement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .._autograd.random_numbers import Draw
from .._info import SolveInfo
from ..solvers._system import LinearSystem
from ..solvers._vectors import norm
from .causes import Place, sound_in_value
from .choices import Choices
from .evidence import Evidence
from .linearisation import Linearisation
from .task_norms import finite
from .unknown_nodes import check_nodes
from .uses import Use
from .verdict import judge


@dataclasses.dataclass(frozen=True)
class Answer:
    """A solution, what was made of it, and the evidence.

    Attributes
    ----------
    u : Tensor
        The solution, flat.
    leaves : list of Tensor
        What its `Use` has made of it.
    info : SolveInfo
        The evidence, without `solution`, `outer_value` and `aux`.
    """

    u: Tensor
    leaves: list[Tensor]
    info: SolveInfo


def solved(
    lin: Linearisation,
    choices: Choices,
    b: Tensor,
    tensors: Sequence[Tensor],
    *,
    transpose: bool,
    draw: Draw,
    use: Use,
    places: Callable[[Answer], Iterable[Place]],
    x0: Tensor | None = None,
) -> Answer:
    """Solve ``A u = b``, or with the transpose of A; measure; warn or raise where that is due.

    This is the one place where a linear system of an implicit derivative is solved and judged.

    Parameters
    ----------
    lin : Linearisation
        Where A comes from.
    choices : Choices
        The caller's.
    b : Tensor
        Right-hand sides ``(*tasks, n)``, with a further axis in front where several share A.
    tensors : sequence of Tensor
        Those of the problem, at which it was linearised.
    transpose : bool
        Whether the transpose of A is meant.
    draw : Draw
        The random numbers of the linearisation.
    use : Use
        What the solution is for.
    places : callable
        For an answer, where to look for the first number that is not finite.
    x0 : Tensor, optional
        Where the iteration starts.

    Returns
    -------
    answer : Answer
        The solution and its evidence.
    """
    solver, condition = choices.solver, lin.problem.condition
    symmetric = condition.symmetric
    system = LinearSystem(
        matvec=lin.operator(transpose),
        b=b,
        layout=lin.layout,
        tree=lin.problem.params,
        x0=x0,
        rmatvec=None if lin.record.product is None else lin.operator(not transpose),
        symmetric=symmetric,
        dense=lambda: lin.dense(transpose),
        looks=choices.looks,
        contraction=condition.contraction,
        condition=lin.residual if choices.judged else None,
        explores=choices.judged and condition.minimum,
        transposed=transpose,
        shared=b.shape[0] if b.ndim - 1 > len(lin.lead) else 1,
    )
    if choices.on_failure != "ignore":
        check_nodes(lin, tensors, draw)
    # The solver's own arithmetic.
    with torch.autocast(b.device.type, enabled=False), torch.no_grad():
        solution = solver.solve_flat(system)
        evidence = Evidence(lin, choices, system, solution, tensors, use, transpose, draw)
        if choices.judged:
            evidence.forgive_rounding()
        leaves = use.leaves(solution.x)
        info = evidence.gathered()
    answer = Answer(solution.x, leaves, info)
    sound = finite(info.status.shape, solution.x, *leaves)
    sound = sound & finite(lin.lead, lin.residual, evidence.params)
    for value in use.values():
        sound = sound & torch.isfinite(value)
    sound = sound_in_value(lin, sound)
    judge(
        info,
        solution,
        solver,
        inner_tol=choices.inner_tol,
        on_failure=choices.on_failure,
        cause=evidence.cause,
        condition=norm(lin.residual),
        params=norm(evidence.params),
        sound=sound,
        places=lambda: places(answer),
        kink=condition.kink,
    )
    return answer
