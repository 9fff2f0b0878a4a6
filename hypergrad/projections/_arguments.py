"""Checks of the projections' arguments, and the messages where one fails."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._autograd.torch_pytrees import pytree
from .._autograd.transforms import layers
from .._errors import StructureMismatch
from ..prox import as_floating, not_negative

Number = float | Tensor


def joined(v: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Join all leaves of `v` to one vector, and give the way back.

    Parameters
    ----------
    v : pytree of Tensor
        With None among its leaves, perhaps; a single leaf may be a number or integers.

    Returns
    -------
    vector : Tensor
        ``(n,)``, of the widest dtype of the leaves.
    rebuild : callable
        From a vector to a pytree like `v`.

    Raises
    ------
    StructureMismatch
        If there is no tensor, or a leaf beside others is not one of floating point: nobody can
        tell whether it is a coordinate or a constant.
    """
    keyed, spec = pytree.tree_flatten_with_path(v)
    there = [(pytree.keystr(path), leaf) for path, leaf in keyed if leaf is not None]
    if not there:
        raise StructureMismatch("v holds no tensor to project.", argument="v")
    if len(there) == 1:
        leaves = [as_floating("v" + there[0][0], there[0][1])]
    else:
        for path, leaf in there:
            if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
                raise StructureMismatch(
                    f"v{path} is {_kind(leaf)}, and the set takes all leaves together: pass it as "
                    "a floating-point tensor if it is a coordinate, or leave it out of v.",
                    leaf=f"v{path}",
                )
        leaves = [leaf for _, leaf in there]
    dtype = functools.reduce(torch.promote_types, [leaf.dtype for leaf in leaves])
    vector = torch.cat([leaf.reshape(-1).to(dtype) for leaf in leaves])
    sizes = [leaf.numel() for leaf in leaves]

    def rebuild(x: Tensor) -> Any:
        pieces = iter([
            piece.reshape(leaf.shape).to(leaf.dtype)
            for piece, leaf in zip(x.split(sizes), leaves, strict=True)
        ])
        placed = [None if leaf is None else next(pieces) for _, leaf in keyed]
        return pytree.tree_unflatten(placed, spec)

    return vector, rebuild


def radius_of(value: Any) -> Number:
    """Check the argument `radius`: one number, not negative.

    Parameters
    ----------
    value : float or Tensor
        What was passed.

    Returns
    -------
    radius : float or Tensor
        NaN where it is negative and the host must not wait to see it.
    """
    radius = one_number("radius", value)
    if isinstance(radius, Tensor):
        refuse_empty(radius < 0, "radius must not be negative; got {}.", radius)
    return not_negative("radius", radius)


def one_number(name: str, value: Any) -> Any:
    """Check a number, and take the dimensions off a tensor of one entry.

    Parameters
    ----------
    name : str
        What it is called, for messages.
    value : float or Tensor
        What was passed.

    Returns
    -------
    number : float or Tensor
        The same, without dimensions.

    Raises
    ------
    StructureMismatch
        If it is neither.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise StructureMismatch(
                f"{name} must be one number; it has the shape {tuple(value.shape)}.",
                argument=name,
            )
        return value.reshape(())
    if not isinstance(value, int | float):
        raise StructureMismatch(f"{name} must be one number; got {_kind(value)}.", argument=name)
    return value


def described(name: str, value: Any, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Turn an array that describes a set into a tensor like another one.

    Parameters
    ----------
    name : str
        What it is called, for messages.
    value : Tensor or float
        The array; of a one-dimensional one a number stands for equal entries.
    shape : tuple of int
        The shape that it must have.
    like : Tensor
        Whose dtype and device it takes.

    Returns
    -------
    array : Tensor
        Of that shape.

    Raises
    ------
    StructureMismatch
        If it has another shape.
    """
    array = alike(value, like)
    if array.ndim == 0 and len(shape) == 1:
        array = array.expand(shape)
    if array.shape != shape:
        raise StructureMismatch(
            f"{name} must have the shape {shape}, to go with v; it has {tuple(array.shape)}.",
            argument=name,
        )
    return array


def refuse_empty(empty: Tensor, message: str, *figures: Tensor) -> None:
    """Raise where a set is seen to be empty; on an accelerator, whose host must not wait, never.

    Parameters
    ----------
    empty : Tensor
        Where it is.
    message : str
        It names the argument, and has ``{}`` in place of the figure.
    *figures : Tensor
        The argument's value, and what is subtracted from it; of several the least is said.

    Raises
    ------
    ValueError
        With the message.
    """
    if empty.device.type == "cpu" and not torch.compiler.is_compiling() and any_task(empty):
        figure = functools.reduce(torch.sub, figures or (empty,))
        raise ValueError(message.format(f"{float(layers(figure.detach())[-1].min()):.6g}"))


def vector(v: Any) -> Tensor:
    """Check that the argument to be projected is a vector.

    Parameters
    ----------
    v : Tensor
        What was passed.

    Returns
    -------
    v : Tensor
        ``(n,)``, of floating point.

    Raises
    ------
    StructureMismatch
        If it is none.
    """
    v = as_floating("v", v)
    if v.ndim != 1:
        raise StructureMismatch(
            f"v must be a vector; it has the shape {tuple(v.shape)}.", argument="v"
        )
    return v


def alike(value: Any, like: Tensor) -> Tensor:
    """Make a tensor of a number or a tensor, with the dtype and on the device of another."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def share(a: Tensor, b: Tensor) -> Tensor:
    """Divide: ``a / b``, and 0 where b is not positive; so are its derivatives."""
    there = b > 0
    return torch.where(there, a, 0.0) / torch.where(there, b, 1.0)


def nan_where(empty: Tensor, x: Tensor) -> Tensor:
    """Put NaN in place of a point of an empty set."""
    return torch.where(empty, torch.full_like(x, math.nan), x)


def widest(v: Tensor) -> Tensor:
    """Give `v` the digits that sums of it need, as far as the device has them."""
    return v.float() if v.device.type == "mps" else v.double()


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    return f"of type {type(value).__name__}"
