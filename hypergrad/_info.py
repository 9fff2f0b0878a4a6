"""The evidence for a hypergradient, and the status of a linear solve."""

from __future__ import annotations

import dataclasses
from collections import Counter
from enum import IntEnum
from typing import Any

from torch import Tensor

from ._autograd.torch_pytrees import pytree
from ._autograd.transforms import is_wrapped

_MOST = 2  # leaves of a pytree that are shown one by one


class Status(IntEnum):
    """How a linear solve ended; the numbers are fixed.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import Status
    >>> Status(torch.tensor(1)).name
    'MAX_ITERATIONS'
    >>> (torch.tensor([0, 2]) == Status.CONVERGED).tolist()
    [True, False]
    """

    #: The residual is within the tolerance.
    CONVERGED = 0
    #: The iterations ran out. Give it more, a preconditioner, or the last solution as ``x0``.
    MAX_ITERATIONS = 1
    #: The matrix is not positive definite. Try damping, or `GaussNewton`.
    NEGATIVE_CURVATURE = 2
    #: The method can make no further step. Take another one, `GMRES` or `Exact`.
    BREAKDOWN = 3
    #: Rounding allows no smaller residual. Use float64, where that is too large.
    STAGNATED = 4
    #: The iteration moves away from the solution. Try a smaller step size, or another method.
    DIVERGED = 5
    #: The matrix is singular and the system has no solution. Add a regulariser, or damping.
    SINGULAR = 6
    #: NaN or infinity was met.
    NOT_FINITE = 7

    @classmethod
    def _missing_(cls, value: object) -> Status | None:
        if isinstance(value, Tensor) and value.numel() == 1:
            return cls(int(value.item()))
        return None


@dataclasses.dataclass(frozen=True, repr=False)
class SolveInfo:
    """The evidence for one hypergradient, or for a batch of them.

    It is a registered pytree whose leaves are tensors, so that it can leave ``torch.func.vmap``
    with one entry per task. A figure that the method does not know is NaN.

    Attributes
    ----------
    status : Tensor
        int64, a `Status` of the linear solve.
    success : Tensor
        bool: the linear solve met what was asked of it, not only in units that hide an error, and
        the matrix has no lack of rank that matters. A `Minimum` has no negative curvature and,
        where that is judged, the inner problem is solved (see `inner_tol` in `implicit_grad`) at a
        point that is not degenerate.
    iterations, matvecs : Tensor
        int64: the iterations made, and the products with the matrix, those for the true residual
        and the other evidence included.
    residual_norm : Tensor
        ``||b - (A + damping I) u|| / ||b||`` of the returned ``u``, recomputed at the end.
    negative_curvature : Tensor
        bool: a direction p with p.Ap <= 0 was met, by whatever method, in ``A + damping I``. Of a
        `Minimum` the answer is no success then, while `status` stays that of the linear solve.
    inner_residual : Tensor
        How far ``params`` is from solving the inner problem: the length of the inner Newton step
        ``A^-1 F`` relative to ``params``, which is about the relative distance to the inner
        solution. Conjugate directions of `CG` and `MINRES` give it by projection, a factorisation
        solves for it; elsewhere it is the length of a step along F, by the curvature there. With a
        factorisation lengths are those in the units of the equilibrated matrix. It is infinite
        where ``params`` is zero and is no solution.
    outer_error : Tensor
        ``u . F``, the first-order estimate of ``outer(params) - outer(solution)``.
    error_estimate : Tensor
        Estimate of the relative error of the hypergradient: from the linear residual and what the
        solve has seen of the inverse, from the change of the hypergradient on an inner Newton step
        (or, where that is tiny, from its length), from what `GaussNewton` leaves out, and from
        `product_error`. It is at most 10, where nothing is known, as at a saddle. It needs
        ``return_info=True`` (in the decorators a `callback`), and `CG`, `MINRES` or `Exact`, by
        themselves or in `Auto`; otherwise NaN. In the decorators, `root_vjp` and `root_jvp` it is
        that of the implicit term, without such a change. See the page on reliability for how often
        it holds.
    product_error : Tensor
        The part of the relative error that products by differences make: what changes with a step
        twice as long, in the product along u and in the cross derivative. NaN where products are
        exact.
    degeneracy : Tensor
        How far apart the derivatives of the solution on its two sides are. At a kink of a proximal
        map, a projection or an inequality: ``||(D' - D)^T u|| / min(||b||, ||u||)``, with D the
        derivative of the map that was taken and D' that on the other side. Infinite where the
        gradients of the active constraints of `KKT` are linearly dependent. Zero elsewhere; NaN
        for conditions that are taken to be smooth. Above 1e-2 the answer is no success.
    eigenvalues : Tensor
        Shape ``(2,)``: lowest and highest Ritz value of ``A + damping I``, which lie inside its
        spectrum. They come free with `CG` and `MINRES` (not with a preconditioner), and from
        `Exact` where A is symmetric and has up to 128 unknowns.
    solution : pytree
        u, shaped like ``params``: pass it as the next call's ``x0``.
    outer_value : Tensor
        The value of the outer loss.
    aux : pytree
        What the outer loss returned beside its value, with ``has_aux=True``.
    method : str
        The name of the method that made the solve (static text).

    Examples
    --------
    >>> import torch, hypergrad
    >>> matvec = lambda v: 2.0 * v
    >>> x, info = hypergrad.CG().solve(matvec, torch.ones(3))
    >>> print(info)
    CG: CONVERGED after 1 iterations, 2 products; residual 0.0e+00
    >>> info.success, info.negative_curvature, info.eigenvalues
    (tensor(True), tensor(False), tensor([2., 2.]))
    """

    status: Tensor
    success: Tensor
    iterations: Tensor
    matvecs: Tensor
    residual_norm: Tensor
    negative_curvature: Tensor
    inner_residual: Tensor
    outer_error: Tensor
    error_estimate: Tensor
    product_error: Tensor
    degeneracy: Tensor
    eigenvalues: Tensor
    solution: Any
    outer_value: Tensor
    aux: Any = None
    method: str = ""

    def __str__(self) -> str:
        """Write the evidence in a line, for people; of a batch the counts and largest figures."""
        states = Counter(Status(s).name for s in self.status.reshape(-1).tolist())
        tasks = self.status.numel()
        if self.status.ndim == 0:
            text = f"{self.method}: {next(iter(states))} after"
        else:
            counts = ", ".join(f"{count} {name}" for name, count in states.most_common())
            text = f"{self.method}, {tasks} tasks: {counts or 'none'}; at most"
        text += f" {_most(self.iterations)} iterations, {_most(self.matvecs)} products"
        for label, figure in (
            ("residual", self.residual_norm),
            ("inner residual", self.inner_residual),
            ("outer error", self.outer_error),
            ("error of a product by differences", self.product_error),
        ):
            known = [value for value in figure.reshape(-1).tolist() if value == value]
            if known:
                text += f"; {label} {max(known, key=abs):.1e}"
        return text

    def __repr__(self) -> str:
        """Write the fields, with shapes in place of tensors."""
        return fields_of(self)


def _most(counts: Tensor) -> int:
    return int(counts.max()) if counts.numel() else 0


_FIELDS = tuple(f.name for f in dataclasses.fields(SolveInfo) if f.name != "method")


_Static = tuple[str, tuple[str, ...], tuple[Any, ...]]


def _flatten_with_keys(info: SolveInfo) -> tuple[list[tuple[Any, Any]], _Static]:
    # None is a leaf to torch's pytrees, and cannot leave vmap: it goes into the static part, by
    # itself and where it is a part of params.
    present = tuple(name for name in _FIELDS if getattr(info, name) is not None)
    keyed: list[tuple[Any, Any]] = []
    shapes: list[Any] = []
    for name in present:
        value, key = getattr(info, name), pytree.GetAttrKey(name)
        leaves, spec = pytree.tree_flatten(value)
        if all(leaf is not None for leaf in leaves):
            keyed.append((key, value))
            shapes.append(None)
            continue
        keyed += [(key, leaf) for leaf in leaves if leaf is not None]
        shapes.append((spec, tuple(leaf is None for leaf in leaves)))
    return keyed, (info.method, present, tuple(shapes))


def _flatten(info: SolveInfo) -> tuple[list[Any], _Static]:
    keyed, static = _flatten_with_keys(info)
    return [leaf for _, leaf in keyed], static


def _unflatten(leaves: Any, static: _Static) -> SolveInfo:
    method, present, shapes = static
    fields: dict[str, Any] = dict.fromkeys(_FIELDS)
    remaining = iter(leaves)
    for name, shape in zip(present, shapes, strict=True):
        if shape is None:
            fields[name] = next(remaining)
        else:
            spec, missing = shape
            fields[name] = pytree.tree_unflatten(
                [None if absent else next(remaining) for absent in missing], spec
            )
    return SolveInfo(**fields, method=method)


pytree.register_pytree_node(
    SolveInfo,
    _flatten,
    _unflatten,
    serialized_type_name="hypergrad.SolveInfo",
    flatten_with_keys_fn=_flatten_with_keys,
)


def shown(value: Any) -> str:
    """Write a number, or a pytree with shapes in place of its tensors."""
    if isinstance(value, Tensor):
        if value.ndim == 0 and value.device.type != "meta" and not is_wrapped(value):
            number = value.item()
            return f"{number:.4g}" if isinstance(number, float) else str(number)
        return _shape(value)
    leaves, spec = pytree.tree_flatten(value)
    if sum(isinstance(leaf, Tensor) for leaf in leaves) > _MOST:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        entries = sum(t.numel() for t in tensors)
        return f"<{len(tensors)} tensors of {entries} entries>"
    return repr(pytree.tree_unflatten([_Leaf(leaf) for leaf in leaves], spec))


def fields_of(record: Any) -> str:
    """Write the ``repr`` of a dataclass."""
    fields = [f"{f.name}={_field(getattr(record, f.name))}" for f in dataclasses.fields(record)]
    return f"{type(record).__name__}({', '.join(fields)})"


def _field(value: Any) -> str:
    plain = isinstance(value, str | int | float | dict | type(None))
    tensors = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
    if dataclasses.is_dataclass(value) or (plain and not tensors):
        return repr(value)
    return shown(value)


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


class _Leaf:
    """A leaf of a pytree, whose repr is its shape."""

    def __init__(self, leaf: Any) -> None:
        self._text = _shape(leaf) if isinstance(leaf, Tensor) else repr(leaf)

    def __repr__(self) -> str:
        return self._text
