"""iMAML on the last layer: its meta-gradient, what it says of each task, and its evaluations."""

import math
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call, vmap

import hypergrad
from reproduction.method import head
from reproduction.method.episodes import Episodes
from reproduction.method.head import STRENGTH, HeadLearner, split_head
from reproduction.method.head_newton import CrossEntropy, SquaredError, solve_head
from reproduction.method.models import OmniglotConvNet, PooledConvNet, SinusoidMLP
from reproduction.method.systems import LEAST_HEAD_LAM
from reproduction.runs import omniglot, sinusoid
from reproduction.runs.experiment import build_learner

TASKS, CLASSES = 3, 3


def network():
    torch.manual_seed(0)
    layers = OrderedDict(
        first=torch.nn.Linear(4, 6), bend=torch.nn.Tanh(), last=torch.nn.Linear(6, CLASSES)
    )
    return torch.nn.Sequential(layers).double()


def learner(loss, lam, **options):
    body, names = split_head(network())
    options = {"linear_solver": hypergrad.CG(rtol=1e-12), "clip": 1e9, **options}
    own = HeadLearner(
        lambda params, x: functional_call(body, params, (x,)), names, loss,
        options.pop("steps", 25), lam, **options,
    )  # fmt: skip
    return own, own.start({name: leaf.detach() for name, leaf in network().named_parameters()})


def classification():
    torch.manual_seed(1)
    labels = torch.arange(CLASSES).expand(TASKS, CLASSES)
    x = torch.randn(2, TASKS, 2 * CLASSES, 4).double()
    return Episodes(x[0], labels.repeat(1, 2), x[1], labels.repeat(1, 2))


def regression():
    torch.manual_seed(2)
    x, y = torch.randn(2, TASKS, 5, 4).double(), torch.randn(2, TASKS, 5, CLASSES).double()
    return Episodes(x[0], y[0], x[1], y[1])


PROBLEMS = {"classes": (CrossEntropy(), classification), "numbers": (SquaredError(), regression)}


@pytest.fixture(params=PROBLEMS)
def kind(request):
    loss, draw = PROBLEMS[request.param]
    return loss, draw()


def query_loss(own, params, episodes, solve):
    """Return the mean query loss with every task's head by `solve`, by plain autograd."""
    weight, bias = (params[name] for name in own.head)
    centre, lam = torch.cat([weight, bias[:, None]], 1), own.strength(params)

    def features(x):
        z = torch.tanh(x @ params["first.weight"].mT + params["first.bias"]) / 6**0.5
        return torch.cat([z, torch.ones_like(z[:, :1])], 1)

    losses = [
        own.loss(features(qx) @ solve(features(x), y, centre, lam).mT, qy)
        for x, y, qx, qy in zip(*episodes, strict=True)
    ]
    return torch.stack(losses).mean()


def flat(gradient):
    return torch.cat([leaf.reshape(-1) for leaf in gradient.values()])


@pytest.mark.parametrize("lam", [0.02, 0.5])
def test_the_meta_gradient_is_the_central_difference(kind, lam):
    loss, episodes = kind
    own, meta = learner(loss, lam)

    gradient, _ = own.meta_gradient(meta, episodes)

    exact = lambda z, y, centre, lam: solve_head(loss, z, y, centre, lam, 25)
    for name, leaf in meta.items():  # body, theta and log lam
        for k in range(leaf.numel()):
            values = []
            for sign in (1, -1):
                moved = leaf.clone()
                moved.view(-1)[k] += sign * 1e-5
                values.append(query_loss(own, {**meta, name: moved}, episodes, exact))
            expected = (values[0] - values[1]) / 2e-5
            assert gradient[name].reshape(-1)[k].item() == pytest.approx(
                expected.item(), rel=1e-5, abs=1e-9
            ), name


def test_the_meta_gradient_is_autograd_through_a_long_descent(kind):
    loss, episodes = kind
    own, meta = learner(loss, 0.5)

    def descend(z, y, centre, lam):
        phi = centre
        for _ in range(200):
            value = loss(z @ phi.mT, y) + lam / 2 * (phi - centre).square().sum()
            (slope,) = torch.autograd.grad(value, phi, create_graph=True)
            phi = phi - 0.5 * slope
        return phi

    gradient, measures = own.meta_gradient(meta, episodes)

    leaves = {name: leaf.clone().requires_grad_() for name, leaf in meta.items()}
    value = query_loss(own, leaves, episodes, descend)
    expected = torch.autograd.grad(value, list(leaves.values()))
    torch.testing.assert_close(
        flat(gradient), torch.cat([g.reshape(-1) for g in expected]), rtol=1e-7, atol=1e-10
    )
    torch.testing.assert_close(measures["query_loss"].mean(), value.detach())


def test_each_task_says_how_its_solve_went():
    own, meta = learner(CrossEntropy(), 0.02)
    _, good = own.meta_gradient(meta, classification())
    _, few_products = replace(own, linear_solver=hypergrad.CG(maxiter=1)).meta_gradient(
        meta, classification()
    )
    _, unsolved = replace(own, steps=1).meta_gradient(meta, classification())

    for measures in (good, few_products, unsolved):
        assert all(measure.shape == (TASKS,) for measure in measures.values())
        assert not measures["negative_curvature"].any()
    assert not good["unsolved"].any()
    assert (good["linear_residual"] < 1e-10).all()
    assert few_products["unsolved"].all()
    assert unsolved["unsolved"].all()
    assert (unsolved["inner_residual"] > 1e-3).all()
    assert good["lam"].tolist() == pytest.approx([0.02] * TASKS)


def test_one_task_in_trouble_leaves_the_others_alone():
    episodes = classification()
    episodes.support_x[1] = torch.nan
    own, meta = learner(CrossEntropy(), 0.02)

    _, measures = own.meta_gradient(meta, episodes)

    assert measures["unsolved"].tolist() == [False, True, False]
    assert measures["query_loss"].isfinite().tolist() == [True, False, True]


def test_a_batch_is_the_mean_of_its_tasks(kind):
    loss, episodes = kind
    own, meta = learner(loss, 0.1)

    batch, _ = own.meta_gradient(meta, episodes)

    each = [
        flat(own.meta_gradient(meta, Episodes(*(part[k : k + 1] for part in episodes)))[0])
        for k in range(TASKS)
    ]
    torch.testing.assert_close(flat(batch), sum(each) / TASKS)


def test_a_long_gradient_is_clipped():
    own, meta = learner(CrossEntropy(), 0.1)
    whole, measures = own.meta_gradient(meta, classification())
    length = flat(whole).norm()

    clipped, _ = replace(own, clip=length.item() / 3).meta_gradient(meta, classification())

    torch.testing.assert_close(measures["gradient_norm"], length.expand(TASKS))
    torch.testing.assert_close(flat(clipped), flat(whole) / 3)


def test_lambda_starts_where_it_is_told_and_stays_above_its_least_value():
    own, meta = learner(CrossEntropy(), 0.02)

    assert own.strength(meta).item() == pytest.approx(0.02)
    low = {**meta, STRENGTH: meta[STRENGTH] - 100}
    assert own.strength(low).item() == pytest.approx(LEAST_HEAD_LAM)
    # A step of Adam moves log lam five times as far as another meta-parameter.
    up = {**meta, STRENGTH: meta[STRENGTH] + 0.01}
    ratio = (own.strength(up) - LEAST_HEAD_LAM) / (own.strength(meta) - LEAST_HEAD_LAM)
    assert math.log(ratio) == pytest.approx(0.05)


def test_predictions_are_those_of_the_adapted_head(kind):
    loss, episodes = kind
    own, meta = learner(loss, 0.1)
    assert meta.keys() == {*dict(network().named_parameters()), STRENGTH}

    outputs = own.predict(meta, episodes)

    exact = lambda z, y, centre, lam: solve_head(loss, z, y, centre, lam, 25)
    expected = query_loss(own, meta, episodes, exact)
    torch.testing.assert_close(vmap(loss)(outputs, episodes.query_y).mean(), expected)
    assert not torch.allclose(outputs, vmap(lambda x: own.model(meta, x))(episodes.query_x))
    # This body takes no statistics of a batch.
    torch.testing.assert_close(own.predict_one_at_a_time(meta, episodes), outputs)


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_a_query_of_the_head_has_the_support_set_beside_it_and_nothing_else(monkeypatch, at_once):
    monkeypatch.delenv("OMNIGLOT_DIR", raising=False)
    monkeypatch.setattr(head, "PICTURES_AT_ONCE", at_once)
    settings = omniglot.read_command_line(["--smoke", "--ways", "2", "--method", "imaml-head"])
    benchmark = omniglot.OmniglotBenchmark.build(settings)
    own = build_learner(settings, "imaml-head", benchmark)
    meta = own.start({n: p.detach() for n, p in benchmark.build_network().named_parameters()})
    batch = benchmark.sample(2, torch.Generator().manual_seed(0))

    every = own.predict_one_at_a_time(meta, batch)

    for i, outputs in enumerate(every):
        for query, alone in zip(batch.query_x[i], outputs, strict=True):
            support = batch.support_x[i]
            # Predict the pair as if it were a task's queries: the last is the one asked about.
            pair = Episodes(
                support[None], batch.support_y[i][None],
                torch.cat([support, query[None]])[None], torch.zeros(1, 3),
            )  # fmt: skip
            torch.testing.assert_close(own.predict(meta, pair)[0, -1], alone, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(every, own.predict(meta, batch), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("whole", "x"),
    [
        (OmniglotConvNet(3, channels=4), torch.rand(5, 1, 28, 28)),
        (PooledConvNet(3, 32, channels=4), torch.rand(5, 1, 32, 32)),
        (SinusoidMLP(), torch.rand(5, 1)),
    ],
)
def test_body_and_head_make_up_the_network(whole, x):
    body, names = split_head(whole)
    weight, bias = (whole.get_parameter(name) for name in names)

    torch.testing.assert_close(body(x) @ weight.mT + bias, whole(x))
    assert {*dict(body.named_parameters()), *names} == {*dict(whole.named_parameters())}


def test_a_network_without_a_last_layer_is_refused():
    with pytest.raises(TypeError, match="no linear layer at its end: ReLU"):
        split_head(torch.nn.ReLU())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--inner-solver", "gauss-newton"], "its inner solver is newton, not gauss-newton"),
        (["--differentiation", "first-order"], "--differentiation implicit alone"),
        (["--no-proximal"], "--proximal"),
        (["--lam", "1e-5"], "--lam above 0.0001, not 1e-05"),
    ],
)
def test_choices_that_do_not_go_with_the_head_are_one_line(capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        sinusoid.read_command_line(["--method", "imaml-head", "--compare", *flags])

    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert said in message


def test_newton_is_for_the_head_alone(capsys):
    with pytest.raises(SystemExit):
        sinusoid.read_command_line(["--inner-solver", "newton"])

    assert "so --method imaml-head" in capsys.readouterr().err
