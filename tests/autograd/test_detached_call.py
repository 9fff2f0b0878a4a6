"""A user's solver is called with plain tensors, outside of every transform."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.func import grad, vmap

import hypergrad
from hypergrad import custom_argmin
from tests.quartic import D, close, leaf, randn

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
A, B = torch.tensor([1.0, 2.0], dtype=D), torch.tensor([1.0, 3.0], dtype=D)


@pytest.mark.parametrize(
    "context", [lambda f: f(A), lambda f: grad(lambda a: f(a).sum())(A), lambda f: vmap(f)(A[None])]
)
def test_the_solver_is_called_with_plain_detached_tensors_and_grad_mode_on(context):
    seen = []

    @custom_argmin(lambda w, a: ((w - a) ** 2).sum(), batching="loop")
    def fit(init, a):
        seen.append((type(a), a.requires_grad, a.grad_fn, torch.is_grad_enabled(), float(a.sum())))
        return a.clone()

    with torch.no_grad():
        context(lambda a: fit(torch.zeros(2, dtype=D), a))
    assert seen == [(torch.Tensor, False, None, True, 3.0)]
    fit(None, leaf(A))
    assert seen[1][:3] == (torch.Tensor, False, None)


def descend(init, target, lam):
    """The way most people write an inner loop, in place on the initial guess."""
    w = init.requires_grad_()
    optimiser = torch.optim.SGD([w], lr=0.4)
    for _ in range(200):
        optimiser.zero_grad()
        value = ((w - target) ** 2).sum() / 2 + lam * (w**2).sum() / 2
        value.backward()
        if value.item() < 0:
            break
        optimiser.step()
    return w


def by_scipy(init, target, lam):
    target, lam = target.numpy(), float(lam)
    found = scipy.optimize.minimize(
        lambda w: ((w - target) ** 2).sum() / 2 + lam * (w**2).sum() / 2,
        init.numpy(),
        jac=lambda w: w - target + lam * w,
        method="BFGS",
        options={"gtol": 1e-12},
    )
    return torch.from_numpy(found.x)


def by_numpy(init, target, lam):
    return torch.as_tensor(np.asarray(target) / (1 + np.asarray(lam)))


@pytest.mark.parametrize("solver", [descend, by_scipy, by_numpy])
def test_any_solver_may_be_looped_over_tasks(solver):
    fit = custom_argmin(
        lambda w, t, lam: ((w - t) ** 2).sum() / 2 + lam * (w**2).sum() / 2, batching="loop"
    )(solver)
    init, targets, lam = torch.zeros(2, dtype=D), randn(3, 2), torch.tensor(0.5, dtype=D)
    close(vmap(lambda t: fit(init, t, lam))(targets), targets / 1.5)
    found = vmap(lambda t: grad(lambda lam: fit(init, t, lam).sum())(lam))(targets)
    close(found, -targets.sum(dim=1) / 1.5**2)
    both = vmap(lambda s: vmap(lambda t: fit(init, t, s))(targets))(torch.stack([lam, lam]))
    close(both, (targets / 1.5).expand(2, 3, 2))
    lam.requires_grad_()
    (found,) = torch.autograd.grad(vmap(lambda t: fit(init, t, lam))(targets).sum(), lam)
    close(found, -targets.sum() / 1.5**2)
    assert torch.equal(init, torch.zeros(2, dtype=D))


def test_a_solver_that_cannot_be_mapped_names_the_cure():
    fit = custom_argmin(lambda w, t, lam: ((w - t) ** 2).sum() + lam * (w**2).sum())(descend)
    with pytest.raises(Exception) as error:  # noqa: PT011
        vmap(lambda t: fit(torch.zeros(2, dtype=D), t, torch.ones(())))(randn(3, 2))
    assert any("batching='loop'" in note for note in error.value.__notes__)


def test_a_solver_that_works_in_place_on_the_initial_guess_leaves_the_callers_tensor_alone():
    """The initial guess is often the centre of the proximal term too, as in iMAML."""
    target = torch.tensor([1.0, 2.0], dtype=D)

    def objective(w, centre):
        return ((w - target) ** 2).sum() + ((w - centre) ** 2).sum()

    @custom_argmin(objective)
    def fit(init, centre):
        w = init.requires_grad_()
        optimiser = torch.optim.SGD([w], lr=0.2)
        for _ in range(100):
            optimiser.zero_grad()
            objective(w, centre).backward()
            optimiser.step()
        return w

    theta = torch.zeros(2, dtype=D, requires_grad=True)
    answer = fit(theta, theta)
    assert torch.equal(theta, torch.zeros(2, dtype=D))
    close(answer, target / 2)
    close(torch.autograd.grad((answer**2).sum(), theta)[0], target / 2)
    close(grad(lambda t: (fit(t, t) ** 2).sum())(theta.detach()), target / 2)
    assert torch.equal(theta, torch.zeros(2, dtype=D))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda a: {"w": a}, "structure"),
        (lambda a: a[:1], "shape"),
        (lambda a: a.float(), "dtype"),
        (lambda a: 3.0, "must be a tensor"),
    ],
)
def test_a_solver_that_returns_another_structure_than_the_guess_is_an_error(answer, words):
    fit = custom_argmin(lambda w, a: ((w - a) ** 2).sum())(lambda init, a: answer(a))
    with pytest.raises(hypergrad.StructureMismatch, match=words):
        fit(torch.zeros(2, dtype=D), A)


def test_without_a_guess_any_structure_may_be_returned():
    @custom_argmin(lambda w, a: ((w["u"][0] - a) ** 2).sum())
    def fit(init, a):
        return {"u": (a.clone(), None, 3)}

    a = leaf(A)
    answer = fit(None, a)
    assert answer["u"][1:] == (None, 3)
    answer["u"][0].sum().backward()
    close(a.grad, torch.ones(2, dtype=D))
