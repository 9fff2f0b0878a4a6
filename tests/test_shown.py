"""Records as text: one line, with shapes in place of tensors and no addresses."""

from __future__ import annotations

import torch

from hypergrad import CG, implicit_grad
from tests.problems import F64


def solved(tree):
    """The evidence of a quadratic whose solution is its hyperparameters."""
    _, info = implicit_grad(
        lambda w, t: sum(leaf.sum() for leaf in w.values()),
        lambda w, t: sum(((w[k] - t[k]) ** 2).sum() for k in w),
        tree,
        tree,
        solver=CG(),
        return_info=True,
    )
    return info


def test_a_number_is_shown_and_a_vector_by_its_shape():
    text = repr(solved({"a": torch.ones(3, dtype=F64), "b": torch.tensor(2.0)}))
    assert text.startswith("SolveInfo(status=0, success=True, iterations=1, ")
    assert "solution={'a': float64[3], 'b': float32[]}" in text
    assert "method='CG'" in text
    assert "\n" not in text


def test_many_tensors_are_counted():
    text = repr(solved({str(k): torch.ones(k + 1) for k in range(4)}))
    assert "solution=<4 tensors of 10 entries>" in text


def test_what_a_transform_has_wrapped_is_shown_by_its_shape():
    texts = []

    def one(t):
        info = solved({"a": t})
        texts.append(repr(info))
        return info.status

    torch.func.vmap(one)(torch.ones(2, 3))
    assert "status=int64[]" in texts[0]
