"""The benchmark of meta-steps: all sides, jax's too, form the same meta-gradient."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

pytest.importorskip("torchopt")
pytestmark = pytest.mark.filterwarnings("ignore:We've integrated functorch")

from benchmarks import imaml_sides, own_process  # noqa: E402
from benchmarks.imaml import MetaStep  # noqa: E402
from reproduction.method.episodes import Episodes  # noqa: E402

MAKE = {"sinusoid": MetaStep.sinusoid, "omniglot": MetaStep.omniglot}


@functools.cache
def error_by_hand(kind):
    step = MAKE[kind](2, 3)
    exact = step.exact()
    return float((imaml_sides.by_hand_batched(step.in_float64()) - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("side", {**imaml_sides.BATCHED, **imaml_sides.LOOPS})
def test_every_implicit_side_forms_the_meta_gradient_by_hand(side, kind):
    step = MAKE[kind](2, 3).in_float64()
    found = {**imaml_sides.BATCHED, **imaml_sides.LOOPS}[side](step)
    expected = imaml_sides.by_hand_batched(step)
    distance = float((found - expected).norm() / expected.norm())
    assert found.dtype == torch.float64
    if side.startswith("higher"):  # three steps are not the solution that the others assume
        assert 1e-3 < distance < 1
    else:
        assert distance < 1e-9


@pytest.mark.parametrize("kind", MAKE)
def test_a_replayed_meta_step_forms_that_of_other_tasks(kind):
    step = MAKE[kind](4, 3).in_float64()
    imaml_sides.compiled(step.first(2))
    others = dataclasses.replace(step, tasks=Episodes(*(part[2:] for part in step.tasks)))
    made = len(imaml_sides.compiled.session.programs)

    found = imaml_sides.compiled(others)

    expected = imaml_sides.by_hand_batched(others)
    assert len(imaml_sides.compiled.session.programs) == made
    assert float((found - expected).norm() / expected.norm()) < 1e-9


@pytest.mark.parametrize("kind", MAKE)
def test_jax_forms_it_too(kind):
    pytest.importorskip("jax")
    figures, said = own_process.measured("benchmarks.imaml_jax", kind, 2, 3, 2)
    assert said["error"] == pytest.approx(error_by_hand(kind), rel=1e-6)
    assert all(0 < figure.low <= figure.median <= figure.high for figure in figures.values())
    assert said["compilation"] > 0


def test_what_is_not_installed_is_left_out_with_a_line(capsys):
    assert own_process.has("torch")
    assert capsys.readouterr().out == ""
    assert not own_process.has("no_such_package")
    assert "no_such_package is not installed, so its rows are left out" in capsys.readouterr().out
