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
    problem = hypergrad.supervised(model, F.mse_loss, penalty=near)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for four_tasks in tasks:
        optimizer.zero_grad()
        for train, test in four_tasks:
            inner, outer = problem.inner(train), problem.outer(test)
            params, _ = adapt(inner, problem.params, problem.params)
            hypergrad.implicit_backward(outer, inner, params, problem.params, inner_tol=None)
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


def test_a_start_is_learnt_from_which_ten_points_are_enough():
    model = regressor()
    adapt = hypergrad.inner_solvers.LBFGS(maxiter=20)

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
