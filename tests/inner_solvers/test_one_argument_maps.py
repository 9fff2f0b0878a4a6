"""Projections and proximal maps that have no use for hyperparameters are called without them."""

from __future__ import annotations

import functools
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hypergrad
from hypergrad import ProjectedGradient, ProximalGradient, implicit_grad, projections, prox
from hypergrad._autograd.maps import most_positional
from hypergrad.inner_solvers import FISTA
from tests.problems import F64

Y = torch.tensor([2.0, -1.0, 0.5, -0.25], dtype=F64)
START = torch.zeros(4, dtype=F64)


def distance(x, y):
    return ((x - y) ** 2).sum() / 2


class Positive:
    """An object that is called."""

    def __call__(self, v):
        return torch.relu(v)

    def method(self, v):
        return self(v)


def counted(function):
    """A wrapper that says nothing of what it takes."""

    @functools.wraps(function)
    def call(*args, **keywords):
        return function(*args, **keywords)

    return call


# All are the projection onto the non-negative numbers.
PROJECTIONS = {
    "lambda": lambda v: v.relu(),
    "lambda of two": lambda v, y: v.relu(),
    "lambda of all": lambda *args: args[0].relu(),
    "projection": projections.non_negative,
    "partial": functools.partial(projections.box, lower=0.0, upper=10.0),
    "partial, by position": functools.partial(lambda low, v: v.clamp(min=low), 0.0),
    "operation": torch.relu,
    "operation of two": lambda v, y: torch.relu(v),
    "method of tensors": torch.Tensor.relu,
    "partial operation": functools.partial(torch.clamp, min=0.0),
    "function with a flag": F.relu,
    "module": nn.ReLU(),
    "object": Positive(),
    "method": Positive().method,
    "wrapped": counted(lambda v: v.relu()),
    "mapped": torch.func.vmap(lambda v: v.relu()),
}
OF_PROJECTIONS = pytest.mark.parametrize("project", PROJECTIONS.values(), ids=PROJECTIONS)


@OF_PROJECTIONS
def test_every_kind_of_projection_is_called_as_it_can_be(project):
    y = Y.clone()
    expected = 2 * Y.clamp(min=0)  # of the sum of the squares of relu(y)
    for condition in (
        ProjectedGradient(distance, project, 0.5),
        ProjectedGradient(distance, project),
        ProximalGradient(distance, prox.from_projection(project), 0.5),
    ):
        gradient = implicit_grad(lambda x, y: (x**2).sum(), condition, Y.clamp(min=0), y)
        torch.testing.assert_close(gradient, expected)
    x, info = FISTA(prox.from_projection(project))(distance, START, y)
    assert info.success
    torch.testing.assert_close(x, Y.clamp(min=0))
    assert torch.equal(y, Y)


@pytest.mark.parametrize(
    "shrink",
    [
        lambda v: v.relu(),
        lambda v, step: (v - 0 * step).relu(),
        lambda v, step, y: v.relu(),
        torch.relu,
        F.relu,
        nn.ReLU(),
        functools.partial(prox.non_negative_l1, penalty=0.0),
    ],
)
def test_a_proximal_map_may_leave_out_what_it_has_no_use_for(shrink):
    for step_size in (0.5, None):
        x, info = FISTA(shrink, step_size=step_size)(distance, START, Y)
        assert info.success
        torch.testing.assert_close(x, Y.clamp(min=0))
        condition = ProximalGradient(distance, shrink, step_size)
        gradient = implicit_grad(lambda x, y: (x**2).sum(), condition, x, Y)
        torch.testing.assert_close(gradient, 2 * Y.clamp(min=0))


def test_a_map_that_can_take_hyperparameters_gets_them():
    # The radius is the hyperparameter: x = y radius / ||y||, whose sum moves as that of y / ||y||.
    radius = torch.tensor(0.5, dtype=F64)
    on_ball = ProjectedGradient(lambda x, r: distance(x, Y), projections.l2_ball)
    x = Y * radius / Y.norm()
    gradient = implicit_grad(lambda x, r: x.sum(), on_ball, x, radius)
    torch.testing.assert_close(gradient, Y.sum() / Y.norm())


def test_a_map_that_takes_some_of_the_arguments_is_refused():
    objective = lambda x, y, z: distance(x, y) + 0 * z
    z = torch.tensor(0.0, dtype=F64)
    fit = hypergrad.argmin(objective, project=lambda v, y: v)
    with pytest.raises(TypeError, match=r"takes 2 arguments by position, and is passed 3: v, and"):
        fit(START, Y, z)
    fit = hypergrad.argmin(objective, prox=lambda v, step, y: v)
    with pytest.raises(TypeError, match=r"takes 3 arguments .* passed 4: v, step_size, and"):
        fit(START, Y, z)


def test_an_error_of_the_map_is_not_taken_for_a_signature():
    def broken(v, y):
        raise TypeError("of the caller")

    calls = []

    def once(v):
        calls.append(v)
        raise TypeError("of the caller")

    for project in (broken, once):
        with pytest.raises(TypeError, match="of the caller"):
            FISTA(prox.from_projection(project))(distance, START, Y)
    assert len(calls) == 1


def test_the_signature_is_looked_at_once(monkeypatch):
    looked = []
    signature = inspect.signature

    def counting(function, **keywords):
        looked.append(function)
        return signature(function, **keywords)

    project = lambda v: v.relu()
    condition = ProjectedGradient(distance, project)
    monkeypatch.setattr(inspect, "signature", counting)
    for _ in range(2):
        implicit_grad(lambda x, y: x.sum(), condition, Y.clamp(min=0), Y)
    assert looked.count(project) == 1


def test_conditions_and_solvers_stay_values():
    condition = ProjectedGradient(distance, projections.non_negative)
    implicit_grad(lambda x, y: x.sum(), condition, Y.clamp(min=0), Y)
    other = ProjectedGradient(distance, projections.non_negative)
    assert condition == other
    assert hash(condition) == hash(other)
    assert pickle.loads(pickle.dumps(condition)) == condition
    assert FISTA(prox.l1) == pickle.loads(pickle.dumps(FISTA(prox.l1)))


@pytest.mark.parametrize(
    ("function", "first", "count"),
    [
        (torch.relu, 1, 1),
        (torch.minimum, 1, 2),
        (functools.partial(torch.minimum, other=Y), 1, 1),
        (torch.clamp, 1, 3),
        (print, 1, None),
        (abs, 1, 1),
        (F.relu, 1, 1),
        (lambda v, radius, flag=True: v, 1, 3),
        (lambda v, *, radius=1.0: v, 1, 1),
        (prox.l1, 2, 3),
    ],
)
def test_what_a_map_takes_is_counted(function, first, count):
    assert most_positional(function, first) == count


def test_fista_without_a_map_says_where_it_goes():
    with pytest.raises(TypeError, match=r"FISTA\(prox\), or argmin"):
        FISTA()(distance, START, Y)
