"""The table that the page of results begins with: four settings, four systems."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reproduction.method.systems import Method
from reproduction.report.plan import LONG_MINUTES
from reproduction.report.published import PUBLISHED, SETTINGS, Setting
from reproduction.report.records import Record
from reproduction.report.spread import spread

COLUMNS: dict[Method, str] = {
    "imaml-head": "iMAML, last layer",
    "imaml": "iMAML, whole network",
    "maml": "MAML",
    "fomaml": "first-order MAML",
}
AS_PUBLISHED: dict[Method, tuple[tuple[Method, str], ...]] = {
    "imaml": (("imaml-gd", " by gradient descent"), ("imaml-hf", " Hessian-free")),
    "maml": (("maml", ""),),
    "fomaml": (("fomaml", ""),),
}
"""Which published rows stand below a column, and what is said of each."""


@dataclass(frozen=True)
class Group:
    """The finished runs of one system, setting and length: a seed each."""

    records: tuple[Record, ...]

    @property
    def seconds(self) -> float:
        """How long each has trained."""
        return self.records[0].seconds

    @property
    def accuracies(self) -> list[float]:
        """Return each run's accuracy on the test tasks, in %."""
        return [100 * r.figures["together"][0] for r in self.records]

    @property
    def mean(self) -> float:
        """Return the mean over the seeds, in %."""
        return spread(self.accuracies).mean

    @property
    def reach(self) -> tuple[float, float]:
        """Return how far the figure may lie below and above its mean, in %.

        Of one run the 95% interval over the test tasks; of several the lowest and highest.
        """
        if len(self.records) == 1:
            width = 100 * self.records[0].figures["together"][1]
            return width, width
        return self.mean - min(self.accuracies), max(self.accuracies) - self.mean

    def __str__(self) -> str:
        """Return what the table says."""
        length, low, high = self.records[0].length, min(self.accuracies), max(self.accuracies)
        if len(self.records) == 1:
            return f"{self.mean:.1f} ± {self.reach[0]:.1f} ({length})"
        return (
            f"{self.mean:.1f}, from {low:.1f} to {high:.1f} ({length}, {len(self.records)} seeds)"
        )


def groups(records: Iterable[Record], method: Method, setting: Setting) -> list[Group]:
    """Return what the table shows of one system in one setting.

    Parameters
    ----------
    records
        All of Omniglot's first pipeline.
    method, setting
        Which.

    Returns
    -------
    list of Group
        The runs of `LONG_MINUTES`, or where there are none of the next shorter length; and those
        of the greatest length. Empty where none is finished.
    """
    tables: dict[str, list[Record]] = {}
    for r in records:
        if (r.method, (r.ways, r.shots), r.state) == (method, setting, "finished"):
            tables.setdefault(r.table, []).append(r)
    found = sorted((Group(tuple(own)) for own in tables.values()), key=lambda g: g.seconds)
    short = [g for g in found if g.seconds * g.records[0].processes < 60 * (LONG_MINUTES + 1)]
    return [*short[-1:], *(g for g in found[-1:] if g not in short)]


def first_table(records: Sequence[Record]) -> list[str]:
    """Show the four settings: ours with budget, and what is published below it.

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
        "| setting | | " + " | ".join(COLUMNS.values()) + " |",
        "| --- | --- |" + " --- |" * len(COLUMNS),
    ]
    for setting in SETTINGS:
        name = f"{setting[0]}-way {setting[1]}-shot"
        cells = [_ours(records, method, setting) for method in COLUMNS]
        lines.append(f"| {name} | here | {' | '.join(cells)} |")
        cells = [_published(method, setting) for method in COLUMNS]
        lines.append(f"| | published | {' | '.join(cells)} |")
    return lines


def _ours(records: Sequence[Record], method: Method, setting: Setting) -> str:
    shown = groups(records, method, setting)
    return "; ".join(map(str, shown)) or "not run yet"


def _published(method: Method, setting: Setting) -> str:
    cells = []
    for row, said in AS_PUBLISHED.get(method, ()):
        mean, width = PUBLISHED[row, setting]
        cells.append(f"{mean:g} ± {width:g}{said}")
    return "; ".join(cells) or "-"
