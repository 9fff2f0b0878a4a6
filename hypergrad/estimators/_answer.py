"""What every estimator does with what it found: checked, detached, shaped like `hparams`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._autograd.host import all_tasks
from .._autograd.refusals import refuse_derivatives
from .._autograd.trace import being_traced
from .._errors import HypergradError, NotFinite, UnsupportedOperation
from .._implicit.causes import Place, derivative
from .._implicit.task_norms import finite
from .._info import SolveInfo, Status
from .._pytrees import Tree
from .._warnings import OnFailure, counted, warn

F32 = torch.float32

_OF_VALUE = (
    "params is finite there, so look at outer: at its data, which may be an empty batch (a mean "
    "over nothing is NaN), or at the edge of a domain, such as log at 0."
)
_OF_GRADIENT = f"{derivative()}. Or the derivatives of many steps, multiplied, overflow."


@dataclasses.dataclass
class Found:
    """A hypergradient before it is given to the caller.

    Attributes
    ----------
    grads : list of Tensor or None
        One for each variable of `hparams`; None where nothing depends on it.
    value : Tensor
        The outer loss.
    params : pytree
        The inner variables that the outer loss was evaluated at.
    aux : pytree
        What the outer loss returned beside its value.
    captured : list of Tensor
        What the functions capture that is differentiated further out.
    """

    grads: list[Tensor | None]
    value: Tensor
    params: Any
    aux: Any
    captured: list[Tensor]


def hypergradient(name: str, H: Tree, found: Found, on_failure: OnFailure, cure: str) -> Any:
    """The answer of the estimator called `name`, shaped like `hparams` and detached.

    Parameters
    ----------
    name : str
        The public function, for messages.
    H : Tree
        The hyperparameters.
    found : Found
        What it found.
    on_failure : str
        Unless it is "ignore", a number that is not finite raises.
    cure : str
        What to try where one is not.

    Returns
    -------
    grads : pytree of Tensor
        Differentiating it raises.
    """
    leaves = [
        torch.zeros_like(v.detach())
        if g is None
        else g.detach().to(v.dtype).clone(memory_format=torch.contiguous_format)
        for g, v in zip(found.grads, H.variables, strict=True)
    ]
    if on_failure != "ignore":
        refuse_not_finite([
            *(
                Place(f"params{path}", leaf, lambda: cure, f"params{path}")
                for path, leaf in _named(found.params)
            ),
            Place("the outer loss", found.value, lambda: _OF_VALUE, argument="outer"),
            *(
                Place(f"the gradient by {path}", leaf, lambda: _OF_GRADIENT, path)
                for path, leaf in zip(map(H.variable_path, range(len(leaves))), leaves, strict=True)
            ),
        ])

    def error() -> Exception:
        return UnsupportedOperation(
            f"{name} returns a detached hypergradient that cannot be differentiated again. For "
            "higher derivatives differentiate the steps with torch.func.grad, or the solution with "
            "custom_argmin."
        )

    sources = [*H.variables, *found.captured]
    return H.fill(refuse_derivatives(leaves, sources, error, plain=being_traced()))


def refuse_not_finite(places: Sequence[Place]) -> None:
    """Raise, naming the first place and how many tasks, if a number is not finite.

    Reads one packed tensor from the device.

    Parameters
    ----------
    places : sequence of Place
        What is looked at.

    Raises
    ------
    NotFinite
        If one is not.
    """
    sound = finite((), *[place.tensor for place in places])
    rows = all_tasks(sound.reshape(1)).reshape(-1).tolist()
    if all(rows):
        return
    tasks = f"{rows.count(False)} of {len(rows)} tasks: " if len(rows) > 1 else ""
    bad = next(place for place in places if not _all_finite(place.tensor))
    raise NotFinite(
        f"{tasks}{bad.where} holds NaN or infinity. {bad.cure()} on_failure='ignore' leaves NaN as "
        "NaN.",
        leaf=bad.leaf,
        argument=bad.argument,
    )


def _all_finite(tensor: Tensor) -> bool:
    return bool(all_tasks(torch.isfinite(tensor).all().reshape(1)).all())


def _named(tree: Any) -> Iterable[tuple[str, Tensor]]:
    keyed = pytree.tree_flatten_with_path(tree)[0]
    for path, leaf in keyed:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield str(pytree.keystr(path)), leaf.detach()


def evidence(
    method: str,
    *,
    success: Tensor,
    outer_value: Tensor,
    solution: Any,
    aux: Any,
    failed: Status = Status.MAX_ITERATIONS,
    **figures: Tensor,
) -> SolveInfo:
    """A `SolveInfo` of an estimator that solves no linear system: NaN where it knows nothing."""
    nan = torch.full_like(outer_value, math.nan, dtype=torch.promote_types(outer_value.dtype, F32))
    zero = torch.zeros_like(outer_value, dtype=torch.int64)
    known: dict[str, Any] = dict.fromkeys(
        ("residual_norm", "inner_residual", "outer_error", "error_estimate", "degeneracy"), nan
    )
    return SolveInfo(
        status=torch.where(success, zero + int(Status.CONVERGED), int(failed)),
        success=success,
        iterations=zero,
        matvecs=zero,
        negative_curvature=torch.zeros_like(success),
        eigenvalues=torch.stack([nan, nan]),
        solution=solution,
        outer_value=outer_value,
        aux=aux,
        method=method,
        **(known | figures),
    )


def judge_figure(
    figure: Tensor,
    limit: float | None,
    on_failure: OnFailure,
    error: type[HypergradError],
    text: Callable[[str], str],
) -> None:
    """Warn or raise, once for all tasks, where a figure is above its limit or NaN.

    Parameters
    ----------
    figure : Tensor
        Shape ``()``, for each task.
    limit : float, optional
        None: not judged.
    on_failure : str
        What to do; nothing is read with "ignore".
    error : type
        What is raised.
    text : callable
        The message around the figure.

    Raises
    ------
    HypergradError
        `error`, with ``on_failure="raise"``.
    """
    if on_failure == "ignore" or limit is None:
        return
    rows = all_tasks(figure.reshape(1)).reshape(-1).tolist()
    failed = [value for value in rows if not value <= limit]
    if not failed:
        return
    exact = on_failure == "raise"
    worst = max(failed, key=lambda value: math.inf if math.isnan(value) else value)
    shown = f"{worst:.3g}" if exact else f"more than {limit:.3g}"
    message = counted(len(failed), len(rows), exact=exact) + text(shown)
    if on_failure == "raise":
        raise error(message)
    warn(message)
