"""Projections entry by entry: onto bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..prox import leafwise, one_for_each
from ._arguments import Number, alike, nan_where, radius_of, refuse_empty


def non_negative(v: Any) -> Any:
    """Project onto x >= 0, entry by entry.

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
    return leafwise(v, lambda leaf, _: torch.relu(leaf))


def box(v: Any, lower: Any = None, upper: Any = None) -> Any:
    """Project onto lower <= x <= upper, entry by entry.

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
        Shaped like `v`.

    Raises
    ------
    ValueError
        If `lower` exceeds `upper` and the host need not wait to see it; else NaN there.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> projections.box(torch.tensor([1.5, -2.0, 0.5]), 0.0, 1.0)
    tensor([1.0000, 0.0000, 0.5000])
    """
    lows = one_for_each("lower", lower, v, none=True)
    highs = one_for_each("upper", upper, v, none=True)
    empty = "lower must not exceed upper; upper - lower is {}: the set is empty."
    return leafwise(v, lambda leaf, i: _held(leaf, lows[i], highs[i], empty))


def hypercube(v: Any, side: Any = 1.0) -> Any:
    """Project onto 0 <= x <= side, entry by entry.

    Parameters
    ----------
    v : Tensor or pytree of Tensor
        What is projected.
    side : float, Tensor or pytree
        As the upper bound of `box`.

    Returns
    -------
    x : pytree of Tensor
        Shaped like `v`.

    Raises
    ------
    ValueError
        If `side` is negative and the host need not wait to see it; else NaN there.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> projections.hypercube(torch.tensor([2.0, -1.5, 0.5]))
    tensor([1.0000, 0.0000, 0.5000])
    """
    sides = one_for_each("side", side, v)
    empty = "side must not be negative; got {}."
    return leafwise(v, lambda leaf, i: _held(leaf, 0.0, sides[i], empty), sides)


def linf_ball(v: Any, radius: Number = 1.0) -> Any:
    """Project onto the ball ``max |x| <= radius``, with the maximum over all leaves.

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
    radius = radius_of(radius)
    return leafwise(v, lambda leaf, _: _held(leaf, -radius, radius))


def _held(v: Tensor, lower: Any, upper: Any, message: str | None = None) -> Tensor:
    """Hold `v` between its bounds; at a bound it is the bound that is differentiated."""
    x = v
    low, high = (None if bound is None else alike(bound, v) for bound in (lower, upper))
    if high is not None:
        x = torch.where(v >= high, high, x)
    if low is not None:
        x = torch.where(v <= low, low, x)
    numbers = isinstance(lower, float | int) and isinstance(upper, float | int)
    if low is None or high is None or (numbers and lower <= upper):
        return x
    if message is not None:
        refuse_empty(low > high, message, high, low)
    return nan_where(~(low <= high), x)  # true of NaN too
