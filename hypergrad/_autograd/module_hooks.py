"""Noticing modules and checkpoints in a thread, wherever a user's function has hidden them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.utils import checkpoint
from torch.utils.hooks import RemovableHandle


class Watcher(Protocol):
    """A listener to the modules that run, and the checkpoints that begin."""

    @property
    def noticed(self) -> bool:
        """Whether there was anything to hear."""

    def enter(self, module: nn.Module) -> None:
        """Hear that a module is about to run."""

    def leave(self, module: nn.Module) -> None:
        """Hear that it has run, or failed."""

    def keeps(self) -> bool:
        """Say whether a region under a checkpoint is to keep what it computes, here."""

    def begin(self, again: Callable[..., None]) -> Callable[..., None]:
        """Hear that a checkpoint's region begins; return a function that does as `again` does."""


_checkpoints: Any = checkpoint
_watcher: ContextVar[Watcher | None] = ContextVar("hypergrad_watcher", default=None)
_installing = threading.Lock()
_number = RemovableHandle(OrderedDict()).id  # which no other hook gets
_installed: list[Any] = []  # how to remove the hooks, and one more entry for every further watch


def watch(watcher: Watcher | None) -> Token[Watcher | None]:
    """Tell of every module that runs in this thread, until `unwatch`; None: tell nobody."""
    # PyTorch knows hooks for one module, or for all threads: these are for all, and return at
    # once in threads that nobody watches.
    with _installing:
        if _installed:
            _installed.append(None)
        else:
            _installed.append(_Hooks())
    return _watcher.set(watcher)


def unwatch(token: Token[Watcher | None]) -> None:
    """Tell whoever was told before."""
    _watcher.reset(token)
    with _installing:
        if len(_installed) > 1:
            _installed.pop()
        else:
            _installed.pop().remove()


class _Hooks:
    def __init__(self) -> None:
        # Always under the same number: a compiled module is compiled again where it changes.
        modules._global_forward_pre_hooks[_number] = _entering
        modules._global_forward_hooks[_number] = _leaving
        modules._global_forward_hooks_always_called[_number] = True
        # A compiled module warns of hooks that are called twice; these may be.
        self._asked = modules._has_any_global_hook
        modules._has_any_global_hook = _has_others
        # Of checkpoints PyTorch tells nobody. It looks these names up whenever one begins.
        self._names = {name: getattr(_checkpoints, name) for name in _exchanged}
        for name, make in _exchanged.items():
            setattr(_checkpoints, name, make(self._names[name]))

    def remove(self) -> None:
        modules._has_any_global_hook = self._asked
        for name, there in self._names.items():
            setattr(_checkpoints, name, there)
        for hooks in (
            modules._global_forward_pre_hooks,
            modules._global_forward_hooks,
            modules._global_forward_hooks_always_called,
        ):
            hooks.pop(_number, None)


def watching() -> Watcher | None:
    """Find the watcher that is told in this thread."""
    return None if torch.compiler.is_compiling() else _watcher.get()


def _entering(module: nn.Module, args: Any) -> None:
    watcher = watching()
    if watcher is not None:
        watcher.enter(module)


def _leaving(module: nn.Module, args: Any, output: Any) -> None:
    watcher = watching()
    if watcher is not None:
        watcher.leave(module)


def _beginning(frame: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function that makes the frame of a checkpoint, to tell when one begins."""

    def make(again: Callable[..., None], *args: Any, **kwargs: Any) -> Any:
        watcher = watching()
        return frame(again if watcher is None else watcher.begin(again), *args, **kwargs)

    return make


def _surrounding(hook: Callable[[Any], AbstractContextManager[Any]]) -> Callable[..., Any]:
    """Wrap the function that makes the context which a region runs in."""

    def make(*args: Any, **kwargs: Any) -> Any:
        watcher = watching()
        return nullcontext() if watcher is not None and watcher.keeps() else hook(*args, **kwargs)

    return make


class _Saving:
    """In place of the function that saves the arguments of a region."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def apply(self, *args: Any) -> Any:
        """Save them, unless the region keeps what it computes: a transform may not like it."""
        watcher = watching()
        if watcher is not None and watcher.keeps():
            return torch.empty(0)
        return self._function.apply(*args)


class _Reentrant:
    """In place of the reentrant checkpoint, which has no derivative by chosen inputs."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def apply(self, run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Run a region, under the other checkpoint in a thread that is watched."""
        if watching() is None:
            return self._function.apply(run, preserve, *args)
        return checkpoint.checkpoint(run, *args, use_reentrant=False, preserve_rng_state=preserve)


_exchanged: dict[str, Callable[[Any], Any]] = {
    "_CheckpointFrame": _beginning,
    "_checkpoint_hook": _surrounding,
    "CheckpointFunction": _Reentrant,
}
if hasattr(checkpoint, "_NoopSaveInputs"):  # PyTorch 2.10
    _exchanged["_NoopSaveInputs"] = _Saving


def _has_others() -> bool:
    """Say whether there are global hooks on modules beside these."""
    before = [*modules._global_forward_pre_hooks.values(), *modules._global_forward_hooks.values()]
    return any(hook not in (_entering, _leaving) for hook in before) or bool(
        modules._global_backward_pre_hooks or modules._global_backward_hooks
    )
