"""Projections by the Euclidean norm: a ball, a sphere, a cone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._errors import StructureMismatch
from ..prox import as_floating, unit_of
from ._arguments import Number, joined, radius_of


def l2_ball(v: Any, radius: Number = 1.0) -> Any:
    """Project onto the ball ||x|| <= radius, with the norm of all leaves together.

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
    radius = radius_of(radius)
    x, rebuild = joined(v)
    norm, present = _norm(x)
    outside = present & ~(norm < radius)  # true of a radius that is NaN
    return rebuild(x * torch.where(outside, radius / norm, torch.ones_like(norm)))


def l2_sphere(v: Any, radius: Number = 1.0) -> Any:
    """Project onto the sphere ||x|| = radius, with the norm of all leaves together.

    The set is not convex. Where `v` is 0 all its points are equally close: the one whose entries
    are all the same is taken.

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
    >>> projections.l2_sphere(torch.tensor([0.3, 0.4]))
    tensor([0.6000, 0.8000])
    """
    radius = radius_of(radius)
    x, rebuild = joined(v)
    norm, present = _norm(x)
    even = torch.full_like(x, max(x.numel(), 1) ** -0.5)
    return rebuild(radius * torch.where(present, x / norm, even))


def second_order_cone(v: Tensor, *, dim: int = -1) -> Tensor:
    """Project onto the second-order cone: ``x = (t, z)`` with ``||z|| <= t``.

    Parameters
    ----------
    v : Tensor
        What is projected; every vector along `dim` by itself. Its first entry is t.
    dim : int
        The dimension.

    Returns
    -------
    x : Tensor
        Shaped like `v`.

    Raises
    ------
    StructureMismatch
        If there is no entry along the dimension.

    References
    ----------
    Parikh and Boyd, Proximal algorithms, 2014, section 6.3.2.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> projections.second_order_cone(torch.tensor([0.0, 3.0, 4.0]))
    tensor([2.5000, 1.5000, 2.0000])
    """
    v = as_floating("v", v)
    if v.ndim == 0 or v.shape[dim] == 0:
        raise StructureMismatch(
            f"second_order_cone takes vectors (t, z) along a dimension; v has the shape "
            f"{tuple(v.shape)}.",
            argument="v",
        )
    v = v.movedim(dim, -1)
    t, z = v[..., :1], v[..., 1:]
    norm, present = _norm(z)
    length = torch.where(present, norm, torch.zeros_like(norm))
    half = (t + length) / 2
    outside = torch.cat([half, half * torch.where(present, z / norm, torch.zeros_like(z))], dim=-1)
    # On the border the cone counts as met, and at its tip or beyond its opposite all is held at 0.
    x = torch.where(length < t, v, outside)
    return torch.where(length <= -t, torch.zeros_like(v), x).movedim(-1, dim)


def _norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """Measure the norm ``(..., 1)`` along the last dimension, 1 for 0; say where it is not 0."""
    if x.shape[-1] == 0:
        one = x.new_ones((*x.shape[:-1], 1))
        return one, torch.zeros_like(one, dtype=torch.bool)
    scale = unit_of(x.detach().abs().amax(dim=-1, keepdim=True))
    squares = (x / scale).square().sum(dim=-1, keepdim=True)
    present = ~(squares == 0)
    return scale * torch.where(present, squares, torch.ones_like(squares)).sqrt(), present
