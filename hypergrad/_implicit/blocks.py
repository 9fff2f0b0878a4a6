"""The linear solves of many outputs, in blocks that fit a memory budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd.products import Parts
from .._autograd.sizes import bytes_of_product
from .._autograd.torch_pytrees import pytree
from .._autograd.trace import detached
from .._autograd.transforms import forward_mode_active, transforms_active
from .._errors import StructureMismatch, UnsupportedOperation
from .._info import SolveInfo
from .._pytrees import Layout, Tree
from ..conditions._inner_problem import Problem
from .choices import Choices
from .hypergradient import Measured
from .linear_solve import measured
from .linearisation import Linearisation
from .outputs import Finish, Outputs, UseOfBlock
from .verdict import Case, is_good, judge_outputs

_VECTORS = 14  # of a solve, for each right-hand side
_MAPPED = 128  # right-hand sides whose products are formed at once
_MOST = 256  # right-hand sides in a block: their own arithmetic grows with the square


@dataclasses.dataclass(frozen=True)
class BlockCall:
    """The derivatives of many outputs through one inner solution.

    Attributes
    ----------
    problem : Problem
        The inner problem.
    tensors : list of Tensor
        Its tensors, detached.
    choices : Choices
        The caller's.
    lin : Linearisation
        The inner problem at its solution.
    outputs : Outputs
        The outputs.
    finish : Finish
        What is made of a solution.
    memory : float
        The budget, in bytes.
    """

    problem: Problem
    tensors: list[Tensor]
    choices: Choices
    lin: Linearisation
    outputs: Outputs
    finish: Finish
    memory: float

    def answer(
        self, x0: Tensor | None = None
    ) -> tuple[list[Tensor], SolveInfo, tuple[Parts, Parts]]:
        """Solve block after block, and judge all of them together.

        Parameters
        ----------
        x0 : Tensor, optional
            Where the solves start, ``(outputs, n)``.

        Returns
        -------
        leaves, info, terms
            As `joined` returns them.
        """
        blocks, outputs = self.blocks(x0), self.outputs
        return joined(blocks, self.problem, self.choices, outputs.values, outputs.aux)

    def blocks(self, x0: Tensor | None = None) -> Iterator[Measured]:
        """Solve block after block.

        Parameters
        ----------
        x0 : Tensor, optional
            Where the solves start, ``(outputs, n)``.

        Yields
        ------
        block : Measured
            What came of each.
        """
        m, size = len(self.outputs.values), self.block()
        for first in range(0, m, size):
            rows = slice(first, min(first + size, m))
            use = UseOfBlock(self.lin, self.outputs, self.finish, rows, self.tensors)
            start = None if x0 is None else x0[rows]
            answer, case, sound = measured(use, self.choices, use.slope, transpose=True, x0=start)
            parts = answer.leaves, answer.u, answer.info, None, case, sound
            yield Measured(*parts, use.terms)

    def block(self) -> int:
        """Say how many right-hand sides are solved together."""
        item = torch.finfo(self.lin.layout.dtype).bits // 8
        vectors = _VECTORS * self.lin.layout.n * item
        vectors += 3 * sum(self.tensors[i].numel() for i in self.problem.outer) * item
        vectors += len(self.outputs.values) * item
        mapped = max(bytes_of_product(self.lin.record.residual), self.outputs.size)
        together = int(self.memory // (vectors + mapped))
        if together > _MAPPED:
            together = int((self.memory - _MAPPED * mapped) // vectors)
        return min(max(together, 1), _MOST)


def joined(
    blocks: Iterable[Measured], problem: Problem, choices: Choices, values: Tensor, aux: Any
) -> tuple[list[Tensor], SolveInfo, tuple[Parts, Parts]]:
    """Join the derivatives of all outputs, and judge them.

    Parameters
    ----------
    blocks : iterable of Measured
        Those of all outputs, in their order.
    problem, choices
        The inner problem, and the caller's choices.
    values : Tensor
        All outputs.
    aux : pytree
        What was returned beside them.

    Returns
    -------
    leaves : list of Tensor
        What was made of the solutions, with an axis of outputs in front.
    info : SolveInfo
        The evidence, with one entry an output.
    terms : tuple
        The direct and the implicit terms of the last block; None: not connected.
    """
    m, first = len(values), 0
    leaves: list[Tensor] = []
    infos, solutions = [], []
    failures: list[tuple[Case, SolveInfo, Tensor]] = []
    terms: tuple[Parts, Parts] = [], []
    for block in blocks:
        rows = slice(first, first + len(block.u))
        first, terms = rows.stop, block.terms
        if not leaves:
            leaves = [leaf.new_empty((m, *leaf.shape[1:])) for leaf in block.leaves]
        for whole, leaf in zip(leaves, block.leaves, strict=True):
            whole[rows] = leaf
        infos.append(block.info)
        if choices.figures:
            solutions.append(block.u)
        if not is_good(block.case, block.info, block.sound):
            failures.append((block.case, block.info, block.sound))
    info = _joined(infos)
    judge_outputs(failures, m, info)
    if solutions:
        parts = problem.layout().split(torch.cat(solutions))
        info = dataclasses.replace(info, solution=problem.params.fill(parts, (m,)))
    return leaves, dataclasses.replace(info, outer_value=values, aux=aux), terms


def _joined(infos: list[SolveInfo]) -> SolveInfo:
    """Join the evidence of the blocks."""
    if len(infos) == 1:
        return infos[0]
    figures = {
        field.name: torch.cat([getattr(info, field.name) for info in infos])
        for field in dataclasses.fields(SolveInfo)
        if isinstance(getattr(infos[0], field.name), Tensor)
    }
    methods = ", ".join(dict.fromkeys(info.method for info in infos))
    return dataclasses.replace(infos[0], method=methods, **figures)


def refuse_transforms(name: str) -> None:
    """Raise inside of a function transform.

    Raises
    ------
    UnsupportedOperation
        Naming what works there.
    """
    if transforms_active() or forward_mode_active():
        raise UnsupportedOperation(
            f"{name} cannot be called inside a function transform. Call it outside, or take "
            "torch.func.jacrev of an outer function through custom_argmin, which can be mapped "
            "and differentiated."
        )


def plain_tensors(problem: Problem) -> list[Tensor]:
    """Detach the tensors of a problem; those that autograd does not guard are copied."""
    plain = [detached(t) for t in problem.tensors]
    return [t if t.is_floating_point() else t.clone() for t in plain]


def checked_memory(memory: float) -> float:
    """Refuse a budget that is none."""
    if not memory > 0:
        raise ValueError(f"memory must be a positive number of bytes; got {memory!r}.")
    return memory


def leaves_of_start(P: Tree, x0: Any) -> list[Any]:
    """List the leaves of a start that belong to the inner variables; none: it is no such pytree."""
    leaves, spec = pytree.tree_flatten(x0)
    return [leaves[i] for i in P.where] if spec == P.spec else []


def start_of_all(parts: Sequence[Any], layout: Layout, outputs: int) -> Tensor:
    """Take the start of all solves from the leaves of the last solution.

    Parameters
    ----------
    parts : sequence of Tensor
        Shaped like the inner variables, with an axis of all outputs in front.
    layout : Layout
        Theirs.
    outputs : int
        How many there are.

    Returns
    -------
    start : Tensor
        ``(outputs, n)``.

    Raises
    ------
    StructureMismatch
        If they are not shaped so.
    """
    wanted = [(outputs, *shape) for shape in layout.shapes]
    if not parts or [getattr(part, "shape", None) for part in parts] != wanted:
        raise StructureMismatch(
            f"x0 must be shaped like params with an axis of {outputs} outputs in front, as "
            "info.solution of the last call is.",
            argument="x0",
        )
    return layout.flatten([detached(part) for part in parts], (outputs,))
