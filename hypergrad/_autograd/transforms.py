"""What the library needs to know of the function transforms (torch.func) that surround a call.

Only this file and `_vmaps.py` touch functorch's private names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._dynamo import eval_frame as _eval_frame
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from .._errors import UnsupportedOperation

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


def refuse_old_vmap(tensors: Iterable[Tensor | None]) -> None:
    """Raise for the batches of ``is_grads_batched=True``, which no rule of ours can see.

    Raises
    ------
    UnsupportedOperation
        With the transform to use instead.
    """
    if any(t is not None and _functorch.is_legacy_batchedtensor(t) for t in tensors):
        raise UnsupportedOperation(
            "torch.autograd.grad(is_grads_batched=True) and functional.jacobian(vectorize=True) do "
            "not go through an implicit solution. Use torch.func.jacrev, or torch.func.vmap over "
            "torch.func.vjp; torch.func.jacfwd in forward mode."
        )


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


def never_compiled(fun: Fun) -> Fun:
    """Keep a function out of `torch.compile`, whose graphs have no second derivative."""
    # torch.compiler.disable does the same, but imports the compiler with the library.

    @functools.wraps(fun)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            raise UnsupportedOperation(
                "torch.export cannot record an implicit solution, whose solver looks at values. "
                "Export the functions around it, or the solver by itself."
            )
        # The compiler looks on, too, where it gave up the frame that calls this one.
        if torch.compiler.is_compiling() or _eval_frame.get_eval_frame_callback() is not None:
            return torch._dynamo.disable(fun)(*args, **kwargs)
        _refuse_tracing()
        return fun(*args, **kwargs)

    return cast("Fun", call)


def _refuse_tracing() -> None:
    """Raise where the caller is being traced: a solve looks at values, a trace has none."""
    stack = _functorch.get_interpreter_stack() or ()
    functional = any(i.key() == _functorch.TransformType.Functionalize for i in stack)
    if functional or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        raise UnsupportedOperation(
            "torch.func.functionalize, torch.func.linearize and make_fx trace a function without "
            "its values, which an implicit derivative needs. Use torch.func.vjp or jvp in place of "
            "linearize, and call hypergrad outside what is traced."
        )


def outside_transforms() -> AbstractContextManager[None]:
    """Make tensors that no surrounding function transform sees, such as random constants."""
    return at_level(0)


# What asks autograd itself: for a derivative, or whether one will be taken.
_ASKS_AUTOGRAD = frozenset({
    torch.autograd.grad,
    torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.register_hook,
})


_OPERATORS = frozenset({torch._ops.OpOverload, torch._ops.OpOverloadPacket})


class WatchForDerivatives(TorchFunctionMode):
    """Notices whether a function that is being called has to do with derivatives itself.

    `seen` is set when an operation runs in a transform that is entered inside it, when
    `torch.autograd.grad` is called, or when a tensor is asked whether it requires grad; and by a
    custom function or operator with a batching rule of its own: a vmap puts the rule in its place,
    so that whoever differentiates from outside of the vmap never gets to its derivative.
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


class WithoutDerivative(torch.autograd.Function):
    """A function of several results through which no derivative passes."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.count = len(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        return None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[None, ...]:
        return (None,) * ctx.count


class _AllTasks(torch.autograd.Function):
    """All tasks' rows of a ``(k,)`` tensor as one plain ``(tasks, k)`` tensor.

    The batching rule returns an unbatched result, so that Python may look at it under any
    nesting of transforms.
    """

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        return rows.detach().reshape(-1, rows.shape[-1]).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], rows: Tensor) -> tuple[Tensor, None]:
        return _AllTasks.apply(rows.movedim(in_dims[0], 0)), None

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        return None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        return None


def all_tasks(rows: Tensor) -> Tensor:
    """Rows of every task, ``(tasks, k)``, as a plain tensor that the host may read."""
    rows = rows.detach()
    if is_wrapped(rows):
        rows = _AllTasks.apply(rows)
        while is_wrapped(rows):
            rows = _functorch.get_unwrapped(rows)
        return rows
    return rows.reshape(-1, rows.shape[-1])


def any_task(flag: Tensor) -> bool:
    """Whether a flag is set for any task. Synchronises with the host once."""
    flag = layers(flag)[-1]  # of all tasks, in whatever order
    return bool(flag.any()) if flag.ndim else bool(flag)


def every_task(flag: Tensor) -> bool:
    """Whether a flag is set for every task. Synchronises with the host once."""
    flag = layers(flag)[-1]
    return bool(flag.all()) if flag.ndim else bool(flag)


class _Refuse(torch.autograd.Function):
    """The identity on a result that must not be differentiated: doing so raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: Callable[[], Exception], result: Tensor, *sources: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise ctx.message()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise ctx.message()


def refuse_derivatives(
    results: list[Tensor],
    sources: list[Tensor],
    message: Callable[[], Exception],
    *,
    plain: bool = False,
) -> list[Tensor]:
    """Results that raise where a transform or, with `plain`, autograd differentiates them."""

    def refused(source: Tensor) -> bool:
        *wrappers, own = layers(source)
        return any(w.requires_grad or has_tangent(w) for w in wrappers) or has_tangent(own)

    tracked = [s for s in sources if refused(s) or (plain and carries_derivative(s))]
    if not tracked:
        return results
    return [_Refuse.apply(message, result, *tracked) for result in results]
