"""Derivatives of a decorated solver's answer: their order, their point and their random draw."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jvp, vmap

import hypergrad
from hypergrad import CG, GMRES, custom_argmin, custom_fixed_point, custom_root
from tests.quartic import (
    LAM,
    XS,
    D,
    X,
    Y,
    close,
    flat,
    inner,
    leaf,
    randn,
    reference,
    skewed,
    solve,
    step,
)

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
FITS = {
    "argmin": custom_argmin(inner)(solve),
    "root": custom_root(skewed)(solve),
    "fixed point": custom_fixed_point(step)(solve),
}


@pytest.mark.parametrize("name", FITS)
def test_plain_backward_over_vmap_equals_the_loop_in_every_argument(name):
    fit = FITS[name]
    lam, xs = leaf(LAM), leaf(XS)
    value = (vmap(lambda X: flat(fit(None, X, Y, lam)))(xs) ** 2).sum()
    first = torch.autograd.grad(value, (lam, xs), create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), (lam, xs))
    ref_lam, ref_xs = leaf(LAM), leaf(XS)
    value = (torch.stack([flat(reference(None, X, Y, ref_lam)) for X in ref_xs]) ** 2).sum()
    want = torch.autograd.grad(value, (ref_lam, ref_xs), create_graph=True)
    close(first, want)
    close(second, torch.autograd.grad(want[0].square().sum(), (ref_lam, ref_xs)))


def _pair(**keywords):
    @custom_argmin(lambda w, a, b: ((w - a) ** 2).sum() / 2 + (b * w**2).sum() / 2, **keywords)
    def fit(init, a, b):
        return a / (1 + b)

    return fit


A, B = torch.tensor([1.0, 2.0], dtype=D), torch.tensor([1.0, 3.0], dtype=D)


def test_an_argument_changed_in_place_before_the_backward_pass_is_an_error():
    a = leaf(A)
    b = a * 1
    fit = _pair()
    value = fit(None, b, B).sum()
    with torch.no_grad():
        b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_data_that_is_captured_and_has_changed_before_the_backward_pass_is_noticed():
    data = A.clone()

    @custom_argmin(lambda w, lam: ((w - data) ** 2).sum() / 2 + lam * (w**2).sum() / 2)
    def fit(init, lam):
        return data / (1 + lam)

    lam = torch.tensor(1.0, dtype=D, requires_grad=True)
    value = fit(None, lam).sum()
    data.copy_(B * 5)  # the next batch
    with pytest.warns(hypergrad.ConvergenceWarning, match="does not solve the inner problem"):
        value.backward()


def test_a_derivative_at_a_point_that_is_no_solution_is_judged():
    fit = custom_argmin(lambda w, a: ((w - a) ** 2).sum())(lambda init, a: a + 1)
    a = leaf(A)
    with pytest.warns(hypergrad.ConvergenceWarning, match="does not solve the inner problem"):
        fit(None, a).sum().backward()
    fit = custom_argmin(lambda w, a: ((w - a) ** 2).sum(), on_failure="raise")(lambda i, a: a + 1)
    with pytest.raises(hypergrad.NotConverged):
        grad(lambda a: fit(None, a).sum())(A)
    fit = custom_argmin(lambda w, a: ((w - a) ** 2).sum())(lambda init, a: a * torch.nan)
    with pytest.raises(hypergrad.NotFinite):
        grad(lambda a: fit(None, a).sum())(A)


def dropped(w, a):
    """dw/da = m / (m + 1) for the weights m of a draw: another m in A and in the cross term."""
    weights = torch.nn.functional.dropout(torch.ones_like(w), 0.5) ** 2
    return (weights * (w - a) ** 2).sum() + (w**2).sum()


@pytest.mark.parametrize("rule", ["argmin", "root"])  # the root is looped over the tasks
@pytest.mark.parametrize("way", ["grad", "jvp", "backward"])
def test_all_products_of_a_vmapped_solve_see_one_draw_or_random_numbers_are_refused(rule, way):
    decorate = custom_argmin(dropped, inner_tol=None, solver=CG(rtol=1e-12))
    if rule == "root":
        decorate = custom_root(grad(dropped), inner_tol=None, solver=GMRES(rtol=1e-12))
    fit = decorate(lambda init, a: a / 2)
    at = randn(3, 200)

    def run(randomness):
        if way == "backward":
            tasks = leaf(at)
            found = vmap(lambda a: fit(None, a), randomness=randomness)(tasks)
            return torch.autograd.grad(found.sum(), tasks)[0]
        one = {
            "grad": grad(lambda a: fit(None, a).sum()),
            "jvp": lambda a: jvp(lambda a: fit(None, a), (a,), (torch.ones_like(a),))[1],
        }[way]
        return vmap(one, randomness=randomness)(at)

    found = run("same")
    zero, full = found.abs() < 1e-9, (found - 0.8).abs() < 1e-9
    assert (zero | full).all()
    assert 200 < full.sum() < 400
    assert torch.equal(full[0], full[2])
    with pytest.raises(hypergrad.UnsupportedOperation, match="draw them outside"):
        run("different")


def test_a_batch_evaluates_an_objective_as_often_as_one_task_does():
    counts = []

    def counted(p, *args):
        counts[-1] += 1
        return inner(p, *args)

    fit = custom_argmin(counted)(solve)
    for tasks in (1, 16):
        counts.append(0)
        vmap(grad(lambda lam: flat(fit(None, X, Y, lam)).sum()))(LAM.expand(tasks, 3))
    assert counts[0] == counts[1]
