"""The Omniglot program, run as a user runs it, on characters of random strokes."""

import json

import pytest
import torch
from torch.nn import functional as F

from reproduction.method import meta
from reproduction.omniglot.archive import OmniglotError
from reproduction.omniglot.data import Split
from reproduction.runs.experiment import build_learner
from reproduction.runs.omniglot import OmniglotBenchmark, main, read_command_line


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("OMNIGLOT_DIR", raising=False)


@pytest.fixture
def smoke(tmp_path):
    def run(*flags, folder="run"):
        main(["--smoke", "--out", str(tmp_path / folder), *flags])
        return tmp_path / folder

    return run


def test_a_smoke_run_of_omniglot_ends_with_table_picture_and_files(smoke, capsys):
    folder = smoke()

    shown = capsys.readouterr().out
    for text in ("5-way 1-shot", "together", "one at a time", "transductive", "±"):
        assert text in shown
    assert (folder / "omniglot.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text())["further"]["ways"] == 5
    figures = json.loads((folder / "results.json").read_text())["imaml-head"]["figures"]
    assert all(0.2 < mean <= 1 for mean, _ in figures.values())
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4


def test_the_same_seed_of_omniglot_gives_the_same_metrics(smoke):
    flags = ("--ways", "3", "--queries", "2", "--test-tasks", "2", "--meta-steps", "2")
    first = smoke(*flags, folder="first")
    again = smoke(*flags, folder="again")

    assert (first / "metrics.jsonl").read_bytes() == (again / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("method", ["maml", "fomaml"])
def test_other_methods_and_settings(smoke, method):
    folder = smoke(
        "--method", method, "--ways", "2", "--shots", "2", "--queries", "1",
        "--inner-steps", "1", "--test-tasks", "2", "--meta-steps", "2",
    )  # fmt: skip

    assert list(json.loads((folder / "results.json").read_text())) == [method]


def test_without_data_the_error_says_what_to_do(tmp_path):
    with pytest.raises(OmniglotError, match="--data-dir or set OMNIGLOT_DIR"):
        main(["--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        (["--ways", "1"], "a whole number of at least 2"),
        (["--ways", "101"], "at most 100"),
        (["--shots", "16"], "at most 20"),
        (["--shots", "20", "--queries", "0"], "at least 1"),
    ],
)
def test_wrong_arguments_of_omniglot_exit_with_2_and_one_line(capsys, flags, allowed):
    with pytest.raises(SystemExit) as stop:
        main(flags)

    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert allowed in message


def test_bfloat16_is_what_casting_by_hand_computes():
    def learner_of(precision):
        settings = read_command_line(["--smoke", "--channels", "8", "--precision", precision])
        benchmark = OmniglotBenchmark.build(settings)
        torch.manual_seed(0)
        return benchmark, build_learner(settings, "imaml", benchmark)

    benchmark, narrow = learner_of("bfloat16")
    _, wide = learner_of("float32")
    torch.manual_seed(0)
    network = benchmark.build_network()
    params = {name: leaf.detach() for name, leaf in network.named_parameters()}
    batch = benchmark.sample(2, torch.Generator().manual_seed(0))
    x, y = batch.query_x[0], batch.query_y[0]

    def by_hand(params):
        first = {n.removeprefix("first."): p for n, p in params.items() if n.startswith("first.")}
        h = torch.func.functional_call(network.first, first, (x,))
        for k in range(3):
            weight = params[f"rest.{k}.0.weight"].bfloat16()
            h = F.conv2d(h.bfloat16(), weight, stride=2, padding=1).float()
            scale, shift = (params[f"rest.{k}.1.{name}"] for name in ("weight", "bias"))
            h = torch.relu(F.batch_norm(h, None, None, scale, shift, training=True))
        head = [params[f"head.{name}"].bfloat16() for name in ("weight", "bias")]
        return F.linear(h.flatten(1).bfloat16(), *head).float()

    def loss(model):
        return lambda params: F.cross_entropy(model(params), y)

    found = torch.func.grad_and_value(loss(lambda p: narrow.model(p, x)))(params)
    expected = torch.func.grad_and_value(loss(by_hand))(params)
    torch.testing.assert_close(found, expected)
    in_float32 = torch.func.grad_and_value(loss(lambda p: wide.model(p, x)))(params)
    assert found[1] != in_float32[1]

    gradient, measures = narrow.meta_gradient(params, batch)
    reference, _ = wide.meta_gradient(params, batch)
    assert {leaf.dtype for leaf in gradient.values()} == {torch.float32}
    one, other = (torch.cat([g.flatten() for g in d.values()]) for d in (gradient, reference))
    assert F.cosine_similarity(one, other, dim=0) > 0.7
    assert measures["linear_residual"].max() < 0.2


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_one_query_at_a_time_has_the_support_set_beside_it_and_nothing_else(monkeypatch, at_once):
    monkeypatch.setattr(meta, "PICTURES_AT_ONCE", at_once)
    settings = read_command_line(["--smoke", "--ways", "2", "--test-tasks", "2"])
    benchmark = OmniglotBenchmark.build(settings)
    learner = build_learner(settings, "imaml", benchmark)
    params = {name: leaf.detach() for name, leaf in benchmark.build_network().named_parameters()}
    batch = benchmark.sample(2, torch.Generator().manual_seed(0))

    every = learner.predict_one_at_a_time(params, batch)

    assert every.shape == (2, batch.query_x.shape[1], 2)
    for i, outputs in enumerate(every):
        support = batch.support_x[i]
        adapted = learner.adapt(params, support, batch.support_y[i])
        for query, found in zip(batch.query_x[i], outputs, strict=True):
            expected = learner.model(adapted, torch.cat([support, query[None]]))[-1]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(every, learner.predict(params, batch), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("ways", "queries"), [(5, 15), (20, 5)])
def test_a_test_task_has_at_most_a_hundred_queries(ways, queries):
    characters = Split(*[torch.zeros(ways, 20, 28, 28, dtype=torch.uint8)] * 3)
    benchmark = OmniglotBenchmark(characters, ways, 1, 1, 1, torch.device("cpu"))
    assert benchmark.first_test_task().query_x.shape[1] == ways * queries
