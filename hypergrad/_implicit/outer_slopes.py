"""The outer loss: its value, and its gradients by the inner and the outer variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .._autograd.in_place import InPlace
from .._autograd.products import gradient_of
from .._autograd.random_numbers import generators, restore
from .._autograd.recording import Recording, record
from .._autograd.refused_modules import RunsOnProcesses
from .._autograd.shards import placed_like
from .._errors import NotConnected
from ..conditions._inner_problem import Problem, scalar, without_aux


class OuterSlopes(NamedTuple):
    """The outer loss at a point, and its gradients.

    Attributes
    ----------
    value : Tensor
        The loss of each task.
    aux : pytree
        What was returned beside it.
    cotangent, direct : list of Tensor or None
        The gradients by the inner and by the outer variables; None: not connected.
    captured : list of Tensor
        Values that depend on something that is differentiated around the call.
    """

    value: Tensor
    aux: Any
    cotangent: list[Tensor | None]
    direct: list[Tensor | None]
    captured: list[Tensor]


def outer_gradient(
    outer: Callable[[Any, Any], Any], problem: Problem, tensors: list[Tensor], has_aux: bool
) -> OuterSlopes:
    """Evaluate the outer loss once, and differentiate it.

    Parameters
    ----------
    outer : callable
        ``outer(params, hparams)``.
    problem : Problem
        Whose tensors these are; with task axes, the loss is that of each task.
    tensors : list of Tensor
        Where.
    has_aux : bool
        Whether `outer` returns ``(loss, aux)``.

    Returns
    -------
    slopes : OuterSlopes
        The loss and its gradients.

    Raises
    ------
    NotConnected
        If the loss does not depend on the inner variables.
    StructureMismatch
        If the inner or the outer variables hold no tensor that can carry a derivative.
    """
    for tree in problem.trees:
        tree.refuse_constant()
    inner = problem.inner
    places = [*inner, *problem.outer]
    aux = None

    def loss(params: Any, hparams: Any) -> Tensor:
        nonlocal aux
        value, aux = without_aux("outer", outer(params, hparams), has_aux, "loss")
        return scalar("outer", value)

    def evaluate(recording: Recording) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
        value = problem.outputs(loss, recording.placed(tensors, places))
        recording.returned([value])
        recording.refuse_past_arguments("outer")
        gradients = gradient_of(value, recording.aliases, create_graph=False)
        return value, gradients, recording.captured()

    def in_place(own: InPlace) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
        def evaluate(recording: Recording) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
            with own.at([tensors[i] for i in inner]):
                given = recording.placed(tensors, problem.outer)
                for place, parameter in zip(inner, own.parameters, strict=True):
                    given[place] = parameter
                value = problem.outputs(loss, given)
                mean, *gradients = own.backward(value, recording.aliases)
                return mean, [part for parts in gradients for part in parts], []

        return record(evaluate, variables[len(inner) :], problem.trees, in_pieces=True)

    variables, before = [tensors[i] for i in places], generators()
    differenced = getattr(problem.condition, "products", "exact") == "difference"
    module = None
    try:
        value, gradients, captured = record(
            evaluate, variables, problem.trees, in_pieces=True, own_backward=differenced
        )
    except RunsOnProcesses as seen:
        module = seen.module
    if module is not None:
        restore(before)
        value, gradients, captured = in_place(InPlace(module, problem.params))
    cotangent = gradients[: len(inner)]
    direct = placed_like(gradients[len(inner) :], variables[len(inner) :], variables)
    if all(part is None for part in cotangent):
        raise NotConnected(
            "outer does not depend on params, so the inner problem plays no part in its gradient. "
            "Use params in outer: a module must be called as torch.func.functional_call(module, "
            "params, args), and a .detach(), .item() or torch.no_grad() inside outer cuts the "
            "connection.",
            argument="params",
        )
    return OuterSlopes(value.detach(), aux, cotangent, direct, captured)
