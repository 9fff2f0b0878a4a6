"""The caller's function on flat vectors: in a batch as alone, and changed by nobody."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap

import hypergrad
from hypergrad.inner_solvers import LBFGS, Anderson, GradientDescent, Nesterov, NewtonCG
from tests.problems import F64

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
SMOOTH = [GradientDescent(), Nesterov(), LBFGS(), NewtonCG()]
OF_SMOOTH = pytest.mark.parametrize("solver", SMOOTH, ids=lambda s: type(s).__name__)


def test_a_leaf_that_the_objective_does_not_use_is_named():
    init = {"used": torch.zeros(2), "spare": torch.zeros(2)}
    for solver in SMOOTH:
        with pytest.raises(hypergrad.NotConnected, match=r"init\['spare'\]"):
            solver(lambda p: (p["used"] - 1).square().sum(), init)
        with pytest.raises(hypergrad.NotConnected, match="does not depend on"):
            solver(lambda p: p["used"].detach().sum() * 0, {"used": torch.zeros(2)})


@OF_SMOOTH
def test_an_objective_that_takes_derivatives_itself_is_right_in_a_batch(solver):
    # Through an affine norm layer, where PyTorch's derivative of a mapped derivative is wrong.
    weight = torch.tensor([1.0, 0.5, 2.0], dtype=F64)

    def one(c):
        def height(x):
            y = torch.nn.functional.layer_norm(x, (3,), weight)
            return ((x - c) ** 2).sum() / 2 + 0.05 * (y * c).sum()

        def objective(x):
            return (grad(height)(x) ** 2).sum() / 2 + ((x - c) ** 2).sum() / 2

        return solver(objective, torch.tensor([1.0, 0.0, -1.0], dtype=F64))

    centres = torch.tensor([[1.0, -0.5, 0.3], [0.2, 1.5, -1.0]], dtype=F64)
    x, info = vmap(one)(centres)
    assert info.success.all()
    for k in range(2):
        torch.testing.assert_close(x[k], one(centres[k])[0], rtol=1e-5, atol=1e-6)


def _masked_by_a_hook(x, c):
    if x.requires_grad:
        x.register_hook(lambda g: g * torch.tensor([1.0, 0.0], dtype=F64))
    return ((x - c) ** 2).sum()


def _other_where_it_is_differentiated(x, c):
    return ((x - c) ** 2).sum() + ((x**2).sum() if x.requires_grad else 0.0)


def _of_its_own_gradient(x, c):
    height = ((x - c) ** 2).sum() / 2 + (x**4).sum() / 4
    return (torch.autograd.grad(height, x, create_graph=True)[0] ** 2).sum() / 2


def _of_a_tangent(x, c):
    with torch.autograd.forward_ad.dual_level():
        y = torch.autograd.forward_ad.make_dual(x, c) ** 2
        return torch.autograd.forward_ad.unpack_dual(y).tangent.sum() ** 2 + ((x - c) ** 2).sum()


@pytest.mark.parametrize(
    "objective",
    [_masked_by_a_hook, _other_where_it_is_differentiated, _of_its_own_gradient, _of_a_tangent],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("solver", [GradientDescent(), LBFGS()], ids=lambda s: type(s).__name__)
def test_an_objective_that_asks_autograd_is_the_same_in_a_batch(solver, objective):
    c = torch.tensor([[0.5, -1.0], [1.5, 0.3], [-0.2, 0.9]], dtype=F64)
    one = lambda c: solver(objective, torch.full((2,), 0.1, dtype=F64), c)[0]
    torch.testing.assert_close(
        vmap(one)(c), torch.stack([one(row) for row in c]), rtol=1e-5, atol=1e-6
    )


def test_an_error_of_the_objective_comes_out_of_a_batch_as_it_is():
    def objective(x, c):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        vmap(lambda c: LBFGS()(objective, torch.zeros(2), c)[0])(torch.ones(3, 2))


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "vmap"])
def test_a_function_that_changes_its_arguments_in_place_is_refused(batched):
    call = (lambda one, t: vmap(one)(t[None])) if batched else (lambda one, t: one(t))
    init = torch.zeros(2, dtype=F64)
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"T\(params, \.\.\.\) changes one"):
        call(lambda c: Anderson()(lambda x: x.mul_(0.5).add_(1.0), init + c)[0], init)
    with pytest.raises(hypergrad.UnsupportedOperation, match="The objective changes one"):
        call(lambda c: LBFGS()(lambda x, c: (x - c.add_(1)).square().sum(), init, c)[0], init + 1)
    with pytest.raises(hypergrad.UnsupportedOperation, match="in place"):
        call(lambda c: LBFGS()(lambda x: x.add_(1).square().sum(), init + c)[0], init)
    assert not init.any()
