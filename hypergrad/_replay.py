"""Products from one recorded graph: its vector-Jacobian product replayed as often as is asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Variable

from ._advice import advise

Parts = Sequence[Tensor | None]


class Replay:
    """Vector-Jacobian products of recorded outputs, from the one graph, as often as asked."""

    def __init__(self, outputs: Parts, inputs: Sequence[Tensor]) -> None:
        self._used = [i for i, o in enumerate(outputs) if o is not None and o.requires_grad]
        self._outputs = tuple(o for o in outputs if o is not None and o.requires_grad)
        self._inputs = tuple(inputs)

    def __call__(self, cotangents: Parts, create_graph: bool = False) -> Parts:
        """One product; None where an input is not reached."""
        if not self._outputs or not self._inputs:
            return [None] * len(self._inputs)
        given = []
        for i, output in zip(self._used, self._outputs, strict=True):
            cotangent = cotangents[i]
            given.append(torch.zeros_like(output) if cotangent is None else cotangent)
        try:
            return _pulled(self._outputs, tuple(given), self._inputs, create_graph)
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
        """One product; None where an output does not depend on the inputs."""
        found: list[Tensor | None] = [None] * self._count
        for i, part in zip(self._used, self._transpose(tangents, create_graph), strict=True):
            found[i] = part
        return found


def _pulled(
    outputs: tuple[Tensor, ...],
    cotangents: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    create_graph: bool,
) -> Sequence[Tensor | None]:
    """`torch.autograd.grad`, or what it calls, where nobody is listening in."""
    # On the CPU the checks and wrappers of torch.autograd.grad cost a tenth of a small product.
    # On a GPU they prepare the threads of the devices, and a mode has to see the call.
    listened = torch._C._is_torch_function_mode_enabled()
    if listened or create_graph or outputs[0].device.type != "cpu":
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=True, create_graph=create_graph,
            allow_unused=True,
        )  # fmt: skip
    found: tuple[Tensor | None, ...] = Variable._execution_engine.run_backward(
        outputs, cotangents, True, False, inputs, True, accumulate_grad=False
    )
    return found
