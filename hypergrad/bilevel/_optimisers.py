"""The variables of a level and the torch.optim optimiser that moves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd.plain_steps import descend, plain_rate
from .._errors import StructureMismatch
from .._pytrees import Tree
from ..inner_solvers import InnerSolver

Optimiser = torch.optim.Optimizer | Callable[[list[Tensor]], torch.optim.Optimizer]


def take(
    name: str, value: Any, optimizer: Optimiser, skip_frozen: bool, of_autograd: bool
) -> tuple[Tree, Any]:
    """Take the tree of a level's variables, and its optimiser.

    A factory is given copies of the variables, so that the caller's stay as they are. A ready
    optimiser moves the caller's own, as it does everywhere.

    Parameters
    ----------
    name : str
        "params" or "hparams".
    value : pytree of Tensor
        The caller's variables.
    optimizer : Optimizer or callable
        A ready optimiser, or ``variables -> Optimizer``.
    skip_frozen, of_autograd : bool
        As in `Tree`.

    Returns
    -------
    tree : Tree
        Whose variables are the leaves that move, in place.
    optimiser : Optimizer
        What moves them.

    Raises
    ------
    StructureMismatch
        If there is no variable, a ready optimiser does not hold exactly the variables, or a factory
        makes no optimiser of them.
    """
    tree = Tree(name, value, skip_frozen=skip_frozen, of_autograd=of_autograd)
    tree.refuse_constant()
    level = "inner_optimizer" if name == "params" else "outer_optimizer"
    if isinstance(optimizer, torch.optim.Optimizer):
        _match(tree, optimizer, level)
        return tree, optimizer
    if isinstance(optimizer, InnerSolver):
        raise StructureMismatch(
            f"{level} must be a torch.optim.Optimizer, which moves {name} step by step; "
            f"{type(optimizer).__name__} of hypergrad.inner_solvers solves a problem in one call. "
            "Pass lambda variables: torch.optim.LBFGS(variables), for example, or differentiate "
            "hypergrad.argmin(objective, solver=...) in a loop of your own.",
            argument=level,
        )
    copies = [v.detach().clone().requires_grad_() for v in tree.variables]
    tree = Tree(name, tree.rebuild(copies), skip_frozen=skip_frozen, of_autograd=of_autograd)
    made = optimizer(list(copies))
    if not isinstance(made, torch.optim.Optimizer):
        raise StructureMismatch(
            f"{level} must be a torch.optim.Optimizer or a callable that makes one of a list of "
            f"tensors, such as lambda variables: torch.optim.SGD(variables, lr=0.1); it made a "
            f"{type(made).__name__}.",
            argument=level,
        )
    _match(tree, made, level)
    return tree, made


def _match(tree: Tree, optimiser: torch.optim.Optimizer, level: str) -> None:
    held = {id(t) for group in optimiser.param_groups for t in group["params"]}
    ours = {id(v) for v in tree.variables}
    for position, variable in enumerate(tree.variables):
        if id(variable) not in held and (tree.name == "params" or variable.requires_grad):
            raise StructureMismatch(
                f"{level} does not hold {tree.variable_path(position)}, so that nothing would move "
                f"it. Make the optimiser of the tensors in {tree.name} themselves (no copies, no "
                "results of an operation), or pass a callable that makes one of a list of tensors.",
                leaf=tree.variable_path(position),
                argument=level,
            )
        if id(variable) in held and not (variable.is_leaf and variable.requires_grad):
            raise StructureMismatch(
                f"{tree.variable_path(position)} must be a leaf that requires grad to be moved by "
                f"{level}.",
                leaf=tree.variable_path(position),
            )
    if held - ours:
        raise StructureMismatch(
            f"{level} holds {len(held - ours)} tensors that are not in {tree.name}, which it would "
            "move without a gradient of theirs. Make one optimiser for each level.",
            argument=level,
        )


def move(
    optimiser: torch.optim.Optimizer,
    variables: Sequence[Tensor],
    leaves: Sequence[Tensor],
    factor: float = 1.0,
    closure: Callable[[], Tensor] | None = None,
) -> None:
    """Make one step of an optimiser along gradients; ``.grad`` and rates are as before after it.

    Parameters
    ----------
    optimiser : Optimizer
        What moves them.
    variables, leaves : sequence of Tensor
        What is moved, and along what; an optimiser is given copies, which it may keep.
    factor : float
        What its learning rates are multiplied by.
    closure : callable, optional
        What it is given.
    """
    rate = plain_rate(optimiser, variables)
    if rate is not None and descend(variables, leaves, rate * factor):
        return
    groups = optimiser.param_groups
    rates = None if factor == 1 else [group["lr"] for group in groups]
    before = [v.grad for v in variables]
    try:
        if rates is not None:
            for group, lr in zip(groups, rates, strict=True):
                group["lr"] = lr * factor
        for variable, leaf in zip(variables, leaves, strict=True):
            variable.grad = leaf.clone()
        optimiser.step() if closure is None else optimiser.step(closure)  # type: ignore[arg-type]
    finally:
        if rates is not None:
            for group, lr in zip(groups, rates, strict=True):
                group["lr"] = lr
        for variable, grad in zip(variables, before, strict=True):
            variable.grad = grad
