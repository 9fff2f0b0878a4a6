"""Soft thresholding of singular values, with derivatives that stand ties and zeros.

PyTorch's derivative of a singular value decomposition divides by the differences of all singular
values. That of the thresholded matrix exists where they tie: only the gap at the threshold counts.
So the decomposition is taken for a constant, and the formulas below are expanded about it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .search import search

_STEPS = 3  # of an iteration that gains an order each: right up to the third derivative


def shrunk_singular_values(v: Tensor, threshold: float | Tensor) -> Tensor:
    """Form ``U max(S - threshold, 0) V^T`` of ``v = U S V^T``.

    Parameters
    ----------
    v : Tensor
        ``(..., m, n)``.
    threshold : float or Tensor
        One number.

    Returns
    -------
    x : Tensor
        Shaped like `v`; NaN where `v` or `threshold` is not finite.
    """
    if v.shape[-1] > v.shape[-2]:
        return shrunk_singular_values(v.mT, threshold).mT
    if not v.numel():
        return v
    if v.dtype in (torch.float16, torch.bfloat16):
        return shrunk_singular_values(v.float(), threshold).to(v.dtype)
    threshold = torch.as_tensor(threshold, dtype=v.dtype, device=v.device).reshape(())
    # A decomposition of numbers that are not finite raises, on some devices.
    sound = torch.isfinite(v.detach()).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    size = v.detach().abs().amax(dim=(-2, -1), keepdim=True)
    size = torch.where(sound & (size > 0), size, torch.ones_like(size))  # squares of 1e30 are none
    v = torch.where(sound, v / size, torch.zeros_like(v))
    threshold = threshold / size
    U, d, Vh = search(lambda v: tuple(torch.linalg.svd(v, full_matrices=False)), v)
    top = ~(d <= threshold.detach()[..., 0])
    on = top.to(v.dtype)
    eye = torch.eye(d.shape[-1], dtype=v.dtype, device=v.device)
    rest = eye - torch.diag_embed(on)
    between = (~top)[..., :, None] & top[..., None, :]
    kept = torch.where(between, d[..., None, :] - d[..., :, None], 1.0).to(v.dtype)
    both = torch.where(between, d[..., None, :] + d[..., :, None], 1.0).to(v.dtype)
    larger, smaller = d[..., None, :] / both, d[..., :, None] / both
    scale = torch.where(top, d, 1.0)

    # The spaces of the large singular values, L on the left and C on the right.
    A = v @ Vh.mT
    L, C = U * on[..., None, :], torch.diag_embed(on)
    for _ in range(_STEPS):
        image, back = A @ C, A.mT @ L
        by_left = U.mT @ image
        missed = image - L @ (torch.diag_embed(on) @ by_left)
        left = U.mT @ missed
        right = back - C @ (torch.diag_embed(on) @ back)
        beyond = (missed - U @ left) / scale[..., None, :]
        left, right = left * between, right * between
        L = L + U @ ((larger * left + smaller * right) / kept) + beyond * on[..., None, :]
        C = C + (smaller * left + larger * right) / kept

    L, C = L @ _inverse_root(L.mT @ L + rest), C @ _inverse_root(C.mT @ C + rest)
    K = L.mT @ A @ C + rest
    square, root = K.mT @ K, torch.diag_embed(scale)
    for _ in range(_STEPS):
        root = root + (square - root @ root) / (scale[..., :, None] + scale[..., None, :])
    inverse = torch.diag_embed(1 / scale)
    for _ in range(_STEPS):
        inverse = 2 * inverse - inverse @ root @ inverse
    x = size * (L @ (K - threshold * (K @ inverse)) @ C.mT @ Vh)
    return torch.where(sound & ~torch.isnan(threshold), x, torch.full_like(x, torch.nan))


def _inverse_root(G: Tensor) -> Tensor:
    """Form ``G^(-1/2)`` of a matrix that is the identity, but for its derivatives."""
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    root = eye
    for _ in range(_STEPS):
        root = root + (eye - root @ G @ root) / 2
    return root
