"""The two pictures below the first table."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reproduction.method.systems import Method
from reproduction.report.first_table import AS_PUBLISHED, COLUMNS, groups
from reproduction.report.pictures import COLOURS
from reproduction.report.published import PUBLISHED, SETTINGS, Setting
from reproduction.report.records import Record

TITLE, LABEL = 15, 13  # points: a page shows pictures smaller than they are
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200)  # minutes
LEGEND = (
    ("o", "0.3", "here, one run (95% interval over tasks)"),
    ("D", "0.3", "here, mean of several seeds (lowest to highest)"),
    ("s", "white", "published (200,000 training tasks and more)"),
)


def draw_accuracies(records: Sequence[Record]) -> Figure:
    """Draw the first table: a panel a setting, all on one scale.

    Parameters
    ----------
    records
        All of Omniglot's first pipeline.

    Returns
    -------
    Figure
        Ours with their minutes, and the published figures.
    """
    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True, sharex=True)
    for axes, setting in zip(panels.flat, SETTINGS, strict=True):
        _accuracies(axes, records, setting)
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy on 600 test tasks, %", fontsize=LABEL)
    places = [
        Line2D(
            [], [], color="0.3", linestyle="none", markersize=9, marker=marker,
            markerfacecolor=inside, label=label,
        )
        for marker, inside, label in LEGEND
    ]  # fmt: skip
    figure.legend(handles=places, loc="outside lower center", ncols=1, fontsize=LABEL)
    figure.suptitle(
        "Omniglot, unseen characters; our training time beside each point", fontsize=TITLE
    )
    return figure


def _accuracies(axes: Axes, records: Sequence[Record], setting: Setting) -> None:
    for k, method in enumerate(COLUMNS):
        for j, (row, _) in enumerate(AS_PUBLISHED.get(method, ())):
            mean, width = PUBLISHED[row, setting]
            axes.errorbar(
                k - 0.2 - 0.1 * j, mean, width, color="0.3", capsize=4, markersize=9, marker="s",
                markerfacecolor="white",
            )  # fmt: skip
        for j, group in enumerate(groups(records, method, setting)):
            marker = "o" if len(group.records) == 1 else "D"
            low, high = group.reach
            axes.errorbar(
                k + 0.15 * j, group.mean, [[low], [high]], marker=marker, capsize=4,
                color=COLOURS[method], markersize=9,
            )  # fmt: skip
            axes.annotate(
                group.records[0].length.replace(" on ", "\non "), (k + 0.15 * j, group.mean),
                xytext=(8, -4), textcoords="offset points", fontsize=LABEL - 2,
            )  # fmt: skip
    axes.set_title(
        f"{setting[0]}-way {setting[1]}-shot (chance: {100 / setting[0]:g}%)", fontsize=TITLE
    )
    names = [name.replace(", ", ",\n").replace(" MAML", "\nMAML") for name in COLUMNS.values()]
    axes.set_xticks(range(len(names)), names, fontsize=LABEL)
    axes.set_xlim(-0.5, len(names) - 0.3)
    axes.tick_params(axis="y", labelsize=LABEL)
    axes.grid(alpha=0.3, axis="y")


def draw_learning(records: Sequence[Record]) -> Figure:
    """Draw the accuracy on validation tasks against minutes, in the two settings of one shot.

    Parameters
    ----------
    records
        All of Omniglot's first pipeline.

    Returns
    -------
    Figure
        A line a finished run of the first table, and one for chance.
    """
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    settings: list[Setting] = [(5, 1), (20, 1)]
    for axes, setting in zip(panels, settings, strict=True):
        for method, name in COLUMNS.items():
            _learning(axes, records, method, name, setting)
        axes.axhline(100 / setting[0], color="0.5", linestyle="--", label="chance")
        axes.set_xscale("log")
        axes.set_ylim(0, 100)
        axes.set_title(f"{setting[0]}-way {setting[1]}-shot", fontsize=TITLE)
        axes.set_xlabel("minutes of training, one thread a process", fontsize=LABEL)
        axes.tick_params(labelsize=LABEL)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=LABEL - 1, loc="lower right", bbox_to_anchor=(1.0, 0.22))
        axes.set_xticks(TICKS, [f"{minutes:g}" for minutes in TICKS])
        axes.set_xticks([], minor=True)
        axes.set_xlim(0.5, 300)
    panels[0].set_ylabel("accuracy on 200 validation tasks, %", fontsize=LABEL)
    figure.suptitle("Omniglot along the trainings, each along its own cosine", fontsize=TITLE)
    return figure


def _learning(
    axes: Axes, records: Sequence[Record], method: Method, name: str, setting: Setting
) -> None:
    for j, group in enumerate(groups(records, method, setting)):
        for k, record in enumerate(group.records):
            axes.plot(
                [seconds / 60 for seconds, *_ in record.curve],
                [100 * value for *_, value in record.curve],
                color=COLOURS[method], linestyle=("-", ":")[j], linewidth=2,
                label=f"{name}, {record.length}" if k == 0 else None,
            )  # fmt: skip
