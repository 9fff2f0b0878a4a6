"""The two autograd functions that make an inner solution differentiable, to any order.

`ImplicitSolution` is the identity on a solution and carries the implicit derivative.
`LinearSolve` is the linear solve; its derivatives call it again, so that every order is there.
Both carry the problem, and their vmap rules add a task axis to it. Systems are always solved in
plain tensors with task dimensions in front.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd.products import ForwardReplay, Replay, filled
from .._autograd.random_numbers import Draw
from .._autograd.refusals import refuse_old_vmap
from .._autograd.search import in_front
from .._autograd.transforms import (
    alive,
    forward_mode_active,
    lower_levels,
    primal,
    transforms_active,
)
from .._errors import UnsupportedOperation
from .._info import SolveInfo
from .._warnings import warn
from ..conditions._inner_problem import Problem, TaskAxis
from .choices import Choices, needs_product
from .linear_solve import solved
from .linearisation import Linearisation, no_second_derivative
from .uses import Use

_ONCE = (
    "The solution lies in pieces on several processes (DTensor): it has a first derivative by "
    "backward(), and none in forward mode or of higher order. Leave out create_graph=True and "
    "torch.func transforms, or use whole tensors, tensor.full_tensor()."
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a solution is differentiated: a problem and the caller's choices.

    Attributes
    ----------
    problem : Problem
        The inner problem.
    choices : Choices
        The linear solver and the rest; all figures where there is a callback.
    callback : callable or None
        As in the decorators.
    draw : Draw
        The random numbers that all evaluations of this solution share.
    captured : str
        The names of tensors that the functions capture and that carry derivatives.
    """

    problem: Problem
    choices: Choices
    callback: Callable[[SolveInfo], Any] | None
    draw: Draw
    captured: str = ""

    def forward(self, transpose: bool) -> bool:
        """Say whether a solve needs products with A itself, and they are to be recorded."""
        return needs_product(self.choices.solver, self.problem.condition, transpose=transpose)

    def under(self, axis: TaskAxis) -> Rule:
        """Put the rule under one more vmap."""
        return dataclasses.replace(self, problem=self.problem.with_axis(axis))

    def solve(self, lin: Linearisation, b: Tensor, transpose: bool) -> Tensor:
        """Solve ``A u = b`` (or with A^T) for plain tensors; judge it; report it."""
        order = self._order(b.ndim - 1)
        arranged = b.permute(*order, b.ndim - 1)
        shared = len(self.problem.axes) - len(self.problem.own_axes)
        sizes = arranged.shape[:shared]
        if shared > 1:
            arranged = arranged.flatten(0, shared - 1)

        answer = solved(Use(lin), self.choices, arranged, transpose=transpose)
        u, fill = answer.u, self.problem.params.fill
        if self.callback is not None:
            self.callback(dataclasses.replace(answer.info, solution=fill(lin.layout.split(u))))
        if shared > 1:
            u = u.unflatten(0, sizes)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return u.permute(*inverse, u.ndim - 1)

    def _order(self, count: int) -> list[int]:
        """Order the task dimensions, those that share a matrix first."""
        axes = self.problem.axes
        return sorted(range(count), key=lambda i: not axes[i].shared)


class LinearSolve(torch.autograd.Function):
    """``(b, tensors) -> u`` with ``A u = b``, or ``A^T u = b``, differentiable in all inputs."""

    @staticmethod
    def forward(rule: Rule, transpose: bool, b: Tensor, *tensors: Tensor) -> Tensor:
        plain = [t.detach() for t in tensors]
        lin = Linearisation(rule.problem, plain, rule.draw, forward=rule.forward(transpose))
        return rule.solve(lin, b.detach(), transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.rule, ctx.transpose = inputs[:2]
        ctx.save_for_backward(output, *inputs[3:])
        ctx.save_for_forward(output, *inputs[3:])

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, rule: Rule, transpose: bool, b: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        axis, moved = _with_axis(rule.problem, info, in_dims[3:], tensors, own=())
        (b,) = in_front([b], in_dims[2:3], info.batch_size)
        return LinearSolve.apply(rule.under(axis), transpose, b, *moved), 0

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> Any:
        rule, problem = ctx.rule, ctx.rule.problem
        refuse_old_vmap([w])
        u, *tensors = [alive(t) for t in ctx.saved_tensors]
        z = LinearSolve.apply(rule, not ctx.transpose, w, *tensors)
        grads: list[Tensor | None] = [None] * len(tensors)
        places = [*problem.inner, *problem.outer]
        if any(ctx.needs_input_grad[3 + i] for i in places):
            _require_second_derivatives(rule)
            # d <z, A^T u>, for either direction of the solve, since <z, A u> = <u, A^T z>.
            left, right = (z, u) if ctx.transpose else (u, z)

            def of_product(lin: Linearisation, seed: Tensor) -> Replay:
                return Replay([lin.transposed(right, create_graph=True)], lin.aliases)

            lin = Linearisation(problem, tensors, rule.draw, tasks=u.shape[:-1], inside=of_product)
            crossed = lin.extra([left], create_graph=higher_order())
            for place, part in zip(places, crossed, strict=True):
                grads[place] = None if part is None else -part
        return None, None, z, *grads

    @staticmethod
    def jvp(ctx: Any, _rule: None, _transpose: None, db: Any, *tangents: Any) -> Tensor:
        rule, problem = ctx.rule, ctx.rule.problem
        refuse_old_vmap([db, *tangents])
        with lower_levels():
            return LinearSolve._jvp(ctx, rule, problem, db, tangents)

    @staticmethod
    def _jvp(
        ctx: Any, rule: Rule, problem: Problem, db: Tensor | None, tangents: Sequence[Any]
    ) -> Tensor:
        u, *tensors = [primal(alive(t)) for t in ctx.saved_tensors]
        rhs = torch.zeros_like(u) if db is None else db
        places = [*problem.inner, *problem.outer]
        if any(tangents[i] is not None for i in places):
            _require_second_derivatives(rule)

            def along(lin: Linearisation, seed: Tensor) -> ForwardReplay:
                product = lin.transposed if ctx.transpose else lin.product
                return ForwardReplay([product(u, create_graph=True)], lin.aliases, seed)

            lin = Linearisation(
                problem,
                tensors,
                rule.draw,
                forward=not ctx.transpose,
                tasks=u.shape[:-1],
                inside=along,
            )
            moved = filled([tangents[i] for i in places], [tensors[i] for i in places])
            change = lin.extra(moved, create_graph=True)[0]
            rhs = rhs if change is None else rhs - change
        return LinearSolve.apply(rule, ctx.transpose, rhs, *tensors)


class CrossTerm(torch.autograd.Function):
    """The cross derivative of a condition that records no graph, which has no derivative itself.

    Of ``(rule, False, u, *tensors)`` it is ``(dF/dargs)^T u``, a tensor for each differentiated
    argument; of ``(rule, True, *tangents, *tensors)`` it is ``(dF/dargs) tangents``, flat.
    """

    @staticmethod
    def forward(rule: Rule, forward: bool, *given: Tensor) -> tuple[Tensor, ...]:
        count = len(rule.problem.tensors)
        vectors, plain = given[:-count], [t.detach() for t in given[-count:]]
        lin = Linearisation(rule.problem, plain, rule.draw, cross_forward=forward)
        if forward:
            return (lin.cross_forward(vectors),)
        lin.measure(vectors[0], looks=True)
        return tuple(filled(lin.cross(vectors[0]), [plain[i] for i in rule.problem.outer]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.condition = inputs[0].problem.condition

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, rule: Rule, forward: bool, *given: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        problem, count = rule.problem, len(rule.problem.tensors)
        places = [*problem.inner, *problem.outer]
        axis, moved = _with_axis(problem, info, in_dims[-count:], given[-count:], own=places)
        vectors = in_front(given[:-count], in_dims[2:-count], info.batch_size)
        results = CrossTerm.apply(rule.under(axis), forward, *vectors, *moved)
        return results, (0,) * len(results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise no_second_derivative(ctx.condition)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_second_derivative(ctx.condition)


class ImplicitSolution(torch.autograd.Function):
    """The identity on an inner solution; its derivative is the implicit one.

    `captured` is the condition's value as a function of what the user's functions capture, or
    None; it takes the incoming derivative on to the captured tensors.
    """

    @staticmethod
    def forward(rule: Rule, captured: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors[i].clone() for i in rule.problem.inner)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.rule, ctx.captures = inputs[0], inputs[1] is not None
        tensors = list(inputs[2:])
        for place, solution in zip(ctx.rule.problem.inner, output, strict=True):
            tensors[place] = solution  # so that higher orders flow through the solution
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, rule: Rule, captured: None, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        axis, moved = _with_axis(rule.problem, info, in_dims[2:], tensors, own=rule.problem.inner)
        results = ImplicitSolution.apply(rule.under(axis), captured, *moved)
        return results, (0,) * len(results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        refuse_old_vmap(cotangents)
        rule, tensors = ctx.rule, [alive(t) for t in ctx.saved_tensors]
        if ctx.captures and higher_order():
            raise UnsupportedOperation(
                f"The inner problem captures {rule.captured}, whose higher derivatives would be "
                "lost. Pass captured tensors as arguments of the decorated function (and of the "
                "inner problem) where create_graph=True or a function transform is used."
            )
        lead = cotangents[0].shape[: len(rule.problem.axes)]
        layout, higher = rule.problem.layout(), higher_order()
        if higher and layout.space is not None:
            raise UnsupportedOperation(_ONCE)
        b = layout.flatten(cotangents, lead)
        if not higher:
            tensors = [t.detach() for t in tensors]
        forward = not higher and rule.forward(transpose=True)
        lin: Linearisation | None = None
        if rule.problem.condition.replays or not higher:
            lin = Linearisation(rule.problem, tensors, rule.draw, forward=forward, again=higher)
        if higher:
            u = LinearSolve.apply(rule, True, b, *tensors)
        else:
            assert lin is not None
            u = rule.solve(lin, b, transpose=True)
        crossed = lin.cross(u, higher) if lin else CrossTerm.apply(rule, False, u, *tensors)
        grads: list[Tensor | None] = [None] * len(tensors)
        for place, part in zip(rule.problem.outer, crossed, strict=True):
            grads[place] = None if part is None else -part
        if not ctx.captures:
            _warn_of_unused(
                rule, [i for i in rule.problem.outer if ctx.needs_input_grad[2 + i]], grads
            )
        return None, (-u if ctx.captures else None), *grads

    @staticmethod
    def jvp(ctx: Any, _rule: None, captured: Any, *tangents: Any) -> tuple[Tensor, ...]:
        if captured is not None:
            raise UnsupportedOperation(
                f"The inner problem captures {ctx.rule.captured}, whose forward derivative would "
                "be lost. Pass captured tensors as arguments of the decorated function."
            )
        refuse_old_vmap(tangents)
        if ctx.rule.problem.layout().space is not None:
            raise UnsupportedOperation(_ONCE)
        with lower_levels():
            rule, tensors = ctx.rule, [primal(alive(t)) for t in ctx.saved_tensors]
            outer = rule.problem.outer
            given = filled([tangents[i] for i in outer], [tensors[i] for i in outer])
            if rule.problem.condition.replays:
                lin = Linearisation(rule.problem, tensors, rule.draw, cross_forward=True)
                pushed = lin.cross_forward(given, True)
            else:
                (pushed,) = CrossTerm.apply(rule, True, *given, *tensors)
            du = LinearSolve.apply(rule, False, -pushed, *tensors)
            return tuple(rule.problem.layout().split(du))


def _warn_of_unused(rule: Rule, wanted: Sequence[int], grads: Sequence[Tensor | None]) -> None:
    """Warn where nothing that is differentiated plays a part in the inner problem."""
    if rule.choices.on_failure != "ignore" and wanted and all(grads[i] is None for i in wanted):
        names = ", ".join(rule.problem.path(i) for i in wanted)
        warn(
            f"The inner problem does not depend on {names}: the derivative of its solution is "
            "zero. If that is not meant, look in it for a .detach() or .item(), or a value that is "
            "captured in place of the argument."
        )


def higher_order() -> bool:
    """Say whether the results of a backward may themselves be differentiated."""
    return torch.is_grad_enabled() or transforms_active() or forward_mode_active()


def _require_second_derivatives(rule: Rule) -> None:
    if not rule.problem.condition.replays:
        raise no_second_derivative(rule.problem.condition)
    if not rule.problem.condition.twice:
        raise UnsupportedOperation(
            f"{type(rule.problem.condition).__name__} takes another matrix than the true Hessian, "
            "so second derivatives through its solution would be wrong. Use Minimum for them."
        )


def _with_axis(
    problem: Problem,
    info: Any,
    in_dims: Sequence[int | None],
    tensors: Sequence[Tensor],
    own: Collection[int],
) -> tuple[TaskAxis, list[Tensor]]:
    """Make the axis of a vmap around a problem, and put that axis in front of the tensors."""
    mapped = {place for place, dim in enumerate(in_dims) if dim is not None}
    if own or mapped:
        mapped |= {*problem.inner, *own}
    dims = tuple(0 if place in mapped else None for place in range(len(tensors)))
    front = in_front(tensors, in_dims, info.batch_size)
    moved = [t if dim is None else f for t, dim, f in zip(tensors, dims, front, strict=True)]
    return TaskAxis(dims, info.randomness), moved
