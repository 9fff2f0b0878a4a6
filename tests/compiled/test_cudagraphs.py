"""A recorded program: on static buffers, without a look from the host, and right at new inputs."""

import contextlib
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hypergrad
from hypergrad._compiled.cudagraphs import WAITING, recorded
from hypergrad._compiled.run import runner
from tests.compiled_programs import (
    draw,
    exact,
    graph_of,
    graph_of_a_hypergradient,
    hypergradient,
)

aten = torch.ops.aten


class NoLook(TorchDispatchMode):
    """Refuses what reads a value on the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in {aten._local_scalar_dense.default, *WAITING}
        return function(*args, **(kwargs or {}))


class Tape:
    """What a CUDA graph does, on the CPU: the same operations on the same tensors."""

    def record(self, body):
        self._body = body
        with NoLook():
            self._outputs = body()
        return self._outputs

    def replay(self):
        with NoLook():
            for kept, new in zip(self._outputs, self._body(), strict=True):
                kept.copy_(new)


class Cpu:
    def __init__(self):
        self.tapes = 0

    def recorder(self):
        self.tapes += 1
        return Tape()

    def in_order(self):
        return contextlib.nullcontext()


def on_tape(graph, inputs):
    device = Cpu()
    return recorded(graph.graph, graph.forms, graph.constants, inputs, device), device


def test_a_recorded_hypergradient_is_right_at_new_inputs():
    graph, inputs = graph_of_a_hypergradient()
    run, device = on_tape(graph, inputs)
    whole = runner(graph.graph, graph.constants)
    assert device.tapes >= 1
    for seed in (1, 2, 1):
        _, new = graph_of_a_hypergradient(seed=seed)
        before = [t.clone() for t in new]
        for ours, theirs in zip(run(*new), whole(*new), strict=True):
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
        assert all(map(torch.equal, new, before))


def test_what_a_replay_returns_stays_as_it_is():
    graph, inputs = graph_of_a_hypergradient()
    run, _ = on_tape(graph, inputs)
    _, new = graph_of_a_hypergradient(seed=1)
    first = run(*inputs)
    kept = [t.clone() for t in first]
    second = run(*new)
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, kept, strict=True)
    )
    assert not {t.data_ptr() for t in first} & {t.data_ptr() for t in second if t.numel()}


def test_operations_that_wait_for_the_device_run_between_the_recordings():
    def function(x):
        matrix = torch.outer(x, x) + torch.eye(len(x), dtype=x.dtype)
        return [torch.linalg.eigvalsh(matrix) * 2 + 1]

    x = torch.arange(1.0, 4.0, dtype=torch.float64)
    run, device = on_tape(graph_of(function, x), [x])
    assert device.tapes == 2
    norm = (x + 1).square().sum()
    torch.testing.assert_close(run(x + 1)[0], 2 * torch.stack([norm**0, norm**0, 1 + norm]) + 1)


def test_a_program_runs_where_there_are_no_values():
    graph, inputs = graph_of_a_hypergradient()
    constants = {node: tensor.to("meta") for node, tensor in graph.constants.items()}
    outputs = runner(graph.graph, constants)(*(t.to("meta") for t in inputs))
    real = runner(graph.graph, graph.constants)(*inputs)
    # Torch 2.10 takes a number that is chosen by `where` for a vector of one.
    shapes = [[() if t.numel() == 1 else t.shape for t in tensors] for tensors in (outputs, real)]
    assert shapes[0] == shapes[1]


def test_threads_take_their_turns_on_the_static_buffers():
    graph, inputs = graph_of_a_hypergradient()
    run, _ = on_tape(graph, inputs)
    drawn = [graph_of_a_hypergradient(seed=seed)[1] for seed in (1, 2)]
    whole = runner(graph.graph, graph.constants)
    wanted, wrong = [whole(*new) for new in drawn], []

    def work(new, theirs):
        for _ in range(20):
            pairs = zip(run(*new), theirs, strict=True)
            if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
                wrong.append(1)

    threads = [threading.Thread(target=work, args=a) for a in zip(drawn, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_a_cuda_device_the_operations_run_one_by_one():
    step = hypergrad.compile(hypergradient, backend="cudagraphs")
    with pytest.warns(hypergrad.CompileWarning, match="cpu, not all on one CUDA device"):
        step(*draw())
    data = draw(seed=1)
    torch.testing.assert_close(step(*data)[0], exact(*data), rtol=1e-10, atol=0)
    strict = hypergrad.compile(hypergradient, backend="cudagraphs", on_fallback="raise")
    with pytest.raises(hypergrad.NotCompiled, match="CUDA"):
        strict(*draw())


@pytest.mark.gpu
def test_a_cuda_graph_is_right_at_new_inputs_and_draws_no_random_numbers():
    step = hypergrad.compile(hypergradient, backend="cudagraphs", on_fallback="raise")
    state = torch.cuda.get_rng_state()
    for seed in range(4):
        data = draw(seed=seed, device="cuda")
        torch.testing.assert_close(step(*data)[0], exact(*data), rtol=1e-9, atol=0)
    assert torch.equal(state, torch.cuda.get_rng_state())


@pytest.mark.gpu
def test_a_replay_of_a_cuda_graph_does_not_wait_for_the_device():
    def function(x):
        return [torch.sin(x).cumsum(0) @ x, x.exp()]

    x = torch.rand(5, dtype=torch.float64, device="cuda")
    graph = graph_of(function, x)
    run = recorded(graph.graph, graph.forms, graph.constants, [x])
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = run(x + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(outputs, function(x + 1), strict=True):
        torch.testing.assert_close(ours, theirs)
