"""Conjugate gradients as one would write them by hand: so many steps, nothing checked."""

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """Solve ``A x = b`` from zero; `b` may have task dimensions in front of its last one."""
    x, r, p = torch.zeros_like(b), b, b
    rr = torch.linalg.vecdot(r, r)
    for _ in range(steps):
        Ap = product(p)
        alpha = (rr / torch.linalg.vecdot(p, Ap)).unsqueeze(-1)
        x, r = torch.addcmul(x, alpha, p), torch.addcmul(r, alpha, Ap, value=-1)
        rr_new = torch.linalg.vecdot(r, r)
        p = torch.addcmul(r, (rr_new / rr).unsqueeze(-1), p)
        rr = rr_new
    return x
