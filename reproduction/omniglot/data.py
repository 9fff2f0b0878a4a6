"""Omniglot as one tensor on the device, and batches of N-way K-shot tasks drawn from it.

Lake, Salakhutdinov and Tenenbaum, Science 350 (2015): 1,623 characters from 50
alphabets, each drawn once by 20 people. The pictures are brought to 28 x 28
once; from then on a batch of tasks is a few indexing operations on the device.

    images = load_omniglot(data_dir, download=True)
    split = split_characters(images)
    train = with_rotations(split.train).to(device)
    generator = torch.Generator(device).manual_seed(0)
    tasks = sample_tasks(train, tasks=16, ways=5, shots=1, queries=5, generator=generator)
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from reproduction.method.episodes import Episodes
from reproduction.omniglot import archive
from reproduction.omniglot.archive import (
    BASE_URL,
    DRAWINGS,
    FULL,
    SMALL,
    Archive,
    Bitmaps,
    OmniglotError,
    merge,
    read_npz,
    read_zip,
)

SIDE = 28
DATA_DIR_VARIABLE = "OMNIGLOT_DIR"

# The split is part of the experiment's definition: it does not move with --seed.
# Hashes, and not a generator's stream, so that no release of any library moves it.
SPLIT_SEED = 20151211
SPLIT_SIZES = (1100, 100, 423)
MIN_CHARACTERS = 20

_RESIZE_CHARACTERS = 64  # at a time: 56 MB of float32


class Split(NamedTuple):
    """Characters that no two of the three share, each uint8 [characters, 20, 28, 28]."""

    train: Tensor
    validation: Tensor
    test: Tensor


def find_data_dir(data_dir: str | Path | None) -> Path | None:
    """Return `data_dir`, else what the variable OMNIGLOT_DIR says, else None."""
    chosen = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    return Path(chosen).expanduser() if chosen else None


def load_omniglot(
    data_dir: str | Path | None = None,
    *,
    subset: Literal["full", "small"] = "full",
    download: bool = False,
    base_url: str = BASE_URL,
    side: int = SIDE,
) -> Tensor:
    """Read the data set and bring its pictures to 28 x 28.

    Each of the two parts may lie in the folder as the official archive
    (`images_background.zip`, `images_evaluation.zip`) or as an array of the same
    name (`.npz`, see `archive.read_npz`); the archive comes first.

    Parameters
    ----------
    data_dir
        The folder. None: the environment variable OMNIGLOT_DIR.
    subset
        'full', 1,623 characters, or 'small', the 242 different ones of the two
        small official archives, for trying things out.
    download
        Fetch official archives that are missing. The network is not used otherwise.
    base_url
        Where from.
    side
        105 keeps the pictures as they are, in a third of a gigabyte.

    Returns
    -------
    uint8 tensor [characters, 20, side, side]
        Ink 255, paper 0.

    Raises
    ------
    OmniglotError
        If there is no folder, a file is missing and not to be fetched, or a file
        fails its tests.
    """
    folder = find_data_dir(data_dir)
    if folder is None:
        raise OmniglotError(
            f"no data folder: pass --data-dir or set {DATA_DIR_VARIABLE} (with --download the "
            "official archives are fetched into it), or use --smoke, which draws its own characters"
        )
    parts = FULL if subset == "full" else SMALL
    if download:
        for part in parts:
            if not (folder / f"{part.name}.npz").is_file():
                archive.download(part, folder, base_url=base_url)
    if subset == "small":
        both = merge([read_zip(_find(p, folder, (".zip",)), md5=p.md5) for p in parts])
        return to_tensor(both, side)
    return torch.cat([to_tensor(_read_part(part, folder), side) for part in parts])


def to_tensor(images: Bitmaps, side: int = SIDE) -> Tensor:
    """Bring drawings to 28 x 28, or to another size.

    Parameters
    ----------
    images
        bool [characters, 20, height, width], True is ink.
    side
        Height and width of the result.

    Returns
    -------
    uint8 tensor [characters, 20, side, side]
        Grey levels of an antialiased bilinear interpolation: ink 255, paper 0.
    """
    resized = []
    for start in range(0, len(images), _RESIZE_CHARACTERS):
        ink = torch.from_numpy(images[start : start + _RESIZE_CHARACTERS].astype(np.float32))
        small = F.interpolate(ink, size=(side, side), mode="bilinear", antialias=True)
        resized.append((small * 255).round().to(torch.uint8))
    return torch.cat(resized)


def draw_characters(characters: int = 120, *, seed: int = 0) -> Tensor:
    """Draw characters of random strokes, for runs without the data set.

    A character is three quadratic curves with random control points, and each of
    its 20 drawings moves these points a little.

    Parameters
    ----------
    characters
        How many.
    seed
        Of the strokes; the same seed draws the same characters.

    Returns
    -------
    uint8 tensor [characters, 20, 28, 28]
        Ink 255, paper 0.
    """
    generator = torch.Generator().manual_seed(seed)
    strokes = 3
    points = 4 + (SIDE - 8) * torch.rand(characters, 1, strokes, 3, 2, generator=generator)
    points = points + torch.randn(characters, DRAWINGS, strokes, 3, 2, generator=generator)
    t = torch.linspace(0, 1, 24)
    bernstein = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], dim=-1)
    curve = (bernstein @ points).flatten(2, 3)  # [characters, 20, strokes * 24, 2]
    pixels = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).float()
    images = [torch.cdist(pixels.expand(DRAWINGS, -1, -1), one).amin(-1) for one in curve]
    ink = (1.6 - torch.stack(images)).clamp(0, 1)
    return (ink * 255).round().to(torch.uint8).reshape(characters, DRAWINGS, SIDE, SIDE)


def split_characters(images: Tensor) -> Split:
    """Divide the characters: 1,100 to train, 100 to validate, 423 to test.

    The same characters go to the same part in every run, see `SPLIT_SEED`. Any
    other number than 1,623 is divided in the same proportion.

    Parameters
    ----------
    images
        [characters, ...], in the order in which `load_omniglot` returns them.

    Returns
    -------
    Split
        The three parts.

    Raises
    ------
    ValueError
        If a part would be empty.
    """
    count = len(images)
    if count < MIN_CHARACTERS:
        raise ValueError(
            f"{count} characters are too few to split in three, {MIN_CHARACTERS} or more can be"
        )
    total = sum(SPLIT_SIZES)
    train = count * SPLIT_SIZES[0] // total
    validation = -(-count * SPLIT_SIZES[1] // total)  # rounded up: the smallest part
    order = torch.tensor(sorted(range(count), key=_split_key), device=images.device)
    parts = torch.tensor_split(order, (train, train + validation))
    return Split(*(images[part] for part in parts))


def with_rotations(images: Tensor) -> Tensor:
    """Append each character turned by 90, 180 and 270 degrees, as classes of their own.

    Parameters
    ----------
    images
        [characters, 20, 28, 28].

    Returns
    -------
    Tensor [4 * characters, 20, 28, 28]
        Class c + k * characters is character c turned k times by 90 degrees.
    """
    return torch.cat([torch.rot90(images, turns, (-2, -1)) for turns in range(4)])


def sample_tasks(
    images: Tensor,
    *,
    tasks: int,
    ways: int,
    shots: int,
    queries: int,
    generator: torch.Generator | None = None,
    crop: Callable[[Tensor], Tensor] | None = None,
) -> Episodes:
    """Draw a batch of tasks, on the device of `images`, without a loop.

    Parameters
    ----------
    images
        uint8 [classes, drawings, 28, 28], or of another size, the classes to draw from.
    tasks
        T, at least 1.
    ways
        N different classes in each task.
    shots
        K labelled drawings of each class, the support set.
    queries
        Q further drawings of each class.
    generator
        On the same device; None: torch's own.
    crop
        From the uint8 drawings that were picked to the part of each that is used.

    Returns
    -------
    Episodes
        `support_x` float32 [T, N*K, 1, 28, 28] with ink 1 and paper 0, `support_y`
        int64 [T, N*K], `query_x` [T, N*Q, 1, 28, 28] and `query_y` [T, N*Q]; the
        rows of a task are sorted by class.

    Raises
    ------
    ValueError
        If there are not as many classes or drawings.
    """
    classes, drawings = images.shape[:2]
    for name, value in {"tasks": tasks, "ways": ways, "shots": shots, "queries": queries}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if ways > classes:
        raise ValueError(f"ways must be at most {classes}, the number of classes, got {ways}")
    if shots + queries > drawings:
        raise ValueError(
            f"shots + queries must be at most {drawings}, the drawings of a character, "
            f"got {shots} + {queries}"
        )
    device = images.device
    # The positions of the N largest of uniform numbers are N different positions.
    scores = torch.rand(tasks, classes, generator=generator, device=device)
    chosen = scores.topk(ways, dim=1).indices
    scores = torch.rand(tasks, ways, drawings, generator=generator, device=device)
    order = scores.topk(shots + queries, dim=2).indices
    picked = images[chosen[:, :, None], order]  # [T, N, K + Q, 28, 28]
    picked = (picked if crop is None else crop(picked)).float() / 255
    size = picked.shape[-2:]
    labels = torch.arange(ways, device=device)
    return Episodes(
        support_x=picked[:, :, :shots].reshape(tasks, ways * shots, 1, *size),
        support_y=labels.repeat_interleave(shots).repeat(tasks, 1),
        query_x=picked[:, :, shots:].reshape(tasks, ways * queries, 1, *size),
        query_y=labels.repeat_interleave(queries).repeat(tasks, 1),
    )


def _find(part: Archive, folder: Path, suffixes: tuple[str, ...]) -> Path:
    for suffix in suffixes:
        path = folder / f"{part.name}{suffix}"
        if path.is_file():
            return path
    names = " or ".join(f"{part.name}{suffix}" for suffix in suffixes)
    raise OmniglotError(
        f"no {names} in {folder}: run again with --download, or put the official archive there "
        f"({BASE_URL}/{part.filename}), or use --smoke, which draws its own characters"
    )


def _read_part(part: Archive, folder: Path) -> Bitmaps:
    path = _find(part, folder, (".zip", ".npz"))
    if path.suffix == ".npz":
        return read_npz(path)
    return merge([read_zip(path, md5=part.md5)])


def _split_key(character: int) -> bytes:
    return hashlib.sha256(f"{SPLIT_SEED}:{character}".encode()).digest()
