"""Calls that cannot be differentiated, compiled or traced: refused where it is tried."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._dynamo import eval_frame as _eval_frame

from .._errors import UnsupportedOperation
from .transforms import Fun, carries_derivative, has_tangent, layers


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


def never_compiled(fun: Fun) -> Fun:
    """Keep a function out of `torch.compile`, whose graphs have no second derivative."""
    # torch.compiler.disable does the same, but imports the compiler with the library.

    @functools.wraps(fun)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            # Its tracer gives the text of an error of Python's own alone, on torch 2.10.
            traced = torch.compiler.is_dynamo_compiling()
            error = RuntimeError if traced else UnsupportedOperation
            raise error(
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
    """Make results raise where a transform or, with `plain`, autograd differentiates them."""

    def refused(source: Tensor) -> bool:
        *wrappers, own = layers(source)
        return any(w.requires_grad or has_tangent(w) for w in wrappers) or has_tangent(own)

    tracked = [s for s in sources if refused(s) or (plain and carries_derivative(s))]
    if not tracked:
        return results
    return [_Refuse.apply(message, result, *tracked) for result in results]
