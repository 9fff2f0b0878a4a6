"""What a run remembers: copied, compared with what there is, and put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._errors import StructureMismatch


def load(target: Tensor, name: str, value: Any, *, dry: bool = False) -> None:
    """Copy a saved tensor into one of ours, or look only whether it would go.

    Raises
    ------
    StructureMismatch
        If its shape or dtype is another.
    """
    if not isinstance(value, Tensor):
        raise StructureMismatch(f"{name} must be a tensor; got {type(value).__name__}.", leaf=name)
    if value.shape != target.shape or value.dtype != target.dtype:
        raise StructureMismatch(
            f"{name} was saved with shape {tuple(value.shape)} and dtype {value.dtype}, but here "
            f"it has shape {tuple(target.shape)} and dtype {target.dtype}: this is the state of "
            "another problem.",
            leaf=name,
        )
    if not dry:
        with torch.no_grad():
            target.copy_(value)


def copied(state: Any) -> Any:
    """A copy of everything in a state, detached."""
    return pytree.tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, state)


def match(own: Any, saved: Any, path: str) -> None:
    """Refuse a method's state that is shaped like none of this problem's."""
    if type(own) is not type(saved):
        raise StructureMismatch(
            f"{path} is a {type(saved).__name__}, not a {type(own).__name__}.", leaf=path
        )
    if isinstance(own, dict):
        if own.keys() != saved.keys():
            raise StructureMismatch(f"{path} holds {sorted(saved)}, not {sorted(own)}.", leaf=path)
        for name in own:
            match(own[name], saved[name], f"{path}[{name!r}]")
    elif isinstance(own, list):
        if len(own) != len(saved):
            raise StructureMismatch(
                f"{path} holds {len(saved)} entries, not {len(own)}.", leaf=path
            )
        for place, pair in enumerate(zip(own, saved, strict=True)):
            match(*pair, f"{path}[{place}]")
    elif isinstance(own, Tensor):
        load(own, path, saved, dry=True)


def placed(own: Any, saved: Any) -> Any:
    """A saved state on the devices of one's own."""
    if isinstance(own, dict):
        return {name: placed(own[name], saved[name]) for name in own}
    if isinstance(own, list):
        return [placed(a, b) for a, b in zip(own, saved, strict=True)]
    return saved.to(own.device) if isinstance(own, Tensor) else saved
