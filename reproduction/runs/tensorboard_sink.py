"""The records of a run for TensorBoard, where it is installed."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path


def is_installed() -> bool:
    """Return whether there is a TensorBoard to write for."""
    return importlib.util.find_spec("tensorboard") is not None


class TensorBoardSink:
    """Writes each record as scalars.

    Parameters
    ----------
    folder
        Where the event files go.
    step
        The meta-step from which the run goes on; later events in the folder are hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        # Imported here: only who asks for it needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def __call__(self, record: Mapping[str, float]) -> None:
        """Write one record, and bring it to the file."""
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(record["step"]))
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
