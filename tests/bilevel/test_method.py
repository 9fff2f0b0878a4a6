"""Methods as values, imported when one is asked for."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

import hypergrad
from hypergrad import SABA, SOBA
from tests.bilevel_quadratic import Quadratic, loop, run


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
