"""What the projections ask of their arguments, and what they say where it is not so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._autograd.host import any_task
from .._errors import StructureMismatch
from ..prox import as_floating, not_negative

Number = float | Tensor


def leafwise(name: str, v: Any, project: Callable[[Tensor, int], Tensor]) -> Any:
    """Map the leaves of a pytree; a number or a tensor of integers becomes floating point.

    Parameters
    ----------
    name : str
        What `v` is called, for messages.
    v : pytree
        What is projected. None stays None.
    project : callable
        ``project(leaf, position)``.

    Returns
    -------
    x : pytree of Tensor
        Like `v`.
    """
    keyed, spec = pytree.tree_flatten_with_path(v)
    found = [
        leaf if leaf is None else project(as_floating(name + pytree.keystr(path), leaf), i)
        for i, (path, leaf) in enumerate(keyed)
    ]
    return pytree.tree_unflatten(found, spec)


def joined(v: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """All leaves of `v` as one vector, and the way back.

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
        If there is no tensor, or a leaf beside others is not one of floating point: whether it is
        a coordinate or a constant, nobody can tell.
    """
    keyed, spec = pytree.tree_flatten_with_path(v)
    there = [(pytree.keystr(path), leaf) for path, leaf in keyed if leaf is not None]
    if not there:
        raise StructureMismatch("v holds no tensor to project.", argument="v")
    if len(there) == 1:
        parts = [as_floating("v" + there[0][0], there[0][1])]
    else:
        for path, leaf in there:
            if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
                raise StructureMismatch(
                    f"v{path} is {_kind(leaf)}, and the set takes all leaves together: pass it as "
                    "a floating-point tensor if it is a coordinate, or leave it out of v.",
                    leaf=f"v{path}",
                )
        parts = [leaf for _, leaf in there]
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    vector = torch.cat([part.reshape(-1).to(dtype) for part in parts])
    sizes = [part.numel() for part in parts]

    def rebuild(x: Tensor) -> Any:
        pieces = iter([
            piece.reshape(part.shape).to(part.dtype)
            for piece, part in zip(x.split(sizes), parts, strict=True)
        ])
        leaves = [None if leaf is None else next(pieces) for _, leaf in keyed]
        return pytree.tree_unflatten(leaves, spec)

    return vector, rebuild


def radius_of(name: str, value: Any) -> Number:
    """A radius: one number, not negative."""
    radius = not_negative(name, one_number(name, value))
    if isinstance(value, Tensor):
        refuse_empty((value < 0).any(), f"{name} must not be negative.")
    return radius


def one_number(name: str, value: Any) -> Any:
    """A number, or a tensor of one entry as a tensor without dimensions.

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
    """An array that describes a set, as a tensor like another one.

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
    array = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if array.ndim == 0 and len(shape) == 1:
        array = array.expand(shape)
    if array.shape != shape:
        raise StructureMismatch(
            f"{name} must have the shape {shape}, to go with v; it has {tuple(array.shape)}.",
            argument=name,
        )
    return array


def refuse_empty(empty: Tensor, message: str) -> None:
    """Raise where a set is seen to be empty; on an accelerator, whose host must not wait, never.

    Raises
    ------
    ValueError
        With the message, which names the argument.
    """
    if empty.device.type == "cpu" and not torch.compiler.is_compiling() and any_task(empty):
        raise ValueError(message)


def nan_where(empty: Tensor, x: Tensor) -> Tensor:
    """NaN in place of a point of an empty set."""
    return torch.where(empty, torch.full_like(x, math.nan), x)


def widest(v: Tensor) -> Tensor:
    """`v` with the digits that sums of it need; a device without float64 keeps its own."""
    return v if v.device.type == "mps" else v.double()


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    return f"of type {type(value).__name__}"
