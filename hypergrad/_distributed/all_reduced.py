"""Losses that are sums over processes: their derivatives of every order are reduced too."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._autograd.torch_pytrees import pytree
from .._autograd.trace import graph
from .._autograd.transforms import transforms_active
from .._errors import UnsupportedOperation
from ..conditions._base import Condition
from ..conditions._fixed_point import FixedPoint
from ..conditions._gauss_newton import GaussNewton
from ..conditions._inner_problem import scalar
from ..conditions._minimum import Minimum
from ..conditions._root import Root
from .collectives import Session, copies, stand_in, summed, widest


def all_reduced(share: Any, group: Any = None, *, reduction: Literal["sum", "mean"] = "sum") -> Any:
    """Reduce a loss or condition: the sum, or the mean, of what every process computes.

    Data-parallel hypergradients: each process holds its part of the data and a copy of the
    variables, and `share` is its part of the loss. The whole loss is returned: its value
    and its derivatives of every order are reduced over the processes. Call `implicit_grad`, the
    decorators and `Bilevel` in every process with the same variables and with both losses wrapped.
    They give the same answer in all of them: that of one process with all the data.

    There is one all-reduce for each evaluation, each gradient, each product with the Hessian (two
    for a `GaussNewton` with a regulariser) and each cross derivative. Solvers see reduced vectors
    alone, so that they stop after the same iteration everywhere. With every reduction travel each
    process's norm of the vector that is multiplied and its place in the sequence: processes that
    were given different variables, or that have parted, raise `RankFailed`, and so does every
    process where the function fails in one of them. A process that dies ends the others' waiting;
    one that hangs does so after the group's ``timeout``.

    Parameters
    ----------
    share : callable or condition
        ``share(params, hparams, ...)``, this process's part of the loss; or a condition:
        `Minimum`, `Root` or `FixedPoint`, whose function gives this process's part of the whole
        one, or `GaussNewton`, whose outputs are those of this process's data.
    group : ProcessGroup, optional
        Who takes part. None: all processes.
    reduction : {"sum", "mean"}
        What the whole is of the parts. With "sum" they are added: divide by the number of all
        samples, not by one's own, and a term that does not belong to the data, such as a penalty,
        by the number of processes. With "mean" the sum is divided by the number of processes:
        right where every part is a mean over the process's own samples and all processes have
        equally many, and a penalty that all compute alike then stands as it is. With samples of
        unequal number it is another loss, in which those of small shares weigh more.

    Returns
    -------
    whole : callable or condition
        Of the same kind. Without other processes it is `share` itself in effect.

    Raises
    ------
    TypeError
        If `share` is neither a loss nor a condition.
    ValueError
        If `reduction` is neither "sum" nor "mean".
    UnsupportedOperation
        If the condition is of another kind; when it is called inside a `torch.func` transform,
        where a collective cannot run; or if torchrun has started several processes and
        `torch.distributed.init_process_group` has not been called.

    Examples
    --------
    >>> import torch, hypergrad
    >>> x, y = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])  # this process's samples
    >>> inner = hypergrad.all_reduced(lambda w, lam: ((w * x - y) ** 2).sum() + lam * w**2)
    >>> outer = hypergrad.all_reduced(lambda w, lam: ((w * x - 2 * y) ** 2).sum())
    >>> hypergrad.implicit_grad(outer, inner, torch.tensor(0.5), torch.tensor(1.0))
    tensor(0.5833)
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean'; got {reduction!r}.")

    def whole(function: Callable[..., Any], kind: str) -> AllReduced:
        return AllReduced(function, group, kind, reduction)

    if not isinstance(share, Condition):
        if not callable(share):
            raise TypeError(f"all_reduced takes a loss or a condition; got {type(share).__name__}.")
        return whole(share, "loss")
    if type(share) is Minimum:
        return dataclasses.replace(share, f=whole(share.f, "loss"))
    if type(share) is Root:
        return Root(whole(share.F, "equation"), share.symmetric)
    if type(share) is FixedPoint:
        return FixedPoint(whole(share.T, "equation"), share.symmetric)
    if type(share) is GaussNewton:
        regulariser = share.regulariser
        return dataclasses.replace(
            share,
            outputs=whole(share.outputs, "outputs"),
            loss=whole(share.loss, "loss of outputs"),
            regulariser=None if regulariser is None else whole(regulariser, "loss"),
        )
    raise UnsupportedOperation(
        f"all_reduced does not know how a {type(share).__name__} is made of the parts of several "
        "processes. Write its equation as a Root or FixedPoint of one function, and pass that."
    )


class AllReduced:
    """A function whose value is the sum, or the mean, of every process's.

    Parameters
    ----------
    share : callable
        This process's part.
    group : ProcessGroup, optional
        Who takes part.
    kind : str
        "loss", a scalar; "equation", shaped like its first argument; "outputs", which are this
        process's own and no sum; "loss of outputs", a scalar of such outputs.
    reduction : str
        "sum" or "mean".
    """

    #: For `_captures.refuse_one_level_reduced`, which asks for it on both levels or on none.
    is_sum_over_processes = True

    def __init__(self, share: Callable[..., Any], group: Any, kind: str, reduction: str) -> None:
        self._share, self._group, self._kind, self._reduction = share, group, kind, reduction

    @property
    def processes(self) -> Any:
        """Who takes part; None: this process alone."""
        return (self._group or torch.distributed.group.WORLD) if _several(self._group) else None

    def __call__(self, *args: Any) -> Any:
        """Evaluate the whole value, or the outputs of this process's data."""
        if not _several(self._group):
            return self._share(*args)
        if transforms_active():
            raise UnsupportedOperation(
                "A loss that is reduced over processes was called inside a torch.func transform "
                "(vmap, grad, jvp, ...), where a collective cannot run. Call implicit_grad and the "
                "decorators outside of transforms; for a batch of problems add their losses up."
            )
        session = Session(self._group)
        per_process = 1 if self._kind == "loss of outputs" else 0  # no copies of anything
        arguments: list[Any] = list(args[:per_process])
        anchors: list[Tensor] = []
        variables: list[Tensor] = []
        for value in args[per_process:]:
            leaves, spec = pytree.tree_flatten(value)
            places = [i for i, leaf in enumerate(leaves) if _tracked(leaf)]
            if places:
                aliases, anchor = copies(session, len(variables), [leaves[i] for i in places])
                variables += aliases
                anchors.append(anchor)
                for i, leaf in zip(places, aliases, strict=True):
                    leaves[i] = leaf
            arguments.append(pytree.tree_unflatten(leaves, spec))
        if self._kind == "outputs":
            outputs = self._share(*arguments)
            return _tied(outputs, _tie(anchors)) if anchors else outputs
        dtype, numel, device = _payload(self._kind, args)
        try:
            value = self._share(*arguments)
            terms = _floating(value) if self._kind == "equation" else [scalar("A share", value)]
            if self._reduction == "mean":
                number = torch.distributed.get_world_size(self._group)
                terms = [term / number for term in terms]
        except Exception:
            stand_in(session, len(variables), dtype, numel, device)
            raise
        # An empty share may not depend on its outputs; the way to them is there all the same.
        anchors += [leaf.sum() for leaf in _floating(args[0])] if per_process else []
        tie = _tie(anchors) if anchors else torch.zeros((), device=device)
        whole = summed(session, _connected(terms, variables), dtype, tie, terms)
        if self._kind != "equation":
            return whole[0]
        leaves, spec = pytree.tree_flatten(value)
        sums = iter(whole)
        return pytree.tree_unflatten([next(sums) if _is_float(x) else x for x in leaves], spec)


def _several(group: Any) -> bool:
    """Say whether there are other processes.

    Parameters
    ----------
    group : ProcessGroup, optional
        Who takes part.

    Returns
    -------
    several : bool
        More than one.

    Raises
    ------
    UnsupportedOperation
        If there should be, and they have not been joined.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(group) > 1
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnsupportedOperation(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes have not been joined: "
            "call torch.distributed.init_process_group before a loss that is reduced over them."
        )
    return False


def _payload(kind: str, args: Sequence[Any]) -> tuple[torch.dtype, int, torch.device]:
    """Say what a process that fails must give in place of its value: dtype, length and device."""
    like = _floating(args[0]) or _floating(args)
    device = like[0].device if like else torch.device("cpu")
    if kind != "equation":
        return torch.float64, 1, device
    return widest(like), sum(leaf.numel() for leaf in like), device


def _tie(anchors: Sequence[Tensor]) -> Tensor:
    """Form a zero on which every order of derivative depends, whatever the anchors are."""
    return functools.reduce(torch.add, anchors).tanh()


def _tied(outputs: Any, tie: Tensor) -> Any:
    """Add a zero to outputs."""
    return pytree.tree_map(lambda x: x + tie.to(x.dtype) if _is_float(x) else x, outputs)


def _connected(terms: Sequence[Tensor], variables: Sequence[Tensor]) -> list[bool]:
    """Mark the variables that this process's values depend on."""
    edges = set[tuple[Any, int]]().union(*(graph(term).edges for term in terms))
    return [(v.grad_fn, v.output_nr) in edges for v in variables]


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _tracked(leaf: Any) -> bool:
    return _is_float(leaf) and leaf.requires_grad and torch.is_grad_enabled()


def _floating(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if _is_float(leaf)]
