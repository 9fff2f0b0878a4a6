"""The multipliers of a solution that came without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd.guard import Guard
from .._autograd.torch_pytrees import pytree
from .._pytrees import Layout, Tree
from ._inner_problem import scalar

Function = Callable[..., Any]


def fitted(
    f: Function, equalities: Function | None, inequalities: Function | None, x: Any, args: Any
) -> tuple[Any, Any]:
    """Fit multipliers to stationarity and complementary slackness, by least squares.

    Parameters
    ----------
    f, equalities, inequalities : callable
        Of ``(x, *args)``, as in `KKT`.
    x : pytree of Tensor
        The variables.
    args : sequence
        What the functions take after them.

    Returns
    -------
    nu, lam : pytree of Tensor or None
        The multipliers, shaped like the constraints.
    """
    X = Tree("x", x)
    variables = [v.detach() for v in X.variables]
    layout = Layout(X, variables)
    trees: list[Any] = [None, None]

    def values(vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at = X.rebuild(layout.split(vector))
        with Guard():
            joined = [scalar("f", f(at, *args)).to(vector.dtype)]
            for place, constraint in enumerate((equalities, inequalities)):
                trees[place] = None if constraint is None else constraint(at, *args)
                leaves = [] if constraint is None else pytree.tree_leaves(trees[place])
                flat = [leaf.reshape(-1).to(vector.dtype) for leaf in leaves]
                joined.append(torch.cat([vector.new_zeros(0), *flat]))
        return joined[0], joined[1], joined[2]

    def twice(vector: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
        of_f, h, g = values(vector)
        return (of_f, h, g), (h, g)

    with torch.no_grad():
        vector = layout.flatten(variables)
        (slope, of_h, of_g), (h, g) = torch.func.jacrev(twice, has_aux=True)(vector)
        nu, lam = _solved(slope, torch.cat([of_h, of_g]), h, g)
        return _shaped(trees[0], nu), _shaped(trees[1], lam)


def _solved(slope: Tensor, rows: Tensor, h: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise ``|slope + rows^T z|^2 + |lam g|^2`` over ``z = (nu, lam)``, of least norm."""
    slack = torch.cat([torch.zeros_like(h), g]).diag_embed()
    matrix = torch.cat([rows.mT, slack])
    # In units in which each constraint weighs the same.
    size = matrix.norm(dim=0)
    size = torch.where(size > 0, size, torch.ones_like(size))
    target = torch.cat([-slope, torch.zeros_like(h), torch.zeros_like(g)])
    z = torch.linalg.pinv(matrix / size) @ target / size
    return z[: len(h)], z[len(h) :].clamp(min=0)


def _shaped(tree: Any, vector: Tensor) -> Any:
    leaves, spec = pytree.tree_flatten(tree)
    if tree is None:
        return None
    parts: Sequence[Tensor] = vector.split([leaf.numel() for leaf in leaves])
    shaped = [
        part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)
    ]
    return pytree.tree_unflatten(shaped, spec)
