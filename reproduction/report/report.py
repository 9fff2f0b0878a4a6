"""The report on what has run so far: Markdown, JSON and pictures."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from reproduction.report.first_pictures import draw_accuracies, draw_learning
from reproduction.report.first_table import first_table
from reproduction.report.pictures import draw_curves, draw_sinusoid_curves, draw_sinusoids
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
# What has been reproduced

`make reproduce` (`python -m reproduction.report`) makes the tables and pictures of this page from
the runs that have ended; what has not run says so, and a later call goes on. The paragraphs below
a table are written by hand, about its figures. The systems and the counting of evaluations are
described in `reproduction/README.md`; `results.json` has every figure, with curves.
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
FIRST_CAPTION = (
    "Accuracy in % on 600 test tasks of characters that no training saw, a task's queries together "
    "(batch statistics over all of them, as in the papers). Ours with the minutes of training: of "
    "one run with the 95% interval over the tasks, of several seeds the mean, lowest and highest. "
    "The published figures are behind 200,000 training tasks and more. Every choice was made on "
    "validation tasks."
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
    tables: dict[str, list[Record]] = {}
    for record in records:
        tables.setdefault(record.table, []).append(record)
    page = Page(folder, results)
    page.text += [HEAD, *([SMOKE] if smoke else [])]
    _first(page, tables)
    _characters(page, tables)
    _sinusoids(page, tables)
    for one in measured:
        page.fold(one.title, [one.table.strip(), *page.comment(one.name)])
        page.keep(one.title, one.picture)
        page.end()
    page.fold("The runs, and the machines", _summary(records, len(measured), len(runs)))
    page.end()
    content = "\n".join(page.text) + "\n"
    folder.write("README.md", lambda path: path.write_text(content))


@dataclass
class Page:
    """The page as it is written: its lines, and where its pictures go."""

    folder: RunFolder
    results: Path
    text: list[str] = field(default_factory=list)

    def show(self, name: str, alt: str, picture: Figure) -> None:
        """Add a picture."""
        self.folder.write(name, save_figure(picture))
        self.text += ["", f"![{alt}]({name})"]

    def keep(self, alt: str, path: Path) -> None:
        """Add a picture that a program has drawn."""
        if path.parent != self.results:
            self.folder.write_bytes(path.name, path.read_bytes())
        self.text += ["", f"![{alt}]({path.name})"]

    def fold(self, title: str, lines: list[str]) -> None:
        """Begin a part that the reader opens; Markdown goes on after an empty line."""
        self.text += ["", "<details>", f"<summary>{title}</summary>", "", *lines]

    def end(self) -> None:
        """End that part."""
        self.text += ["", "</details>"]

    def section(
        self, name: str, caption: str, table: list[str], records: Sequence[Record]
    ) -> list[str]:
        """Return the lines of one table of runs."""
        return [
            "", f"**{_title(name)}.** {caption}", "", *table,
            "", "Run with:", "", *recipes_table(records), *self.comment(name),
        ]  # fmt: skip

    def comment(self, table: str) -> list[str]:
        """Return what people have to say on a table."""
        path = self.results / COMMENTS / f"{table.replace('/', '-')}.md"
        return ["", path.read_text().strip()] if path.is_file() else []


def _first(page: Page, tables: dict[str, list[Record]]) -> None:
    """Add the first table and its pictures."""
    resized = [r for r in _of_characters(tables) if "cropped" not in r.table]
    page.text += ["## Omniglot", "", FIRST_CAPTION, "", *first_table(resized)]
    page.text += page.comment("omniglot")
    if any(r.figures for r in resized):
        page.show(
            "accuracies.png", "Accuracy here and as published, four settings, four systems",
            draw_accuracies(resized),
        )  # fmt: skip
        page.show(
            "learning.png", "Accuracy on validation tasks against minutes of training",
            draw_learning(resized),
        )  # fmt: skip


def _characters(page: Page, tables: dict[str, list[Record]]) -> None:
    """Add what has run on Omniglot, folded by setting."""
    settings: dict[str, list[str]] = {}
    for name in tables:
        if name.startswith("omniglot/"):
            settings.setdefault(name.split("/")[1], []).append(name)
    if settings:
        page.text += ["", "## Every run on Omniglot, by setting"]
    for setting, names in settings.items():
        page.fold(_setting(setting), [])
        for name in names:
            page.text += page.section(
                name, OMNIGLOT_CAPTION, omniglot_table(tables[name]), tables[name]
            )
            if len({r.method for r in tables[name] if len(r.curve) > 1}) > 2:
                page.show(
                    f"{name.replace('/', '-')}.png", f"Along the trainings: {_title(name)}",
                    draw_curves({_title(name): tables[name]}),
                )  # fmt: skip
        page.end()
    resized = [r for r in _of_characters(tables) if "cropped" not in r.table]
    if any(r.figures for r in resized):
        table = [PUBLISHED_CAPTION, "", *published_table(resized), *page.comment("published")]
        page.fold("All systems, beside every published figure", table)
        page.end()


def _sinusoids(page: Page, tables: dict[str, list[Record]]) -> None:
    """Add what has run on sinusoids, folded by table."""
    sinusoids = {name: own for name, own in tables.items() if own[0].ways is None}
    by_time = {name for name in sinusoids if name.startswith("sinusoid/equal-time")}
    finished = any(r.figures for own in sinusoids.values() for r in own)
    panels = {_title(name).removeprefix("Sinusoids, "): own for name, own in sinusoids.items()}
    if sinusoids:
        page.text += ["", "## Sinusoids"]
    if finished:
        page.show("sinusoids.png", "Error of each system on each seed", draw_sinusoids(panels))
    for name, own in sinusoids.items():
        caption = SINUSOID_CAPTION + ON_THE_WAY * (name in by_time)
        table = sinusoid_table(own, on_the_way=name in by_time)
        page.fold(_title(name), page.section(name, caption, table, own))
        page.end()
    if finished:
        curves = {_title(name): own for name, own in sinusoids.items() if name in by_time}
        page.fold("Sinusoids, along the trainings", [])
        page.show(
            "sinusoid_curves.png", "Error against seconds and evaluations",
            draw_sinusoid_curves(curves or panels),
        )  # fmt: skip
        page.end()


def _of_characters(tables: dict[str, list[Record]]) -> list[Record]:
    return [r for own in tables.values() for r in own if r.ways]


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
    return f"Omniglot, {_setting(setting)}, {minutes.replace('-', ' ')}{shared}"


def _setting(name: str) -> str:
    """Return the words for a setting such as 5-way-1-shot-cropped."""
    ways, _, shots, _, *cropped = name.split("-")
    return f"{ways}-way {shots}-shot" + (", crops of 80 x 80 pixels" if cropped else "")
