"""The tables of the report, in Markdown."""

from collections.abc import Iterable, Sequence

from reproduction.method.systems import METHODS, SYSTEMS, Method
from reproduction.report.published import PUBLISHED, SETTINGS
from reproduction.report.records import Record
from reproduction.report.spread import Spread, paired, spread

REFERENCE: Method = "imaml"
FEWEST_SEEDS = 3  # that tell two systems apart


def by_seed(records: Iterable[Record], figure: str) -> dict[Method, dict[int, float]]:
    """Return one figure of the finished runs, by method and seed."""
    found: dict[Method, dict[int, float]] = {}
    for record in records:
        if record.state == "finished":
            found.setdefault(record.method, {})[record.seed] = record.figures[figure][0]
    return found


def sinusoid_table(records: Sequence[Record], *, on_the_way: bool) -> list[str]:
    """Compare the systems over the seeds.

    Parameters
    ----------
    records
        Of one table.
    on_the_way
        With a column of the validation error at the evaluations that all have made.

    Returns
    -------
    list of str
        Lines; the column of differences compares seed by seed with `REFERENCE`.
    """
    errors = by_seed(records, "after")
    reference = errors.get(REFERENCE, {})
    shared = shared_evaluations(records)
    lines = [
        "| method | seeds | meta-steps | evaluations | seconds | error: mean ± sd | by seed "
        f"| minus `{REFERENCE}`, 95% interval | told apart |"
        + f" on the way, at {shared / 1e3:,.0f} k evaluations |"
        * on_the_way,
        "| --- |" + " --- |" * (8 + on_the_way),
    ]
    for method in sorted(errors, key=lambda m: spread(list(errors[m].values())).mean):
        own = [r for r in records if r.method == method and r.state == "finished"]
        one = spread([r.figures["after"][0] for r in own])
        listed = ", ".join(f"{errors[method][s]:.3f}" for s in sorted(errors[method]))
        lines.append(
            f"| `{method}` | {one.count} | {_mean(r.meta_steps for r in own):,.0f} "
            f"| {_mean(r.evaluations for r in own) / 1e3:,.0f} k "
            f"| {_mean(r.seconds for r in own):.1f} | {_with_deviation(one)} | {listed} "
            f"| {_difference(method, paired(errors[method], reference))} |"
            + f" {_with_deviation(spread([r.at_evaluations(shared) for r in own]))} |"
            * on_the_way
        )
    lines += _notes(records)
    return lines


def shared_evaluations(records: Iterable[Record]) -> float:
    """Return how many evaluations every finished run has made; 0 without one."""
    return min((r.evaluations for r in records if r.state == "finished"), default=0.0)


def omniglot_table(records: Sequence[Record]) -> list[str]:
    """Show the systems beside what is published for them.

    Parameters
    ----------
    records
        Of one table: one setting, one length.

    Returns
    -------
    list of str
        Lines.
    """
    names = list(dict.fromkeys(name for r in records for name in r.figures))
    lines = [
        "| method | seed | meta-steps | tasks | minutes | validation, % | "
        + "".join(f"test: {name}, % | " for name in names)
        + "published, % |",
        "| --- |" + " --- |" * (6 + len(names)),
    ]
    order = sorted(
        (r for r in records if r.curve), key=lambda r: (-best_validation(r), r.method, r.seed)
    )
    for r in order:
        cells = "".join(f"{_accuracy(r, name)} | " for name in names)
        lines.append(
            f"| `{r.method}` | {r.seed} | {r.meta_steps:,} | {r.tasks:,} | {r.seconds / 60:.1f} "
            f"| {100 * best_validation(r):.1f} | {cells}{_published(r)} |"
        )
    lines += _notes(records)
    return lines


def recipes_table(records: Sequence[Record]) -> list[str]:
    """List what the systems were run with.

    Parameters
    ----------
    records
        Any; a method that has several recipes gets a row each.

    Returns
    -------
    list of str
        Lines.
    """
    lines = [
        "| method | inner solver | steps | rate | lambda | Adam's rate | tasks a meta-step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = {
        f"| `{r.method}` | {r.recipe['inner_solver']} | {r.recipe['inner_steps']} "
        f"| {_rate(r)} | {_lam(r)} | {r.recipe['lr']:g} | {r.recipe['tasks_per_step']} |": None
        for method in METHODS
        for r in records
        if r.method == method
    }
    return lines + list(rows)


def published_table(records: Sequence[Record]) -> list[str]:
    """Show the papers' figures, and ours with the most training in each setting.

    Parameters
    ----------
    records
        All of Omniglot's first pipeline.

    Returns
    -------
    list of str
        Lines.
    """
    lines = [
        "| method | " + " | ".join(f"{ways}-way {shots}-shot" for ways, shots in SETTINGS) + " |",
        "| --- |" + " --- |" * len(SETTINGS),
    ]
    for method in METHODS:
        published = [PUBLISHED.get((method, setting)) for setting in SETTINGS]
        if any(published):
            cells = [f"{p[0]:g} ± {p[1]:g}" if p else "-" for p in published]
            lines.append(f"| {SYSTEMS[method].name}, published | {' | '.join(cells)} |")
        ours = [longest(records, method, setting) for setting in SETTINGS]
        if any(ours):
            cells = [f"{_accuracy(r, 'together')} ({r.length})" if r else "-" for r in ours]
            lines.append(f"| {SYSTEMS[method].name}, here | {' | '.join(cells)} |")
    return lines


def longest(records: Iterable[Record], method: Method, setting: tuple[int, int]) -> Record | None:
    """Return the finished run of a method and setting that has trained longest."""
    own = [
        r
        for r in records
        if r.method == method and (r.ways, r.shots) == setting and r.state == "finished"
    ]
    return max(own, key=lambda r: r.seconds, default=None)


def best_validation(record: Record) -> float:
    """Return the best accuracy on the validation tasks; the parameters kept are those."""
    return max(value for *_, value in record.curve)


def _notes(records: Iterable[Record]) -> list[str]:
    lines = [""]
    for r in records:
        if r.state == "broken off":
            lines.append(
                f"`{r.method}`, seed {r.seed}: broken off after {r.seconds / 60:.1f} minutes of "
                f"meta-steps ({r.meta_steps:,}), before its rate had fallen to zero."
            )
        if r.state == "failed":
            lines.append(f"`{r.method}`, seed {r.seed}: no figure; {r.message}.")
    return lines if lines != [""] else []


def _difference(method: Method, found: Spread | None) -> str:
    if method == REFERENCE or found is None:
        return "- | -"
    if found.count < FEWEST_SEEDS:
        return f"{found.mean:+.3f} | no: too few seeds"
    verdict = "no" if not found.is_apart_from_zero else "worse" if found.mean > 0 else "better"
    return f"{found.mean:+.3f} ± {found.interval:.3f} | {verdict}"


def _with_deviation(one: Spread) -> str:
    return f"{one.mean:.3f}" + (f" ± {one.deviation:.3f}" if one.count > 1 else "")


def _accuracy(record: Record, name: str) -> str:
    if name not in record.figures:
        return "-"
    mean, width = record.figures[name]
    return f"{100 * mean:.2f} ± {100 * width:.2f}"


def _published(record: Record) -> str:
    found = PUBLISHED.get((record.method, (record.ways or 0, record.shots)))
    return f"{found[0]:g} ± {found[1]:g}" if found else "-"


def _rate(record: Record) -> str:
    by_gradient = record.recipe["inner_solver"] not in {"gauss-newton", "hessian-free"}
    return f"{record.recipe['inner_lr']:g}" if by_gradient else "line search"


def _lam(record: Record) -> str:
    system = SYSTEMS[record.method]
    return f"{record.recipe['lam']:g}" if system.proximal else "-"


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
