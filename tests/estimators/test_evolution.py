"""Evolution strategies against the mean and the variance that theory gives them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import hypergrad
from benchmarks.allocator import peak_bytes
from hypergrad import evolution_strategies_grad
from tests.problems import F64, data, flat, per_feature_ridge, relative_error, ridge


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole(h: Any) -> Any:
    return h


def of_loss(loss: Any, h: Tensor, **options: Any) -> Any:
    """The estimate for a function of the hyperparameters alone."""
    options = {"generator": seeded(), "return_info": True, **options}
    return evolution_strategies_grad(lambda w, h: loss(w), None, whole, h, **options)


def test_of_a_linear_loss_the_variance_is_the_one_that_theory_gives():
    """Of e (e.g): variance ||g||^2 + g_j^2 in entry j."""
    g, h = data(50, 4, dtype=F64), torch.zeros(4, dtype=F64)
    pairs = 20000
    found, info = of_loss(lambda h: (g * h).sum(), h, pairs=pairs)
    expected = ((g.square().sum() + g.square()) / pairs).sqrt()
    torch.testing.assert_close(info.standard_error, expected, rtol=0.05, atol=0)
    assert ((found - g).abs() < 4 * expected).all()
    assert float(info.relative_error) == pytest.approx(
        (expected.norm() / g.norm()).item(), rel=0.05
    )


def test_the_standard_error_is_that_of_repeated_estimates():
    g, h = data(51, 3, dtype=F64), torch.zeros(3, dtype=F64)
    many = [of_loss(lambda h: (g * h).sum(), h, pairs=50, generator=seeded(s)) for s in range(300)]
    spread = torch.stack([found for found, _ in many]).std(dim=0)
    claimed = torch.stack([info.standard_error for _, info in many]).mean(dim=0)
    torch.testing.assert_close(claimed, spread, rtol=0.15, atol=0)


def test_four_times_the_pairs_is_half_the_standard_error():
    g, h = data(52, 5, dtype=F64), torch.zeros(5, dtype=F64)
    few, many = (
        of_loss(lambda h: (g * h).sum(), h, pairs=pairs)[1].relative_error for pairs in (2000, 8000)
    )
    assert float(few / many) == pytest.approx(2, rel=0.1)


def test_the_bias_is_that_of_smoothing_and_quadruples_with_twice_the_distance():
    """Of h^3, smoothed: 3 h^2 + 3 sigma^2."""
    h = torch.tensor(0.5, dtype=F64)
    biases = []
    for sigma in (0.5, 1.0):
        found, info = of_loss(lambda h: h**3, h, sigma=sigma, pairs=400_000)
        assert abs(found - 0.75 - 3 * sigma**2) < 4 * info.standard_error
        biases.append(float(found - 0.75))
    assert biases[1] / biases[0] == pytest.approx(4, rel=0.1)


def test_the_hypergradient_of_ridge_lies_within_the_standard_errors():
    problem = per_feature_ridge()
    hypergradient, info = evolution_strategies_grad(
        problem.outer,
        None,
        problem.solve,
        problem.hparams,
        pairs=4000,
        generator=seeded(),
        return_info=True,
    )
    exact = problem.hypergradient(problem.hparams)
    scores = (flat(hypergradient) - flat(exact)) / flat(info.standard_error)
    assert (scores.abs() < 4).all()
    assert relative_error(hypergradient, exact) < 3 * float(info.relative_error)
    value = problem.outer(problem.solve(problem.hparams), problem.hparams)
    torch.testing.assert_close(info.outer_value, value, rtol=1e-2, atol=0)


def descend(w: Tensor, lam: Tensor) -> Tensor:
    return w - 0.01 * torch.func.grad(ridge().inner)(w, lam)


def test_of_steps_it_is_the_derivative_of_as_many_steps():
    problem, w = ridge(), torch.zeros(5, dtype=F64)
    given = (problem.outer, descend, w, problem.hparams)
    hypergradient, info = evolution_strategies_grad(
        *given, steps=7, pairs=500, generator=seeded(), return_info=True
    )
    exact = hypergrad.unrolled_grad(*given, steps=7)
    assert abs(hypergradient - exact) < 4 * info.standard_error
    assert relative_error(hypergradient, exact) < 0.3


def test_pairs_in_a_loop_or_in_chunks_are_those_of_vmap():
    problem, w = ridge(), torch.zeros(5, dtype=F64)
    given = (problem.outer, descend, w, problem.hparams)
    found = [
        evolution_strategies_grad(*given, steps=3, pairs=20, generator=seeded(), **options)
        for options in ({}, {"batching": "loop"}, {"batching": "loop", "chunk_size": 20})
    ]
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    parts, info = evolution_strategies_grad(
        *given, steps=3, pairs=800, chunk_size=96, generator=seeded(), return_info=True
    )
    exact = hypergrad.unrolled_grad(*given, steps=3)
    assert abs(parts - exact) < 4 * info.standard_error


def test_a_solver_with_torch_optim_needs_the_loop_and_the_error_says_so():
    problem = ridge()

    def solve(lam: Tensor) -> Tensor:
        w = torch.zeros(5, dtype=F64, requires_grad=True)
        optimiser = torch.optim.LBFGS([w], max_iter=50, tolerance_grad=1e-12)

        def closure() -> Tensor:
            optimiser.zero_grad()
            value = problem.inner(w, lam)
            value.backward()
            return value

        optimiser.step(closure)
        return w

    given = (problem.outer, None, solve, problem.hparams)
    with pytest.raises(RuntimeError) as caught:
        evolution_strategies_grad(*given, pairs=4)
    assert "batching='loop'" in "".join(caught.value.__notes__)
    hypergradient, info = evolution_strategies_grad(
        *given, pairs=30, batching="loop", generator=seeded(), return_info=True
    )
    assert abs(hypergradient - problem.hypergradient(problem.hparams)) < 4 * info.standard_error


def test_memory_is_flat_in_the_steps():
    problem, w = ridge(), torch.zeros(5, dtype=F64)
    peaks = []
    for steps in (5, 50):
        call = lambda steps=steps: evolution_strategies_grad(
            problem.outer, descend, w, problem.hparams, steps=steps, pairs=16
        )
        call()
        peaks.append(peak_bytes(call))
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("options", [{}, {"batching": "loop"}, {"chunk_size": 7}], ids=repr)
def test_random_numbers_of_the_loss_are_the_same_on_all_sides(options):
    """A loss of h + noise has the derivative 1; noise of its own would be divided by sigma."""
    h = torch.tensor(1.0, dtype=F64)
    loss = lambda h: h + 100 * torch.rand((), dtype=F64)
    torch.manual_seed(0)
    found, info = of_loss(loss, h, pairs=20, **options)
    assert abs(found - 1) < 5 * info.standard_error
    assert float(info.standard_error) < 1
    after = torch.rand(3)
    torch.manual_seed(0)
    torch.rand((), dtype=F64)
    torch.testing.assert_close(after, torch.rand(3))  # drawn once


def test_two_calls_draw_other_directions_and_a_generator_repeats_them():
    h = torch.ones(3, dtype=F64)
    free = [of_loss(lambda h: h.sum(), h, generator=None)[0] for _ in range(2)]
    assert not torch.equal(*free)
    fixed = [of_loss(lambda h: h.sum(), h, generator=seeded(3))[0] for _ in range(2)]
    assert torch.equal(*fixed)


def test_a_loss_that_does_not_see_the_hyperparameters_is_said():
    h = torch.ones(3)
    constant = torch.tensor(2.0)
    with pytest.warns(hypergrad.ConvergenceWarning, match=r"hardly changes.*cuts hparams off"):
        of_loss(lambda h: constant, h)
    with pytest.raises(hypergrad.NotConverged, match="sigma"):
        of_loss(lambda h: 1e6 + h.sum(), h, sigma=1e-6, on_failure="raise")


def test_a_single_pair_has_no_standard_error():
    _, info = of_loss(lambda h: h.sum(), torch.ones(3), pairs=1)
    assert info.standard_error.isnan().all()


def test_a_batch_of_tasks_is_the_loop_with_the_same_directions():
    c = data(53, 3, dtype=F64)

    def task(c: Tensor) -> Any:
        return of_loss(lambda h: (c * h**2).sum(), torch.ones(2, dtype=F64))

    found, info = vmap(task)(c)
    expected = [task(row) for row in c]
    torch.testing.assert_close(found, torch.stack([g for g, _ in expected]))
    torch.testing.assert_close(
        info.standard_error, torch.stack([i.standard_error for _, i in expected])
    )


@pytest.mark.parametrize(
    "options",
    [{"sigma": 0.0}, {"pairs": 0}, {"chunk_size": 0}, {"batching": "both"}, {"steps": 2}],
    ids=repr,
)
def test_pairs_and_steps_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="must"):
        of_loss(lambda h: h.sum(), torch.ones(2), **options)
