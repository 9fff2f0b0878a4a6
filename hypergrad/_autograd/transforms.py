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


#: Whether the caller is inside `torch.func.grad`, `vmap`, `jvp` or another transform.
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
#: Whether a tensor belongs to a function transform: its values may not be looked at.
is_wrapped: Callable[[Tensor], bool] = _functorch.is_functorch_wrapped_tensor
#: How many function transforms surround the caller.
depth: Callable[[], int] = _functorch.get_dynamic_layer_stack_depth


def inside_vmap() -> bool:
    """Say whether one of the transforms around the caller is a vmap."""
    stack = _functorch.get_interpreter_stack() or ()
    return any(i.key() == _functorch.TransformType.Vmap for i in stack)


def forward_mode_active() -> bool:
    """Say whether the caller is inside `torch.autograd.forward_ad.dual_level`."""
    return forward_ad._current_level >= 0


def alive(tensor: Tensor) -> Tensor:
    """Unwrap a saved tensor once the transform that it was saved under has returned."""
    return _functorch.unwrap_if_dead(tensor)


def primal(tensor: Tensor) -> Tensor:
    """Strip a tensor of its tangent at the innermost forward-mode level."""
    return forward_ad.unpack_dual(tensor, level=0).primal if forward_mode_active() else tensor


@contextmanager
def lower_levels() -> Iterator[None]:
    """Let operations inside a jvp rule carry the tangents of the levels further out.

    PyTorch switches forward mode off while a rule runs, which would cut those levels off in
    silence. Use it on tensors that have been through `primal`.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield


def layers(tensor: Tensor) -> list[Tensor]:
    """List a tensor and what it wraps, outermost wrapper first, the plain tensor last."""
    peeled = [tensor]
    while is_wrapped(peeled[-1]):
        peeled.append(_functorch.get_unwrapped(peeled[-1]))
    return peeled


def without_left(tensor: Tensor) -> Tensor:
    """Unwrap a tensor down from the layers of transforms that the caller has left by now."""
    level = _functorch.maybe_current_level() or 0
    while is_wrapped(tensor) and _functorch.maybe_get_level(tensor) > level:
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def carries_derivative(tensor: Tensor) -> bool:
    """Say whether any transform, or plain autograd, differentiates with respect to this tensor."""
    if not is_wrapped(tensor):
        return tensor.requires_grad or has_tangent(tensor)
    return any(layer.requires_grad or has_tangent(layer) for layer in layers(tensor))


def is_batched(tensor: Tensor) -> bool:
    """Say whether the tensor carries a batch dimension of a surrounding `torch.func.vmap`."""
    while not _functorch.is_batchedtensor(tensor):
        if not is_wrapped(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return True


def first_slice(tensor: Tensor) -> Tensor:
    """Take the first task of every batch: a plain tensor with the logical shape of `tensor`."""
    if not is_wrapped(tensor):
        return tensor.detach()
    inner = _functorch.get_unwrapped(tensor)
    if _functorch.is_batchedtensor(tensor):
        dim = _functorch.maybe_get_bdim(tensor)
        # Of a batch without tasks there is no first one.
        inner = inner.select(dim, 0) if inner.shape[dim] else inner.sum(dim=dim)
    return first_slice(inner)


def has_tangent(tensor: Tensor) -> bool:
    """Say whether the tensor is dual at the forward-mode level that it belongs to."""
    if not forward_mode_active() or _functorch.is_batchedtensor(tensor):
        return False  # a batch has its tangents in what it wraps
    # An operation sees the tangents of the innermost level alone.
    with at_level(max(_functorch.maybe_get_level(tensor), 0)):
        return forward_ad.unpack_dual(tensor, level=0).tangent is not None


def level_of(tensor: Tensor | None = None) -> int:
    """Look up the level of a tensor's outermost transform, or of the innermost around the call."""
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

    The hooks of `torch.utils.checkpoint` would compute the whole region again, this call included,
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
