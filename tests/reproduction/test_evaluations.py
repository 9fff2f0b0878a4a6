"""The count of evaluations, against the calls that a meta-gradient makes."""

from dataclasses import replace

import pytest
import torch

from reproduction.method.episodes import Episodes
from reproduction.method.evaluations import evaluations_a_task, expected_products
from reproduction.method.head import HeadLearner, split_head
from reproduction.method.head_newton import SquaredError
from reproduction.method.hessian_free import HessianFree
from reproduction.method.meta import MetaLearner
from reproduction.method.systems import (
    METHODS,
    SYSTEMS,
    build_inner_solver,
    build_linear_solver,
)
from reproduction.runs import sinusoid

POINTS = 9  # of the task, as many as the network's outputs
LINE_SEARCH = 6  # trials
BUDGET = 3  # too small for any solve to end before it


@pytest.fixture
def counted(monkeypatch):
    """Compute a method's meta-gradient: calls of the network, products of all kinds."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    ).double()
    meta = {name: leaf.detach() for name, leaf in network.named_parameters()}
    x, y = torch.randn(2, POINTS, 2).double(), torch.randn(2, POINTS, 1).double()
    task = Episodes(x[0], y[0], x[1], y[1])
    calls = {"network": 0, "inner products": 0}

    def model(params, x):
        calls["network"] += 1
        return torch.func.functional_call(network, params, (x,))

    make = HessianFree._product

    def make_counted(self, *args):
        product = make(self, *args)

        def counting(v):
            calls["inner products"] += 1
            return product(v)

        return counting

    monkeypatch.setattr(HessianFree, "_product", make_counted)

    def compute(recipe, system):
        learner = MetaLearner(
            model, lambda outputs, y: (outputs - y).square().mean(), system.differentiation,
            build_inner_solver(recipe, system), recipe.lam,
            build_linear_solver(system.linear_solver, BUDGET, 0.0, recipe.lam),
            system.curvature, truncate=2,
        )  # fmt: skip
        _, measures = learner.task_gradient(meta, task)
        return calls["network"], calls["inner products"], int(measures.get("products", 0))

    return compute


@pytest.mark.parametrize("steps", [3, 5])
@pytest.mark.parametrize("method", [m for m in METHODS if SYSTEMS[m].adapted == "network"])
def test_the_count_is_that_of_the_calls_made(counted, method, steps):
    recipe, system = replace(sinusoid.RECIPES[method], inner_steps=steps), SYSTEMS[method]
    network, inner_products, products = counted(recipe, system)

    assert products == expected_products(system, BUDGET) * (system.differentiation == "implicit")
    # A network call is one backward pass, but for what each kind does besides.
    if recipe.inner_solver == "gauss-newton":
        # A step calls it twice, vmapped over the rows of the Jacobian and over the trials.
        expected = network - 2 * steps + steps * (POINTS + LINE_SEARCH)
    elif recipe.inner_solver == "hessian-free":
        # Four times: the gradient, two for the product's two directions, and the trials.
        expected = network - 4 * steps + steps * (1 + LINE_SEARCH) + inner_products
    else:
        expected = network
    expected += products
    if system.differentiation in {"unrolled", "truncated"}:
        expected += steps if system.differentiation == "unrolled" else 2
    if system.differentiation in {"unrolled", "truncated", "reptile"}:
        expected -= 1  # the query loss for the record alone

    found = evaluations_a_task(recipe, system, outputs=POINTS, truncate=2, products=products)
    assert found == expected


def test_a_step_of_the_head_passes_backward_through_the_body_once_for_each_set():
    network, passes = sinusoid.SinusoidMLP(), []
    body, names = split_head(network)

    def features(params, x):
        z = torch.func.functional_call(body, params, (x,))
        z.register_hook(lambda slope: passes.append(len(slope)))
        return z

    recipe, system = sinusoid.RECIPES["imaml-head"], SYSTEMS["imaml-head"]
    learner = HeadLearner(features, names, SquaredError(), recipe.inner_steps, recipe.lam)
    x, y = torch.randn(2, 1, POINTS, 1), torch.randn(2, 1, POINTS, 1)
    _, measures = learner.meta_gradient(
        learner.start(dict(network.named_parameters())), Episodes(x[0], y[0], x[1], y[1])
    )

    assert measures["products"] > 1
    assert len(passes) == evaluations_a_task(
        recipe, system, outputs=POINTS, truncate=2, products=measures["products"].item()
    )


def test_first_order_maml_by_the_identity_takes_no_products():
    system = replace(SYSTEMS["imaml"], linear_solver="identity")

    assert expected_products(system, 20) == 0
