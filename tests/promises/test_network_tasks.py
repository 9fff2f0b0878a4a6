"""What people bring first, a network, a loss and loaders, in twelve lines beside data and model."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hypergrad


def digits(low, high, wrong=0):
    """Some of scikit-learn's digits, the first few with another label; and their places."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[low:high]
    x = torch.tensor(images[order], dtype=torch.float32) / 16
    y = torch.tensor(labels[order])
    y[:wrong] = (y[:wrong] + 1 + torch.arange(wrong) % 9) % 10
    return TensorDataset(x, y, torch.arange(len(y)))


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def shuffled(data, size=100):
    return DataLoader(data, size, shuffle=True, generator=torch.Generator().manual_seed(0))


def sinusoids(count, generator=torch.Generator().manual_seed(0)):  # noqa: B008 - goes on
    """Tasks of regression: ten points to learn from, and ten to be judged on."""
    for _ in range(count):
        size, shift = torch.rand(2, generator=generator) * torch.tensor([2.0, 3.0]) + 1.0
        x = 10 * torch.rand(20, 1, generator=generator) - 5
        y = size * (x + shift).sin()
        yield (x[:10], y[:10]), (x[10:], y[10:])


def regressor():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1))


# --- the tasks, as a user would write them -----------------------------------------------


def a_decay_for_each_parameter(model, train, valid):
    problem = hypergrad.supervised(model, F.cross_entropy, penalty="log_decay")
    start = {name: torch.full_like(p, -6.0) for name, p in problem.params.items()}
    loop = hypergrad.Bilevel(
        problem.outer, problem.inner, problem.params, {"log_decay": start},
        inner_optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        outer_optimizer=lambda hparams: torch.optim.Adam(hparams, lr=0.1),
        inner_batches=train, outer_batches=valid,
        method=hypergrad.Alternating(inner_tol=None),  # ten steps at a time do not solve it
    )  # fmt: skip
    for _ in loop.run(40, progress=True):
        pass
    return loop


def b_weights_of_noisy_examples(model, train, valid):
    small = lambda params, _: 3e-3 * sum(p.square().sum() for p in params.values())
    problem = hypergrad.supervised(model, F.cross_entropy, penalty=small, example_weights="logit")
    loop = hypergrad.Bilevel(
        problem.outer, problem.inner, problem.params, {"logit": torch.zeros(len(train.dataset))},
        inner_optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        outer_optimizer=lambda hparams: torch.optim.Adam(hparams, lr=0.2),
        inner_batches=train, outer_batches=valid,
        method=hypergrad.Alternating(inner_tol=None),
    )  # fmt: skip
    for _ in loop.run(60, progress=True):
        pass
    return loop.hparams["logit"].sigmoid()


def c_few_shot_learning(model, tasks, adapt):
    near = lambda params, start: 0.3 * sum((p - start[n]).square().sum() for n, p in params.items())
    problem = hypergrad.supervised(model, F.mse_loss, penalty=near, curvature="hessian")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for four_tasks in tasks:
        optimizer.zero_grad()
        for train, test in four_tasks:
            inner, outer = problem.inner(train), problem.outer(test)
            params, _ = adapt(inner, problem.params, problem.params)
            hypergrad.implicit_backward(outer, inner, params, problem.params)
        optimizer.step()
    return problem


# --- what comes of them ------------------------------------------------------------------


@pytest.mark.parametrize(
    "task", [a_decay_for_each_parameter, b_weights_of_noisy_examples, c_few_shot_learning]
)
def test_a_task_takes_twelve_lines_beside_data_and_model(task):
    _, *body = inspect.getsource(task).splitlines()
    assert len(body) <= 12
    assert all(len(line) <= 100 for line in body)


def test_decay_of_each_parameter_of_a_network_by_adam(capsys):
    train, valid, test = digits(0, 200), digits(1000, 1500), digits(1500, 1797)
    model = classifier()
    loop = a_decay_for_each_parameter(model, shuffled(train), shuffled(valid))
    values = loop.history.outer_value
    assert len(values) == 40
    assert max(values[-5:]) < 0.15
    x, y, _ = test.tensors
    assert (model(x).argmax(1) == y).float().mean() > 0.93
    trained = zip(loop.params.values(), model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in trained)  # the model itself
    assert re.search(r"step 40 \(40 of 40\): outer 0\.\d+", capsys.readouterr().err)


def test_wrong_labels_lose_their_weight(capsys):
    train, valid, test = digits(0, 500, wrong=150), digits(1000, 1500), digits(1500, 1797)
    model = classifier()
    weights = b_weights_of_noisy_examples(model, shuffled(train), shuffled(valid))
    wrong, right = weights[:150], weights[150:]
    assert wrong.mean() < 0.25
    assert right.mean() > 0.7
    assert (wrong[:, None] < right).float().mean() > 0.95
    x, y, _ = test.tensors
    assert (model(x).argmax(1) == y).float().mean() > 0.88


@pytest.mark.slow
def test_a_larger_penalty_and_batches_find_wrong_labels_that_small_ones_do_not():
    generator = torch.Generator().manual_seed(0)

    def points(count, wrong=0):
        x = torch.randn(count, 10, generator=generator)
        y = (x[:, 0] + x[:, 1] * x[:, 2] > 0).long()
        y[:wrong] = 1 - y[:wrong]
        return TensorDataset(x, y, torch.arange(count))

    train, valid, (x, y, _) = points(400, wrong=120), points(150), points(2000).tensors

    def weighted(rate, size):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))
        penalty = lambda params, _: rate * sum(p.square().sum() for p in params.values())
        problem = hypergrad.supervised(
            model, F.cross_entropy, penalty=penalty, example_weights="logit"
        )
        loop = hypergrad.Bilevel(
            problem.outer, problem.inner, problem.params, {"logit": torch.zeros(400)},
            inner_optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
            outer_optimizer=lambda hparams: torch.optim.Adam(hparams, lr=0.2),
            inner_batches=shuffled(train, size), outer_batches=shuffled(valid, 150),
            method=hypergrad.Alternating(inner_tol=None), on_failure="ignore",
        )  # fmt: skip
        for _ in loop.run(60):
            pass
        weights = loop.hparams["logit"]
        above = (weights[120:, None] > weights[:120]).float().mean()
        return above, (model(x).argmax(1) == y).float().mean()

    above, accuracy = weighted(1e-2, 400)
    above_before, accuracy_before = weighted(1e-3, 50)
    assert above > 0.85 > 0.8 > above_before
    assert accuracy > accuracy_before + 0.03


@pytest.mark.slow
def test_a_start_is_learnt_from_which_ten_points_are_enough():
    model = regressor()
    adapt = hypergrad.inner_solvers.LBFGS()

    def unseen(problem):
        drawn = list(sinusoids(20, torch.Generator().manual_seed(5)))
        values = []
        for train, test in drawn:
            params, _ = adapt(problem.inner(train), problem.params, problem.params)
            values.append(problem.outer(test)(params, problem.params).item())
        return sum(values) / len(values)

    before = unseen(c_few_shot_learning(model, [], adapt))
    after = unseen(c_few_shot_learning(model, [sinusoids(4) for _ in range(20)], adapt))
    assert before > 1.0
    assert after < 0.65 * before


def test_the_gradient_by_the_start_is_that_of_differences_and_that_of_gauss_newton_is_not():
    model = regressor().double()
    adapt = hypergrad.inner_solvers.LBFGS(maxiter=400)
    train, test = next(sinusoids(1, torch.Generator().manual_seed(7)))
    train, test = [tuple(part.double() for part in batch) for batch in (train, test)]
    problem = c_few_shot_learning(model, [[(train, test)]], adapt)  # one step, to leave the start
    inner, outer = problem.inner(train), problem.outer(test)
    start = {name: p.detach().clone() for name, p in problem.params.items()}
    generator = torch.Generator().manual_seed(8)
    direction = {n: torch.randn(p.shape, generator=generator).to(p) for n, p in start.items()}

    def loss_from(step):
        moved = {name: p + step * direction[name] for name, p in start.items()}
        params, adapted = adapt(inner, moved, moved)
        assert adapted.success
        return outer(params, moved).item()

    expected = (loss_from(1e-4) - loss_from(-1e-4)) / 2e-4
    params, _ = adapt(inner, start, start)

    def along(condition, **options):
        found = hypergrad.implicit_grad(outer, condition, params, start, **options)
        return sum((found[name] * d).sum().item() for name, d in direction.items())

    assert along(inner) == pytest.approx(expected, rel=1e-4)
    near = lambda params, start: 0.3 * sum((p - start[n]).square().sum() for n, p in params.items())
    gauss_newton = hypergrad.supervised(model, F.mse_loss, penalty=near).inner(train)
    with pytest.warns(hypergrad.ConvergenceWarning, match="GaussNewton leaves out"):
        wrong = along(gauss_newton)
    assert abs(wrong - expected) > 0.1 * abs(expected)
    assert along(gauss_newton, inner_tol=None) == pytest.approx(wrong)  # and nothing is said
