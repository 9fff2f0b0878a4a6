"""A step of every method by compiled programs: the same run as without them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

import hypergrad
from hypergrad import CG, F2SA, FSLA, HOAG, MASOBA, SABA, SOBA, SRBA, Alternating, AmIGO, StocBiO
from tests.bilevel_quadratic import sgd
from tests.problems import relative_error

METHODS = {
    "alternating": Alternating(inner_steps=3, inner_tol=None),
    "CG": Alternating(inner_steps=3, inner_tol=None, solver=CG(maxiter=4)),
    "HOAG": HOAG(),
    "SOBA": SOBA(),
    "MASOBA": MASOBA(theta=0.5),
    "SABA": SABA(),
    "SRBA": SRBA(),
    "FSLA": FSLA(),
    "AmIGO": AmIGO(inner_steps=2, linear_steps=2),
    "StocBiO": StocBiO(inner_steps=2, terms=3),
    "F2SA": F2SA(inner_steps=2),
}
STEPS = 4


def network(dtype: torch.dtype, method: hypergrad.bilevel.Method) -> hypergrad.Bilevel:
    """Weight decay of a small network, on batches."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    params = {name: leaf.detach().clone() for name, leaf in net.named_parameters()}
    batches = [(torch.randn(6, 3, dtype=dtype), torch.randn(6, 1, dtype=dtype)) for _ in range(3)]

    def fit(w, batch):
        x, y = batch
        return ((functional_call(net, w, (x,)) - y) ** 2).mean()

    def inner(w, decay, batch):
        penalty = sum((leaf**2).sum() for leaf in w.values())
        return fit(w, batch) + decay.exp() * penalty

    return hypergrad.Bilevel(
        lambda w, decay, batch: fit(w, batch),
        inner,
        params,
        torch.tensor(-1.0, dtype=dtype),
        inner_optimizer=sgd(0.1),
        outer_optimizer=sgd(0.1),
        method=method,
        inner_batches=batches[:2],
        outer_batches=batches[1:],
        on_failure="ignore",
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float64) for name in METHODS), *((n, torch.float32) for n in ("CG", "SOBA"))],
    ids=str,
)
def test_compiled_steps_lead_where_steps_as_they_are_lead(name, dtype):
    plain, loop = network(dtype, METHODS[name]), network(dtype, METHODS[name])
    step = hypergrad.compile(loop.step, on_fallback="raise")
    for _ in range(STEPS):
        expected, info = plain.step(), step()
    close = 1e-10 if dtype == torch.float64 else 1e-4
    assert relative_error(loop.hparams, plain.hparams) < close
    for key, leaf in plain.params.items():
        assert relative_error(loop.params[key], leaf) < close
    torch.testing.assert_close(info.outer_value, expected.outer_value, rtol=close, atol=close)
    assert any(program.calls > 1 for program in step.session.programs)


def test_a_loss_that_reads_a_value_is_said_once_and_runs_as_it_is():
    loop = network(torch.float64, SOBA())
    plain = network(torch.float64, SOBA())
    for one in (loop, plain):
        outer = one._levels.derivatives._outer

        def branching(w, decay, batch, outer=outer):
            value = outer(w, decay, batch)
            return value if value.item() > -1 else 2 * value

        one._levels.derivatives._outer = branching
    step = hypergrad.compile(loop.step)
    with pytest.warns(hypergrad.CompileWarning, match=r"Bilevel\.step is not compiled"):
        step()
    plain.step()
    for _ in range(2):  # and nothing more is said
        step()
        plain.step()
    assert relative_error(loop.hparams, plain.hparams) < 1e-12


def test_batches_of_another_size_get_a_program_of_their_own():
    loop, plain = network(torch.float64, SOBA()), network(torch.float64, SOBA())
    step = hypergrad.compile(loop.step, on_fallback="raise")
    for rows in (6, 6, 5, 6):
        batch = torch.randn(rows, 3, dtype=torch.float64), torch.randn(rows, 1, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(batch, batch)
            plain.step(batch, batch)
    assert relative_error(loop.hparams, plain.hparams) < 1e-12
    assert len(step.session.programs) == 2
