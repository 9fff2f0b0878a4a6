"""The two rules of implicit differentiation by themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from .._autograd.captured import captured_by, carries_something, names_of_captured
from .._autograd.products import filled
from .._autograd.random_numbers import Draw
from .._autograd.refusals import never_compiled, refuse_derivatives
from .._autograd.torch_pytrees import pytree
from .._autograd.trace import detached
from .._autograd.transforms import carries_derivative, forward_mode_active, transforms_active
from .._errors import StructureMismatch, UnsupportedOperation
from .._info import SolveInfo
from .._mistakes import explained
from .._pytrees import Tree
from .._warnings import OnFailure, check_on_failure
from ..conditions._base import as_condition
from ..conditions._inner_problem import Problem
from ..conditions._root import Root
from ..solvers import Solver
from ..solvers._auto import choose
from .choices import Choices
from .differentiable import CrossTerm, LinearSolve, Rule
from .linearisation import Linearisation
from .signatures import Params, RuleOptions


@overload
def root_vjp(
    F: Any,
    params: Any,
    args: tuple[Any, ...],
    cotangent: Any,
    *,
    argnums: int | Sequence[int] | None = ...,
    return_info: Literal[True],
    **options: Unpack[RuleOptions],
) -> tuple[Any, SolveInfo]: ...
@overload
def root_vjp(
    F: Any,
    params: Any,
    args: tuple[Any, ...],
    cotangent: Any,
    *,
    argnums: int | Sequence[int] | None = ...,
    return_info: bool = ...,
    **options: Unpack[RuleOptions],
) -> Any: ...
@never_compiled
@explained
def root_vjp(
    F: Any,
    params: Any,
    args: tuple[Any, ...],
    cotangent: Any,
    *,
    argnums: int | Sequence[int] | None = None,
    solver: Solver | None = None,
    on_failure: OnFailure = "warn",
    return_info: bool = False,
) -> Any:
    """Form the vector-Jacobian product of the root ``params(args)`` of ``F(params, *args) = 0``.

    It is ``-(dF/dargs)^T u`` with ``A^T u = cotangent`` and A = dF/dparams. The result is
    differentiable where the inputs carry derivatives.

    Parameters
    ----------
    F : callable or condition
        ``F(params, *args)``, shaped like `params`.
    params : pytree of Tensor
        The root.
    args : tuple of pytrees
        The arguments after `params`.
    cotangent : pytree of Tensor
        Shaped like `params`.
    argnums : int or sequence of int, optional
        Which arguments of `F` to differentiate: ``args[0]`` is 1. None: all of `args`.
    solver : Solver, optional
        The linear solver; None: as in `implicit_grad`.
    on_failure : {"warn", "raise", "ignore"}
        What to do when the linear solve fails.
    return_info : bool
        Whether to return a `SolveInfo` too; not where the inputs carry derivatives.

    Returns
    -------
    grads : pytree or tuple of pytrees
        Shaped like ``args``, or like the one or the several arguments that `argnums` names.
    info : SolveInfo
        With `return_info`.

    References
    ----------
    Blondel et al., Efficient and modular implicit differentiation, 2022, section 2.1.

    Examples
    --------
    >>> import torch, hypergrad
    >>> F = lambda x, a: x**2 - a
    >>> hypergrad.root_vjp(F, torch.tensor(2.0), (torch.tensor(4.0),), torch.tensor(1.0))
    (tensor(0.2500),)
    """
    rule, trees = _rule(F, params, args, solver, on_failure, return_info)
    for position in _positions(argnums, len(trees)):
        trees[position - 1].refuse_opaque()
        trees[position - 1].refuse_constants()
    problem = rule.problem
    captured = [] if return_info else _captured(rule)
    b = problem.layout().flatten(problem.params.match("cotangent", cotangent))
    lin, u, info = _solved(rule, b, transpose=True, return_info=return_info)
    if lin is None:
        crossed = CrossTerm.apply(rule, False, u, *problem.tensors)
    else:
        crossed = lin.cross(u, create_graph=_tracked(b, problem=problem))
    grads = {
        place: None if g is None else -g for place, g in zip(problem.outer, crossed, strict=True)
    }
    start, answer = len(problem.params.tensors), []
    for tree in trees:
        places = [start + i for i in tree.variables_among_tensors]
        answer.append(tree.fill(filled([grads.get(p) for p in places], tree.variables)))
        start += len(tree.tensors)
    chosen = _chosen(_constant_in(captured, rule, answer), argnums)
    return (chosen, info) if return_info else chosen


@overload
def root_jvp(
    F: Any,
    params: Params,
    args: tuple[Any, ...],
    tangents: Any,
    *,
    argnums: int | Sequence[int] | None = ...,
    return_info: Literal[False] = ...,
    **options: Unpack[RuleOptions],
) -> Params: ...
@overload
def root_jvp(
    F: Any,
    params: Params,
    args: tuple[Any, ...],
    tangents: Any,
    *,
    argnums: int | Sequence[int] | None = ...,
    return_info: Literal[True],
    **options: Unpack[RuleOptions],
) -> tuple[Params, SolveInfo]: ...
@overload
def root_jvp(
    F: Any,
    params: Params,
    args: tuple[Any, ...],
    tangents: Any,
    *,
    argnums: int | Sequence[int] | None = ...,
    return_info: bool = ...,
    **options: Unpack[RuleOptions],
) -> Any: ...
@never_compiled
@explained
def root_jvp(
    F: Any,
    params: Any,
    args: tuple[Any, ...],
    tangents: Any,
    *,
    argnums: int | Sequence[int] | None = None,
    solver: Solver | None = None,
    on_failure: OnFailure = "warn",
    return_info: bool = False,
) -> Any:
    """Form the Jacobian-vector product of the root ``params(args)`` of ``F(params, *args) = 0``.

    It is ``-v`` with ``A v = (dF/dargs) tangents`` and A = dF/dparams. The result is
    differentiable where the inputs carry derivatives.

    Parameters
    ----------
    F, params, args, argnums, solver, on_failure, return_info
        As in `root_vjp`.
    tangents : pytree or tuple of pytrees
        Shaped like `args`, or like the one or the several arguments that `argnums` names.

    Returns
    -------
    tangent : pytree of Tensor
        Shaped like `params`.
    info : SolveInfo
        With `return_info`.

    Raises
    ------
    StructureMismatch
        If `tangents` does not match the arguments.

    Examples
    --------
    >>> import torch, hypergrad
    >>> F = lambda x, a: x**2 - a
    >>> hypergrad.root_jvp(F, torch.tensor(2.0), (torch.tensor(4.0),), (torch.tensor(1.0),))
    tensor(0.2500)
    """
    rule, trees = _rule(F, params, args, solver, on_failure, return_info)
    problem = rule.problem
    captured = [] if return_info else _captured(rule)
    given = (tangents,) if isinstance(argnums, int) else tuple(tangents)
    positions = _positions(argnums, len(trees))
    if len(given) != len(positions):
        raise StructureMismatch(
            f"tangents must have one entry for each differentiated argument: {len(positions)}, got "
            f"{len(given)}.",
            argument="tangents",
        )
    tensors = problem.tensors if not return_info else [detached(t) for t in problem.tensors]
    moving = {place: torch.zeros_like(tensors[place]) for place in problem.outer}
    for position, tangent in zip(positions, given, strict=True):
        tree = trees[position - 1]
        tree.refuse_constants()
        start = len(problem.params.tensors) + sum(len(t.tensors) for t in trees[: position - 1])
        parts = tree.match(f"tangents for args[{position - 1}]", tangent)
        moving.update(zip((start + i for i in tree.variables_among_tensors), parts, strict=True))
    along, higher = [moving[p] for p in problem.outer], _tracked(*moving.values(), problem=problem)
    if rule.problem.condition.replays:
        lin = Linearisation(problem, tensors, rule.draw, cross_forward=True)
        b = -lin.cross_forward(along, create_graph=higher)
    else:
        b = -CrossTerm.apply(rule, True, *along, *tensors)[0]
    _, v, info = _solved(rule, b, transpose=False, return_info=return_info)
    answer = _constant_in(captured, rule, problem.params.fill(problem.layout().split(v)))
    return (answer, info) if return_info else answer


def _rule(
    F: Any,
    params: Any,
    args: tuple[Any, ...],
    solver: Solver | None,
    on_failure: OnFailure,
    figures: bool,
) -> tuple[Rule, list[Tree]]:
    check_on_failure(on_failure)
    if not isinstance(args, tuple):
        raise StructureMismatch(
            f"args must be a tuple of arguments; got {type(args).__name__}.", argument="args"
        )
    condition = as_condition(F, Root)
    trees = [Tree(f"args[{i}]", value, constants=True) for i, value in enumerate(args)]
    # Every argument stays a variable, whichever are asked for: the answer may depend on all.
    problem = Problem.of(condition, Tree("params", params), trees)
    choices = Choices(choose(solver, condition.symmetric), None, on_failure, figures)
    return Rule(problem, choices, None, Draw()), trees


def _positions(argnums: int | Sequence[int] | None, count: int) -> list[int]:
    if argnums is None:
        return list(range(1, count + 1))
    positions = [argnums] if isinstance(argnums, int) else list(argnums)
    for position in positions:
        if not 1 <= position <= count:
            raise ValueError(
                f"argnums counts F's arguments: params is 0, args are 1 to {count}; got "
                f"{argnums!r}."
            )
    return positions


def _chosen(answer: list[Any], argnums: int | Sequence[int] | None) -> Any:
    if argnums is None:
        return tuple(answer)
    if isinstance(argnums, int):
        return answer[argnums - 1]
    return tuple(answer[p - 1] for p in argnums)


def _captured(rule: Rule) -> list[Tensor]:
    """List what depends on captures of F, under plain autograd; elsewhere it is an error."""
    captured = captured_by(rule.problem)
    if captured and (transforms_active() or forward_mode_active()):
        raise _lost(rule)
    return captured


def _constant_in(captured: list[Tensor], rule: Rule, answer: Any) -> Any:
    """Make the answer raise where it is differentiated by what F captures."""
    leaves, spec = pytree.tree_flatten(answer)
    leaves = [
        refuse_derivatives([leaf], captured, lambda: _lost(rule), plain=True)[0]
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
        else leaf
        for leaf in leaves
    ]
    return pytree.tree_unflatten(leaves, spec)


def _lost(rule: Rule) -> Exception:
    names = names_of_captured(rule.problem.condition.functions(), carries_something)
    return UnsupportedOperation(
        f"F captures {names or 'a tensor'}, which carries a derivative or a batch that would be "
        "lost. Pass it in args, and use it as an argument of F, or detach it if it is a constant."
    )


def _tracked(*tensors: Tensor, problem: Problem) -> bool:
    """Say whether a result of these and the problem may be differentiated."""
    return torch.is_grad_enabled() and any(
        carries_derivative(t) for t in [*tensors, *problem.tensors]
    )


def _solved(
    rule: Rule, b: Tensor, *, transpose: bool, return_info: bool
) -> tuple[Linearisation | None, Tensor, SolveInfo | None]:
    """Linearise, where a graph serves again, and solve: with the evidence, or differentiable."""
    problem = rule.problem
    if not return_info and not (_tracked(b, problem=problem) or transforms_active()):
        tensors = [t.detach() for t in problem.tensors]
        lin = Linearisation(problem, tensors, rule.draw, forward=rule.forward(transpose))
        return lin, rule.solve(lin, b.detach(), transpose), None
    if not return_info:
        u = LinearSolve.apply(rule, transpose, b, *problem.tensors)
        if not problem.condition.replays:
            return None, u, None
        return Linearisation(problem, problem.tensors, rule.draw, again=True), u, None
    if _tracked(b, problem=problem):
        raise UnsupportedOperation(
            "return_info=True returns a detached answer, but an input requires grad. Detach the "
            "inputs, or leave return_info out."
        )
    tensors = [detached(t) for t in problem.tensors]
    lin = Linearisation(problem, tensors, rule.draw, forward=rule.forward(transpose))
    infos: list[SolveInfo] = []
    rule = dataclasses.replace(rule, callback=infos.append)
    u = rule.solve(lin, b, transpose)
    return lin, u, infos[0]
