"""The types that a user sees: for `mypy --strict` first, and run to show that they are true."""

from __future__ import annotations

from typing import Any, assert_type

import torch
from torch import Tensor, nn
from torch.func import functional_call

import hypergrad
from hypergrad import Bilevel, Report, SolveInfo, Status, StepInfo

Weights = dict[str, Tensor]

X, X_VAL = torch.randn(2, 20, 3)
Y, Y_VAL = X.sum(1), X_VAL.sum(1)
MODULE = nn.Linear(3, 1)


def inner(w: Tensor, decay: Tensor) -> Tensor:
    loss: Tensor = ((X @ w - Y) ** 2).mean() + (decay.exp() * w**2).sum()
    return loss


def outer(w: Tensor, decay: Tensor) -> Tensor:
    loss: Tensor = ((X_VAL @ w - Y_VAL) ** 2).mean()
    return loss


def with_aux(w: Tensor, decay: Tensor) -> tuple[Tensor, Weights]:
    return outer(w, decay), {"w": w}


def ridge(decay: Tensor) -> Tensor:
    w: Tensor = torch.linalg.solve(X.T @ X / 20 + decay.exp() * torch.eye(3), X.T @ Y / 20)
    return w


def step(w: Tensor, decay: Tensor) -> Tensor:
    gradient: Tensor = 2 * X.T @ (X @ w - Y) / 20 + 2 * decay.exp() * w
    return w - 0.1 * gradient


def train(params: Weights, h: Weights) -> Tensor:
    out: Tensor = functional_call(MODULE, params, (X,))
    loss: Tensor = ((out[:, 0] - Y) ** 2).mean()
    return loss + torch.stack([(h[k].exp() * p**2).sum() for k, p in params.items()]).sum()


def validate(params: Weights, h: Weights) -> Tensor:
    out: Tensor = functional_call(MODULE, params, (X_VAL,))
    loss: Tensor = ((out[:, 0] - Y_VAL) ** 2).mean()
    return loss


DECAY = torch.tensor(-1.0)
W = ridge(DECAY)


def test_implicit_grad_returns_the_type_of_the_hyperparameters() -> None:
    grads = hypergrad.implicit_grad(outer, inner, W, DECAY)
    assert_type(grads, Tensor)
    grads, info = hypergrad.implicit_grad(
        outer, inner, W, DECAY, solver=hypergrad.CG(rtol=1e-6), x0=None, return_info=True
    )
    assert_type(info, SolveInfo)
    grads, aux = hypergrad.implicit_grad(with_aux, inner, W, DECAY, has_aux=True)
    assert_type(aux, Any)
    grads, info = hypergrad.implicit_grad(
        with_aux, inner, W, DECAY, has_aux=True, return_info=True, on_failure="raise"
    )
    assert isinstance(grads, Tensor)
    assert torch.equal(info.aux["w"], aux["w"])


def test_implicit_grad_takes_lambdas_conditions_and_dicts() -> None:
    decays = {name: torch.zeros(()) for name, _ in MODULE.named_parameters()}
    params = {name: p.detach() for name, p in MODULE.named_parameters()}
    grads = hypergrad.implicit_grad(validate, train, params, decays, inner_tol=None)
    assert_type(grads, Weights)
    assert grads.keys() == decays.keys()
    newton = hypergrad.GaussNewton(
        lambda p, h: functional_call(MODULE, p, (X,))[:, 0], lambda out, h: ((out - Y) ** 2).mean()
    )
    both = hypergrad.implicit_grad(
        lambda p, h: validate(p, h) + h["bias"],
        newton,
        params,
        decays,
        inner_tol=None,
        on_failure="ignore",
    )
    assert_type(both, Weights)
    flag = bool(torch.ones(()))
    assert_type(hypergrad.implicit_grad(outer, inner, W, DECAY, return_info=flag), Any)


def test_implicit_backward_returns_the_loss() -> None:
    decay = DECAY.clone().requires_grad_()
    optimiser = torch.optim.SGD([decay], lr=0.1)
    loss = hypergrad.implicit_backward(outer, inner, W, decay)
    assert_type(loss, Tensor)
    loss, info = hypergrad.implicit_backward(outer, inner, W, decay, return_info=True)
    assert_type(info, SolveInfo)
    optimiser.step()
    assert isinstance(loss, Tensor)


def test_an_info_has_tensors_and_a_status() -> None:
    _, info = hypergrad.implicit_grad(outer, inner, W, DECAY, return_info=True)
    figures = [info.residual_norm, info.inner_residual, info.outer_error, info.error_estimate]
    assert_type(figures, list[Tensor])
    assert_type(info.success, Tensor)
    assert_type(Status(int(info.status)), Status)
    assert Status(int(info.status)) is Status.CONVERGED
    assert all(isinstance(figure, Tensor) for figure in figures)
    assert_type(info.method, str)


@hypergrad.custom_argmin(inner)
def fit(init: Tensor | None, decay: Tensor) -> Tensor:
    return ridge(decay)


@hypergrad.custom_root(lambda x, a: x**2 - a, solver=hypergrad.GMRES(), argnums=1)
def sqrt(init: Tensor | None, a: Tensor) -> Tensor:
    return a.sqrt()


@hypergrad.custom_fixed_point(step, has_aux=True, batching="loop", callback=print)
def iterate(w: Tensor, decay: Tensor, *, steps: int = 500) -> tuple[Tensor, int]:
    for _ in range(steps):
        w = step(w, decay)
    return w, steps


def a_wrong_call() -> Tensor:  # were the decorated function untyped, the ignore would be unused
    return fit(None, "a string")  # type: ignore[arg-type]


def test_a_decorated_function_keeps_its_signature() -> None:
    assert_type(fit(None, DECAY), Tensor)
    assert_type(sqrt(None, torch.tensor(4.0)), Tensor)
    w, count = iterate(torch.zeros(3), DECAY, steps=400)
    assert_type(count, int)
    assert_type(torch.func.grad(lambda d: outer(fit(None, d), d))(DECAY), Any)
    assert isinstance(w, Tensor)
    assert count == 400


def test_the_two_rules_return_pytrees() -> None:
    def condition(x: Tensor, a: Tensor) -> Tensor:
        return x**2 - a

    two, four, one = torch.tensor(2.0), torch.tensor(4.0), torch.tensor(1.0)
    (grads,) = hypergrad.root_vjp(condition, two, (four,), one)
    tangent = hypergrad.root_jvp(condition, two, (four,), (one,))
    assert_type(tangent, Tensor)
    tangent, info = hypergrad.root_jvp(condition, two, (four,), (one,), return_info=True)
    assert_type(info, SolveInfo)
    assert torch.equal(grads, tangent)


def test_solvers_are_values_that_can_be_kept_and_passed() -> None:
    solvers: list[hypergrad.CG | hypergrad.MINRES | hypergrad.GMRES | hypergrad.Exact] = [
        hypergrad.CG(maxiter=20, damping=0.1),
        hypergrad.MINRES(rtol=1e-6),
        hypergrad.GMRES(restart=10),
        hypergrad.Exact(),
    ]
    for solver in solvers:
        assert_type(hypergrad.implicit_grad(outer, inner, W, DECAY, solver=solver), Tensor)
    x, info = hypergrad.CG().solve(lambda v: 2 * v, torch.ones(3))
    assert_type(info, SolveInfo)
    assert isinstance(x, Tensor)


def test_conditions_with_penalties_and_constraints() -> None:
    lasso = hypergrad.ProximalGradient(
        lambda w, h: ((w - h) ** 2).sum() / 2, lambda v, s, h: hypergrad.prox.l1(v, 0.1 * s), 0.5
    )
    h = torch.tensor([1.0, 2.0])
    assert_type(hypergrad.implicit_grad(lambda w, h: w.sum(), lasso, h - 0.1, h), Tensor)


def test_inner_solvers_return_the_solution_and_an_info() -> None:
    w, info = hypergrad.inner_solvers.LBFGS(tol=1e-4)(inner, torch.zeros(3), DECAY)
    assert_type(info, hypergrad.inner_solvers.InnerInfo)
    assert isinstance(w, Tensor)


def test_estimators_return_the_type_of_the_hyperparameters() -> None:
    assert_type(hypergrad.unrolled_grad(outer, step, W, DECAY, steps=3), Tensor)
    assert_type(hypergrad.unrolled_grad(with_aux, step, W, DECAY, steps=3, has_aux=True), Any)
    assert_type(hypergrad.one_step_grad(outer, step, W, DECAY), Tensor)
    assert_type(hypergrad.finite_difference_grad(outer, inner, W, DECAY), Tensor)
    grads, info = hypergrad.finite_difference_grad(outer, inner, W, DECAY, return_info=True)
    assert_type(info, SolveInfo)
    grads = hypergrad.penalty_grad(
        outer, inner, W, DECAY, penalty=100.0, lr=0.1, on_failure="ignore"
    )
    assert_type(grads, Tensor)
    grads, bome = hypergrad.value_function_grad(outer, inner, W, DECAY, lr=0.1, return_info=True)
    assert_type(bome, hypergrad.ValueFunctionInfo)
    grads, noise = hypergrad.evolution_strategies_grad(
        outer, None, ridge, DECAY, pairs=2, return_info=True
    )
    assert_type(noise, hypergrad.EvolutionInfo)
    assert isinstance(grads, Tensor)


def test_the_check_returns_a_report() -> None:
    report = hypergrad.check_hypergrad(outer, inner, ridge, DECAY)
    assert_type(report, Report)
    assert_type(report.ok, bool)
    assert report.ok, report


def test_a_loop_that_is_stepped_through() -> None:
    decay = DECAY.clone().requires_grad_()
    loop = Bilevel(
        outer,
        inner,
        torch.zeros(3),
        decay,
        inner_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1),
        outer_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1),
        method=hypergrad.Alternating(inner_steps=50),
    )
    info = loop.step()
    assert_type(info, StepInfo)
    assert_type(info.outer_value, Tensor)
