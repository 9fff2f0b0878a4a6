"""Numerical derivatives along directions, with an estimate of their own error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._pytrees import Tree

_LEVELS = 6
_FEW = 12
_TOGETHER = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Direction:
    """A direction of unit length in the variables of an argument.

    Attributes
    ----------
    label : str
        Its name, for people.
    leaf : str
        The leaf that it moves; empty where it moves all of them.
    tangents : list of Tensor
        One for each variable.
    length : float
        How far the variables reach along it: the scale of a step.
    """

    label: str
    leaf: str
    tangents: list[Tensor]
    length: float

    def dot(
        self,
        gradient: Sequence[Tensor | None],
        of_each: Callable[[Tensor], Tensor] = torch.as_tensor,
    ) -> float:
        """Add up the entries of a gradient times the direction; None stands for zeros."""
        return sum(
            float(of_each(d.to(torch.float64) * g.detach().to(torch.float64)).sum())
            for d, g in zip(self.tangents, gradient, strict=True)
            if g is not None
        )

    def moved(self, variables: Sequence[Tensor], step: float) -> list[Tensor]:
        """Copy the variables to a step away."""
        return [
            (v.detach().to(torch.float64) + step * d.to(torch.float64)).to(v.dtype)
            for v, d in zip(variables, self.tangents, strict=True)
        ]


def directions(tree: Tree) -> list[Direction]:
    """Choose every coordinate where there are few; else one in each leaf, and some in all."""
    generator = torch.Generator().manual_seed(0)
    variables = [v.detach() for v in tree.variables]
    scales = [_scale(v) for v in variables]
    names = [tree.variable_path(i) for i in range(len(variables))]
    lines = []

    def zeros() -> list[Tensor]:
        return [torch.zeros_like(v, memory_format=torch.contiguous_format) for v in variables]

    def random(places: Sequence[int], label: str, leaf: str) -> Direction:
        tangents = zeros()
        for i in places:
            normal = torch.randn(variables[i].shape, generator=generator, dtype=torch.float64)
            tangents[i] = scales[i] * normal.to(variables[i].device)
        length = math.sqrt(sum(float(t.to(torch.float64).square().sum()) for t in tangents))
        return Direction(label, leaf, [t / length for t in tangents], length)

    if sum(v.numel() for v in variables) <= _FEW:
        for i, v in enumerate(variables):
            for entry in range(v.numel()):
                tangents = zeros()
                tangents[i].view(-1)[entry] = 1.0
                label = names[i] + _place(entry, v.shape)
                length = float(scales[i].reshape(-1)[entry])
                lines.append(Direction(label, names[i], tangents, length))
        return lines
    present = [i for i, v in enumerate(variables) if v.numel()]
    for i in present[:_FEW]:
        lines.append(random([i], f"{names[i]}, a random direction", names[i]))
    if len(present) > 1:
        for _ in range(_TOGETHER):
            lines.append(random(present, f"all of {tree.name}, a random direction", ""))
    return lines


def _place(entry: int, shape: Sequence[int]) -> str:
    """Write the index of an entry."""
    index: list[int] = []
    for size in reversed(shape):
        entry, k = divmod(entry, size)
        index.insert(0, k)
    return str(index) if index else ""


def _scale(variable: Tensor) -> Tensor:
    """Size up each entry: no less than a tenth of the leaf's size, and 1 where all is zero."""
    size = variable.to(torch.float64).abs()
    typical = float(size.square().mean().sqrt()) if size.numel() else 0.0
    return size.clamp(min=0.1 * typical) if typical > 0 else torch.ones_like(size)


def derivative(
    value: Callable[[float], float],
    length: float,
    precision: torch.dtype,
    rtol: float,
    least: float = 0.0,
) -> tuple[float, float]:
    """Differentiate at 0 by central differences, extrapolated over halved steps.

    Parameters
    ----------
    value : callable
        The function.
    length : float
        The scale of its argument.
    precision : torch.dtype
        The precision to which its values are computed.
    rtol : float
        The relative error at which to stop halving the step.
    least : float
        A derivative smaller than this counts as this in the relative error.

    Returns
    -------
    slope : float
        The derivative; NaN where the function was nowhere finite.
    error : float
        An estimate of its error; infinite where there is none.

    References
    ----------
    Ridders, Accurate computation of F'(x) and F'(x) F''(x), 1982.
    """
    eps = torch.finfo(precision).eps
    slope, error = math.nan, math.inf
    before: list[float] = []
    for level in range(_LEVELS):
        step = first_step(precision) * length / 2**level
        up, down = value(step), value(-step)
        noise = eps * max(abs(up), abs(down)) / step
        row = [(up - down) / (2 * step)]
        for k, previous in enumerate(before):
            row.append((4 ** (k + 1) * row[k] - previous) / (4 ** (k + 1) - 1))
            estimate = max(abs(row[-1] - row[k]), abs(row[-1] - previous)) + noise
            if estimate < error:
                slope, error = row[-1], estimate
        if error <= rtol * max(abs(slope), least):
            break
        before = row
    return slope, error


def first_step(precision: torch.dtype) -> float:
    """Say how large the largest step is, in units of the argument's scale."""
    if precision == torch.float64:
        return 4e-3
    return 0.1 if precision == torch.float32 else 0.5
