"""One Jacobian: the outputs, the inner problem that they share, and what is handed back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._autograd.products import Parts
from .._autograd.random_numbers import Draw
from .._autograd.recording import refuse_past_arguments
from .._autograd.refusals import refuse_derivatives
from .._autograd.torch_pytrees import pytree
from .._autograd.trace import being_traced, versions
from .._errors import UnsupportedOperation
from .._info import SolveInfo
from .._warnings import warn_of_unused
from ..conditions._inner_problem import Problem
from .blocks import BlockCall, plain_tensors, start_of_all
from .choices import Choices, needs_product
from .hypergradient import refuse_changed
from .linearisation import Linearisation
from .outputs import Outputs, shared_out


class Solved(NamedTuple):
    """What `JacobianCall.handed_back` makes the answer of; its arguments."""

    leaves: list[Tensor]
    info: SolveInfo
    terms: tuple[Parts, Parts]
    captured: Sequence[Tensor]
    spec: pytree.TreeSpec
    shapes: Sequence[torch.Size]


@dataclasses.dataclass(frozen=True)
class JacobianCall:
    """A call of `jacobian`.

    Attributes
    ----------
    outers : callable
        The outputs.
    problem : Problem
        The inner problem.
    choices : Choices
        The caller's.
    x0 : list of Tensor, optional
        Where the linear solves start, as leaves; without any, what was passed has another
        structure.
    has_aux : bool
        Whether `outers` returns something beside the outputs.
    memory : float
        The bytes that a block may take.
    """

    outers: Callable[[Any, Any], Any]
    problem: Problem
    choices: Choices
    x0: Sequence[Any] | None
    has_aux: bool
    memory: float

    def answer(self) -> tuple[Any, SolveInfo]:
        """Compute the Jacobian, and judge it."""
        return self.handed_back(*self.solved())

    def solved(self) -> Solved:
        """Solve for all outputs, and judge them."""
        block = self.begun(plain_tensors(self.problem))
        outcome = block.answer(self.start(block, self.x0))
        captured = [*block.outputs.captured, *block.lin.captured]
        shapes = [part.shape for part in block.outputs.parts]
        return Solved(*outcome, captured, block.outputs.spec, shapes)

    def begun(self, tensors: list[Tensor]) -> BlockCall:
        """Evaluate and record the outputs and the inner problem at these tensors."""
        problem, choices = self.problem, self.choices
        before = versions(tensors)
        draw = Draw()
        outputs = Outputs("outers", self.outers, problem, tensors, self.has_aux, draw)
        forward = needs_product(choices.solver, problem.condition, transpose=True)
        lin = Linearisation(problem, tensors, Draw(after=draw), forward=forward)
        refuse_past_arguments(
            "inner", lin.record.values, lin.aliases, [problem.params, *problem.args]
        )
        refuse_changed(problem, tensors, before)
        return BlockCall(problem, tensors, choices, lin, outputs, lin, self.memory)

    def start(self, block: BlockCall, x0: Sequence[Any] | None) -> Tensor | None:
        """Take the start of all solves from its leaves."""
        return None if x0 is None else start_of_all(x0, block.lin.layout, len(block.outputs.values))

    def handed_back(
        self,
        leaves: list[Tensor],
        info: SolveInfo,
        terms: tuple[Parts, Parts],
        captured: Sequence[Tensor],
        spec: pytree.TreeSpec,
        shapes: Sequence[torch.Size],
    ) -> tuple[Any, SolveInfo]:
        """Shape the answer like that of `torch.func.jacrev`.

        Parameters
        ----------
        leaves, info, terms
            As `joined` returns them.
        captured : sequence of Tensor
            Values that depend on something that is differentiated around the call.
        spec, shapes
            What the outputs are.

        Returns
        -------
        jacobian : pytree of Tensor
            What `jacobian` returns.
        info : SolveInfo
            The evidence.
        """
        H = self.problem.args[0]
        if self.choices.on_failure != "ignore":
            warn_of_unused(H, "Neither outers nor inner", *terms)
        sources = [*self.problem.tensors, *captured]
        leaves = refuse_derivatives(leaves, sources, _not_differentiable, plain=being_traced())
        shared = zip(shapes, shared_out(shapes, leaves), strict=True)
        filled = [H.fill(derivatives, shape) for shape, derivatives in shared]
        return pytree.tree_unflatten(filled, spec), info


def _not_differentiable() -> Exception:
    return UnsupportedOperation(
        "jacobian returns detached derivatives that cannot be differentiated again. Make the inner "
        "solver differentiable with custom_argmin, and take torch.func.jacrev through it."
    )
