"""Operations whose second derivative nobody has tested: each is tested once, where it is met."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .._autograd.second_derivative import Verdict, compare_product, compare_whole
from .._autograd.shards import is_shards
from .._autograd.tested_nodes import TESTED_NODES
from .._autograd.trace import graph
from .._autograd.transforms import is_wrapped
from .._errors import UnsupportedOperation
from ..solvers._factorisation import signs
from ..solvers._vectors import dot
from .linearisation import Linearisation
from .second_look import shifted

# A comparison that resolves nothing is made again, but not for ever.
_TRIES = 3


class _Met:
    """The comparisons of a process so far, by the kind of node: how often, or whether it was right.

    A kind is the class of a custom Function, or the name of one of PyTorch's own nodes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._functions: WeakKeyDictionary[type, int] = WeakKeyDictionary()
        self._names: dict[str, int] = {}

    def open(self, kind: type | str) -> bool:
        """Say whether a kind of node is still to be compared."""
        with self._lock:
            return self._of(kind) < _TRIES

    def note(self, kind: type | str, verdict: Verdict) -> None:
        """Remember a comparison."""
        with self._lock:
            count = _TRIES if verdict is Verdict.RIGHT else self._of(kind) + 1
            if isinstance(kind, str):
                self._names[kind] = count
            else:
                self._functions[kind] = count

    def _of(self, kind: type | str) -> int:
        return self._names.get(kind, 0) if isinstance(kind, str) else self._functions.get(kind, 0)


_met = _Met()


def check_nodes(lin: Linearisation) -> None:
    """Compare a product with a difference of the condition where an unknown node is in its graph.

    Once for each kind of node in a process: it costs some evaluations of the inner problem.

    Parameters
    ----------
    lin : Linearisation
        The recorded condition.

    Raises
    ------
    UnsupportedOperation
        If they differ, naming the node.
    """
    unknown = _unknown(lin.record.values)
    # What is lost in such a node depends on the problem, and not on the kind of node.
    crossing = is_shards(lin.residual) and _enters_pieces(lin.record.values)
    kinds = {k: name for k, name in unknown if _met.open(k) or (crossing and name == _ENTERING)}
    if not kinds or lin.lead or any(is_wrapped(t) for t in lin.tensors):
        return
    for what, gradient, product, point, sizes in _comparisons(lin):
        try:
            if is_shards(point):
                comparison = compare_whole(gradient, point, product, signs(point))
            else:
                comparison = compare_product(gradient, point, product, sizes)
        except Exception:  # the function does not like what it gets beside the point
            return
        if comparison.verdict is Verdict.WRONG:
            names = ", ".join(sorted(kinds.values()))
            raise UnsupportedOperation(
                f"The inner problem goes through {names}, and its derivative by {what} is wrong "
                "there: a product differs from a difference of the gradient by "
                f"{comparison.error:.0%} (the difference is known to {comparison.resolution:.1%}). "
                "The backward of such an operation treats as constant what is not (a detached "
                "tensor, a saved number, or a fused kernel of PyTorch's). Write the operation in "
                "elementary ones, or its backward in differentiable operations of its inputs; what "
                'needs first derivatives alone, such as Minimum(..., products="difference") or '
                "hypergrad.penalty_grad, works with it as it is."
                + (f" {_PLAIN}" if crossing else "")
            )
        if crossing and what == "params" and comparison.verdict is not Verdict.RIGHT:
            raise UnsupportedOperation(f"Nothing shows that a second derivative is right. {_PLAIN}")
    for kind, name in kinds.items():
        if name != _ENTERING:
            _met.note(kind, comparison.verdict)


def _unknown(values: Sequence[Tensor]) -> list[tuple[type | str, str]]:
    """List the kinds of nodes in a graph that are not on the tested list, with their names."""
    unknown: list[tuple[type | str, str]] = []
    for value in values:
        for node, _ in graph(value)[1]:
            name = node.name()
            if isinstance(node, BackwardCFunction):
                made_by = getattr(type(node), "_forward_cls", None)
                if not getattr(made_by, "__module__", "").startswith("hypergrad."):
                    unknown.append((type(node), name))
            elif name not in TESTED_NODES and not name.startswith(_PLUMBING):
                unknown.append((name, name))
    return unknown


_ENTERING = "_FromTorchTensorBackward"
_PLAIN = (
    "The inner loss makes a DTensor of a plain tensor that depends on params, as between modules "
    "of parallelize_module; there PyTorch loses second derivatives. Hand DTensors on between them "
    "(use_local_output=False, and DTensor inputs), or form products from first derivatives, "
    'Minimum(f, products="difference").'
)


def _enters_pieces(values: Sequence[Tensor]) -> bool:
    """Say whether a plain tensor that was computed becomes a DTensor on the way to some values."""
    return any(
        node.name() == _ENTERING
        and any(f is not None and f.next_functions for f, _ in node.next_functions)
        for value in values
        for node in graph(value).nodes
    )


# The nodes that autograd itself puts into a graph.
_PLUMBING = ("torch::autograd::", "struct torch::autograd::")

_Comparison = tuple[
    str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor, list[int] | None
]


def _comparisons(lin: Linearisation) -> list[_Comparison]:
    """Put functions beside their derivatives: by the inner and by the outer variables."""
    problem, layout, tensors, params = lin.problem, lin.layout, lin.tensors, lin.params.detach()

    def condition(x: Tensor) -> Tensor:
        return lin.at(shifted(lin, tensors, params - x)).residual

    w = signs(params)
    comparisons: list[_Comparison] = []
    if problem.condition.symmetric:
        product = lin.record.hessian or lin.record.transposed
        comparisons.append((
            "params",
            condition,
            lambda v: lin.replayed(product, v),
            params,
            layout.sizes,
        ))
    else:  # only products with the transpose are at hand
        back = lin.transposed(w)
        comparisons.append((
            "params", lambda x: dot(condition(x), w)[None], lambda v: dot(back, v)[None], params,
            layout.sizes,
        ))  # fmt: skip
    cross = lin.cross(w)
    moving = [p for p, part in zip(problem.outer, cross, strict=True) if part is not None]
    dtypes = {tensors[p].dtype for p in moving}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        return comparisons
    sizes = [tensors[p].numel() for p in moving]
    point = torch.cat([tensors[p].detach().reshape(-1) for p in moving])
    slope = torch.cat([part.reshape(-1) for part in cross if part is not None])

    def by_hparams(x: Tensor) -> Tensor:
        given = list(tensors)
        for place, part in zip(moving, x.split(sizes), strict=True):
            given[place] = part.reshape(tensors[place].shape)
        return dot(lin.at(given).residual, w.to(layout.dtype))[None]

    comparisons.append(("hparams", by_hparams, lambda v: (slope @ v)[None], point, sizes))
    return comparisons
