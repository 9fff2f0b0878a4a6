"""Passes over the batches of a mean, which must be the same in every pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from .._autograd.ranks import any_process
from .._autograd.torch_pytrees import pytree
from .._autograd.transforms import is_wrapped
from .._errors import RankFailed, StructureMismatch

_LOOKED_AT = 8  # entries of each tensor
_END = object()
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
    group : ProcessGroup, optional
        Who evaluates the batches together, and so has as many of them.
    """

    def __init__(
        self,
        batches: Iterable[Any] | None,
        on_batch: Callable[[int], Any] | None = None,
        group: Any = None,
    ) -> None:
        self._batches, self._on_batch, self.group = batches, on_batch, group
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
            If there is no batch, the batches are not those of the pass before, or other processes
            have more or fewer.
        RankFailed
            If they cannot be read in another process.
        """
        if self._batches is None:
            yield None
            return
        seen: list[str] = []
        for batch in self._batches if self.group is None else self._in_step(self._batches):
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

    def _in_step(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Iterate as long as all processes do."""
        left, done = None, 0
        while True:
            batch, error = _END, None
            try:
                left = iter(batches) if left is None else left
                batch = next(left, _END)
            except Exception as failed:
                error = failed
            ended = batch is _END and error is None
            some = any_process([batch is not _END, ended, error is not None], self.group)
            if error is not None:
                raise error
            if some[2]:
                raise RankFailed(
                    "Reading batches raised an error in another process, which raises it there. "
                    "All processes stop, so that none waits for another."
                )
            if some[0] and some[1]:
                raise StructureMismatch(
                    f"batches has {'only ' if ended else 'more than '}{done} "
                    f"batches in this process, and {'more' if ended else 'no more'} in another "
                    "one. Each batch is evaluated by all processes together: give as many to each "
                    "(drop_last=True of a DistributedSampler).",
                    argument="batches",
                )
            if ended:
                return
            done += 1
            yield batch


def refuse_iterators(batches: Any) -> None:
    """Raise where batches cannot be passed over again.

    Raises
    ------
    TypeError
        If they are no iterable at all.
    StructureMismatch
        If they are an iterator, such as a generator, or batches of unequal size that are drawn anew
        in each pass, so that their mean is another loss each time.
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
    if isinstance(batches, DataLoader) and _changes_the_mean(batches):
        raise StructureMismatch(
            f"batches shuffles the examples into batches of {batches.batch_size} and a rest, so "
            f"that the mean over them is another loss in each pass: {_CURE}",
            argument="batches",
        )


def _changes_the_mean(loader: DataLoader[Any]) -> bool:
    """Say whether the mean over a loader's batches is another one in each pass."""
    sampler, size = loader.sampler, loader.batch_size
    if not isinstance(sampler, RandomSampler) or size is None:
        return False
    some = sampler.replacement or len(sampler) != len(sampler.data_source)
    return some or (len(sampler) % size != 0 and (len(sampler) > size or loader.drop_last))


def _refuse_change(what: str) -> NoReturn:
    raise StructureMismatch(
        f"batches change from pass to pass: {what} in the pass before, so that products would be "
        f"those of different matrices. Is it shuffled? Then {_CURE}",
        argument="batches",
    )


def _fingerprint(batch: Any) -> str:
    """Write down the structure of a batch, its shapes, and a few entries."""
    leaves, spec = pytree.tree_flatten(batch)
    return f"{[_of_leaf(leaf) for leaf in leaves]} {spec}"


def _of_leaf(leaf: Any) -> Any:
    if isinstance(leaf, str | bytes | int | float | bool | None):
        return leaf
    if isinstance(leaf, Mapping):  # such as the BatchEncoding of transformers
        return type(leaf).__name__, _fingerprint(dict(leaf))
    if dataclasses.is_dataclass(leaf):
        names = [field.name for field in dataclasses.fields(leaf)]
        inside = {name: getattr(leaf, name, None) for name in names}
        return type(leaf).__name__, _fingerprint(inside)
    if isinstance(leaf, Tensor):
        return _of_tensor(leaf)
    if hasattr(leaf, "__array__") and hasattr(leaf, "tolist"):  # an array of NumPy
        return f"{leaf.dtype} {tuple(leaf.shape)}", _some(leaf, leaf.size)
    return type(leaf).__name__


def _of_tensor(leaf: Tensor) -> Any:
    if is_wrapped(leaf) or leaf.is_nested or leaf.device.type == "meta":
        return str(leaf.dtype)
    kind = f"{leaf.dtype} {tuple(leaf.shape)}"
    if leaf.layout != torch.strided or leaf.is_quantized or not leaf.numel():
        return kind
    return kind, _some(leaf.detach(), leaf.numel())


def _some(entries: Any, count: int) -> Any:
    flat = entries.reshape(-1)
    return flat[:: max(count // _LOOKED_AT, 1)][: _LOOKED_AT + 1].tolist()
