"""Calling a user's solver with plain tensors, outside every transform that surrounds the call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._errors import StructureMismatch, UnsupportedOperation
from .._pytrees import is_ordinary
from .captured import names_of_captured
from .refusals import WithoutDerivative
from .torch_pytrees import pytree
from .trace import detached, versions
from .transforms import is_wrapped, transforms_active, without_saved_tensor_hooks


def call_outside(
    fit: Callable[..., Any],
    arguments: Any,
    keywords: dict[str, Any],
    batching: Literal["vmap", "loop"],
    *,
    named: dict[str, Any],
) -> Any:
    """Call ``fit(*arguments, **named, **keywords)`` on detached plain tensors, with grad mode on.

    Under `torch.func.vmap` the solver is mapped, or called once a task.

    Parameters
    ----------
    fit : callable
        The user's solver.
    arguments : tuple
        Its positional arguments, in the caller's context.
    keywords : dict
        Its keyword arguments, passed on as they are.
    batching : {"vmap", "loop"}
        What to do with task axes.
    named : dict
        Arguments like the positional ones, passed by keyword.

    Returns
    -------
    answer : pytree
        What `fit` returned, its tensors detached and back in the caller's context.
    """
    _refuse_captured(fit)
    leaves, spec = pytree.tree_flatten((arguments, named))
    places = [i for i, leaf in enumerate(leaves) if is_ordinary(leaf)]

    def on_tensors(tensors: Sequence[Tensor]) -> Any:
        given = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        positional, by_name = pytree.tree_unflatten(given, spec)
        return fit(*positional, **by_name, **keywords)

    of_init = sum(is_ordinary(leaf) for leaf in pytree.tree_leaves(arguments[0]))
    call = _Call(on_tensors, batching, of_init)
    tensors = [detached(leaves[i]) for i in places]
    results = _Outside.apply(call, *tensors) if transforms_active() else call(tensors)
    return call.structure.rebuild(results)


def _refuse_captured(fit: Callable[..., Any]) -> None:
    names = names_of_captured([fit], is_wrapped) if transforms_active() else ""
    if names:
        raise UnsupportedOperation(
            f"The inner solver captures {names}, which belongs to a torch.func transform; the "
            "solver is called outside of that. Pass it as an argument of the decorated function."
        )


@dataclasses.dataclass
class _Structure:
    """The structure that the solver returned, with its tensors taken out."""

    leaves: list[Any] = dataclasses.field(default_factory=list)
    spec: Any = None

    def take(self, answer: Any) -> list[Tensor]:
        leaves, spec = pytree.tree_flatten(answer)
        static = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        if self.spec is not None and (spec, static) != (self.spec, self.leaves):
            raise StructureMismatch(
                "The inner solver returned another structure, or another number or string, for "
                "one task than for the others. Return tensors where tasks differ."
            )
        self.leaves, self.spec = static, spec
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        given = iter(tensors)
        leaves = [next(given) if leaf is None else leaf[0] for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A solver on a list of tensors, under the task axes that vmap has added so far."""

    fit: Callable[[Sequence[Tensor]], Any]
    batching: Literal["vmap", "loop"]
    of_init: int  # how many of the tensors are the initial guess, which fit may overwrite
    axes: tuple[tuple[tuple[int | None, ...], int, str], ...] = ()  # in_dims, size, randomness
    structure: _Structure = dataclasses.field(default_factory=_Structure)

    def under(self, in_dims: Sequence[int | None], size: int, randomness: str) -> _Call:
        axis = (tuple(in_dims), size, randomness)
        return dataclasses.replace(self, axes=(axis, *self.axes))

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        mapped = self._one
        for axis in reversed(self.axes):
            mapped = (
                self._looped(mapped, axis)
                if self.batching == "loop"
                else self._mapped(mapped, axis)
            )
        given = [t.clone() if i < self.of_init else t for i, t in enumerate(tensors)]
        before = versions(given[self.of_init :])
        with torch.inference_mode(False), torch.enable_grad(), without_saved_tensor_hooks():
            results = mapped(given)
        if before != versions(given[self.of_init :]):
            raise UnsupportedOperation(
                "The inner solver changed one of its arguments in place; only the initial guess "
                "may be overwritten. Work on a copy: tensor.clone()."
            )
        theirs = {t.data_ptr() for t in given}
        plain = [t.detach() for t in results]
        return tuple(t.clone() if t.data_ptr() in theirs else t for t in plain)

    def _one(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.structure.take(self.fit(tensors))

    def _mapped(self, one: Any, axis: tuple[tuple[int | None, ...], int, str]) -> Any:
        in_dims, _, randomness = axis
        mapped = torch.func.vmap(one, in_dims=(list(in_dims),), randomness=randomness)

        def call(tensors: Sequence[Tensor]) -> Any:
            try:
                return mapped(tensors)
            except Exception as error:
                error.add_note(
                    "hypergrad: the inner solver was mapped over tasks by torch.func.vmap. Where "
                    "it uses .backward(), torch.optim, .item() or NumPy, decorate it with "
                    "batching='loop', which calls it once a task."
                )
                raise

        return call

    def _looped(self, one: Any, axis: tuple[tuple[int | None, ...], int, str]) -> Any:
        in_dims, size, _ = axis

        def call(tensors: Sequence[Tensor]) -> list[Tensor]:
            tasks = []
            for i in range(size):
                part = [t if d is None else t[i] for t, d in zip(tensors, in_dims, strict=True)]
                part[: self.of_init] = [t.clone() for t in part[: self.of_init]]
                tasks.append(one(part))
            return [torch.stack([t.detach() for t in parts]) for parts in zip(*tasks, strict=True)]

        return call


class _Outside(WithoutDerivative):
    """A call whose vmap rule adds a task axis, so that it runs below all transforms."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return call([t.detach() for t in tensors])

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, call: _Call, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims = in_dims[1:]
        moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]
        own = [None if d is None else 0 for d in dims]
        results = _Outside.apply(call.under(own, info.batch_size, info.randomness), *moved)
        return results, (0,) * len(results)
