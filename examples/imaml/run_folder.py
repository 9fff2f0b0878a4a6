"""The output folder of a run: a file is written aside and renamed, so none is ever half there."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


class RunFolder:
    """A folder for what a run writes.

    Parameters
    ----------
    path
        The folder; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, save: Callable[[Path], object]) -> Path:
        """Write one file by `save`, which is given the path to write to.

        Parameters
        ----------
        name
            The file's name in the folder.
        save
            Writes the file.

        Returns
        -------
        Path
            Where the file is.
        """
        target = self.path / name
        aside = self.path / f".{os.getpid()}.{name}"
        try:
            save(aside)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
        return target

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write one JSON document."""
        return self.write(
            name, lambda path: path.write_text(json.dumps(content, indent=2, default=str) + "\n")
        )

    def write_lines(self, name: str, records: Iterable[Mapping[str, Any]]) -> Path:
        """Write one JSON document a line."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        return self.write(name, lambda path: path.write_text(text))
