"""The projection onto a plane within bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._autograd.search import search
from ..prox import size_of
from ._arguments import Number, alike, described, one_number, share, vector, widest


def box_section(v: Tensor, lower: Any, upper: Any, w: Any, c: Number) -> Tensor:
    """Project onto ``lower <= x <= upper`` with ``<w, x> = c``.

    It is exact: the multiplier of the equation is found among the points at which an entry meets
    a bound, by bisection.

    Parameters
    ----------
    v : Tensor
        ``(n,)``, what is projected.
    lower, upper, w : Tensor or float
        ``(n,)``, or one number for all entries. Bounds may be infinite.
    c : float or Tensor
        One number.

    Returns
    -------
    x : Tensor
        ``(n,)``.

    Raises
    ------
    StructureMismatch
        If the shapes do not go together.

    References
    ----------
    Brucker, An O(n) algorithm for quadratic knapsack problems, 1984; Dai and Fletcher, New
    algorithms for singly linearly constrained quadratic programs, 2006.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> projections.box_section(torch.tensor([0.9, 0.6, -0.2]), 0.0, 0.6, 1.0, 1.0)
    tensor([0.6000, 0.4000, 0.0000])
    """
    v = vector(v)
    shape, wide = tuple(v.shape), widest(v)
    low, high, weights = (
        described(name, value, shape, wide)
        for name, value in (("lower", lower), ("upper", upper), ("w", w))
    )
    level = alike(one_number("c", c), wide)
    unit = size_of(weights)  # squares of entries of 1e-200 are none
    weights, level = weights / unit, level / unit
    side, tau = search(_multiplier, wide, low, high, weights, level)
    free = side == 0
    # From a point that is right to rounding on, the formula of the piece has small numbers.
    near = wide - tau * weights
    held = torch.where(side > 0, high, torch.where(side < 0, low, 0.0))
    missed = (weights * torch.where(free, near, held)).sum() - level
    step = share(missed, torch.where(free, weights.square(), 0.0).sum())
    return torch.where(free, near - step * weights, held).to(v.dtype)


def _multiplier(
    v: Tensor, low: Tensor, high: Tensor, w: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the bound that holds an entry, and the multiplier of the equation.

    Returns
    -------
    side : Tensor
        ``(tasks, n)``: -1 at the lower bound, 1 at the upper one, 0 between.
    tau : Tensor
        ``(tasks,)``.

    Raises
    ------
    ValueError
        Where nothing satisfies all.
    """
    if bool((low > high).any()):
        raise ValueError("lower must not exceed upper: the set is empty.")
    weighs = w != 0
    safe = torch.where(weighs, w, 1.0)
    ends = [torch.where(weighs, (v - bound) / safe, torch.nan) for bound in (high, low)]
    first, last = torch.minimum(*ends), torch.maximum(*ends)

    def total(tau: Tensor) -> Tensor:
        x = torch.clamp(v - tau[:, None] * w, low, high)
        return torch.where(weighs, w * x, 0.0).sum(dim=-1)

    ends_at = [torch.where((w > 0) == up, high, low) for up in (False, True)]
    extremes = [torch.where(weighs, w * x, 0.0).sum(dim=-1) for x in ends_at]
    bounds = torch.where(torch.isfinite(low), low.abs(), 0.0).maximum(
        torch.where(torch.isfinite(high), high.abs(), 0.0)
    )
    slack = 16 * torch.finfo(v.dtype).eps * ((w.abs() * bounds).sum(dim=-1) + c.abs())
    if bool(((c < extremes[0] - slack) | (c > extremes[1] + slack)).any()):
        raise ValueError("c is out of reach of w . x within lower and upper: the set is empty.")
    # The total falls with tau: bisection among the points at which an entry meets a bound.
    points = torch.cat([first, last], dim=-1)
    points = torch.where(torch.isfinite(points), points, torch.inf).sort(dim=-1).values
    size = points.shape[-1]
    below = torch.full_like(c, -1, dtype=torch.int64)
    above = torch.isfinite(points).sum(dim=-1)
    for _ in range(size.bit_length() + 1):
        middle = (below + above).div(2, rounding_mode="floor").clamp(min=0, max=size - 1)
        inside = (above - below) > 1
        tau = points.gather(-1, middle[:, None])[:, 0]
        high_side = total(torch.where(inside, tau, 0.0)) >= c
        below = torch.where(inside & high_side, middle, below)
        above = torch.where(inside & ~high_side, middle, above)

    def at(index: Tensor, beyond: float) -> Tensor:
        inside = (index >= 0) & (index < size)
        point = points.gather(-1, index.clamp(0, size - 1)[:, None])[:, 0]
        return torch.where(inside & torch.isfinite(point), point, beyond)

    start, end = at(below, -torch.inf), at(above, torch.inf)
    free = weighs & (first <= start[:, None]) & (last >= end[:, None])
    upper_side = torch.where(w > 0, first >= end[:, None], last <= start[:, None])
    rest = torch.where(free, v, torch.where(upper_side, high, low))
    rest = torch.where(weighs, w * rest, 0.0).sum(dim=-1) - c
    square = torch.where(free, w.square(), 0.0).sum(dim=-1)
    fallback = torch.where(torch.isfinite(start), start, end)
    fallback = torch.where(torch.isfinite(fallback), fallback, 0.0)
    tau = torch.where(square > 0, share(rest, square), fallback)
    tau = torch.minimum(torch.maximum(tau, start), end)
    sign = w.sign().to(torch.int64)
    side = torch.where(tau[:, None] <= first, sign, 0)
    side = torch.where(tau[:, None] >= last, -sign, side)
    unmoved = torch.where(v >= high, 1, torch.where(v <= low, -1, 0))
    return torch.where(weighs, side, unmoved), tau
