"""Ways to solve the whole network's inner problem: the head first, a lam for each leaf, a start."""

import json
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call, jacrev

import hypergrad
from reproduction.method.evaluations import evaluations_a_task
from reproduction.method.head_newton import SquaredError, solve_head
from reproduction.method.inner import GaussNewtonSteps, GradientDescent, HeadFirst
from reproduction.method.meta import LAM_PREFIX
from reproduction.method.systems import LEAST_LAM, SYSTEMS
from reproduction.runs import omniglot, sinusoid
from reproduction.runs.configuration import describe
from reproduction.runs.experiment import build_learner
from reproduction.runs.omniglot import OmniglotBenchmark
from reproduction.runs.resume import Refused
from tests.reproduction.small_network import LAM, LR, flat, learner, network_problem

HEAD = ("2.weight", "2.bias")


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("OMNIGLOT_DIR", raising=False)


def strengths_of(meta):
    """Return a lam for each leaf, all of them different."""
    return {name: torch.tensor(LAM * (1 + k), dtype=torch.float64) for k, name in enumerate(meta)}


def weighted(problem, meta, strengths):
    """Evaluate the inner objective by hand."""
    return lambda params: (
        problem.data_loss(params)
        + sum(strengths[name] / 2 * (params[name] - meta[name]).square().sum() for name in params)
    )


def slope_of(objective, params):
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    return flat(dict(enumerate(torch.autograd.grad(objective(leaves), list(leaves.values())))))


def test_gauss_newton_steps_with_a_lam_for_each_leaf_are_the_dense_ones(network, meta, task):
    strengths = strengths_of(meta)
    problem = network_problem(task.support_x, task.support_y, network, strengths)

    after = GaussNewtonSteps(1)(problem, meta)

    J = jacrev(problem.outputs)(meta)
    J = torch.cat([J[name].reshape(len(task.support_y), -1) for name in meta], 1)
    L = flat({name: strengths[name].expand_as(leaf) for name, leaf in meta.items()})
    A = 2 / len(J) * J.T @ J + torch.diag(L)
    whole = -torch.linalg.solve(A, slope_of(weighted(problem, meta, strengths), meta))
    step = flat(after) - flat(meta)
    size = (step @ whole) / (whole @ whole)  # by the line search
    assert size > 0.2
    torch.testing.assert_close(step, size * whole, rtol=1e-8, atol=1e-10)


def test_equal_lams_are_one_lam(network, meta, task):
    each = {name: torch.tensor(LAM, dtype=torch.float64) for name in meta}
    problems = [
        network_problem(task.support_x, task.support_y, network, lam) for lam in (LAM, each)
    ]
    for solver in (
        GaussNewtonSteps(3),
        GradientDescent(3, LR),
        HeadFirst(2, HEAD, GradientDescent(1, LR)),
    ):
        one, other = (flat(solver(problem, meta)) for problem in problems)
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("each", [False, True])
def test_the_head_is_solved_first_and_the_others_wait_at_the_centre(network, meta, task, each):
    strengths = strengths_of(meta)
    problem = network_problem(task.support_x, task.support_y, network, strengths if each else LAM)
    seen = []

    class Then:
        def __call__(self, problem, centre, first=None):
            seen.append((centre, first))
            return GradientDescent(1, LR)(problem, centre, first)

    after = HeadFirst(3, HEAD, Then())(problem, meta)

    ((centre, first),) = seen
    assert centre is meta
    assert all(torch.equal(first[name], meta[name]) for name in meta if name not in HEAD)
    objective = weighted(problem, meta, strengths if each else dict.fromkeys(meta, LAM))
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in first.items()}
    slopes = dict(
        zip(meta, torch.autograd.grad(objective(leaves), list(leaves.values())), strict=True)
    )
    assert all(slopes[name].norm() < 1e-12 for name in HEAD)  # a quadratic: one step is exact
    for name in meta:
        torch.testing.assert_close(after[name], first[name] - LR * slopes[name])


def test_the_head_alone_is_what_imaml_head_solves(network, meta, task):
    problem = network_problem(task.support_x, task.support_y, network)
    found = HeadFirst(2, HEAD, lambda problem, centre, first: first)(problem, meta)

    body = torch.tanh(task.support_x @ meta["0.weight"].T + meta["0.bias"])
    z = torch.cat([body, torch.ones_like(body[:, :1])], 1)
    centre = torch.cat([meta["2.weight"], meta["2.bias"][:, None]], 1)
    expected = solve_head(
        SquaredError(), z, task.support_y, centre, torch.tensor(LAM, dtype=torch.float64), 1
    )
    torch.testing.assert_close(
        torch.cat([found["2.weight"], found["2.bias"][:, None]], 1), expected
    )


@pytest.mark.slow
def test_the_derivative_by_each_lam_is_the_central_difference(network, meta, task):
    solver = HeadFirst(2, HEAD, GradientDescent(3000, LR))
    own = learner(
        network, "implicit", solver, curvature="hessian", learn_lam=True,
        linear_solver=hypergrad.CG(rtol=1e-12),
    )  # fmt: skip
    start = own.start(meta)
    for k, name in enumerate(meta):  # all of them different
        start[LAM_PREFIX + name] = start[LAM_PREFIX + name] + 0.02 * k

    gradient, measures = own.task_gradient(start, task)

    assert measures["inner_residual"] < 1e-8
    assert set(gradient) == set(start)
    for name, leaf in start.items():
        values = []
        for sign in (1, -1):
            moved = leaf.clone()
            moved.view(-1)[0] += sign * 1e-5
            adapted = own.adapt({**start, name: moved}, task.support_x, task.support_y)
            outputs = functional_call(network, adapted, (task.query_x,))
            values.append((outputs - task.query_y).square().mean())
        expected = (values[0] - values[1]).item() / 2e-5
        assert gradient[name].reshape(-1)[0].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_lams_begin_at_the_one_that_is_given_and_stay_above_their_floor(network, meta):
    own = learner(network, "implicit", GradientDescent(1, LR), learn_lam=True)
    start = own.start(meta)
    strengths = own.strengths(start)

    assert set(strengths) == set(meta)
    for value in strengths.values():
        assert value.item() == pytest.approx(LAM)
    low = own.strengths({name: leaf - 100 for name, leaf in start.items()})
    assert all(value.item() == pytest.approx(LEAST_LAM) for value in low.values())


# As the programs take it


FLAGS = (
    "--smoke", "--method", "imaml", "--ways", "2", "--queries", "1", "--channels", "3",
    "--test-tasks", "2", "--tasks-per-step", "2", "--meta-steps", "2", "--device", "cpu",
)  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        ("--inner-solver", "gauss-newton", "--inner-steps", "1", "--cg-steps", "8"),
        ("--head-steps", "2"),
        ("--head-steps", "2", "--inner-solver", "gauss-newton", "--learn-lam"),
        ("--learn-lam", "--inner-solver", "hessian-free"),
        ("--learn-lam", "--curvature", "hessian"),
    ],
)
def test_the_choices_train_a_whole_network(tmp_path, flags):
    omniglot.main([*FLAGS, *flags, "--out", str(tmp_path)])

    params = torch.load(tmp_path / "parameters.pt", weights_only=True)
    lams = {name: leaf for name, leaf in params.items() if name.startswith(LAM_PREFIX)}
    assert bool(lams) == ("--learn-lam" in flags)
    assert len({leaf.item() for leaf in lams.values()}) > 1 or not lams  # they have moved
    assert (tmp_path / "omniglot.png").exists()


def test_a_training_with_lams_goes_on_from_its_checkpoint(tmp_path):
    flags = (*FLAGS, "--learn-lam", "--head-steps", "1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    omniglot.main([*flags, "--out", str(whole), "--checkpoint-every", "1"])
    first = min((whole / "checkpoints").iterdir())
    omniglot.main([*flags, "--out", str(parts), "--resume", str(first)])

    one, other = (
        torch.load(folder / "parameters.pt", weights_only=True) for folder in (whole, parts)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["imaml", "imaml-head"])
def test_a_training_starts_from_the_parameters_of_another(tmp_path, method):
    omniglot.main([*FLAGS, "--method", method, "--out", str(tmp_path)])
    settings = omniglot.read_command_line([*FLAGS, "--method", method])
    benchmark = OmniglotBenchmark.build(settings)
    kept = torch.load(tmp_path / "parameters.pt", weights_only=True)
    task = benchmark.sample(1, torch.Generator().manual_seed(0))
    expected = build_learner(settings, method, benchmark).model(kept, task.support_x[0])

    file = ("--start-from", str(tmp_path / "parameters.pt"))
    after = tmp_path / "after"
    # So small a rate leaves them where they are.
    omniglot.main([*FLAGS, *file, "--lr", "1e-30", "--out", str(after)])
    params = torch.load(after / "parameters.pt", weights_only=True)
    outputs = build_learner(settings, "imaml", benchmark).model(params, task.support_x[0])

    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("content", [b"", b"not a file of torch", None])
def test_other_parameters_are_no_start(tmp_path, content):
    path = tmp_path / "parameters.pt"
    if content is None:
        torch.save({"head.weight": torch.zeros(3, 3)}, path)
    else:
        path.write_bytes(content)

    with pytest.raises(Refused, match="--start-from"):
        omniglot.main([*FLAGS, "--start-from", str(path), "--out", str(tmp_path / "run")])


def test_parameters_of_another_size_are_no_start(tmp_path):
    omniglot.main([*FLAGS, "--out", str(tmp_path)])
    file = ("--start-from", str(tmp_path / "parameters.pt"))

    with pytest.raises(Refused, match=r"of another network, in head\.weight"):
        omniglot.main([*FLAGS, "--ways", "3", *file, "--out", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "fomaml", "--learn-lam"], "by the implicit gradient alone"),
        (["--linear-solver", "identity", "--learn-lam"], "by the implicit gradient alone"),
        (["--learn-lam", "--lam", "1e-4"], "--lam above 0.001"),
        (["--method", "maml", "--head-steps", "1", "--proximal"], "one differentiates through"),
        (["--method", "reptile", "--head-steps", "1"], "--proximal"),
        (["--method", "imaml-head", "--head-steps", "1"], "without --head-steps"),
        (["--start-from", "no-such-file"], "must be a file"),
    ],
)
def test_choices_for_a_network_that_do_not_fit_are_one_line(capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        sinusoid.read_command_line(["--compare", *flags])

    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert said in message


def test_a_run_from_before_these_choices_goes_on():
    def described(*flags):
        settings = omniglot.read_command_line([*FLAGS, *flags])
        return describe(settings, "imaml", None, 1)

    usual = described()
    for flags, name in (
        (("--head-steps", "2"), "recipes.head_steps"),
        (("--learn-lam",), "recipes.learn_lam"),
        (("--network", "pooled"), "further.network"),
        (("--start-from", __file__), "start_from"),
    ):
        assert name not in usual
        assert described(*flags)[name] is not None


def test_steps_of_the_head_count_as_those_of_gauss_newton():
    recipe, system = sinusoid.RECIPES["imaml"], SYSTEMS["imaml"]
    count = lambda r: evaluations_a_task(r, system, outputs=10, truncate=5, products=21)
    assert count(replace(recipe, head_steps=2)) - count(recipe) == 2 * (10 + 6)


# The second pipeline


@pytest.mark.parametrize("network", ["strided", "pooled", "normalised"])
def test_crops_are_learnt_by_the_head_with_each_network(tmp_path, capsys, network):
    omniglot.main([
        *FLAGS, "--method", "imaml-head", "--pipeline", "cropped", "--network", network,
        "--out", str(tmp_path),
    ])  # fmt: skip

    assert ("one at a time" in capsys.readouterr().out) == (network != "pooled")


def test_batch_statistics_make_a_picture_depend_on_its_batch():
    for network, depends in (("strided", True), ("pooled", False), ("normalised", True)):
        settings = omniglot.read_command_line([
            *FLAGS, "--pipeline", "cropped", "--network", network,
        ])  # fmt: skip
        net = OmniglotBenchmark.build(settings).build_network()
        pictures = torch.rand(4, 1, 80, 80)
        assert torch.allclose(net(pictures)[:2], net(pictures[:2]), atol=1e-4) != depends
        assert [tuple(m.weight.shape) for m in net.modules() if isinstance(m, torch.nn.Linear)] == [
            (2, 3 * 25)
        ]


def test_the_network_with_maxima_is_normalised_before_each_bend():
    torch.manual_seed(0)
    net = omniglot.PooledConvNet(2, 32, channels=3, normalised=True).double()
    x = torch.rand(5, 1, 32, 32).double()
    params = [leaf.detach() for leaf in net.parameters()]
    h = x
    for k in range(4):
        weight, scale, shift = params[3 * k : 3 * k + 3]
        h = torch.nn.functional.conv2d(h, weight, padding=1)
        mean, variance = (
            h.mean((0, 2, 3), keepdim=True),
            h.var((0, 2, 3), correction=0, keepdim=True),
        )
        h = (h - mean) / (variance + 1e-5).sqrt() * scale[:, None, None] + shift[:, None, None]
        h = torch.nn.functional.max_pool2d(h.relu(), 2)
    torch.testing.assert_close(net(x), h.flatten(1) @ params[-2].T + params[-1])


def test_a_search_leaves_the_test_tasks_alone(tmp_path, monkeypatch):
    def test(*arguments):
        raise AssertionError("the test tasks were looked at")

    monkeypatch.setattr(OmniglotBenchmark, "test", test)
    omniglot.main([*FLAGS, "--validation-only", "--out", str(tmp_path)])

    assert json.loads((tmp_path / "results.json").read_text())["imaml"]["figures"] == {}
    assert "validation" in (tmp_path / "metrics.jsonl").read_text()
