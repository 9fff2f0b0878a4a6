"""Is it worth it? Validation loss against time: random search, Optuna's TPE, and hypergradients.

    python -m benchmarks.worth_it           # measures, and then draws
    python -m benchmarks.worth_it --draw    # table and picture of what is stored, in seconds

Figures go to results/worth_it/, a file a data set, and the table of the page beside them. Runs that
are stored there, of as many seconds, are not made again: a call goes on where one has stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import processor
from benchmarks.worth_it_page import compared, picture, table
from benchmarks.worth_it_problems import COUNTS, DATA, problem
from benchmarks.worth_it_searches import METHODS, RATE, Search, search

FIGURES = Path("results/worth_it")
PICTURE = Path("docs/pictures/worth_it.png")

Run = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the data sets that are asked for; write figures, table and picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run (default 3)")
    parser.add_argument("--seeds", type=int, default=5, help="splits of the data (default 5)")
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS), choices=COUNTS)
    parser.add_argument("--out", type=Path, default=FIGURES, help=f"default {FIGURES}")
    parser.add_argument("--picture", type=Path, default=PICTURE, help=f"default {PICTURE}")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    chosen = parser.parse_args(argv)
    chosen.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if not chosen.draw:
        for name in chosen.data:
            warm_up(name)
            measure(chosen.out / f"{name}.json", chosen.counts, chosen.seeds, chosen.seconds)
    files = sorted(chosen.out.glob("*.json"))
    stored = [compared(json.loads(file.read_text("utf-8"))) for file in files]
    page = table(stored)
    (chosen.out / "table.md").write_text(page, encoding="utf-8")
    chosen.picture.parent.mkdir(parents=True, exist_ok=True)
    picture(stored, chosen.picture)
    print(page)


def warm_up(name: str) -> None:
    """Make some points by each method, so that no import and no first call is on its account."""
    for method in METHODS.values():
        for _ in itertools.islice(method(problem(name, 1, seed=-1), 0), 3):
            pass


def measure(file: Path, counts: Sequence[int], seeds: int, seconds: float) -> None:
    """Run every method on the data set of a file, for each split and each number of decays."""
    name = file.stem
    figures: dict[str, Any] = {
        "data": name,
        "seconds": seconds,
        "rate": RATE,
        "versions": {package: version(package) for package in ("torch", "optuna", "scikit-learn")},
        "python": platform.python_version(),
        "processor": processor(),
        "runs": [],
    }
    if file.is_file():
        before = json.loads(file.read_text("utf-8"))
        figures["runs"] = before["runs"] if before["seconds"] == seconds else []
    done = {(of_it["seed"], of_it["count"], of_it["method"]) for of_it in figures["runs"]}
    for seed, count, method in itertools.product(range(seeds), counts, METHODS):
        if (seed, count, method) in done:
            continue
        of_it = run(name, count, seed, method, seconds)
        figures["runs"].append(of_it)
        file.write_text(_text(figures), encoding="utf-8")
        _, validation, test = of_it["curve"][-1]
        print(
            f"{name}, {count} decays, seed {seed}, {method}: validation {validation:.4f}, "
            f"test {test:.4f}, {of_it['points']} points",
            flush=True,
        )


def run(name: str, count: int, seed: int, method: str, seconds: float) -> Run:
    """One search, as figures: a point of the curve is seconds, validation loss, test loss."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        result: Search = search(problem(name, count, seed), method, seed, seconds)
    return {
        "count": count,
        "seed": seed,
        "method": method,
        "points": result.points,
        "warnings": sorted({type(warning.message).__name__ for warning in heard}),
        "curve": [
            [round(best.seconds, 4), float(f"{best.validation:.6g}"), float(f"{best.test:.6g}")]
            for best in result.bests
        ],
    }


def _text(figures: dict[str, Any]) -> str:
    """JSON with a run a line."""
    head = {key: value for key, value in figures.items() if key != "runs"}
    lines = ",\n".join(json.dumps(run) for run in figures["runs"])
    return json.dumps(head, indent=1)[:-2] + f',\n "runs": [\n{lines}\n]\n}}\n'


if __name__ == "__main__":
    main()
