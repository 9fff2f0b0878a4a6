"""The exact solution of the last layer's inner problem, against dense matrices and L-BFGS."""

import pytest
import torch
from torch.func import grad, hessian, vmap

from reproduction.method import head_newton
from reproduction.method.head_newton import (
    CrossEntropy,
    SquaredError,
    solve_by_conjugate_gradients,
    solve_directly,
    solve_head,
)


def problem(classes, shots, *, width=12, scale=1.0, dtype=torch.float64):
    """Draw features of length about one with a one for the bias, targets, and a centre."""
    torch.manual_seed(classes + shots)
    features = torch.randn(classes * shots, width).relu() / width**0.5
    features = torch.cat([features, torch.ones(len(features), 1)], 1)
    targets = torch.arange(classes).repeat_interleave(shots)
    return features.to(dtype), targets, scale * torch.randn(classes, width + 1).to(dtype)


def objective(loss, features, targets, centre, lam):
    return lambda phi: loss(features @ phi.mT, targets) + lam / 2 * (phi - centre).square().sum()


def by_lbfgs(loss, features, targets, centre, lam):
    """Minimise over the parameters themselves, for long."""
    phi = centre.clone().requires_grad_()
    value = objective(loss, features, targets, centre, lam)
    optimiser = torch.optim.LBFGS(
        [phi], max_iter=20_000, tolerance_grad=1e-12, tolerance_change=0, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimiser.zero_grad()
        loss = value(phi)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert phi.grad.norm() < 1e-8
    return phi.detach()


@pytest.mark.parametrize("lam", [1e-3, 0.5])
@pytest.mark.parametrize(("classes", "shots"), [(5, 1), (5, 5), (20, 1), (20, 3)])
def test_the_structured_system_of_a_cross_entropy_is_the_dense_one(classes, shots, lam):
    loss = CrossEntropy()
    features, targets, centre = problem(classes, shots)
    outputs, gram = features @ centre.mT, features @ features.mT
    right = loss.slope(outputs, targets)

    strength = torch.tensor(lam, dtype=torch.float64)
    solved = solve_directly(torch.softmax(outputs, -1), gram, strength, right)

    # H by autograd, with no use of its structure; an output's neighbours lie K apart.
    H = hessian(lambda u: loss(u.view_as(outputs), targets))(outputs.reshape(-1))
    big = torch.kron(gram, torch.eye(classes).double())
    dense = lam * torch.eye(len(H)).double() + H @ big
    expected = torch.linalg.solve(dense, right.reshape(-1)).view_as(outputs)
    torch.testing.assert_close(solved, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("classes", "shots"), [(5, 1), (20, 5)])
def test_conjugate_gradients_solve_the_same_system(monkeypatch, classes, shots):
    monkeypatch.setattr(head_newton, "CG_STEPS", 400)
    features, targets, centre = problem(classes, shots)
    outputs, gram = features @ centre.mT, features @ features.mT
    right, lam = CrossEntropy().slope(outputs, targets), torch.tensor(1e-2, dtype=torch.float64)

    found, expected = (
        solve(torch.softmax(outputs, -1), gram, lam, right)
        for solve in (solve_by_conjugate_gradients, solve_directly)
    )

    # The features have fewer dimensions than there may be examples: what counts is d' Z.
    torch.testing.assert_close(found.mT @ features, expected.mT @ features, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("most_direct", [0, 1000])
def test_both_ways_to_solve_a_step_end_at_the_same_head(monkeypatch, most_direct):
    monkeypatch.setattr(head_newton, "MOST_DIRECT", most_direct)
    features, targets, centre = problem(20, 5, width=60)
    lam = torch.tensor(1e-3, dtype=torch.float64)

    phi = solve_head(CrossEntropy(), features, targets, centre, lam, 30)

    assert grad(objective(CrossEntropy(), features, targets, centre, 1e-3))(phi).norm() < 1e-11


@pytest.mark.parametrize("width", [3, 40])
def test_features_may_repeat_or_be_fewer_than_examples(width):
    loss = CrossEntropy()
    features, targets, centre = problem(4, 3, width=width)
    features[1] = features[0]

    phi = solve_head(loss, features, targets, centre, torch.tensor(0.01, dtype=torch.float64), 20)

    slope = grad(objective(loss, features, targets, centre, 0.01))(phi)
    assert slope.norm() < 1e-13


@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError()])
def test_slopes_are_the_gradients_of_the_losses(loss):
    features, targets, centre = problem(3, 2)
    outputs = features @ centre.mT
    if isinstance(loss, SquaredError):
        targets = torch.randn_like(outputs)

    torch.testing.assert_close(loss.slope(outputs, targets), grad(loss)(outputs, targets))


@pytest.mark.parametrize("lam", [1e-3, 0.1])
@pytest.mark.parametrize(("classes", "shots"), [(5, 1), (5, 5), (20, 1), (20, 5)])
def test_newton_ends_where_a_long_minimisation_does(classes, shots, lam):
    features, targets, centre = problem(classes, shots, width=30)
    loss = CrossEntropy()

    phi = solve_head(loss, features, targets, centre, torch.tensor(lam, dtype=torch.float64), 12)

    expected = by_lbfgs(loss, features, targets, centre, lam)
    torch.testing.assert_close(phi, expected, rtol=0, atol=1e-5)
    assert grad(objective(loss, features, targets, centre, lam))(phi).norm() < 1e-12


def test_one_step_solves_a_squared_error():
    torch.manual_seed(0)
    features, targets, centre = torch.randn(7, 4), torch.randn(7, 2), torch.randn(2, 4)
    features, targets, centre = (t.double() for t in (features, targets, centre))
    lam = torch.tensor(0.3, dtype=torch.float64)

    phi = solve_head(SquaredError(), features, targets, centre, lam, 1)

    # The normal equations in the parameters: the mean is over 14 numbers.
    A = features.mT @ features / 7 + lam * torch.eye(4).double()
    expected = torch.linalg.solve(A, features.mT @ targets / 7 + lam * centre.mT).mT
    torch.testing.assert_close(phi, expected)


@pytest.mark.parametrize("lam", [1e-4, 1e-3, 3e-3])
@pytest.mark.parametrize("scale", [3.0, 30.0])
def test_a_head_that_is_sure_of_the_wrong_class_is_led_back(lam, scale):
    features, targets, centre = problem(5, 1, width=256, scale=scale, dtype=torch.float32)
    loss, strength = CrossEntropy(), torch.tensor(lam)
    slope = grad(objective(loss, features, targets, centre, lam))
    # Here the undamped step goes astray: the first one makes the gradient longer or not finite.
    gram, outputs = features @ features.mT, features @ centre.mT
    step = loss.solve(outputs, gram, strength, -loss.slope(outputs, targets))
    assert loss(outputs, targets) > 1
    undamped = objective(loss, features, targets, centre, lam)
    assert undamped(centre + step.mT @ features) > undamped(centre)

    phi = solve_head(loss, features, targets, centre, strength, 25)

    assert slope(phi).norm() < 1e-5


def test_a_batch_in_float32_is_each_task_in_float64():
    loss, lam = CrossEntropy(), torch.tensor(2e-3)
    _, targets, centre = problem(20, 1, width=60)
    torch.manual_seed(1)
    tasks = torch.rand(3, 20, 61).double() / 8

    each = torch.stack([solve_head(loss, z, targets, centre, lam.double(), 12) for z in tasks])
    batch = vmap(lambda z: solve_head(loss, z, targets, centre.float(), lam, 12))(tasks.float())

    torch.testing.assert_close(batch.double(), each, rtol=1e-3, atol=1e-4)
