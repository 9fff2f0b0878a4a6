"""Passes over the batches of a mean, which must be the same in every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from torch import Tensor

from .._autograd.torch_pytrees import pytree
from .._autograd.transforms import is_wrapped
from .._errors import StructureMismatch

_LOOKED_AT = 8  # entries of each tensor
_CURE = (
    "pass a list of the batches (list(loader)), or a DataLoader with shuffle=False and without "
    "random augmentation."
)


class Passes:
    """Passes over some batches, or over nothing: then a pass has one part, which is None.

    Parameters
    ----------
    batches : iterable, optional
        Gives the same batches each time that it is iterated.
    on_batch : callable, optional
        ``on_batch(done)``, called after each batch with their number in this pass.
    """

    def __init__(
        self, batches: Iterable[Any] | None, on_batch: Callable[[int], Any] | None = None
    ) -> None:
        self._batches, self._on_batch = batches, on_batch
        self._seen: list[str] | None = None

    def __iter__(self) -> Iterator[Any]:
        """Make one pass.

        Yields
        ------
        batch
            Each of them in turn.

        Raises
        ------
        StructureMismatch
            If there is no batch, or the batches are not those of the pass before.
        """
        if self._batches is None:
            yield None
            return
        seen: list[str] = []
        for batch in self._batches:
            seen.append(_fingerprint(batch))
            if self._seen is not None and self._seen[len(seen) - 1 : len(seen)] != seen[-1:]:
                _refuse_change(f"batch {len(seen) - 1} is another one than")
            yield batch
            if self._on_batch is not None:
                self._on_batch(len(seen))
        if not seen:
            raise StructureMismatch(
                "batches is empty, or exhausted after one pass: there is nothing to take the mean "
                f"over. Several passes are made: {_CURE}",
                argument="batches",
            )
        if self._seen is not None and len(seen) != len(self._seen):
            _refuse_change(f"there are {len(seen)} batches, and {len(self._seen)}")
        self._seen = seen


def refuse_iterators(batches: Any) -> None:
    """Raise where batches cannot be passed over again.

    Raises
    ------
    TypeError
        If they are no iterable at all.
    StructureMismatch
        If they are an iterator, such as a generator.
    """
    if batches is None:
        return
    if isinstance(batches, Tensor | Mapping | str) or not hasattr(batches, "__iter__"):
        raise TypeError(
            "batches must be an iterable of batches, such as a list or a DataLoader; got "
            f"{type(batches).__name__}. A single batch is [batch]."
        )
    if hasattr(batches, "__next__"):
        raise StructureMismatch(
            f"batches is an iterator ({type(batches).__name__}), which is exhausted after one "
            f"pass, and several are made: {_CURE}",
            argument="batches",
        )


def _refuse_change(what: str) -> NoReturn:
    raise StructureMismatch(
        f"batches change from pass to pass: {what} in the pass before, so that products would be "
        f"those of different matrices. Is it shuffled? Then {_CURE}",
        argument="batches",
    )


def _fingerprint(batch: Any) -> str:
    """Write down the structure of a batch, its shapes, and a few entries."""
    if isinstance(batch, Mapping):
        batch = dict(batch)
    leaves, spec = pytree.tree_flatten(batch)
    return f"{[_of_leaf(leaf) for leaf in leaves]} {spec}"


def _of_leaf(leaf: Any) -> Any:
    if isinstance(leaf, str | int | float | bool | None):
        return leaf
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    kind = f"{leaf.dtype} {tuple(leaf.shape)}"
    if is_wrapped(leaf) or leaf.is_sparse or leaf.device.type == "meta" or not leaf.numel():
        return kind
    flat = leaf.detach().reshape(-1)
    return kind, flat[:: max(flat.numel() // _LOOKED_AT, 1)][: _LOOKED_AT + 1].tolist()
