"""One loss at one point: its value and its first derivatives, with one draw of random numbers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd.double_backward import changed_in_place
from .._autograd.guard import Guard
from .._autograd.products import gradient_of
from .._autograd.random_numbers import Draw
from .._autograd.recording import Recording, record
from .._autograd.trace import detached, versions
from .._pytrees import Layout, Tree
from ..conditions._inner_problem import scalar, without_aux
from ..solvers._vectors import norm
from ._inner_loop import map_tensors, own_constants

Leaves = list[Tensor | None]

#: How much larger the rounding of a gradient is than its last digit. Measured on a linear
#: classifier and a small network.
_ROUNDING = 5.0
#: The share of an answer that rounding may be before it is said.
MOSTLY_ROUNDING = 0.3


class Arguments:
    """``(params, hparams)`` taken apart, cut off from the caller's derivatives.

    Parameters
    ----------
    P, H : Tree
        The two arguments.

    Attributes
    ----------
    params, hparams : list of Tensor
        Their variables, detached.
    """

    def __init__(self, P: Tree, H: Tree) -> None:
        self.P, self.H = own_constants(P), own_constants(H)
        self.params = [detached(v) for v in self.P.variables]
        self.hparams = [detached(v) for v in self.H.variables]

    @classmethod
    def of(cls, params: Any, hparams: Any) -> Arguments:
        """Take the arguments of a call, with frozen parameters as constants."""
        P = Tree("params", params, skip_frozen=True, of_autograd=True)
        H = Tree("hparams", hparams, of_autograd=True)
        P.refuse_constant()
        H.refuse_constant()
        return cls(P, H)

    @property
    def eps(self) -> float:
        """The last digit of the coarsest dtype, in which a difference of gradients is rounded."""
        return max(torch.finfo(v.dtype).eps for v in [*self.params, *self.hparams])

    @functools.cached_property
    def layout(self) -> Layout:
        """How the inner variables lie in a vector."""
        return Layout(self.P, self.params)


@dataclasses.dataclass
class Slopes:
    """A loss and its gradients, all detached.

    Attributes
    ----------
    value : Tensor
        The loss.
    by_params, by_hparams : list of Tensor or None
        Its gradients; None where it does not depend on a variable or was not asked.
    aux : pytree
        What the function returned beside its value.
    captured : list of Tensor
        What it captures that is differentiated further out.
    """

    value: Tensor
    by_params: Leaves
    by_hparams: Leaves
    aux: Any
    captured: list[Tensor]


class Loss:
    """A function ``fun(params, hparams)``, all evaluations of which see the same random numbers.

    The first evaluation draws from the caller's generators as any call would.

    Parameters
    ----------
    name : str
        What the argument is called, for messages.
    fun : callable
        The function.
    arguments : Arguments
        What it is called with.
    has_aux : bool
        Whether it returns ``(loss, aux)``.
    """

    def __init__(
        self,
        name: str,
        fun: Callable[[Any, Any], Any],
        arguments: Arguments,
        *,
        has_aux: bool = False,
    ) -> None:
        self._name, self._fun, self._arguments, self._has_aux = name, fun, arguments, has_aux
        self._draw = Draw()

    def __call__(
        self, params: Sequence[Tensor], *, by_params: bool = True, by_hparams: bool = True
    ) -> Slopes:
        """Evaluate at other inner variables, once, and differentiate."""
        P, H = self._arguments.P, self._arguments.H
        with torch.inference_mode(False):
            p, h = [detached(t) for t in params], self._arguments.hparams
            if not by_hparams:  # then autograd does not stop a function from changing them
                h = [t.clone() for t in h]
        wanted = [*(p if by_params else []), *(h if by_hparams else [])]
        free = [i for tree in (P, H) for i in map(id, tree.variables)]
        constants = [t for tree in (P, H) for t in tree.tensors if id(t) not in free]
        held = [*constants, *([] if by_params else p), *([] if by_hparams else h)]
        before = versions(held)

        def evaluate(recording: Recording) -> Slopes:
            aliases = recording.aliases
            of_params = aliases[: len(p)] if by_params else p
            of_hparams = aliases[len(aliases) - len(h) :] if by_hparams else h
            with Guard():
                returned = self._fun(P.rebuild(of_params), H.rebuild(of_hparams))
            returned, aux = without_aux(self._name, returned, self._has_aux, "loss")
            value = scalar(self._name, returned)
            recording.returned([value])
            recording.refuse_past_arguments(self._name)
            slopes = gradient_of(value, aliases, create_graph=False)
            return Slopes(
                value.detach(),
                slopes[: len(p)] if by_params else [None] * len(p),
                slopes[len(aliases) - len(h) :] if by_hparams else [None] * len(h),
                map_tensors(aux, Tensor.detach),
                recording.captured(),
            )

        variables = wanted or [torch.zeros((), device="cpu")]
        slopes = record(evaluate, variables, [P, H], draw=self._draw)
        if before != versions(held):
            raise changed_in_place(self._name)
        return slopes


def moved(
    layout: Layout, at: Sequence[Tensor], along: Sequence[Tensor | None], by: Tensor | float
) -> list[Tensor]:
    """Form ``at + by * along``, rounded once, in tensors of their own."""
    return [
        a.clone() if d is None else (a + by * d.to(layout.dtype)).to(a.dtype)
        for a, d in zip(at, along, strict=True)
    ]


def descend(
    losses: Sequence[tuple[Loss, float]], at: Arguments, *, lr: float, steps: int
) -> list[Tensor]:
    """Make gradient steps on a weighted sum of losses by `params`, each with the memory of one."""
    params = list(at.params)
    for _ in range(steps):
        slopes = [(loss(params, by_hparams=False), weight) for loss, weight in losses]
        for of, weight in slopes:
            params = moved(at.layout, params, of.by_params, -lr * weight)
    return params


def wide(tensor: Tensor) -> Tensor:
    """Give a tensor the digits that sums of it need: as many as float32 has, at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rounding_share(
    layout: Layout, side: Sequence[Tensor | None], grads: Sequence[Tensor | None], by: Any
) -> Tensor:
    """Bound the rounding's share of an answer: of a difference with one `side`, times `by`."""
    least = torch.finfo(layout.precision).eps

    def size(leaves: Sequence[Tensor | None], *, last: bool = False) -> Tensor:
        sizes = [
            torch.linalg.vector_norm(t.to(layout.dtype))
            * (max(least, torch.finfo(t.dtype).eps) if last else 1.0)
            for t in leaves
            if t is not None
        ]
        none = torch.zeros(1, dtype=layout.dtype, device=layout.device)
        return norm(torch.stack(sizes) if sizes else none)

    lost = _ROUNDING * size(side, last=True) * by
    return torch.where(lost == 0, lost, lost / size(grads))
