"""Products by central differences of first derivatives, and the step that they are made with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._autograd.products import Parts
from ..solvers._vectors import norm

if TYPE_CHECKING:
    from ._first_derivatives import FirstDerivatives, Slopes
    from ._inner_problem import Problem

_APART = 4.0  # the factor between two steps that are compared
_MOST = 3  # steps that are tried in either direction
_WIDE = 0.05  # the relative distance of differences of which neither is believed
_SURE = (
    4.0  # two differences are believed that differ so much less from each other than from a third
)

#: Differences ``(v, reach) -> (parts, ...)`` along leaves v, each task moved as far as `reach`.
Images = Callable[[Parts, Tensor], Sequence[Parts]]


class Step:
    """The length of the displacement that a central difference is made with, for each task.

    The error of a difference is ``t h^2 + n / h``, with the bend t of the function and the noise n
    of its arithmetic, and neither is known. Two steps begin about ``eps^(1/3) scale``, the best for
    a function whose size and third derivative are of the order of one. Where the two differences
    are farther apart than the arithmetic makes necessary, shorter and then longer steps are tried
    as long as the differences come closer. The step is the geometric mean of the closest two: its
    error is at most half of what they are apart, whether bend or noise makes it.

    Parameters
    ----------
    scale : Tensor
        The size of what is displaced, for each task; where it is zero, one.
    dtype : torch.dtype
        The narrowest of the arithmetic.

    Attributes
    ----------
    reach : Tensor
        The length.
    tried : int
        How many differences have been formed to measure it.

    References
    ----------
    Gill, Murray, Saunders and Wright, Computing forward-difference intervals for numerical
    optimization, 1983; Pearlmutter, Fast exact multiplication by the Hessian, 1994, section 1.
    """

    def __init__(self, scale: Tensor, dtype: torch.dtype) -> None:
        some = torch.isfinite(scale) & (scale > 0)
        self._eps = torch.finfo(dtype).eps
        least = self._eps ** (1 / 3) / _APART
        self.reach = least * torch.where(some, scale, torch.ones_like(scale))
        self.tried = 0

    def measure(self, images: Images, v: Parts, *, looks: bool) -> Tensor:
        """Measure the error of differences along `v`, and correct the step by it.

        Parameters
        ----------
        images : callable
            The differences, of which each has its own bend and noise: one step is for all.
        v : sequence of Tensor
            Along what.
        looks : bool
            Whether the host may look: then other steps are tried where they are worth it.

        Returns
        -------
        noise : Tensor
            The relative error of the first, for each task, between one rounding and one.
        """
        start, lead = self.reach * _APART**0.5, self.reach.shape
        enough = min(2 * self._eps**0.5, 0.05)

        def at(level: int) -> Sequence[Parts]:
            self.tried += 1
            return images(v, start * _APART**-level)

        def between(one: Sequence[Parts], other: Sequence[Parts]) -> tuple[Tensor, Tensor]:
            """Measure how far differences are apart: the first one, and all together."""
            changes = [
                lengths(minus(a, b), lead) / _positive(lengths(b, lead))
                for a, b in zip(one, other, strict=True)
                if any(part is not None for part in b)
            ]
            return changes[0], torch.stack(changes).sum(dim=0)

        first, second = at(0), at(1)
        noise, begun = between(first, second)
        apart, middle = begun, torch.full_like(begun, 0.5)
        for towards, level, here in ((1, 1, second), (-1, 0, first)):  # shorter, then longer ones
            for _ in range(_MOST if looks else 0):
                # Where shorter ones were better, longer ones are not.
                left = ~(apart <= enough) & ((towards > 0) | (apart == begun) | (level < 0))
                if not any_task(left):
                    break
                level, there = level + towards, at(level + towards)
                of_first, change = between(there, here)
                better = left & (change < apart)
                apart = torch.where(better, change, apart)
                noise = torch.where(better, of_first, noise)
                middle = torch.where(better, level - towards / 2, middle)
                # Far apart they are beyond a kink or a bend, and may come together yet.
                if not any_task(better | (left & (apart > _WIDE))):
                    break
                here = there
        self.reach = start * _APART**-middle
        return noise.nan_to_num(1.0).clamp(self._eps, 1.0)


class Differences:
    """Products of a symmetric A and of the cross derivative, by differences of gradients.

    ``A v = (g(params + h v) - g(params - h v)) / 2h`` with g the gradient by the inner variables;
    ``(dF/dargs)^T u`` is the same with the gradient by the arguments, along u.

    Parameters
    ----------
    slopes : FirstDerivatives
        Of ``own_arguments(problem)``.
    problem : Problem
        The inner problem.
    tensors : sequence of Tensor
        Where.

    Attributes
    ----------
    here : Slopes
        The first derivatives there, until they are taken.
    step : Step
        That along the inner variables.
    """

    def __init__(
        self, slopes: FirstDerivatives, problem: Problem, tensors: Sequence[Tensor]
    ) -> None:
        self._slopes, self._problem = slopes, problem
        self._lead = tensors[problem.inner[0]].shape[: len(problem.own_axes)]
        self._tensors, self._shared = _expanded(problem, tensors, self._lead)
        self.here = slopes(self._tensors)
        self.step = self._step(problem.inner)

    @property
    def of_gradient(self) -> Step:
        """The step of differences of gradients."""
        return self.step

    def taken(self) -> Slopes:
        """Hand over the first derivatives there, and keep none of their memory."""
        here, self.here = self.here, self.here._replace(inner=[], outer=[])
        return here

    def measure(self, v: Parts, *, looks: bool) -> Tensor:
        """Measure the relative error of a product along `v`, and choose the step by it."""
        return self.step.measure(self._measured, v, looks=looks)

    def product(self, v: Parts, create_graph: bool = False) -> Parts:
        """Form ``A v``."""
        return self._product(v, self.step.reach)

    def hessian(self, v: Parts, create_graph: bool = False) -> Parts:
        """Form the product with the Hessian, where A is another matrix."""
        return self._along(self._problem.inner, v, self.of_gradient.reach)[0]

    def cross(self, u: Parts, create_graph: bool = False) -> Parts:
        """Form ``(dF/dargs)^T u``."""
        return self._along(self._problem.inner, u, self.of_gradient.reach, outer=True)[1]

    def again(self, u: Parts, *, looks: bool) -> tuple[Parts, Parts]:
        """Form ``A u`` and ``(dF/dargs)^T u`` with other steps; `looks`: the host may look."""

        def form(v: Parts, reach: Tensor) -> Sequence[Parts]:
            return self._of_tasks(self._problem.inner, v, reach, outer=True)

        image, crossed = self._doubted(form, u, self.of_gradient.reach, looks=looks)
        return image, self._summed(crossed)

    def _doubted(self, form: Images, u: Parts, reach: Tensor, *, looks: bool) -> Sequence[Parts]:
        """Form differences along `u` with steps twice as long as `reach`, and with short ones."""
        # A step in proportion to all variables may be far longer than a leaf of other units. Beyond
        # what bends there two long steps agree on a wrong product. Where two short ones agree on
        # another one, better than they differ from the long one, they are believed.
        doubled = form(u, 2 * reach)
        moved_far = self._moved_far(u, reach) if looks else None
        if moved_far is None:
            return doubled
        alone, long, short = moved_far
        far, near, twice = (form(alone, step) for step in (long, short, 2 * short))
        lead, answers = reach.shape, []
        for answer, a, b, c in zip(doubled, far, near, twice, strict=True):
            if all(part is None for part in b):
                answers.append(answer)
                continue
            gap = minus(b, a)
            sure = lengths(gap, lead) > _SURE * lengths(minus(b, c), lead)
            answers.append(minus(answer, minus([None] * len(b), gap, sure.to(long.dtype))))
        return answers

    def _moved_far(self, u: Parts, reach: Tensor) -> tuple[Parts, Tensor, Tensor] | None:
        """Find the leaves that a step along `u` moves far for their size.

        Returns
        -------
        alone, long, short : tuple or None
            `u` in these leaves alone, as far as the step moves them, and how far they should be
            moved at most; None where no leaf is moved far, or that is not known.
        """
        if self._problem.layout().space is not None:
            return None
        lead, bound = reach.shape, torch.finfo(self._slopes.narrowest).eps ** (1 / 6)
        whole = _positive(lengths(u, lead))
        alone: list[Tensor | None] = []
        shares = []
        for place, part in zip(self._problem.inner, u, strict=True):
            size = None if part is None else lengths([self._tensors[place]], lead)
            if part is None or size is None:
                alone.append(None)
                continue
            moves = reach * lengths([part], lead) / whole
            share = torch.where((size > 0) & torch.isfinite(moves), moves / _positive(size), 0.0)
            share = torch.where(share > _APART * bound, share, 0.0)
            some = any_task(share > 0)
            alone.append(torch.where(wide(share > 0, part), part, 0.0) if some else None)
            shares.append(share)
        if all(part is None for part in alone):
            return None
        most = torch.stack(shares).amax(dim=0)
        long = reach * lengths(alone, lead) / whole
        long = torch.where(most > 0, long, reach)
        return alone, long, long * torch.where(most > 0, bound / _positive(most), 1.0)

    def cross_forward(self, tangents: Parts, create_graph: bool = False) -> Parts:
        """Form ``(dF/dargs) tangents``, with a step of its own that is measured along them."""
        outer, tangents = self._problem.outer, list(tangents)
        for i, dims in enumerate(self._shared):
            for dim in dims:
                tangent = tangents[i]
                assert tangent is not None
                tangents[i] = _one_for_each(tangent, dim, self._lead)

        def images(v: Parts, reach: Tensor) -> Sequence[Parts]:
            return [self._along(outer, v, reach)[0]]

        step = self._step(outer)
        step.measure(images, tangents, looks=True)
        return images(tangents, step.reach)[0]

    def _step(self, places: Sequence[int]) -> Step:
        return Step(lengths([self._tensors[i] for i in places], self._lead), self._slopes.narrowest)

    def _product(self, v: Parts, reach: Tensor) -> Parts:
        return self._along(self._problem.inner, v, reach)[0]

    def _measured(self, v: Parts, reach: Tensor) -> Sequence[Parts]:
        """Form what the step is chosen for: both products that are made with it."""
        return self._of_tasks(self._problem.inner, v, reach, outer=True)

    def _along(
        self, places: Sequence[int], v: Parts, reach: Tensor, *, outer: bool = False
    ) -> tuple[Parts, Parts]:
        """Difference both gradients along leaves in some places."""
        inner, of_tasks = self._of_tasks(places, v, reach, outer=outer)
        return inner, self._summed(of_tasks)

    def _summed(self, of_tasks: Parts) -> Parts:
        """Add up the parts of the tasks, where they share an argument."""
        return [
            part.sum(dim=dims) if part is not None and dims else part
            for part, dims in zip(of_tasks, self._shared, strict=False)
        ]

    def _of_tasks(
        self, places: Sequence[int], v: Parts, reach: Tensor, *, outer: bool
    ) -> tuple[Parts, Parts]:
        """Do so with a part for each task of the arguments that tasks share."""
        h, over = per_length(v, reach)
        ahead, behind = (
            self._slopes(moved(self._tensors, places, v, sign * h), outer=outer) for sign in (1, -1)
        )
        return spent(ahead.inner, behind.inner, over), spent(ahead.outer, behind.outer, over)


def per_length(v: Parts, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Say by which multiples h of leaves to move as far as `reach`, and ``1 / 2h``.

    Along zero there is nothing to move, and the derivative is zero; along NaN it is NaN.

    Parameters
    ----------
    v : sequence of Tensor
        The leaves.
    reach : Tensor
        How far, for each task.

    Returns
    -------
    h, over : Tensor
        The multiple, and half its inverse, for each task.
    """
    length = lengths(v, reach.shape)
    some = torch.isfinite(length) & (length > 0)
    nothing = torch.where(length == 0, 0.0, math.nan)
    length = torch.where(some, length, 1.0)
    return torch.where(some, reach / length, 0.0), torch.where(some, length / (2 * reach), nothing)


def own_arguments(problem: Problem) -> Problem:
    """Pose a problem in which each task has differentiated arguments of its own.

    The step differs from task to task, so that their gradients cannot be summed before.

    Parameters
    ----------
    problem : Problem
        In which tasks may share arguments.

    Returns
    -------
    problem : Problem
        Whose tensors have the task axes in front of every argument that is differentiated.
    """
    axes = []
    for axis in problem.axes:
        dims = list(axis.in_dims)
        for place in () if axis.shared else problem.outer:
            dims[place] = 0
        axes.append(dataclasses.replace(axis, in_dims=tuple(dims)))
    return dataclasses.replace(problem, axes=tuple(axes))


def moved(tensors: Sequence[Tensor], places: Sequence[int], v: Parts, h: Tensor) -> list[Tensor]:
    """Move tensors in some places along leaves, each task by its own multiple."""
    given = list(tensors)
    for place, part in zip(places, v, strict=True):
        if part is not None:
            # In the dtype of the vectors, which may be wider.
            target = given[place].to(h.dtype) + wide(h, part) * part.to(h.dtype)
            given[place] = target.to(tensors[place].dtype)
    return given


def minus(a: Parts, b: Parts, factor: Tensor | None = None) -> Parts:
    """Subtract leaves, and multiply by a number for each task; None stands for zero."""
    difference: list[Tensor | None] = []
    for one, other in zip(a, b, strict=True):
        known = other if one is None else one
        if known is None:
            difference.append(None)
            continue
        dtype = known.dtype if factor is None else factor.dtype
        zero = torch.zeros_like(known) if one is None or other is None else None
        left, right = (zero if t is None else t for t in (one, other))
        assert left is not None
        assert right is not None
        part = left.to(dtype) - right.to(dtype)
        difference.append(part if factor is None else part * wide(factor, part))
    return difference


def spent(a: list[Tensor | None], b: list[Tensor | None], factor: Tensor) -> list[Tensor | None]:
    """Form `minus` in the memory of the two, which are emptied as far as they are used."""
    difference: list[Tensor | None] = []
    for i in range(len(a)):
        difference += minus([a[i]], [b[i]], factor)
        a[i] = b[i] = None
    return difference


def lengths(parts: Parts, lead: Sequence[int]) -> Tensor:
    """Measure the norm of leaves together, for each task."""
    present = [part for part in parts if part is not None]
    assert present
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in present) else torch.float32
    rows = [p.reshape(*lead, -1) if p.numel() else p.new_zeros(*lead, 0) for p in present]
    return norm(torch.stack([norm(row.to(dtype)).to(rows[0].device) for row in rows], dim=-1))


def _positive(size: Tensor) -> Tensor:
    return torch.where(size > 0, size, 1.0)


def wide(numbers: Tensor, part: Tensor) -> Tensor:
    """Shape a number for each task so that it multiplies leaves."""
    return numbers[(..., *[None] * (part.ndim - numbers.ndim))].to(part.device)


def _expanded(
    problem: Problem, tensors: Sequence[Tensor], lead: Sequence[int]
) -> tuple[list[Tensor], list[list[int]]]:
    """Give each task the arguments that tasks share, with the dimensions that this adds."""
    given, added = list(tensors), []
    for place in problem.outer:
        axes = enumerate(problem.own_axes)
        dims = [i for i, axis in axes if axis.in_dims[place] is None]
        for dim in dims:
            given[place] = _one_for_each(given[place], dim, lead)
        added.append(dims)
    return given, added


def _one_for_each(tensor: Tensor, dim: int, lead: Sequence[int]) -> Tensor:
    return tensor.unsqueeze(dim).expand(*tensor.shape[:dim], lead[dim], *tensor.shape[dim:])
