"""What an earlier report says on runs whose folders are not here, but on another machine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from reproduction.report.plan import Planned
from reproduction.report.records import Measured, Record
from reproduction.runs.resume import Refused

Entry = TypeVar("Entry", Record, Measured)


def read_earlier(results: Path, *, smoke: bool = False) -> tuple[list[Record], list[Measured]]:
    """Read `results.json` of a report.

    Parameters
    ----------
    results
        Its folder.
    smoke
        Whether the runs of now are of seconds.

    Returns
    -------
    records : list of Record
        The trainings.
    measured : list of Measured
        What other programs have measured; without its picture it is left out.

    Raises
    ------
    Refused
        If the file is damaged, of another version, or the report of runs of the other kind: it
        would be written over.
    """
    path = results / "results.json"
    if not path.is_file():
        return [], []
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        records = [_record(one) for one in found.get("runs", [])]
        measured = [
            Measured(name=name, **{**one, "picture": results / one["picture"]})
            for name, one in found.get("measured", {}).items()
            if (results / one["picture"]).is_file()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(
            f"{path} cannot be read ({error!r}), and the report would be written over it: "
            "move it away, or choose another --results"
        ) from error
    if found.get("smoke", False) != smoke:
        kind = "real runs" if smoke else "runs of seconds (--smoke)"
        raise Refused(f"{path} is the report of {kind}: choose another --results")
    return records, measured


def together(
    now: Sequence[Entry], earlier: Sequence[Entry], runs: Sequence[Planned]
) -> list[Entry]:
    """Put the entries of two reports together, in the order of the declared runs.

    Parameters
    ----------
    now, earlier
        Where both have a run, the later one counts, unless the earlier one alone is finished.
    runs
        All that are declared; what is not among them any more is dropped.

    Returns
    -------
    list
        One entry a run.
    """
    known = {one.name: one for one in earlier}
    for one in now:
        before = known.get(one.name)
        if before is None or not (_finished(before) and not _finished(one)):
            known[one.name] = one
    return [known[run.name] for run in runs if run.name in known]


def _finished(entry: Record | Measured) -> bool:
    return not isinstance(entry, Record) or entry.state == "finished"


def _record(written: dict[str, Any]) -> Record:
    figures = {name: (mean, width) for name, (mean, width) in written["figures"].items()}
    curve = [(seconds, step, value) for seconds, step, value in written["curve"]]
    return Record(**{**written, "figures": figures, "curve": curve})
