"""Projections onto the matrices of given sums of rows and columns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._autograd.search import search
from .._errors import NotConverged, StructureMismatch
from ..prox import as_floating
from ._arguments import described, widest

_STEPS = 500
_ORDERS = 3  # of derivatives that are right
_SHARP = 20.0  # the spread of logarithms up to which a problem is solved at once
_FAIR = 1e-3  # how far the sums of rows and columns may differ, in float32; 1e-5 in float64


def transport(v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Project onto the transport polytope: x >= 0 with given sums of rows and of columns.

    The dual problem is solved by Newton's method, to rounding.

    Parameters
    ----------
    v : Tensor
        ``(m, n)``, what is projected.
    rows, columns : Tensor
        ``(m,)`` and ``(n,)``, not negative: the sums. Their own sums are equal; differences from
        rounding are evened out.

    Returns
    -------
    x : Tensor
        ``(m, n)``.

    References
    ----------
    Blondel, Seguy and Rolet, Smooth and sparse optimal transport, 2018; Li, Sun and Toh, On the
    efficient computation of a generalized Jacobian of the projector over the Birkhoff polytope,
    2020.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> v, half = torch.tensor([[0.4, 0.0], [0.1, 0.3]]), torch.tensor([0.5, 0.5])
    >>> projections.transport(v, half, half)
    tensor([[0.4000, 0.1000],
            [0.1000, 0.4000]])
    """
    v, wide, a, b = _arguments(v, rows, columns)
    if not wide.numel():
        return v
    raised, support, inverse = search(_euclidean, wide, a, b)
    # From a solution that is right to rounding on, the formula of the piece has small numbers.
    near = torch.where(support, wide + raised, 0.0)
    missed = torch.cat([a - near.sum(dim=1), b - near.sum(dim=0)])
    step = inverse @ missed
    x = near + step[: len(a), None] + step[len(a) :]
    return torch.where(support & ~(x <= 0), x, 0.0).to(v.dtype)


def birkhoff(v: Tensor) -> Tensor:
    """Project onto the Birkhoff polytope: x >= 0 with rows and columns that sum to 1.

    Parameters
    ----------
    v : Tensor
        ``(n, n)``, what is projected.

    Returns
    -------
    x : Tensor
        ``(n, n)``.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> projections.birkhoff(torch.tensor([[0.8, 0.2], [0.4, 0.6]]))
    tensor([[0.7000, 0.3000],
            [0.3000, 0.7000]])
    """
    return transport(v, *_ones(v))


def kl_transport(v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Project ``exp(v)`` onto the transport polytope, by Kullback and Leibler.

    It is ``exp(v + f + g)`` with an f for each row and a g for each column: entropic optimal
    transport of the costs ``-v``. The dual problem is solved by Newton's method, to rounding, with
    first, second and third derivatives.

    Parameters
    ----------
    v : Tensor
        ``(m, n)``, the logarithm of what is projected; minus infinity stands for 0.
    rows, columns : Tensor
        ``(m,)`` and ``(n,)``, not negative: the sums. Their own sums are equal; differences from
        rounding are evened out.

    Returns
    -------
    x : Tensor
        ``(m, n)``.

    References
    ----------
    Cuturi, Sinkhorn distances: lightspeed computation of optimal transport, 2013; Brauer et al., A
    Sinkhorn-Newton method for entropic optimal transport, 2017.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> v, half = torch.tensor([[4.0, 1.0], [1.0, 4.0]]).log(), torch.tensor([0.5, 0.5])
    >>> projections.kl_transport(v, half, half)
    tensor([[0.4000, 0.1000],
            [0.1000, 0.4000]])
    """
    v, wide, a, b = _arguments(v, rows, columns)
    if not wide.numel():
        return v
    f, g, inverse = search(_entropic, wide, a, b)
    there = torch.isfinite(wide) & (a > 0)[:, None] & (b > 0)
    log_a, log_b = (torch.where(t > 0, t, 1.0).log() for t in (a, b))
    used = [there.any(dim=1), there.any(dim=0)]
    logits = torch.where(there, wide, 0.0)

    def plan(f: Tensor, g: Tensor) -> Tensor:
        shifted = torch.where(there, logits + f[:, None] + g, 0.0)
        return torch.where(there, shifted.exp(), 0.0)

    # Newton's method with a constant matrix gains an order of the derivatives at each step.
    m = len(a)
    for _ in range(_ORDERS):
        x = plan(f, g)
        missed = [
            torch.where(u, torch.where(u, s, 1.0).log() - t, 0.0)
            for u, s, t in zip(used, (x.sum(dim=1), x.sum(dim=0)), (log_a, log_b), strict=True)
        ]
        step = inverse @ torch.cat(missed)
        f, g = f - step[:m], g - step[m:]
    return plan(f, g).to(v.dtype)


def kl_birkhoff(v: Tensor) -> Tensor:
    """Project ``exp(v)`` onto the Birkhoff polytope, by Kullback and Leibler.

    Parameters
    ----------
    v : Tensor
        ``(n, n)``, the logarithm of what is projected.

    Returns
    -------
    x : Tensor
        ``(n, n)``, with rows and columns that sum to 1.

    References
    ----------
    Sinkhorn, A relationship between arbitrary positive matrices and doubly stochastic matrices,
    1964.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> projections.kl_birkhoff(torch.tensor([[4.0, 1.0], [1.0, 4.0]]).log())
    tensor([[0.8000, 0.2000],
            [0.2000, 0.8000]])
    """
    return kl_transport(v, *_ones(v))


def _ones(v: Tensor) -> tuple[Tensor, Tensor]:
    v = as_floating("v", v)
    if v.ndim != 2 or v.shape[0] != v.shape[1]:
        raise StructureMismatch(
            f"v must be a square matrix; it has the shape {tuple(v.shape)}.", argument="v"
        )
    one = torch.ones(len(v), dtype=v.dtype, device=v.device)
    return one, one


def _arguments(v: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take `v` as it came and with more digits, and the sums, with their own sums made equal."""
    v = as_floating("v", v)
    if v.ndim != 2:
        raise StructureMismatch(
            f"v must be a matrix; it has the shape {tuple(v.shape)}.", argument="v"
        )
    wide = widest(v)
    a = described("rows", rows, (v.shape[0],), wide)
    b = described("columns", columns, (v.shape[1],), wide)
    fair = _FAIR if torch.finfo(v.dtype).eps > 1e-10 else 1e-5
    totals = a.sum(), b.sum()

    def check(a: Tensor, b: Tensor) -> tuple[Tensor]:
        for name, sums in (("rows", a), ("columns", b)):
            if bool((sums < 0).any()):
                raise ValueError(f"{name} must not be negative: the set is empty.")
        first, second = a.sum(dim=-1), b.sum(dim=-1)
        apart = (first - second).abs() > fair * torch.maximum(first, second)
        if bool(apart.any()):
            i = int(apart.nonzero()[0, 0])
            raise ValueError(
                f"rows sum to {float(first[i]):.6g} and columns to {float(second[i]):.6g}: the "
                "set is empty. Divide each by its sum."
            )
        return (first,)

    search(check, a, b)
    mean = (totals[0] + totals[1]) / 2
    a, b = (
        sums * torch.where(total > 0, mean, 1.0) / torch.where(total > 0, total, 1.0)
        for sums, total in zip((a, b), totals, strict=True)
    )
    return v, wide, a, b


def _of_each(one: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Search task by task, with a search for one task."""

    def find(*tensors: Tensor) -> tuple[Tensor, ...]:
        results = [one(*task) for task in zip(*tensors, strict=True)]
        return tuple(torch.stack(of_all) for of_all in zip(*results, strict=True))

    return find


@_of_each
def _euclidean(v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the matrix to add to `v`, where the sum is positive, and the multipliers' system there.

    The dual function of the multipliers is piecewise quadratic: Newton's method with an exact
    line search ends on the right piece.

    Returns
    -------
    raised : Tensor
        ``(m, n)``, what is added.
    support : Tensor
        ``(m, n)``, bool.
    inverse : Tensor
        ``(m + n, m + n)``, of the system.

    Raises
    ------
    NotConverged
        If the sums are not reached.
    """
    m, eps = len(a), torch.finfo(v.dtype).eps
    if not bool(torch.isfinite(v).all()):
        nan = torch.full_like(v, torch.nan)
        return nan, torch.ones_like(v, dtype=torch.bool), nan.new_zeros(sum(v.shape), sum(v.shape))
    f, g = -v.amax(dim=1) + a / v.shape[1], torch.zeros_like(b)
    target = torch.cat([a, b])
    rounding = 8 * eps * (float(a.max()) + float((v + f[:, None]).abs().max()))
    best, least, idle = (f, g), float("inf"), 0
    for _ in range(_STEPS):
        raised = v + f[:, None] + g
        x = torch.relu(raised)
        missed = torch.cat([x.sum(dim=1), x.sum(dim=0)]) - target
        size = float(missed.abs().max())
        if size < least:
            best, least, idle = (f, g), size, 0 if size < 0.9 * least else idle + 1
        else:
            idle += 1
        if size == 0 or (size <= rounding * max(v.shape) and idle > 2) or idle > 50:
            break
        system = _laplacian(x > 0)
        ridge = min(1e-3, size / float(a.max().clamp(min=1e-300))) * 1e-3 + 1e-12
        system.diagonal().add_(ridge * max(v.shape))
        step = -torch.linalg.solve(system, missed)
        along = step[:m, None] + step[m:]
        length = _line(raised, along, float(target.dot(step)))
        f, g = f + length * step[:m], g + length * step[m:]
    if not least <= 1e-7 * (float(a.max()) + rounding / eps * 1e-6):
        raise NotConverged("transport: Newton's method did not reach the sums of rows and columns.")
    f, g = best
    raised = f[:, None] + g
    support = v + raised > rounding
    return raised, support, torch.linalg.inv(_laplacian(support) + _grounded(support))


def _line(raised: Tensor, along: Tensor, falls: float) -> float:
    """Find the length of a step at which a piecewise quadratic function of it is least."""

    def slope(t: float) -> float:
        return float((torch.relu(raised + t * along) * along).sum()) - falls

    start = slope(0.0)
    low, high, at_low, at_high = 0.0, 1.0, start, slope(1.0)
    for _ in range(60):
        if at_high >= 0:
            break
        low, at_low, high = high, at_high, 2 * high
        at_high = slope(high)
    for _ in range(60):
        if abs(at_high) <= 1e-12 * abs(start) or high - low <= 1e-15 * high:
            return high
        rise = at_high - at_low
        middle = low - at_low * (high - low) / rise if rise > 0 else low
        if not low < middle < high:
            middle = (low + high) / 2
        at_middle = slope(middle)
        if abs(at_middle) <= 1e-12 * abs(start):
            return middle
        # The end that stays counts half, lest it stay for ever.
        if at_middle < 0:
            low, at_low, at_high = middle, at_middle, at_high / 2
        else:
            high, at_high, at_low = middle, at_middle, at_low / 2
    return (low + high) / 2


def _laplacian(support: Tensor) -> Tensor:
    """Form the derivative of the sums of rows and columns by what is added to each."""
    on, m = widest(support), len(support)
    system = on.new_zeros(sum(on.shape), sum(on.shape))
    system[:m, m:], system[m:, :m] = on, on.mT
    system.diagonal().copy_(torch.cat([on.sum(dim=1), on.sum(dim=0)]))
    return system


def _grounded(support: Tensor) -> Tensor:
    """Make the system regular: in each connected part a constant may move from f to g."""
    m, n = support.shape
    labels = torch.arange(m + n, device=support.device)
    for _ in range(m + n):
        there = torch.where(support, labels[m:], m + n).amin(dim=1) if n else labels[:m]
        rows = torch.minimum(labels[:m], there)
        back = torch.where(support, rows[:, None], m + n).amin(dim=0) if m else labels[m:]
        new = torch.cat([rows, torch.minimum(labels[m:], back)])
        if torch.equal(new, labels):
            break
        labels = new
    sign = torch.cat([labels.new_ones(m), -labels.new_ones(n)])
    same = labels[:, None] == labels
    count = same.sum(dim=1, keepdim=True)
    return widest(same * (sign[:, None] * sign) / count)


@_of_each
def _entropic(v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find what to add to the logarithms of rows and columns, and the inverse of their system.

    Returns
    -------
    f, g : Tensor
        ``(m,)`` and ``(n,)``, what is added.
    inverse : Tensor
        ``(m + n, m + n)``, of the system.

    Raises
    ------
    ValueError
        If a row or a column has no finite entry and a sum that is not 0.
    NotConverged
        If the sums are not reached.
    """
    there = torch.isfinite(v) & (a > 0)[:, None] & (b > 0)
    if torch.isnan(v).any():
        nan = torch.full_like
        return nan(a, torch.nan), nan(b, torch.nan), _grounded(there)  # of the right shape
    on, off = there.any(dim=1), there.any(dim=0)
    if bool((on != (a > 0)).any() or (off != (b > 0)).any()):
        raise ValueError("v is minus infinity throughout a row or a column whose sum is not 0.")
    logits = torch.where(there, v, -torch.inf)
    log_a, log_b = torch.where(on, a, 1.0).log(), torch.where(off, b, 1.0).log()
    known = torch.where(there, v, 0.0)
    spread = float(known.max() - known.min())
    # Sharp problems are met by way of blunter ones, each from the solution of the one before.
    blunt, f = 1.0, torch.zeros_like(a)
    while blunt * spread > _SHARP:
        blunt /= 2
    while True:
        problem = _SemiDual(blunt * logits, log_a, log_b, on, off)
        f, missed = problem.solve(f)
        if blunt == 1:
            break
        blunt, f = 2 * blunt, 2 * f
    if not missed < 1e-6:
        raise NotConverged(
            "kl_transport: the sums of rows and columns were not reached. v spans too many orders "
            "of magnitude, or its entries of minus infinity leave no solution."
        )
    g = problem.columns(f)
    x = problem.plan(f)
    m, n = x.shape
    jacobian = torch.eye(m + n, dtype=x.dtype, device=x.device)
    jacobian[:m, m:] = x / torch.where(on, x.sum(dim=1), 1.0)[:, None]
    jacobian[m:, :m] = (x / torch.where(off, x.sum(dim=0), 1.0)).mT
    return f, g, torch.linalg.inv(jacobian + _grounded(there))


class _SemiDual:
    """The dual problem in the multipliers f of the rows; those of the columns follow from f."""

    def __init__(
        self, logits: Tensor, log_a: Tensor, log_b: Tensor, on: Tensor, off: Tensor
    ) -> None:
        self.logits, self.there = logits, torch.isfinite(logits)
        self.log_a, self.log_b, self.on, self.off = log_a, log_b, on, off
        self.a, self.b = torch.where(on, log_a.exp(), 0.0), torch.where(off, log_b.exp(), 0.0)

    def columns(self, f: Tensor) -> Tensor:
        """Find what to add to the columns, so that they have their sums."""
        sums = torch.logsumexp(self.logits + f[:, None], dim=0)
        return torch.where(self.off, self.log_b - sums, 0.0)

    def rows(self, g: Tensor) -> Tensor:
        """Find what to add to the rows, so that they have their sums."""
        return torch.where(self.on, self.log_a - torch.logsumexp(self.logits + g, dim=1), 0.0)

    def plan(self, f: Tensor) -> Tensor:
        """Form the matrix whose columns have their sums."""
        x = (self.logits + f[:, None] + self.columns(f)).exp()
        return torch.where(self.there, x, 0.0)

    def value(self, f: Tensor) -> float:
        """Evaluate the convex function that is minimised."""
        return float(-(self.b * self.columns(f)).sum() - (self.a * f).sum())

    def solve(self, f: Tensor) -> tuple[Tensor, float]:
        """Find the multipliers, and how much the sums of rows still miss, relatively."""
        for _ in range(10):
            f = self.rows(self.columns(f))
        best, least, idle = f, float("inf"), 0
        for _ in range(_STEPS):
            x = self.plan(f)
            sums = x.sum(dim=1)
            missed = torch.where(self.on, sums / torch.where(self.on, self.a, 1.0) - 1, 0.0)
            size = float(missed.abs().max())
            idle = 0 if size < 0.9 * least else idle + 1
            if size < least:
                best, least = f, size
            if size == 0 or (idle > 3 and least < 1e-12) or idle > 50:
                break
            f = self._stepped(f, x, sums, missed * self.a)
        return best, least

    def _stepped(self, f: Tensor, x: Tensor, sums: Tensor, slopes: Tensor) -> Tensor:
        # Scaled by the sums of rows, so that small ones count as much.
        root = torch.where(self.on, sums, 1.0).sqrt()
        spread = x / torch.where(self.off, self.b, 1.0).sqrt() / root[:, None]
        system = torch.diag(1 + 1e-14 * torch.ones_like(f)) - spread @ spread.mT
        step = torch.linalg.solve(system + _constants(self.there, root), -slopes / root)
        step, before = torch.where(self.on, step / root, 0.0), self.value(f)
        slope, length = float((slopes * step).sum()), 1.0
        size = abs(before) + float((self.a * f.abs()).sum())
        noise = 16 * torch.finfo(f.dtype).eps * size
        while length > 1e-10 and not (
            self.value(f + length * step) <= before + 1e-4 * length * slope + noise
        ):
            length /= 2
        return f + length * step


def _constants(there: Tensor, root: Tensor) -> Tensor:
    """Form the constants of connected parts, in the scaled variables, where the system has none."""
    m = len(root)
    same = _grounded(there)[:m, :m] != 0
    weight = torch.where(same, root[:, None] * root, 0.0)
    return weight / torch.where(same, root.square(), 0.0).sum(dim=1, keepdim=True)
