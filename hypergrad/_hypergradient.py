"""One hypergradient: the direct term minus the cross derivative times the linear solve."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._advice import changed_in_place
from ._captures import refuse_distributed, refuse_past_arguments
from ._conditions import Minimum, as_condition
from ._errors import UnsupportedOperation
from ._evidence import finite, needs_product, of_sum, solve_linear
from ._info import SolveInfo
from ._linearise import Linearisation
from ._outer import outer_gradient
from ._problem import Problem
from ._randomness import Draw
from ._report import OnFailure, check_on_failure, judge, may_look, warn_of_unused
from ._trace import being_traced, detached, versions
from ._transforms import refuse_derivatives
from ._tree import Tree
from ._vmaps import Vmaps, outside_of_vmaps
from .solvers import Solver, choose
from .solvers._base import mapped_by_caller, norm


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


def hypergradient(
    outer: Callable[[Any, Any], Any],
    inner: Any,
    params: Any,
    hparams: Any,
    solver: Solver | None,
    x0: Any,
    has_aux: bool,
    inner_tol: float | None,
    on_failure: OnFailure,
    return_info: bool,
) -> Hypergradient:
    """Compute what `implicit_grad` returns; the arguments are its own."""
    check_on_failure(on_failure)
    condition = as_condition(inner, Minimum)
    P, H = Tree("params", params, skip_frozen=True), Tree("hparams", hparams)
    call = _Call(
        outer=outer,
        problem=Problem.of(condition, P, [H]),
        solver=choose(solver, condition.symmetric),
        x0=None if x0 is None else P.match("x0", x0),
        has_aux=has_aux,
        inner_tol=inner_tol,
        on_failure=on_failure,
        return_info=return_info,
    )
    refuse_distributed(condition.functions(), outer)
    return call.answer(None) if mapped_by_caller(call.solver) else outside_of_vmaps(call.answer)


@dataclasses.dataclass(frozen=True)
class _Call:
    """One hypergradient: of one system, or outside the caller's vmaps of all their tasks at once.

    Inside, tensors have the task dimensions of `vmaps` in front, and `lead` are their sizes.
    """

    outer: Callable[[Any, Any], Any]
    problem: Problem
    solver: Solver
    x0: list[Tensor] | None
    has_aux: bool
    inner_tol: float | None
    on_failure: OnFailure
    return_info: bool

    def answer(self, vmaps: Vmaps | None) -> Hypergradient:
        problem = self.problem if vmaps is None else self.problem.outside(vmaps)
        P, H = problem.params, problem.args[0]
        layout = problem.layout()
        lead = () if vmaps is None else vmaps.sizes

        def plain(tensor: Tensor) -> Tensor:
            return detached(tensor if vmaps is None else vmaps.unwrapped(tensor))

        # Autograd stops a loss that changes a float argument in place; the others are copies.
        tensors = [plain(t) if t.is_floating_point() else plain(t).clone() for t in problem.tensors]
        start = None if self.x0 is None else layout.flatten([plain(t) for t in self.x0], lead)
        before = versions(tensors)
        value, aux, cotangent, direct, sources = outer_gradient(
            self.outer, problem, tensors, self.has_aux
        )
        forward = needs_product(self.solver, problem.condition, transpose=True)
        lin = Linearisation(problem, tensors, Draw(), forward=forward)
        refuse_past_arguments("inner", lin.record.values, lin.aliases, [P, H])

        _refuse_changed(problem, tensors, before)
        b = layout.flatten(cotangent, lead)
        u, info, found = solve_linear(
            lin,
            self.solver,
            b,
            layout.flatten([tensors[i] for i in problem.inner], lead),
            transpose=True,
            inner_tol=self.inner_tol,
            x0=start,
            looks=may_look(self.solver, self.on_failure),
            estimate=self.return_info,
        )
        indirect = lin.cross(u)
        outer_variables = [tensors[i] for i in problem.outer]
        leaves = [
            _difference(d, c, h) for d, c, h in zip(direct, indirect, outer_variables, strict=True)
        ]
        estimate = info.error_estimate
        if self.return_info:
            estimate = of_sum(estimate, indirect, leaves)
        info = dataclasses.replace(info, error_estimate=estimate, outer_value=value)

        def places() -> Any:
            for position, place in enumerate(problem.inner):
                yield P.variable_path(position), tensors[place]
            for position, place in enumerate(problem.outer):
                yield H.variable_path(position), tensors[place]
            yield "the outer loss", value
            for i, part in enumerate(cotangent):
                if part is not None:
                    yield f"the gradient of the outer loss by {P.variable_path(i)}", part
            for i, part in enumerate(direct):
                if part is not None:
                    yield f"the gradient of the outer loss by {H.variable_path(i)}", part
            for i, part in enumerate(layout.split(lin.residual)):
                yield f"the inner condition (its gradient) at {P.variable_path(i)}", part
            for i, part in enumerate(layout.split(lin.transposed(torch.ones_like(b)))):
                yield f"the product with the inner Hessian at {P.variable_path(i)}", part
            for i, part in enumerate(layout.split(u)):
                yield f"the solution of the linear system at {P.variable_path(i)}", part
            for i, part in enumerate(indirect):
                if part is not None:
                    yield f"the cross derivative by {H.variable_path(i)}", part

        judge(
            info,
            found,
            self.solver,
            inner_tol=self.inner_tol,
            on_failure=self.on_failure,
            condition=norm(lin.residual),
            sound=finite(lead, value, lin.residual, u, *leaves),
            places=places,
            kink=problem.condition.kink,
        )
        if self.on_failure != "ignore":
            warn_of_unused(H, "Neither outer nor inner", direct, indirect)
        sources = [*self.problem.tensors, *sources, *lin.captured]
        with nullcontext() if vmaps is None else vmaps.entered():
            if self.return_info:
                solution = layout.split(u)
                if vmaps is not None:
                    solution, info = vmaps.wrapped_tree((solution, info))
                info = dataclasses.replace(info, solution=P.fill(solution))
            if vmaps is not None:
                leaves = [vmaps.wrapped(leaf) for leaf in leaves]
            leaves = refuse_derivatives(leaves, sources, _not_differentiable, plain=being_traced())
            aux = pytree.tree_map_only(Tensor, torch.Tensor.detach, aux)
            info = dataclasses.replace(info, aux=aux)
            return Hypergradient(H.fill(leaves), leaves, info)


def _difference(direct: Tensor | None, indirect: Tensor | None, like: Tensor) -> Tensor:
    if direct is None and indirect is None:
        return torch.zeros_like(like.detach())
    if indirect is None:
        assert direct is not None
        return direct.detach().clone(memory_format=torch.contiguous_format)
    if direct is None:
        return -indirect.detach()
    return (direct - indirect).detach()


def _refuse_changed(problem: Problem, tensors: list[Tensor], before: list[int]) -> None:
    """Raise if a loss has changed one of its arguments in place."""
    for place, (then, now) in enumerate(zip(before, versions(tensors), strict=True)):
        if then != now:
            raise changed_in_place("A loss", problem.path(place))


def _not_differentiable() -> Exception:
    return UnsupportedOperation(
        "implicit_grad returns a detached hypergradient that cannot be differentiated again. Make "
        "the inner solver differentiable with custom_argmin, and differentiate outer through it."
    )
