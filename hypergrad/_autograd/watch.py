"""Noticing a function that has to do with derivatives itself."""

from __future__ import annotations

from typing import Any

import torch
from torch._C import _functorch
from torch._functorch.autograd_function import custom_function_call
from torch.overrides import TorchFunctionMode

# The functions that ask autograd itself: for a derivative, or whether one will be taken.
_ASKS_AUTOGRAD = frozenset({
    torch.autograd.grad,
    torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.register_hook,
})


_OPERATORS = frozenset({torch._ops.OpOverload, torch._ops.OpOverloadPacket})


class WatchForDerivatives(TorchFunctionMode):
    """Notices whether a function that is being called has to do with derivatives itself.

    `seen` is set when an operation runs in a transform that is entered inside it, when
    `torch.autograd.grad` is called, or when a tensor is asked whether it requires grad. A custom
    function or operator with a batching rule of its own sets it too: a vmap puts the rule in its
    place, so that whoever differentiates from outside of the vmap never gets to its derivative.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False
        self._level = 0

    def __enter__(self) -> Any:
        """Count the transforms that there are."""
        self._level = _functorch.maybe_current_level() or 0
        return super().__enter__()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass every operation on."""
        level = _functorch.maybe_current_level() or 0
        self.seen = (
            self.seen
            or level > self._level
            or func in _ASKS_AUTOGRAD
            or (func is custom_function_call and not args[0].generate_vmap_rule)
            or (type(func) in _OPERATORS and not str(func).startswith("aten"))
        )
        return func(*args, **(kwargs or {}))
