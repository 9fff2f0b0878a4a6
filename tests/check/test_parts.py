"""`check_hypergrad` evaluates each part by itself, and changes nothing of the caller's."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from hypergrad import CG, check_hypergrad
from tests.problems import F64, per_feature_ridge, ridge
from tests.spoilt_parts import check, check_three, gradient_descent, outer_of_three, solve_of_three


def test_the_check_changes_nothing_of_the_callers():
    problem = per_feature_ridge()
    leaf = problem.hparams["log_penalty"].clone().requires_grad_()
    kept, version = leaf.detach().clone(), leaf._version

    def solve(hparams):
        answer = problem.solve(hparams)
        hparams["log_penalty"].zero_() if not hparams["log_penalty"].requires_grad else None
        torch.rand(3)
        return answer

    state = torch.get_rng_state()
    assert check(problem, hparams={"log_penalty": leaf}, solve=solve).ok
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(leaf, kept)
    assert leaf._version == version
    assert leaf.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_other_grad_modes(mode):
    problem = ridge()
    w = torch.zeros(5, dtype=F64)
    with mode():
        report = check(problem, solve=gradient_descent(problem, w, 2000, 0.02))
    assert report.ok


def test_running_statistics_are_refused_and_kept():
    problem = ridge()
    norm = torch.nn.BatchNorm1d(5).double()
    before = {name: t.clone() for name, t in norm.state_dict().items()}

    def outer(w, lam):
        return norm(torch.stack([w, 2 * w])).square().sum()

    with pytest.raises(hypergrad.UnsupportedOperation, match="eval"):
        check(problem, outer=outer)
    assert all(torch.equal(norm.state_dict()[name], t) for name, t in before.items())


def test_inside_a_function_transform_it_says_so():
    problem = ridge()

    def inside(lam):
        check(problem, hparams=lam)
        return lam

    with pytest.raises(hypergrad.UnsupportedOperation, match="outside"):
        torch.func.vmap(inside)(torch.ones(3, dtype=F64))


def test_the_warnings_of_a_decorated_solver_are_kept_inside():
    problem = ridge()
    fit = problem.decorated(solver=CG(maxiter=1, rtol=1e-12))
    assert check(problem, solve=fit).ok


def test_what_a_solver_raises_is_raised():
    def solve(lam):
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        check(ridge(), solve=solve)
    with pytest.raises(hypergrad.StructureMismatch, match="floating-point"):
        check_hypergrad(ridge().outer, ridge().inner, ridge().solve, torch.tensor(1))


def test_faults_of_the_call_are_errors_that_name_them():
    with pytest.raises(hypergrad.StructureMismatch, match="return missing"):
        check_three(solve=lambda h: None)
    with pytest.raises(hypergrad.StructureMismatch, match=r"torch\.tensor"):
        check_three(hparams=2.0)
    with pytest.raises(hypergrad.UnsupportedOperation, match="complex"):
        check_three(hparams=torch.tensor(1j))
    with pytest.raises(hypergrad.UnsupportedOperation, match="in place"):
        check_three(outer=lambda w, h: outer_of_three(w.mul_(2), h))

    def picky(h):
        if h != 2:
            raise ValueError("only 2")
        return solve_of_three(h)

    with pytest.raises(ValueError, match="only 2") as caught:
        check_three(solve=picky)
    assert "small step" in caught.value.__notes__[0]
