"""Measure the table of Rajeswaran et al. 2019: ``python -m reproduction.studies.theory``.

On random strongly convex quadratics, whose meta-gradient is a closed form, each row of that table
computes it to the same accuracy: gradients and products are counted, memory and error measured,
and orders of growth fitted.
"""

import dataclasses
from pathlib import Path

import torch
from rich.console import Console

from reproduction.runs.command_line import OneLineParser, finish, whole
from reproduction.runs.reporting import save_figure
from reproduction.runs.run_folder import RunFolder
from reproduction.studies.theory.report import draw, fit, table
from reproduction.studies.theory.sweeps import Plan, measure

SMOKE = Plan(
    n=40, problems=2, kappas=(10.0, 30.0, 100.0), accuracies=(1e-1, 1e-2, 1e-3), middle=30.0,
    steps=(10, 20, 40),
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure, fit, and write the records, the table and the picture."""
    parser = OneLineParser(prog="theory", description="Measure what the theory of iMAML says.")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the problems")
    parser.add_argument("--out", type=Path, help="output folder (default: runs/theory-seedSEED)")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    given = parser.parse_args(arguments)
    out = given.out or Path("runs", f"theory-seed{given.seed}")
    if out.exists() and not out.is_dir():
        parser.error(f"--out {out}: a file is there; the name of a folder is needed")
    torch.set_num_threads(1)
    console, folder = Console(), RunFolder(out)
    with console.status("") as status:
        findings = measure(SMOKE if given.smoke else Plan(), given.seed, status.update)
    fits = fit(findings)
    folder.write_json("results.json", {**dataclasses.asdict(findings), "fits": fits})
    text = table(findings, fits)
    folder.write("theory.md", lambda path: path.write_text(text))
    folder.write("theory.png", save_figure(draw(findings)))
    console.print(text, markup=False, soft_wrap=True)


if __name__ == "__main__":
    finish(main)
