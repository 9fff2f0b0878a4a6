"""A product of second derivatives, held against differences of the gradient."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .trace import graph

Function = Callable[[Tensor], Tensor]

# The step along a direction as long as the point itself: near the cube root of the rounding unit.
_STEPS = {torch.float64: 3e-5, torch.float32: 4e-3}
_RESOLVED = 0.01
# How many times its own measured error a difference has to be off before it is a verdict.
_CLEARLY = 8.0


class Verdict(enum.Enum):
    """The outcome of a comparison.

    Attributes
    ----------
    RIGHT
        The product agrees with the difference to 1%.
    WRONG
        They differ by more than 1%, and by clearly more than the difference's own error.
    UNDECIDED
        The difference does not resolve 1% of the product: kinks, rounding, NaN.
    """

    RIGHT = "right"
    WRONG = "wrong"
    UNDECIDED = "undecided"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A product beside a difference.

    Attributes
    ----------
    verdict : Verdict
        The outcome.
    error : float
        The distance of the two, relative to the larger; of a leaf's part where that is wrong.
    resolution : float
        The difference's own error in the same units.
    leaf : int or None
        The leaf in whose part the largest fault was seen.
    """

    verdict: Verdict
    error: float
    resolution: float
    leaf: int | None = None


def compare_product(
    gradient: Function, point: Tensor, product: Function, sizes: Sequence[int] | None = None
) -> Comparison:
    """Compare a product with the derivative of a gradient, by differences along one direction.

    A product that looks wrong is compared along a second direction too, and counts if wrong there.
    It costs five gradients and one product, and twice that where something looks wrong.

    Parameters
    ----------
    gradient : callable
        The gradient, or any function, of vectors ``(*tasks, n)``, by first derivatives alone. The
        same random numbers have to be drawn in each call.
    point : Tensor
        Where, ``(*tasks, n)``.
    product : callable
        The recorded product: the derivative of `gradient` at the point along a vector.
    sizes : sequence of int, optional
        The sizes of the leaves in a vector, of sum n. The direction is as long in each leaf as the
        point is, so that it reaches all of them whatever their units.

    Returns
    -------
    Comparison
        The verdict, with the figures.
    """
    if point.dtype not in _STEPS or not point.numel():
        return Comparison(Verdict.UNDECIDED, math.nan, math.nan)
    with torch.no_grad():
        x = point.detach()
        leaves = [x.shape[-1]] if sizes is None else list(sizes)
        lengths = _lengths(x, leaves)
        first = _along(gradient, x, product, lengths, leaves, seed=0)
        if first.verdict is not Verdict.WRONG:
            return first
        second = _along(gradient, x, product, lengths, leaves, seed=1)
        if second.verdict is Verdict.WRONG:
            return first
        return dataclasses.replace(first, verdict=Verdict.UNDECIDED)


def compare_whole(
    gradient: Function, point: Tensor, product: Function, along: Tensor
) -> Comparison:
    """Compare the same along a given direction, by norms of whole vectors alone.

    Parameters
    ----------
    gradient, point, product
        As in `compare_product`.
    along : Tensor
        The direction, like the point; it is taken as long as the point is.

    Returns
    -------
    Comparison
        The verdict, with the figures.
    """
    if point.dtype not in _STEPS:
        return Comparison(Verdict.UNDECIDED, math.nan, math.nan)
    norm = torch.linalg.vector_norm
    with torch.no_grad():
        size = norm(point)
        direction = along * (torch.where(size > 0, size, 1.0) / norm(along))[None]
        here, image = gradient(point), product(direction)
        step = _STEPS[point.dtype]
        slopes, bends = [], []
        for h in (step, step / 2):
            ahead, behind = gradient(point + h * direction), gradient(point - h * direction)
            slopes.append((ahead - behind) / (2 * h))
            bends.append((ahead - 2 * here + behind) / h)
        slope = slopes[1] + (slopes[1] - slopes[0]) / 3
        own = norm(slopes[1] - slopes[0]) + norm(bends[1] - bends[0] / 2)
        own = own + torch.finfo(point.dtype).eps * norm(here) / step
        error, larger = norm(image - slope), torch.maximum(norm(image), norm(slope))
        figures = float(error / larger), float(own / larger)
    if not all(map(math.isfinite, figures)):
        return Comparison(Verdict.UNDECIDED, math.nan, math.nan)
    if figures[0] > max(_RESOLVED, _CLEARLY * figures[1]):
        return Comparison(Verdict.WRONG, *figures)
    resolved = max(figures) <= _RESOLVED
    return Comparison(Verdict.RIGHT if resolved else Verdict.UNDECIDED, *figures)


def nodes_of(outputs: Sequence[Tensor]) -> set[str]:
    """Name the nodes in the graph that was recorded for some tensors.

    Whoever looks for an unknown node asks for those of a loss and of its gradient: where a custom
    Function detaches its derivative, or the loss is linear in it, the gradient's graph has none.

    Parameters
    ----------
    outputs : sequence of Tensor
        What was recorded.

    Returns
    -------
    set of str
        The names, as ``grad_fn.name()`` gives them.
    """
    return {node.name() for y in outputs for node in graph(y).nodes}


def _lengths(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Measure the root mean square of each leaf; of one that is zero, that of the others."""
    parts = x.split(list(sizes), dim=-1)
    size = torch.stack([p.square().sum(-1) / max(p.shape[-1], 1) for p in parts], -1).sqrt()
    present = size > 0
    typical = (size.sum(-1) / present.sum(-1).clamp(min=1)).unsqueeze(-1)
    typical = torch.where(typical > 0, typical, torch.ones_like(typical))
    return torch.where(present, size, typical)


def _along(
    gradient: Function, x: Tensor, product: Function, lengths: Tensor, sizes: Sequence[int],
    *, seed: int,
) -> Comparison:  # fmt: skip
    """Compare along one direction, which is the same in every call."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(x.shape[-1], generator=generator, dtype=torch.float64).to(x)
    spread = torch.tensor(list(sizes), device=x.device)
    direction = drawn * lengths.repeat_interleave(spread, dim=-1)
    here = gradient(x).to(torch.float64)
    image = product(direction).to(torch.float64)
    step = _STEPS[x.dtype]
    slopes, bends = [], []
    for h in (step, step / 2):
        ahead = gradient(x + h * direction).to(torch.float64)
        behind = gradient(x - h * direction).to(torch.float64)
        slopes.append((ahead - behind) / (2 * h))
        bends.append((ahead - 2 * here + behind) / h)
    slope = slopes[1] + (slopes[1] - slopes[0]) / 3
    # Truncation and rounding show in the two slopes. A kink beside the point does not: it shows in
    # what is left of the bend when the steps go to zero.
    change, kink = slopes[1] - slopes[0], bends[1] - bends[0] / 2
    floor = torch.finfo(x.dtype).eps * here.abs() / step

    alike = image.shape == x.shape
    units = lengths.to(torch.float64) if alike else torch.ones_like(lengths[..., :1])

    def norms(vector: Tensor) -> Tensor:
        """Measure the norm of each leaf's part, in units in which all leaves are alike."""
        parts = vector.split(list(sizes), dim=-1) if alike else (vector,)
        by_leaf = torch.stack([p.norm(dim=-1) for p in parts], -1) if alike else vector.norm()
        return (by_leaf * units).reshape(-1, len(parts)).norm(dim=0)

    error, own = norms(image - slope), norms(change) + norms(kink) + norms(floor)
    larger = torch.maximum(norms(image), norms(slope))
    whole, whole_own, whole_error = (float(v.norm()) for v in (larger, own, error))
    if not math.isfinite(whole + whole_own + whole_error):
        return Comparison(Verdict.UNDECIDED, math.nan, math.nan)
    # A small leaf can be quiet by luck: it is given the noise of all.
    faulty = (error > _CLEARLY * (own + 0.1 * whole_own)) & (error > _RESOLVED * larger)
    if bool(faulty.any()):
        leaf = int(torch.where(faulty, error, torch.zeros_like(error)).argmax())
        figures = float(error[leaf] / larger[leaf]), float(own[leaf] / larger[leaf])
        return Comparison(Verdict.WRONG, *figures, leaf if alike else None)
    if whole == 0.0:
        return Comparison(Verdict.RIGHT, 0.0, 0.0)
    resolved = whole_own <= _RESOLVED * whole and whole_error <= _RESOLVED * whole
    verdict = Verdict.RIGHT if resolved else Verdict.UNDECIDED
    return Comparison(verdict, whole_error / whole, whole_own / whole)
