"""Proximal maps: ``argmin over x of ||x - v||^2 / 2 + step_size g(x)``.

All take a tensor or a pytree of tensors and, but for `soft_threshold`, have the arguments
``(v, step_size, ...)``, so that they can be the `prox` of `hypergrad.ProximalGradient`: by
themselves where their further arguments are the hyperparameters, or in a lambda. First and second
derivatives are right wherever they exist, also at zero. At a kink a coordinate (or a group) counts
as held at zero. A negative penalty, for which there is no proximal map, gives NaN. Numbers and
tensors of integers are mapped as tensors of floating point; None stays None.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._autograd.maps import selected, taken
from ._autograd.singular_values import shrunk_singular_values
from ._autograd.torch_pytrees import pytree
from ._errors import StructureMismatch

__all__ = [
    "elastic_net",
    "from_projection",
    "group_lasso",
    "l1",
    "non_negative_l1",
    "non_negative_ridge",
    "nuclear",
    "ridge",
    "soft_threshold",
]

Number = float | Tensor


def soft_threshold(v: Any, threshold: Any) -> Any:
    """Apply soft thresholding: ``sign(v) max(|v| - threshold, 0)``, entry by entry.

    Parameters
    ----------
    v : Tensor or pytree of Tensor
        What is thresholded.
    threshold : float, Tensor or pytree of Tensor
        Not negative; a tensor is broadcast against every leaf of `v`, a pytree like `v` has one
        for each. A leaf whose own threshold is None stays as it is.

    Returns
    -------
    x : pytree of Tensor
        Shaped like `v`.

    References
    ----------
    Donoho, De-noising by soft-thresholding, 1995.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import prox
    >>> prox.soft_threshold(torch.tensor([3.0, -0.5, -2.0]), 1.0)
    tensor([ 2.,  0., -1.])
    """

    def one(v: Tensor, threshold: Number) -> Tensor:
        valid = not_negative("threshold", threshold)
        bound = torch.as_tensor(valid, dtype=v.dtype, device=v.device)
        # The slope of torch.clamp at a tie depends on the version of torch.
        return v - torch.where(v.abs() <= bound, v, torch.where(v < 0, -bound, bound))

    return _with_each(one, v, threshold)


def l1(v: Any, step_size: Number, penalty: Any = 1.0) -> Any:
    """Apply the proximal map of ``penalty ||x||_1``, the lasso's.

    Parameters
    ----------
    v : Tensor or pytree of Tensor
        Where it is taken.
    step_size : float or Tensor
        The step.
    penalty : float, Tensor or pytree of Tensor
        Not negative; one number, or one for each entry.

    Returns
    -------
    x : pytree of Tensor
        Shaped like `v`.

    References
    ----------
    Tibshirani, Regression shrinkage and selection via the lasso, 1996.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import prox
    >>> prox.l1(torch.tensor([3.0, -0.5]), 0.5, 2.0)
    tensor([2., 0.])
    """
    return soft_threshold(v, _times(step_size, penalty))


def elastic_net(v: Any, step_size: Number, l1: Any, l2: Any) -> Any:
    """Apply the proximal map of ``l1 ||x||_1 + l2 ||x||^2 / 2``.

    Parameters
    ----------
    v : Tensor or pytree of Tensor
        Where it is taken.
    step_size : float or Tensor
        The step.
    l1, l2 : float, Tensor or pytree of Tensor
        Not negative. Of scikit-learn's ElasticNet they are ``alpha * l1_ratio`` and
        ``alpha * (1 - l1_ratio)``, beside a squared error divided by twice the samples.

    Returns
    -------
    x : pytree of Tensor
        Shaped like `v`.

    References
    ----------
    Zou and Hastie, Regularization and variable selection via the elastic net, 2005.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import prox
    >>> prox.elastic_net(torch.tensor([3.0, -0.5]), 1.0, 1.0, 3.0)
    tensor([0.5000, 0.0000])
    """
    at = soft_threshold(v, _times(step_size, l1))
    return _with_each(lambda x, p: x / _growth(step_size, p, "l2"), at, l2)


def non_negative_l1(v: Any, step_size: Number, penalty: Any = 1.0) -> Any:
    """Apply the proximal map of ``penalty sum(x)`` over x >= 0, the non-negative lasso's.

    Parameters
    ----------
    v : Tensor or pytree of Tensor
        Where it is taken.
    step_size : float or Tensor
        The step.
    penalty : float, Tensor or pytree of Tensor
        Not negative; one number, or one for each entry.

    Returns
    -------
    x : pytree of Tensor
        Shaped like `v`.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import prox
    >>> prox.non_negative_l1(torch.tensor([2.0, -1.0, 0.5]), 0.5, 2.0)
    tensor([1., 0., 0.])
    """
    least = functools.partial(not_negative, "penalty")
    return _with_each(lambda x, p: torch.relu(x - step_size * least(p)), v, penalty)


def ridge(v: Any, step_size: Number, penalty: Any = 1.0) -> Any:
    """Apply the proximal map of ``penalty ||x||^2 / 2``.

    Parameters
    ----------
    v : Tensor or pytree of Tensor
        Where it is taken.
    step_size : float or Tensor
        The step.
    penalty : float, Tensor or pytree of Tensor
        Not negative; one number, or one for each entry.

    Returns
    -------
    x : pytree of Tensor
        Shaped like `v`.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import prox
    >>> prox.ridge(torch.tensor([2.0, -1.0, 0.5]), 0.5, 2.0)
    tensor([ 1.0000, -0.5000,  0.2500])
    """
    return _with_each(lambda x, p: x / _growth(step_size, p), v, penalty)


def non_negative_ridge(v: Any, step_size: Number, penalty: Any = 1.0) -> Any:
    """Apply the proximal map of ``penalty ||x||^2 / 2`` over x >= 0.

    Parameters
    ----------
    v : Tensor or pytree of Tensor
        Where it is taken.
    step_size : float or Tensor
        The step.
    penalty : float, Tensor or pytree of Tensor
        Not negative; one number, or one for each entry.

    Returns
    -------
    x : pytree of Tensor
        Shaped like `v`.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import prox
    >>> prox.non_negative_ridge(torch.tensor([2.0, -1.0, 0.5]), 0.5, 2.0)
    tensor([1.0000, 0.0000, 0.2500])
    """
    return _with_each(lambda x, p: torch.relu(x) / _growth(step_size, p), v, penalty)


def nuclear(v: Any, step_size: Number, penalty: Any = 1.0) -> Any:
    """Apply the proximal map of ``penalty ||x||_*``, the sum of the singular values of matrices.

    Parameters
    ----------
    v : Tensor or pytree of Tensor
        Where it is taken: matrices ``(..., m, n)``, each by itself.
    step_size : float or Tensor
        The step.
    penalty : float, Tensor or pytree of Tensor
        Not negative; one number, or one for each leaf.

    Returns
    -------
    x : pytree of Tensor
        Shaped like `v`.

    Raises
    ------
    StructureMismatch
        If a leaf is no matrix.

    References
    ----------
    Cai, Candès and Shen, A singular value thresholding algorithm for matrix completion, 2010.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import prox
    >>> x = prox.nuclear(torch.tensor([[3.0, 0.0], [0.0, -0.5]]), 0.5, 2.0)
    >>> torch.allclose(x, torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    True
    """

    def one(v: Tensor, penalty: Number) -> Tensor:
        if v.ndim < 2:
            raise StructureMismatch(
                f"nuclear takes matrices; a leaf of v has the shape {tuple(v.shape)}.",
                argument="v",
            )
        threshold = step_size * not_negative("penalty", penalty)
        if isinstance(threshold, Tensor) and threshold.numel() != 1:
            raise StructureMismatch(
                f"penalty must be one number for each leaf of v; it has the shape "
                f"{tuple(threshold.shape)}.",
                argument="penalty",
            )
        return shrunk_singular_values(v, threshold)

    return _with_each(one, v, penalty)


def from_projection(project: Callable[..., Any]) -> Callable[..., Any]:
    """Make the proximal map of a set: its projection, called as a proximal map is.

    Parameters
    ----------
    project : callable
        ``project(v, *args)`` or ``project(v)``, such as those of `hypergrad.projections`.

    Returns
    -------
    prox : callable
        ``prox(v, step_size, *args)``, which has no use for the step.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections, prox
    >>> prox.from_projection(projections.non_negative)(torch.tensor([2.0, -1.0]), 0.5)
    tensor([2., 0.])
    """
    takes = taken(project, 1)

    @functools.wraps(project)
    def of_set(v: Any, step_size: Number, *args: Any, **keywords: Any) -> Any:
        return project(*selected(takes.most, (v,), args), **keywords)

    of_set.called = "project"  # type: ignore[attr-defined]
    of_set.projection = takes  # type: ignore[attr-defined]
    return of_set


def group_lasso(
    v: Any, step_size: Number, penalty: Any = 1.0, *, groups: Tensor | None = None
) -> Any:
    """Apply the proximal map of ``penalty`` times the sum of the Euclidean norms of groups.

    Parameters
    ----------
    v : Tensor or pytree of Tensor
        Where it is taken.
    step_size : float or Tensor
        The step.
    penalty : float, Tensor or pytree of Tensor
        Not negative: one number, one for each leaf, or with `groups` a vector of one for each
        group.
    groups : Tensor, optional
        int64, shaped like `v`, which is then a single tensor: the number, from 0, of the group
        that an entry belongs to. None: every leaf of `v` is a group.

    Returns
    -------
    x : pytree of Tensor
        Shaped like `v`.

    Raises
    ------
    ValueError
        If `groups` is not shaped like `v`.

    References
    ----------
    Yuan and Lin, Model selection and estimation in regression with grouped variables, 2006.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import prox
    >>> v, groups = torch.tensor([3.0, 4.0, 0.5]), torch.tensor([0, 0, 1])
    >>> prox.group_lasso(v, 1.0, 2.5, groups=groups)
    tensor([1.5000, 2.0000, 0.0000])
    """
    if groups is None:

        def one(v: Tensor, penalty: Number) -> Tensor:
            scale = size_of(v)
            return v * _kept((v / scale).square().sum(), scale, step_size * penalty)

        return _with_each(one, v, penalty)
    if not isinstance(v, Tensor) or v.shape != groups.shape:
        raise ValueError("groups must be shaped like v, a single tensor.")
    v = as_floating("v", v)
    scale, where = size_of(v), groups.reshape(-1)
    squares = (v / scale).square().reshape(-1)
    # No more groups than entries: how many there are, the host need not know.
    squares = torch.zeros_like(squares).index_add(0, where, squares)
    threshold = step_size * penalty
    if isinstance(threshold, Tensor) and threshold.ndim:
        threshold = threshold[where]
    return v * _kept(squares[where], scale, threshold).reshape(v.shape)


def _kept(squares: Tensor, scale: Tensor, threshold: Number) -> Tensor:
    """Form ``max(1 - threshold / norm, 0)`` of ``norm = scale sqrt(squares)``; no NaN at zero."""
    threshold = not_negative("penalty", threshold)
    present = squares > 0
    norm = scale * torch.where(present, squares, torch.ones_like(squares)).sqrt()
    outside = present & ~(norm <= threshold)  # true of NaN too
    return torch.where(outside, 1 - threshold / norm, torch.zeros_like(norm))


def size_of(*leaves: Tensor) -> Tensor:
    """Choose a scale for squares of entries of 1e-30 and 1e30, constant for derivatives."""
    sizes = [leaf.detach().abs().amax() for leaf in leaves if leaf.numel()]
    if not sizes:
        return torch.ones_like(leaves[0].detach().sum())
    return unit_of(torch.stack(sizes).amax())


def unit_of(largest: Tensor) -> Tensor:
    """Take the largest entry of something for a unit: one where it is 0 or not finite."""
    return torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)


def not_negative(name: str, value: Number) -> Number:
    """Pass a number on; where it is negative NaN, or for a Python number an error."""
    if isinstance(value, Tensor):
        return torch.where(value < 0, torch.full_like(value, math.nan), value)
    if value < 0:
        raise ValueError(f"{name} must not be negative; got {value!r}.")
    return value


def _growth(step_size: Number, penalty: Number, name: str = "penalty") -> Number:
    """Form the number that a squared penalty divides by."""
    return 1 + step_size * not_negative(name, penalty)


def _times(step_size: Number, penalty: Any) -> Any:
    return pytree.tree_map(lambda p: None if p is None else step_size * p, penalty)


def as_floating(name: str, value: Any) -> Tensor:
    """Make a floating-point tensor of a leaf: itself, or that of a number or of integers.

    Parameters
    ----------
    name : str
        What it is called, for messages.
    value : Tensor or float
        The leaf.

    Returns
    -------
    tensor : Tensor
        What can be mapped.

    Raises
    ------
    StructureMismatch
        For what has no place among real numbers.
    """
    if isinstance(value, Tensor):
        if value.is_floating_point():
            return value
        if not value.is_complex():
            return value.to(torch.get_default_dtype())
    elif isinstance(value, int | float):
        return torch.tensor(float(value))
    kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
    raise StructureMismatch(
        f"{name} is of type {kind}, which cannot be mapped. Pass a floating-point tensor, or "
        "leave it out.",
        leaf=name,
    )


def _with_each(one: Callable[[Tensor, Any], Tensor], v: Any, values: Any) -> Any:
    """Call ``one(leaf, value)`` for the leaves of `v`, with one value for all or one for each.

    A leaf of None, or whose own value is None, stays as it is.

    Returns
    -------
    x : pytree of Tensor
        Like `v`.

    Raises
    ------
    StructureMismatch
        If the values have another structure.
    """
    each = one_for_each("A penalty", values, v)
    return leafwise(v, lambda leaf, i: one(leaf, each[i]), each)


def leafwise(v: Any, one: Callable[[Tensor, int], Tensor], wanted: list[Any] | None = None) -> Any:
    """Map the leaves of a pytree; a number or a tensor of integers becomes floating point.

    Parameters
    ----------
    v : pytree
        What is mapped. None stays None.
    one : callable
        ``one(leaf, position)``.
    wanted : list, optional
        Where it has None, a leaf stays as it is.

    Returns
    -------
    x : pytree of Tensor
        Like `v`.
    """
    keyed, spec = pytree.tree_flatten_with_path(v)
    mapped = [
        leaf
        if leaf is None or (wanted is not None and wanted[i] is None)
        else one(as_floating("v" + pytree.keystr(path), leaf), i)
        for i, (path, leaf) in enumerate(keyed)
    ]
    return pytree.tree_unflatten(mapped, spec)


def one_for_each(name: str, values: Any, v: Any, *, none: bool = False) -> list[Any]:
    """Take one value for each leaf of `v`.

    Parameters
    ----------
    name : str
        What the values are called, for messages.
    values : float, Tensor or pytree
        One for all, or a pytree like `v`.
    v : pytree
        The leaves.
    none : bool
        Whether one None may stand for all.

    Returns
    -------
    values : list
        In the order of the leaves.

    Raises
    ------
    StructureMismatch
        If the values have another structure.
    """
    leaves, spec = pytree.tree_flatten(v)
    listed, other = pytree.tree_flatten(values)
    single = isinstance(values, float | int | Tensor) or (none and values is None)
    if other == spec and (single or not other.is_leaf() or listed[0] is not None):
        return listed
    if len(listed) == 1 and single:
        return listed * len(leaves)
    raise StructureMismatch(
        f"{name} must be one number or have the structure of v: {spec}; got {other}.",
        argument=name,
    )
