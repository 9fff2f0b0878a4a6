"""One hypergradient: the direct term minus the cross derivative times the linear solve."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .._autograd.double_backward import changed_in_place
from .._autograd.products import Parts
from .._autograd.random_numbers import Draw, generators, restore, same
from .._autograd.recording import refuse_past_arguments
from .._autograd.refusals import refuse_derivatives
from .._autograd.torch_pytrees import pytree
from .._autograd.trace import being_traced, detached, versions
from .._autograd.transforms import is_batched
from .._autograd.vmaps import Vmaps
from .._errors import UnsupportedOperation
from .._info import SolveInfo
from .._warnings import warn_of_unused
from ..conditions._inner_problem import Problem
from .choices import Choices, needs_product
from .linear_solve import measured
from .linearisation import Linearisation
from .terms import OuterLoss, Terms
from .verdict import Case, judge

_BENDS = 0.1  # the relative change of a slope that is a bend
_CANCELLED = 1e-2  # the rest of two terms that cancel counts as so much of them at least


@dataclasses.dataclass
class Hypergradient:
    """The answer: as a pytree, its variables in their order, and the evidence.

    Attributes
    ----------
    grads : pytree of Tensor
        Shaped like `hparams`.
    leaves : list of Tensor
        Its variables.
    info : SolveInfo
        With all figures where they were asked for, else with those that the judgement needs.
    """

    grads: Any
    leaves: list[Tensor]
    info: SolveInfo


@dataclasses.dataclass(frozen=True)
class Measured:
    """A hypergradient that has been computed and measured, and is not judged yet.

    Attributes
    ----------
    leaves : list of Tensor
        The hypergradient, with task dimensions in front.
    u : Tensor
        The solution of the linear system, flat.
    info : SolveInfo
        The evidence, without the solution.
    aux : pytree
        What the outer loss has returned beside its value.
    case : Case
        What it is judged by.
    sound : Tensor
        bool, for each task: all numbers are finite.
    terms : tuple
        The direct and the implicit terms, as far as judging goes: None: not connected.
    rows : Tensor, optional
        The sizes of the rows of A, where the evidence has measured them.
    """

    leaves: list[Tensor]
    u: Tensor
    info: SolveInfo
    aux: Any
    case: Case
    sound: Tensor
    terms: tuple[Parts, Parts]
    rows: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """One hypergradient: of one system, or outside the caller's vmaps of all their tasks at once.

    Inside, tensors have the task dimensions of `vmaps` in front, and `lead` are their sizes.

    Attributes
    ----------
    outer : callable
        The outer loss.
    problem : Problem
        The inner problem.
    choices : Choices
        The caller's.
    x0 : list of Tensor, optional
        Where the linear solve starts.
    has_aux : bool
        Whether the outer loss returns something beside its value.
    """

    outer: Callable[[Any, Any], Any]
    problem: Problem
    choices: Choices
    x0: list[Tensor] | None
    has_aux: bool

    def answer(self, vmaps: Vmaps | None) -> Hypergradient:
        """Compute the hypergradient, and judge it."""

        def plain(tensor: Tensor) -> Tensor:
            return detached(tensor if vmaps is None else vmaps.unwrapped(tensor))

        # Autograd stops a loss that changes a float argument in place; the others are copies.
        tensors = [plain(t) for t in self.problem.tensors]
        tensors = [t if t.is_floating_point() else t.clone() for t in tensors]
        measured, captured = self.measured(
            vmaps, tensors, None if self.x0 is None else [plain(t) for t in self.x0]
        )
        self.remember(measured)
        self.judge(measured)
        return self.handed_back(measured, vmaps, captured)

    def measured(
        self, vmaps: Vmaps | None, tensors: list[Tensor], x0: list[Tensor] | None
    ) -> tuple[Measured, list[Tensor]]:
        """Compute the hypergradient, and measure how good it is.

        Parameters
        ----------
        vmaps : Vmaps, optional
            The caller's, which have been left.
        tensors, x0 : list of Tensor
            The problem's, and where the linear solve starts, outside of them.

        Returns
        -------
        measured : Measured
            The hypergradient and its evidence.
        captured : list of Tensor
            Values of the losses that depend on something that is differentiated around the call.
        """
        problem = self.problem if vmaps is None else self.problem.outside(vmaps)
        P, H = problem.params, problem.args[0]
        lead, choices = () if vmaps is None else vmaps.sizes, self.choices
        start = None if x0 is None else problem.layout().flatten(x0, lead)
        before = versions(tensors)
        of_outer = Draw()
        of_inner = Draw(after=of_outer)
        loss = OuterLoss(self.outer, problem, self.has_aux, of_outer)
        at = loss.at(tensors)
        forward = needs_product(choices.solver, problem.condition, transpose=True)
        lin = None if vmaps is None else self._of_all_tasks(vmaps, of_inner, forward)
        if lin is None:
            lin = Linearisation(problem, tensors, of_inner, forward=forward)
        if not choices.judged:  # then neither loss is evaluated again, but for products
            of_outer.forget()
            if problem.condition.replays:
                of_inner.forget()
        refuse_past_arguments("inner", lin.record.values, lin.aliases, [P, H])

        refuse_changed(problem, tensors, before)
        use = Terms(lin, loss, tensors, at, judged=choices.judged)
        answer, case, sound = measured(use, choices, use.slope, transpose=True, x0=start)
        info = dataclasses.replace(answer.info, outer_value=at.value)
        terms = at.direct, use.indirect
        parts = answer.leaves, answer.u, info, at.aux, case, sound, terms
        outcome = Measured(*parts, answer.rows)
        return outcome, [*at.captured, *lin.captured]

    def remember(self, measured: Measured) -> None:
        """Keep for the next solve of the same system what the evidence has measured."""
        if self.choices.memory is not None:
            self.choices.memory.note(measured.info.inner_residual, measured.rows)

    def judge(self, measured: Measured) -> None:
        """Warn or raise where that is due."""
        judge(measured.case, measured.info, measured.sound)
        if self.choices.on_failure != "ignore":
            warn_of_unused(self.problem.args[0], "Neither outer nor inner", *measured.terms)

    def handed_back(
        self, measured: Measured, vmaps: Vmaps | None, captured: Sequence[Tensor]
    ) -> Hypergradient:
        """Shape the answer as the caller's arguments are, inside of the vmaps again."""
        P, H = self.problem.params, self.problem.args[0]
        leaves, info = measured.leaves, measured.info
        sources = [*self.problem.tensors, *captured]
        with nullcontext() if vmaps is None else vmaps.entered():
            if self.choices.figures:
                solution = self.problem.layout().split(measured.u)
                if vmaps is not None:
                    solution, info = vmaps.wrapped_tree((solution, info))
                info = dataclasses.replace(info, solution=P.fill(solution))
            if vmaps is not None:
                leaves = [vmaps.wrapped(leaf) for leaf in leaves]
            leaves = refuse_derivatives(leaves, sources, _not_differentiable, plain=being_traced())
            if measured.aux is not None:
                aux = pytree.tree_map_only(Tensor, torch.Tensor.detach, measured.aux)
                info = dataclasses.replace(info, aux=aux)
            return Hypergradient(H.fill(leaves), leaves, info)

    def _of_all_tasks(self, vmaps: Vmaps, draw: Draw, forward: bool) -> Linearisation | None:
        """Evaluate the inner problem, and its matrix, once where all tasks of a vmap share it.

        So it is where test points are mapped over. None where a task has anything of its own: a
        variable, what the functions close over, or random numbers.

        Parameters
        ----------
        vmaps : Vmaps
            The caller's, which have been left.
        draw : Draw
            The random numbers of the inner problem.
        forward : bool
            Whether products with A itself are wanted.

        Returns
        -------
        lin : Linearisation or None
            Without task dimensions.
        """
        if len(vmaps.sizes) != 1 or any(is_batched(t) for t in self.problem.tensors):
            return None
        before = generators()
        tensors = [detached(t) for t in self.problem.tensors]
        try:
            lin = Linearisation(self.problem, tensors, draw, forward=forward)
        except Exception:  # a task's closure cannot be used here: see what fails there
            restore(before)
            draw.forget()
            return None
        if not same(before, generators()):
            restore(before)
            draw.forget()
            return None
        return lin


def refuse_changed(problem: Problem, tensors: list[Tensor], before: list[int]) -> None:
    """Raise if a loss has changed one of its arguments in place."""
    for place, (then, now) in enumerate(zip(before, versions(tensors), strict=True)):
        if then != now:
            raise changed_in_place("A loss", problem.path(place), leaf=problem.path(place))


def _not_differentiable() -> Exception:
    return UnsupportedOperation(
        "implicit_grad returns a detached hypergradient that cannot be differentiated again. Make "
        "the inner solver differentiable with custom_argmin, and differentiate outer through it."
    )
