"""The finite-difference gradient of DARTS and SAMA against exact products and closed forms."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hypergrad
from hypergrad import Identity, finite_difference_grad
from tests.problems import F64, data, logistic, relative_error

LOGISTIC = logistic()
W = LOGISTIC.solve(LOGISTIC.hparams)


def test_it_is_exact_where_the_objective_is_quadratic_and_the_scale_is_its_curvature():
    h = {"centre": data(40, 3, dtype=F64), "weight": torch.tensor(2.0, dtype=F64)}
    solution = lambda h: h["centre"].sin() * h["weight"]
    inner = lambda w, h: 5 * (w - solution(h)).square().sum() / 2
    outer = lambda w, h: (w**3).sum() + h["weight"]
    expected = grad(lambda h: outer(solution(h), h))(h)
    hypergradient = finite_difference_grad(outer, inner, solution(h), h, scale=5.0)
    assert relative_error(hypergradient, expected) < 1e-6


def test_with_the_exact_inverse_as_preconditioner_it_is_the_hypergradient():
    H = torch.func.hessian(LOGISTIC.inner)(W, LOGISTIC.hparams)
    hypergradient, info = finite_difference_grad(
        LOGISTIC.outer,
        LOGISTIC.inner,
        W,
        LOGISTIC.hparams,
        preconditioner=lambda b: torch.linalg.solve(H, b),
        return_info=True,
    )
    assert relative_error(hypergradient, LOGISTIC.hypergradient(LOGISTIC.hparams)) < 1e-6
    b = grad(LOGISTIC.outer)(W, LOGISTIC.hparams)
    torch.testing.assert_close(info.solution, torch.linalg.solve(H, b))
    assert info.success
    assert info.error_estimate.isnan()  # of u it knows nothing


# The difference itself


def bent(w: Tensor, h: Tensor) -> Tensor:
    """An objective whose cross derivative is not linear in w."""
    return (h * w.exp()).sum() + (h.sin() * w**4).sum()


P, T = data(41, 5, dtype=F64) / 2, data(42, 5, dtype=F64)
OUTER = lambda w, h: (w * T).sum() + (w**2).sum()


def error(epsilon: float | None, dtype: torch.dtype = F64) -> float:
    exact = hypergrad.implicit_grad(
        OUTER, bent, P, T, solver=Identity(), inner_tol=None, on_failure="ignore"
    )
    outer = lambda w, h: (w * T.to(dtype)).sum() + (w**2).sum()
    hypergradient = finite_difference_grad(outer, bent, P.to(dtype), T.to(dtype), epsilon=epsilon)
    return relative_error(hypergradient, exact)


def test_half_the_distance_is_a_quarter_of_the_error():
    errors = [error(epsilon) for epsilon in (0.2, 0.1, 0.05)]
    for larger, smaller in itertools.pairwise(errors):
        assert larger / smaller == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize(("dtype", "most"), [(F64, 1e-8), (torch.float32, 1e-3)])
def test_the_default_distance_suits_the_dtype(dtype, most):
    assert error(None, dtype) < most


def test_with_a_learning_rate_it_is_darts_unrolled_step():
    """Equation 7 of the paper: the outer loss after one step, differentiated through it."""
    rate = 0.05
    exact = grad(lambda h: OUTER(P - rate * grad(bent)(P, h), h))(T)
    errors = [
        relative_error(finite_difference_grad(OUTER, bent, P, T, lr=rate, epsilon=e), exact)
        for e in (0.2, 0.1)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.02)
    assert relative_error(finite_difference_grad(OUTER, bent, P, T, lr=rate), exact) < 1e-8
    step = lambda w, h: w - rate * grad(bent)(w, h)
    one = hypergrad.one_step_grad(OUTER, step, P, T)
    assert relative_error(one, exact) < 1e-12


def test_with_adams_adaptation_it_is_samas_derivative_of_the_update():
    """One step of Adam, differentiated exactly; a linear outer loss is the same on both sides."""
    m, v, t = data(48, 5, dtype=F64) / 10, data(49, 5, dtype=F64) ** 2, 7

    def update(g: Tensor) -> Tensor:
        first, second = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        return 0.01 * first / (1 - 0.9**t) / ((second / (1 - 0.99**t)).sqrt() + 1e-8)

    outer = lambda w, h: (w * T).sum()
    exact = grad(lambda h: outer(P - update(grad(bent)(P, h)), h))(T)
    adaptation = grad(lambda g: update(g).sum())(grad(bent)(P, T))  # the Jacobian is diagonal
    hypergradient = finite_difference_grad(
        outer, bent, P, T, preconditioner=lambda b: adaptation * b
    )
    assert relative_error(hypergradient, exact) < 1e-7


def test_the_rule_of_darts_is_a_norm_and_not_a_factor():
    """A larger outer loss moves the two points by as much."""
    seen: list[Tensor] = []

    def inner(w: Tensor, h: Tensor) -> Tensor:
        seen.append(w.detach())
        return bent(w, h)

    for factor in (1e-6, 1.0, 1e6):
        finite_difference_grad(lambda w, h, c=factor: c * OUTER(w, h), inner, P, T, epsilon=0.01)
    for above, below in zip(seen[::2], seen[1::2], strict=True):
        assert float((above - P).norm()) == pytest.approx(0.01, rel=1e-6)
        torch.testing.assert_close(above + below, 2 * P)


def test_a_difference_lost_in_rounding_is_said():
    """In float32 two points 1e-9 apart are one, whose difference is a gradient of zero."""
    w, h = P.float(), T.float()
    given = (lambda w, h: (w**2).sum(), bent, w, h)
    with pytest.warns(hypergrad.ConvergenceWarning, match=r"lost in rounding.*epsilon"):
        finite_difference_grad(*given, epsilon=1e-9)
    with pytest.raises(hypergrad.NotConverged, match="lost in rounding"):
        finite_difference_grad(*given, epsilon=1e-9, on_failure="raise")
    _, info = finite_difference_grad(*given, epsilon=1e-9, on_failure="ignore", return_info=True)
    assert not info.success
    assert info.status == hypergrad.Status.STAGNATED
    finite_difference_grad(*given)


def test_an_outer_gradient_of_zero_is_an_indirect_term_of_zero():
    outer = lambda w, h: (w - P).square().sum() + h.sum()
    torch.testing.assert_close(finite_difference_grad(outer, bent, P, T), torch.ones_like(T))


# Networks


def test_it_works_where_fused_attention_has_no_second_derivative():
    q = data(43, 1, 2, 8, 4, dtype=torch.float32)
    bias = torch.zeros(4)

    def inner(w: Tensor, h: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(q * w, q * (1 + h), q)
        return attended.square().mean() + w.square().mean()

    outer = lambda w, h: (w - 1).square().sum()
    w = torch.full((4,), 0.5)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with pytest.raises(hypergrad.UnsupportedOperation, match=r"SDPBackend\.MATH"):
            hypergrad.implicit_grad(outer, inner, w, bias, solver=Identity(), inner_tol=None)
        hypergradient = finite_difference_grad(outer, inner, w, bias)
    with sdpa_kernel(SDPBackend.MATH):
        exact = hypergrad.implicit_grad(outer, inner, w, bias, solver=Identity(), inner_tol=None)
    assert relative_error(hypergradient, exact) < 1e-2


def test_it_works_where_a_compiled_loss_has_no_second_derivative():
    compiled = torch.compile(bent, backend="aot_eager")
    given = (OUTER, compiled, P, T)
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"torch\.compile"):
        hypergrad.implicit_grad(*given, solver=Identity(), inner_tol=None)
    expected = finite_difference_grad(OUTER, bent, P, T)
    torch.testing.assert_close(finite_difference_grad(*given), expected)


def test_both_sides_see_one_dropout_and_the_generator_moves_by_one_call_of_each_loss():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    x = data(44, 20, 6, dtype=F64)
    params = {k: v.detach() for k, v in net.named_parameters()}
    h = data(45, 20, dtype=F64)

    def inner(w: Any, h: Tensor) -> Tensor:
        return (h.sigmoid() * functional_call(net, w, (x,)).squeeze().square()).mean()

    def outer(w: Any, h: Tensor) -> Tensor:
        return functional_call(net, w, (x,)).mean()

    torch.manual_seed(1)
    hypergradient = finite_difference_grad(outer, inner, params, h)
    after = torch.rand(3)
    torch.manual_seed(1)
    b = grad(outer)(params, h)
    masked = torch.get_rng_state()

    def cross(h: Tensor) -> Tensor:
        torch.set_rng_state(masked)
        by_w = grad(inner)(params, h)
        return sum((by_w[k] * b[k]).sum() for k in b)

    assert relative_error(hypergradient, -grad(cross)(h)) < 1e-6
    torch.testing.assert_close(after, torch.rand(3))


def test_weights_are_never_edited():
    net = nn.Linear(3, 1)
    params = dict(net.named_parameters())
    before = {k: (v.detach().clone(), v._version) for k, v in params.items()}
    x = data(46, 5, 3, dtype=torch.float32)
    loss = lambda w, h: (h * functional_call(net, w, (x,)).squeeze() ** 3).sum()
    finite_difference_grad(loss, loss, params, torch.ones(5))
    for name, p in params.items():
        assert torch.equal(p, before[name][0])
        assert p._version == before[name][1]
        assert p.grad is None


def test_a_frozen_parameter_is_a_constant():
    """Moving it too would add its share of the cross derivative."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).double()
    net[0].requires_grad_(False)
    x, h = data(47, 5, 3, dtype=F64), torch.ones(5, dtype=F64)
    loss = lambda w, h: (h * functional_call(net, w, (x,)).squeeze() ** 2).sum()
    params = dict(net.named_parameters())
    free = {k: v for k, v in params.items() if v.requires_grad}
    exact = hypergrad.implicit_grad(
        loss, loss, params, h, solver=Identity(), inner_tol=None, on_failure="ignore"
    )
    hypergradient, info = finite_difference_grad(loss, loss, params, h, return_info=True)
    assert relative_error(hypergradient, exact) < 1e-6
    assert not info.solution["0.weight"].any()
    assert set(free) == {"1.weight", "1.bias"}


@pytest.mark.parametrize(
    "options",
    [{"scale": 0.0}, {"lr": -1.0}, {"epsilon": 0.0}, {"lr": 0.1, "scale": 2.0}],
    ids=repr,
)
def test_distances_and_rates_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"must be|one of"):
        finite_difference_grad(OUTER, bent, P, T, **options)


def test_a_preconditioner_of_another_shape_is_refused():
    with pytest.raises(hypergrad.StructureMismatch, match="What preconditioner returned"):
        finite_difference_grad(OUTER, bent, P, T, preconditioner=lambda b: b[:2])


def test_each_task_of_a_batch_is_moved_by_its_own_distance():
    sizes = torch.tensor([1e-3, 1.0, 1e3], dtype=F64)

    def task(c: Tensor) -> Tensor:
        return finite_difference_grad(
            lambda w, h: c * OUTER(w, h), bent, P * c.sqrt().clamp(max=2), T
        )

    torch.testing.assert_close(
        vmap(task)(sizes), torch.stack([task(c) for c in sizes]), rtol=1e-7, atol=1e-12
    )


def of_two_dtypes(dtype: torch.dtype) -> tuple[Any, ...]:
    """w solves (diag(1, 2, 4) + b) w = a, with `b` in a coarser dtype than the rest."""
    diagonal = torch.tensor([1.0, 2.0, 4.0], dtype=F64)
    h = {"a": torch.tensor(2.0, dtype=F64), "b": torch.tensor(0.25, dtype=dtype)}
    solve = lambda h: h["a"] / (diagonal + h["b"])
    outer = lambda w, h: ((w - 1) ** 2).sum() / 2 + h["a"] * w.sum()
    inner = lambda w, h: (diagonal * w**2).sum() / 2 - h["a"] * w.sum() + h["b"] * (w @ w) / 2
    want = grad(lambda h: outer(solve(h), h))({name: leaf.double() for name, leaf in h.items()})
    inverse = lambda v: v / (diagonal + h["b"])
    return outer, inner, solve(h), h, want, inverse


def test_the_default_distance_suits_the_coarsest_dtype_of_the_hyperparameters() -> None:
    """A float32 hyperparameter beside float64 parameters was off by five per cent, in silence."""
    outer, inner, w, h, want, inverse = of_two_dtypes(torch.float32)
    hypergradient = finite_difference_grad(outer, inner, w, h, preconditioner=inverse)
    assert hypergradient["b"].dtype == torch.float32
    for name, leaf in hypergradient.items():
        torch.testing.assert_close(leaf.double(), want[name], rtol=1e-3, atol=0)


def test_a_leaf_of_coarser_dtype_that_is_lost_in_rounding_is_said() -> None:
    outer, inner, w, h, want, inverse = of_two_dtypes(torch.bfloat16)
    with pytest.warns(hypergrad.ConvergenceWarning, match="lost in rounding"):
        finite_difference_grad(outer, inner, w, h, preconditioner=inverse)
    with pytest.warns(hypergrad.ConvergenceWarning, match="lost in rounding"):
        hypergradient = hypergrad.penalty_grad(outer, inner, w, h, penalty=1e4, lr=0.2, steps=400)
    assert relative_error(hypergradient["b"].double(), want["b"]) > 0.1  # with reason
