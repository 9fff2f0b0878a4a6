"""What the defaults say on 1,000 random networks, against the truth of Newton's method.

    python -m benchmarks.networks --out docs/pictures

prints the tables and draws the picture of the page on reliability. Points and truths are kept
beside the rows, and made again where the drawing has changed; the library has no part in them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import hypergrad
from benchmarks import network_cases, network_losses, network_models, network_points, network_truth
from benchmarks.calibration import close, covered, draw_band
from benchmarks.network_cases import Solved, draw, flat, relative, solve, unflat

Row = dict[str, str | int | float | bool]

RIGHT, GOOD, OFF = 1e-4, 1e-2, 0.1
LARGEST = 10.0  # of the estimates: it says that no digit is right
_BLOCK = 100_000  # cases of one seed
_DRAWING = (network_cases, network_losses, network_models, network_points, network_truth)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the cases, print the tables, write the rows and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="another seed: other cases")
    parser.add_argument("--truths", type=Path, default=Path("runs/networks"), help="their folder")
    parser.add_argument("--out", type=Path, default=Path("runs/networks"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    first = options.seed * _BLOCK
    options.truths.mkdir(parents=True, exist_ok=True)
    solved = kept(range(first, first + options.cases), options.truths / f"{options.seed}.pt")
    rows = [judged(seed, one) for seed, one in solved.items()]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.truths / f"rows-{options.seed}.json").write_text(json.dumps(rows), encoding="utf-8")
    print(report(rows))
    picture(rows, options.out / "networks.png")


def kept(seeds: Sequence[int], path: Path) -> dict[int, Solved]:
    """Points and truths of cases, from a file where it has them, which is brought up to date."""
    sources = [Path(str(module.__file__)).read_bytes() for module in _DRAWING]
    drawing = hashlib.sha256(b"".join(sources)).hexdigest()
    found: dict[int, Solved] = {}
    if path.exists():
        content = torch.load(path, weights_only=True)
        if content["drawing"] == drawing:
            found = {seed: Solved(**fields) for seed, fields in content["cases"].items()}
    for done, seed in enumerate(seeds, 1):
        new = seed not in found
        if new:
            found[seed] = solve(seed)
        if new and (done % 50 == 0 or done == len(seeds)):
            fields = {seed: vars(one) for seed, one in found.items()}
            torch.save({"drawing": drawing, "cases": fields}, path)
    return {seed: found[seed] for seed in seeds}


def judged(seed: int, solved: Solved) -> Row:
    """What the library says of a case at its defaults, and how far off it is."""
    case = draw(seed, solved.attempt)
    row: Row = {**case.kinds, "plain": solved.plain, "known to": solved.known}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found, info = hypergrad.implicit_grad(
                case.losses.outer,
                case.losses.condition(str(case.kinds["condition"])),
                unflat(solved.point, case.start),
                case.hparams,
                return_info=True,
            )
        except (
            Exception
        ) as error:  # whatever is raised is seen by the caller, and shown in the table
            return {
                **row,
                "error": solved.plain,
                "estimate": math.nan,
                "said": type(error).__name__,
                "success": False,
                "method": "",
                "iterations": 0,
                "matvecs": 0,
            }
    said = [w for w in caught if issubclass(w.category, hypergrad.ConvergenceWarning)]
    return {
        **row,
        "error": relative(flat(found), solved.truth),
        "estimate": info.error_estimate.item(),
        "said": "warning" if said else "",
        "success": bool(info.success) and not said,
        "method": info.method,
        "iterations": int(info.iterations),
        "matvecs": int(info.matvecs),
    }


def right(row: Row) -> bool:
    """Whether an answer is right to 1e-4."""
    return float(row["error"]) <= RIGHT


def good(row: Row) -> bool:
    """Whether an answer is right to 1%."""
    return float(row["error"]) <= GOOD


def off(row: Row) -> bool:
    """Whether an answer is more than 10% off, or there is nothing to be right about."""
    return not float(row["error"]) <= OFF


def passed(row: Row) -> bool:
    """Whether the library called an answer good: a success, without a word."""
    return bool(row["success"])


def silently_off(rows: Sequence[Row]) -> list[Row]:
    """The answers that are more than 10% off and passed."""
    return [row for row in rows if off(row) and passed(row)]


def in_range(row: Row) -> bool:
    """Whether the estimate is within a factor of 30 of the true error, up to the largest."""
    return close({**row, "error": min(float(row["error"]), LARGEST)})


def covering(row: Row) -> bool:
    """Whether the estimate is at least the true error; the largest covers all above it."""
    return covered({**row, "error": min(float(row["error"]), LARGEST)})


def report(rows: Sequence[Row]) -> str:
    """All tables."""
    bands = Counter("right" if right(r) else "off" if off(r) else "between" for r in rows)
    plain = Counter(
        "right" if r["plain"] <= RIGHT else "off" if not r["plain"] <= OFF else "between"  # type: ignore[operator]
        for r in rows
    )
    lines = [
        f"{len(rows)} cases: by the true error of the library's answers {dict(bands)}, "
        f"of a dense solve in float64 {dict(plain)}",
        f"above 10, the largest estimate, or without a minimum: "
        f"{sum(float(r['error']) > LARGEST for r in rows)}, which count as 10",
        "raised: "
        + str(dict(Counter(r["said"] for r in rows if r["said"] not in ("", "warning")))),
        "",
        table(rows),
        "",
        f"products for each iteration of CG: {_products(rows)}",
        "",
        "more than 10% off and passed:",
    ]
    for row in silently_off(rows):
        what = ", ".join(f"{row[key]}" for key in ("network", "hparams", "outer", "stopped"))
        lines.append(
            f"  {row['seed']}: {what}, {row['condition']}, {row['dtype']}, n {row['n']}, "
            f"{row['method']}; error {row['error']:.1e}, estimate {row['estimate']:.1e}"
        )
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """The figures for all cases, and for the parts that they can be taken apart into."""
    lines = [
        "| cases | how many | off and passed | right to 1e-4 and said | right to 1% and said "
        "| errors raised | at least the true error | within a factor of 30 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        _line("all", rows),
    ]
    for key in ("network", "dtype", "condition", "stopped", "hparams", "outer", "task", "trained"):
        for value in sorted({str(row[key]) for row in rows}):
            lines.append(_line(f"{key}: {value}", [r for r in rows if r[key] == value]))
    lines.append(_line("n up to 100", [r for r in rows if int(r["n"]) <= 100]))
    lines.append(_line("n above 100", [r for r in rows if int(r["n"]) > 100]))
    return "\n".join(lines)


def _line(name: str, rows: Sequence[Row]) -> str:
    return (
        f"| {name} | {len(rows)} | {len(silently_off(rows))} "
        f"| {share(lambda r: not passed(r), filter(right, rows))} "
        f"| {share(lambda r: not passed(r), filter(good, rows))} "
        f"| {sum(r['said'] not in ('', 'warning') for r in rows)} "
        f"| {share(covering, rows)} | {share(in_range, rows)} |"
    )


def share(holds: Callable[[Row], bool], rows: Sequence[Row] | filter[Row]) -> str:
    """Of how many rows something holds: a percentage, and the number behind it."""
    found = [holds(row) for row in rows]
    return f"{100 * sum(found) / len(found):.1f}% of {len(found)}" if found else "none"


def _products(rows: Sequence[Row]) -> str:
    ours = [r for r in rows if r["method"] == "CG" and int(r["iterations"])]
    if not ours:
        return "none"
    products, iterations = (sum(int(r[key]) for r in ours) for key in ("matvecs", "iterations"))
    return f"{products} in {iterations} iterations of {len(ours)} cases, {len(rows)} in all"


def picture(rows: Sequence[Row], path: Path) -> None:
    """Estimates against true errors, one dot a case."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5.2), layout="constrained")
    low, beyond = 1e-14, 1e3
    for name, colour, part in (
        ("passed in silence", "tab:blue", [r for r in rows if passed(r)]),
        ("warned of", "tab:orange", [r for r in rows if not passed(r)]),
    ):
        shown = [r for r in part if math.isfinite(float(r["estimate"]))]
        errors = [max(float(r["error"]), float(r["known to"])) for r in shown]
        axes.plot(
            [min(e, beyond) for e in errors],
            [max(float(r["estimate"]), low) for r in shown],
            ".",
            color=colour,
            alpha=0.5,
            markersize=4,
            label=name,
        )
    ends = [low, 10 * beyond]
    draw_band(axes, ends)
    axes.axvline(OFF, color="0.3", lw=1, ls=":", label="10% off")
    axes.set(xscale="log", yscale="log", xlim=(low, 3 * beyond), ylim=(low, 1e2))
    axes.set_xlabel("true relative error of the hypergradient (at 1e3: more, or no minimum)")
    axes.set_ylabel("info.error_estimate")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
