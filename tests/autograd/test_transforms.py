"""The contexts that surround a call: transforms, compiled functions, grad modes, autocast."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import functional
from torch.func import grad, vmap

import hypergrad
from hypergrad import (
    CG,
    GMRES,
    LSMR,
    MINRES,
    Auto,
    BiCGSTAB,
    Exact,
    Neumann,
    NormalCG,
    Nystrom,
    custom_argmin,
    custom_root,
    implicit_grad,
)
from tests.hosts import host_is_not_asked
from tests.problems import F64
from tests.quartic import LAM, LAMS, ONES, C, D, X, Y, close, flat, inner, leaf, reference, solve

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
fit = custom_argmin(inner)(solve)


def vector(solver):
    return lambda lam: flat(solver(None, X, Y, lam))


def total(solver):
    return lambda lam: vector(solver)(lam).square().sum()


FUNCTIONAL = {
    "jacobian": lambda f, s: functional.jacobian(f, LAM, strict=True, create_graph=True),
    "hessian": lambda f, s: functional.hessian(s, LAM, strict=True),
    "vjp": lambda f, s: functional.vjp(f, LAM, C),
    "jvp": lambda f, s: functional.jvp(f, LAM, ONES),
    "vhp": lambda f, s: functional.vhp(s, LAM, ONES),
    "hvp": lambda f, s: functional.hvp(s, LAM, ONES),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_torch_autograd_functional_is_right(name):
    found = FUNCTIONAL[name](vector(fit), total(fit))
    close(found, FUNCTIONAL[name](vector(reference), total(reference)))


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_the_vectorised_jacobian_of_torch_autograd_functional_is_an_error_with_the_cure(strategy):
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"torch\.func\.jacrev.*jacfwd"):
        functional.jacobian(vector(fit), LAM, vectorize=True, strategy=strategy)


def test_a_retained_graph_may_be_used_twice_and_one_that_is_not_is_an_error():
    lam = leaf(LAM)
    value = total(fit)(lam)
    value.backward(retain_graph=True)
    want = grad(total(reference))(LAM)
    close(lam.grad, want)
    value.backward()
    close(lam.grad, 2 * want)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_inputs_of_backward_hooks_and_anomaly_mode_are_as_everywhere():
    lam, x, seen = leaf(LAM), leaf(X), []
    answer = fit(None, x, Y, lam)
    answer["w"].register_hook(lambda g: 2 * g)
    lam.register_hook(seen.append)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        answer["w"].sum().backward(inputs=[lam])
    want = 2 * grad(lambda lam: reference(None, X, Y, lam)["w"].sum())(LAM)
    close(lam.grad, want)
    close(seen, [want])
    assert x.grad is None


def test_tensors_made_in_inference_mode_may_be_arguments():
    with torch.inference_mode():
        x, at = X * 1, LAM * 1
    want = grad(lambda lam: vector(reference)(lam).sum())(LAM)
    lam = leaf(LAM)
    close(torch.autograd.grad(flat(fit(None, x, Y, lam)).sum(), lam)[0], want)
    close(grad(lambda lam: flat(fit(None, x, Y, lam)).sum())(LAM), want)
    outer = lambda p, lam: flat(p).sum()
    params = {k: v.detach() for k, v in solve(None, X, Y, LAM).items()}
    close(implicit_grad(outer, lambda p, lam: inner(p, X, Y, lam), params, at), want)


# torch.compile and torch.export


@pytest.mark.parametrize("solver", [GMRES(rtol=1e-12), None], ids=repr)
def test_a_compiled_equation_is_right_by_one_product_after_the_other(solver):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 3).double()
    compiled = torch.compile(net, backend="aot_eager")

    def closed(a):
        return torch.linalg.solve(net.weight + 3 * torch.eye(3, dtype=D), a - net.bias)

    F = lambda w, a: compiled(w) + 3 * w - a
    root = custom_root(F, solver=solver)(lambda init, a: closed(a).detach())
    lam = leaf(LAM)
    inputs = (lam, *net.parameters())
    found = torch.autograd.grad((root(None, lam) ** 2).sum(), inputs)
    close(found, torch.autograd.grad((closed(lam) ** 2).sum(), inputs))


def test_a_compiled_solver_is_as_good_as_any():
    compiled = torch.compile(lambda x, y, lam: solve(None, x, y, lam), backend="aot_eager")
    solver = custom_argmin(inner)(lambda init, *args: compiled(*args))
    close(grad(total(solver))(LAM), grad(total(reference))(LAM))
    want = torch.stack([grad(total(reference))(lam) for lam in LAMS[:2]])
    close(vmap(grad(total(solver)))(LAMS[:2]), want)


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_an_error_with_advice(strict):
    class Module(torch.nn.Module):
        def forward(self, lam):
            return vector(fit)(lam)

    with pytest.raises(Exception, match=r"torch\.export cannot record"):  # strict wraps it
        torch.export.export(Module(), (LAM,), strict=strict)


@pytest.mark.parametrize("solver", [CG(), MINRES(), GMRES(), Exact(), None], ids=str)
def test_the_default_device_plays_no_part_in_a_hypergradient(solver):
    c, lam = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0])
    inner = lambda w, lam: ((w - c) ** 2).sum() / 2 + (lam * w**2).sum() / 2
    expected = -c / (1 + lam) ** 2
    with torch.device("meta"):
        hypergradient = implicit_grad(
            lambda w, lam: w.sum(), inner, c / (1 + lam), lam, solver=solver
        )
    torch.testing.assert_close(hypergradient, expected)


# A GPU is not waited for


UNSEEN = [
    CG(maxiter=40, rtol=0.0),
    CG(maxiter=40, rtol=0.0, damping=1e-9, preconditioner=Nystrom(rank=2)),
    MINRES(maxiter=40, rtol=0.0),
    GMRES(maxiter=40, rtol=0.0),
    BiCGSTAB(maxiter=40, rtol=0.0),
    NormalCG(maxiter=40, rtol=0.0),
    LSMR(maxiter=40, rtol=0.0),
    Neumann(terms=3000, rtol=0.0),
    Auto(maxiter=40, rtol=0.0),
    Auto(maxiter=40, rtol=0.0, dense_below=0),
]


def ridge(w, h, x):
    return ((x @ w).square().sum() + (h.exp() * w**2).sum()) / 2


def entrances(solver):
    settings = {"solver": solver, "on_failure": "ignore", "inner_tol": None}

    def hypergradient(w, h, x):
        outer = lambda w, h: (w - h).square().sum()
        return implicit_grad(outer, lambda w, h: ridge(w, h, x), w, h, **settings)

    def evidence(w, h, x):
        outer = lambda w, h: (w - h).square().sum()
        inner = lambda w, h: ridge(w, h, x)
        return implicit_grad(outer, inner, w, h, return_info=True, **settings)[0]

    def decorated(w, h, x):
        fit = custom_argmin(ridge, **settings)(lambda init, h, x: init)
        return grad(lambda h: (fit(w, h, x) - h).square().sum())(h)

    return [hypergradient, evidence, decorated]


@pytest.mark.parametrize("solver", UNSEEN, ids=str)
@pytest.mark.parametrize("batched", [False, True])
def test_without_a_tolerance_and_unjudged_nothing_is_read_from_the_device(
    solver, batched, monkeypatch
):
    # Tensors of the meta device have no values: whoever reads one, as a GPU is waited for, fails.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # has none there
    if isinstance(solver, Neumann):
        solver = replace(solver, terms=60)  # a term is like another
    tasks = (4,) if batched else ()
    given = [torch.empty(*tasks, *shape, device="meta") for shape in [(7,), (7,), (10, 7)]]
    for entrance in entrances(solver):
        with host_is_not_asked():
            found = (vmap(entrance) if batched else entrance)(*given)
        assert found.shape == given[0].shape


@pytest.mark.parametrize("solver", UNSEEN, ids=str)
def test_without_a_tolerance_and_unjudged_the_answer_is_the_same(solver):
    generator = torch.Generator().manual_seed(0)
    w, h, x = (
        torch.randn(4, *shape, dtype=torch.float64, generator=generator)
        for shape in [(7,), (7,), (10, 7)]
    )
    for entrance, judged in zip(entrances(solver), entrances(Exact()), strict=True):
        torch.testing.assert_close(
            vmap(entrance)(w, h, x), vmap(judged)(w, h, x), rtol=1e-6, atol=0
        )


def test_a_singular_task_is_said_also_where_nobody_looks():
    diagonal = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float64)

    def task(d):
        return implicit_grad(
            lambda w, h: w.sum(),
            lambda w, h: (d * w**2).sum() / 2 - (h * w).sum(),
            torch.zeros(3, dtype=torch.float64),
            torch.zeros(3, dtype=torch.float64),
            solver=Auto(rtol=0.0),
            on_failure="ignore",
            return_info=True,
        )

    found, info = vmap(task)(diagonal)
    assert info.success.tolist() == [False, True]
    torch.testing.assert_close(found[1], 1 / diagonal[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_without_values_is_refused_with_advice():
    def inner(w: Tensor, theta: Tensor) -> Tensor:
        return (w - theta).square().sum()

    def hypergradient(theta: Tensor) -> Any:
        return hypergrad.implicit_grad(lambda w, t: w.sum(), inner, theta.clone(), theta)

    theta = torch.ones(3, dtype=F64)
    for call in (
        lambda: torch.func.functionalize(hypergradient)(theta),
        lambda: torch.func.linearize(hypergradient, theta),
    ):
        with pytest.raises(hypergrad.UnsupportedOperation, match=r"torch\.func\.vjp"):
            call()
