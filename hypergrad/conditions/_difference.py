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
    from ._first_derivatives import FirstDerivatives
    from ._inner_problem import Problem

_ROUNDS = 3  # of measuring a step
_NEAR = 3.0  # a step that is within this factor of the best one is not measured again
_FAR = 32.0  # the largest factor by which a round corrects a step

#: A difference ``(v, reach) -> parts`` along leaves v, which moves each task as far as `reach`.
Image = Callable[[Parts, Tensor], Parts]


class Step:
    """The length of the displacement that a central difference is made with, for each task.

    It begins at ``eps^(1/3) scale``, the best for a function whose size and third derivative are of
    the order of one, and is then corrected by what three differences show: the error of a central
    difference is ``t h^2 + n / h``, with the bend t of the function and the noise n of its
    arithmetic.

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
    noise : Tensor
        The relative error of a difference, as measured: NaN before it is.

    References
    ----------
    Gill, Murray, Saunders and Wright, Computing forward-difference intervals for numerical
    optimization, 1983; Pearlmutter, Fast exact multiplication by the Hessian, 1994, section 1.
    """

    def __init__(self, scale: Tensor, dtype: torch.dtype) -> None:
        some = torch.isfinite(scale) & (scale > 0)
        self._eps = torch.finfo(dtype).eps
        self.reach = self._eps ** (1 / 3) * torch.where(some, scale, torch.ones_like(scale))
        self.noise = torch.full_like(scale, math.nan)

    def measure(self, image: Image, v: Parts, *, looks: bool) -> Tensor:
        """Measure the error of a difference along `v`, and correct the step by it.

        Parameters
        ----------
        image : callable
            The difference.
        v : sequence of Tensor
            Along what.
        looks : bool
            Whether the host may look: then a step that was far off is measured again.

        Returns
        -------
        noise : Tensor
            The relative error, for each task, between one rounding and one.
        """
        lead = self.reach.shape
        for _ in range(_ROUNDS if looks else 1):
            reach = self.reach
            smaller, here, larger = (image(v, factor * reach) for factor in (0.5, 1.0, 2.0))
            below, above = lengths(minus(here, smaller), lead), lengths(minus(larger, here), lead)
            # below^2 = (3/4 t)^2 + 5 n^2 and above^2 = (3 t)^2 + 5/4 n^2.
            noise = ((16 * below.square() - above.square()) / 78.75).clamp(min=0).sqrt()
            bend = ((above.square() - 1.25 * noise.square()) / 9).clamp(min=0).sqrt()
            best = (noise / (2 * bend)) ** (1 / 3)
            best = best.nan_to_num(1.0, posinf=_FAR).clamp(1 / _FAR, _FAR)
            error = bend * best.square() + noise / best
            self.reach = reach * best
            if looks and not any_task((best > _NEAR) | (best < 1 / _NEAR)):
                break
        size = lengths(here, lead)
        relative = torch.where(size > 0, error / size, (error > 0).to(error))
        self.noise = relative.nan_to_num(1.0).clamp(self._eps, 1.0)
        return self.noise


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
        The first derivatives there.
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

    def measure(self, v: Parts, *, looks: bool) -> Tensor:
        """Measure the relative error of a product along `v`, and choose the step by it."""
        return self.step.measure(self._product, v, looks=looks)

    def product(self, v: Parts, create_graph: bool = False) -> Parts:
        """Form ``A v``."""
        return self._product(v, self.step.reach)

    def hessian(self, v: Parts, create_graph: bool = False) -> Parts:
        """Form the product with the Hessian, where A is another matrix."""
        return self._along(self._problem.inner, v, self.of_gradient.reach)[0]

    def cross(self, u: Parts, create_graph: bool = False) -> Parts:
        """Form ``(dF/dargs)^T u``."""
        return self._along(self._problem.inner, u, self.of_gradient.reach, outer=True)[1]

    def again(self, u: Parts) -> tuple[Parts, Parts]:
        """Form ``A u`` and ``(dF/dargs)^T u`` with steps that are twice as long."""
        return self._along(self._problem.inner, u, 2 * self.of_gradient.reach, outer=True)

    def cross_forward(self, tangents: Parts, create_graph: bool = False) -> Parts:
        """Form ``(dF/dargs) tangents``, with a step of its own that is measured along them."""
        outer, tangents = self._problem.outer, list(tangents)
        for i, dims in enumerate(self._shared):
            for dim in dims:
                tangent = tangents[i]
                assert tangent is not None
                tangents[i] = _one_for_each(tangent, dim, self._lead)

        def image(v: Parts, reach: Tensor) -> Parts:
            return self._along(outer, v, reach)[0]

        step = self._step(outer)
        step.measure(image, tangents, looks=True)
        return image(tangents, step.reach)

    def _step(self, places: Sequence[int]) -> Step:
        return Step(lengths([self._tensors[i] for i in places], self._lead), self._slopes.narrowest)

    def _product(self, v: Parts, reach: Tensor) -> Parts:
        return self._along(self._problem.inner, v, reach)[0]

    def _along(
        self, places: Sequence[int], v: Parts, reach: Tensor, *, outer: bool = False
    ) -> tuple[Parts, Parts]:
        """Difference both gradients along leaves in some places."""
        h, over = per_length(v, reach)
        ahead, behind = (
            self._slopes(moved(self._tensors, places, v, sign * h), outer=outer) for sign in (1, -1)
        )
        inner = minus(ahead.inner, behind.inner, over)
        crossed = list(minus(ahead.outer, behind.outer, over))
        for i, part in enumerate(crossed):
            if part is not None and self._shared[i]:
                crossed[i] = part.sum(dim=self._shared[i])
        return inner, crossed


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


def lengths(parts: Parts, lead: Sequence[int]) -> Tensor:
    """Measure the norm of leaves together, for each task."""
    present = [part for part in parts if part is not None]
    assert present
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in present) else torch.float32
    rows = [p.reshape(*lead, -1) if p.numel() else p.new_zeros(*lead, 0) for p in present]
    return norm(torch.stack([norm(row.to(dtype)).to(rows[0].device) for row in rows], dim=-1))


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
