"""Projections entry by entry: onto bounds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._errors import StructureMismatch
from ._arguments import Number, leafwise, radius_of


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
    return leafwise("v", v, lambda leaf, _: torch.relu(leaf))


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
    return leafwise("v", v, lambda leaf, i: _held(leaf, lows[i], highs[i]))


def hypercube(v: Any, side: Any = 1.0) -> Any:
    """The projection onto 0 <= x <= side, entry by entry.

    Parameters
    ----------
    v : Tensor or pytree of Tensor
        What is projected.
    side : float, Tensor or pytree
        As the upper bound of `box`.

    Returns
    -------
    x : pytree of Tensor
        Shaped like `v`; NaN where `side` is negative.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> projections.hypercube(torch.tensor([2.0, -1.5, 0.5]))
    tensor([1.0000, 0.0000, 0.5000])
    """
    return box(v, 0.0, side)


def linf_ball(v: Any, radius: Number = 1.0) -> Any:
    """The projection onto the ball ``max |x| <= radius``, with the maximum over all leaves.

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
    >>> projections.linf_ball(torch.tensor([2.0, -1.5, 0.5]))
    tensor([ 1.0000, -1.0000,  0.5000])
    """
    radius = radius_of("radius", radius)
    return leafwise("v", v, lambda leaf, _: _held(leaf, -radius, radius))


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
        f"{name} must be one number or have the structure of v: {spec}; got {other}.",
        argument=name,
    )
