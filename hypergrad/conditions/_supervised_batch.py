"""The batches of `supervised`: their inputs, their targets, and which examples they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._autograd.torch_pytrees import pytree
from .._errors import StructureMismatch

_TARGETS = ("labels", "label", "targets", "target", "y")
ABSENT: Any = object()


class Split(NamedTuple):
    """The parts of a batch.

    Attributes
    ----------
    args, keywords : tuple, dict
        The arguments of the model.
    targets, index
        None where there are none.
    """

    args: tuple[Any, ...]
    keywords: dict[str, Any]
    targets: Any
    index: Any


def split(batch: Any, *, whole: bool = False) -> Split:
    """Take a batch apart; `whole`: a model that computes its loss is given the targets too."""
    if isinstance(batch, Mapping):
        keywords = {str(name): value for name, value in batch.items() if name != "index"}
        index, named = batch.get("index"), [name for name in _TARGETS if name in keywords]
        if whole:
            return Split((), keywords, None, index)
        if len(named) != 1:
            raise StructureMismatch(
                f"A batch that is a dict must have its targets under one of {', '.join(_TARGETS)}; "
                f"got the keys {', '.join(map(repr, batch))}.",
                argument="batch",
            )
        return Split((), keywords, keywords.pop(named[0]), index)
    if whole and isinstance(batch, tuple | list):
        return Split(tuple(batch), {}, None, None)
    if not isinstance(batch, tuple | list) or not 2 <= len(batch) <= 3:
        size = f" of {len(batch)} entries" if isinstance(batch, tuple | list) else ""
        raise StructureMismatch(
            "A batch must be (inputs, targets), (inputs, targets, index) or a dict; got a "
            f"{type(batch).__name__}{size}. Several inputs are a tuple or a dict in the place of "
            "the inputs: ((x1, x2), targets).",
            argument="batch",
        )
    inputs, (targets, index) = batch[0], (*batch[1:], None, None)[:2]
    if isinstance(inputs, Mapping):
        return Split((), {str(k): v for k, v in inputs.items()}, targets, index)
    return Split(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}, targets,
                  index)  # fmt: skip


def there(level: str, batch: Any) -> Any:
    if batch is ABSENT:
        other = "outer" if level == "inner" else "inner"
        raise StructureMismatch(
            f"problem.{level} was called without a batch. Pass problem.{level}(batch) in its place,"
            f" and problem.{other}(batch) in that of the other loss; a Bilevel is told where "
            f"batches come from by {level}_batches=... and {other}_batches=....",
            argument=level,
        )
    return batch


def refuse_no_arguments(level: str, arguments: tuple[Any, ...]) -> None:
    if not arguments:
        raise TypeError(
            f"problem.{level} takes a batch, problem.{level}(batch), and what that returns takes "
            "(params, hparams); got no argument."
        )


def is_loader(batch: Any) -> bool:
    return isinstance(batch, Iterable) and not isinstance(batch, tuple | list | Mapping | Tensor)


def moved(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) and leaf.device != device else leaf


def beside(outputs: Any, targets: Any) -> Any:
    """Put targets where the outputs are."""
    where = next((leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)), None)
    if where is None:
        return targets
    return pytree.tree_map(lambda leaf: moved(leaf, where.device), targets)
