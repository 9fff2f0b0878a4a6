"""Euclidean projections onto convex sets: ``argmin over x in the set of ||x - v||``.

In a lambda, or by themselves where their further arguments are the hyperparameters, they are the
`project` of `hypergrad.ProjectedGradient`. First and second derivatives are right wherever they
exist, by the point and by what describes the set. At a kink a bound counts as active. An empty set
gives NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._errors import StructureMismatch
from .prox import not_negative, size_of

__all__ = ["affine_set", "box", "l2_ball", "non_negative", "simplex"]

Number = float | Tensor


def non_negative(v: Any) -> Any:
    """The projection onto x >= 0, entry by entry.

    Parameters
    ----------
    v : Tensor or pytree of Tensor
        What is projected.

    Returns
    -------
    x : pytree of Tensor
        Shaped like `v`.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> projections.non_negative(torch.tensor([1.0, -2.0]))
    tensor([1., 0.])
    """
    return pytree.tree_map(lambda leaf: torch.relu(leaf) if _varies(leaf) else leaf, v)


def box(v: Any, lower: Any = None, upper: Any = None) -> Any:
    """The projection onto lower <= x <= upper, entry by entry.

    Parameters
    ----------
    v : Tensor or pytree of Tensor
        What is projected.
    lower, upper : float, Tensor or pytree, optional
        The bounds: one number, a tensor that is broadcast against every leaf of `v`, or a pytree
        like `v`. None: no bound.

    Returns
    -------
    x : pytree of Tensor
        Shaped like `v`; NaN where `lower` exceeds `upper`.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> projections.box(torch.tensor([1.5, -2.0, 0.5]), 0.0, 1.0)
    tensor([1.0000, 0.0000, 0.5000])
    """
    leaves, spec = pytree.tree_flatten(v)
    lows, highs = _for_each("lower", lower, leaves, spec), _for_each("upper", upper, leaves, spec)
    held = [
        _held(leaf, low, high) if _varies(leaf) else leaf
        for leaf, low, high in zip(leaves, lows, highs, strict=True)
    ]
    return pytree.tree_unflatten(held, spec)


def simplex(v: Tensor, radius: Number = 1.0, *, dim: int = -1) -> Tensor:
    """The projection onto the simplex: x >= 0 with the sum `radius`, along a dimension.

    It is exact, by sorting. Entries that tie are treated alike.

    Parameters
    ----------
    v : Tensor
        What is projected; every vector along `dim` by itself.
    radius : float or Tensor
        One number, not negative.
    dim : int
        The dimension.

    Returns
    -------
    x : Tensor
        Shaped like `v`.

    References
    ----------
    Held, Wolfe and Crowder, Validation of subgradient optimization, 1974; Duchi et al., Efficient
    projections onto the l1-ball for learning in high dimensions, 2008, figure 1.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> projections.simplex(torch.tensor([0.5, 1.0, -1.0]))
    tensor([0.2500, 0.7500, 0.0000])
    """
    radius = not_negative("radius", _one_number("radius", radius))
    v = v.movedim(dim, -1)
    # The projection does not see a constant that is added to all entries; small numbers keep
    # more digits of the sums below.
    v = v - v.detach().amax(dim=-1, keepdim=True)
    ordered = v.detach().sort(dim=-1, descending=True).values
    count = torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    excess = (ordered.cumsum(dim=-1) - _constant(radius)) / count
    # The excess rises along the support and falls after it: its maximum is the threshold.
    positive = v.detach() > excess.amax(dim=-1, keepdim=True)
    share = torch.where(positive, v, torch.zeros_like(v)).sum(dim=-1, keepdim=True)
    # None is positive at radius 0 alone.
    excess = (share - radius) / positive.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.relu(v - excess).movedim(-1, dim)


def l2_ball(v: Any, radius: Number = 1.0) -> Any:
    """The projection onto the ball ||x|| <= radius, with the norm of all leaves together.

    Parameters
    ----------
    v : Tensor or pytree of Tensor
        What is projected.
    radius : float or Tensor
        One number, not negative.

    Returns
    -------
    x : pytree of Tensor
        Shaped like `v`.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> projections.l2_ball(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """
    radius = not_negative("radius", _one_number("radius", radius))
    leaves = [leaf for leaf in pytree.tree_leaves(v) if _varies(leaf)]
    if not leaves:
        return v
    scale = size_of(*leaves)
    squares = sum(((leaf / scale).square().sum() for leaf in leaves), torch.zeros_like(scale))
    present = squares > 0
    norm = scale * torch.where(present, squares, torch.ones_like(squares)).sqrt()
    outside = present & ~(norm < radius)  # true of a radius that is NaN
    kept = torch.where(outside, radius / norm, torch.ones_like(norm))
    return pytree.tree_map(lambda leaf: leaf * kept if _varies(leaf) else leaf, v)


def affine_set(v: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """The projection onto the solutions x of A x = b.

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
    return v - Q @ (Q.mT @ v - torch.where(dependent, torch.full_like(target, math.nan), target))


def _held(v: Tensor, lower: Any, upper: Any) -> Tensor:
    """`v` between its bounds; at a bound it is the bound that is differentiated."""
    low = None if lower is None else torch.as_tensor(lower, dtype=v.dtype, device=v.device)
    high = None if upper is None else torch.as_tensor(upper, dtype=v.dtype, device=v.device)
    x = v
    if high is not None:
        x = torch.where(v >= high, high, x)
    if low is not None:
        x = torch.where(v <= low, low, x)
    if low is not None and high is not None:
        x = torch.where(low > high, torch.full_like(x, math.nan), x)
    return x


def _for_each(name: str, bound: Any, leaves: list[Any], spec: Any) -> list[Any]:
    given, other = pytree.tree_flatten(bound)
    if other == spec and len(leaves) == len(given):
        return given
    if len(given) == 1 and (bound is None or isinstance(bound, float | int | Tensor)):
        return given * len(leaves)
    raise StructureMismatch(
        f"{name} must be one number or have the structure of v: {spec}; got {other}."
    )


def _one_number(name: str, value: Number) -> Number:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise StructureMismatch(
                f"{name} must be one number; it has the shape {tuple(value.shape)}."
            )
        return value.reshape(())
    return value


def _constant(value: Number) -> Number:
    return value.detach() if isinstance(value, Tensor) else value


def _varies(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
