"""Crops of Omniglot's whole pictures, 105 x 105: at random to train, central to test."""

import torch
from torch import Tensor
from torch.nn import functional as F

CROP_SIDE, CROP_PADDING = 80, 8


def random_crops(
    pictures: Tensor,
    generator: torch.Generator | None,
    *,
    side: int = CROP_SIDE,
    padding: int = CROP_PADDING,
) -> Tensor:
    """Cut a square out of each picture, anywhere in it or in a margin of paper around it.

    Parameters
    ----------
    pictures
        [..., height, width], paper 0.
    generator
        On the same device; None: torch's own.
    side
        Of the square.
    padding
        Width of the margin.

    Returns
    -------
    Tensor [..., side, side]
        Each from a place of its own.
    """
    flat = F.pad(pictures.flatten(0, -3), (padding,) * 4)
    count, height, width = flat.shape
    device = pictures.device
    places = torch.arange(side, device=device)
    rows, columns = (
        torch.randint(size - side + 1, (count, 1), generator=generator, device=device) + places
        for size in (height, width)
    )
    which = torch.arange(count, device=device)[:, None, None]
    crops = flat[which, rows[:, :, None], columns[:, None, :]]
    return crops.unflatten(0, pictures.shape[:-2])


def centre_crops(pictures: Tensor, *, side: int = CROP_SIDE) -> Tensor:
    """Cut the square in the middle out of each picture.

    Parameters
    ----------
    pictures
        [..., height, width].
    side
        Of the square.

    Returns
    -------
    Tensor [..., side, side]
        A view.
    """
    top, left = ((size - side) // 2 for size in pictures.shape[-2:])
    return pictures[..., top : top + side, left : left + side]
