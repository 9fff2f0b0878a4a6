"""The caller's vmaps, left for a while: a batch of tasks as plain tensors with task dimensions.

Inside a vmap every small operation passes through its machinery, and the host may not look at
values. A call that is surrounded by vmaps alone leaves them, works on the tensors that they have
batched, and enters them again for the user's functions, which close over batched data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch import pyfunctorch

from .random_numbers import generators, restore
from .torch_pytrees import pytree
from .transforms import forward_mode_active
from .watch import WatchForDerivatives

T = TypeVar("T")

# PyTorch's words where something that a function has recorded runs outside of the vmaps.
_ESCAPED = "escaped from inside a function being vmapped"


class StaysInside(Exception):
    """A user's function cannot be called from outside of the vmaps, or not rightly."""


def outside_of_vmaps(call: Callable[[Vmaps | None], T]) -> T:
    """Call a function with the caller's vmaps left, or inside of them where that cannot be.

    Parameters
    ----------
    call : callable
        Given the vmaps that have been left, or None where there are none, or they are not left.

    Returns
    -------
    answer
        What the function returned.

    Raises
    ------
    RuntimeError
        Whatever the function raises.
    """
    vmaps = None if forward_mode_active() else Vmaps.around()
    if vmaps is None:
        return call(None)
    random = generators()
    try:
        with vmaps.left():
            return call(vmaps)
    except StaysInside:
        pass
    except RuntimeError as error:
        if _ESCAPED not in str(error):
            raise
    restore(random)
    return call(None)


def outside(vmaps: Vmaps | None) -> AbstractContextManager[None]:
    """Run the body outside of the caller's vmaps, where there are any."""
    return nullcontext() if vmaps is None else vmaps.left()


class Vmaps:
    """All function transforms around a call, every one of which is a vmap.

    Attributes
    ----------
    sizes : tuple of int
        How many tasks each of them has, the outermost first.
    """

    def __init__(self, levels: Sequence[int], sizes: Sequence[int]) -> None:
        self._levels = tuple(levels)
        self.sizes = torch.Size(sizes)
        self._stack: list[Any] = []

    @classmethod
    def around(cls) -> Vmaps | None:
        """Find the vmaps around the call; None: there are none, or another transform among them."""
        if not torch._C._are_functorch_transforms_active():
            return None
        around = pyfunctorch.retrieve_all_functorch_interpreters()
        vmaps = [one for one in around if isinstance(one, pyfunctorch.VmapInterpreter)]
        if len(vmaps) < len(around):
            return None
        vmaps.sort(key=lambda one: one.level())
        return cls([one.level() for one in vmaps], [one.batch_size() for one in vmaps])

    @contextmanager
    def left(self) -> Iterator[None]:
        """Run the body outside of them."""
        with pyfunctorch.temporarily_clear_interpreter_stack() as self._stack:
            yield

    def entered(self) -> AbstractContextManager[None]:
        """Run the body inside of them again."""
        return pyfunctorch.temporarily_restore_interpreter_stack(self._stack)

    def inside(
        self,
        fun: Callable[..., T],
        *given: Any,
        differentiated: bool = True,
        watched: bool = True,
    ) -> T:
        """Call a user's function inside of them: plain pytrees go in, and come out.

        Parameters
        ----------
        fun : callable
            The function.
        *given
            Its arguments.
        differentiated : bool
            Whether a derivative of what it returns is going to be taken.
        watched : bool
            Whether it is watched for derivatives that it takes itself: once is enough.

        Returns
        -------
        answer : pytree
            What it returned.

        Raises
        ------
        StaysInside
            If a derivative of what it returns, taken outside, would be wrong, or if it fails: all
            of it is to be done inside, where its own error then shows.
        """
        watch = WatchForDerivatives()
        try:
            with self.entered():
                wrapped = self.wrapped_tree(given)
                with watch if watched else nullcontext():
                    result = fun(*wrapped)
                answer: T = self.unwrapped_tree(result)
        except Exception as error:
            raise StaysInside from error
        if differentiated and watch.seen:
            raise StaysInside
        return answer

    def unwrapped(self, tensor: Tensor) -> Tensor:
        """Unwrap a tensor into a plain one, with a dimension for every vmap in front."""
        if len(self._levels) == 1 and _functorch.is_batchedtensor(tensor):
            whole: Tensor = _functorch.get_unwrapped(tensor)
            if _functorch.maybe_get_bdim(tensor) == 0 and not _functorch.is_batchedtensor(whole):
                return whole  # as most are
        places: dict[int, int] = {}
        while _functorch.is_batchedtensor(tensor):
            places[_functorch.maybe_get_level(tensor)] = _functorch.maybe_get_bdim(tensor)
            tensor = _functorch.get_unwrapped(tensor)
        left, order = list(range(tensor.ndim)), []
        for level in self._levels:
            if level in places:
                order.append(left.pop(places[level]))
        tensor = tensor.permute(*order, *left) if order else tensor
        for place, level in enumerate(self._levels):
            if level not in places:
                tensor = tensor.unsqueeze(place)
        return tensor.expand(self.sizes + tensor.shape[len(self._levels) :])

    def wrapped(self, tensor: Tensor) -> Tensor:
        """Wrap a plain tensor with dimensions in front into the tensor of one task."""
        for level in self._levels:
            tensor = _functorch._add_batch_dim(tensor, 0, level)
        return tensor

    def unwrapped_tree(self, tree: Any) -> Any:
        """Unwrap all tensors of a pytree."""
        return pytree.tree_map_only(Tensor, self.unwrapped, tree)

    def wrapped_tree(self, tree: Any) -> Any:
        """Wrap all tensors of a pytree."""
        return pytree.tree_map_only(Tensor, self.wrapped, tree)
