"""Crops of whole pictures, and the pipeline that is made of them."""

import json

import pytest
import torch

from reproduction.omniglot.crops import centre_crops, random_crops
from reproduction.omniglot.data import draw_characters, sample_tasks, to_tensor
from reproduction.runs.omniglot import OmniglotBenchmark, main, read_command_line


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("OMNIGLOT_DIR", raising=False)


def numbered(side):
    """Return a picture whose pixels tell where they are: 1 + row * side + column."""
    return (1 + torch.arange(side * side)).view(1, side, side)


def test_a_random_crop_is_a_window_of_the_picture_in_its_margin():
    pictures = numbered(10).expand(400, 10, 10)
    crops = random_crops(pictures, torch.Generator().manual_seed(0), side=6, padding=3)

    assert crops.shape == (400, 6, 6)
    padded = torch.nn.functional.pad(pictures[0], (3,) * 4)
    windows = padded.unfold(0, 6, 1).unfold(1, 6, 1).reshape(-1, 36)
    found = [(windows == crop.flatten()).all(1).nonzero().flatten().tolist() for crop in crops]
    assert all(len(places) == 1 for places in found)
    places = torch.tensor(found).flatten()
    rows, columns = places // 11, places % 11  # 16 - 6 + 1 places along each side
    for coordinate in (rows, columns):
        assert coordinate.unique().tolist() == list(range(11))
    assert abs(torch.corrcoef(torch.stack([rows, columns]).double())[0, 1]) < 0.15


def test_random_crops_follow_the_generator_and_keep_leading_dimensions():
    pictures = torch.randint(256, (2, 3, 4, 105, 105), dtype=torch.uint8)
    first = random_crops(pictures, torch.Generator().manual_seed(1))
    again = random_crops(pictures, torch.Generator().manual_seed(1))
    other = random_crops(pictures, torch.Generator().manual_seed(2))

    assert first.shape == (2, 3, 4, 80, 80)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_centre_crop_leaves_equal_margins():
    crop = centre_crops(numbered(9), side=5)

    assert crop.shape == (1, 5, 5)
    assert crop[0, 0, 0] == 1 + 2 * 9 + 2
    assert crop[0, -1, -1] == 1 + 6 * 9 + 6


def test_tasks_are_drawn_and_then_cut():
    images = to_tensor(torch.rand(5, 20, 105, 105).numpy() < 0.5, side=105)
    tasks = sample_tasks(
        images, tasks=2, ways=3, shots=1, queries=2, crop=centre_crops,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip

    assert tasks.support_x.shape == (2, 3, 1, 80, 80)
    assert tasks.query_x.shape == (2, 6, 1, 80, 80)
    middles = images[..., 12:92, 12:92].flatten(0, 1).float() / 255
    for picture in tasks.support_x[:, :, 0].flatten(0, 1):
        assert (middles == picture).flatten(1).all(1).any()


def test_whole_pictures_are_kept_as_they_are():
    ink = torch.rand(2, 20, 105, 105) < 0.3

    assert torch.equal(to_tensor(ink.numpy(), side=105), 255 * ink.to(torch.uint8))


def test_the_pipeline_trains_on_1200_of_1623_characters(monkeypatch):
    drawn = draw_characters(20).repeat(82, 1, 1, 1)[:1623, :, :4, :4]
    number = torch.arange(1623)
    drawn[:, 0, 0, 0], drawn[:, 0, 0, 1] = (number % 256).byte(), (number // 256).byte()
    monkeypatch.setattr("reproduction.runs.omniglot.load_omniglot", lambda *a, **k: drawn)
    settings = read_command_line(["--pipeline", "cropped", "--device", "cpu"])
    parts = OmniglotBenchmark.build(settings).characters

    assert [len(part) for part in parts] == [1200, 100, 423]
    train, validation, test = (
        {int(c[0, 0, 0]) + 256 * int(c[0, 0, 1]) for c in part} for part in parts
    )
    assert len(train | test) == 1623
    assert validation <= train


def test_training_tasks_move_and_test_tasks_do_not(tmp_path):
    settings = read_command_line([
        "--smoke",
        "--pipeline",
        "cropped",
        "--ways",
        "2",
        "--device",
        "cpu",
        "--channels",
        "4",
    ])
    benchmark = OmniglotBenchmark.build(settings)
    network = benchmark.build_network()

    tasks = benchmark.sample(3, torch.Generator().manual_seed(0))
    assert tasks.support_x.shape == (3, 2, 1, 80, 80)
    assert network(tasks.support_x[0]).shape == (2, 2)
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size, c.padding) for c in convolutions] == 4 * [
        (4, (3, 3), (1, 1))
    ]
    first, again = benchmark.first_test_task(), benchmark.first_test_task()
    assert torch.equal(first.support_x, again.support_x)
    middles = benchmark.characters.test[..., 12:92, 12:92].flatten(0, 1).float() / 255
    assert (middles == first.query_x[0, 0, 0]).flatten(1).all(1).any()


@pytest.mark.parametrize("ways", ["5", "20"])
@pytest.mark.parametrize("shots", ["1", "5"])
def test_the_four_settings_of_the_paper(tmp_path, ways, shots):
    main([
        "--smoke", "--ways", ways, "--shots", shots, "--queries", "1", "--channels", "2",
        "--meta-steps", "1", "--tasks-per-step", "1", "--test-tasks", "2", "--inner-steps", "1",
        "--compare", "--out", str(tmp_path),
    ])  # fmt: skip

    assert json.loads((tmp_path / "config.json").read_text())["further"]["ways"] == int(ways)
    assert (tmp_path / "omniglot.png").exists()
