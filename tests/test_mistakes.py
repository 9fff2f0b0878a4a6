"""Mistakes in a call name their cure: keywords, exchanged arguments, functions of too few."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

import hypergrad
from hypergrad import CG, StructureMismatch, implicit_grad

torch.manual_seed(0)
X, Y = torch.randn(8, 3), torch.randn(8)
W, H = torch.randn(3), torch.tensor(0.0)


def inner(w, h):
    return ((X @ w - Y) ** 2).mean() + h.exp() * (w**2).sum()


def outer(w, h):
    return ((w - 1) ** 2).sum()


def fit(init, h):
    return W


def loop(**changes):
    sgd = lambda variables: torch.optim.SGD(variables, lr=0.01)
    given = {"inner_optimizer": sgd, "outer_optimizer": sgd, **changes}
    return hypergrad.Bilevel(given.pop("outer", outer), given.pop("inner", inner), W, H, **given)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: CG(max_iter=10), "'maxiter'"),
        (lambda: CG(maxiters=10), "'maxiter'"),
        (lambda: CG(tol=1e-3), "'rtol'"),
        (lambda: CG(eps=1e-3), "'rtol'"),
        (lambda: CG(precond=None), "'preconditioner'"),
        (
            lambda: CG(lr=0.1),
            "There are maxiter, rtol, atol, damping, callback, progress, preconditioner, recycle.",
        ),
        (lambda: hypergrad.Neumann(maxiter=3), "'terms'"),
        (lambda: hypergrad.inner_solvers.LBFGS(max_iter=3), "'maxiter'"),
        (lambda: hypergrad.inner_solvers.GradientDescent(lr=0.1), "'step_size'"),
        (lambda: hypergrad.Alternating(steps=3), "'inner_steps'"),
        (lambda: hypergrad.Root(inner, symetric=True), "'symmetric'"),
        (lambda: implicit_grad(outer, inner, W, H, solvr=CG()), "'solver'"),
        (lambda: implicit_grad(outer, inner, W, H, max_iter=3), "solver=hypergrad.CG(maxiter=...)"),
        (lambda: hypergrad.custom_argmin(inner, arg_nums=1), "'argnums'"),
        (lambda: hypergrad.unrolled_grad(outer, inner, W, H, n_steps=3), "'steps'"),
        (lambda: loop(inner_optimiser=None), "'inner_optimizer'"),
        (lambda: loop(lr=0.1), "torch.optim.SGD(variables, lr=...)"),
        (lambda: loop(method="soba"), "hypergrad.SOBA()"),
        (lambda: loop(method="stoc-bio").step(), "hypergrad.StocBiO()"),
        (lambda: implicit_grad(outer, inner, W, H, solver="minres"), "MINRES()"),
        (lambda: implicit_grad(outer, inner, W, H, solver=CG), "CG()"),
        (lambda: loop(solver=CG()), "method=hypergrad.Alternating(solver=...)"),
        (lambda: loop(n_steps=3), "method=hypergrad.Alternating(inner_steps=...)"),
        (lambda: loop(tol=3), "method=hypergrad.Alternating(inner_tol=...)"),
        (lambda: hypergrad.custom_argmin(fit)(W, H), "custom_argmin(objective)(solver)"),
        (lambda: hypergrad.custom_root(fit)(W), "with a Tensor"),
        (lambda: hypergrad.custom_fixed_point(fit)(W, H, H), "with several arguments"),
        (lambda: hypergrad.compile(3), "got an object of type int"),
        (lambda: hypergrad.compile(loop()), "hypergrad.compile(loop.step)"),
    ],
)
def test_what_was_meant_is_named(call, words):
    with pytest.raises(TypeError) as caught:
        call()
    assert words in str(caught.value)


def test_solvers_are_still_values_with_a_signature():
    assert "maxiter" in inspect.signature(CG).parameters
    assert copy.copy(CG(3)) == pickle.loads(pickle.dumps(CG(maxiter=3))) == CG(maxiter=3)


@pytest.mark.parametrize("entrance", ["implicit_grad", "penalty_grad", "unrolled_grad"])
def test_exchanged_arguments_are_named(entrance):
    step = lambda w, h: w - 0.1 * torch.func.grad(inner)(w, h)
    options = {"penalty_grad": {"penalty": 10.0, "lr": 0.1}, "unrolled_grad": {"steps": 2}}
    function = step if entrance == "unrolled_grad" else inner
    with pytest.raises(StructureMismatch, match=r"and hparams look exchanged"):
        getattr(hypergrad, entrance)(outer, function, H, W, **options.get(entrance, {}))


def test_an_error_of_the_callers_own_stays_what_it_is():
    with pytest.raises(RuntimeError, match="size mismatch") as caught:
        implicit_grad(outer, lambda w, h: (X @ w[:2]).sum(), W, H)
    assert type(caught.value) is RuntimeError
    with pytest.raises(TypeError, match=r"has no len\(\)"):
        implicit_grad(outer, lambda w, h: len(3), W, H)


@pytest.mark.parametrize("few", [lambda w: (w**2).sum(), lambda: 0, lambda w, h, x, y: 0])
def test_a_function_of_too_few_arguments_or_too_many_is_told_which(few):
    for call in (
        lambda: implicit_grad(outer, few, W, H),
        lambda: implicit_grad(few, inner, W, H),
        lambda: implicit_grad(outer, hypergrad.Root(few), W, H),
        lambda: hypergrad.penalty_grad(outer, few, W, H, penalty=10.0, lr=0.1),
        lambda: hypergrad.unrolled_grad(outer, few, W, H, steps=1),
        lambda: hypergrad.check_hypergrad(outer, few, lambda h: W, H),
        lambda: loop(inner=few).step(),
    ):
        with pytest.raises(TypeError, match=r"must take \(params, hparams\)"):
            call()
    fit = hypergrad.custom_argmin(few)(lambda init, decay: W)
    with pytest.raises(TypeError, match=r"must take \(params, decay\)"):
        fit(None, H.clone().requires_grad_())
    with pytest.raises(TypeError, match=r"must take \(params, hparams, batch\)"):
        loop(inner_batches=[(X, Y)]).step()


METHODS = [None, hypergrad.HOAG(), hypergrad.SOBA(), hypergrad.F2SA(), hypergrad.SABA()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_losses_of_a_batch_in_a_loop_without_batches_name_where_they_are_passed(method):
    of_batch = lambda w, h, batch: ((batch[0] @ w - batch[1]) ** 2).mean() + h * (w**2).sum()
    batches, both = [(X, Y)], "pass outer_batches=... and inner_batches=... to Bilevel"
    for losses, given, words in (
        ({"outer": of_batch, "inner": of_batch}, {}, both),
        ({"outer": of_batch, "inner": of_batch}, {"inner_batches": batches}, "pass outer_batches"),
        ({"outer": of_batch, "inner": of_batch}, {"outer_batches": batches}, "pass inner_batches"),
        ({"outer": of_batch}, {}, "pass outer_batches=... to"),
        ({"inner": of_batch}, {}, "pass inner_batches=... to"),
        ({"inner": hypergrad.Minimum(of_batch)}, {}, "pass inner_batches=... to"),
    ):
        with pytest.raises(TypeError) as caught:
            loop(method=method, **losses, **given).step()
        assert words in str(caught.value)
        assert str(caught.value).count("must take") == 1
    with pytest.raises(TypeError) as caught:  # of other arguments altogether
        loop(inner=lambda w: (w**2).sum(), method=method).step()
    assert "batches=" not in str(caught.value)
    loop(outer=of_batch, inner=of_batch, method=method, inner_batches=batches,
         outer_batches=batches, on_failure="ignore").step()  # fmt: skip


def test_a_function_of_one_argument_is_told_which():
    two, one = lambda w, h: (X @ w - Y) ** 2, lambda w: (X @ w - Y) ** 2
    for call, words in (
        (lambda: hypergrad.influence(two, one, W), r"outer_each must take \(params\)"),
        (lambda: hypergrad.influence(one, two, W), r"inner_each must take \(params\)"),
        (lambda: hypergrad.influence(one, one, W, regulariser=two), r"regulariser must take"),
        (
            lambda: hypergrad.check_hypergrad(outer, inner, lambda w, h: W, H),
            r"solve must take \(hparams\), and takes \(w, h\)",
        ),
    ):
        with pytest.raises(TypeError, match=words):
            call()


def test_a_learning_rate_has_no_implicit_gradient_and_a_message_says_what_has():
    with pytest.warns(hypergrad.ConvergenceWarning, match=r"learning rate .* unrolled_grad"):
        implicit_grad(
            lambda w, rate: (w**2).sum(), lambda w, rate: ((w - 1) ** 2).sum(), W * 0 + 1, H
        )
