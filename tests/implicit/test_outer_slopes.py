"""The outer loss: its direct term, and that it must depend on the inner variables."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from hypergrad import implicit_grad
from tests.weighted_ridge import expected, inner, outer, solution

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
D = torch.float64


@pytest.fixture
def h():
    return torch.tensor([0.3, 0.7, 1.1], dtype=D)


def test_an_outer_loss_without_params_is_not_connected(h):
    with pytest.raises(hypergrad.NotConnected, match="outer does not depend on params"):
        implicit_grad(lambda w, h: (h**2).sum(), inner, solution(h), h)


def test_a_hyperparameter_of_the_outer_loss_alone_has_its_direct_term(h):
    tree = {"h": h, "direct": torch.tensor(2.0, dtype=D)}
    hypergradient = implicit_grad(
        lambda w, t: outer(w, t["h"]) + t["direct"] ** 3,
        lambda w, t: inner(w, t["h"]),
        solution(h),
        tree,
    )
    torch.testing.assert_close(hypergradient["direct"], torch.tensor(12.0, dtype=D))


def test_aux_comes_back_detached_beside_the_gradient_or_in_the_info(h):
    def with_aux(w, h):
        return outer(w, h), {"fit": w * 2, "text": "seen"}

    grads, aux = implicit_grad(with_aux, inner, solution(h), h, has_aux=True)
    torch.testing.assert_close(grads, expected(h), rtol=1e-9, atol=0)
    torch.testing.assert_close(aux["fit"], solution(h) * 2)
    assert not aux["fit"].requires_grad
    assert aux["text"] == "seen"
    grads, info = implicit_grad(with_aux, inner, solution(h), h, has_aux=True, return_info=True)
    torch.testing.assert_close(info.aux["fit"], solution(h) * 2)
    with pytest.raises(hypergrad.StructureMismatch, match="has_aux"):
        implicit_grad(outer, inner, solution(h), h, has_aux=True)
