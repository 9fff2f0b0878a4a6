"""The state of modules while a user's function runs: put back afterwards, whatever ran.

A module that runs works on copies of its buffers and tensor attributes. So what the caller owns
is never written to, not even for a while, and a recorded graph keeps the values that it saw.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from .transforms import at_level, carries_derivative, level_of

MISSING: Any = object()
# The types of most attributes: to ask whether one is a tensor takes longer.
_NO_TENSORS = frozenset({bool, int, float, str, tuple, list, dict, set, OrderedDict, type(None)})
_PLAIN = frozenset({bool, int, float, str, type(None)})


class Slot(NamedTuple):
    """Something that a module holds.

    Attributes
    ----------
    where : dict
        Its parameters, buffers or attributes.
    name : str
        The key there.
    value
        A tensor, or a plain value.
    """

    where: dict[str, Any]
    name: str
    value: Any


@dataclasses.dataclass
class _Held:
    """The slots of one module as they were before.

    Attributes
    ----------
    module : nn.Module
        The module.
    attributes : dict
        Its attributes.
    tensors : list of str
        Which of them are tensors.
    slots : dict
        Its buffers, as they were seen last, and the attributes that carry derivatives.
    replaced : dict
        For each slot the values put there in the evaluation, each with the one there before it.
    parts : list
        Itself and those of its parts that have slots.
    ran : bool
        Whether it has run itself.
    """

    module: nn.Module
    attributes: dict[str, Any]
    tensors: list[str]
    slots: dict[str, Any] = dataclasses.field(default_factory=dict)
    replaced: dict[str, list[tuple[Any, Any]]] = dataclasses.field(default_factory=dict)
    parts: list[_Held] = dataclasses.field(default_factory=list)
    ran: bool = False

    def before(self, name: str, now: Any) -> Any:
        """Look up the value that a slot had before it was replaced by the one there now."""
        return next((b for was, b in self.replaced.get(name, ()) if was is now), now)


class ModuleState:
    """The modules that have run in one evaluation of a user's function.

    Within the evaluation a module finds what it left; the next one begins where this one began.

    Parameters
    ----------
    is_new : callable
        Whether a tensor was made in this evaluation.
    """

    def __init__(self, is_new: Callable[[Tensor], bool]) -> None:
        self._is_new = is_new
        self._level = level_of()
        self._held: dict[int, _Held] = {}
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # of a tensor: itself, the copy
        self._originals: dict[int, Tensor] = {}  # of a copy
        self._depth = 0

    def enter(self, module: nn.Module) -> None:
        """Note that a module is about to run."""
        self._depth += 1
        held = self._held.get(id(module)) or self._take(module)
        if held.slots:
            self._replace(held)
        if not held.ran:
            held.ran = True
            attributes = module.__dict__
            for name in held.tensors:
                tensor = held.attributes[name]
                if attributes.get(name, MISSING) is tensor:
                    attributes[name] = self._copy(tensor)

    def leave(self, module: nn.Module) -> None:
        """Note that a module has run, or failed."""
        self._depth -= 1
        held = self._held.get(id(module))
        if held is not None:
            for part in held.parts if self._depth == 0 and held.parts else (held,):
                self._note(part)

    def put_back(self) -> None:
        """Let every module hold again what it held before the evaluation."""
        for held in self._held.values():
            if held.slots:
                self._put_back_buffers(held)
            attributes = held.module.__dict__
            if len(attributes) > len(held.attributes):
                for name in [name for name in attributes if name not in held.attributes]:
                    del attributes[name]
            for name, value in held.attributes.items():
                now = attributes.get(name, MISSING)
                # A value that nobody here has put into a slot was put back by functional_call.
                if now is not value and (name not in held.slots or held.before(name, now) is value):
                    attributes[name] = value

    @property
    def is_stateless(self) -> bool:
        """Whether no module that has run holds anything but parameters and plain values."""
        return not any(
            held.slots or held.tensors or held.module._buffers for held in self._held.values()
        )

    def is_copy(self, tensor: Tensor) -> bool:
        """Say whether a tensor stands in for one of the caller's."""
        return id(tensor) in self._originals

    @property
    def modules(self) -> Iterator[nn.Module]:
        """The modules that have run, and their parts."""
        return (held.module for held in self._held.values())

    def __len__(self) -> int:
        """Count the modules that have run, with those that are parts of them."""
        return len(self._held)

    def slots(self, since: int = 0) -> Iterator[Slot]:
        """List what these modules hold now, in a form that may be kept.

        Parameters
        ----------
        since : int
            How many of the modules are left out, from the first on.

        Yields
        ------
        slot : Slot
            For every tensor, and every plain attribute that the evaluation has changed.
        """
        for held in list(self._held.values())[since:]:
            attributes, parameters = held.module.__dict__, held.module._parameters
            if not isinstance(parameters, dict):
                continue  # a scripted module, whose tensors nobody can exchange
            for name, parameter in parameters.items():
                yield Slot(parameters, name, parameter)
            for name, value in held.module._buffers.items():
                yield Slot(held.module._buffers, name, self._kept(value))
            for name, value in attributes.items():
                if type(value) in _PLAIN:
                    if value is not held.attributes.get(name, MISSING):
                        yield Slot(attributes, name, value)
                elif type(value) not in _NO_TENSORS and isinstance(value, Tensor):
                    yield Slot(attributes, name, self._kept(value))

    def path(self, module: nn.Module) -> str:
        """Name a module within the outermost one that has run."""
        for outermost in self.modules:
            for name, part in outermost.named_modules():
                if part is module:
                    return name or type(module).__name__
        return type(module).__name__

    def _take(self, module: nn.Module) -> _Held:
        """Note what a module and its parts hold."""
        parts = [self._held.get(id(part)) or self._first(part) for part in module.modules()]
        parts[0].parts = [part for part in parts if part.slots]
        return parts[0]

    def _first(self, module: nn.Module) -> _Held:
        attributes = dict(module.__dict__)
        tensors = [
            name
            for name, value in attributes.items()
            if type(value) not in _NO_TENSORS and isinstance(value, Tensor)
        ]
        held = self._held[id(module)] = _Held(module, attributes, tensors)
        for name in tensors:
            if carries_derivative(attributes[name]):
                held.slots[name] = attributes[name]
        if module._buffers:
            self._replace(held)
        return held

    def _replace(self, held: _Held) -> None:
        """Put copies in the place of a module's buffers."""
        buffers = held.module._buffers
        for name, now in buffers.items():
            if now is None:
                held.slots.setdefault(name, now)
            elif now is not held.slots.get(name, MISSING):
                if self._depth > 1 and name in held.slots:  # the module around it has put it there
                    self._note(held)
                buffers[name] = held.slots[name] = self._copy(now)

    def _note(self, held: _Held) -> None:
        """Note what has been put into a module's slots."""
        if not held.slots and not held.module._buffers:
            return
        buffers, attributes = held.module._buffers, held.module.__dict__
        for name in [*buffers.keys(), *(name for name in held.slots if name in attributes)]:
            now = buffers[name] if name in buffers else attributes[name]
            last = held.slots.get(name, MISSING)
            if now is not last:
                before = self._before(held, name, last)
                if self._before(held, name, now) is not before:
                    held.replaced.setdefault(name, []).append((now, before))
                held.slots[name] = now

    def _put_back_buffers(self, held: _Held) -> None:
        buffers = held.module._buffers
        for name in [name for name in held.slots if name not in held.attributes]:
            there = name in buffers  # a scripted module's are no dict
            now = buffers[name] if there else held.slots[name]
            before = self._before(held, name, now)
            if before is MISSING:
                if there:
                    del buffers[name]
                held.module._non_persistent_buffers_set.discard(name)
            elif not there or before is not now:
                buffers[name] = before

    def _before(self, held: _Held, name: str, now: Any) -> Any:
        """Look up the value that a slot had before the evaluation."""
        while True:
            before = held.before(name, now)
            before = self._originals.get(id(before), before)
            if before is now:
                return now
            now = before

    def _kept(self, value: Tensor | None) -> Tensor | None:
        """Keep the values of a tensor in one to which nobody will write."""
        if value is None:
            return None
        original = self._originals.get(id(value))
        if original is not None and not value._version:
            return original
        if original is not None or (self._is_new(value) and not carries_derivative(value)):
            return value.detach().clone()
        return value

    def _copy(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to work on; leave one that is the evaluation's own, or an argument."""
        if id(tensor) in self._originals:
            return tensor
        known = self._copies.get(id(tensor))
        if known is None:
            if carries_derivative(tensor) or self._is_new(tensor):
                return tensor
            # At the level of the evaluation: a transform inside it may be left before the end.
            if level_of() > self._level >= level_of(tensor):
                with at_level(self._level):
                    known = tensor, tensor.detach().clone()
            else:
                known = tensor, tensor.detach().clone()
            self._copies[id(tensor)] = known
            self._originals[id(known[1])] = tensor
        return known[1]
