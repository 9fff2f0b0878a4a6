"""Run the benchmarks: ``python -m benchmarks``; each prints its rows when it is done."""

import argparse
import fnmatch
import sys
import warnings
from pathlib import Path

import torch

from benchmarks import imaml_rows, importing, logistic_rows, memory, results
from benchmarks.picture import draw
from benchmarks.results import Settings

ALL = {
    **logistic_rows.benchmarks(),
    **imaml_rows.benchmarks(),
    **memory.benchmarks(),
    **importing.benchmarks(),
}
UNTHREADED = ("memory", "import")


def main(arguments: list[str] | None = None) -> None:
    """Measure what is asked for, and write table, figures and picture into a folder."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder")
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help=f"a benchmark, or a pattern such as 'logistic-*'; may be repeated; the others keep "
        f"their rows of an earlier run in the folder. One of: {', '.join(ALL)}",
    )
    parser.add_argument("--rounds", type=int, default=50, help="interleaved rounds (default 50)")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch's threads (default 1); rows stand beside"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test in seconds")
    chosen = parser.parse_args(arguments)
    patterns = chosen.only or ["*"]
    names = [name for name in ALL if any(fnmatch.fnmatch(name, p) for p in patterns)]
    if not names:
        parser.error(f"--only: no such benchmark; there are {', '.join(ALL)}")
    if chosen.rounds < 2 or chosen.threads < 1:
        parser.error("--rounds must be at least 2, --threads at least 1")
    settings = Settings(3 if chosen.quick else chosen.rounds, chosen.threads, chosen.quick)
    torch.set_num_threads(settings.threads)
    # torchopt calls torch.func by its old name.
    warnings.filterwarnings("ignore", message="We've integrated functorch", category=FutureWarning)
    chosen.out.mkdir(parents=True, exist_ok=True)
    kept = chosen.out / "results.json"
    rows = results.read(kept)
    for name in names:
        if settings.threads > 1 and name in UNTHREADED:
            continue
        found = ALL[name](settings)
        print(results.markdown(found), flush=True)
        rows = results.merged(rows, found, list(ALL))
        results.write(kept, rows)
        page = results.overview(rows) + "\n" + results.markdown(rows, folded=True)
        (chosen.out / "results.md").write_text(page)
    draw(rows, chosen.out / "results.png")
    print(f"Table, figures and picture: {chosen.out}/results.md, .json, .png")


if __name__ == "__main__":
    sys.exit(main())
