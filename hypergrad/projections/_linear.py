"""Projections onto linear equations, and onto one inequality."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._autograd.torch_pytrees import pytree
from .._errors import StructureMismatch
from ..prox import as_floating, size_of
from ._arguments import Number, alike, joined, nan_where, one_number, refuse_empty, share


def affine_set(v: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """Project onto the solutions x of A x = b.

    Parameters
    ----------
    v : Tensor
        ``(n,)``, what is projected.
    A : Tensor
        ``(m, n)``, with linearly independent rows. It is factorised at each call; dependent rows
        give numbers that are not finite.
    b : Tensor
        ``(m,)``.

    Returns
    -------
    x : Tensor
        ``(n,)``.

    Raises
    ------
    StructureMismatch
        If the shapes do not go together.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> A, b = torch.tensor([[1.0, 1.0]]), torch.tensor([2.0])
    >>> projections.affine_set(torch.tensor([1.0, 0.0]), A, b)
    tensor([1.5000, 0.5000])
    """
    v, A, b = as_floating("v", v), as_floating("A", A), as_floating("b", b)
    if A.ndim != 2 or v.shape != A.shape[1:] or b.shape != A.shape[:1] or len(A) > A.shape[1]:
        raise StructureMismatch(
            f"affine_set needs v (n,), A (m, n) and b (m,) with m <= n; got {tuple(v.shape)}, "
            f"{tuple(A.shape)} and {tuple(b.shape)}."
        )
    # By QR, since A A^T would have the square of A's condition number.
    Q, R = torch.linalg.qr(A.mT)
    target = torch.linalg.solve_triangular(R.mT, b[:, None], upper=False)[:, 0]
    # Of a row that depends on those before it only rounding is left, which is seldom zero.
    rounding = A.shape[1] * torch.finfo(A.dtype).eps * torch.linalg.vector_norm(A, dim=1)
    dependent = (R.detach().diagonal().abs() <= rounding.detach()).any()
    return v - Q @ (Q.mT @ v - nan_where(dependent, target))


def hyperplane(v: Any, a: Any, b: Number) -> Any:
    """Project onto the solutions x of ``<a, x> = b``, one equation.

    Parameters
    ----------
    v : Tensor or pytree of Tensor
        What is projected.
    a : Tensor or pytree of Tensor
        The normal of the plane, shaped like `v`.
    b : float or Tensor
        One number.

    Returns
    -------
    x : pytree of Tensor
        Shaped like `v`.

    Raises
    ------
    StructureMismatch
        If `a` is not shaped like `v`.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> v, a = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 0.0])
    >>> projections.hyperplane(v, a, 1.0)
    tensor([0., 1., 3.])
    """
    return _along(v, a, b, one_sided=False)


def halfspace(v: Any, a: Any, b: Number) -> Any:
    """Project onto the x with ``<a, x> <= b``, one inequality.

    Parameters
    ----------
    v : Tensor or pytree of Tensor
        What is projected.
    a : Tensor or pytree of Tensor
        The outward normal, shaped like `v`.
    b : float or Tensor
        One number.

    Returns
    -------
    x : pytree of Tensor
        Shaped like `v`.

    Raises
    ------
    StructureMismatch
        If `a` is not shaped like `v`.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> v, a = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 0.0])
    >>> projections.halfspace(v, a, 1.0)
    tensor([0., 1., 3.])
    """
    return _along(v, a, b, one_sided=True)


def _along(v: Any, a: Any, b: Number, *, one_sided: bool) -> Any:
    """Make the least step along `a` that meets the equation, or the inequality."""
    x, rebuild = joined(v)
    leaves, normals = pytree.tree_leaves(v), pytree.tree_leaves(a)
    shapes = [
        [tuple(leaf.shape) if isinstance(leaf, Tensor) else () for leaf in tree if leaf is not None]
        for tree in (leaves, normals)
    ]
    if shapes[0] != shapes[1]:
        raise StructureMismatch(
            f"a must be shaped like v: {_shown(shapes[0])}; got {_shown(shapes[1])}.",
            argument="a",
        )
    normal = joined(a)[0].to(x)
    level = alike(one_number("b", b), x)
    unit = size_of(normal)  # squares of entries of 1e-30 are none
    normal, level = normal / unit, level / unit
    square = normal.dot(normal)
    missed = normal.dot(x) - level
    empty = (square == 0) & ((level < 0) if one_sided else (level != 0))
    if one_sided:
        missed = torch.where(missed >= 0, missed, 0.0)
    refuse_empty(empty, "a is zero and b is not met, so that the set is empty.")
    return rebuild(nan_where(empty, x - share(missed, square) * normal))


def _shown(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes)) or "nothing"
