"""The checkpoints of one training: the last two are kept, the newest good one is found."""

from pathlib import Path

from reproduction.runs.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from reproduction.runs.run_folder import RunFolder

KEPT = 2


class CheckpointSeries:
    """The checkpoints of one training, in the folder `checkpoints` of its run.

    Parameters
    ----------
    run
        The run's folder.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / "checkpoints"

    def find(self) -> list[Path]:
        """Return the files, the one of the latest meta-step first."""
        return sorted(self.path.glob("step-*.checkpoint"), reverse=True)

    def write(self, step: int, checkpoint: Checkpoint) -> None:
        """Write the checkpoint of a meta-step, then remove all but it and the one before it.

        Checkpoints of later steps are those of a training that was given up.
        """
        written = RunFolder(self.path).write_bytes(
            f"step-{step:09}.checkpoint", checkpoint.encode()
        )
        files = self.find()
        if written in files:
            kept = files[files.index(written) :][:KEPT]
            for path in files:
                if path not in kept:
                    path.unlink(missing_ok=True)

    def read_newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Read the newest checkpoint that is good.

        Returns
        -------
        checkpoint : Checkpoint or None
            None where there is no file at all.
        complaints : list of str
            What is wrong with those that are newer.

        Raises
        ------
        CheckpointError
            If there are files and none is good.
        """
        complaints: list[str] = []
        for path in self.find():
            try:
                return read_checkpoint(path), complaints
            except CheckpointError as error:
                complaints.append(str(error))
        if complaints:
            raise CheckpointError("; ".join([*complaints, "no good checkpoint is left"]))
        return None, []

    def clear(self) -> None:
        """Remove all of them."""
        for path in self.find():
            path.unlink(missing_ok=True)
