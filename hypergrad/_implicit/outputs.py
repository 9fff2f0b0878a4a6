"""Many outputs at once: their derivatives by rows, and the uses of a block of solutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .._autograd.attention import has_fused
from .._autograd.products import ForwardReplay, Parts, Replay
from .._autograd.random_numbers import Draw
from .._autograd.recording import Recording, record
from .._autograd.rows import by_rows, refuse_mapping
from .._autograd.shared_factor import multiplies_matrices
from .._autograd.sizes import bytes_of_product
from .._autograd.torch_pytrees import pytree
from .._autograd.trace import graph
from .._errors import NotConnected, StructureMismatch
from ..conditions._inner_problem import Problem, without_aux
from ..solvers._system import NewtonStep, Solution
from ..solvers._vectors import norm
from .causes import Place, data, derivative, inner_places, of_leaves, of_value, solve
from .linearisation import Linearisation, maps_wrongly
from .outer_slopes import OuterSlopes
from .second_look import SecondLook, shifted
from .terms import Terms


class Outputs:
    """A function of ``(params, hparams)`` that returns many numbers, recorded at a point.

    Parameters
    ----------
    name : str
        What the function is called in messages.
    fun : callable
        It returns a tensor or a pytree of them; with `has_aux` a pair of that and anything.
    problem : Problem
        The inner problem, whose tensors these are.
    tensors : list of Tensor
        Where.
    has_aux : bool
        Whether the function returns ``(outputs, aux)``.
    draw : Draw
        Its random numbers.

    Attributes
    ----------
    values : Tensor
        All numbers as one vector, detached.
    parts : list of Tensor
        The tensors that the function returned, detached.
    spec : TreeSpec
        Their pytree.
    aux : pytree
        What was returned beside them.
    captured : list of Tensor
        Values that depend on something that is differentiated around the call.
    size : int
        The bytes that one row's derivative takes on its way.
    one_by_one : bool
        Whether the numbers are differentiated one at a time.
    """

    def __init__(
        self,
        name: str,
        fun: Callable[[Any, Any], Any],
        problem: Problem,
        tensors: list[Tensor],
        has_aux: bool,
        draw: Draw,
    ) -> None:
        self.name, self.fun, self.problem = name, fun, problem
        self.has_aux, self.draw = has_aux, draw
        for tree in problem.trees:
            tree.refuse_constant()
        places = [*problem.inner, *problem.outer]
        self._like = [tensors[i] for i in places]

        def evaluate(recording: Recording) -> None:
            returned = problem.outputs(self.fun, recording.placed(tensors, places))
            value, self.aux = without_aux(name, returned, has_aux, "outputs")
            parts, self.spec = pytree.tree_flatten(value)
            vector = _joined(name, parts)
            recording.returned([vector])
            recording.refuse_past_arguments(name)
            self._pulled = Replay([vector], recording.aliases)
            self.captured = recording.captured()
            self.parts, self.values = [part.detach() for part in parts], vector.detach()
            fused = has_fused(graph(vector).nodes, again=False)  # PyTorch loops, and warns of it
            self.one_by_one = fused or maps_wrongly(vector)
            self.size = bytes_of_product([vector])
            self._multiplies = multiplies_matrices([vector])
            whole = self._pulled([torch.ones_like(vector)]) if len(vector) else [None]
            self._reached = [part is not None for part in whole]

        record(evaluate, self._like, problem.trees, draw=draw)
        if not any(self._reached[: len(problem.inner)]):
            raise NotConnected(
                f"{name} does not depend on params, so the inner problem plays no part in its "
                "derivative. Use params in it: a module must be called as "
                "torch.func.functional_call(module, params, args), and a .detach(), .item() or "
                "torch.no_grad() inside cuts the connection.",
                argument="params",
            )

    def at(self, tensors: list[Tensor]) -> Outputs:
        """Evaluate the same at other tensors, with the same random numbers."""
        return Outputs(self.name, self.fun, self.problem, tensors, self.has_aux, self.draw)

    def slopes(self, rows: slice) -> OuterSlopes:
        """Differentiate some of the numbers, each by all inner and all outer variables.

        Parameters
        ----------
        rows : slice
            Which of `values`.

        Returns
        -------
        slopes : OuterSlopes
            With an axis of these numbers in front of every derivative.
        """
        value = self.values[rows]
        places = torch.arange(len(self.values), device=value.device)
        one_hot = (places == places[rows, None]).to(value.dtype)

        def pull(cotangent: Tensor) -> list[Tensor]:
            if self.one_by_one:
                refuse_mapping()
            pulled = zip(self._pulled([cotangent]), self._like, strict=True)
            kept = zip(pulled, self._reached, strict=True)
            return [
                torch.zeros_like(like) if part is None else part
                for (part, like), reached in kept
                if reached
            ]

        derivatives = iter(by_rows(pull, one_hot, matrices=self._multiplies))
        filled = [next(derivatives) if reached else None for reached in self._reached]
        inner = len(self.problem.inner)
        return OuterSlopes(value, self.aux, filled[:inner], filled[inner:], self.captured)


def shared_out(shapes: Sequence[torch.Size], leaves: Sequence[Tensor]) -> list[list[Tensor]]:
    """Share out tensors with an axis of all numbers in front among what was returned.

    Parameters
    ----------
    shapes : sequence of Size
        Those of the returned tensors.
    leaves : sequence of Tensor
        Each ``(m, ...)``.

    Returns
    -------
    shared : list of list of Tensor
        For each returned tensor the parts of all leaves, with its shape in front.
    """
    pieces = [leaf.split([shape.numel() for shape in shapes]) for leaf in leaves]
    return [
        [piece[i].reshape(shape + piece[i].shape[1:]) for piece in pieces]
        for i, shape in enumerate(shapes)
    ]


def _joined(name: str, parts: Sequence[Any]) -> Tensor:
    """Join what a function returned to a vector, if all of it is real numbers."""
    for part in parts:
        if not isinstance(part, Tensor) or not part.is_floating_point():
            kind = str(part.dtype) if isinstance(part, Tensor) else type(part).__name__
            raise StructureMismatch(
                f"{name} must return a floating-point tensor, or a pytree of them; it returned "
                f"{kind}. Pass has_aux=True where it returns (outputs, aux).",
                argument=name,
            )
    if not parts:
        raise StructureMismatch(f"{name} returned nothing to differentiate.", argument=name)
    if not any(part.numel() for part in parts):
        raise StructureMismatch(
            f"{name} returned tensors without entries: there is nothing to differentiate. Leave "
            "the call out where no example is left, say after a filter.",
            argument=name,
        )
    flat = [part.reshape(-1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


class Finish(Protocol):
    """What is made of a solution: a linear function of it."""

    def cross(self, u: Tensor) -> Parts:
        """Form it, of one vector; None: not connected."""

    def at(self, tensors: list[Tensor], /) -> Finish:
        """Record the same at other tensors."""


class Pushed:
    """The derivative of a function's outputs along a vector, in place of a cross derivative.

    Parameters
    ----------
    outputs : Outputs
        The function.
    tensors : list of Tensor
        Where.
    """

    def __init__(self, outputs: Outputs, tensors: list[Tensor]) -> None:
        self._outputs, problem = outputs, outputs.problem
        self._layout = problem.layout()
        places = problem.inner

        def evaluate(recording: Recording) -> None:
            *aliases, seed = recording.aliases
            given = list(tensors)
            for place, alias in zip(places, aliases, strict=True):
                given[place] = alias
            returned = problem.outputs(outputs.fun, given)
            value, _ = without_aux(outputs.name, returned, outputs.has_aux, "outputs")
            vector = _joined(outputs.name, pytree.tree_leaves(value))
            recording.returned([vector])
            has_fused(graph(vector).nodes, again=True)
            self._forward = ForwardReplay([vector], aliases, seed)
            self._one_by_one = maps_wrongly(vector)

        seed = torch.zeros((), dtype=self._layout.dtype, device=self._layout.device)
        variables = [*(tensors[i] for i in places), seed]
        record(evaluate, variables, problem.trees, draw=outputs.draw)

    def cross(self, u: Tensor) -> Parts:
        """Form the derivative along `u`."""
        if self._one_by_one:
            refuse_mapping()
        return self._forward(self._layout.split(u))

    def at(self, tensors: list[Tensor]) -> Pushed:
        """Record the same at other tensors."""
        return Pushed(self._outputs, tensors)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Some numbers of a function, in the place of an outer loss."""

    outputs: Outputs
    rows: slice

    def at(self, tensors: list[Tensor]) -> OuterSlopes:
        """Evaluate and differentiate them at other tensors."""
        return self.outputs.at(tensors).slopes(self.rows)


class UseOfBlock(Terms):
    """The derivatives of a block of outputs, from solutions that share one matrix.

    Parameters
    ----------
    lin : Linearisation
        The inner problem.
    outputs : Outputs
        The function.
    finish : Finish
        What is made of a solution: `lin` itself, whose cross derivative is, or `Pushed`.
    rows : slice
        Which of its numbers.
    tensors : list of Tensor
        Those of the problem.
    """

    def __init__(
        self,
        lin: Linearisation,
        outputs: Outputs,
        finish: Finish,
        rows: slice,
        tensors: list[Tensor],
    ) -> None:
        super().__init__(lin, _Rows(outputs, rows), tensors, outputs.slopes(rows))
        self._outputs, self._finish = outputs, finish
        self._reached: list[bool] | None = None

    @property
    def terms(self) -> tuple[Parts, Parts]:
        """The direct and the implicit terms; None: not connected."""
        return self._at.direct, self.indirect

    def second_look(
        self, newton: NewtonStep, solution: Solution, planned: Tensor
    ) -> SecondLook | None:
        """Form the same a Newton step further on, which all outputs have in common."""
        lin, u, step = self.lin, solution.x, newton.step
        if step.ndim > 1:  # along one direction, for each output so far: as far as any
            step = step[norm(step).argmax()]
        there = shifted(lin, self._tensors, step)
        try:
            outer, inner = self._loss.at(there), lin.at(there)
            cross = inner.cross if self._finish is lin else self._finish.at(there).cross
            left = lin.layout.flatten(outer.cotangent, self._lead) - inner.transposed(u) - planned
            terms = self._differences(outer.direct, self._cross(u, cross))
        except Exception:  # a function does not like what it gets there
            unknown = torch.full_like(self._at.value, torch.inf)
            return SecondLook(unknown, newton.step * torch.inf)
        change = self._changed(terms, left, solution, self._cross)
        return SecondLook(change, inner.residual - newton.left)

    def _outer_at(self, step: Tensor) -> OuterSlopes | None:
        if step.ndim > 1:
            return None
        try:
            return self._loss.at(shifted(self.lin, self._tensors, step))
        except Exception:  # the function does not like what it gets there
            return None

    def places(self, b: Tensor, u: Tensor) -> Iterator[Place]:
        """List all that went into the block, by name, in the order of its making."""
        lin, at, problem, tensors = self.lin, self._at, self.lin.problem, self._tensors
        P, name = problem.params, self._outputs.name
        yield from of_leaves("", P, [tensors[i] for i in problem.inner], data)
        for tree in problem.args:
            yield from of_leaves("", tree, [tensors[i] for i in problem.outer], data)
        again = of_value(lambda: problem.outputs(self._outputs.fun, tensors))
        yield Place(f"what {name} returned", at.value, again, argument=name)
        yield from of_leaves(f"the derivative of {name} by ", P, at.cotangent, derivative)
        for tree in problem.args:
            yield from of_leaves(f"the derivative of {name} by ", tree, at.direct, derivative)
        yield from inner_places(lin)
        for position, leaf in enumerate(lin.layout.split(u)):
            path = P.variable_path(position)
            yield Place(f"the solution of the linear system at {path}", leaf, solve)

    def _differences(self, direct: Parts, indirect: Parts) -> list[Tensor]:
        lead, like = self._lead, [self._tensors[i] for i in self.lin.problem.outer]
        if self._finish is not self.lin:
            return [-part for part in indirect if part is not None]
        return [
            _difference(d, c, h.expand(*lead, *h.shape))
            for d, c, h in zip(direct, indirect, like, strict=True)
        ]

    def _cross(self, u: Tensor, cross: Callable[[Tensor], Parts] | None = None) -> Parts:
        cross = self._finish.cross if cross is None else cross
        if self._reached is None:
            self._reached = [part is not None for part in cross(u[0])]
        if not any(self._reached):
            return [None] * len(self._reached)

        def one(v: Tensor) -> list[Tensor]:
            return [part for part in cross(v) if part is not None]

        parts = iter(by_rows(one, u, matrices=self.lin.multiplies))
        return [next(parts) if reached else None for reached in self._reached]


def _difference(direct: Tensor | None, indirect: Tensor | None, like: Tensor) -> Tensor:
    if direct is None:
        return torch.zeros_like(like) if indirect is None else -indirect
    return direct if indirect is None else direct - indirect
