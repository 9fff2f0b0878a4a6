"""What every method promises: the optimum, the constraints, and a run that resumes bit for bit."""

from __future__ import annotations

import functools
import io

import pytest
import torch

import hypergrad
from hypergrad import (
    CG,
    F2SA,
    FSLA,
    HOAG,
    MASOBA,
    SABA,
    SOBA,
    SRBA,
    Alternating,
    AmIGO,
    Bilevel,
    StocBiO,
)
from tests.bilevel_by_hand import GAMMA, RHO
from tests.bilevel_quadratic import F64, Quadratic, adam, loop, run, sgd

EXACT = {
    "alternating": (Alternating(inner_steps=5, inner_tol=None), 0.3, 50),
    "HOAG": (HOAG(), 0.4, 110),
    "SOBA": (SOBA(inner_decay=0.0, outer_decay=0.0), 0.2, 150),
    "MASOBA": (MASOBA(theta=0.5), 0.1, 200),
    "SABA": (SABA(), 0.2, 150),
    "SRBA": (SRBA(), 0.2, 150),
    "FSLA": (FSLA(inner_decay=0.0, outer_decay=0.0), 0.2, 200),
    "AmIGO": (AmIGO(inner_steps=5, linear_steps=5), 0.3, 60),
    "StocBiO": (StocBiO(inner_steps=5, terms=40), 0.3, 50),
}


@pytest.mark.parametrize("name", EXACT)
def test_every_method_reaches_the_optimum_of_deterministic_losses(name):
    method, outer_lr, steps = EXACT[name]
    problem = Quadratic()
    bilevel = loop(problem, method, outer_lr=outer_lr)
    run(bilevel, steps)
    truth = problem.hypergradient
    assert truth(bilevel.hparams).norm() < 1e-5 * truth(torch.zeros(3, dtype=F64)).norm()
    assert problem.distance(bilevel.hparams) < 1e-5
    assert (bilevel.params - problem.solution(bilevel.hparams)).norm() < 1e-4


@pytest.mark.parametrize("name", [*EXACT, "F2SA"])
def test_hyperparameters_stay_where_they_may_be(name):
    """Every method ends at the optimum over the half-space, and never leaves it."""
    problem = Quadratic()
    free = loop(problem, *EXACT["SOBA"][:1], outer_lr=0.2)
    run(free, 150)
    normal = torch.tensor([1.0, 0.5, -0.5], dtype=F64)
    level = float(normal @ free.hparams) - 0.5
    project = lambda x: hypergrad.projections.halfspace(x, normal, level)
    method, outer_lr, steps = EXACT.get(
        name, (F2SA(1e3, 0.0, relaxed_lr=0.4, inner_decay=0.0, outer_decay=0.0), 0.2, 60)
    )
    bilevel = loop(problem, method, outer_lr=outer_lr, hparams_projection=project)
    before = bilevel.hparams
    for _ in range(2 * steps):
        bilevel.step()
        assert normal @ bilevel.hparams <= level + 1e-12
    assert bilevel.hparams.data_ptr() == before.data_ptr()  # in place
    slope = problem.hypergradient(bilevel.hparams)
    torch.testing.assert_close(normal @ bilevel.hparams, torch.tensor(level, dtype=F64))
    across = slope - normal * (normal @ slope) / (normal @ normal)
    assert across.norm() < (2e-2 if name == "F2SA" else 1e-4) * slope.norm()
    assert normal @ slope < 0  # only the bound keeps it


@pytest.mark.parametrize(
    ("method", "inner_lr", "outer_lr", "steps"),
    [
        (SOBA(), 0.4, 0.3, 400),
        (MASOBA(), 0.1, 0.03, 500),
        (FSLA(), 0.4, 0.3, 300),
        (AmIGO(inner_steps=3, linear_steps=3), 0.15, 0.05, 120),
        (StocBiO(inner_steps=3, terms=10, linear_lr=0.3), 0.15, 0.05, 120),
        (F2SA(penalty=5.0, inner_steps=3, inner_decay=0.2, outer_decay=0.4), 0.3, 0.3, 120),
        (Alternating(3, solver=CG(maxiter=4), inner_tol=None), 0.15, 0.05, 120),
    ],
)
def test_stochastic_methods_come_close_on_batches(method, inner_lr, outer_lr, steps):
    problem = Quadratic(noise=0.2)
    bilevel = loop(problem, method, inner_lr=inner_lr, outer_lr=outer_lr, batches=True)
    run(bilevel, steps)
    assert problem.distance(bilevel.hparams) < 0.2


EVERY = [
    Alternating(inner_steps=2, solver=CG(maxiter=2), inner_tol=None),
    HOAG(),
    SOBA(linear_lr=0.1),
    MASOBA(linear_lr=0.1),
    SABA(linear_lr=0.1),
    SRBA(period=5, radius=0.5, linear_lr=0.1),
    FSLA(linear_lr=0.1),
    AmIGO(inner_steps=2, linear_steps=2, linear_lr=0.1),
    StocBiO(inner_steps=2, terms=3, linear_lr=0.1),
    F2SA(inner_steps=2, relaxed_lr=0.1),
]


def names(method):
    return type(method).__name__


@pytest.mark.parametrize("method", EVERY, ids=names)
def test_a_resumed_run_is_bit_equal(method):
    problem = Quadratic()
    options = {
        "batches": True,
        "inner_optimizer": sgd(0.05, momentum=0.9),
        "outer_optimizer": adam(0.05),
    }
    whole = loop(problem, method, **options)
    run(whole, 7)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    kept = whole.state_dict()
    infos = [whole.step() for _ in range(9)]
    file.seek(0)
    # Another seed: everything that matters comes from the state.
    for state in (torch.load(file, weights_only=True), kept):
        part = loop(problem, method, **options, seed=5)
        run(part, 2)
        part.load_state_dict(state)
        again = [part.step() for _ in range(9)]
        assert part.params.equal(whole.params)
        assert part.hparams.equal(whole.hparams)
        assert part.steps == whole.steps == 16
        for a, b in zip(infos, again, strict=True):
            assert a.step == b.step
            assert a.grads.equal(b.grads)
            assert a.outer_value.equal(b.outer_value)


def test_steps_work_without_grad_and_in_inference_mode():
    problem = Quadratic()
    for method in (Alternating(inner_tol=None), SOBA(), F2SA()):
        plain = loop(problem, method)
        run(plain, 3)
        for context in (torch.no_grad(), torch.inference_mode()):
            other = loop(problem, method)
            with context:
                run(other, 3)
            assert other.hparams.equal(plain.hparams)


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
