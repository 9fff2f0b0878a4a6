"""A training in one file: a line that identifies it, a line of JSON, and the tensors' bytes.

Reading one runs nothing, unpacks nothing and allocates no more than the file's own size: there is
no pickle in it, and no compression. The first line carries the length and the SHA-256 digest of
all that follows, so that a truncated file and a flipped bit are told apart, and both are seen.
"""

import hashlib
import json
import math
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1

_FIRST_LINE = re.compile(rb"imaml-checkpoint (\d{1,9}) ([0-9a-f]{64}) (\d{1,18})\n")
_FIRST_LINE_BYTES = 128
_MAX_DIMENSIONS = 16
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16,
        torch.int64, torch.int32, torch.uint8,
    )
}  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used: the message says which one and why."""


@dataclass(frozen=True)
class Checkpoint:
    """What is kept of a training.

    Parameters
    ----------
    configuration
        What the training was started with.
    figures
        Its numbers and records, of the kinds that JSON knows.
    tensors
        Its tensors by name.
    """

    configuration: dict[str, Any]
    figures: dict[str, Any]
    tensors: dict[str, Tensor]

    def encode(self) -> bytes:
        """Return the content of the file."""
        described, pieces = [], []
        for name, tensor in self.tensors.items():
            described.append([name, str(tensor.dtype).removeprefix("torch."), [*tensor.shape]])
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            pieces.append(flat.view(torch.uint8).numpy().tobytes())
        text = json.dumps({
            "configuration": self.configuration,
            "figures": self.figures,
            "tensors": described,
        })
        body = b"".join([text.encode(), b"\n", *pieces])
        digest = hashlib.sha256(body).hexdigest()
        return f"imaml-checkpoint {FORMAT} {digest} {len(body)}\n".encode() + body

    @classmethod
    def decode(cls, content: bytes, name: str) -> "Checkpoint":
        """Read the content of a file.

        Parameters
        ----------
        content
            From `encode`, or from anywhere.
        name
            What to call it in an error.

        Returns
        -------
        Checkpoint
            What was encoded.

        Raises
        ------
        CheckpointError
            If it is not exactly what `encode` returned.
        """
        digest, length = _read_first_line(content[:_FIRST_LINE_BYTES], name)
        body = content[content.index(b"\n") + 1 :]
        _compare_length(len(body), length, name)
        found = hashlib.sha256(body).hexdigest()
        if found != digest:
            raise CheckpointError(
                f"{name} is damaged, a bit flipped or more: it has SHA-256 {found[:12]}..., "
                f"written was {digest[:12]}..."
            )
        text, _, rest = body.partition(b"\n")
        try:
            document = json.loads(text)
            configuration, figures = document["configuration"], document["figures"]
            return cls(dict(configuration), dict(figures), _read_tensors(document["tensors"], rest))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{name} is no checkpoint of these programs: {error}") from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    Checkpoint
        What is in it.

    Raises
    ------
    CheckpointError
        If it cannot be read, is truncated or damaged, or is something else.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        with path.open("rb") as file:
            start = file.read(_FIRST_LINE_BYTES)
            # Before the rest is read: a foreign file may be of any size.
            length = _read_first_line(start, str(path))[1] + start.index(b"\n") + 1
            _compare_length(path.stat().st_size, length, str(path))
            return Checkpoint.decode(start + file.read(length), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _read_first_line(start: bytes, name: str) -> tuple[str, int]:
    """Return digest and length of what follows."""
    match = _FIRST_LINE.match(start)
    if match is None:
        raise CheckpointError(
            f"{name} is no checkpoint of these programs, or its first line is damaged"
        )
    if int(match[1]) != FORMAT:
        raise CheckpointError(
            f"{name} has format {int(match[1])}; this version reads format {FORMAT}"
        )
    return match[2].decode(), int(match[3])


def _compare_length(found: int, expected: int, name: str) -> None:
    if found < expected:
        raise CheckpointError(f"{name} is truncated: {found:,} bytes of {expected:,}")
    if found > expected:
        raise CheckpointError(f"{name} is damaged: {found:,} bytes where {expected:,} were written")


def _read_tensors(described: list[Any], content: bytes) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    start = 0
    for name, kind, shape in described:
        if len(shape) > _MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError("a shape is not one")
        dtype, count = _DTYPES[kind], math.prod(shape)
        end = start + count * dtype.itemsize
        if end > len(content):
            raise ValueError("its tensors are larger than the file")
        # A copy of its own for each, which is aligned.
        piece = bytearray(content[start:end])
        flat = torch.frombuffer(piece, dtype=dtype) if piece else torch.empty(0, dtype=dtype)
        tensors[str(name)] = flat.view(shape)
        start = end
    if start != len(content):
        raise ValueError("bytes are left over after its tensors")
    return tensors
