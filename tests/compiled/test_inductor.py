"""Graphs compiled by Inductor: right at new data, in few pieces, where there is a compiler."""

import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import hypergrad
from benchmarks.imaml import MetaStep
from benchmarks.imaml_sides import with_info
from hypergrad._compiled import inductor
from hypergrad._compiled.inductor import NoCompiler, compiled
from tests.compiled_programs import Keeping, draw, exact, graph_of, hypergradient

DYNAMO, INDUCTOR = torch._dynamo.config, torch._inductor.config


def compiled_of(function, *inputs, whole=False):
    graph = graph_of(function, *inputs)
    return compiled(graph.graph, graph.forms, graph.constants, inputs, whole)


def products(matrix, x):
    """A product with a matrix and its transpose in each step."""
    for _ in range(60):
        y = torch.tanh(matrix @ x) + torch.sin(matrix @ x.square()) * 0.3
        x = torch.cos(matrix.T @ y / 20) * x.tanh() - x.abs() / (4 + x.square())
    return [x, x.norm()]


def inputs_of_products(rows=9, seed=0):
    torch.manual_seed(seed)
    return torch.randn(rows, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)


@pytest.mark.slow
def test_products_with_vectors_stay_library_calls():
    inputs = inputs_of_products()
    program, codes = run_and_get_code(compiled_of, products, *inputs)
    assert sum(code.count("aoti_torch_cpu_mm_out(") for code in codes) >= 3
    assert program.distinct < program.pieces
    new = inputs_of_products(seed=1)
    for ours, theirs in zip(program.run(*new), products(*new), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_a_kernel_gets_no_view_whose_sign_is_turned_as_it_is_read():
    X, *others = draw()
    session = Keeping()
    plain, turned = torch.complex(X, -X).imag, torch.complex(X, -X).conj().imag
    assert turned.is_neg()
    assert torch.equal(turned, X)
    for view in (turned, plain, turned):
        with session.entered():
            answer, _ = hypergradient(view, *others)
        assert not any(t.is_neg() for t in session.inputs)
        torch.testing.assert_close(answer, exact(view, *others), rtol=1e-7, atol=1e-12)


@pytest.mark.slow
def test_what_is_returned_lies_in_memory_as_without_a_compiler():
    def function(x, y):
        for _ in range(4):
            x = torch.sin(x) + torch.cos(x).square() * y.t() - torch.exp(-x.abs())
        return [x, x.t(), (x @ y).t(), torch.einsum("ij,jk->ki", x, y).unsqueeze(0) * 2]

    torch.manual_seed(0)
    inputs = torch.randn(4, 4).t(), torch.randn(4, 4)
    program = compiled_of(function, *inputs)
    for ours, theirs in zip(program.run(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()


@pytest.mark.slow
def test_the_settings_of_the_caller_stay_as_they_are():
    before = INDUCTOR.get_config_copy(), DYNAMO.get_config_copy()
    program = compiled_of(products, *inputs_of_products(), whole=True)
    assert program.distinct == program.pieces == 1
    assert (INDUCTOR.get_config_copy(), DYNAMO.get_config_copy()) == before
    new = inputs_of_products(seed=1)
    for ours, theirs in zip(program.run(*new), products(*new), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_a_compiled_hypergradient_is_exact_at_new_data_and_shapes():
    step = hypergrad.compile(hypergradient, backend="inductor", on_fallback="raise")
    rows = (30, 30, 30, 40, 40)
    for seed, many in enumerate(rows):
        data = draw(many, seed=seed)
        before = [t.clone() for t in data]
        answer, info = step(*data)
        torch.testing.assert_close(answer, exact(*data), rtol=1e-9, atol=1e-12)
        assert all(map(torch.equal, data, before))
        assert info.success
    assert sum(program.calls for program in step.session.programs) == len(rows)


@pytest.mark.slow
def test_a_compiled_meta_gradient_in_float32_is_that_without_a_compiler():
    step = MetaStep.sinusoid(2, 4)
    compiled_step = hypergrad.compile(
        with_info, backend="inductor", fixed=True, on_fallback="raise"
    )
    compiled_step(step)  # returns what it is compared with
    answer, info = compiled_step(step)
    expected, evidence = with_info(step.in_float64())
    for name, leaf in answer.items():
        off = (leaf.double() - expected[name]).norm() / expected[name].norm()
        assert off < 1e-5
    assert info.residual_norm.shape == evidence.residual_norm.shape == (2,)


@pytest.mark.slow
def test_without_a_compiler_the_operations_run_one_by_one_and_a_warning_says_so_once():
    program = """
        import warnings
        import torch, hypergrad
        from tests.compiled_programs import Keeping, draw, exact, hypergradient
        step = hypergrad.compile(hypergradient, backend="inductor")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for seed, rows in enumerate((30, 30, 40)):
                data = draw(rows, seed=seed)
                torch.testing.assert_close(step(*data)[0], exact(*data), rtol=1e-9, atol=1e-12)
        said = [w for w in told if w.category is hypergrad.CompileWarning]
        assert len(said) == 1, told
        assert "No working C++ compiler" in str(said[0].message), said
        assert "'aten' is used" in str(said[0].message), said
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "CXX": "/nonexistent"},
        check=True,
    )


def test_a_compiler_that_fails_is_named(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("lowering broke\nin the middle")

    monkeypatch.setattr(inductor, "_by_inductor", fails)
    with pytest.raises(NoCompiler, match=r"^lowering broke$"):
        compiled_of(products, *inputs_of_products())
    step = hypergrad.compile(hypergradient, backend="inductor")
    with pytest.warns(hypergrad.CompileWarning, match=r"lowering broke\. 'aten' is used"):
        step(*draw())
    data = draw(seed=1)
    torch.testing.assert_close(step(*data)[0], exact(*data), rtol=1e-9, atol=1e-12)


def test_long_compiling_is_shown_on_one_line(monkeypatch, capsys):
    with inductor._Watch(2) as watch:
        watch.next()
    assert not capsys.readouterr().err
    monkeypatch.setattr(inductor, "_PATIENCE", 0.01)
    monkeypatch.setattr(inductor, "_EVERY", 0.01)
    with inductor._Watch(2) as watch:
        for _ in range(2):
            watch.next()
            time.sleep(0.2)
    shown = capsys.readouterr().err
    assert shown.startswith("\rhypergrad.compile: piece 1 of 2, 0 s")
    assert shown.endswith("\rhypergrad.compile: piece 2 of 2, 0 s\n")


def test_one_graph_is_asked_of_inductor_alone():
    with pytest.raises(ValueError, match=r"fixed=True belongs to .*got backend='aten'"):
        hypergrad.compile(hypergradient, fixed=True)
