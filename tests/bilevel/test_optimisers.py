"""The variables of a level and the optimiser that moves them."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

import hypergrad
from hypergrad import F2SA, FSLA, HOAG, MASOBA, SABA, SOBA, SRBA, AmIGO, Bilevel, StocBiO
from tests.bilevel_quadratic import F64, Quadratic, adam, loop, run, sgd, start


def test_a_factory_leaves_the_callers_tensors_alone():
    problem = Quadratic()
    z, x = (t.requires_grad_() for t in start())
    z.grad = torch.ones_like(z)
    bilevel = Bilevel(
        problem.outer,
        problem.inner,
        z,
        x,
        inner_optimizer=sgd(0.1),
        outer_optimizer=sgd(0.1),
        method=SOBA(),
    )
    bilevel.step(problem.inner_batches[0], problem.outer_batches[0])
    assert not z.any()
    assert not x.any()
    assert z.grad.equal(torch.ones_like(z))
    assert x.grad is None
    assert bilevel.params.any()
    assert not bilevel.params.requires_grad


def test_a_ready_optimiser_moves_the_parameters_of_a_module():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    features, target = torch.randn(2, 20, 3), torch.randn(2, 20, 1)
    weight, log_decay = model.weight, torch.tensor(-1.0, requires_grad=True)
    before = weight.detach().clone()
    model.bias.grad = torch.ones(1)

    def loss(params, place):
        return (functional_call(model, params, (features[place],)) - target[place]).square().mean()

    bilevel = Bilevel(
        lambda params, h: loss(params, 1),
        lambda params, h: loss(params, 0) + h.exp() * params["weight"].square().sum(),
        dict(model.named_parameters()),
        log_decay,
        inner_optimizer=torch.optim.Adam(model.parameters(), lr=0.1),
        outer_optimizer=torch.optim.SGD([log_decay], lr=0.1),
        method=HOAG(),
    )
    bilevel.step()
    assert model.weight is weight
    assert not weight.equal(before)
    assert log_decay.item() != -1.0
    assert log_decay.requires_grad
    assert log_decay.grad is None
    assert weight.grad is None
    assert model.bias.grad.equal(torch.ones(1))
    assert bilevel.params["weight"].data_ptr() == weight.data_ptr()


def test_frozen_parameters_and_other_leaves_stay():
    frozen = torch.nn.Parameter(torch.tensor([2.0]), requires_grad=False)
    params = {
        "w": torch.nn.Parameter(torch.zeros(1)),
        "frozen": frozen,
        "n": 3,
        "k": torch.tensor(1),
    }
    bilevel = Bilevel(
        lambda p, h: (p["w"] - 1).square().sum(),
        lambda p, h: (p["w"] - p["frozen"] * h["a"] * p["n"]).square().sum(),
        params,
        {"a": torch.tensor(1.0), "of": None},
        inner_optimizer=sgd(0.4),
        outer_optimizer=sgd(0.01),
        method=HOAG(),
    )
    run(bilevel, 100)
    assert frozen.item() == 2.0
    assert bilevel.params["n"] == 3
    assert bilevel.hparams["of"] is None
    torch.testing.assert_close(bilevel.hparams["a"], torch.tensor(1 / 6), rtol=1e-3, atol=0)


def test_hyperparameters_that_need_no_gradient_are_constants_beside_a_ready_optimiser():
    moving, fixed = torch.tensor(0.5, requires_grad=True), torch.tensor(2.0)
    bilevel = Bilevel(
        lambda w, h: (w - 1).square(),
        lambda w, h: (w - h["moving"] * h["fixed"]).square(),
        torch.tensor(0.0),
        {"moving": moving, "fixed": fixed},
        inner_optimizer=sgd(0.4),
        outer_optimizer=torch.optim.SGD([moving], lr=0.1),
        method=HOAG(),
    )
    moving.data.fill_(0.1)
    run(bilevel, 3)
    assert moving.item() > 0.2
    assert fixed.item() == 2.0
    assert fixed.grad is None


@pytest.mark.parametrize("level", ["inner", "outer"])
def test_an_optimiser_of_other_tensors_is_refused(level):
    z, x = (t.requires_grad_() for t in start())
    optimisers = {"inner": torch.optim.SGD([z], lr=0.1), "outer": torch.optim.SGD([x], lr=0.1)}
    copies = {"inner": z.detach().clone(), "outer": x.detach().clone()}
    for wrong in ([copies[level]], [z, x]):
        bad = torch.optim.SGD([t.requires_grad_() for t in wrong], lr=0.1)
        with pytest.raises(hypergrad.StructureMismatch, match=f"{level}_optimizer"):
            Bilevel(
                Quadratic().outer,
                Quadratic().inner,
                z,
                x,
                inner_optimizer=optimisers["inner"] if level == "outer" else bad,
                outer_optimizer=optimisers["outer"] if level == "inner" else bad,
            )


def test_rates_decay_by_the_exponents_and_the_optimisers_keep_theirs():
    problem = Quadratic()
    g, f = problem.whole_inner, problem.whole_outer
    bilevel = loop(problem, SOBA(inner_decay=0.5, outer_decay=0.25))
    z, u, x = torch.zeros(4, dtype=F64), torch.zeros(4, dtype=F64), torch.zeros(3, dtype=F64)
    for k in range(4):
        rho, gamma = 0.4 * (k + 1) ** -0.5, 0.3 * (k + 1) ** -0.25
        dz, du = g.H @ z + g.C.T @ x + g.c, g.H @ u - f.P @ z - f.p
        dx = f.Q @ x + f.q - g.C @ u
        z, u, x = z - rho * dz, u - rho * du, x - gamma * dx
        bilevel.step()
        torch.testing.assert_close(bilevel.params, z)
        torch.testing.assert_close(bilevel.hparams, x)
    assert bilevel.inner_optimizer.param_groups[0]["lr"] == 0.4
    assert bilevel.outer_optimizer.param_groups[0]["lr"] == 0.3


def test_a_scheduler_of_torch_works_on_either_level():
    problem = Quadratic()
    bilevel = loop(problem, SOBA(inner_decay=0.0, outer_decay=0.0, linear_lr=0.4))
    scheduler = torch.optim.lr_scheduler.StepLR(bilevel.outer_optimizer, 1, gamma=0.5)
    moves = []
    for _ in range(3):
        x = bilevel.hparams.clone()
        grads = bilevel.step().grads
        moves.append(float((x - bilevel.hparams).norm() / grads.norm()))
        scheduler.step()
    assert moves == pytest.approx([0.3, 0.15, 0.075])


@pytest.mark.parametrize(
    "method", [SOBA(), MASOBA(), SABA(), SRBA(), FSLA(), AmIGO(), StocBiO(), F2SA()]
)
def test_an_inner_optimiser_without_a_rate_for_the_linear_system_is_refused(method):
    bilevel = loop(Quadratic(), method, inner_optimizer=adam(0.1))
    field = "relaxed_lr" if isinstance(method, F2SA) else "linear_lr"
    with pytest.raises(hypergrad.UnsupportedOperation, match=f"{field}="):
        bilevel.step()


@pytest.mark.parametrize("level", ["inner_optimizer", "outer_optimizer"])
def test_an_inner_solver_is_no_optimiser(level):
    problem = Quadratic()
    both = {"inner_optimizer": sgd(0.1), "outer_optimizer": sgd(0.1)}
    both[level] = hypergrad.inner_solvers.LBFGS()
    with pytest.raises(hypergrad.StructureMismatch, match=rf"{level} .*LBFGS.*argmin") as caught:
        Bilevel(problem.outer, problem.inner, *start(), **both)
    assert caught.value.argument == level
