"""Each stochastic method against its paper's algorithm, written out by hand in matrices.

A run notes which batch every evaluation has seen; the hand-written algorithm takes its batches
from that list, in the paper's order. A product from the wrong batch, an average that is updated
too early or a direction taken after a move would show at once.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import hypergrad
from hypergrad import F2SA, MASOBA, SABA, SOBA, AmIGO, Bilevel, StocBiO
from hypergrad.bilevel import Method
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


def soba(hand, method):
    for k in range(STEPS):
        rho, gamma = RHO * (k + 1) ** -0.5, GAMMA * (k + 1) ** -0.5
        g, f = next(hand.inner), next(hand.outer)
        dz, (fz, fx) = by_z(g, hand.z, hand.x), of_outer(f, hand.z, hand.x)
        du, dx = g.H @ hand.u - fz, fx - g.C @ hand.u
        hand.z, hand.u, hand.x = hand.z - rho * dz, hand.u - rho * du, hand.x - gamma * dx


def ma_soba(hand, method):
    h = torch.zeros(3, dtype=F64)
    for _ in range(STEPS):
        g, f = next(hand.inner), next(hand.outer)
        dz, (fz, fx) = by_z(g, hand.z, hand.x), of_outer(f, hand.z, hand.x)
        du, dx = g.H @ hand.u - fz, fx - g.C @ hand.u
        hand.z, hand.u, hand.x = hand.z - RHO * dz, hand.u - RHO * du, hand.x - GAMMA * h
        h = (1 - method.theta) * h + method.theta * dx


def saba(hand, method):
    inner, outer = {}, {}  # of each batch: what it was when it was last seen

    def seen(g, f):
        fz, fx = of_outer(f, hand.z, hand.x)
        return (by_z(g, hand.z, hand.x), g.H @ hand.u, g.C @ hand.u), (fz, fx)

    for _ in range(5):  # the longer of the two sequences
        g, f = next(hand.inner), next(hand.outer)
        inner[id(g)], outer[id(f)] = seen(g, f)
    for _ in range(STEPS):
        g, f = next(hand.inner), next(hand.outer)
        new = [*seen(g, f)[0], *seen(g, f)[1]]
        reduced = []
        for place, value in enumerate(new):
            table, key = (inner, id(g)) if place < 3 else (outer, id(f))
            column = place if place < 3 else place - 3
            mean = sum(row[column] for row in table.values()) / len(table)
            reduced.append(value - table[key][column] + mean)
        inner[id(g)], outer[id(f)] = tuple(new[:3]), tuple(new[3:])
        dz, Hu, Cu, fz, fx = reduced
        hand.z = hand.z - RHO * dz
        hand.u = hand.u - RHO * (Hu - fz)
        hand.x = hand.x - GAMMA * (fx - Cu)


def amigo(hand, method):
    for _ in range(STEPS):
        for _ in range(method.inner_steps):
            hand.z = hand.z - RHO * by_z(next(hand.inner), hand.z, hand.x)
        fz, fx = of_outer(next(hand.outer), hand.z, hand.x)
        for _ in range(method.linear_steps):
            hand.u = hand.u - RHO * (next(hand.inner).H @ hand.u - fz)
        hand.x = hand.x - GAMMA * (fx - next(hand.inner).C @ hand.u)


def stocbio(hand, method):
    eye = torch.eye(4, dtype=F64)
    for _ in range(STEPS):
        for _ in range(method.inner_steps):
            hand.z = hand.z - RHO * by_z(next(hand.inner), hand.z, hand.x)
        fz, fx = of_outer(next(hand.outer), hand.z, hand.x)
        # B_Q first: the batch nearest to the right-hand side, as the products are nested.
        batches = [next(hand.inner) for _ in range(method.terms)]
        total = fz
        for q in range(1, method.terms + 1):
            product = eye
            for b in batches[:q]:
                product = (eye - method.linear_lr * b.H) @ product
            total = total + product @ fz
        hand.x = hand.x - GAMMA * (fx - next(hand.inner).C @ (method.linear_lr * total))


def f2sa(hand, method):
    y = torch.zeros(4, dtype=F64)
    for k in range(STEPS):
        gamma = RHO * (k + 1) ** -method.inner_decay  # of z
        lam = method.penalty * (k + 1) ** method.growth
        alpha = gamma / (2 * lam)  # the paper's lam = gamma / (2 alpha)
        for _ in range(method.inner_steps):
            hand.z = hand.z - gamma * by_z(next(hand.inner), hand.z, hand.x)
            g, f = next(hand.inner), next(hand.outer)
            y = y - alpha * (of_outer(f, y, hand.x)[0] + lam * by_z(g, y, hand.x))
        f, at_y, at_z = next(hand.outer), next(hand.inner), next(hand.inner)
        dx = of_outer(f, y, hand.x)[1] + lam * (at_y.C @ y - at_z.C @ hand.z)
        hand.x = hand.x - GAMMA * (k + 1) ** -method.outer_decay * dx


ALGORITHMS = [
    (SOBA(), soba),
    (MASOBA(theta=0.3), ma_soba),
    (SABA(), saba),
    (AmIGO(inner_steps=3, linear_steps=2), amigo),
    (StocBiO(inner_steps=2, terms=3, linear_lr=0.1), stocbio),
    (F2SA(penalty=2.0, inner_steps=2), f2sa),
]


@pytest.mark.parametrize(("method", "algorithm"), ALGORITHMS)
def test_the_steps_are_those_of_the_paper(method, algorithm):
    problem = Quadratic(noise=1.0)
    bilevel = Bilevel(
        problem.outer,
        problem.inner,
        torch.zeros(4, dtype=F64),
        torch.zeros(3, dtype=F64),
        inner_optimizer=functools.partial(torch.optim.SGD, lr=RHO),
        outer_optimizer=functools.partial(torch.optim.SGD, lr=GAMMA),
        method=method,
        inner_batches=problem.inner_batches,
        outer_batches=problem.outer_batches,
        seed=3,
    )
    for _ in range(STEPS):
        bilevel.step()
    hand = ByHand(problem.seen)
    algorithm(hand, method)
    torch.testing.assert_close(bilevel.params, hand.z, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bilevel.hparams, hand.x, rtol=1e-10, atol=1e-12)
    # Each evaluation on a batch of its own, and none beyond those of the paper.
    assert hand.exhausted()
    assert bilevel.hparams.norm() > 0.05


def test_the_losses_are_evaluated_once_for_each_batch_of_a_single_loop_step():
    problem = Quadratic()
    for method in (SOBA(), MASOBA()):
        problem.seen.clear()
        bilevel = Bilevel(
            problem.outer,
            problem.inner,
            torch.zeros(4, dtype=F64),
            torch.zeros(3, dtype=F64),
            inner_optimizer=functools.partial(torch.optim.SGD, lr=RHO),
            outer_optimizer=functools.partial(torch.optim.SGD, lr=GAMMA),
            method=method,
            inner_batches=problem.inner_batches,
            outer_batches=problem.outer_batches,
        )
        for _ in range(3):
            bilevel.step()
        assert [type(batch) for batch in problem.seen] == [Inner, Outer] * 3


def test_the_means_of_saba_are_those_of_its_memory_after_many_steps():
    problem = Quadratic()
    bilevel = Bilevel(
        problem.outer,
        problem.inner,
        torch.zeros(4, dtype=F64),
        torch.zeros(3, dtype=F64),
        inner_optimizer=functools.partial(torch.optim.SGD, lr=RHO),
        outer_optimizer=functools.partial(torch.optim.SGD, lr=GAMMA),
        method=SABA(),
        inner_batches=problem.inner_batches,
        outer_batches=problem.outer_batches,
    )
    for _ in range(103):
        bilevel.step()
        state = bilevel.state_dict()["state"]
        for name, table in state["memory"].items():
            torch.testing.assert_close(state["means"][name], table.mean(0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("structured", [False, True])
def test_pytrees_of_several_shapes_take_the_steps_of_flat_vectors(structured):
    """The same run on vectors and on trees of a matrix, a scalar and a row."""
    problem = Quadratic()
    runs = []
    for tree in (False, True):

        def flat(z, x, tree=tree):
            if not tree:
                return z, x
            z = torch.cat([z["a"].reshape(-1), z["b"].reshape(1)])
            return z, torch.cat([x[0].reshape(1), x[1]])

        def inner(z, x, batch, flat=flat):
            return problem.inner(*flat(z, x), batch)

        def outer(z, x, batch, flat=flat):
            return problem.outer(*flat(z, x), batch)

        zeros = functools.partial(torch.zeros, dtype=F64)
        params = {"a": zeros(3, 1), "b": zeros(())} if tree else zeros(4)
        hparams = (zeros(()), zeros(2)) if tree else zeros(3)
        method = SABA() if structured else F2SA(inner_steps=2)
        bilevel = Bilevel(
            outer,
            inner,
            params,
            hparams,
            inner_optimizer=functools.partial(torch.optim.SGD, lr=RHO),
            outer_optimizer=functools.partial(torch.optim.Adam, lr=GAMMA),
            method=method,
            inner_batches=problem.inner_batches,
            outer_batches=problem.outer_batches,
        )
        for _ in range(5):
            bilevel.step()
        runs.append(flat(bilevel.params, bilevel.hparams))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


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


def run(bilevel, steps):
    for _ in range(steps):
        bilevel.step()


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
