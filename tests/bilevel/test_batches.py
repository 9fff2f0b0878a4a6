"""Where the mini-batches of a level come from."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hypergrad import F2SA, FSLA, MASOBA, SOBA, Alternating, AmIGO, Bilevel, StocBiO
from tests.bilevel_quadratic import Quadratic, loop, run, sgd


def test_batches_that_are_passed_serve_for_everything_in_the_step():
    problem = Quadratic()
    g, f = problem.inner_batches[1], problem.outer_batches[2]
    methods = (Alternating(inner_tol=None), SOBA(), AmIGO(), StocBiO(), F2SA(), MASOBA(), FSLA())
    for method in methods:
        bilevel = loop(problem, method, batches=True)
        problem.seen.clear()
        bilevel.step(g, f)
        assert {id(batch) for batch in problem.seen} == {id(g), id(f)}


def test_a_dataloader_is_gone_through_again_and_again():
    x = torch.arange(6.0)
    seen = []

    def inner(w, lam, batch):
        seen.append(batch[0].tolist())
        return ((w - batch[0]) ** 2).mean() + lam * w**2

    bilevel = Bilevel(
        lambda w, lam: w**2,
        inner,
        torch.tensor(0.0),
        torch.tensor(1.0),
        inner_optimizer=sgd(0.1),
        outer_optimizer=sgd(0.1),
        method=SOBA(),
        inner_batches=DataLoader(TensorDataset(x), batch_size=2),
    )
    run(bilevel, 5)
    assert seen == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    again = Bilevel(
        lambda w, lam: w**2,
        inner,
        torch.tensor(0.0),
        torch.tensor(1.0),
        inner_optimizer=sgd(0.1),
        outer_optimizer=sgd(0.1),
        method=SOBA(),
        inner_batches=DataLoader(TensorDataset(x), batch_size=2),
    )
    again.load_state_dict(bilevel.state_dict())
    run(again, 2)
    assert seen[5:] == [[4, 5], [0, 1]]


def test_a_callable_draws_with_the_generator_of_the_loop():
    problem = Quadratic()
    draws = []

    def draw(generator):
        draws.append(int(torch.randint(5, (), generator=generator)))
        return problem.inner_batches[draws[-1]]

    for seed in (0, 0, 1):
        run(loop(problem, SOBA(), batches=True, inner_batches=draw, seed=seed), 20)
    assert draws[:20] == draws[20:40] != draws[40:]


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ([], ValueError),
        ({"x": 1}, TypeError),
        (3, TypeError),
        (iter([1, 2]), ValueError),
        ((n for n in ()), ValueError),
    ],
)
def test_sources_that_give_no_batches_are_refused(source, error):

    def steps():
        bilevel = Bilevel(
            lambda w, lam: w**2,
            lambda w, lam, batch: (w - batch) ** 2 + lam * w**2,
            torch.tensor(0.0),
            torch.tensor(1.0),
            inner_optimizer=sgd(0.1),
            outer_optimizer=sgd(0.1),
            method=SOBA(),
            inner_batches=source,
        )
        run(bilevel, 3)

    with pytest.raises(error, match="inner_batches"):
        steps()
