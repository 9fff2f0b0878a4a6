"""The output folder of a run: a file appears whole or not at all, and stays after a power cut."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from reproduction.runs.ranks import is_first


class WriteFailed(RuntimeError):
    """A file could not be written: the disk is full, or the folder is not ours."""


class RunFolder:
    """A folder for what a run writes. Of several processes only the first one writes.

    Parameters
    ----------
    path
        The folder; made if it is not there. What a killed process left half-written is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if is_first():
            try:
                path.mkdir(parents=True, exist_ok=True)
                for left_over in path.glob(".*.part"):
                    left_over.unlink(missing_ok=True)
            except OSError as error:
                raise WriteFailed(f"{path} cannot be written to: {error.strerror}") from error

    def write(self, name: str, save: Callable[[Path], object]) -> Path:
        """Write one file by `save`, which is given the path to write to.

        The file is written aside, brought to disk and renamed, and so is the folder's entry.

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

        Raises
        ------
        WriteFailed
            If the system does not let it. What was there before is as it was.
        """
        target = self.path / name
        if not is_first():
            return target
        try:
            # A name that nobody can know: no link that lies there is followed.
            handle, text = tempfile.mkstemp(dir=self.path, prefix=f".{name}.", suffix=".part")
            aside = Path(text)
            try:
                save(aside)
                os.fsync(handle)
                aside.chmod(0o644)  # a temporary file is its owner's alone
                aside.replace(target)
            finally:
                os.close(handle)
                aside.unlink(missing_ok=True)
            _sync_folder(self.path)
        except OSError as error:
            kept = "the one before it is as it was" if target.exists() else "nothing was kept of it"
            raise WriteFailed(f"{target} cannot be written: {error.strerror}; {kept}") from error
        return target

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write a file of these bytes."""
        return self.write(name, lambda path: path.write_bytes(content))

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write one JSON document."""
        return self.write_bytes(name, (json.dumps(content, indent=2, default=str) + "\n").encode())

    def write_lines(self, name: str, records: Iterable[Mapping[str, Any]]) -> Path:
        """Write one JSON document a line."""
        return self.write_bytes(
            name, "".join(json.dumps(record) + "\n" for record in records).encode()
        )


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
