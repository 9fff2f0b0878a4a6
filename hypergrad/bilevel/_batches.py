"""Where the mini-batches of a level come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .._errors import StructureMismatch, UnsupportedOperation

Source = Sequence[Any] | Iterable[Any] | Callable[[torch.Generator], Any] | None


class Batch(NamedTuple):
    """The arguments of a loss after ``(params, hparams)``: nothing, or one mini-batch.

    Attributes
    ----------
    args : tuple
        Empty, or the batch alone.
    place : int, optional
        Where it stands in the sequence that it was drawn from.
    """

    args: tuple[Any, ...] = ()
    place: int | None = None


class Batches:
    """Draws batches from a sequence, a callable or any other iterable.

    Parameters
    ----------
    name : str
        What the source is called, for messages.
    source : sequence, callable, iterable or None
        A sequence is drawn from at random, with replacement; a callable is given the generator;
        an iterable is gone through again and again; None stands for no batches at all.
    """

    def __init__(self, name: str, source: Source) -> None:
        self.name, self._source = name, source
        self._iterator: Iterator[Any] | None = None
        self._taken = 0  # of this pass through an iterable
        usable = source is None or callable(source) or isinstance(source, Iterable)
        if not usable and not hasattr(source, "__getitem__"):
            raise TypeError(
                f"{name} must be a sequence of batches, an iterable such as a DataLoader, or a "
                f"callable that draws one; got {type(source).__name__}."
            )
        if isinstance(source, Mapping | nn.Module):
            raise TypeError(
                f"{name} is a {type(source).__name__}, which is no sequence of batches; pass a "
                "list, a DataLoader, or a callable that draws a batch."
            )
        #: How many batches there are, where they have places.
        self.count: int | None = None
        if source is None:
            self.count = 1
        elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):
            self.count = len(source)  # type: ignore[arg-type]
            if not self.count:
                raise ValueError(f"{name} is empty: there is no batch to draw.")

    def places(self, who: str) -> int:
        """Count the batches, for a method that needs each of them again.

        Parameters
        ----------
        who : str
            The method.

        Returns
        -------
        count : int
            How many there are.

        Raises
        ------
        UnsupportedOperation
            If they have no places.
        """
        if self.count is None:
            raise UnsupportedOperation(
                f"{who} needs each batch again: {self.name} must be a sequence, with a length and "
                "with batches at places 0, 1, ..., such as list(dataloader)."
            )
        return self.count

    @property
    def there(self) -> bool:
        """Whether there is a source, so that a loss is given a batch."""
        return self._source is not None

    def draw(self, generator: torch.Generator) -> Batch:
        """Draw one batch."""
        if self._source is None:
            return Batch(place=0)
        if self.count == 1:
            return self[0]
        if self.count is not None:
            return self[int(torch.randint(self.count, (), generator=generator))]
        if not isinstance(self._source, Iterable):
            return Batch((self._source(generator),))
        if self._iterator is None:
            self._iterator, self._taken = iter(self._source), 0
        for batch in self._iterator:
            self._taken += 1
            return Batch((batch,))
        if not self._taken or iter(self._source) is self._source:
            raise ValueError(
                f"{self.name} is exhausted, and going through it again gives nothing. Pass a list, "
                "a DataLoader, or a callable that draws a batch."
            )
        self._iterator = None
        return self.draw(generator)

    def __getitem__(self, index: int) -> Batch:
        if self._source is None:
            return Batch(place=0)
        return Batch((self._source[index],), index)  # type: ignore[index]

    def state(self) -> int:
        """Say how far the pass through an iterable has come."""
        return self._taken

    def load(self, taken: int) -> None:
        """Go on where a pass had come to."""
        if not isinstance(taken, int) or taken < 0:
            raise StructureMismatch(
                f"{self.name}: {taken!r} is no number of batches.", argument="state"
            )
        self._iterator, self._taken = None, 0
        if taken and self._source is not None and self.count is None:
            self._iterator = iter(self._source)  # type: ignore[arg-type]
            for self._taken in range(1, taken + 1):
                next(self._iterator, None)
