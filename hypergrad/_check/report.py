"""A gradcheck for bi-level problems, and the report that it gives."""

from __future__ import annotations

import dataclasses
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd.random_numbers import unnoticed
from .._autograd.transforms import transforms_active
from .._errors import (
    ConvergenceWarning,
    StructureMismatch,
    UnsupportedOperation,
)
from .._implicit.signatures import Hparams, Inner, Objective, Params
from .._info import SolveInfo
from .._mistakes import explained
from .._pytrees import Tree
from ..conditions._base import as_condition
from ..conditions._minimum import Minimum
from ..solvers import Solver
from .differences import Direction, derivative, directions
from .parts import Case
from .suspects import Finding, Trial, When, first, hiding, unsymmetric

# How far two derivatives may be apart, and the error of a difference that shows nothing.
_RTOL = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
# The terms of a derivative may cancel, at an optimum of the outer problem: the rest is then
# rounding of the terms, and an error is measured by no less than this part of them.
_CANCELLED = 1e-2
# A leaf that matters less than this part of the one that matters most is measured by the latter.
_LEAST = {torch.float64: 1e-3, torch.float32: 2e-2}
# The differences show nothing there, for the implicit hypergradient or against it.
_UNCHECKED = (
    "loss not deterministic",
    "solve not deterministic",
    "solve not smooth",
    "lost in rounding",
    "not finite",
)
_USELESS = {torch.float64: 1e-2, torch.float32: 0.1}


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """The findings of `check_hypergrad`.

    Attributes
    ----------
    ok : bool
        The implicit hypergradient agrees with the differences.
    blame : str or None
        The part that is at fault, one of ``"hyperparameter not connected"``, ``"params not
        connected"``, ``"inner problem not solved"``, ``"linear system not solved"``, ``"loss not
        deterministic"``, ``"solve not deterministic"``, ``"solve not smooth"``, ``"lost in
        rounding"``, ``"not finite"`` and ``"implicit gradient"``; None where all is well.
    reason : str
        The evidence, where it was seen, and what to try.
    relative_error : float
        Of the implicit hypergradient against the differences, in the leaf where it exceeds the
        tolerance by most; NaN where the check ended before there were any.
    tolerance : float
        What it was compared with: `rtol` and four times the difference's own estimated error.
    labels : tuple of str
        The directions in the hyperparameters along which derivatives were compared.
    implicit, differences, difference_errors : Tensor
        The derivatives along them, and the estimated errors of the differences.
    unrolled : Tensor or None
        The same by differentiating through ``solve``, where that was possible.
    unrolled_error : float
        Its relative error against the differences, or NaN.
    info : SolveInfo or None
        The evidence of the implicit hypergradient.
    notes : tuple of str
        Further remarks.
    question : str or None
        The question about the part at fault whose answer is no; None where all is well.

    Examples
    --------
    >>> import torch, hypergrad
    >>> inner, outer = lambda w, t: ((w - t) ** 2).sum(), lambda w, t: (w**2).sum()
    >>> stopped_early = lambda t: 0.9 * t  # the minimiser is t
    >>> report = hypergrad.check_hypergrad(
    ...     outer, inner, stopped_early, torch.ones(2, dtype=torch.float64)
    ... )
    >>> report.ok, report.blame
    (False, 'inner problem not solved')
    """

    ok: bool
    blame: str | None
    reason: str
    relative_error: float
    tolerance: float
    labels: tuple[str, ...]
    implicit: Tensor
    differences: Tensor
    difference_errors: Tensor
    unrolled: Tensor | None
    unrolled_error: float
    info: SolveInfo | None
    notes: tuple[str, ...]
    question: str | None = None

    def __str__(self) -> str:
        """Write the verdict, the evidence, and the figures."""
        verdict = "ok"
        if not self.ok:
            verdict = f"{'NOT CHECKED' if self.blame in _UNCHECKED else 'WRONG'}, {self.blame}"
        lines = [f"hypergradient: {verdict}"]
        if self.question is not None:
            lines.append(f"{self.question} No:")
        lines += textwrap.wrap(self.reason, 100)
        if self.relative_error == self.relative_error:
            lines.append(
                f"implicit against differences: relative error {self.relative_error:.1e}, "
                f"tolerance {self.tolerance:.1e}"
            )
        if self.unrolled_error == self.unrolled_error:
            lines.append(f"unrolled against differences: relative error {self.unrolled_error:.1e}")
        if self.labels:
            lines += self._table()
        if self.info is not None:
            lines.append(f"linear solve: {self.info}")
        for note in self.notes:
            lines += textwrap.wrap(f"note: {note}", 100, subsequent_indent="  ")
        return "\n".join(lines)

    def _table(self) -> list[str]:
        rows = [["", "implicit", "difference", "its error", "unrolled"]]
        for i, label in enumerate(self.labels):
            unrolled = "-" if self.unrolled is None else f"{float(self.unrolled[i]):.6g}"
            pair = [f"{float(figure[i]):.6g}" for figure in (self.implicit, self.differences)]
            rows.append([label, *pair, f"{float(self.difference_errors[i]):.1e}", unrolled])
        wide = [max(len(row[k]) for row in rows) for k in range(5)]
        return [
            "  " + "  ".join([row[0].ljust(wide[0]), *map(str.rjust, row[1:], wide[1:])])
            for row in rows
        ]


@explained
def check_hypergrad(
    outer: Objective[Params, Hparams],
    inner: Inner[Params, Hparams],
    solve: Callable[[Hparams], Params],
    hparams: Hparams,
    *,
    solver: Solver | None = None,
    rtol: float | None = None,
) -> Report:
    """Compare the implicit hypergradient with differences of the solved problem.

    The derivative of ``outer(solve(hparams), hparams)`` is taken in three ways: by
    `implicit_grad` at ``solve(hparams)``, by central differences, and by differentiating through
    `solve` where that is possible. They are compared along every coordinate of `hparams` where
    there are at most 12, and else along a random direction in each leaf and three in all
    together. Where they disagree, the parts of the problem are tested one by one, and the report
    names the one to blame. Before that each loss is evaluated four times, and 32 times where it
    draws random numbers, to see whether its values are its own.

    `solve` is called four to twelve times a direction, more often below float64 and where something
    is wrong, always with the same random numbers and with copies of `hparams`. Failures are
    reported, neither raised nor warned of; errors of `solve` itself, and arguments of the wrong
    structure, are raised. PyTorch's random number generators are left as they were.

    Parameters
    ----------
    outer : callable
        ``outer(params, hparams)``, a scalar tensor.
    inner : callable or condition
        ``inner(params, hparams)``, or a condition object, as in `implicit_grad`.
    solve : callable
        ``solve(hparams) -> params``: the inner solver, started in the same way at each call.
    hparams : pytree of Tensor
        The outer variables. float64 is wanted: below it a difference has few digits.
    solver : Solver, optional
        The linear solver that is to be checked, as in `implicit_grad`.
    rtol : float, optional
        How far the two may be apart, relatively, beside four times the estimated error of the
        difference. None: 1e-5 in float64, 2e-3 in float32.

    Returns
    -------
    report : Report
        ``report.ok``, ``report.blame`` and the figures; ``print(report)`` shows them all.

    Raises
    ------
    StructureMismatch
        If `hparams` holds no floating-point tensor, or a function returns what it must not.
    UnsupportedOperation
        Inside a function transform, or where `implicit_grad` raises it.

    References
    ----------
    Ridders, Accurate computation of F'(x) and F'(x) F''(x), 1982.

    Examples
    --------
    >>> import torch, hypergrad
    >>> inner = lambda w, lam: (w - 1) ** 2 + lam * w**2
    >>> outer = lambda w, lam: (w - 2) ** 2
    >>> lam = torch.tensor(0.5, dtype=torch.float64)
    >>> hypergrad.check_hypergrad(outer, inner, lambda lam: 1 / (1 + lam), lam).ok
    True

    The same with a solver that solves something else:

    >>> report = hypergrad.check_hypergrad(outer, inner, lambda lam: 1 / (1 + 2 * lam), lam)
    >>> report.ok, report.blame
    (False, 'inner problem not solved')
    """
    condition = as_condition(inner, Minimum)
    if transforms_active():
        raise UnsupportedOperation(
            "check_hypergrad looks at numbers, which a function transform (vmap, grad) hides. Call "
            "it outside, for one task."
        )
    tree = Tree("hparams", hparams)
    if not any(v.numel() for v in tree.variables):
        raise StructureMismatch(
            "hparams holds no floating-point tensor to differentiate by; integers, None and plain "
            "numbers are constants. Pass torch.tensor(0.5, dtype=torch.float64), for example.",
            argument="hparams",
        )
    with (
        unnoticed(),
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)
        return _Check(Case(outer, condition, solve, tree, solver), rtol).report()


@dataclasses.dataclass(eq=False)
class _Comparison:
    """The derivatives along all directions, beside each other.

    Attributes
    ----------
    implicit, differences, errors : Tensor
        The implicit derivatives, the differences, and the estimated errors of the latter.
    terms : Tensor
        The absolute sizes of the terms that add up to the implicit ones.
    relative_error, tolerance : float
        As in `Report`.
    worst : int
        The direction where the one exceeds the other by most.
    noise : float
        The largest relative error that the differences themselves are estimated to have.
    """

    implicit: Tensor
    differences: Tensor
    errors: Tensor
    terms: Tensor
    relative_error: float = math.nan
    tolerance: float = math.nan
    worst: int = 0
    noise: float = math.inf


class _Check:
    """One call of `check_hypergrad`."""

    def __init__(self, case: Case, rtol: float | None) -> None:
        self.case = case
        dtypes = [v.dtype for v in (*case.tree.variables, *case.params.variables)]
        self.precision = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        self.rtol = _RTOL[self.precision] if rtol is None else rtol
        case.precision, case.rtol = self.precision, self.rtol
        self.useless = max(_USELESS.get(self.precision, 0.5), self.rtol)
        self.least = _LEAST.get(self.precision, 0.1)
        self.lines = directions(case.tree)
        self.lengths = _numbers([line.length for line in self.lines])
        self.notes: list[str] = []

    def report(self) -> Report:
        """Compare the derivatives, and look for the part at fault where they disagree."""
        none, unrolled, unrolled_error = _numbers([]), None, math.nan
        seen = _Comparison(none, none, none, none, tolerance=self.rtol)
        finding = first(When.FIRST, Trial(self.case, self.lines[0]))
        compared = finding is None
        if compared:
            seen = self.compared()
            unrolled, unrolled_error = self.unrolled(seen)
            finding = self.suspected(seen)
            self.remark(finding is None, unrolled_error, seen)
        return Report(
            ok=finding is None,
            blame=None if finding is None else finding.suspect.name,
            reason="" if finding is None else finding.evidence,
            relative_error=seen.relative_error,
            tolerance=seen.tolerance,
            labels=tuple(line.label for line in self.lines) if compared else (),
            implicit=seen.implicit,
            differences=seen.differences,
            difference_errors=seen.errors,
            unrolled=unrolled,
            unrolled_error=unrolled_error,
            info=self.case.known,
            notes=tuple(self.notes),
            question=None if finding is None else finding.suspect.question,
        )

    def suspected(self, seen: _Comparison) -> Finding | None:
        """Ask about the suspects, in the light of the derivatives."""
        finding = first(When.ALWAYS, Trial(self.case, self.lines[seen.worst]))
        if finding is not None:
            return finding
        useless = not seen.noise <= self.useless
        if useless or not seen.relative_error <= seen.tolerance:
            trial = Trial(
                self.case,
                self.lines[seen.worst],
                float(seen.implicit[seen.worst]),
                float(seen.differences[seen.worst]),
                float(seen.errors[seen.worst]),
                useless=useless,
                agrees=lambda gradient: self.agrees(gradient, seen),
            )
            return first(When.UNCERTAIN if useless else When.APART, trial)
        largest = torch.maximum(seen.implicit.abs(), seen.differences.abs()) * self.lengths
        for i in (largest <= _CANCELLED * seen.terms).nonzero().flatten().tolist():
            hidden = hiding(self.case, self.lines[i])
            finding = None if hidden is None else first(When.CANCELLED, hidden)
            if finding is not None:
                evidence = (
                    f"Along {self.lines[i].label} the terms of the hypergradient cancel here, "
                    f"which hides a fault: {finding.evidence}"
                )
                return dataclasses.replace(finding, evidence=evidence)
        return None

    def compared(self) -> _Comparison:
        """Take the derivatives along all directions, and compare them."""
        case = self.case
        gradient, info = case.hypergradient
        implicit = self.along(gradient)
        terms = _numbers(case.terms(self.lines, case.adjoint(info))) * self.lengths
        least = torch.maximum(
            _CANCELLED * terms, self.least * (implicit * self.lengths).abs().max()
        )
        pairs = [
            self.difference(line, float(size) / line.length)
            for line, size in zip(self.lines, least, strict=True)
        ]
        differences, errors = _numbers(pairs).unbind(dim=1)
        seen = self.compare(_Comparison(implicit, differences, errors, terms))
        if seen.relative_error > seen.tolerance:
            # Steps of all sizes may end at the same rounding of the inner solver's tolerance.
            apart = (implicit - differences).abs() > 4 * errors
            rough = [
                case.rough(line) if far else 0.0
                for line, far in zip(self.lines, apart.tolist(), strict=True)
            ]
            seen = self.compare(dataclasses.replace(seen, errors=errors + _numbers(rough)))
        return seen

    def along(self, gradient: Sequence[Tensor]) -> Tensor:
        """Form the derivatives along all directions."""
        return _numbers([line.dot(gradient) for line in self.lines])

    def difference(self, line: Direction, least: float) -> tuple[float, float]:
        """Take a derivative along a direction by differences, and estimate its error."""
        # Below float64 the steps that suit the size of a hyperparameter may drown in rounding:
        # there longer ones are tried too.
        slope, error = math.nan, math.inf
        for longer in (1,) if self.precision == torch.float64 else (1, 10, 100):
            length = longer * line.length
            pair = derivative(self.case.along(line), length, self.precision, 0.1 * self.rtol, least)
            if pair[1] < error:
                slope, error = pair
            if error <= self.useless * max(abs(slope), least):
                break
        return slope, error

    def compare(self, seen: _Comparison) -> _Comparison:
        """Weigh derivatives by the lengths of their directions, leaf by leaf."""
        g, d, e = (t * self.lengths for t in (seen.implicit, seen.differences, seen.errors))
        least = self.least * float(torch.maximum(g.abs(), d.abs()).max())
        exceeds, worst, largest = -1.0, (0.0, self.rtol, 0), 0.0
        leaves = [line.leaf for line in self.lines]
        for leaf in dict.fromkeys(leaves):
            among = [i for i, name in enumerate(leaves) if name == leaf]
            size = float(seen.terms[among].norm())
            scale = max(float(g[among].norm()), float(d[among].norm()), least, _CANCELLED * size)
            apart, noise = (g - d)[among].abs(), float(e[among].norm())
            if not math.isfinite(scale + noise):
                bad = among[int((~torch.isfinite(d + e)[among]).to(torch.int8).argmax())]
                return _weighed(seen, (math.nan, self.rtol, bad), math.inf)
            if scale == 0:
                continue
            error, tolerance = float(apart.norm()) / scale, self.rtol + 4 * noise / scale
            largest = max(largest, noise / scale)
            if error / tolerance > exceeds:
                exceeds = error / tolerance
                worst = (error, tolerance, among[int(apart.argmax())])
        return _weighed(seen, worst, largest)

    def agrees(self, gradient: Sequence[Tensor], seen: _Comparison) -> bool:
        """See whether another hypergradient agrees with the differences."""
        other = self.compare(dataclasses.replace(seen, implicit=self.along(gradient)))
        return other.relative_error <= other.tolerance

    def unrolled(self, seen: _Comparison) -> tuple[Tensor | None, float]:
        """Differentiate through `solve`, and compare with the differences."""
        gradient, why = self.case.unrolled()
        if gradient is None:
            self.notes.append(f"unrolled differentiation was skipped: {why}.")
            return None, math.nan
        slopes = self.along(gradient)
        return slopes, self.compare(dataclasses.replace(seen, implicit=slopes)).relative_error

    def remark(self, ok: bool, unrolled_error: float, seen: _Comparison) -> None:
        """Note what is no fault, and still worth knowing."""
        info = self.case.hypergradient[1]
        if self.precision != torch.float64:
            self.notes.append(
                f"the problem is in {str(self.precision)[6:]}; the tolerance follows the estimated "
                "error of the difference. Use float64 for a sharp check."
            )
        still = [
            line.leaf
            for line, g, d in zip(self.lines, seen.implicit, seen.differences, strict=True)
            if line.leaf and g == 0 and d == 0
        ]
        if still:
            self.notes.append(
                f"nothing depends on {', '.join(dict.fromkeys(still))} there: both derivatives are "
                "exactly zero."
            )
        rounding = 1e4 * torch.finfo(self.precision).eps * abs(float(info.outer_value))
        if ok and unrolled_error > self.useless and float(seen.terms.max()) > rounding:
            self.notes.append(
                "the derivative through solve is another one: solve cuts its graph (.item(), "
                ".detach(), .data), or its derivative has not converged. The implicit one is right."
            )
        if ok and not bool(info.success):
            self.notes.append(f"the gradient agrees, but the linear solve failed: {info}.")
        if ok and unsymmetric(self.case) is not None:
            self.notes.append("the condition is declared symmetric, and A is not quite.")


def _weighed(seen: _Comparison, worst: tuple[float, float, int], noise: float) -> _Comparison:
    error, tolerance, place = worst
    return dataclasses.replace(
        seen, relative_error=error, tolerance=tolerance, worst=place, noise=noise
    )


def _numbers(values: Any) -> Tensor:
    """Make numbers of the host's a tensor, whatever the default device is."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")
