"""The inner loop that an estimator runs or differentiates: where it starts, and its steps."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._autograd.guard import Guard
from .._autograd.random_numbers import Draw
from .._autograd.recording import Recording, record
from .._autograd.torch_pytrees import pytree
from .._autograd.trace import detached, graph
from .._autograd.transforms import is_wrapped
from .._errors import NotConnected, UnsupportedOperation
from .._pytrees import Tree

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class InnerLoop:
    """Steps of an inner optimiser as functions of the hyperparameters' variables.

    Attributes
    ----------
    step : callable
        ``step(params, hparams)``, or with the step's number as a third argument.
    init : pytree or callable
        Where the steps start.
    H : Tree
        The hyperparameters.
    numbered : bool
        Whether `step` takes its number.
    """

    step: Callable[..., Any]
    init: Any
    H: Tree
    numbered: bool

    @classmethod
    def of(cls, step: Callable[..., Any], init: Any, H: Tree) -> InnerLoop:
        """Make an inner loop, after a check that its start does not lose a gradient."""
        _refuse_shared(init, H)
        return cls(step, init, H, _takes_number(step))

    @property
    def start(self) -> Any:
        """The initial point, detached; None where it depends on the hyperparameters."""
        return None if callable(self.init) else map_tensors(self.init, _own)

    def advance(self, params: Any, arguments: Any, first: int, last: int) -> Any:
        """Make the steps from `first` up to `last`, recorded by whatever records."""
        for k in range(first, last):
            tree = Tree("params", params)
            before = params
            with Guard():
                number = (k,) if self.numbered else ()
                params = self.step(params, arguments, *number)
            tree.match("What step returned", params)
            _refuse_cut_off(before, params)
        return params

    def forward(
        self,
        params: Any,
        constants: list[Tensor],
        first: int,
        last: int,
        captured: list[Tensor] | None = None,
    ) -> Any:
        """Make steps without keeping a graph; each may take derivatives itself.

        Parameters
        ----------
        params : pytree
            Where they start.
        constants : list of Tensor
            The hyperparameters' variables.
        first, last : int
            The numbers of the first step and of the one after the last.
        captured : list of Tensor, optional
            Where to add what the steps capture that is differentiated further out.

        Returns
        -------
        params : pytree
            Where they lead, detached.
        """
        for k in range(first, last):

            def one(recording: Recording, arguments: Any, params: Any, k: int = k) -> Any:
                ended = self.advance(params, arguments, k, k + 1)
                recording.returned(Tree("params", ended).variables)
                if captured is not None:
                    captured.extend(recording.captured())
                return ended

            params = map_tensors(self.recorded(one, constants, params), Tensor.detach)
        return params

    def recorded(
        self,
        evaluate: Callable[[Recording, Any, Any], T],
        constants: list[Tensor],
        state: Any,
        *further: Tensor,
        draw: Draw | None = None,
    ) -> T:
        """Record what is computed from the hyperparameters and the inner variables.

        Parameters
        ----------
        evaluate : callable
            ``evaluate(recording, hparams, params)``, called as `record` calls it.
        constants : list of Tensor
            The hyperparameters' variables.
        state : pytree
            The inner variables; None: what `init` makes of the hyperparameters.
        *further : Tensor
            Variables beside them, whose aliases come last.
        draw : Draw, optional
            The random numbers.

        Returns
        -------
        value
            What `evaluate` returned.
        """
        tree, n = None if state is None else Tree("params", state), len(constants)
        start = [] if tree is None else [detached(v) for v in tree.variables]

        def taken(recording: Recording) -> T:
            arguments = self.H.rebuild(recording.aliases[:n])
            if tree is None:
                return evaluate(recording, arguments, self.made(arguments))
            params = tree.rebuild(recording.aliases[n : n + len(start)])
            return evaluate(recording, arguments, params)

        trees = [self.H] if tree is None else [tree, self.H]
        return record(taken, [*constants, *start, *further], trees, [self.H], draw)

    def begin(self, constants: list[Tensor]) -> Any:
        """Make the initial point where the steps are run and not differentiated."""
        if not callable(self.init):
            return self.start
        with torch.no_grad():
            return map_tensors(self.made(self.H.rebuild(constants)), Tensor.detach)

    def made(self, arguments: Any) -> Any:
        """Call `init` on the hyperparameters."""
        with Guard():
            return self.init(arguments)


def _refuse_cut_off(before: Any, after: Any) -> None:
    """Raise where a step returned what an optimiser of PyTorch has moved in place.

    Raises
    ------
    UnsupportedOperation
        Naming the leaf.
    """
    known = {id(leaf) for leaf in pytree.tree_leaves(before)}
    tree = Tree("What step returned", after)
    for i, leaf in enumerate(tree.variables):
        if leaf.requires_grad and leaf.is_leaf and id(leaf) not in known and not is_wrapped(leaf):
            raise UnsupportedOperation(
                f"{tree.variable_path(i)} is a new leaf that requires grad, cut off from the "
                "arguments: what an optimiser of torch.optim has moved has no derivative by them. "
                "Write the step out, such as w - lr * torch.func.grad(loss)(w, hparams); or run "
                "the optimiser outside, and pass what it finds to implicit_grad.",
                leaf=tree.variable_path(i),
                argument="step",
            )


def hyperparameters(hparams: Any) -> Tree:
    """Take `hparams` apart."""
    tree = Tree("hparams", hparams, of_autograd=True)
    tree.refuse_constant()
    return own_constants(tree)


def own_constants(tree: Tree) -> Tree:
    """Copy a tree's integer tensors, which nothing stops a function from changing."""
    for place, leaf in enumerate(tree.leaves):
        if isinstance(leaf, Tensor) and not leaf.is_floating_point():
            tree.replace(place, _own(leaf))
    return tree


def map_tensors(tree: Any, fun: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the tensors of a pytree, and leave all else as it was."""
    return pytree.tree_map(lambda leaf: fun(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _own(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return detached(tensor) if tensor.is_floating_point() else tensor.clone()


def _takes_number(step: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return len(required) >= 3


def _refuse_shared(init: Any, H: Tree) -> None:
    if callable(init) and not isinstance(init, nn.Module):
        return
    start = Tree("init", init)
    for i, leaf in enumerate(start.variables):
        leaves, edges = graph(leaf)
        for j, other in enumerate(H.variables):
            made_from = any(known is other for known in leaves) or (
                other.grad_fn is not None and (other.grad_fn, other.output_nr) in edges
            )
            if made_from and leaf is not other:
                raise NotConnected(
                    f"{start.variable_path(i)} was computed from {H.variable_path(j)}, whose "
                    "gradient through the initial point would be lost. Pass init as a callable "
                    "that computes it, init(hparams), or detach it if it is a constant.",
                    leaf=start.variable_path(i),
                )
            if leaf is other:
                raise NotConnected(
                    f"{start.variable_path(i)} and {H.variable_path(j)} are one tensor, whose "
                    "gradient through the initial point would be lost. Pass init as a callable: "
                    "init=lambda hparams: hparams.",
                    leaf=start.variable_path(i),
                )
