"""A meta-step on a GPU: nothing that waits for it, and its kernels recorded in a CUDA graph."""

from contextlib import nullcontext

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import hypergrad
from reproduction.method.episodes import Episodes
from reproduction.method.head import HeadLearner, split_head
from reproduction.method.head_newton import CrossEntropy
from reproduction.method.meta import MetaLearner
from reproduction.method.models import OmniglotConvNet
from reproduction.method.recorded import NotRecordable, RecordedMetaGradient
from reproduction.method.systems import METHODS, SYSTEMS, build_inner_solver, build_linear_solver
from reproduction.runs import sinusoid
from reproduction.runs.omniglot import RECIPES
from tests.hosts import host_is_not_asked

WAYS, TASKS = 5, 4


def learner(method, network):
    recipe, system = RECIPES[method], SYSTEMS[method]
    if system.adapted == "head":
        body, names = split_head(network)
        return HeadLearner(
            lambda params, x: functional_call(body, params, (x,)),
            names,
            CrossEntropy(),
            recipe.inner_steps,
            recipe.lam,
            build_linear_solver(system.linear_solver, 5, 0.0, recipe.lam, looks=False),
        )
    return MetaLearner(
        lambda params, x: functional_call(network, params, (x,)),
        cross_entropy,
        system.differentiation,
        build_inner_solver(recipe, system),
        recipe.lam,
        build_linear_solver(system.linear_solver, 5, 0.0, recipe.lam, looks=False),
        system.curvature,
        method=method,
    )


def tasks(device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(WAYS).expand(TASKS, WAYS)

    def images(count):
        return torch.randn(TASKS, count, 1, 28, 28, generator=generator)

    drawn = images(WAYS), labels, images(2 * WAYS), labels.repeat(1, 2)
    return Episodes(*(part.to(device) for part in drawn))


def parameters(network, device, method="imaml"):
    params = {name: leaf.detach() for name, leaf in network.named_parameters()}
    return {name: leaf.to(device) for name, leaf in learner(method, network).start(params).items()}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return OmniglotConvNet(WAYS, channels=8)


# What waits for a GPU


@pytest.mark.parametrize("method", [m for m in METHODS if m != "imaml-hf"])
def test_a_meta_step_never_waits_for_the_device(network, monkeypatch, method):
    # Tensors of the meta device have no values: whoever reads one, as a GPU is waited for, fails.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # has none there
    compute = learner(method, network).meta_gradient
    with host_is_not_asked():
        gradient, measures = compute(parameters(network, "meta", method), tasks("meta"))

    assert {leaf.device.type for leaf in gradient.values()} == {"meta"}
    assert all(measure.shape == (TASKS,) for measure in measures.values())


def test_hessian_free_steps_do_wait(network, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    with pytest.raises(hypergrad.UnsupportedOperation, match="meta device"):
        learner("imaml-hf", network).meta_gradient(parameters(network, "meta"), tasks("meta"))


# The record, by a recorder for the CPU that computes again where a graph launches again


def again(run):
    found = run()

    def replay():
        for old, new in zip(found, run(), strict=True):
            for name, value in new.items():
                old[name].copy_(value)

    return found, replay


def test_a_replay_gives_what_the_function_gives(network):
    compute = learner("imaml", network).meta_gradient
    recorded = RecordedMetaGradient(compute, "imaml", again)
    params = parameters(network, "cpu")
    for seed in range(3):
        episodes = tasks("cpu", seed)
        expected, expected_measures = compute(params, episodes)
        found, measures = recorded(params, episodes)
        for name, leaf in expected.items():
            torch.testing.assert_close(found[name], leaf)
        for name, measure in expected_measures.items():
            torch.testing.assert_close(measures[name], measure)
        for name, leaf in params.items():  # as Adam does, in place
            leaf.sub_(0.1 * expected[name])

    with pytest.raises(ValueError, match="one size"):
        recorded(params, Episodes(*(part[:2] for part in tasks("cpu"))))


def test_what_is_frozen_in_a_record_is_noticed(network):
    compute = learner("fomaml", network).meta_gradient
    frozen = RecordedMetaGradient(compute, "fomaml", lambda run: (run(), lambda: None))

    with pytest.raises(NotRecordable, match=r"fomaml gives another gradient .* \(relative"):
        frozen(parameters(network, "cpu"), tasks("cpu"))


def test_what_cannot_be_recorded_says_so(network):
    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    recorded = RecordedMetaGradient(learner("maml", network).meta_gradient, "maml", refuse)
    with pytest.raises(NotRecordable, match=r"cannot be recorded \(operation not .* capturing\):"):
        recorded(parameters(network, "cpu"), tasks("cpu"))


def test_graphs_are_refused_without_a_gpu(capsys):
    with pytest.raises(SystemExit) as stop:
        sinusoid.read_command_line(["--cuda-graphs", "--device", "cpu"])

    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said == "sinusoid: --cuda-graphs: they are for a GPU, and this is a run on the CPU\n"


@pytest.mark.gpu
@pytest.mark.parametrize("method", [m for m in METHODS if m != "imaml-hf"])
def test_on_a_cuda_device_a_graph_gives_what_the_function_gives(network, method):
    network = network.cuda()
    compute = learner(method, network).meta_gradient
    recorded = RecordedMetaGradient(compute, method)
    params = parameters(network, "cuda", method)
    for seed in range(3):
        episodes = tasks("cuda", seed)
        expected, _ = compute(params, episodes)
        found, _ = recorded(params, episodes)
        for name, leaf in expected.items():
            torch.testing.assert_close(found[name], leaf, rtol=1e-3, atol=1e-5)
