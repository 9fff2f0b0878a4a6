"""The networks of the meta-learning examples.

All are ordinary modules for `torch.func.functional_call`: parameters come from
outside, there are no buffers, and nothing depends on the training mode, so that
`torch.func.vmap` may give each task parameters of its own.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SinusoidMLP(nn.Sequential):
    """The network 1-40-40-1 with ReLU of Finn et al. 2017, section 5.1."""

    def __init__(self, hidden: int = 40) -> None:
        """Make the layers.

        Parameters
        ----------
        hidden
            Width of both hidden layers.
        """
        super().__init__(
            nn.Linear(1, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )


class OmniglotConvNet(nn.Sequential):
    """Four strided 3 x 3 convolutions with batch statistics and ReLU, and a linear head.

    The statistics are always those of the pictures in the call, at test time too
    (transductive, as in Finn et al. 2017): there are no running ones.

    Convolutions are `F.conv2d`, which `vmap` over tasks turns into one grouped
    convolution; on the CPU that is faster than unfolding and a batched product.
    """

    def __init__(self, ways: int, channels: int = 64, side: int = 28) -> None:
        """Make the layers.

        Parameters
        ----------
        ways
            Number of classes.
        channels
            Filters in each convolution.
        side
            Height and width of the pictures.
        """
        for _ in range(4):
            side = (side + 1) // 2
        super().__init__(
            OrderedDict(
                first=InputBlock(channels),
                rest=nn.Sequential(*(_block(channels) for _ in range(3))),
                flatten=nn.Flatten(),
                head=nn.Linear(channels * side**2, ways),
            )
        )


class PooledConvNet(nn.Sequential):
    """Four 3 x 3 convolutions with padding 1 and ReLU, each halved by a maximum, and a linear head.

    For larger pictures, [B, 1, side, side]. Without a normalisation what one picture gives does not
    depend on the others in its batch.
    """

    def __init__(
        self, ways: int, side: int, channels: int = 64, *, normalised: bool = False
    ) -> None:
        """Make the layers.

        Parameters
        ----------
        ways
            Number of classes.
        side
            Height and width of the pictures.
        channels
            Filters in each convolution.
        normalised
            Whether batch statistics follow each convolution, which then has no bias.
        """
        super().__init__()
        for block in range(4):
            convolution = nn.Conv2d(
                channels if block else 1, channels, 3, padding=1, bias=not normalised
            )
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            norm = (BatchStatistics(channels),) if normalised else ()
            self.extend((convolution, *norm, nn.ReLU(), nn.MaxPool2d(2)))
        self.extend((nn.Flatten(), nn.Linear(channels * (side // 16) ** 2, ways)))


class InputBlock(nn.Module):
    """Convolution, batch normalisation and ReLU of one-channel images, in one pass.

    The same function as `Conv2d(1, channels, 3, stride=2, padding=1, bias=False)`,
    `BatchNorm2d(channels, track_running_stats=False)`, `ReLU()`. A filter's
    response is linear in the 3 x 3 patch under it, so its mean and variance over
    the batch follow from the patches' mean m and 9 x 9 covariance C as w.m and
    w.Cw, and the normalisation is a rescaled filter and a bias. This spares the
    largest activation of the network all the passes of a normalisation, forward,
    backward and twice backward; on the CPU the whole network's gradients and
    curvature products take a fifth to a third less time.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        """Make the filters.

        Parameters
        ----------
        channels
            Number of filters.
        eps
            Added to the variance, as in `torch.nn.BatchNorm2d`.
        """
        super().__init__()
        self.filters = nn.Parameter(torch.empty(channels, 1, 3, 3))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps
        nn.init.kaiming_normal_(self.filters, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return activations [B, channels, H/2, W/2] for images [B, 1, H, W]."""
        with torch.autocast(images.device.type, enabled=False):  # sums of squares
            patches = F.unfold(images, 3, stride=2, padding=1)  # [B, 9, H/2 * W/2]
            patches = patches.transpose(0, 1).flatten(1)
            mean = patches.mean(1)
            centred = patches - mean[:, None]
            covariance = centred @ centred.T / patches.shape[1]
            filters = self.filters.flatten(1)
            variance = ((filters @ covariance) * filters).sum(1)
            scale = self.weight * torch.rsqrt(variance + self.eps)
            bias = self.bias - scale * (filters @ mean)
            scaled = self.filters * scale[:, None, None, None]
            return torch.relu(F.conv2d(images, scaled, bias, stride=2, padding=1))


class BatchStatistics(nn.BatchNorm2d):
    """Batch normalisation by the statistics of the call, in the precision of its own parameters.

    Under autocast what comes in is narrower, and the vmapped derivative of a normalisation with
    parameters of another precision fails (torch 2.13).
    """

    def __init__(self, channels: int) -> None:
        """Make scale and shift.

        Parameters
        ----------
        channels
            What is normalised, each by itself.
        """
        super().__init__(channels, track_running_stats=False)

    def forward(self, activations: Tensor) -> Tensor:
        """Return normalised activations, [B, channels, H, W]."""
        normalised: Tensor = super().forward(activations.to(self.weight.dtype))
        return normalised


def _block(channels: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    return nn.Sequential(convolution, BatchStatistics(channels), nn.ReLU())
