"""Omniglot on disk: fetching the archives, testing them, reading their pictures.

Every reader returns the same thing, `images[character, drawing, row, column]`,
boolean, True where there is ink. Characters are sorted by alphabet and number
and drawings by the person who drew them, whatever the file they came from, so
that a split by position is the same split for each source.

An archive is data from elsewhere: it is tested before anything in it is used
(checksum, member paths, kinds, sizes) and is read in memory, never unpacked to disk.
"""

import dataclasses
import hashlib
import http.client
import io
import os
import re
import stat
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Bitmaps = npt.NDArray[np.bool_]

BASE_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
DRAWINGS = 20
SIDE = 105

_CHUNK = 1 << 20
_MAX_ARCHIVE_BYTES = 64 << 20  # the largest official archive has 9.5 MB
_MAX_PICTURE_BYTES = 64 << 10  # an official picture has 500 bytes at most
_MAX_ARRAY_BYTES = 1 << 30  # the largest array has 213 MB
_MAX_MEMBERS = 100_000
_TIMEOUT_SECONDS = 60.0
_PICTURE = re.compile(r"(?P<character>.+/character\d+)/\d+_(?P<drawing>\d+)\.png")


class OmniglotError(RuntimeError):
    """The data set cannot be had: the message says what is wrong and what to do."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """An official archive: its name without the suffix, and the MD5 digest of its bytes."""

    name: str
    md5: str

    @property
    def filename(self) -> str:
        """Name of the file in the data folder and at the source."""
        return f"{self.name}.zip"


FULL = (
    Archive("images_background", "68d2efa1b9178cc56df9314c21c6e718"),
    Archive("images_evaluation", "6b91aef0f799c5bb55b94e3f2daec811"),
)
SMALL = (
    Archive("images_background_small1", "e704a628b5459e08445c13499850abc4"),
    Archive("images_background_small2", "b75a71a51d3b13f821f212756fe481fd"),
)


def download(archive: Archive, data_dir: Path, *, base_url: str = BASE_URL) -> Path:
    """Fetch `archive` into `data_dir`, unless it lies there already and is whole.

    The bytes go to a temporary file in the same folder, are tested, brought to
    disk and then renamed. Two processes may do this at once: each writes its own
    file, and the last rename puts the same bytes in the same place.

    Parameters
    ----------
    archive
        What to fetch.
    data_dir
        Folder for it, made if missing.
    base_url
        Folder at the source.

    Returns
    -------
    Path
        The archive in `data_dir`.

    Raises
    ------
    OmniglotError
        If the source cannot be reached, breaks off, or sends other bytes than
        those expected. Nothing is left behind then.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    target = data_dir / archive.filename
    if target.is_file() and _md5(target) == archive.md5:
        return target
    url = f"{base_url}/{archive.filename}"
    handle, name = tempfile.mkstemp(dir=data_dir, prefix=f".{archive.filename}.", suffix=".part")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as out:
            received = _fetch(url, out)
            out.flush()
            os.fsync(out.fileno())
        digest = _md5(partial)
        if digest != archive.md5:
            raise OmniglotError(
                f"{url} sent {received:,} bytes with MD5 {digest}, expected {archive.md5}: "
                "nothing was kept. Try again, or put the official archive into "
                f"{data_dir} by hand."
            )
        partial.chmod(0o644)  # a temporary file is its owner's alone
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def read_zip(path: Path, *, md5: str | None = None) -> dict[str, Bitmaps]:
    """Read an archive of PNG files, ALPHABET/characterNN/IIII_SS.png, in memory.

    Parameters
    ----------
    path
        The archive.
    md5
        Digest its bytes must have; None skips that test, and no other.

    Returns
    -------
    dict of str to bool array [20, 105, 105]
        The drawings by 'ALPHABET/characterNN', sorted; True is ink.

    Raises
    ------
    OmniglotError
        If the digest differs, a member is not what an Omniglot archive holds (a
        path that leads outside, a link, an absurd size), a picture is not 105 x
        105, or a character does not have 20 drawings.
    """
    if path.stat().st_size > _MAX_ARCHIVE_BYTES:
        raise OmniglotError(
            f"{path} has {path.stat().st_size:,} bytes; "
            f"an Omniglot archive has {_MAX_ARCHIVE_BYTES:,} at most"
        )
    # One read: the bytes that are tested are the bytes that are used.
    content = path.read_bytes()
    if md5 is not None:
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if digest != md5:
            raise OmniglotError(
                f"{path} has MD5 {digest}, expected {md5}: the file is damaged or another one. "
                "Delete it and run again with --download."
            )
    drawings: dict[str, dict[int, Bitmaps]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            _check_members(archive, path, _MAX_PICTURE_BYTES)
            for member in archive.infolist():
                match = _PICTURE.fullmatch(member.filename)
                if match is None:
                    continue
                # The first folder repeats the archive's name: characters keep
                # the same key in each archive that holds them.
                key = "/".join(match["character"].split("/")[-2:])
                # No more than it says: a member that says too little unpacks to no more either.
                with archive.open(member) as file:
                    content = file.read(member.file_size)
                picture = _read_picture(content, f"{path}: {member.filename}")
                drawings.setdefault(key, {})[int(match["drawing"])] = picture
    except zipfile.BadZipFile as error:
        raise OmniglotError(f"{path} is not a sound zip archive: {error}") from error
    if not drawings:
        raise OmniglotError(f"{path} holds no ALPHABET/characterNN/IIII_SS.png")
    for key, by_person in drawings.items():
        if len(by_person) != DRAWINGS:
            raise OmniglotError(f"{path}: {key} has {len(by_person)} drawings, expected {DRAWINGS}")
    return {
        key: np.stack([by_person[person] for person in sorted(by_person)])
        for key, by_person in sorted(drawings.items())
    }


def read_npz(path: Path) -> Bitmaps:
    """Read `images` of an .npz file: bool [characters, 20, 105, 105], True is paper.

    Parameters
    ----------
    path
        The file. Pickled objects in it are refused.

    Returns
    -------
    bool array [characters, 20, 105, 105]
        The drawings in the file's order; True is ink.

    Raises
    ------
    OmniglotError
        If it is no such file.
    """
    expected = f"`images`, bool [characters, {DRAWINGS}, {SIDE}, {SIDE}]"
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive, path, _MAX_ARRAY_BYTES)
        with np.load(path, allow_pickle=False) as arrays:
            if "images" not in arrays:
                raise OmniglotError(f"{path} holds {sorted(arrays)}, expected {expected}")
            images = arrays["images"]
    except (zipfile.BadZipFile, ValueError, EOFError, MemoryError) as error:
        # MemoryError: the array's own header may promise any shape.
        raise OmniglotError(f"{path} cannot be read as {expected}: {error}") from error
    if images.dtype != np.bool_ or images.shape[1:] != (DRAWINGS, SIDE, SIDE) or not len(images):
        raise OmniglotError(
            f"{path}: `images` is {images.dtype} {list(images.shape)}, expected {expected}"
        )
    ink: Bitmaps = ~images
    return ink


def merge(parts: list[Mapping[str, Bitmaps]]) -> Bitmaps:
    """Join what `read_zip` returned, in the order given; a character met again counts once.

    The two small archives share characters of two alphabets.

    Parameters
    ----------
    parts
        Drawings by character.

    Returns
    -------
    bool array [characters, 20, 105, 105]
        All of them; True is ink.
    """
    characters: dict[str, Bitmaps] = {}
    for part in parts:
        for key, images in part.items():
            characters.setdefault(key, images)
    return np.stack(list(characters.values()))


def _fetch(url: str, out: io.BufferedIOBase) -> int:
    """Copy the bytes at `url` to `out`; return their number."""
    advice = "Check the network, or put the official archives into the data folder by hand."
    received = 0
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            announced = response.headers.get("Content-Length")
            while chunk := response.read(_CHUNK):
                received += len(chunk)
                if received > _MAX_ARCHIVE_BYTES:
                    raise OmniglotError(
                        f"{url} sends more than {_MAX_ARCHIVE_BYTES:,} bytes: stopped"
                    )
                out.write(chunk)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, OSError) as error:
        raise OmniglotError(f"{url} cannot be fetched: {error}. {advice}") from error
    if announced is not None and received != int(announced):
        raise OmniglotError(
            f"{url} broke off after {received:,} of {int(announced):,} bytes. {advice}"
        )
    return received


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _check_members(archive: zipfile.ZipFile, path: Path, max_bytes: int) -> None:
    """Refuse members that an Omniglot file has no use for."""
    members = archive.infolist()
    if len(members) > _MAX_MEMBERS:
        raise OmniglotError(f"{path} has {len(members):,} members, allowed {_MAX_MEMBERS:,}")
    for member in members:
        name = member.filename
        if name.startswith(("/", "\\")) or ":" in name or ".." in re.split(r"[/\\]", name):
            raise OmniglotError(f"{path}: the member {name!r} leads outside the archive")
        # The upper half holds the Unix mode, 0 where the archive was made elsewhere.
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise OmniglotError(f"{path}: the member {name!r} is a link or a device")
        if member.file_size > max_bytes:
            raise OmniglotError(
                f"{path}: the member {name!r} has {member.file_size:,} bytes unpacked, "
                f"allowed {max_bytes:,}"
            )


def _read_picture(content: bytes, where: str) -> Bitmaps:
    """Decode one PNG file; True is ink."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
            if picture.size != (SIDE, SIDE):  # read from the header, before decoding
                raise OmniglotError(
                    f"{where} is {picture.size[0]} x {picture.size[1]}, expected {SIDE} x {SIDE}"
                )
            return np.asarray(picture.convert("L")) < 128
    except (OSError, SyntaxError) as error:
        raise OmniglotError(f"{where} is not a readable PNG file: {error}") from error
