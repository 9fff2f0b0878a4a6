"""The linear solve of a linearised problem, and the figures that say how good it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._conditions import Condition
from ._degeneracy import DEGENERATE, degeneracy
from ._info import SolveInfo, Status
from ._linearise import Linearisation
from ._replay import Parts
from ._transforms import is_wrapped
from .solvers._base import LinearSystem, Solution, Solver, dot, info_of, norm

# What an estimate is multiplied by, and up to where, from benchmarks/calibration.py. Above
# `_HARDLY` it says that little is known, at `_NO_DIGIT` that nothing is.
_MARGIN = 9.0
_HARDLY = 0.9
_NO_DIGIT = 10.0
#: How a solve ends that leaves an answer of unknown quality.
_LOST = (Status.NEGATIVE_CURVATURE, Status.BREAKDOWN, Status.DIVERGED, Status.SINGULAR)


def solve_linear(
    lin: Linearisation,
    solver: Solver,
    b: Tensor,
    params: Tensor,
    *,
    transpose: bool,
    inner_tol: float | None,
    x0: Tensor | None = None,
    looks: bool = True,
    estimate: bool = False,
) -> tuple[Tensor, SolveInfo, Solution]:
    """Solve ``A u = b``, or with the transpose of A, and collect the evidence.

    Parameters
    ----------
    lin : Linearisation
        Where A comes from.
    solver : Solver
        The method.
    b : Tensor
        Right-hand sides ``(*tasks, n)``, with a further axis in front where several share A.
    params : Tensor
        The flat inner variables ``(*tasks, n)``, the scale of the inner residual.
    transpose : bool
        Whether the transpose of A is meant.
    inner_tol : float or None
        Above this relative inner residual the answer is no success.
    x0 : Tensor, optional
        Where the iteration starts.
    looks : bool
        Whether the host may look at values on the way.
    estimate : bool
        Whether all figures are wanted, those of the error and the spectrum too.

    Returns
    -------
    u : Tensor
        The answer, like `b`.
    info : SolveInfo
        Its evidence, without `solution`, `outer_value` and `aux`.
    found : Solution
        What the solver said.
    """
    condition = lin.problem.condition
    system = LinearSystem(
        matvec=lin.operator(transpose),
        b=b,
        layout=lin.layout,
        tree=lin.problem.params,
        x0=x0,
        rmatvec=None if lin.record.product is None else lin.operator(not transpose),
        symmetric=condition.symmetric,
        dense=lambda: lin.dense(transpose),
        looks=looks,
        contraction=condition.contraction,
        # The Newton step belongs to A itself.
        condition=lin.residual if estimate and (transpose or condition.symmetric) else None,
        shared=b.shape[0] if b.ndim - 1 > len(lin.lead) else 1,
    )
    # The solver's own arithmetic.
    with torch.autocast(b.device.type, enabled=False), torch.no_grad():
        found = solver.run(system)
    size, length, strength = norm(lin.residual), norm(found.x), norm(b)
    # Parameters this close to zero are zero: what is left of them is rounding.
    least = (torch.finfo(params.dtype).eps * lin.layout.n) ** 0.5
    extent = norm(params).clamp(min=least)
    inner = size * length / (strength * extent)
    inner = torch.where(size == 0, torch.zeros_like(inner), inner)
    success = found.success
    if inner_tol is not None:
        # Without a right-hand side there is no curvature to judge by; NaN is no success.
        success = success & ((inner <= inner_tol) | (strength == 0))
    success = success & torch.isfinite(length)
    further = {}
    jump = degeneracy(lin, found.x, b, transpose=transpose)
    if jump is not None:
        success = success & ~(jump > DEGENERATE)
        further["degeneracy"] = jump
    if estimate:
        further |= {
            "outer_error": dot(found.x, lin.residual),
            "error_estimate": _error_estimate(found, length / strength, extent, system, solver),
            "eigenvalues": found.eigenvalues,
        }
    info = info_of(found, solution=None, success=success, inner_residual=inner, **further)
    return found.x, info, found


def _error_estimate(
    found: Solution, scale: Tensor, params: Tensor, system: LinearSystem, solver: Solver
) -> Tensor:
    """The relative error of ``(dF/dargs)^T u``, from both residuals and the spectrum."""
    # The scale is ||u|| / ||b||, that of the inverse as the answer shows it.
    # Relative changes of u and of the parameters are taken for relative changes of the product;
    # the margin makes up for those that are larger. See benchmarks/calibration.py.
    if found.inverse is None or found.newton is None or found.largest is None:
        return torch.full_like(found.residual_norm, math.nan)
    inverse = torch.where(torch.isfinite(found.inverse), found.inverse, scale)
    damping = abs(getattr(solver, "damping", 0.0))
    linear = found.residual_norm * inverse / scale + damping * inverse
    inner = found.newton / params
    eps = torch.finfo(system.layout.precision).eps
    rounding = eps * found.largest * torch.maximum(inverse, scale)
    total = _MARGIN * (linear + inner + rounding)
    lost = torch.zeros_like(found.success)
    for status in _LOST:
        lost = lost | (found.status == status)
    return torch.where(lost, total.clamp(min=1), total)


def of_sum(estimate: Tensor, part: Parts, whole: Parts) -> Tensor:
    """The relative error of a sum of terms, one of which has a known one and the rest none."""

    def size(terms: Parts) -> Tensor:
        sizes = [norm(_rows(t, estimate.shape)).to(estimate) for t in terms if t is not None]
        return norm(torch.stack(sizes, dim=-1)) if sizes else torch.zeros_like(estimate)

    share = size(part) / size(whole)
    total = estimate * torch.where(torch.isnan(share), 1.0, share)
    # Where the term is hardly known, its true size and so its share are not known either.
    return torch.where(estimate > _HARDLY, total.clamp(min=1), total).clamp(max=_NO_DIGIT)


def of_term(estimate: Tensor) -> Tensor:
    """The relative error of the implicit term by itself, for each task."""
    return torch.where(estimate > _HARDLY, estimate.clamp(min=1), estimate).clamp(max=_NO_DIGIT)


def needs_product(solver: Solver, condition: Condition, *, transpose: bool) -> bool:
    """Whether a solve, with the transpose of A or with A, forms products with A itself."""
    return (not transpose or solver.needs_transpose) and not condition.symmetric


def finite(lead: Sequence[int], *tensors: Tensor | None) -> Tensor:
    """Whether all entries of all tensors are finite, for each task: bool, shaped like `lead`."""
    rows = [_rows(t, lead) for t in tensors if t is not None and t.numel()]
    if not rows:
        return torch.ones(tuple(lead), dtype=torch.bool, device="cpu")
    device = rows[0].device
    # A finite norm has finite entries, and is many times as fast as a look at the largest of them.
    plain = device.type == "cpu" and not any(is_wrapped(r) for r in rows)
    if plain and all(math.isfinite(torch.linalg.vector_norm(r).item()) for r in rows):
        return torch.ones(tuple(lead), dtype=torch.bool, device=device)
    largest = [
        torch.linalg.vector_norm(r, math.inf, dim=-1).to(device, torch.float64) for r in rows
    ]
    return torch.isfinite(torch.stack(largest)).all(dim=0)


def _rows(tensor: Tensor, lead: Sequence[int]) -> Tensor:
    """The entries of each task in one dimension, behind those of the tasks."""
    return tensor.reshape(*lead, -1) if tensor.numel() else tensor.new_zeros(*lead, 0)
