"""Facts about the function transforms (torch.func) that surround a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

Fun = TypeVar("Fun", bound=Callable[..., Any])


def transforms_active() -> bool:
    """Whether the caller is inside `torch.func.grad`, `vmap`, `jvp` or another transform."""
    return bool(torch._C._are_functorch_transforms_active())


def inside_vmap() -> bool:
    """Whether one of the transforms around the caller is a vmap."""
    stack = _functorch.get_interpreter_stack() or ()
    return any(i.key() == _functorch.TransformType.Vmap for i in stack)


def forward_mode_active() -> bool:
    """Whether the caller is inside `torch.autograd.forward_ad.dual_level`."""
    return forward_ad._current_level >= 0


def alive(tensor: Tensor) -> Tensor:
    """What a saved tensor is once the transform that it was saved under has returned."""
    return _functorch.unwrap_if_dead(tensor)


def primal(tensor: Tensor) -> Tensor:
    """The tensor without its tangent at the innermost forward-mode level."""
    return forward_ad.unpack_dual(tensor, level=0).primal if forward_mode_active() else tensor


@contextmanager
def lower_levels() -> Iterator[None]:
    """Inside a jvp rule: let operations carry the tangents of the levels further out.

    PyTorch switches forward mode off while a rule runs, which would cut those levels off in
    silence. Use it on tensors that have been through `primal`.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a function transform: its values may not be looked at."""
    return bool(_functorch.is_functorch_wrapped_tensor(tensor))


def layers(tensor: Tensor) -> list[Tensor]:
    """The tensor and what it wraps, outermost wrapper first, the plain tensor last."""
    found = [tensor]
    while is_wrapped(found[-1]):
        found.append(_functorch.get_unwrapped(found[-1]))
    return found


def without_left(tensor: Tensor) -> Tensor:
    """What a tensor wraps below the layers of transforms that the caller has left by now."""
    level = _functorch.maybe_current_level() or 0
    while is_wrapped(tensor) and _functorch.maybe_get_level(tensor) > level:
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def carries_derivative(tensor: Tensor) -> bool:
    """Whether any transform, or plain autograd, differentiates with respect to this tensor."""
    if not is_wrapped(tensor):
        return tensor.requires_grad or has_tangent(tensor)
    return any(layer.requires_grad or has_tangent(layer) for layer in layers(tensor))


def is_batched(tensor: Tensor) -> bool:
    """Whether the tensor carries a batch dimension of a surrounding `torch.func.vmap`."""
    return any(_functorch.is_batchedtensor(layer) for layer in layers(tensor))


def first_slice(tensor: Tensor) -> Tensor:
    """A plain tensor with the logical shape of `tensor`: the first task of every batch."""
    if not is_wrapped(tensor):
        return tensor.detach()
    inner = _functorch.get_unwrapped(tensor)
    if _functorch.is_batchedtensor(tensor):
        dim = _functorch.maybe_get_bdim(tensor)
        # Of a batch without tasks there is no first one.
        inner = inner.select(dim, 0) if inner.shape[dim] else inner.sum(dim=dim)
    return first_slice(inner)


def has_tangent(tensor: Tensor) -> bool:
    """Whether the tensor is dual at the forward-mode level that it belongs to."""
    if not forward_mode_active() or _functorch.is_batchedtensor(tensor):
        return False  # a batch has its tangents in what it wraps
    # An operation sees the tangents of the innermost level alone.
    with at_level(max(_functorch.maybe_get_level(tensor), 0)):
        return forward_ad.unpack_dual(tensor, level=0).tangent is not None


def level_of(tensor: Tensor | None = None) -> int:
    """The level of a tensor's outermost transform, or of the innermost one around the call."""
    if tensor is None:
        return _functorch.maybe_current_level() or 0
    return max(_functorch.maybe_get_level(tensor), 0) if is_wrapped(tensor) else 0


@contextmanager
def at_level(level: int) -> Iterator[None]:
    """Leave the transforms further in than a level; 0 leaves them all."""
    with ExitStack() as stack:
        while (_functorch.maybe_current_level() or 0) > level:
            stack.enter_context(temporarily_pop_interpreter_stack())
        yield


@contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """Record graphs of our own without the caller's saved-tensor hooks.

    Those of `torch.utils.checkpoint` would compute the whole region again, this call included,
    at each product; and `torch.func` refuses to work beside any.
    """
    hooks = []
    while (pair := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(pair)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pair in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(*pair)


def outside_transforms() -> AbstractContextManager[None]:
    """Make tensors that no surrounding function transform sees, such as random constants."""
    return at_level(0)
