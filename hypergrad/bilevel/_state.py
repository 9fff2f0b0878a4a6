"""The state of a run: copied, compared with what there is, and put back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._autograd.torch_pytrees import pytree
from .._errors import StructureMismatch


def copied(state: Any) -> Any:
    """Copy everything in a state, detached."""
    return pytree.tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, state)


def restored(target: Any, saved: Any, path: str) -> Any:
    """Compare a saved state with the one that it is to replace, and put it on its devices.

    Parameters
    ----------
    target, saved : dict, list, Tensor or anything
        What there is, and what was saved.
    path : str
        What it is called, for messages.

    Returns
    -------
    state
        Nothing in it is new memory, where the devices are the same.

    Raises
    ------
    StructureMismatch
        If what was saved is shaped like none of this problem's.
    """
    if isinstance(target, Tensor):
        if not isinstance(saved, Tensor):
            raise StructureMismatch(
                f"{path} must be a tensor; got {type(saved).__name__}.", leaf=path
            )
        if saved.shape != target.shape or saved.dtype != target.dtype:
            raise StructureMismatch(
                f"{path} was saved with shape {tuple(saved.shape)} and dtype {saved.dtype}, but "
                f"here it has shape {tuple(target.shape)} and dtype {target.dtype}: this is the "
                "state of another problem.",
                leaf=path,
            )
        return saved.to(target.device)
    if type(target) is not type(saved):
        raise StructureMismatch(
            f"{path} is a {type(saved).__name__}, not a {type(target).__name__}.",
            leaf=path,
        )
    if isinstance(target, dict):
        if target.keys() != saved.keys():
            raise StructureMismatch(
                f"{path} holds {sorted(saved)}, not {sorted(target)}.", leaf=path
            )
        return {name: restored(target[name], saved[name], f"{path}[{name!r}]") for name in target}
    if isinstance(target, list):
        if len(target) != len(saved):
            raise StructureMismatch(
                f"{path} holds {len(saved)} entries, not {len(target)}.", leaf=path
            )
        pairs = enumerate(zip(target, saved, strict=True))
        return [restored(*pair, f"{path}[{place}]") for place, pair in pairs]
    return saved
