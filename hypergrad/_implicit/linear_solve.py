"""The linear solve of a linearised problem: its answer, the evidence for it, and the judgement."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .._info import SolveInfo
from ..solvers._system import LinearSystem
from .causes import sound_in_value
from .choices import Choices
from .evidence import Evidence
from .solve_in_trace import solve
from .task_norms import finite
from .unknown_nodes import check_nodes
from .uses import Use
from .verdict import Case, judge


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
    rows : Tensor, optional
        The sizes of the rows of A, where the evidence has measured them.
    """

    u: Tensor
    leaves: list[Tensor]
    info: SolveInfo
    rows: Tensor | None = None


def solved(
    use: Use, choices: Choices, b: Tensor, *, transpose: bool, x0: Tensor | None = None
) -> Answer:
    """Solve ``A u = b``, or with the transpose of A; measure; warn or raise where that is due.

    Parameters
    ----------
    use, choices, b, transpose, x0
        As in `measured`.

    Returns
    -------
    answer : Answer
        The solution and its evidence.
    """
    answer, case, sound = measured(use, choices, b, transpose=transpose, x0=x0)
    judge(case, answer.info, sound)
    return answer


def measured(
    use: Use, choices: Choices, b: Tensor, *, transpose: bool, x0: Tensor | None = None
) -> tuple[Answer, Case, Tensor]:
    """Solve ``A u = b``, or with the transpose of A, and measure how good the answer is.

    This is the one place where a linear system of an implicit derivative is solved.

    Parameters
    ----------
    use : Use
        What the solution is for, and where A comes from.
    choices : Choices
        The caller's.
    b : Tensor
        Right-hand sides ``(*tasks, n)``, with a further axis in front where several share A.
    transpose : bool
        Whether the transpose of A is meant.
    x0 : Tensor, optional
        Where the iteration starts.

    Returns
    -------
    answer : Answer
        The solution and its evidence.
    case : Case
        What it is judged by.
    sound : Tensor
        bool, for each task: all numbers are finite.
    """
    lin, condition = use.lin, use.lin.problem.condition
    noise = lin.measure(b, looks=choices.looks)
    system = LinearSystem(
        matvec=lin.operator(transpose),
        b=b,
        layout=lin.layout,
        tree=lin.problem.params,
        x0=x0,
        rmatvec=None if lin.record.product is None else lin.operator(not transpose),
        symmetric=condition.symmetric,
        dense=lambda: lin.dense(transpose),
        looks=choices.looks,
        contraction=condition.contraction,
        condition=lin.residual if choices.judged else None,
        explores=choices.judged and condition.minimum,
        transposed=transpose,
        shared=b.shape[0] if b.ndim - 1 > len(lin.lead) else 1,
        noise=noise,
        steady=condition.replays and lin.record.differences is None,
        memory=choices.memory,
    )
    if choices.on_failure != "ignore":
        check_nodes(lin)
    # The solver's own arithmetic.
    with torch.autocast(b.device.type, enabled=False), torch.no_grad():
        solution = solve(choices, system)
        solution.matvecs += lin.tried
        evidence = Evidence(use, choices, system, solution)
        given = solution.probe
        if choices.judged:
            evidence.forgive_rounding()
        leaves = use.leaves(solution.x)
        info = evidence.gathered()
        fresh = None if solution.probe is given else solution.probe
    answer = Answer(solution.x, leaves, info, None if fresh is None else fresh.rows)
    if choices.on_failure == "ignore":  # nobody asks
        return answer, evidence.case(), torch.ones_like(info.success)
    sound = finite(info.status.shape, solution.x, *leaves)
    sound = sound & finite(lin.lead, lin.residual, evidence.params)
    for value in use.values():
        sound = sound & torch.isfinite(value)
    return answer, evidence.case(), sound_in_value(lin, sound)
