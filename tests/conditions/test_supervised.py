"""A module, a loss and a penalty as a bi-level problem, against closed forms and differences."""

from __future__ import annotations

import copy
import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hypergrad
from hypergrad import CG, StructureMismatch, UnsupportedOperation, implicit_grad, supervised
from hypergrad.inner_solvers import LBFGS

EXACT = LBFGS(tol=1e-11, maxiter=3000)


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def data(n=12, features=3):
    x = torch.randn(n, features)
    return x, x.sum(1, keepdim=True).tanh() + 0.3 * torch.randn(n, 1)


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def close(a, b, rtol=1e-6):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=1e-9)


def slope(value, hparams, eps=3e-4):
    """The central differences of a function of a dict of tensors, entry by entry."""
    slopes = {}
    for name, tensor in hparams.items():
        flat = torch.zeros(tensor.numel())
        for i in range(tensor.numel()):
            step = torch.zeros(tensor.numel()).index_fill(0, torch.tensor(i), eps).view_as(tensor)
            up, down = ({**hparams, name: tensor + s * step} for s in (1, -1))
            flat[i] = (value(up) - value(down)) / (2 * eps)
        slopes[name] = flat.view_as(tensor)
    return slopes


# --- closed forms ------------------------------------------------------------------------


RATES = {
    "one number": torch.tensor(0.3),
    "one a leaf": {"weight": torch.tensor(0.3)},
    "one an entry": {"weight": torch.tensor([[0.1, 0.2, 0.5]])},
    "one a row": {"weight": torch.tensor([[0.4]])},
}


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
@pytest.mark.parametrize("word", ["decay", "log_decay"])
def test_decay_of_a_linear_model_has_a_closed_form(rates, word, curvature):
    (x, y), (xv, yv) = data(), data(7)
    model = nn.Linear(3, 1, bias=False)
    problem = supervised(model, F.mse_loss, penalty=word, curvature=curvature)

    def ridge(rate):
        rate = rate if isinstance(rate, torch.Tensor) else rate["weight"]
        rate = (rate.exp() if word == "log_decay" else rate).expand(1, 3)[0]
        return torch.linalg.solve(2 * x.T @ x / 12 + rate.diag(), 2 * x.T @ y / 12)

    params = {"weight": ridge(rates).T}
    grads = implicit_grad(
        problem.outer((xv, yv)), problem.inner((x, y)), params, {word: rates}, on_failure="raise"
    )
    truth = torch.func.grad(lambda rate: ((xv @ ridge(rate) - yv) ** 2).mean())(rates)
    torch.testing.assert_close(grads[word], truth)


@pytest.mark.parametrize("word", ["weight", "logit"])
@pytest.mark.parametrize("loss", [F.mse_loss, nn.MSELoss(), nn.MSELoss(reduction="none")])
def test_example_weights_of_a_linear_model_have_a_closed_form(word, loss):
    (x, y), (xv, yv) = data(), data(7)
    index = torch.randperm(12)[:9]  # a batch in another order, without some
    decay = lambda p, h: 0.05 * (p["weight"] ** 2).sum()
    problem = supervised(nn.Linear(3, 1, bias=False), loss, penalty=decay, example_weights=word)

    def solution(value):
        w = (value.sigmoid() if word == "logit" else value)[index]
        a, b = x[index], y[index]
        return torch.linalg.solve(2 * a.T @ (w[:, None] * a) / 9 + 0.1 * torch.eye(3),
                                  2 * a.T @ (w[:, None] * b) / 9)  # fmt: skip

    value = torch.rand(12) + 0.2
    batch = x[index], y[index], index
    grads = implicit_grad(
        problem.outer((xv, yv)), problem.inner(batch), {"weight": solution(value).T}, {word: value},
        on_failure="raise",
    )  # fmt: skip
    truth = torch.func.grad(lambda v: ((xv @ solution(v) - yv) ** 2).mean())(value)
    torch.testing.assert_close(grads[word], truth)
    assert (grads[word] != 0).sum() == 9


@pytest.mark.parametrize(
    "loss",
    [
        nn.MSELoss(reduction="sum"),
        lambda o, t, reduction="sum": F.mse_loss(o, t, reduction=reduction),
        functools.partial(F.kl_div, reduction="batchmean", log_target=True),
        F.mse_loss,
        F.binary_cross_entropy_with_logits,
    ],
)
def test_weights_of_two_are_twice_the_loss_whatever_its_reduction(loss):
    x, y = data()
    model, h = nn.Linear(3, 4), {"weight": torch.full((12,), 2.0)}
    y = y.reshape(12, 1).sigmoid().log().expand(12, 4)  # four entries an example
    problem = supervised(model, loss, example_weights="weight")
    value = problem.inner((x, y, torch.arange(12)))(problem.params, h)
    torch.testing.assert_close(value, 2 * loss(model(x), y))


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
@pytest.mark.parametrize("weights", [None, "weight"])
def test_a_loss_that_sums_is_a_sum_with_weights_and_without(weights, curvature):
    x, classes = torch.randn(12, 3), torch.randint(4, (12,))
    decay = lambda p, h: 0.3 * (p["weight"] ** 2).sum()
    problem = supervised(
        nn.Linear(3, 4, bias=False), nn.CrossEntropyLoss(reduction="sum"), penalty=decay,
        example_weights=weights, curvature=curvature,
    )  # fmt: skip
    h = {"weight": torch.rand(12)}
    batch, valid = (x, classes, torch.arange(12)), (torch.randn(5, 3), torch.randint(4, (5,)))

    def training(w, each):
        return (each * F.cross_entropy(x @ w.T, classes, reduction="none")).sum() + 0.3 * (
            w**2
        ).sum()

    inner, outer = problem.inner(batch), problem.outer(valid)
    params, _ = EXACT(inner, problem.params, h)
    w, each = params["weight"], h["weight"] if weights else torch.ones(12)
    torch.testing.assert_close(inner(params, h), training(w, each))
    validation = lambda w: F.cross_entropy(valid[0] @ w.T, valid[1], reduction="sum")
    torch.testing.assert_close(outer(params, h), validation(w))
    if weights:
        grads = implicit_grad(outer, inner, params, h, on_failure="raise")["weight"]
        hessian = jacrev(jacrev(training))(w, each).reshape(12, 12)
        u = torch.linalg.solve(hessian, torch.func.grad(validation)(w).flatten()).view_as(w)
        slope = lambda each: (torch.func.grad(training)(w, each) * u).sum()
        torch.testing.assert_close(grads, -torch.func.grad(slope)(each))


# --- networks ----------------------------------------------------------------------------


def all_of_it(curvature):
    """Decay, weights and a transform of inputs and targets, with a start for each."""
    problem = supervised(
        network(),
        F.mse_loss,
        penalty="log_decay",
        example_weights="logit",
        transform=lambda batch, h: (batch[0] * h["scale"], batch[1] + h["shift"], batch[2]),
        curvature=curvature,
    )
    rates = {name: torch.full_like(p, -2.0) for name, p in problem.params.items()}
    hparams = {"logit": torch.linspace(-1, 1, 12), "scale": torch.ones(3), "shift": torch.zeros(())}
    return problem, rates, hparams


def test_a_network_at_its_solution_against_differences_of_training_again():
    problem, rates, hparams = all_of_it("hessian")
    batch, valid = (*data(), torch.arange(12)), data(7)
    # Differences of a few entries of the decay stand for all of them.
    hparams["bias"] = rates.pop("0.bias")

    def full(h):
        others = {name: value for name, value in h.items() if name != "bias"}
        return {**others, "log_decay": {**rates, "0.bias": h["bias"]}}

    inner, outer = problem.inner(batch), problem.outer(valid)
    params, ended = EXACT(inner, dict(problem.params), full(hparams))
    assert bool(ended.success.all())

    def value(h):
        return outer(EXACT(inner, params, full(h))[0], full(h))

    grads, info = implicit_grad(
        outer, inner, params, full(hparams), solver=CG(rtol=1e-10), return_info=True
    )
    assert info.success
    grads["bias"] = grads.pop("log_decay")["0.bias"]
    close(grads, slope(value, hparams), rtol=1e-5)


def test_gauss_newton_of_a_network_against_its_matrix_by_hand():
    problem, rates, hparams = all_of_it("gauss-newton")
    x, y = data()
    valid, hparams = data(7), {**hparams, "log_decay": rates}
    params = {n: p.detach() for n, p in problem.params.items()}
    model, flat = problem.model, torch.cat([p.flatten() for p in params.values()])

    def unflat(v):
        parts = v.split([p.numel() for p in params.values()])
        return {n: part.view_as(p) for (n, p), part in zip(params.items(), parts, strict=True)}

    def outputs(v, h):
        return functional_call(model, unflat(v), (x * h["scale"],))[:, 0]

    def training(v, h):
        each = (outputs(v, h) - y[:, 0] - h["shift"]) ** 2
        p = unflat(v)
        penalty = sum((h["log_decay"][n].exp() * p[n] ** 2).sum() for n in p) / 2
        return (h["logit"].sigmoid() * each).mean() + penalty

    jacobian = jacrev(outputs)(flat, hparams)
    curvature = 2 * hparams["logit"].sigmoid() / 12
    decay = torch.cat([rate.exp().flatten() for rate in rates.values()])
    matrix = jacobian.T @ (curvature[:, None] * jacobian) + decay.diag()
    validation = lambda v: ((functional_call(model, unflat(v), valid[:1]) - valid[1]) ** 2).mean()
    u = torch.linalg.solve(matrix, torch.func.grad(validation)(flat))
    truth = torch.func.grad(lambda h: -u @ torch.func.grad(training)(flat, h))(hparams)

    inner = problem.inner((x, y, torch.arange(12)))
    torch.testing.assert_close(inner(params, hparams), training(flat, hparams))
    grads, info = implicit_grad(
        problem.outer(valid), inner, params, hparams,
        solver=CG(rtol=1e-12), return_info=True, on_failure="ignore",
    )  # fmt: skip
    close(grads.pop("log_decay"), truth.pop("log_decay"))
    close(grads, truth)
    assert not info.success  # the network is not trained
    assert info.inner_residual > 1e-3


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_an_untrained_network_is_warned_of(curvature):
    problem = supervised(network(), F.mse_loss, penalty="log_decay", curvature=curvature)
    h = {"log_decay": torch.tensor(-2.0)}
    with pytest.warns(hypergrad.ConvergenceWarning):
        implicit_grad(problem.outer(data(7)), problem.inner(data()), problem.params, h)


def test_a_transform_is_called_once_an_evaluation_so_that_its_draw_fits_the_targets():
    x, y = data()

    def shuffled(batch, h):
        order = torch.randperm(12)
        return batch[0][order], batch[1][order]

    decay = lambda p, h: h * sum((q**2).sum() for q in p.values())
    model = nn.Linear(3, 1)
    plain, random = (supervised(model, F.mse_loss, penalty=decay, transform=t)
                     for t in (None, shuffled))  # fmt: skip
    h = torch.tensor(0.2)
    params, _ = EXACT(plain.inner((x, y)), plain.params, h)
    valid = data(7)
    one, two = (
        implicit_grad(problem.outer(valid), problem.inner((x, y)), params, h, on_failure="raise")
        for problem in (plain, random)
    )
    torch.testing.assert_close(one, two)


# --- batches and outputs -----------------------------------------------------------------


class Two(nn.Module):
    """A model of two inputs, one of them by keyword."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x, offset, labels=None):
        logits = self.linear(x) + offset
        loss = None if labels is None else F.mse_loss(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def test_batches_of_all_forms_are_one_problem():
    x, y = data()
    offset, index = torch.randn(12, 1), torch.arange(12)
    model = Two()
    problem = supervised(model, F.mse_loss, penalty="decay")
    own = supervised(model, None, penalty="decay", curvature="hessian")
    h = {"decay": torch.tensor(0.3)}
    truth = ((model.linear(x) + offset - y) ** 2).mean()
    truth_inner = truth + 0.15 * sum((p**2).sum() for p in model.parameters())
    for batch in (
        ((x, offset), y),
        [[x, offset], y, index],
        ({"x": x, "offset": offset}, y),
        {"x": x, "offset": offset, "labels": y},
        {"offset": offset, "x": x, "y": y, "index": index},
    ):
        torch.testing.assert_close(problem.outer(batch)(problem.params, h), truth)
        torch.testing.assert_close(problem.inner(batch)(problem.params, h), truth_inner)
    named = {"x": x, "offset": offset, "labels": y, "index": index}
    for batch in (named, (x, offset, y), [x, offset, y]):
        torch.testing.assert_close(own.outer(batch)(own.params, h), truth)
        torch.testing.assert_close(own.inner(batch)(own.params, h), truth_inner)
    params, _ = EXACT(own.inner(named), own.params, h)
    one, two = (
        implicit_grad(p.outer(named), p.inner(named), params, h, on_failure="raise")
        for p in (problem, own)
    )
    close(one, two)


def test_batch_norm_is_evaluated_in_eval_mode_and_refused_in_train_mode():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    model(data()[0])  # statistics of its own
    before = copy.deepcopy(model.state_dict())
    problem = supervised(model.eval(), F.mse_loss, penalty="decay", curvature="hessian")
    h, batch, valid = {"decay": torch.tensor(0.1)}, data(), data(7)
    by_hand = lambda p, h: (
        F.mse_loss(functional_call(model, p, batch[:1]), batch[1])
        + h["decay"] * sum((q**2).sum() for q in p.values()) / 2
    )
    outer = lambda p, h: F.mse_loss(functional_call(model, p, valid[:1]), valid[1])
    options = {"on_failure": "ignore", "solver": CG(rtol=1e-10)}
    close(
        implicit_grad(problem.outer(valid), problem.inner(batch), problem.params, h, **options),
        implicit_grad(outer, by_hand, problem.params, h, **options),
    )
    model.train()
    with pytest.raises(UnsupportedOperation, match=r"Call module\.eval\(\)"):
        implicit_grad(problem.outer(valid), problem.inner(batch), problem.params, h)
    with pytest.raises(UnsupportedOperation, match=r"Call module\.eval\(\)"):
        problem.inner(batch)(problem.params, h)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tied_weights_count_once_and_frozen_ones_are_constants():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight
            self.frozen = nn.Linear(3, 1).requires_grad_(False)

        def forward(self, x):
            return self.frozen(self.second(self.first(x).tanh()))

    model = Tied()
    problem = supervised(model, F.mse_loss, penalty="decay", curvature="hessian")
    assert list(problem.params) == ["first.weight"]
    batch, valid, h = data(), data(7), {"decay": torch.tensor(0.4)}

    def training(w, rate):
        out = model.frozen((batch[0] @ w.T).tanh() @ w.T)
        return ((out - batch[1]) ** 2).mean() + rate * (w**2).sum() / 2

    params, _ = EXACT(problem.inner(batch), problem.params, h)
    grads = implicit_grad(problem.outer(valid), problem.inner(batch), params, h, on_failure="raise")
    w = params["first.weight"]
    hessian = jacrev(jacrev(training))(w, h["decay"]).reshape(9, 9)
    cost = lambda w: ((model.frozen((valid[0] @ w.T).tanh() @ w.T) - valid[1]) ** 2).mean()
    u = torch.linalg.solve(hessian, torch.func.grad(cost)(w).flatten())
    torch.testing.assert_close(grads["decay"], -(u @ w.flatten()))


# --- with the rest of the library --------------------------------------------------------


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_a_loader_is_the_mean_over_its_batches(curvature):
    x, y = data()
    problem = supervised(network(), F.mse_loss, penalty="log_decay", curvature=curvature)
    h, valid = {"log_decay": torch.tensor(-1.0)}, data(8)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    params, _ = EXACT(problem.inner((x, y)), problem.params, h)
    torch.testing.assert_close(problem.inner(loader)(params, h), problem.inner((x, y))(params, h))
    options = {"solver": CG(rtol=1e-10), "inner_tol": None}
    one, two = (
        implicit_grad(outer, inner, params, h, **options)
        for outer, inner in (
            (problem.outer(valid), problem.inner((x, y))),
            (problem.outer(DataLoader(TensorDataset(*valid), batch_size=4)), problem.inner(loader)),
        )
    )
    close(one, two)


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_argmin_makes_the_fit_differentiable(curvature):
    (x, y), (xv, yv) = data(), data(7)
    problem = supervised(
        nn.Linear(3, 1, bias=False), F.mse_loss, penalty="decay", curvature=curvature
    )
    fit = hypergrad.argmin(problem.inner((x, y)), solver=EXACT)

    def validation(rate):
        params = fit({"weight": torch.zeros(1, 3)}, {"decay": rate})
        return problem.outer((xv, yv))(params, {"decay": rate})

    def truth(rate):
        w = torch.linalg.solve(2 * x.T @ x / 12 + rate * torch.eye(3), 2 * x.T @ y / 12)
        return ((xv @ w - yv) ** 2).mean()

    rate = torch.tensor(0.3)
    torch.testing.assert_close(torch.func.grad(validation)(rate), torch.func.grad(truth)(rate))


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_tasks_are_mapped(curvature):
    problem = supervised(network(), F.mse_loss, penalty="log_decay", curvature=curvature)
    h, tasks, valid = {"log_decay": torch.tensor(-1.0)}, [data(), data(), data()], data(7)
    params = {n: p.detach() for n, p in problem.params.items()}

    def gradient(x, y):
        return implicit_grad(
            problem.outer(valid), problem.inner((x, y)), params, h,
            solver=CG(rtol=1e-10), on_failure="ignore",
        )["log_decay"]  # fmt: skip

    mapped = vmap(gradient)(*map(torch.stack, zip(*tasks, strict=True)))
    torch.testing.assert_close(mapped, torch.stack([gradient(*task) for task in tasks]))


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_calls_are_compiled(curvature):
    problem, rates, hparams = all_of_it(curvature)
    hparams, valid = {**hparams, "log_decay": rates}, data(7)
    params = {n: p.detach() for n, p in problem.params.items()}
    options = {"solver": CG(rtol=1e-10), "on_failure": "ignore"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", hypergrad.CompileWarning)
        for _ in range(2):
            batch = *data(), torch.arange(12)
            losses = problem.outer(valid), problem.inner(batch)
            plain, compiled = (
                implicit_grad(*losses, params, hparams, compile=c, **options) for c in (False, True)
            )
            close(compiled.pop("log_decay"), plain.pop("log_decay"))
            close(compiled, plain)


def test_gradients_are_accumulated():
    problem = supervised(nn.Linear(3, 1), F.mse_loss, penalty="log_decay")
    h = {"log_decay": torch.tensor(-1.0, requires_grad=True)}
    params, _ = EXACT(problem.inner(batch := data()), problem.params, h)
    losses = problem.outer(data(7)), problem.inner(batch)
    loss = hypergrad.implicit_backward(*losses, params, h)
    grads = implicit_grad(*losses, params, h)
    torch.testing.assert_close(h["log_decay"].grad, grads["log_decay"])
    torch.testing.assert_close(loss, losses[0](params, h).detach())
    assert all(p.grad is None for p in problem.params.values())


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
@pytest.mark.parametrize("method", [hypergrad.Alternating(inner_steps=4), hypergrad.SOBA()])
def test_a_loop_takes_the_losses_as_they_are(curvature, method):
    index = torch.arange(12)
    train = DataLoader(TensorDataset(*data(), index), batch_size=6)
    valid = DataLoader(TensorDataset(*data(8)), batch_size=4)
    problem = supervised(
        network(), F.mse_loss, penalty="log_decay", example_weights="logit", curvature=curvature
    )
    start = {"log_decay": torch.tensor(-3.0), "logit": torch.zeros(12)}
    sgd = lambda variables: torch.optim.SGD(variables, lr=0.05)
    loop = hypergrad.Bilevel(
        problem.outer, problem.inner, problem.params, start, method=method,
        inner_optimizer=torch.optim.SGD(problem.model.parameters(), lr=0.05), outer_optimizer=sgd,
        inner_batches=train, outer_batches=valid, on_failure="ignore",
    )  # fmt: skip
    before = problem.params["0.weight"].detach().clone()
    infos = [loop.step() for _ in range(4)]
    assert all(bool(torch.isfinite(info.outer_value)) for info in infos)
    assert not torch.equal(problem.params["0.weight"], before)  # the model itself is trained
    assert (loop.hparams["logit"] != 0).all()


def test_a_loop_with_losses_by_hand_does_the_same():
    train, valid = [data(6), data(6)], [data(4)]
    model = network()
    problem = supervised(model, F.mse_loss, penalty="log_decay", curvature="hessian")

    def inner(p, h, batch):
        penalty = h["log_decay"].exp() * sum((q**2).sum() for q in p.values()) / 2
        return F.mse_loss(functional_call(model, p, batch[:1]), batch[1]) + penalty

    def outer(p, h, batch):
        return F.mse_loss(functional_call(model, p, batch[:1]), batch[1])

    sgd = lambda variables: torch.optim.SGD(variables, lr=0.05)
    loops = [
        hypergrad.Bilevel(
            *losses, problem.params, {"log_decay": torch.tensor(-3.0)}, inner_optimizer=sgd,
            outer_optimizer=sgd, inner_batches=train, outer_batches=valid, on_failure="ignore",
        )
        for losses in ((outer, inner), (problem.outer, problem.inner))
    ]  # fmt: skip
    for _ in range(3):
        for loop in loops:
            loop.step()
    close(loops[0].hparams, loops[1].hparams)
    close(loops[0].params, loops[1].params)


@pytest.mark.gpu
def test_batches_and_hyperparameters_are_moved_to_the_model():
    problem = supervised(network(), F.mse_loss, penalty="log_decay", example_weights="logit")
    batch, valid = (*data(), torch.arange(12)), data(7)
    h = {"log_decay": torch.tensor(-1.0), "logit": torch.zeros(12)}
    options = {"solver": CG(rtol=1e-10), "on_failure": "ignore"}
    here = implicit_grad(problem.outer(valid), problem.inner(batch), problem.params, h, **options)
    problem.model.cuda()
    there = implicit_grad(problem.outer(valid), problem.inner(batch), problem.params, h, **options)
    close(here, there)


# --- mistakes ----------------------------------------------------------------------------


LINEAR = nn.Linear(3, 1)
BATCH = torch.ones(4, 3, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: supervised(print, F.mse_loss), TypeError, "must be a torch.nn.Module"),
        (lambda: supervised(LINEAR, nn.MSELoss), TypeError, "MSELoss()"),
        (lambda: supervised(LINEAR, F.mse_loss, penalty="l2"), ValueError, "'log_decay'"),
        (lambda: supervised(LINEAR, F.mse_loss, penalty=0.1), TypeError, "got 0.1"),
        (lambda: supervised(LINEAR, F.mse_loss, curvature="gn"), ValueError, "'gauss-newton'"),
        (lambda: supervised(LINEAR, None), UnsupportedOperation, 'curvature="hessian"'),
        (
            lambda: supervised(copy.deepcopy(LINEAR).requires_grad_(False), F.mse_loss),
            StructureMismatch,
            "requires_grad_()",
        ),
    ],
)
def test_a_mistaken_argument_is_named(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("options", "hparams", "batch", "words"),
    [
        ({}, {}, torch.ones(4, 3), "must be (inputs, targets)"),
        ({}, {}, (BATCH[0],), "got a tuple of 1 entries"),
        ({}, {}, (*BATCH, None, None), "((x1, x2), targets)"),
        ({}, {}, {"input": BATCH[0], "target_": BATCH[1]}, "got the keys 'input', 'target_'"),
        ({"penalty": "decay"}, torch.tensor(1.0), BATCH, "a dict with the entry 'decay'"),
        ({"penalty": "decay"}, {"log_decay": torch.tensor(1.0)}, BATCH, "got ['log_decay']"),
        ({"penalty": "decay"}, {"decay": {"w": torch.tensor(1.0)}}, BATCH, "'weight', 'bias'"),
        ({"penalty": "decay"}, {"decay": torch.ones(2)}, BATCH, "broadcast to weight"),
        ({"penalty": "decay"}, {"decay": {"bias": torch.ones(5, 1)}}, BATCH, "broadcast to bias"),
        ({"example_weights": "logit"}, {"logit": torch.ones(9)}, BATCH, "torch.arange(len(x))"),
        (
            {"example_weights": "logit"},
            {"logit": torch.ones(9)},
            (*BATCH, torch.ones(4)),
            "as integers",
        ),
        (
            {"example_weights": "logit"},
            {"logit": torch.ones(2)},
            (*BATCH, torch.arange(4)),
            "which has 2 entries",
        ),
        (
            {"example_weights": lambda h, batch: h},
            torch.ones(3),
            BATCH,
            "one weight for each of the 4 losses",
        ),
    ],
)
def test_what_does_not_fit_is_named(options, hparams, batch, words):
    problem = supervised(copy.deepcopy(LINEAR).double(), F.mse_loss, **options)
    with pytest.raises(StructureMismatch) as caught:
        problem.inner(batch)(problem.params, hparams)
    assert words in str(caught.value)


def test_a_loss_of_ones_own_must_return_one_for_each_example():
    model = copy.deepcopy(LINEAR).double()
    h, batch = {"logit": torch.ones(4)}, (*BATCH, torch.arange(4))
    for loss in (lambda o, t: ((o - t) ** 2).mean(), lambda o, t: ((o - t) ** 2)[:2]):
        problem = supervised(model, loss, example_weights="logit")
        with pytest.raises(StructureMismatch, match=r"loss for each example|the 2 losses"):
            problem.inner(batch)(problem.params, h)


def test_a_batch_that_is_missing_is_named():
    problem = supervised(copy.deepcopy(LINEAR).double(), F.mse_loss, penalty="decay")
    h = {"decay": torch.tensor(1.0)}
    with pytest.raises(StructureMismatch, match=r"Pass problem.inner\(batch\)"):
        implicit_grad(problem.outer(BATCH), problem.inner, problem.params, h)
    with pytest.raises(StructureMismatch, match=r"Pass problem.outer\(batch\)"):
        implicit_grad(problem.outer, problem.inner(BATCH), problem.params, h)
    sgd = lambda variables: torch.optim.SGD(variables, lr=0.05)
    loop = hypergrad.Bilevel(
        problem.outer, problem.inner, problem.params, h, inner_optimizer=sgd, outer_optimizer=sgd
    )
    with pytest.raises(StructureMismatch, match="inner_batches="):
        loop.step()


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_a_call_without_a_batch_names_its_loss_first_and_the_other(curvature):
    model = copy.deepcopy(LINEAR).double()
    problem = supervised(model, F.mse_loss, penalty="decay", curvature=curvature)
    h = {"decay": torch.tensor(1.0)}
    for level, other in (("inner", "outer"), ("outer", "inner")):
        loss = getattr(problem, level)
        words = rf"problem\.{level} was called without a batch.*problem\.{other}\(batch\)"
        with pytest.raises(StructureMismatch, match=words) as caught:
            loss(problem.params, h)
        assert caught.value.argument == level
        with pytest.raises(TypeError, match=rf"problem\.{level}\(batch\).* no argument"):
            loss()
    with pytest.raises(StructureMismatch, match=r"problem\.inner\(batch\)"):
        implicit_grad(problem.outer, problem.inner, problem.params, h)


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
@pytest.mark.parametrize(
    ("loss", "options", "words"),
    [
        (F.mse_loss, {"penalty": lambda p: 0}, "penalty(params, hparams)"),
        (F.mse_loss, {"penalty": lambda p, h, batch: 0}, "penalty(params, hparams)"),
        (F.mse_loss, {"transform": lambda batch: batch}, "transform(batch, hparams)"),
        (F.mse_loss, {"example_weights": lambda h: h}, "example_weights(hparams, batch)"),
        (lambda o: o.mean(), {}, "loss_fn(outputs, targets)"),
        (lambda o: o, {"example_weights": lambda h, batch: h}, "loss_fn(outputs, targets)"),
    ],
)
def test_a_function_of_other_arguments_is_told_how_it_is_called(loss, options, words, curvature):
    problem = supervised(copy.deepcopy(LINEAR).double(), loss, curvature=curvature, **options)
    h, sgd = torch.ones(4), lambda variables: torch.optim.SGD(variables, lr=0.05)
    loop = hypergrad.Bilevel(
        problem.outer, problem.inner, problem.params, h, inner_optimizer=sgd, outer_optimizer=sgd,
        inner_batches=[BATCH], outer_batches=[BATCH],
    )  # fmt: skip
    for call in (
        lambda: problem.inner(BATCH)(problem.params, h),
        lambda: implicit_grad(problem.outer(BATCH), problem.inner(BATCH), problem.params, h),
        loop.step,
    ):
        with pytest.raises(TypeError) as caught:
            call()
        assert f"called as {words}" in str(caught.value)


def test_an_error_within_a_function_of_the_callers_stays_what_it_is():
    problem = supervised(LINEAR, F.mse_loss, penalty=lambda p, h: len(3))
    with pytest.raises(TypeError, match=r"^object of type 'int' has no len\(\)$"):
        problem.inner(tuple(t.float() for t in BATCH))(problem.params, {})


def test_its_repr_is_short():
    text = repr(supervised(LINEAR, F.mse_loss, penalty="decay"))
    assert text.startswith("Supervised(Linear, mse_loss, penalty='decay'")
    assert len(text) < 160
