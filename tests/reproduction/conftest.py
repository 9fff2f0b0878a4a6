"""The small network of `small_network`, its parameters and a task."""

import pytest
import torch

from reproduction.method.episodes import Episodes
from tests.reproduction.small_network import POINTS


@pytest.fixture
def network():
    torch.manual_seed(4)
    return torch.nn.Sequential(
        torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    ).double()


@pytest.fixture
def meta(network):
    return {name: leaf.detach() for name, leaf in network.named_parameters()}


@pytest.fixture
def task():
    torch.manual_seed(5)
    x, y = torch.randn(2, POINTS, 2).double(), torch.randn(2, POINTS, 1).double()
    return Episodes(x[0], y[0], x[1], y[1])
