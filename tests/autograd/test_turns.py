"""Row 57: several threads that evaluate one module take turns."""

from __future__ import annotations

import threading

import pytest
import torch

from hypergrad import implicit_grad
from tests.stateful_modules import Counts, MovingAverage, State, answer, losses

D = torch.float64


def test_row_57_one_module_in_eight_threads():
    net, wrong = MovingAverage("new"), []
    before = State(net)
    params = [{k: v.detach() * (1 + i / 10) for k, v in net.named_parameters()} for i in range(8)]
    outer, inner = losses(net)
    h = torch.tensor(-1.0, dtype=D)

    def one(i):
        return implicit_grad(outer, inner, params[i], h, inner_tol=None, on_failure="ignore")

    expected = [one(i) for i in range(8)]
    together = threading.Barrier(8)

    def work(i):
        together.wait()
        wrong.extend(i for _ in range(5) if not torch.equal(one(i), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    before.assert_same()


@pytest.mark.timeout(60)
def test_row_57_a_loss_that_waits_for_threads_which_call_hypergrad_ends():
    found = []

    def nested(p, h):
        thread = threading.Thread(target=lambda: found.append(answer(Counts())))
        thread.start()
        thread.join()
        return (p * h).square().sum() + (p - 1).square().sum()

    w, h = torch.ones(2, dtype=D), torch.tensor(0.5, dtype=D)
    implicit_grad(lambda p, h: p.sum(), nested, w, h, inner_tol=None)
    assert len(found) >= 1


def test_row_57_a_loss_that_fails_lets_the_others_in():
    def fails(p, h):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        implicit_grad(lambda p, h: p.sum(), fails, torch.ones(2), torch.ones(2))
    found = []
    thread = threading.Thread(target=lambda: found.append(answer(Counts())))
    thread.start()
    thread.join(timeout=30)
    assert found
