"""Functions that PyTorch refuses to differentiate twice: an error with the cure."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from hypergrad import custom_argmin, implicit_grad
from tests.quartic import LAM, X, Y, flat, inner, leaf, solve

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


def test_a_compiled_objective_is_an_error_with_the_cure():
    compiled = torch.compile(inner, backend="aot_eager")
    solver = custom_argmin(lambda *args: compiled(*args))(solve)
    lam = leaf(LAM)
    answer = flat(solver(None, X, Y, lam)).sum()
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"made by torch\.compile"):
        answer.backward()
    params = solve(None, X, Y, LAM)
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"made by torch\.compile"):
        implicit_grad(lambda p, h: flat(p).sum(), lambda p, h: compiled(p, X, Y, h), params, LAM)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_a_function_that_is_differentiable_once_is_refused_and_not_taken_for_a_constant():
    w, lam = torch.tensor(0.3), torch.tensor(1.0)
    inner = lambda w, lam: _Once.apply(w) + lam * w**2
    with pytest.raises(hypergrad.UnsupportedOperation, match="once_differentiable"):
        hypergrad.implicit_grad(lambda w, lam: w**2, inner, w, lam, inner_tol=None)


def test_fused_attention_is_evaluated_by_the_math_backend():
    q = torch.randn(1, 2, 8, 4)
    attend = torch.nn.functional.scaled_dot_product_attention
    inner = lambda w, lam: attend(q * w, q, q).square().sum() + lam * w**2
    outer = lambda w, lam: w**2
    w, lam = torch.tensor(0.3), torch.tensor(1.0)
    hypergradient = hypergrad.implicit_grad(outer, inner, w, lam, inner_tol=None)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        known = hypergrad.implicit_grad(outer, inner, w, lam, inner_tol=None)
    torch.testing.assert_close(hypergradient, known)
