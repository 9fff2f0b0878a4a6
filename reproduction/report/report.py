"""The report on what has run so far: Markdown, JSON and pictures."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from reproduction.report.pictures import (
    draw_curves,
    draw_published,
    draw_sinusoid_curves,
    draw_sinusoids,
)
from reproduction.report.plan import Planned
from reproduction.report.records import Measured, Record
from reproduction.report.tables import (
    omniglot_table,
    published_table,
    recipes_table,
    sinusoid_table,
)
from reproduction.runs.reporting import save_figure
from reproduction.runs.run_folder import RunFolder

COMMENTS = "comments"
"""A folder of the results: what people have to say on a table, by its name, is put below it."""

HEAD = """\
# What has been reproduced so far

`make reproduce` (`python -m reproduction.report`) has made the tables and pictures of this
page from the runs that had ended, or begun, by then; it goes on where it stopped. The paragraphs
below a table are written by hand, about the figures in it. The systems, and how evaluations are
counted, are described in `examples/README.md`; `results.json` has every figure, with curves.
"""

SMOKE = "**Runs of seconds, by `--smoke`: no figure on this page means anything.**\n"

TITLES = {
    "sinusoid/equal-time": "Sinusoids, at equal time, 20 seconds each",
    "sinusoid/equal-time-60-seconds": "Sinusoids, at equal time, 60 seconds each",
    "sinusoid/equal-evaluations": "Sinusoids, at equal gradient evaluations",
}
SINUSOID_CAPTION = (
    "Mean squared error on 600 unseen sinusoids after adaptation to 10 points; mean and standard "
    "deviation over the seeds. Two systems are told apart where three seeds or more are there and "
    "the 95% interval (Student's t) of the differences, seed by seed, leaves zero out."
)
ON_THE_WAY = (
    " The last column is the error on 100 validation tasks at the last validation within the "
    "fewest evaluations that a run made; the rates have then fallen by different amounts."
)
PUBLISHED_CAPTION = (
    "Accuracy in %, of ours on all queries of a task together (batch statistics over all of them, "
    "as in the papers), for the longest finished run of each system."
)
OMNIGLOT_CAPTION = (
    "Accuracy, and 95% interval over 600 tasks of unseen characters; the parameters kept are "
    "those that were best on 200 validation tasks. The interval is over tasks of one training: "
    "with one seed it does not say how far another training ends from this one, and the order of "
    "the rows is no ranking."
)


def write_report(
    records: Sequence[Record],
    measured: Sequence[Measured],
    runs: Sequence[Planned],
    results: Path,
    *,
    smoke: bool = False,
) -> None:
    """Write `README.md`, `results.json` and the pictures.

    Parameters
    ----------
    records
        The trainings, in the order of the tables.
    measured
        What other programs have measured.
    runs
        All that are declared.
    results
        Where the report goes.
    smoke
        Whether the runs were of seconds, and their figures mean nothing.
    """
    folder = RunFolder(results)
    begun = {r.name for r in records} | {m.name for m in measured}
    written = {
        "runs": [dataclasses.asdict(record) for record in records],
        "measured": {
            m.name: {
                "title": m.title,
                "table": m.table,
                "picture": m.picture.name,
                "records": m.records,
                "hardware": m.hardware,
            }
            for m in measured
        },
        "smoke": smoke,
        "not_begun": [run.name for run in runs if run.name not in begun],
    }
    folder.write_json("results.json", written)
    text = [HEAD, *([SMOKE] if smoke else []), *_summary(records, len(measured), len(runs))]

    def show(name: str, alt: str, picture: Figure) -> None:
        folder.write(name, save_figure(picture))
        text.extend(["", f"![{alt}]({name})"])

    tables: dict[str, list[Record]] = {}
    for record in records:
        tables.setdefault(record.table, []).append(record)
    sinusoids = {name: own for name, own in tables.items() if own[0].ways is None}
    by_time = {name for name in sinusoids if name.startswith("sinusoid/equal-time")}
    for name, own in sinusoids.items():
        caption = SINUSOID_CAPTION + ON_THE_WAY * (name in by_time)
        table = sinusoid_table(own, on_the_way=name in by_time)
        text += _section(name, caption, table, own, results)
    if any(r.figures for own in sinusoids.values() for r in own):
        panels = {_title(name).removeprefix("Sinusoids, "): own for name, own in sinusoids.items()}
        show("sinusoids.png", "Error of each system on each seed", draw_sinusoids(panels))
        curves = {t: own for t, own in panels.items() if own[0].table in by_time}
        show(
            "sinusoid_curves.png", "Error against seconds and evaluations",
            draw_sinusoid_curves(curves or panels),
        )  # fmt: skip
    characters = {name: own for name, own in tables.items() if own[0].ways}
    for name, own in characters.items():
        text += _section(name, OMNIGLOT_CAPTION, omniglot_table(own), own, results)
    curves = {
        _title(name).removeprefix("Omniglot, "): own
        for name, own in characters.items()
        if any(len(r.curve) > 1 for r in own)
    }
    if curves:
        show("curves.png", "Accuracy on validation tasks along the trainings", draw_curves(curves))
    resized = [r for own in characters.values() for r in own if "cropped" not in r.table]
    if any(r.figures for r in resized):
        text += ["", "## Omniglot, beside the published figures", "", PUBLISHED_CAPTION, ""]
        text += [*published_table(resized), *_comment(results, "published")]
        show("published.png", "Accuracy here and as published", draw_published(resized))
    for one in measured:
        text += ["", f"## {one.title}", "", one.table.strip(), *_comment(results, one.name)]
        if one.picture.parent != results:
            folder.write_bytes(one.picture.name, one.picture.read_bytes())
        text += ["", f"![{one.title}]({one.picture.name})"]
    content = "\n".join(text) + "\n"
    folder.write("README.md", lambda path: path.write_text(content))


def _section(
    name: str, caption: str, table: list[str], records: Sequence[Record], results: Path
) -> list[str]:
    return [
        "", f"## {_title(name)}", "", caption, "", *table,
        "", "Run with:", "", *recipes_table(records), *_comment(results, name),
    ]  # fmt: skip


def _summary(records: Sequence[Record], measured: int, declared: int) -> list[str]:
    if not records:
        return ["Nothing has run yet."]
    counts = {s: sum(r.state == s for r in records) for s in ("finished", "broken off", "failed")}
    lines = [
        f"Of {declared} declared runs {counts['finished'] + measured} are finished, "
        f"{counts['broken off']} broken off and {counts['failed']} failed; the others have not "
        "begun. "
        f"Seeds: {', '.join(map(str, sorted({r.seed for r in records})))}."
    ]
    machines: dict[str, int] = {}
    for r in records:
        h, v = (defaultdict(lambda: "unknown", one) for one in (r.hardware, r.versions))
        devices = ", ".join([f"{h['processor']}, {h['cores']} cores", *h.get("gpus", [])])
        key = (
            f"{devices}; {h['system']}, Python {h['python']}, torch {v['torch']}, hypergrad "
            f"{v['hypergrad']}; one thread a process; seconds of the {r.clock}"
        )
        machines[key] = machines.get(key, 0) + 1
    return [*lines, "", *(f"- {count} runs: {machine}" for machine, count in machines.items())]


def _title(table: str) -> str:
    if table in TITLES:
        return TITLES[table]
    _, setting, length = table.split("/")
    minutes, *cores = length.split("-on-")
    shared = f" on {cores[0].replace('-', ' ')}" if cores else " each"
    return f"Omniglot, {setting}, {minutes.replace('-', ' ')}{shared}"


def _comment(results: Path, table: str) -> list[str]:
    path = results / COMMENTS / f"{table.replace('/', '-')}.md"
    return ["", path.read_text().strip()] if path.is_file() else []
