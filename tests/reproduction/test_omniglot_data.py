"""The Omniglot data set: fetching, testing and reading files, splitting, drawing tasks."""

import functools
import hashlib
import http.server
import io
import os
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reproduction.method.episodes import Episodes
from reproduction.omniglot import archive as omniglot_archive
from reproduction.omniglot import data as omniglot_data
from reproduction.omniglot.archive import (
    SMALL,
    Archive,
    OmniglotError,
    download,
    merge,
    read_npz,
    read_zip,
)
from reproduction.omniglot.data import (
    DATA_DIR_VARIABLE,
    draw_characters,
    load_omniglot,
    sample_tasks,
    split_characters,
    to_tensor,
    with_rotations,
)

OFFICIAL = Path(
    os.environ.get(DATA_DIR_VARIABLE, Path(__file__).parents[3] / "shared" / "data" / "omniglot")
)


def png(ink: np.ndarray) -> bytes:
    """Return a black-on-white one-bit PNG of `ink`."""
    buffer = io.BytesIO()
    Image.fromarray(~ink).save(buffer, format="PNG")
    return buffer.getvalue()


def write_archive(path: Path, characters: dict[str, np.ndarray]) -> Archive:
    """Write an archive laid out as the official ones are."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{path.stem}/", "")
        # Backwards: the reader has to sort.
        for key, images in reversed(characters.items()):
            for person, ink in reversed(list(enumerate(images, start=1))):
                archive.writestr(f"{path.stem}/{key}/0001_{person:02}.png", png(ink))
    return Archive(path.stem, hashlib.md5(path.read_bytes()).hexdigest())


@pytest.fixture
def characters() -> dict[str, np.ndarray]:
    """Three characters of random ink, in sorted order."""
    ink = np.random.default_rng(0).random((3, 20, 105, 105)) < 0.1
    names = ("Greek/character01", "Greek/character02", "Latin/character01")
    return dict(zip(names, ink, strict=True))


class _Server:
    """A folder served on the loopback interface; `truncate` breaks transfers off."""

    def __init__(self, folder: Path) -> None:
        self.requests = 0
        self.truncate = False
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests += 1
                if not outer.truncate:
                    return super().do_GET()
                content = (folder / self.path.strip("/")).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])

            def log_message(self, format: str, *args: object) -> None:
                pass

        handler = functools.partial(Handler, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[_Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    server = _Server(folder)
    yield server
    server.close()


@pytest.fixture
def served(tmp_path: Path, server: _Server, characters: dict[str, np.ndarray]) -> Archive:
    return write_archive(tmp_path / "served" / "images_background.zip", characters)


class TestDownload:
    def test_fetches_once(self, tmp_path: Path, server: _Server, served: Archive) -> None:
        for _ in range(2):
            path = download(served, tmp_path / "data", base_url=server.url)
            assert hashlib.md5(path.read_bytes()).hexdigest() == served.md5
        assert server.requests == 1
        assert os.listdir(tmp_path / "data") == ["images_background.zip"]

    def test_replaces_a_damaged_file(
        self, tmp_path: Path, server: _Server, served: Archive
    ) -> None:
        (tmp_path / served.filename).write_bytes(b"damaged")
        path = download(served, tmp_path, base_url=server.url)
        assert hashlib.md5(path.read_bytes()).hexdigest() == served.md5

    def test_wrong_bytes_are_not_kept(
        self, tmp_path: Path, server: _Server, served: Archive
    ) -> None:
        other = Archive(served.name, "0" * 32)
        with pytest.raises(OmniglotError, match=rf"MD5 {served.md5}, expected 0000"):
            download(other, tmp_path / "data", base_url=server.url)
        assert os.listdir(tmp_path / "data") == []

    def test_broken_off_transfer_is_not_kept(
        self, tmp_path: Path, server: _Server, served: Archive
    ) -> None:
        server.truncate = True
        with pytest.raises(OmniglotError, match=r"broke off after [\d,]+ of [\d,]+ bytes"):
            download(served, tmp_path / "data", base_url=server.url)
        assert os.listdir(tmp_path / "data") == []

    def test_endless_transfer_is_stopped(
        self, tmp_path: Path, server: _Server, served: Archive, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniglot_archive, "_MAX_ARCHIVE_BYTES", 1000)
        with pytest.raises(OmniglotError, match="more than 1,000 bytes"):
            download(served, tmp_path / "data", base_url=server.url)
        assert os.listdir(tmp_path / "data") == []

    def test_missing_at_the_source(self, tmp_path: Path, server: _Server) -> None:
        with pytest.raises(OmniglotError, match=r"nothing\.zip cannot be fetched: .*404"):
            download(Archive("nothing", "0" * 32), tmp_path / "data", base_url=server.url)

    def test_two_at_once(self, tmp_path: Path, server: _Server, served: Archive) -> None:
        with ThreadPoolExecutor(4) as pool:
            fetch = functools.partial(download, base_url=server.url)
            paths = list(pool.map(fetch, [served] * 4, [tmp_path / "data"] * 4))
        assert len(set(paths)) == 1
        assert os.listdir(tmp_path / "data") == ["images_background.zip"]


class TestReadZip:
    def test_order_and_ink(self, tmp_path: Path, characters: dict[str, np.ndarray]) -> None:
        archive = write_archive(tmp_path / "a.zip", characters)
        read = read_zip(tmp_path / "a.zip", md5=archive.md5)
        assert list(read) == list(characters)
        for key, images in characters.items():
            np.testing.assert_array_equal(read[key], images)

    def test_checksum(self, tmp_path: Path, characters: dict[str, np.ndarray]) -> None:
        write_archive(tmp_path / "a.zip", characters)
        with pytest.raises(OmniglotError, match=r"expected 0+: .*--download"):
            read_zip(tmp_path / "a.zip", md5="0" * 32)

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("../character01/0001_01.png", "leads outside"),
            ("a/../../character01/0001_01.png", "leads outside"),
            ("..\\x.png", "leads outside"),
            ("/etc/passwd", "leads outside"),
            ("C:/x.png", "leads outside"),
        ],
    )
    def test_paths_that_lead_outside(self, tmp_path: Path, name: str, says: str) -> None:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr(name, b"")
        with pytest.raises(OmniglotError, match=says):
            read_zip(tmp_path / "a.zip")

    def test_links(self, tmp_path: Path) -> None:
        member = zipfile.ZipInfo("a/character01/0001_01.png")
        member.external_attr = 0o120777 << 16
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr(member, "/etc/passwd")
        with pytest.raises(OmniglotError, match="link"):
            read_zip(tmp_path / "a.zip")

    def test_absurd_sizes(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/character01/0001_01.png", bytes(10_000_000))
        with pytest.raises(OmniglotError, match="10,000,000 bytes unpacked, allowed 65,536"):
            read_zip(tmp_path / "a.zip")

    def test_too_few_drawings(self, tmp_path: Path) -> None:
        ink = np.zeros((19, 105, 105), bool)
        write_archive(tmp_path / "a.zip", {"Greek/character01": ink})
        with pytest.raises(OmniglotError, match="Greek/character01 has 19 drawings, expected 20"):
            read_zip(tmp_path / "a.zip")

    def test_other_picture_size(self, tmp_path: Path) -> None:
        write_archive(tmp_path / "a.zip", {"Greek/character01": np.zeros((20, 9, 105), bool)})
        with pytest.raises(OmniglotError, match="is 105 x 9, expected 105 x 105"):
            read_zip(tmp_path / "a.zip")

    def test_no_picture_at_all(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("a/character01/0001_01.png", b"no picture")
        with pytest.raises(OmniglotError, match="not a readable PNG"):
            read_zip(tmp_path / "a.zip")

    def test_no_archive_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "a.zip").write_bytes(b"no archive")
        with pytest.raises(OmniglotError, match="not a sound zip archive"):
            read_zip(tmp_path / "a.zip")

    @pytest.mark.parametrize(("archive", "count"), [*zip(SMALL, (136, 156), strict=True)])
    def test_official_archives(self, archive: Archive, count: int) -> None:
        path = OFFICIAL / archive.filename
        if not path.is_file():
            pytest.skip(f"{path} is not there")
        read = read_zip(path, md5=archive.md5)
        assert len(read) == count
        ink = np.mean([images.mean() for images in read.values()])
        assert 0.02 < ink < 0.1


class TestReadNpz:
    def test_ink(self, tmp_path: Path, characters: dict[str, np.ndarray]) -> None:
        images = merge([characters])
        np.savez_compressed(tmp_path / "a.npz", images=~images, labels=np.zeros(3))
        np.testing.assert_array_equal(read_npz(tmp_path / "a.npz"), images)

    @pytest.mark.parametrize(
        "arrays",
        [
            {"pictures": np.zeros((1, 20, 105, 105), bool)},
            {"images": np.zeros((1, 20, 105, 105), np.uint8)},
            {"images": np.zeros((1, 19, 105, 105), bool)},
            {"images": np.array([{}], object)},
        ],
        ids=["name", "dtype", "shape", "pickled"],
    )
    def test_other_files(self, tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
        np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
        with pytest.raises(OmniglotError, match=r"expected `images`|cannot be read as `images`"):
            read_npz(tmp_path / "a.npz")


class TestLoad:
    def test_from_either_kind_of_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, characters: dict[str, np.ndarray]
    ) -> None:
        archive = write_archive(tmp_path / "images_background.zip", characters)
        other = Archive("images_evaluation", "0" * 32)
        monkeypatch.setattr(omniglot_data, "FULL", (archive, other))
        images = merge([characters])
        np.savez(tmp_path / "images_evaluation.npz", images=~images)
        loaded = load_omniglot(tmp_path)
        assert torch.equal(loaded, torch.cat([to_tensor(images)] * 2))
        monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
        assert torch.equal(load_omniglot(), loaded)

    def test_small_archives_share_characters(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        server: _Server,
        characters: dict[str, np.ndarray],
    ) -> None:
        greek = {k: v for k, v in characters.items() if k.startswith("Greek")}
        served = tmp_path / "served"
        small = (
            write_archive(served / "s1.zip", greek),
            write_archive(served / "s2.zip", characters),
        )
        monkeypatch.setattr(omniglot_data, "SMALL", small)
        loaded = load_omniglot(
            tmp_path / "data", subset="small", download=True, base_url=server.url
        )
        assert torch.equal(loaded, to_tensor(merge([characters])))

    def test_missing_files_say_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(OmniglotError, match=r"images_background\.zip or .*--download.*--smoke"):
            load_omniglot(tmp_path)
        monkeypatch.delenv(DATA_DIR_VARIABLE, raising=False)
        with pytest.raises(OmniglotError, match=rf"--data-dir .*{DATA_DIR_VARIABLE}.*--smoke"):
            load_omniglot()

    def test_resize_keeps_ink_and_extent(self) -> None:
        ink = np.zeros((1, 20, 105, 105), bool)
        ink[..., :, 60:] = True
        small = to_tensor(ink)
        assert small.shape == (1, 20, 28, 28)
        assert small.dtype == torch.uint8
        assert small[..., :15].max() == 0
        assert small[..., 17:].min() == 255


class TestSplit:
    def test_published_sizes_and_no_overlap(self) -> None:
        split = split_characters(torch.arange(1623))
        assert [len(part) for part in split] == [1100, 100, 423]
        assert torch.equal(torch.cat(split).sort().values, torch.arange(1623))

    def test_does_not_move(self) -> None:
        torch.manual_seed(1)
        split = split_characters(torch.arange(1623))
        assert [part[:4].tolist() for part in split] == SPLIT_HEADS

    def test_other_numbers_keep_the_proportion(self) -> None:
        split = split_characters(draw_characters(120))
        assert [len(part) for part in split] == [81, 8, 31]

    def test_too_few(self) -> None:
        with pytest.raises(ValueError, match="2 characters are too few"):
            split_characters(torch.arange(2))


@pytest.fixture(scope="module")
def marked() -> torch.Tensor:
    """Pictures that say which they are: pixel 0 the class, pixel 1 the drawing."""
    images = torch.zeros(40, 20, 28, 28, dtype=torch.uint8)
    images[..., 0, 0] = torch.arange(40)[:, None]
    images[..., 0, 1] = torch.arange(20)
    return images


def marks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return classes and drawings of pictures from `marked`."""
    corner = (x[:, :, 0, 0, :2] * 255).round().long()
    return corner[..., 0], corner[..., 1]


class TestSampleTasks:
    def sample(self, images: torch.Tensor, seed: int = 0) -> Episodes:
        generator = torch.Generator().manual_seed(seed)
        return sample_tasks(images, tasks=50, ways=5, shots=3, queries=17, generator=generator)

    def test_shapes(self, marked: torch.Tensor) -> None:
        batch = self.sample(marked)
        assert batch.support_x.shape == (50, 15, 1, 28, 28)
        assert batch.query_x.shape == (50, 85, 1, 28, 28)
        assert batch.support_y.shape == (50, 15)
        assert batch.query_y.shape == (50, 85)
        assert batch.support_x.dtype == batch.query_x.dtype == torch.float32
        assert batch.support_y.dtype == batch.query_y.dtype == torch.int64

    def test_classes_are_distinct_and_labels_name_them(self, marked: torch.Tensor) -> None:
        batch = self.sample(marked)
        support, _ = marks(batch.support_x)
        query, _ = marks(batch.query_x)
        for task in range(50):
            named = dict(zip(batch.support_y[task].tolist(), support[task].tolist(), strict=True))
            assert sorted(named) == [0, 1, 2, 3, 4]
            assert len(set(named.values())) == 5
            assert [named[y] for y in batch.support_y[task].tolist()] == support[task].tolist()
            assert [named[y] for y in batch.query_y[task].tolist()] == query[task].tolist()

    def test_support_and_query_are_disjoint(self, marked: torch.Tensor) -> None:
        batch = self.sample(marked)
        classes, drawings = marks(torch.cat([batch.support_x, batch.query_x], 1))
        for task in range(50):
            # 3 + 17 shots and queries of 20 drawings: each exactly once.
            pairs = set(zip(classes[task].tolist(), drawings[task].tolist(), strict=True))
            assert len(pairs) == 100

    def test_seed_decides(self, marked: torch.Tensor) -> None:
        one, same, other = (self.sample(marked, seed) for seed in (0, 0, 1))
        assert all(map(torch.equal, one, same))
        assert not torch.equal(one.support_x, other.support_x)

    def test_every_class_and_drawing_comes_up(self, marked: torch.Tensor) -> None:
        classes, drawings = marks(self.sample(marked).query_x)
        assert set(classes.flatten().tolist()) == set(range(40))
        assert set(drawings.flatten().tolist()) == set(range(20))

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            ({"ways": 0}, "ways must be at least 1, got 0"),
            ({"tasks": 0}, "tasks must be at least 1, got 0"),
            ({"queries": -1}, "queries must be at least 1, got -1"),
            ({"ways": 41}, "ways must be at most 40, the number of classes, got 41"),
            ({"shots": 6}, r"shots \+ queries must be at most 20, .* got 6 \+ 15"),
        ],
    )
    def test_errors_say_what_is_allowed(
        self, marked: torch.Tensor, wrong: dict[str, int], says: str
    ) -> None:
        sample = functools.partial(sample_tasks, marked, tasks=2, ways=5, shots=1, queries=15)
        with pytest.raises(ValueError, match=says):
            sample(**wrong)  # type: ignore[arg-type]


def test_rotations_are_further_classes() -> None:
    images = draw_characters(6)
    turned = with_rotations(images)
    assert turned.shape == (24, 20, 28, 28)
    assert torch.equal(turned[:6], images)
    for turns in range(1, 4):
        back = torch.rot90(turned[6 * turns : 6 * turns + 6], -turns, (-2, -1))
        assert torch.equal(back, images)


def test_characters_of_its_own_are_reproducible_and_distinct() -> None:
    images = draw_characters(10, seed=3)
    assert images.shape == (10, 20, 28, 28)
    assert torch.equal(images, draw_characters(10, seed=3))
    flat = images.flatten(2).float()
    within = torch.cdist(flat, flat).mean()
    means = flat.mean(1)
    between = torch.cdist(means, means).fill_diagonal_(torch.inf).min()
    assert between > 0
    assert within < torch.cdist(flat.transpose(0, 1), flat.transpose(0, 1)).mean()


SPLIT_HEADS = [[1359, 1418, 1070, 261], [805, 834, 368, 235], [1281, 1164, 596, 47]]
