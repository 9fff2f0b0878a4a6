"""Each stochastic method against its paper's algorithm, written out by hand in matrices.

A run notes which batch every evaluation has seen; the hand-written algorithm takes its batches
from that list, in the paper's order. A product from the wrong batch, an average that is updated
too early or a direction taken after a move would show at once.
"""

from __future__ import annotations

import functools

import torch

from hypergrad import Bilevel
from tests.bilevel_quadratic import F64, Inner, Outer, Quadratic

RHO, GAMMA = 0.2, 0.1  # learning rates of the two levels
STEPS = 6


class ByHand:
    """Derivatives in matrices, on the batches that a run has seen, in turn."""

    def __init__(self, seen):
        self.inner = iter([b for b in seen if isinstance(b, Inner)])
        self.outer = iter([b for b in seen if isinstance(b, Outer)])
        self.z, self.u, self.x = (torch.zeros(n, dtype=F64) for n in (4, 4, 3))

    def exhausted(self):
        return next(self.inner, None) is None and next(self.outer, None) is None


def by_z(g, z, x):
    return g.H @ z + g.C.T @ x + g.c


def of_outer(f, z, x):
    return f.P @ z + f.p, f.Q @ x + f.q


def stochastic(problem, method, **options):
    """A run on random batches from zero, at these learning rates."""
    return Bilevel(
        problem.outer,
        problem.inner,
        torch.zeros(4, dtype=F64),
        torch.zeros(3, dtype=F64),
        inner_optimizer=functools.partial(torch.optim.SGD, lr=RHO),
        outer_optimizer=functools.partial(torch.optim.SGD, lr=GAMMA),
        method=method,
        inner_batches=problem.inner_batches,
        outer_batches=problem.outer_batches,
        **options,
    )


def assert_steps_of_the_paper(method, algorithm):
    """Hold the steps of a method against its paper's algorithm on the same batches."""
    problem = Quadratic(noise=1.0)
    bilevel = stochastic(problem, method, seed=3)
    for _ in range(STEPS):
        bilevel.step()
    hand = ByHand(problem.seen)
    algorithm(hand, method)
    torch.testing.assert_close(bilevel.params, hand.z, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bilevel.hparams, hand.x, rtol=1e-10, atol=1e-12)
    # Each evaluation on a batch of its own, and none beyond those of the paper.
    assert hand.exhausted()
    assert bilevel.hparams.norm() > 0.05
