"""What each training example does to the loss of each test point."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as each_loss
from torch.nn.functional import cross_entropy

import hypergrad

F64 = torch.float64


class Regression:
    """Ridge regression: leaving an example out is known in closed form."""

    def __init__(self, n: int, m: int, features: int) -> None:
        generator = torch.Generator().manual_seed(n)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=F64, generator=generator)

        self.X, self.X_test, self.y, self.y_test = (
            normal(n, features), normal(m, features), normal(n), normal(m),
        )  # fmt: skip
        self.weights = 0.5 + torch.rand(n, dtype=F64, generator=generator)
        self.w = self.fit(self.weights)

    def fit(self, weights: Tensor) -> Tensor:
        H = self.X.T @ (weights[:, None] * self.X) + 0.3 * torch.eye(self.X.shape[1], dtype=F64)
        return torch.linalg.solve(H, self.X.T @ (weights * self.y))

    def train(self, w: Tensor) -> Tensor:
        return (self.X @ w - self.y) ** 2 / 2

    def test(self, w: Tensor) -> Tensor:
        return (self.X_test @ w - self.y_test) ** 2 / 2

    def decay(self, w: Tensor) -> Tensor:
        return 0.3 * (w * w).sum() / 2


@pytest.mark.parametrize(("n", "m"), [(12, 5), (5, 12)], ids=["test side", "training side"])
@pytest.mark.parametrize(
    "solver", [None, hypergrad.CG(rtol=1e-12), hypergrad.GMRES(rtol=1e-12)], ids=repr
)
def test_leaving_out_an_example_of_a_quadratic_is_the_influence_and_its_leverage(n, m, solver):
    p = Regression(n, m, 4)
    found, info = hypergrad.influence(
        p.test, p.train, p.w, weights=p.weights, regulariser=p.decay, solver=solver,
        return_info=True,
    )  # fmt: skip
    assert found.shape == (m, n)
    assert info.success.shape == (min(n, m),)
    assert info.success.all()
    H = p.X.T @ (p.weights[:, None] * p.X) + 0.3 * torch.eye(4, dtype=F64)
    leverage = p.weights * (p.X * torch.linalg.solve(H, p.X.T).T).sum(dim=1)
    slopes = torch.func.jacrev(p.test)(p.w)
    for i in range(n):
        without = p.weights.clone()
        without[i] = 0
        moved = p.fit(without) - p.w
        change = slopes @ moved * (1 - leverage[i])
        torch.testing.assert_close(found[:, i], change, rtol=1e-8, atol=1e-11)
        # Of the test loss itself, whose curvature along the way is known too.
        exact = p.test(p.w + moved) - p.test(p.w)
        bend = (p.X_test @ moved) ** 2 / 2
        torch.testing.assert_close(
            found[:, i] / (1 - leverage[i]) + bend, exact, rtol=1e-8, atol=1e-11
        )


@pytest.mark.parametrize("memory", [1, 2**30])
def test_the_influence_is_minus_the_derivative_by_the_weight_times_it(memory):
    p = Regression(9, 7, 4)
    found = hypergrad.influence(
        p.test, p.train, p.w, weights=p.weights, regulariser=p.decay, memory=memory
    )
    step = 1e-5
    for i in (0, 4):
        ends = []
        for sign in (1, -1):
            weights = p.weights.clone()
            weights[i] += sign * step
            ends.append(p.test(p.fit(weights)))
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(found[:, i], -p.weights[i] * slope, rtol=1e-6, atol=1e-8)


def test_a_mean_and_a_sum_are_the_same_with_their_weights():
    p = Regression(10, 3, 4)
    of_sum = hypergrad.influence(
        p.test, p.train, p.fit(torch.ones(10, dtype=F64)), regulariser=p.decay
    )
    of_mean = hypergrad.influence(
        p.test,
        p.train,
        p.fit(torch.ones(10, dtype=F64)),
        weights=torch.full((10,), 0.1, dtype=F64),
        regulariser=lambda w: p.decay(w) / 10,
    )
    torch.testing.assert_close(of_sum, of_mean)


def test_a_network_in_float32_agrees_with_a_loop_over_test_points():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    X, y, X_test, y_test = (
        torch.randn(30, 5), torch.randint(3, (30,)), torch.randn(6, 5), torch.randint(3, (6,)),
    )  # fmt: skip

    def losses(w, X, y):
        return cross_entropy(torch.func.functional_call(model, w, (X,)), y, reduction="none")

    def decay(w):
        return 2.0 * sum((t * t).sum() for t in w.values())

    params = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    optimiser = torch.optim.LBFGS(
        list(params.values()), max_iter=300, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = losses(params, X, y).sum() + decay(params)
        loss.backward()
        return loss

    optimiser.step(closure)
    found = hypergrad.influence(
        lambda w: losses(w, X_test, y_test),
        lambda w: losses(w, X, y),
        params,
        regulariser=decay,
        solver=hypergrad.CG(),
    )
    ones = torch.ones(30)
    for j in (0, 5):
        row = hypergrad.implicit_grad(
            lambda w, weights, j=j: losses(w, X_test, y_test)[j],
            lambda w, weights: (weights * losses(w, X, y)).sum() + decay(w),
            params,
            ones,
        )
        torch.testing.assert_close(found[j], -row, rtol=2e-3, atol=2e-5)


def test_retraining_without_the_example_correlates_with_the_influence():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 6, dtype=F64, generator=generator)
    y = (X[:, 0] + torch.randn(40, dtype=F64, generator=generator) > 0).to(F64)
    X_test, y_test = X[:8] + 0.1, 1 - y[:8]

    def fit(weights: Tensor) -> Tensor:
        w = torch.zeros(6, dtype=F64)
        for _ in range(30):
            p = (X @ w).sigmoid()
            H = X.T @ ((weights * p * (1 - p))[:, None] * X) + torch.eye(6, dtype=F64)
            w = w - torch.linalg.solve(H, X.T @ (weights * (p - y)) + w)
        return w

    ones = torch.ones(40, dtype=F64)
    w = fit(ones)
    found = hypergrad.influence(
        lambda w: each_loss(X_test @ w, y_test, reduction="none"),
        lambda w: each_loss(X @ w, y, reduction="none"),
        w,
        regulariser=lambda w: (w * w).sum() / 2,
    )
    changes = []
    for i in range(40):
        without = ones.clone()
        without[i] = 0
        loss = each_loss(X_test @ fit(without), y_test, reduction="none")
        changes.append(loss - each_loss(X_test @ w, y_test, reduction="none"))
    both = torch.stack([found.flatten(), torch.stack(changes, dim=1).flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.99
    assert 0.8 < found.norm() / torch.stack(changes).norm() < 1.2


@pytest.mark.parametrize("tests", [3, 15])  # fewer than training examples, and more
def test_losses_that_go_through_fused_attention_have_an_influence(tests):
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(k, 5, generator=generator) for k in (8, tests))

    def by_hand(z):
        return (z @ z.mT / 5**0.5).softmax(dim=-1) @ z

    def fused(z):
        return torch.nn.functional.scaled_dot_product_attention(*[z[None, None]] * 3)[0, 0]

    def influence(attention):
        return hypergrad.influence(
            lambda w: attention(v * (1 + w)).square().sum(dim=1),
            lambda w: attention(x * (1 + w)).square().sum(dim=1),
            torch.zeros(5),
            regulariser=lambda w: 200 * (w - 0.1).square().sum(),
            inner_tol=None,
        )

    torch.testing.assert_close(influence(fused), influence(by_hand), rtol=1e-4, atol=1e-5)


def test_wrong_vectors_and_unsolved_problems_are_named():
    p = Regression(9, 7, 4)
    with pytest.raises(hypergrad.StructureMismatch, match=r"inner_each must return a vector.*none"):
        hypergrad.influence(p.test, lambda w: p.train(w).sum(), p.w)
    with pytest.raises(hypergrad.StructureMismatch, match="outer_each must return a vector"):
        hypergrad.influence(lambda w: p.test(w).mean(), p.train, p.w)
    with pytest.raises(hypergrad.StructureMismatch, match="each of the 9 losses"):
        hypergrad.influence(p.test, p.train, p.w, weights=torch.ones(4))
    with pytest.raises(hypergrad.NotConverged, match="7 of 7 outputs"):
        hypergrad.influence(p.test, p.train, p.w + 1, regulariser=p.decay, on_failure="raise")
    with pytest.raises(TypeError, match="Did you mean 'regulariser'"):
        hypergrad.influence(p.test, p.train, p.w, regularizer=p.decay)
