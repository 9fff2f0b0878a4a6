"""F2SA: the bias of its penalty."""

from __future__ import annotations

import pytest

from hypergrad import F2SA
from tests.bilevel_quadratic import Quadratic, loop, run


def test_the_bias_of_f2sa_is_of_the_order_of_one_over_the_penalty():
    problem = Quadratic()
    biases = []
    for penalty in (10.0, 100.0):
        method = F2SA(penalty, 0.0, relaxed_lr=0.4, inner_decay=0.0, outer_decay=0.0)
        bilevel = loop(problem, method, outer_lr=0.2)
        run(bilevel, 50)
        biases.append(problem.distance(bilevel.hparams))
    assert biases[0] < 0.1
    assert biases[1] == pytest.approx(biases[0] / 10, rel=0.3)


def test_f2sa_with_a_growing_penalty_goes_on_towards_the_optimum():
    problem = Quadratic()
    method = F2SA(10.0, growth=1 / 3, relaxed_lr=0.4, inner_decay=0.0, outer_decay=1 / 3)
    bilevel = loop(problem, method, outer_lr=0.4)
    run(bilevel, 20)
    early = problem.distance(bilevel.hparams)
    run(bilevel, 60)
    assert problem.distance(bilevel.hparams) < 0.5 * early < 0.1
