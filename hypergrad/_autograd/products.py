"""Products from one recorded graph: its vector-Jacobian product replayed as often as is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import get_gradient_edge

from .attention import InnerChoices, math_kernel, under_math
from .double_backward import advise
from .trace import notes, refuse_moving
from .transforms import is_wrapped

Parts = Sequence[Tensor | None]
Product = Callable[[Tensor], Tensor]


class Replay:
    """Vector-Jacobian products of recorded outputs, from the one graph, as often as asked.

    Parameters
    ----------
    outputs, inputs : sequence of Tensor
        What is differentiated, by what.
    around : callable, optional
        What makes the context to form products in; None: as the innermost recording has noticed.
    """

    def __init__(
        self,
        outputs: Parts,
        inputs: Sequence[Tensor],
        around: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self._used = [i for i, o in enumerate(outputs) if o is not None and o.requires_grad]
        self._outputs: tuple[Any, ...] = tuple(
            o for o in outputs if o is not None and o.requires_grad
        )
        #: Tensors of the same shapes, and on the same devices.
        self._like = self._outputs
        self._inputs = tuple(inputs)
        self._around = notes().around if around is None else around
        self._math = under_math()

    def bare(self) -> Product | None:
        """Make the product of one output and one input, bare; None: it is not to be had."""
        single = len(self._outputs) == len(self._inputs) == 1
        if not single or self._math or _wrapped(self._like):
            return None
        if self._around is not None:
            return None
        outputs, inputs = self._outputs, self._inputs
        run = Variable._execution_engine.run_backward

        def form(cotangent: Tensor) -> Tensor:
            try:
                (pulled,) = run(
                    outputs, (cotangent,), True, False, inputs, True, accumulate_grad=False
                )
            except RuntimeError as error:
                advise(error)
                raise
            if pulled is None:
                return torch.zeros_like(cotangent)
            return pulled if pulled.layout == torch.strided else pulled.to_dense()

        return form

    def let_go(self) -> None:
        """Free the memory of the outputs, which no product reads; not if a transform wraps them."""
        if self._like is self._outputs and not any(map(is_wrapped, self._outputs)):
            self._like = tuple(o.detach().new_zeros(()).expand(o.shape) for o in self._outputs)
            self._outputs = tuple(get_gradient_edge(o) for o in self._outputs)

    def __call__(self, cotangents: Parts, create_graph: bool = False) -> Parts:
        """Form one product; None where an input is not reached."""
        if not self._outputs or not self._inputs:
            return [None] * len(self._inputs)
        if self._math:  # a checkpoint computes attention again
            with math_kernel():
                return self._product(cotangents, create_graph)
        return self._product(cotangents, create_graph)

    def _product(self, cotangents: Parts, create_graph: bool) -> Parts:
        given = []
        for i, like in zip(self._used, self._like, strict=True):
            cotangent = cotangents[i]
            given.append(torch.zeros_like(like) if cotangent is None else cotangent)
        try:
            with nullcontext() if self._around is None else self._around():
                return _pulled(
                    self._outputs, tuple(given), self._inputs, create_graph, like=self._like
                )
        except RuntimeError as error:
            advise(error)
            raise


class ForwardReplay:
    """Jacobian-vector products of recorded outputs, by differentiating a pullback.

    The pullback is linear in its cotangent, so its transpose is the Jacobian: this needs double
    backward alone, where forward-mode products fail in fused kernels and are slower.
    """

    def __init__(self, outputs: Parts, inputs: Sequence[Tensor], seed: Tensor) -> None:
        self._count = len(outputs)
        self._used = [i for i, o in enumerate(outputs) if o is not None and o.requires_grad]
        present = [o for o in outputs if o is not None and o.requires_grad]
        self._dummies = [torch.zeros_like(o) + seed.to(o.dtype) for o in present]
        pulled = Replay(present, inputs)(self._dummies, create_graph=True)
        self._transpose = Replay(pulled, self._dummies)

    def __call__(self, tangents: Parts, create_graph: bool = False) -> Parts:
        """Form one product; None where an output does not depend on the inputs."""
        pushed: list[Tensor | None] = [None] * self._count
        for i, part in zip(self._used, self._transpose(tangents, create_graph), strict=True):
            pushed[i] = part
        return pushed


def filled(leaves: Parts, like: Sequence[Tensor]) -> list[Tensor]:
    """Put zeros, each like its variable, in the places of leaves that are None."""
    return [
        torch.zeros_like(v) if leaf is None else leaf for leaf, v in zip(leaves, like, strict=True)
    ]


def gradient_of(
    value: Tensor, inputs: Sequence[Tensor], *, create_graph: bool
) -> list[Tensor | None]:
    """Form the gradient of a scalar or of a tensor's sum; None where an input is not reached."""
    if not value.requires_grad or not inputs:
        return [None] * len(inputs)
    if create_graph:
        refuse_moving()
    one = (torch.ones_like(value),)
    around = notes().around
    with nullcontext() if around is None else around():
        return list(_pulled((value,), one, tuple(inputs), create_graph, keep=create_graph))


def _pulled(
    outputs: tuple[Any, ...],
    cotangents: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    create_graph: bool,
    *,
    keep: bool = True,
    like: tuple[Tensor, ...] | None = None,
) -> Sequence[Tensor | None]:
    """Call `torch.autograd.grad`, or the engine below it; `like`: tensors, for edges."""
    if _wrapped(outputs if like is None else like):
        pulled: Parts = torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=keep, create_graph=create_graph,
            allow_unused=True,
        )  # fmt: skip
    else:
        pulled = Variable._execution_engine.run_backward(
            outputs, cotangents, keep, create_graph, inputs, True, accumulate_grad=False
        )
    return [None if part is None else _dense(part) for part in pulled]


def _dense(part: Tensor) -> Tensor:
    """Fill in the zeros of a gradient that some operation has made sparse."""
    return part if part.layout == torch.strided else part.to_dense()


def _wrapped(outputs: tuple[Tensor, ...]) -> bool:
    """Say whether the checks and wrappers of torch.autograd.grad do more than cost time."""
    # They take as long as a small product. On a GPU they prepare the threads of the devices, and
    # a mode has to see the call.
    if outputs[0].device.type != "cpu":
        return True
    return torch._C._is_torch_function_mode_enabled() and not InnerChoices.alone()
