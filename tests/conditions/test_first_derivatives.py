"""First derivatives as means over batches, in memory that no other leaf has."""

import torch

from hypergrad import CG, Minimum, implicit_grad
from tests.problems import F64, data


def test_leaves_whose_gradients_share_memory_are_added_up_apart():
    params = {name: data(i, 3, dtype=F64) for i, name in enumerate("abc")}
    h = data(4, 3, dtype=F64)

    def inner(p, h, batch):
        if batch == 0:  # both gradients are one tensor
            return (p["a"] + p["b"] - h).square().sum()
        if batch == 1:
            return (p["c"] * h - 1).square().sum() + p["c"].square().sum()
        return sum((w * p[k].square()).sum() for k, w in zip("abc", (1, 2, 3), strict=True))

    def outer(p, h):
        return sum(v.pow(3).sum() for v in p.values())

    def grad(condition):
        return implicit_grad(outer, condition, params, h, solver=CG(), inner_tol=None)

    expected = grad(Minimum(lambda p, h: sum(inner(p, h, i) for i in range(3)) / 3))
    found = grad(Minimum(inner, batches=[0, 1, 2], products="difference"))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
