"""The table of what was measured, in Markdown, and the picture."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reproduction.studies.theory.fits import RATES, agreement, exponent, rate_exponent, slope
from reproduction.studies.theory.rows import Measurement
from reproduction.studies.theory.sweeps import Findings

# Exponents of the condition number that the paper's table promises: of compute, and of memory.
PROMISED: dict[str, tuple[float, float]] = {
    "MAML, gradient descent": (1.0, 1.0),
    "MAML, Nesterov": (0.5, 0.5),
    "truncated, gradient descent": (1.0, 1.0),
    "implicit, Nesterov and CG": (0.5, 0.0),
    "implicit, CG and CG": (0.5, 0.0),
}
WORDS = {1.0: "kappa", 0.5: "sqrt(kappa)", 0.0: "flat"}
COLOURS = dict(
    zip(PROMISED, ("tab:red", "tab:orange", "tab:brown", "tab:blue", "tab:cyan"), strict=True)
)
Fits = dict[str, dict[str, Any]]


def fit(findings: Findings) -> Fits:
    """Fit the orders of growth of every row.

    Parameters
    ----------
    findings
        The measurements.

    Returns
    -------
    dict
        For each row: the exponents of compute and memory in the condition number, what is
        promised, the verdicts, and how compute grows with each further digit.
    """
    fits: Fits = {}
    kappas = findings.plan.kappas
    for row, (of_compute, of_memory) in PROMISED.items():
        own = [m for m in findings.over_kappa if m.row == row]
        seeds = sorted({m.seed for m in own})
        compute = exponent([[(m.kappa, m.total) for m in own if m.seed == s] for s in seeds])
        memory = exponent([[(m.kappa, m.peak) for m in own if m.peak is not None]])
        digits = _by(findings.over_accuracy, row, "accuracy")
        x = [-math.log10(accuracy) for accuracy in digits]
        y = [float(median(m.total for m in ms)) for ms in digits.values()]
        fits[row] = {
            "compute": asdict(compute),
            "compute_text": str(compute),
            "compute_promised": of_compute,
            "compute_of_the_rate": rate_exponent(kappas, RATES[_slowest(row)]),
            "compute_verdict": agreement(compute.value, of_compute),
            "memory": memory.value,
            "memory_promised": of_memory,
            "memory_verdict": agreement(memory.value, of_memory),
            "evaluations_a_digit": slope(x, y),
            "correlation_with_digits": _correlation(x, y),
        }
    return fits


def table(findings: Findings, fits: Fits) -> str:
    """Write what was found as Markdown.

    Parameters
    ----------
    findings
        The measurements.
    fits
        From `fit`.

    Returns
    -------
    str
        Four tables: compute, accuracy, memory and error.
    """
    plan = findings.plan
    shown = [plan.kappas[0], plan.kappas[len(plan.kappas) // 2], plan.kappas[-1]]
    names = " / ".join(f"{k:.0f}" for k in shown)
    lines = [
        f"Inner gradients and Hessian-vector products to a relative error of {plan.accuracy:g}, "
        f"counted; {plan.problems} problems of {plan.n} unknowns at each condition number, "
        "medians; exponents in the condition number with 95% intervals over the problems.",
        "",
        f"| algorithm | promised | at kappa {names} | exponent | the rate's own | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row, found in fits.items():
        totals = _by(findings.over_kappa, row, "kappa")
        cells = " / ".join(
            f"{median(m.total for m in totals[_near(totals, k)]):.0f}" for k in shown
        )
        lines.append(
            f"| {row} | {WORDS[found['compute_promised']]} | {cells} | {found['compute_text']} | "
            f"{found['compute_of_the_rate']:.2f} | {found['compute_verdict']} |"
        )
    errors = " / ".join(f"{a:g}" for a in plan.accuracies)
    lines += [
        "",
        f"The same at kappa {plan.middle:g} to other accuracies.",
        "",
        f"| algorithm | to {errors} | for each further digit | correlation with digits |",
        "| --- | --- | --- | --- |",
    ]
    for row, found in fits.items():
        digits = _by(findings.over_accuracy, row, "accuracy")
        cells = " / ".join(f"{median(m.total for m in ms):.0f}" for ms in digits.values())
        lines.append(
            f"| {row} | {cells} | {found['evaluations_a_digit']:.0f} | "
            f"{found['correlation_with_digits']:.4f} |"
        )
    steps = " / ".join(map(str, plan.steps))
    lines += [
        "",
        f"Peak memory in kB, the tensors live at once: to the relative error "
        f"{plan.accuracy:g}, and at kappa {plan.middle:g} after {steps} inner steps. One vector of "
        f"{plan.n} float64 numbers takes {plan.n * 8 / 1000:g} kB, one inner gradient "
        f"{findings.gradient_memory / 1000:.1f} kB.",
        "",
        f"| algorithm | promised | at kappa {names} | exponent | verdict | after {steps} steps "
        "| vectors a step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, found in fits.items():
        peaks = _by(findings.over_kappa, row, "kappa")
        cells = " / ".join(f"{peaks[_near(peaks, k)][0].peak / 1000:.0f}" for k in shown)  # type: ignore[operator]
        own = [(s, b) for name, s, b in findings.memory if name == row]
        by_steps = " / ".join(f"{b / 1000:.0f}" for _, b in own) or "-"
        a_step = f"{slope(*zip(*own, strict=True)) / (8 * plan.n):.2f}" if own else "-"
        lines.append(
            f"| {row} | {WORDS[found['memory_promised']]} | {cells} | {found['memory']:.2f} | "
            f"{found['memory_verdict']} | {by_steps} | {a_step} |"
        )
    for name in sorted({name for name, *_ in findings.memory} - fits.keys()):
        own = [(s, b) for other, s, b in findings.memory if other == name]
        by_steps = " / ".join(f"{b / 1000:.0f}" for _, b in own)
        a_step = f"{slope(*zip(*own, strict=True)) / (8 * plan.n):.2f}"
        lines.append(f"| {name} | flat | - | - | - | {by_steps} | {a_step} |")
    lines += ["", f"The implicit row after {steps} steps of conjugate gradients, in kB:", ""]
    for row in ("without evidence", "with evidence"):
        bytes_live = [b for name, _, b in findings.products_memory if name == row]
        lines.append(f"- {row}: " + " / ".join(f"{b / 1000:.0f}" for b in bytes_live))
    lines += [
        "",
        "Error of the meta-gradient, relative; the largest over all problems.",
        "",
        f"| algorithm | promised | against | at kappa {names} |",
        "| --- | --- | --- | --- |",
    ]
    for row in fits:
        measured = _by(findings.over_kappa, row, "kappa")
        implicit = row.startswith("implicit")
        against = "the exact meta-gradient" if implicit else "the closed form of what it computes"
        cells = " / ".join(
            f"{max(m.error if implicit else m.own_error for m in measured[_near(measured, k)]):.2g}"
            for k in shown
        )
        lines.append(f"| {row} | {'delta' if implicit else 'zero'} | {against} | {cells} |")
    for kept in plan.kept:
        measured = _by(findings.truncation, f"truncated to {kept}", "kappa")
        cells = " / ".join(
            f"{max(m.error for m in measured[_near(measured, k)]):.2g}" for k in shown
        )
        lines.append(
            f"| truncated to {kept} steps at a solved inner point | eps | the exact meta-gradient "
            f"| {cells} |"
        )
    worst = max(m.error / m.accuracy for m in findings.over_accuracy if "implicit" in m.row)
    lines += ["", f"Over all accuracies the implicit rows end at {worst:.3f} delta or less."]
    return "\n".join(lines) + "\n"


def draw(findings: Findings) -> Figure:
    """Draw compute, memory and error.

    Parameters
    ----------
    findings
        The measurements.

    Returns
    -------
    Figure
        The picture.
    """
    plan = findings.plan
    picture = Figure(figsize=(11, 8), layout="constrained")
    (compute, digits), (memory, error) = picture.subplots(2, 2)
    for row in PROMISED:
        style: dict[str, Any] = {"color": COLOURS[row], "marker": "o", "markersize": 4}
        if row.startswith("truncated"):
            style["linestyle"] = "--"
        totals = _by(findings.over_kappa, row, "kappa")
        compute.loglog(list(totals), _medians(totals), label=row, **style)
        wanted = _by(findings.over_accuracy, row, "accuracy")
        first, *_ = counts = _medians(wanted)
        digits.semilogx(list(wanted), [count / first for count in counts], **style)
        peaks = {k: ms[0].peak for k, ms in totals.items()}
        memory.loglog(list(peaks), [p / 1000 for p in peaks.values() if p], **style)
        if row.startswith("implicit"):
            error.loglog(
                list(totals), [median(m.error for m in t) for t in totals.values()], **style
            )
        elif not row.startswith("truncated"):
            own = [median(m.own_error for m in ms) for ms in totals.values()]
            error.loglog(list(totals), own, **style)
    for kept, line in zip(plan.kept, (":", "-."), strict=False):
        floors = _by(findings.truncation, f"truncated to {kept}", "kappa")
        error.loglog(
            list(floors), [median(m.error for m in ms) for ms in floors.values()],
            line, color=COLOURS["truncated, gradient descent"], label=f"truncated to {kept} steps",
        )  # fmt: skip
    _guides(compute, plan.kappas, 4.0, 12.0)
    digits.invert_xaxis()
    compute.legend(fontsize="small")
    error.legend(fontsize="small", loc="center left")
    for axes, x, y, title in (
        (compute, "condition number", "gradients and products",
         f"Compute, error {plan.accuracy:g}"),
        (digits, "relative error asked for", f"times those for {plan.accuracies[0]:g}",
         f"Compute, condition number {plan.middle:g}"),
        (memory, "condition number", "peak memory, kB", f"Memory, error {plan.accuracy:g}"),
        (error, "condition number", "relative error",
         "Error: of unrolling against its closed form,\nelse against the exact meta-gradient"),
    ):  # fmt: skip
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    return picture


def _guides(axes: Axes, kappas: Sequence[float], linear: float, root: float) -> None:
    grey: dict[str, Any] = {"color": "0.6", "linewidth": 1, "zorder": 0}
    axes.loglog(kappas, [linear * k for k in kappas], "-", label="slope 1", **grey)
    axes.loglog(kappas, [root * k**0.5 for k in kappas], ":", label="slope 1/2", **grey)


def _by(measurements: list[Measurement], row: str, key: str) -> dict[float, list[Measurement]]:
    groups: dict[float, list[Measurement]] = {}
    for m in measurements:
        if m.row == row:
            groups.setdefault(_rounded(getattr(m, key)), []).append(m)
    return groups


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _slowest(row: str) -> str:
    """Name the method in a row's name that takes the most steps."""
    return next(name for name in RATES if name in row)


def _near(groups: dict[float, Any], wanted: float) -> float:
    return min(groups, key=lambda k: abs(k - wanted))


def _medians(groups: dict[float, list[Measurement]]) -> list[float]:
    return [float(median(m.total for m in ms)) for ms in groups.values()]


def _correlation(x: Sequence[float], y: Sequence[float]) -> float:
    return math.sqrt(max(0.0, slope(x, y) * slope(y, x)))
