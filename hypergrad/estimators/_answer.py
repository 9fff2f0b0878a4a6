"""An estimate of the hypergradient: checked, detached, shaped like `hparams`, and handed out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd.host import all_tasks
from .._autograd.refusals import refuse_derivatives
from .._autograd.torch_pytrees import pytree
from .._autograd.trace import being_traced
from .._errors import HypergradError, NotFinite, UnsupportedOperation
from .._implicit.causes import Place, derivative, of_leaves
from .._implicit.task_norms import finite
from .._info import SolveInfo, Status
from .._pytrees import Tree
from .._warnings import OnFailure, counted, warn
from ..solvers._base import info_of
from ..solvers._fields import positive
from ..solvers._system import Solution, graded
from ._loss import Slopes, wide

_OF_VALUE = (
    "params is finite there, so look at outer: at its data, which may be an empty batch (a mean "
    "over nothing is NaN), or at the edge of a domain, such as log at 0."
)
_OF_GRADIENT = f"{derivative()}. Or the derivatives of many steps, multiplied, overflow."


@dataclasses.dataclass
class Estimate:
    """A hypergradient before it is handed to the caller.

    Attributes
    ----------
    grads : list of Tensor or None
        One for each variable of `hparams`; None where nothing depends on it.
    value : Tensor
        The outer loss.
    params : pytree
        The inner variables that the outer loss was evaluated at, detached.
    aux : pytree
        What the outer loss returned beside its value, detached.
    captured : list of Tensor
        What the functions capture that is differentiated further out.
    """

    grads: list[Tensor | None]
    value: Tensor
    params: Any
    aux: Any
    captured: list[Tensor]


def hypergradient(name: str, H: Tree, estimate: Estimate, on_failure: OnFailure, cure: str) -> Any:
    """Return the answer of the estimator called `name`, shaped like `hparams` and detached.

    Parameters
    ----------
    name : str
        The public function, for messages.
    H : Tree
        The hyperparameters.
    estimate : Estimate
        What it has come to.
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
        for g, v in zip(estimate.grads, H.variables, strict=True)
    ]
    if on_failure != "ignore":
        refuse_not_finite([
            *(
                Place(f"params{path}", leaf, lambda: cure, f"params{path}")
                for path, leaf in _named(estimate.params)
            ),
            Place("the outer loss", estimate.value, lambda: _OF_VALUE, argument="outer"),
            *of_leaves("the gradient by ", H, leaves, lambda: _OF_GRADIENT),
        ])

    def error() -> Exception:
        return UnsupportedOperation(
            f"{name} returns a detached hypergradient that cannot be differentiated again. For "
            "higher derivatives differentiate the steps with torch.func.grad, or the solution with "
            "custom_argmin."
        )

    sources = [*H.variables, *estimate.captured]
    return H.fill(refuse_derivatives(leaves, sources, error, plain=being_traced()))


def handed_out(
    grads: Any, estimate: Estimate, has_aux: bool, return_params: bool, info: Any = None
) -> Any:
    """Hand out the hypergradient, alone or in front of what else was asked for.

    Parameters
    ----------
    grads : pytree of Tensor
        What `hypergradient` returned.
    estimate : Estimate
        Where it comes from.
    has_aux, return_params : bool
        What the caller asked for.
    info : optional
        The evidence, where it was asked for: `aux` is in it.

    Returns
    -------
    grads, or a tuple
        Of the hypergradient, the evidence or `aux`, and the inner variables.
    """
    results = [grads]
    if info is not None or has_aux:
        results.append(estimate.aux if info is None else info)
    if return_params:
        results.append(estimate.params)
    return results[0] if len(results) == 1 else tuple(results)


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
    bad = next(
        (p for p in places if not all_tasks(torch.isfinite(p.tensor).all().reshape(1)).all()),
        Place("the answer", places[0].tensor, lambda: ""),
    )
    raise NotFinite(
        f"{tasks}{bad.where} holds NaN or infinity. {bad.cure()} on_failure='ignore' leaves NaN as "
        "NaN.",
        leaf=bad.leaf,
        argument=bad.argument,
    )


def _named(tree: Any) -> Iterable[tuple[str, Tensor]]:
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield str(pytree.keystr(path)), leaf.detach()


def evidence(
    method: str,
    slopes: Slopes,
    solution: Any,
    success: Tensor,
    failed: Status = Status.MAX_ITERATIONS,
    **figures: Tensor,
) -> SolveInfo:
    """Fill a `SolveInfo` for an estimator without a linear system: NaN where it knows nothing."""
    nan = torch.full_like(wide(slopes.value), math.nan)
    status, size = graded({Status.CONVERGED: success}, failed), figures.pop("residual_norm", nan)
    known: dict[str, Any] = {"outer_value": slopes.value, "aux": slopes.aux, **figures}
    solved = Solution(nan[None], status, success, residual_norm=size, method=method)
    return info_of(solved, solution=solution, eigenvalues=torch.stack([nan, nan]), **known)


def judge_figure(
    figure: Tensor,
    limit: float | None,
    on_failure: OnFailure,
    error: type[HypergradError],
    text: str,
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
    text : str
        The message, with ``{}`` in place of the figure.

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
    message = counted(len(failed), len(rows), exact=exact) + text.format(shown)
    if exact:
        raise error(message)
    warn(message)


def check_positive(**numbers: float | None) -> None:
    """Refuse numbers that are not positive and finite."""
    for name, value in numbers.items():
        positive(name, value)


def check_not_negative(**numbers: float | None) -> None:
    """Refuse numbers that are negative or not finite."""
    for name, value in numbers.items():
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be finite and not negative; got {value!r}.")
