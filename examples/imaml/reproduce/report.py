"""The report on what has run so far: Markdown, JSON and pictures."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from examples.imaml.reporting import save_figure
from examples.imaml.reproduce.pictures import draw_curves, draw_published, draw_sinusoids
from examples.imaml.reproduce.plan import Planned
from examples.imaml.reproduce.records import Record
from examples.imaml.reproduce.tables import (
    omniglot_table,
    published_table,
    recipes_table,
    sinusoid_table,
)
from examples.imaml.run_folder import RunFolder

COMMENTS = "comments"
"""A folder of the results: what people have to say on a table, by its name, is put below it."""

HEAD = """\
# What has been reproduced so far

`make reproduce` (`python -m examples.imaml.reproduce`) has made the tables and pictures of this
page from the runs that had ended, or begun, by then; it goes on where it stopped. The paragraphs
below a table are written by hand, about the figures in it. The systems are those of
[the examples](../examples/README.md#the-systems); `results.json` has every figure, with curves.
"""

TITLES = {
    "sinusoid/equal-time": "Sinusoids, at equal time",
    "sinusoid/equal-evaluations": "Sinusoids, at equal gradient evaluations",
}
SINUSOID_CAPTION = (
    "Mean squared error on 600 unseen sinusoids after adaptation to 10 points; mean and standard "
    "deviation over the seeds. Two systems are told apart where the 95% interval (Student's t) of "
    "the differences, seed by seed, leaves zero out."
)
OMNIGLOT_CAPTION = (
    "Accuracy, and 95% interval over 600 tasks of unseen characters; the parameters kept are "
    "those that were best on 200 validation tasks. The interval is over tasks of one training: "
    "with one seed it does not say how far another training ends from this one, and the order of "
    "the rows is no ranking."
)


def write_report(records: Sequence[Record], runs: Sequence[Planned], results: Path) -> None:
    """Write `README.md`, `results.json` and the pictures.

    Parameters
    ----------
    records
        What has run, in the order of the tables.
    runs
        All that are declared.
    results
        Where the report goes.
    """
    folder = RunFolder(results)
    written = {
        "runs": [dataclasses.asdict(record) for record in records],
        "not_begun": [run.name for run in runs if run.name not in {r.name for r in records}],
    }
    folder.write_json("results.json", written)
    text = [HEAD, *_summary(records, len(runs))]
    tables: dict[str, list[Record]] = {}
    for record in records:
        tables.setdefault(record.table, []).append(record)
    for table, own in tables.items():
        sinusoids = own[0].ways is None
        text += ["", f"## {_title(table)}", "", SINUSOID_CAPTION if sinusoids else OMNIGLOT_CAPTION]
        text += ["", *(sinusoid_table(own) if sinusoids else omniglot_table(own))]
        text += ["", "Run with:", "", *recipes_table(own), *_comment(results, table)]
    omniglot = [r for r in records if r.ways and "cropped" not in r.table]
    if any(r.figures for r in omniglot):
        text += ["", "## Omniglot, beside the published figures", ""]
        text += [
            "Accuracy in %, of ours on all queries of a task together (batch statistics over all "
            "of them, as in the papers), for the longest finished run of each system."
        ]
        text += ["", *published_table(omniglot), *_comment(results, "published")]
    for name, alt, picture in _pictures(tables, omniglot):
        folder.write(name, save_figure(picture))
        text += ["", f"![{alt}]({name})"]
    content = "\n".join(text) + "\n"
    folder.write("README.md", lambda path: path.write_text(content))


def _summary(records: Sequence[Record], declared: int) -> list[str]:
    if not records:
        return ["Nothing has run yet."]
    counts = {s: sum(r.state == s for r in records) for s in ("finished", "broken off", "failed")}
    lines = [
        f"Of {declared} declared runs {counts['finished']} are finished, {counts['broken off']} "
        f"broken off and {counts['failed']} failed; the others have not begun. "
        f"Seeds: {', '.join(map(str, sorted({r.seed for r in records})))}."
    ]
    machines: dict[str, int] = {}
    for r in records:
        h, v = r.hardware, r.versions
        devices = ", ".join([f"{h['processor']}, {h['cores']} cores", *h["gpus"]])
        key = (
            f"{devices}; {h['system']}, Python {h['python']}, torch {v['torch']}, hypergrad "
            f"{v['hypergrad']}; one thread a run; seconds of the {r.clock}"
        )
        machines[key] = machines.get(key, 0) + 1
    return [*lines, "", *(f"- {count} runs: {machine}" for machine, count in machines.items())]


def _title(table: str) -> str:
    if table in TITLES:
        return TITLES[table]
    _, setting, length = table.split("/")
    return f"Omniglot, {setting}, {length.replace('-', ' ')} each"


def _comment(results: Path, table: str) -> list[str]:
    path = results / COMMENTS / f"{table.replace('/', '-')}.md"
    return ["", path.read_text().strip()] if path.is_file() else []


def _pictures(
    tables: dict[str, list[Record]], omniglot: Sequence[Record]
) -> list[tuple[str, str, Figure]]:
    found = []
    sinusoids = {
        TITLES[t].removeprefix("Sinusoids, "): own for t, own in tables.items() if t in TITLES
    }
    if any(r.figures for own in sinusoids.values() for r in own):
        found.append((
            "sinusoids.png", "Error of each system on each seed, the mean as a dash",
            draw_sinusoids(sinusoids),
        ))  # fmt: skip
    curves = {
        _title(t).removeprefix("Omniglot, "): own
        for t, own in tables.items()
        if own[0].ways and any(len(r.curve) > 1 and math.isfinite(r.seconds) for r in own)
    }
    if curves:
        found.append(("curves.png", "Learning curves on Omniglot", draw_curves(curves)))
    if any(r.figures for r in omniglot):
        found.append((
            "published.png", "Accuracy of each system here, and as published",
            draw_published(omniglot),
        ))  # fmt: skip
    return found
