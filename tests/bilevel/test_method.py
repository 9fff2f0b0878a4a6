"""Methods as values, imported when one is asked for."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch

import hypergrad
from hypergrad import SABA, SOBA
from hypergrad.bilevel import Method
from tests.bilevel_quadratic import F64, Quadratic, loop, run


def test_a_method_is_a_value_and_not_a_class():
    with pytest.raises(TypeError, match=r"SOBA\(\)"):
        loop(Quadratic(), SOBA)


def test_two_methods_on_one_problem_do_not_disturb_each_other():
    problem = Quadratic()
    alone = loop(problem, SOBA(), batches=True)
    run(alone, 10)
    together = [loop(problem, SOBA(), batches=True), loop(problem, SABA(), batches=True)]
    for _, bilevel in itertools.product(range(10), together):
        bilevel.step()
    assert together[0].hparams.equal(alone.hparams)


def test_the_methods_are_imported_when_one_is_asked_for():
    program = (
        "import sys, hypergrad\n"
        "assert not any(name.startswith('hypergrad.bilevel') for name in sys.modules)\n"
        "assert set(hypergrad.__all__) <= set(dir(hypergrad))\n"
        "from hypergrad import *\n"
        "assert Bilevel is hypergrad.Bilevel is hypergrad.bilevel.Bilevel\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

    with pytest.raises(AttributeError, match="'hypergrad' has no attribute 'Bilevle'"):
        hypergrad.Bilevle  # noqa: B018


# A method of one's own


@dataclasses.dataclass(frozen=True)
class Momentum(Method):
    """SOBA's directions with an outer momentum, which it remembers."""

    rate: float = 0.5

    def start(self, levels):
        return {"u": levels.zeros(), "h": [torch.zeros_like(v) for v in levels.hparams.variables]}

    def step(self, levels):
        seen = levels.products(levels.inner_batch(), levels.state["u"])
        value, by_params, direct = levels.outer_slopes(levels.outer_batch())
        levels.move_inner(seen.residual)
        levels.state["u"] = levels.state["u"] - self.rate * (seen.product - by_params)
        levels.state["h"] = [
            h + (d - c - h) / 2
            for h, d, c in zip(levels.state["h"], direct, seen.cross, strict=True)
        ]
        return levels.outer_step(levels.state["h"], value, seen.residual)


def made(method, **options):
    """A loop on ``(w - t)^2 / 2`` and ``(w - 3)^2``."""
    return hypergrad.Bilevel(
        lambda w, t: ((w - 3) ** 2).sum(),
        lambda w, t: ((w - t) ** 2).sum() / 2,
        torch.zeros(2, dtype=F64),
        torch.zeros(2, dtype=F64),
        inner_optimizer=lambda v: torch.optim.SGD(v, lr=0.5),
        outer_optimizer=lambda v: torch.optim.SGD(v, lr=0.05),
        method=method,
        **options,
    )


def test_a_method_from_public_names_reaches_the_optimum_and_resumes_bit_equal():
    whole, first = made(Momentum()), made(Momentum())
    run(whole, 20)
    run(first, 20)
    second = made(Momentum())
    second.load_state_dict(first.state_dict())
    run(whole, 30)
    run(second, 30)
    assert second.hparams.equal(whole.hparams)
    run(whole, 949)
    info = whole.step()
    torch.testing.assert_close(whole.hparams, torch.full((2,), 3.0, dtype=F64))
    assert (info.step, info.inner_steps) == (1000, 1)
    assert float(info.inner_norm) < 1e-8
    with pytest.raises(hypergrad.StructureMismatch, match="method Momentum"):
        made(hypergrad.SOBA()).load_state_dict(first.state_dict())


def test_a_method_of_ones_own_does_not_move_the_hyperparameters_by_nan():
    bilevel = made(Momentum(rate=1e200))
    message = "the hypergradient holds NaN or infinity at outer step"
    with pytest.raises(hypergrad.NotFinite, match=message):
        run(bilevel, 10)
    assert bilevel.hparams.isfinite().all()


class Loose:
    """No method, though it has a step."""

    def step(self, levels):
        return None


@pytest.mark.parametrize("wrong", [lambda levels: None, Loose, Loose(), 3])
def test_what_is_no_method_is_told_how_to_be_one(wrong):
    with pytest.raises(
        TypeError, match=r"hypergrad\.bilevel\.Method and has a function step.*Exten"
    ):
        made(wrong)


def test_a_step_that_returns_no_info_or_too_few_gradients_is_named():
    class Silent(Method):
        def step(self, levels):
            levels.inner_steps(1)

    class Short(Method):
        def step(self, levels):
            condition = levels.inner_steps(1)
            return levels.outer_step([], torch.tensor(0.0), condition)

    class Still(Method):
        def step(self, levels):
            return levels.inner_steps(0)

    for method, error, words in (
        (Silent, TypeError, "must return a StepInfo"),
        (Short, TypeError, "a list of 1 tensors"),
        (Still, ValueError, "count must be at least 1"),
    ):
        with pytest.raises(error, match=words):
            made(dataclasses.dataclass(frozen=True)(method)()).step()
