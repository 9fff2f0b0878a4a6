"""The loop for the outer problem: what it holds, what it leaves alone, and how it resumes."""

from __future__ import annotations

import functools
import io
import itertools
import subprocess
import sys

import pytest
import torch
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import hypergrad
from hypergrad import (
    CG,
    F2SA,
    HOAG,
    MASOBA,
    SABA,
    SOBA,
    Alternating,
    AmIGO,
    Bilevel,
    Exact,
    StocBiO,
)
from tests.bilevel_quadratic import F64, Quadratic, start


def sgd(lr, **options):
    return functools.partial(torch.optim.SGD, lr=lr, **options)


def adam(lr):
    return functools.partial(torch.optim.Adam, lr=lr)


def loop(problem, method=None, *, inner_lr=0.4, outer_lr=0.3, batches=False, **options):
    """A run from zero: on the whole losses, or on batches drawn at random."""
    options = {"inner_optimizer": sgd(inner_lr), "outer_optimizer": sgd(outer_lr), **options}
    if batches:
        sources = {"inner_batches": problem.inner_batches, "outer_batches": problem.outer_batches}
        return Bilevel(
            problem.outer, problem.inner, *start(), method=method, **{**sources, **options}
        )
    inner, outer = problem.whole_inner, problem.whole_outer
    return Bilevel(
        lambda z, x: problem.outer(z, x, outer),
        lambda z, x: problem.inner(z, x, inner),
        *start(),
        method=method,
        **options,
    )


def run(bilevel, steps):
    for _ in range(steps):
        info = bilevel.step()
    return info


# --- the losses are deterministic: every method reaches the optimum --------------------------

EXACT = {
    "alternating": (Alternating(inner_steps=5, inner_tol=None), 0.3, 50),
    "HOAG": (HOAG(), 0.4, 110),
    "SOBA": (SOBA(inner_decay=0.0, outer_decay=0.0), 0.2, 150),
    "MASOBA": (MASOBA(theta=0.5), 0.1, 200),
    "SABA": (SABA(), 0.2, 150),
    "AmIGO": (AmIGO(inner_steps=5, linear_steps=5), 0.3, 60),
    "StocBiO": (StocBiO(inner_steps=5, terms=40), 0.3, 50),
}


@pytest.mark.parametrize("name", EXACT)
def test_every_method_reaches_the_optimum_of_deterministic_losses(name):
    method, outer_lr, steps = EXACT[name]
    problem = Quadratic()
    bilevel = loop(problem, method, outer_lr=outer_lr)
    run(bilevel, steps)
    truth = problem.hypergradient
    assert truth(bilevel.hparams).norm() < 1e-5 * truth(torch.zeros(3, dtype=F64)).norm()
    assert problem.distance(bilevel.hparams) < 1e-5
    assert (bilevel.params - problem.solution(bilevel.hparams)).norm() < 1e-4


@pytest.mark.parametrize("name", [*EXACT, "F2SA"])
def test_hyperparameters_stay_where_they_may_be(name):
    """Every method ends at the optimum over the half-space, and never leaves it."""
    problem = Quadratic()
    free = loop(problem, *EXACT["SOBA"][:1], outer_lr=0.2)
    run(free, 150)
    normal = torch.tensor([1.0, 0.5, -0.5], dtype=F64)
    level = float(normal @ free.hparams) - 0.5
    project = lambda x: hypergrad.projections.halfspace(x, normal, level)
    method, outer_lr, steps = EXACT.get(
        name, (F2SA(1e3, 0.0, relaxed_lr=0.4, inner_decay=0.0, outer_decay=0.0), 0.2, 60)
    )
    bilevel = loop(problem, method, outer_lr=outer_lr, hparams_projection=project)
    before = bilevel.hparams
    for _ in range(2 * steps):
        bilevel.step()
        assert normal @ bilevel.hparams <= level + 1e-12
    assert bilevel.hparams.data_ptr() == before.data_ptr()  # in place
    slope = problem.hypergradient(bilevel.hparams)
    torch.testing.assert_close(normal @ bilevel.hparams, torch.tensor(level, dtype=F64))
    across = slope - normal * (normal @ slope) / (normal @ normal)
    assert across.norm() < (2e-2 if name == "F2SA" else 1e-4) * slope.norm()
    assert normal @ slope < 0  # only the bound keeps it


def test_a_projection_that_is_none_is_refused():
    problem = Quadratic()
    with pytest.raises(TypeError, match="hparams_projection must be a function"):
        loop(problem, hparams_projection=1.0)
    with pytest.raises(
        hypergrad.StructureMismatch, match=r"hparams_projection\(hparams\) has shape"
    ):
        loop(problem, EXACT["alternating"][0], hparams_projection=lambda x: x[:1]).step()
    with pytest.raises(hypergrad.NotFinite, match="hparams_projection returned NaN"):
        loop(problem, EXACT["alternating"][0], hparams_projection=lambda x: x / 0 - x / 0).step()


def test_the_bias_of_f2sa_is_of_the_order_of_one_over_the_penalty():
    problem = Quadratic()
    biases = []
    for penalty in (10.0, 100.0):
        method = F2SA(penalty, 0.0, relaxed_lr=0.4, inner_decay=0.0, outer_decay=0.0)
        bilevel = loop(problem, method, outer_lr=0.2)
        run(bilevel, 50)
        biases.append(problem.distance(bilevel.hparams))
    assert biases[0] < 0.1
    assert biases[1] == pytest.approx(biases[0] / 10, rel=0.3)


def test_f2sa_with_a_growing_penalty_goes_on_towards_the_optimum():
    problem = Quadratic()
    method = F2SA(10.0, growth=1 / 3, relaxed_lr=0.4, inner_decay=0.0, outer_decay=1 / 3)
    bilevel = loop(problem, method, outer_lr=0.4)
    run(bilevel, 20)
    early = problem.distance(bilevel.hparams)
    run(bilevel, 60)
    assert problem.distance(bilevel.hparams) < 0.5 * early < 0.1


# --- on batches ------------------------------------------------------------------------------


def test_saba_reaches_the_optimum_on_batches_with_rates_at_which_soba_does_not():
    problem = Quadratic()
    rates = {"inner_lr": 0.2, "outer_lr": 0.1, "batches": True}
    reduced = loop(problem, SABA(), **rates)
    noisy = loop(problem, SOBA(inner_decay=0.0, outer_decay=0.0), **rates)
    run(reduced, 400)
    run(noisy, 400)
    assert problem.distance(reduced.hparams) < 1e-9
    assert problem.distance(noisy.hparams) > 1e-3


@pytest.mark.parametrize(
    ("method", "inner_lr", "outer_lr", "steps"),
    [
        (SOBA(), 0.4, 0.3, 400),
        (MASOBA(), 0.1, 0.03, 500),
        (AmIGO(inner_steps=3, linear_steps=3), 0.15, 0.05, 120),
        (StocBiO(inner_steps=3, terms=10, linear_lr=0.3), 0.15, 0.05, 120),
        (F2SA(penalty=5.0, inner_steps=3, inner_decay=0.2, outer_decay=0.4), 0.3, 0.3, 120),
        (Alternating(3, solver=CG(maxiter=4), inner_tol=None), 0.15, 0.05, 120),
    ],
)
def test_stochastic_methods_come_close_on_batches(method, inner_lr, outer_lr, steps):
    problem = Quadratic(noise=0.2)
    bilevel = loop(problem, method, inner_lr=inner_lr, outer_lr=outer_lr, batches=True)
    run(bilevel, steps)
    assert problem.distance(bilevel.hparams) < 0.2


def test_alternation_with_batches_gives_the_hypergradient_of_the_batches_of_this_step():
    problem = Quadratic()
    method = Alternating(inner_steps=2, solver=Exact(), inner_tol=None)
    bilevel = loop(problem, method, batches=True)
    for _ in range(4):
        problem.seen.clear()
        x = bilevel.hparams.clone()
        info = bilevel.step()
        # Two inner steps, then the outer loss and the inner one for the hypergradient.
        (*_, f, g), z = problem.seen, bilevel.params
        u = torch.linalg.solve(g.H, f.P @ z + f.p)
        expected = f.Q @ x + f.q - g.C @ u
        torch.testing.assert_close(info.grads, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(bilevel.hparams, x - 0.3 * expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(info.outer_value, problem.outer(z, x, f))
        assert len(problem.seen) == 5  # the one above included


def test_batches_that_are_passed_serve_for_everything_in_the_step():
    problem = Quadratic()
    g, f = problem.inner_batches[1], problem.outer_batches[2]
    for method in (Alternating(inner_tol=None), SOBA(), AmIGO(), StocBiO(), F2SA(), MASOBA()):
        bilevel = loop(problem, method, batches=True)
        problem.seen.clear()
        bilevel.step(g, f)
        assert {id(batch) for batch in problem.seen} == {id(g), id(f)}


def test_a_dataloader_is_gone_through_again_and_again():
    x = torch.arange(6.0)
    seen = []

    def inner(w, lam, batch):
        seen.append(batch[0].tolist())
        return ((w - batch[0]) ** 2).mean() + lam * w**2

    bilevel = Bilevel(
        lambda w, lam: w**2,
        inner,
        torch.tensor(0.0),
        torch.tensor(1.0),
        inner_optimizer=sgd(0.1),
        outer_optimizer=sgd(0.1),
        method=SOBA(),
        inner_batches=DataLoader(TensorDataset(x), batch_size=2),
    )
    run(bilevel, 5)
    assert seen == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    again = Bilevel(
        lambda w, lam: w**2,
        inner,
        torch.tensor(0.0),
        torch.tensor(1.0),
        inner_optimizer=sgd(0.1),
        outer_optimizer=sgd(0.1),
        method=SOBA(),
        inner_batches=DataLoader(TensorDataset(x), batch_size=2),
    )
    again.load_state_dict(bilevel.state_dict())
    run(again, 2)
    assert seen[5:] == [[4, 5], [0, 1]]


def test_a_callable_draws_with_the_generator_of_the_loop():
    problem = Quadratic()
    draws = []

    def draw(generator):
        draws.append(int(torch.randint(5, (), generator=generator)))
        return problem.inner_batches[draws[-1]]

    for seed in (0, 0, 1):
        run(loop(problem, SOBA(), batches=True, inner_batches=draw, seed=seed), 20)
    assert draws[:20] == draws[20:40] != draws[40:]


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ([], ValueError),
        ({"x": 1}, TypeError),
        (3, TypeError),
        (iter([1, 2]), ValueError),
        ((n for n in ()), ValueError),
    ],
)
def test_sources_that_give_no_batches_are_refused(source, error):

    def steps():
        bilevel = Bilevel(
            lambda w, lam: w**2,
            lambda w, lam, batch: (w - batch) ** 2 + lam * w**2,
            torch.tensor(0.0),
            torch.tensor(1.0),
            inner_optimizer=sgd(0.1),
            outer_optimizer=sgd(0.1),
            method=SOBA(),
            inner_batches=source,
        )
        run(bilevel, 3)

    with pytest.raises(error, match="inner_batches"):
        steps()


def test_saba_wants_batches_that_have_places_and_draws_them_itself():
    problem = Quadratic()
    loader = itertools.cycle(problem.inner_batches)
    with pytest.raises(hypergrad.UnsupportedOperation, match="inner_batches must be a sequence"):
        loop(problem, SABA(), batches=True, inner_batches=loader)
    bilevel = loop(problem, SABA(), batches=True)
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"call step\(\)"):
        bilevel.step(problem.inner_batches[0], problem.outer_batches[0])


# --- the caller's things ---------------------------------------------------------------------


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


def test_one_tensor_on_both_levels_is_refused():
    shared = torch.zeros(2, requires_grad=True)
    with pytest.raises(hypergrad.NotConnected, match=r"params\['a'\] and hparams\[0\]"):
        Bilevel(
            lambda p, h: p["a"].sum(),
            lambda p, h: p["a"].square().sum(),
            {"a": shared},
            (shared,),
            inner_optimizer=torch.optim.SGD([shared], lr=0.1),
            outer_optimizer=torch.optim.SGD([shared], lr=0.1),
        )


def test_a_loss_that_reaches_a_variable_past_its_arguments_is_refused():
    z, x = (t.requires_grad_() for t in start())
    problem = Quadratic()
    bilevel = Bilevel(
        lambda p, h: problem.outer(p, h, problem.whole_outer),
        lambda p, h: problem.inner(p, x, problem.whole_inner),
        z,
        x,
        inner_optimizer=torch.optim.SGD([z], lr=0.1),
        outer_optimizer=torch.optim.SGD([x], lr=0.1),
        method=SOBA(),
    )
    with pytest.raises(hypergrad.NotConnected, match="hparams past its arguments"):
        bilevel.step()


# --- rates -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("method", [SOBA(), MASOBA(), SABA(), AmIGO(), StocBiO(), F2SA()])
def test_an_inner_optimiser_without_a_rate_for_the_linear_system_is_refused(method):
    bilevel = loop(Quadratic(), method, inner_optimizer=adam(0.1))
    field = "relaxed_lr" if isinstance(method, F2SA) else "linear_lr"
    with pytest.raises(hypergrad.UnsupportedOperation, match=f"{field}="):
        bilevel.step()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: SOBA(linear_lr=0.0),
        lambda: SABA(outer_decay=-1.0),
        lambda: MASOBA(theta=1.5),
        lambda: AmIGO(inner_steps=0),
        lambda: StocBiO(terms=-1),
        lambda: F2SA(penalty=float("nan")),
        lambda: HOAG(tol=0.0),
        lambda: HOAG(decrease="slowly"),
        lambda: Alternating(inner_steps=0),
        lambda: Alternating(estimator="magic"),
        lambda: Alternating(estimator="unrolled"),
    ],
)
def test_fields_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must|finite|no estimator"):
        wrong()


# --- estimators and the linear system --------------------------------------------------------


def test_any_callable_is_an_estimator_and_so_is_a_word():
    problem = Quadratic()

    def by_hand(outer, inner, z, x):
        assert not z.requires_grad
        assert not x.requires_grad
        return problem.hypergradient(x)

    called = loop(problem, by_hand)
    worded = loop(problem, "implicit")
    assert called.method == Alternating(estimator=by_hand)
    assert worded.method == Alternating()
    run(called, 40)
    assert problem.distance(called.hparams) < 1e-3
    assert called.step().outer_value.isnan()


def test_an_estimator_with_the_same_call_is_a_word():
    """The cross product by differences is exact here, where it is linear in the parameters."""
    problem = Quadratic()
    bilevel = loop(problem, "finite_difference", batches=True)
    x = bilevel.hparams.clone()
    problem.seen.clear()
    found = bilevel.step().grads
    f = next(batch for batch in problem.seen if hasattr(batch, "P"))
    g, z = problem.seen[-1], bilevel.params
    # The solution of the linear system is taken for its right-hand side.
    expected = f.Q @ x + f.q - g.C @ (f.P @ z + f.p)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_what_an_estimator_returns_is_checked():
    bilevel = loop(Quadratic(), lambda outer, inner, z, x: torch.zeros(2))
    with pytest.raises(hypergrad.StructureMismatch, match="What the estimator returned"):
        bilevel.step()


def test_the_linear_system_starts_from_the_last_solution():
    problem = Quadratic()
    method = Alternating(solver=CG(maxiter=1), inner_tol=None)
    bilevel = loop(problem, method, outer_lr=1e-8)
    residuals = [float(bilevel.step().info.residual_norm) for _ in range(40)]
    assert residuals[-1] < 1e-3 * residuals[0]


def test_a_stale_start_of_the_linear_system_is_dropped():
    problem = Quadratic()
    f = problem.whole_outer
    method = Alternating(solver=CG(maxiter=1), inner_tol=None)
    options = {"batches": True, "outer_lr": 1e-8}
    bilevel, fresh = loop(problem, method, **options), loop(problem, method, **options)
    far = type(f)(f.P, f.Q, -1e6 * f.p, f.q)
    bilevel.step(problem.whole_inner, far)  # u is a million times too long for what follows
    z, x = bilevel.params.clone(), bilevel.hparams.clone()
    fresh._levels.params.variables[0].data.copy_(z)
    fresh._levels.hparams.variables[0].data.copy_(x)
    stale = bilevel.step(problem.whole_inner, f)
    clean = fresh.step(problem.whole_inner, f)
    assert float(stale.info.residual_norm) < 1
    torch.testing.assert_close(stale.grads, clean.grads)


def test_an_unsolved_inner_problem_is_said_unless_it_is_meant():
    problem = Quadratic()
    with pytest.warns(hypergrad.ConvergenceWarning, match="does not solve the inner problem"):
        loop(problem, Alternating(inner_steps=1)).step()
    with pytest.raises(hypergrad.NotConverged, match="inner_tol=None"):
        loop(problem, Alternating(inner_steps=1), on_failure="raise").step()
    loop(problem, Alternating(inner_steps=1, inner_tol=None)).step()
    loop(problem, Alternating(inner_steps=1), on_failure="ignore").step()
    run(loop(problem, Alternating(inner_steps=100)), 3)  # and silent where it is solved


@pytest.mark.parametrize(
    "method", [Alternating(inner_tol=None), SOBA(), AmIGO(), StocBiO(), SABA()]
)
def test_rates_that_are_too_large_end_in_an_error_before_the_hyperparameters_are_lost(method):
    bilevel = loop(Quadratic(), method, inner_lr=1e30)
    with pytest.raises(hypergrad.NotFinite):
        run(bilevel, 50)
    assert bilevel.hparams.isfinite().all()


# --- HOAG ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decrease", "expected"),
    [
        ("exponential", [0.1, 0.09, 0.081]),
        ("quadratic", [0.1, 0.025, 0.1 / 9]),
        ("cubic", [0.1, 0.0125, 0.1 / 27]),
    ],
)
def test_hoag_solves_both_systems_to_a_tolerance_that_tightens(decrease, expected):
    problem = Quadratic()
    bilevel = loop(problem, HOAG(decrease=decrease, solver=CG(), min_tol=1e-8))
    infos = [bilevel.step() for _ in range(60)]
    assert [info.tolerance for info in infos[:3]] == pytest.approx(expected)
    for info in infos:
        assert float(info.info.inner_residual) <= info.tolerance
        assert float(info.info.residual_norm) <= info.tolerance
    # Not solved further than was asked: the first steps are cheap.
    assert float(infos[0].info.inner_residual) > 1e-4
    assert infos[0].inner_steps < 30


def test_hoag_says_when_it_runs_out_of_inner_steps():
    with pytest.warns(hypergrad.ConvergenceWarning, match="max_inner_steps"):
        run(loop(Quadratic(), HOAG(max_inner_steps=1)), 5)
    with pytest.raises(hypergrad.NotConverged, match=r"At outer step \d"):
        run(loop(Quadratic(), HOAG(max_inner_steps=1), on_failure="raise"), 5)
    run(loop(Quadratic(), HOAG(max_inner_steps=1), on_failure="ignore"), 5)


def test_hoag_gives_up_on_an_optimiser_that_comes_no_closer():
    bilevel = loop(Quadratic(), HOAG(), inner_lr=0.0)
    with pytest.warns(hypergrad.ConvergenceWarning, match="did not solve the inner problem"):
        assert bilevel.step().inner_steps < 100


def test_hoag_with_lbfgs_inside():
    problem = Quadratic()
    lbfgs = functools.partial(torch.optim.LBFGS, max_iter=5, line_search_fn="strong_wolfe")
    bilevel = loop(problem, HOAG(), inner_optimizer=lbfgs)
    infos = [bilevel.step() for _ in range(60)]
    assert problem.distance(bilevel.hparams) < 1e-3
    assert sum(info.inner_steps for info in infos) < 180


def test_hoag_in_float32_is_silent_to_the_end():
    data = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    target = data.sum(1)
    bilevel = Bilevel(
        lambda w, h: (w - 0.9).square().sum(),
        lambda w, h: (data @ w - target).square().mean() + h.exp() * w.square().sum(),
        torch.zeros(4),
        torch.tensor(-1.0),
        inner_optimizer=sgd(0.2),
        outer_optimizer=sgd(1.0),
        method=HOAG(),
    )
    run(bilevel, 120)
    assert float(bilevel.step().grads.abs()) < 1e-3


# --- other inner problems --------------------------------------------------------------------


def test_a_fixed_point_is_iterated_by_gradient_descent_with_rate_one():
    M = torch.tensor([[0.2, 0.5], [-0.3, 0.1]], dtype=F64)
    target = torch.tensor([1.0, -1.0], dtype=F64)
    bilevel = Bilevel(
        lambda z, x: (z - target).square().sum(),
        hypergrad.FixedPoint(lambda z, x: M @ z + x),
        torch.zeros(2, dtype=F64),
        torch.zeros(2, dtype=F64),
        inner_optimizer=sgd(1.0),
        outer_optimizer=sgd(0.2),
        method=Alternating(inner_steps=15),
    )
    run(bilevel, 40)
    expected = target - M @ target
    torch.testing.assert_close(bilevel.hparams, expected, rtol=1e-4, atol=1e-4)
    # The system is not symmetric: its transpose belongs to the hypergradient.
    soba = Bilevel(
        lambda z, x: (z - target).square().sum(),
        hypergrad.FixedPoint(lambda z, x: M @ z + x),
        torch.zeros(2, dtype=F64),
        torch.zeros(2, dtype=F64),
        inner_optimizer=sgd(0.5),
        outer_optimizer=sgd(0.1),
        method=SOBA(inner_decay=0, outer_decay=0),
    )
    run(soba, 250)
    torch.testing.assert_close(soba.hparams, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(hypergrad.UnsupportedOperation, match="F2SA needs an inner loss"):
        Bilevel(
            lambda z, x: z.sum(),
            hypergrad.FixedPoint(lambda z, x: M @ z + x),
            torch.zeros(2, dtype=F64),
            torch.zeros(2, dtype=F64),
            inner_optimizer=sgd(1.0),
            outer_optimizer=sgd(0.2),
            method=F2SA(),
        )


def test_a_proximal_step_is_an_inner_step_with_rate_one():
    """Lasso with an orthogonal design: w = y - lam sign(y), so that lam = 0.5 fits the target."""
    y, target = torch.tensor([3.0, -2.0], dtype=F64), torch.tensor([2.5, -1.5], dtype=F64)
    bilevel = Bilevel(
        lambda w, lam: (w - target).square().sum(),
        hypergrad.ProximalGradient(
            lambda w, lam: (w - y).square().sum() / 2,
            lambda v, step, lam: v.sign() * (v.abs() - step * lam).clamp(min=0),
            0.5,
        ),
        torch.zeros(2, dtype=F64),
        torch.tensor(0.2, dtype=F64),
        inner_optimizer=sgd(1.0),
        outer_optimizer=sgd(0.1),
        method=HOAG(),
    )
    run(bilevel, 60)
    # The tolerance of the last step is 2e-4 of the parameters' norm.
    torch.testing.assert_close(bilevel.hparams, torch.tensor(0.5, dtype=F64), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "method", [SOBA(inner_decay=0, outer_decay=0), Alternating(inner_tol=None)]
)
def test_every_function_of_a_condition_is_given_the_batch(method):
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    batches = [rows[:3], rows[3:]]
    condition = hypergrad.GaussNewton(
        outputs=lambda w, h, batch: batch @ w,
        loss=lambda z, h, batch: (z - batch.sum(1)).square().mean(),
        regulariser=lambda w, h, batch: h.exp() * w.square().sum() * len(batch) / 3,
    )

    def plain(w, h, batch):
        return (batch @ w - batch.sum(1)).square().mean() + h.exp() * w.square().sum()

    found = []
    for inner in (condition, plain):
        bilevel = Bilevel(
            lambda w, h, batch: (batch @ w).square().mean(),
            inner,
            torch.zeros(3, dtype=F64),
            torch.tensor(-1.0, dtype=F64),
            inner_optimizer=sgd(0.1),
            outer_optimizer=sgd(0.1),
            method=method,
            inner_batches=batches,
            outer_batches=batches,
        )
        run(bilevel, 5)
        found.append(bilevel.hparams)
    torch.testing.assert_close(*found)  # the loss is quadratic in the outputs


# --- state -----------------------------------------------------------------------------------

EVERY = [
    Alternating(inner_steps=2, solver=CG(maxiter=2), inner_tol=None),
    HOAG(),
    SOBA(linear_lr=0.1),
    MASOBA(linear_lr=0.1),
    SABA(linear_lr=0.1),
    AmIGO(inner_steps=2, linear_steps=2, linear_lr=0.1),
    StocBiO(inner_steps=2, terms=3, linear_lr=0.1),
    F2SA(inner_steps=2, relaxed_lr=0.1),
]


def names(method):
    return type(method).__name__


@pytest.mark.parametrize("method", EVERY, ids=names)
def test_a_resumed_run_is_bit_equal(method):
    problem = Quadratic()
    options = {
        "batches": True,
        "inner_optimizer": sgd(0.05, momentum=0.9),
        "outer_optimizer": adam(0.05),
    }
    whole = loop(problem, method, **options)
    run(whole, 7)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    kept = whole.state_dict()
    infos = [whole.step() for _ in range(9)]
    file.seek(0)
    # Another seed: everything that matters comes from the state.
    for state in (torch.load(file, weights_only=True), kept):
        part = loop(problem, method, **options, seed=5)
        run(part, 2)
        part.load_state_dict(state)
        again = [part.step() for _ in range(9)]
        assert part.params.equal(whole.params)
        assert part.hparams.equal(whole.hparams)
        assert part.steps == whole.steps == 16
        for a, b in zip(infos, again, strict=True):
            assert a.step == b.step
            assert a.grads.equal(b.grads)
            assert a.outer_value.equal(b.outer_value)


def test_a_state_shares_no_memory_with_the_run():
    bilevel = loop(Quadratic(), SABA(), batches=True, outer_optimizer=adam(0.1))
    run(bilevel, 2)
    state = bilevel.state_dict()
    before = torch.utils._pytree.tree_map(
        lambda t: t.clone() if isinstance(t, torch.Tensor) else t, state
    )
    run(bilevel, 3)
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (before, state)), strict=True):
        assert a.equal(b) if isinstance(a, torch.Tensor) else a == b


def test_the_state_of_another_problem_or_method_is_refused_and_changes_nothing():
    bilevel = loop(Quadratic(), MASOBA())
    run(bilevel, 2)
    good = bilevel.state_dict()
    shorter = {**good, "hparams": [torch.zeros(2, dtype=F64)]}
    narrower = {**good, "state": {**good["state"], "u": torch.zeros(4)}}
    for state, text in (
        (loop(Quadratic(), SOBA()).state_dict(), "method SOBA"),
        (shorter, "hparams was saved with shape"),
        (narrower, r"state\['u'\] was saved with"),
        ({}, "no state of Bilevel"),
    ):
        with pytest.raises(hypergrad.StructureMismatch, match=text):
            bilevel.load_state_dict(state)
    for a, b in zip(
        *map(torch.utils._pytree.tree_leaves, (good, bilevel.state_dict())), strict=True
    ):
        assert a.equal(b) if isinstance(a, torch.Tensor) else a == b


# --- in company ------------------------------------------------------------------------------


def test_the_callback_is_given_every_record():
    infos = []
    bilevel = loop(Quadratic(), SOBA(), callback=infos.append)
    returned = [bilevel.step() for _ in range(3)]
    assert infos == returned
    assert [info.step for info in infos] == [1, 2, 3]
    assert bilevel.steps == 3


def test_steps_work_without_grad_and_in_inference_mode():
    problem = Quadratic()
    for method in (Alternating(inner_tol=None), SOBA(), F2SA()):
        plain = loop(problem, method)
        run(plain, 3)
        for context in (torch.no_grad(), torch.inference_mode()):
            other = loop(problem, method)
            with context:
                run(other, 3)
            assert other.hparams.equal(plain.hparams)


def test_a_step_inside_a_transform_is_refused():
    bilevel = loop(Quadratic(), SOBA())

    def inside(t):
        bilevel.step()
        return t

    with pytest.raises(hypergrad.UnsupportedOperation, match=r"torch\.func"):
        torch.func.vmap(inside)(torch.zeros(2))


def test_a_method_is_a_value_and_not_a_class():
    with pytest.raises(TypeError, match=r"SOBA\(\)"):
        loop(Quadratic(), SOBA)


def test_two_methods_on_one_problem_do_not_disturb_each_other():
    problem = Quadratic()
    alone = loop(problem, SOBA(), batches=True)
    run(alone, 10)
    together = [loop(problem, SOBA(), batches=True), loop(problem, SABA(), batches=True)]
    for _, bilevel in itertools.product(range(10), together):
        bilevel.step()
    assert together[0].hparams.equal(alone.hparams)


# The import


def test_the_methods_are_imported_when_one_is_asked_for():
    program = (
        "import sys, hypergrad\n"
        "assert not any(name.startswith('hypergrad.bilevel') for name in sys.modules)\n"
        "assert set(hypergrad.__all__) <= set(dir(hypergrad))\n"
        "from hypergrad import *\n"
        "assert Bilevel is hypergrad.Bilevel is hypergrad.bilevel.Bilevel\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

    with pytest.raises(AttributeError, match="'hypergrad' has no attribute 'Bilevle'"):
        hypergrad.Bilevle  # noqa: B018
