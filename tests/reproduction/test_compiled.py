"""Compiled meta-gradients of the examples: those of the same learner without a compiler."""

import pytest
import torch
from torch.func import functional_call

from reproduction.method.compiled import CompiledMetaGradient
from reproduction.method.episodes import Episodes
from reproduction.method.meta import MetaLearner
from reproduction.method.models import SinusoidMLP
from reproduction.method.sinusoid_tasks import SinusoidTasks
from reproduction.method.systems import SYSTEMS, build_inner_solver, build_linear_solver
from reproduction.runs import omniglot, sinusoid
from reproduction.runs.sinusoid import RECIPES

IMPLICIT = [
    method
    for method, system in SYSTEMS.items()
    if system.differentiation == "implicit" and system.adapted == "network"
]


def learner(method):
    network, recipe, system = SinusoidMLP(8).double(), RECIPES[method], SYSTEMS[method]
    made = MetaLearner(
        lambda params, x: functional_call(network, params, (x,)),
        lambda outputs, targets: (outputs - targets).square().mean(),
        system.differentiation,
        build_inner_solver(recipe, system),
        recipe.lam,
        build_linear_solver(system.linear_solver, 5, 0.0, recipe.lam),
        system.curvature,
        method=method,
    )
    return made, {name: leaf.detach() for name, leaf in network.named_parameters()}


def batches(count, tasks=4):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        drawn = SinusoidTasks(6, 8).sample(tasks, generator)
        yield Episodes(*(part.double() for part in drawn))


@pytest.mark.parametrize("method", IMPLICIT)
def test_a_compiled_meta_gradient_is_that_of_the_learner(method):
    torch.manual_seed(0)
    plain, params = learner(method)
    compiled = CompiledMetaGradient(plain.meta_gradient)
    for batch in batches(4):
        gradient, measures = compiled(params, batch)

        expected, measured = plain.meta_gradient(params, batch)
        for name, leaf in expected.items():
            torch.testing.assert_close(gradient[name], leaf, rtol=1e-7, atol=1e-9)
        for name in measured.keys() - {"products"}:  # a graph makes all steps, for solved tasks too
            torch.testing.assert_close(
                measures[name].double(), measured[name].double(), rtol=1e-6, atol=1e-7
            )
        params = {name: leaf - 0.05 * expected[name] for name, leaf in params.items()}


def test_tasks_with_negative_curvature_are_counted_by_a_compiled_step_too():
    torch.manual_seed(0)
    plain, params = learner("imaml-gd")
    compiled = CompiledMetaGradient(plain.meta_gradient)
    counts = [compiled(params, batch)[1]["negative_curvature"].sum() for batch in batches(3)]
    expected = [plain.meta_gradient(params, b)[1]["negative_curvature"].sum() for b in batches(3)]

    assert counts == expected
    assert sum(expected) > 0


def test_the_bits_of_a_step_do_not_depend_on_where_the_run_began():
    torch.manual_seed(0)
    plain, params = learner("imaml")
    whole, resumed = (CompiledMetaGradient(plain.meta_gradient) for _ in range(2))
    first, second = batches(2)
    whole(params, first)

    expected, found = whole(params, second)[0], resumed(params, second)[0]

    assert all(torch.equal(found[name], leaf) for name, leaf in expected.items())


def compiled_by_default(program, *flags):
    settings = program.read_command_line([*flags, "--device", "cpu"])
    return {method for method, recipe in settings.recipes.items() if recipe.compile}


def test_programs_compile_what_gains_unless_a_flag_says_otherwise():
    assert compiled_by_default(sinusoid) == {"imaml", "imaml-neumann", "imaml-hf"}
    assert compiled_by_default(omniglot) == set()
    assert compiled_by_default(sinusoid, "--no-compile") == set()
    assert compiled_by_default(omniglot, "--compile") >= set(IMPLICIT)


def test_graphs_of_a_gpu_are_not_recorded_of_compiled_calls(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        sinusoid.read_command_line(["--device", "cuda", "--cuda-graphs", "--compile"])

    assert capsys.readouterr().err.startswith("sinusoid: --compile: not with --cuda-graphs")
