"""The networks of the meta-learning examples, against their plain counterparts."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from reproduction.method.models import InputBlock, OmniglotConvNet, SinusoidMLP


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class PlainConvNet(nn.Module):
    """`OmniglotConvNet` with a convolution, a normalisation and a ReLU at its entry too."""

    def __init__(self, net: OmniglotConvNet) -> None:
        super().__init__()
        channels = len(net.first.weight)
        self.convolution = nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False)
        self.normalisation = nn.BatchNorm2d(channels, track_running_stats=False)
        self.convolution.weight = net.first.filters
        self.normalisation.weight = net.first.weight
        self.normalisation.bias = net.first.bias
        self.rest = net.rest
        self.head = net.head

    def forward(self, images: Tensor) -> Tensor:
        first = torch.relu(self.normalisation(self.convolution(images)))
        logits: Tensor = self.head(self.rest(first).flatten(1))
        return logits


def small_net() -> OmniglotConvNet:
    """Return a net with affine parameters away from one and zero, in float64."""
    net = OmniglotConvNet(ways=5, channels=8).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def test_layers_and_sizes() -> None:
    net = OmniglotConvNet(ways=5)
    assert net(torch.rand(7, 1, 28, 28)).shape == (7, 5)
    convolutions = [
        net.first.filters,
        *(m.weight for m in net.rest.modules() if isinstance(m, nn.Conv2d)),
    ]
    assert [tuple(w.shape) for w in convolutions] == [(64, 1, 3, 3)] + 3 * [(64, 64, 3, 3)]
    assert not list(net.buffers())
    assert sum(p.numel() for p in net.parameters()) == 112_965


def test_input_block_is_convolution_normalisation_relu() -> None:
    images = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    net = small_net()
    torch.testing.assert_close(net(images), PlainConvNet(net)(images), rtol=1e-10, atol=1e-12)


def test_input_block_has_the_same_curvature() -> None:
    images = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    labels = torch.arange(5)
    net = small_net()
    plain = PlainConvNet(net)
    entry = [net.first.filters, net.first.weight, net.first.bias]
    vectors = [torch.randn_like(parameter) for parameter in entry]

    def product(model: nn.Module) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(model(images), labels)
        gradient = torch.autograd.grad(loss, entry, create_graph=True)
        return torch.autograd.grad(gradient, entry, vectors)

    for folded, expected in zip(product(net), product(plain), strict=True):
        torch.testing.assert_close(folded, expected, rtol=1e-8, atol=1e-10)


def test_constant_images_are_finite() -> None:
    block = InputBlock(4)
    assert block(torch.zeros(5, 1, 28, 28)).isfinite().all()


def test_tasks_batched_equal_a_loop() -> None:
    net = small_net()
    shared = {name: p.detach() for name, p in net.named_parameters()}
    params = {name: p + 0.1 * torch.randn(3, *p.shape, dtype=p.dtype) for name, p in shared.items()}
    images = torch.rand(3, 5, 1, 28, 28, dtype=torch.float64)
    labels = torch.arange(5)

    def loss(params: dict[str, Tensor], images: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (images,)), labels)

    batched = vmap(grad(loss))(params, images)
    for task in range(3):
        own = grad(loss)({name: p[task] for name, p in params.items()}, images[task])
        for name, gradient in own.items():
            torch.testing.assert_close(batched[name][task], gradient, rtol=1e-8, atol=1e-10)


def test_sinusoid_network() -> None:
    net = SinusoidMLP()
    assert net(torch.rand(10, 1)).shape == (10, 1)
    assert [tuple(p.shape) for p in net.parameters()] == [
        (40, 1),
        (40,),
        (40, 40),
        (40,),
        (1, 40),
        (1,),
    ]
