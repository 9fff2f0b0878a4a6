"""Projections onto the simplex and its kin, exact by sorting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._errors import StructureMismatch
from ..prox import as_floating
from ._arguments import Number, joined, radius_of


def simplex(v: Tensor, radius: Number = 1.0, *, dim: int = -1) -> Tensor:
    """Project onto the simplex: x >= 0 with the sum `radius`, along a dimension.

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
    return _on_simplex(_vectors("simplex", v), radius_of(radius), dim)


def sparse_simplex(v: Tensor, max_nz: int, radius: Number = 1.0, *, dim: int = -1) -> Tensor:
    """Project onto the vectors of the simplex with at most `max_nz` entries that are not 0.

    The set is not convex. The largest entries are kept and projected onto the simplex; of entries
    that tie those that come first are kept.

    Parameters
    ----------
    v : Tensor
        What is projected; every vector along `dim` by itself.
    max_nz : int
        Most entries that are not zero, at least 1.
    radius : float or Tensor
        One number, not negative.
    dim : int
        The dimension.

    Returns
    -------
    x : Tensor
        Shaped like `v`.

    Raises
    ------
    ValueError
        If `max_nz` is no integer of at least 1.

    References
    ----------
    Kyrillidis et al., Sparse projections onto the simplex, 2013, algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> projections.sparse_simplex(torch.tensor([0.9, 0.6, 0.5]), 2)
    tensor([0.6500, 0.3500, 0.0000])
    """
    if isinstance(max_nz, bool) or not isinstance(max_nz, int) or max_nz < 1:
        raise ValueError(f"max_nz must be an integer of at least 1; got {max_nz!r}.")
    v = _vectors("sparse_simplex", v).movedim(dim, -1)
    order = v.detach().argsort(dim=-1, descending=True, stable=True)[..., :max_nz]
    kept = _on_simplex(v.gather(-1, order), radius_of(radius), -1)
    return torch.zeros_like(v).scatter(-1, order, kept).movedim(-1, dim)


def l1_ball(v: Any, radius: Number = 1.0) -> Any:
    """Project onto ``sum |x| <= radius``, with the sum over all leaves.

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

    References
    ----------
    Duchi et al., Efficient projections onto the l1-ball for learning in high dimensions, 2008.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> projections.l1_ball(torch.tensor([2.0, -1.5, 0.1]))
    tensor([ 0.7500, -0.2500,  0.0000])
    """
    radius = radius_of(radius)
    x, rebuild = joined(v)
    size = x.detach().abs().sum()
    # True of NaN too, of the point or of the radius.
    outside = ~(size < (radius.detach() if isinstance(radius, Tensor) else radius))
    return rebuild(torch.where(outside, _on_sphere(x, radius), x))


def l1_sphere(v: Any, radius: Number = 1.0) -> Any:
    """Project onto ``sum |x| = radius``, with the sum over all leaves.

    The set is not convex. Where a sign makes no difference, for entries that are 0, it is plus.

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
    >>> projections.l1_sphere(torch.tensor([0.2, -0.1, 0.1]))
    tensor([ 0.4000, -0.3000,  0.3000])
    """
    radius = radius_of(radius)
    x, rebuild = joined(v)
    return rebuild(_on_sphere(x, radius))


def _on_sphere(x: Tensor, radius: Number) -> Tensor:
    sign = torch.where(x < 0, -torch.ones_like(x), torch.ones_like(x))
    return sign * _on_simplex(sign * x, radius, -1)


def _on_simplex(v: Tensor, radius: Number, dim: int) -> Tensor:
    if v.shape[dim] == 0:
        return v
    v = v.movedim(dim, -1)
    # The projection does not see a constant that is added to all entries; small numbers keep
    # more digits of the sums below.
    v = v - v.detach().amax(dim=-1, keepdim=True)
    ordered = v.detach().sort(dim=-1, descending=True).values
    count = torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    constant = radius.detach() if isinstance(radius, Tensor) else radius
    excess = (ordered.cumsum(dim=-1) - constant) / count
    # The excess rises along the support and falls after it: its maximum is the threshold.
    positive = v.detach() > excess.amax(dim=-1, keepdim=True)
    share = torch.where(positive, v, torch.zeros_like(v)).sum(dim=-1, keepdim=True)
    # None is positive at radius 0 alone.
    excess = (share - radius) / positive.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.relu(v - excess).movedim(-1, dim)


def _vectors(name: str, v: Any) -> Tensor:
    v = as_floating("v", v)
    if v.ndim == 0:
        raise StructureMismatch(
            f"{name} takes vectors along a dimension; v has none.", argument="v"
        )
    return v
