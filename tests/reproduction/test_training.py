"""The code that the example programs share."""

import itertools
import json
import math
import time

import pytest
import torch
from rich.console import Console

import hypergrad
from reproduction.method.episodes import Episodes
from reproduction.method.inner import GaussNewtonSteps, GradientDescent, ProximalProblem
from reproduction.method.meta import MetaLearner
from reproduction.method.models import OmniglotConvNet
from reproduction.method.systems import SYSTEMS, Recipe
from reproduction.runs.clock import clock_for
from reproduction.runs.command_line import finish, make_parser, read_settings
from reproduction.runs.reporting import mean_interval
from reproduction.runs.run_folder import RunFolder
from reproduction.runs.training import Schedule, TrainingFailed, train

LAM = 0.3
TASKS, POINTS, UNKNOWNS = 4, 6, 3


class Exactly:
    """Solves the linear inner problem by its normal equations."""

    def __call__(self, problem, centre):
        design = torch.func.jacrev(lambda w: problem.outputs({"w": w}))(centre["w"])
        target = -torch.func.grad(problem.loss)(torch.zeros_like(design[:, 0])) * POINTS / 2
        matrix = 2 / POINTS * design.T @ design + LAM * torch.eye(UNKNOWNS).double()
        return {"w": torch.linalg.solve(matrix, 2 / POINTS * design.T @ target + LAM * centre["w"])}


def linear_model(params, x):
    return x @ params["w"]


def squared_error(outputs, targets):
    return (outputs - targets).square().mean()


def learner(method, solver, **options):
    options = {"lam": LAM, "clip": 1e9, "linear_solver": hypergrad.CG(maxiter=20), **options}
    differentiation = SYSTEMS[method].differentiation
    return MetaLearner(linear_model, squared_error, differentiation, solver, **options)


@pytest.fixture
def meta():
    torch.manual_seed(0)
    return {"w": torch.randn(UNKNOWNS).double()}


@pytest.fixture
def episodes():
    torch.manual_seed(1)
    inputs = torch.randn(2, TASKS, POINTS, UNKNOWNS).double()
    targets = torch.randn(2, TASKS, POINTS).double()
    return Episodes(inputs[0], targets[0], inputs[1], targets[1])


def one(episodes, k):
    return Episodes(*(part[k] for part in episodes))


def support_hessian(task):
    return 2 / POINTS * task.support_x.T @ task.support_x


def solution(meta, task):
    pull = 2 / POINTS * task.support_x.T @ task.support_y + LAM * meta["w"]
    return torch.linalg.solve(support_hessian(task) + LAM * torch.eye(UNKNOWNS).double(), pull)


def query_gradient(w, task):
    return 2 / POINTS * task.query_x.T @ (task.query_x @ w - task.query_y)


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_implicit_meta_gradient_is_the_closed_form(meta, episodes, curvature):
    gradient, measures = learner("imaml", Exactly(), curvature=curvature).meta_gradient(
        meta, episodes
    )

    expected = torch.zeros(UNKNOWNS).double()
    for k in range(TASKS):
        task = one(episodes, k)
        operator = torch.eye(UNKNOWNS).double() + support_hessian(task) / LAM
        b = query_gradient(solution(meta, task), task)
        expected += torch.linalg.solve(operator, b) / TASKS
    torch.testing.assert_close(gradient["w"], expected, rtol=1e-5, atol=1e-8)
    assert measures["inner_residual"].max() < 1e-10
    assert not measures["negative_curvature"].any()


def test_damping_is_added_to_the_matrix(meta, episodes):
    gradient, _ = learner(
        "imaml", Exactly(), linear_solver=hypergrad.CG(maxiter=20, damping=0.7)
    ).task_gradient(meta, one(episodes, 0))

    task = one(episodes, 0)
    matrix = support_hessian(task) + (LAM + 0.7) * torch.eye(UNKNOWNS).double()
    expected = LAM * torch.linalg.solve(matrix, query_gradient(solution(meta, task), task))
    torch.testing.assert_close(gradient["w"], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 4])
def test_unrolled_meta_gradient_is_the_closed_form(meta, episodes, steps):
    solver = GradientDescent(steps, lr=0.1, proximal=False)
    gradient, _ = learner("maml", solver).meta_gradient(meta, episodes)

    expected = torch.zeros(UNKNOWNS).double()
    for k in range(TASKS):
        task, w = one(episodes, k), meta["w"]
        shrink = torch.eye(UNKNOWNS).double() - 0.1 * support_hessian(task)
        for _ in range(steps):
            w = shrink @ w + 0.1 * 2 / POINTS * task.support_x.T @ task.support_y
        expected += torch.linalg.matrix_power(shrink, steps) @ query_gradient(w, task) / TASKS
    torch.testing.assert_close(gradient["w"], expected)


def test_unrolled_meta_gradient_is_autograd_through_the_steps(episodes):
    network = torch.nn.Sequential(
        torch.nn.Linear(UNKNOWNS, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1), torch.nn.Flatten(0)
    ).double()

    def model(params, x):
        return torch.func.functional_call(network, params, (x,))

    params = dict(network.named_parameters())
    meta = {name: leaf.detach() for name, leaf in params.items()}
    unrolled = MetaLearner(
        model, squared_error, "unrolled", GradientDescent(3, lr=0.1, proximal=False), LAM, clip=1e9
    )
    gradient, _ = unrolled.meta_gradient(meta, episodes)

    total = 0.0
    for k in range(TASKS):
        task, adapted = one(episodes, k), params
        for _ in range(3):
            loss = squared_error(model(adapted, task.support_x), task.support_y)
            slopes = torch.autograd.grad(loss, list(adapted.values()), create_graph=True)
            pairs = zip(adapted.items(), slopes, strict=True)
            adapted = {name: leaf - 0.1 * slope for (name, leaf), slope in pairs}
        total = total + squared_error(model(adapted, task.query_x), task.query_y) / TASKS
    expected = torch.autograd.grad(total, list(params.values()))
    torch.testing.assert_close(list(gradient.values()), list(expected))


def test_first_order_meta_gradient_is_the_query_gradient(meta, episodes):
    gradient, _ = learner("fomaml", Exactly()).meta_gradient(meta, episodes)

    each = [query_gradient(solution(meta, t), t) for t in (one(episodes, k) for k in range(TASKS))]
    torch.testing.assert_close(gradient["w"], torch.stack(each).mean(0))


@pytest.mark.parametrize("method", ["imaml", "maml", "fomaml"])
def test_batch_of_tasks_is_the_loop_over_tasks(method):
    torch.manual_seed(2)
    network = OmniglotConvNet(ways=3, channels=4).double()
    meta = {name: leaf.detach() for name, leaf in network.named_parameters()}
    labels = torch.arange(3).expand(2, 3)
    episodes = Episodes(
        torch.rand(2, 3, 1, 28, 28).double(), labels, torch.rand(2, 3, 1, 28, 28).double(), labels
    )
    batched = MetaLearner(
        lambda params, x: torch.func.functional_call(network, params, (x,)),
        torch.nn.functional.cross_entropy,
        SYSTEMS[method].differentiation,
        GradientDescent(2, lr=0.1, proximal=method != "maml"),
        lam=1.0,
        linear_solver=hypergrad.CG(maxiter=5),
    )

    gradient, measures = batched.meta_gradient(meta, episodes)

    alone = [batched.task_gradient(meta, one(episodes, k)) for k in range(2)]
    for name, leaf in gradient.items():
        torch.testing.assert_close(leaf, sum(g[name] for g, _ in alone) / 2)
    for name, values in measures.items():
        torch.testing.assert_close(values, torch.stack([m[name] for _, m in alone]))


def test_a_long_task_gradient_is_clipped(meta, episodes):
    whole, _ = learner("fomaml", Exactly()).task_gradient(meta, one(episodes, 0))
    clipped, measures = learner("fomaml", Exactly(), clip=0.01).task_gradient(
        meta, one(episodes, 0)
    )

    torch.testing.assert_close(clipped["w"], whole["w"] * 0.01 / whole["w"].norm())
    torch.testing.assert_close(measures["gradient_norm"], whole["w"].norm())


def test_one_gauss_newton_step_solves_a_linear_problem(meta, episodes):
    task = one(episodes, 0)
    adapted = learner("imaml", GaussNewtonSteps(1)).adapt(meta, task.support_x, task.support_y)

    torch.testing.assert_close(adapted["w"], solution(meta, task))


def test_gauss_newton_steps_never_raise_the_objective():
    problem = ProximalProblem(
        outputs=lambda params: torch.stack([params["w"].sum() ** 3, params["w"].prod()]),
        loss=lambda outputs: (outputs - 5).square().sum(),
        lam=0.1,
    )
    centre = {"w": torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64)}

    values = [
        problem.objective(GaussNewtonSteps(steps)(problem, centre), centre) for steps in range(1, 8)
    ]

    assert all(later <= earlier for earlier, later in itertools.pairwise(values))


def test_mean_interval_is_that_of_the_normal_approximation():
    mean, interval = mean_interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))

    assert mean == 2.5
    assert interval == pytest.approx(1.96 * (5 / 3) ** 0.5 / 2)


def test_the_rate_falls_to_zero_along_a_cosine_by_steps_or_by_time():
    schedule = Schedule(100, 10.0, tasks_per_step=1, lr=2.0, validate_every=1)

    assert schedule.progress(25, 1.0) == 0.25
    assert schedule.progress(25, 5.0) == 0.5
    assert schedule.rate(50, 0.0) == 2.0
    assert schedule.rate(50, 0.5) == pytest.approx(1.0)
    assert schedule.rate(50, 1.0) == pytest.approx(0.0)
    assert schedule.rate(4, 0.0) == pytest.approx(2.0 * 5 / 20)


@pytest.mark.parametrize(
    ("device", "threads", "seconds"),
    [("cpu", 1, "processor"), ("cpu", 2, "wall"), ("cuda", 1, "wall")],
)
def test_seconds_are_the_processor_s_where_one_thread_does_all(device, threads, seconds):
    assert clock_for(torch.device(device), threads) == seconds


@pytest.mark.parametrize(("threads", "counted"), [(1, False), (2, True)])
def test_waiting_counts_by_the_clock_alone(meta, episodes, tmp_path, threads, counted):
    def sample(tasks):
        time.sleep(0.2)  # as if another program had the processor
        return episodes

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        trained = train(
            learner("fomaml", Exactly()), meta, sample, lambda params: 0.0,
            Schedule(2, None, TASKS, lr=0.1, validate_every=2), RunFolder(tmp_path),
            console=Console(quiet=True), figure="error",
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)

    assert (trained.seconds > 0.4) == counted


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write_json("a.json", {"kept": 1})

    def fail(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.write("a.json", fail)

    assert [path.name for path in folder.path.iterdir()] == ["a.json"]
    assert json.loads((folder.path / "a.json").read_text()) == {"kept": 1}


def test_training_keeps_the_parameters_that_validate_best(meta, episodes, tmp_path):
    figures = iter([3.0, 1.0, 2.0])
    seen = []

    def validate(params):
        seen.append(params["w"].clone())
        return next(figures)

    trained = train(
        learner("fomaml", Exactly()), meta, lambda tasks: episodes, validate,
        Schedule(3, None, TASKS, lr=0.1, validate_every=1), RunFolder(tmp_path),
        console=Console(quiet=True), figure="error",
    )  # fmt: skip

    assert torch.equal(trained.params["w"], seen[1])
    assert trained.steps == 3
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["validation"]) for r in records] == [(1, 3.0), (2, 1.0), (3, 2.0)]


def test_a_gradient_that_is_not_finite_ends_the_training(meta, episodes, tmp_path):
    broken = episodes._replace(query_y=episodes.query_y * math.inf)

    with pytest.raises(TrainingFailed, match="not finite before step 1"):
        train(
            learner("fomaml", Exactly()), meta, lambda tasks: broken, lambda params: 0.0,
            Schedule(3, None, TASKS, lr=0.1, validate_every=1), RunFolder(tmp_path),
            console=Console(quiet=True), figure="error",
        )  # fmt: skip

    assert json.loads((tmp_path / "metrics.jsonl").read_text())["not_finite"] == 1.0


def test_a_flag_replaces_the_recipe_of_every_method(tmp_path):
    recipe = Recipe("gradient-descent", 5, inner_lr=0.1, lam=1.0, lr=0.1, tasks_per_step=2)
    defaults = {"compare": ["maml"], "shots": 1, "queries": 1, "meta_steps": 9}
    settings = read_settings(
        make_parser("program", "", {**defaults, "validate_every": 3}),
        {"imaml": recipe, "maml": recipe, "fomaml": recipe},
        "problem",
        ["--lam", "0.5", "--seed", "3"],
    )

    assert {r.lam for r in settings.recipes.values()} == {0.5}
    assert {r.inner_steps for r in settings.recipes.values()} == {5}
    assert str(settings.out) == "runs/problem-imaml-seed3"


def test_ctrl_c_ends_with_status_130(capsys):
    def program():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        finish(program)

    assert stop.value.code == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_an_expected_error_is_one_line_and_any_other_is_raised(capsys):
    def program():
        raise FileNotFoundError("no such data")

    with pytest.raises(SystemExit) as stop:
        finish(program, expected=(FileNotFoundError,))
    assert stop.value.code == 1
    assert capsys.readouterr().err == "no such data\n"
    with pytest.raises(FileNotFoundError):
        finish(program)
