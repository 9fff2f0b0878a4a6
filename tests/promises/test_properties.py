"""Properties that hold for every problem: Hypothesis draws the problems.

`check_hypergrad` compares with differences of the solved problem. Three references are independent
of this library: the dense formula with Jacobians by hand, and `higher` and `torchopt`, which
differentiate the steps of their own optimisers.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad import CG, GMRES, Exact, FixedPoint, Neumann, Root, SolveInfo
from tests.drawn_inner_problems import InnerProblem, few, fewer, inner_problems
from tests.drawn_problems import FAULTS, drawn_problems, solvers
from tests.problems import F64, data, flat, relative_error

pytestmark = pytest.mark.filterwarnings(
    # PyTorch's own forward mode imports a module that uses torch.jit.script.
    "ignore:.torch.jit.script. is deprecated",
    # higher's optimisers are subclasses of what torch has since renamed.
    "ignore::DeprecationWarning:higher",
)
SHAPES = st.sampled_from([(), (1,), (3,), (2, 2), (1, 2, 1)])


class Weights(torch.nn.Module):
    """The inner variables as a module, which `higher` and `torchopt` ask for."""

    def __init__(self, problem: InnerProblem) -> None:
        super().__init__()
        self.problem = problem
        leaves = pytree.tree_leaves(problem.init)
        self.weights = torch.nn.ParameterList([leaf.clone() for leaf in leaves])

    def forward(self) -> Tensor:
        return torch.cat([weight.reshape(-1) for weight in self.weights])


STEPS = 150  # gradient descent at 0.2 on eigenvalues of at least 1: 0.8 ** 150 = 3e-15


# Every drawn problem, by `check_hypergrad` and by the dense formula


@settings(few, max_examples=60)
@given(st.data())
def test_a_sound_problem_passes_the_check_and_has_the_dense_answer(drawn):
    problem = drawn.draw(drawn_problems(dtypes=(F64, F64, torch.float32)))
    solver = drawn.draw(solvers(problem))
    report = hypergrad.check_hypergrad(**problem.problem(solver=solver))
    assert report.ok, report
    sharp = problem.dtype == F64
    assert report.relative_error < (1e-6 if sharp else 1e-2)
    assert report.tolerance < (1e-4 if sharp else 1e-1)  # the comparison shows something
    if problem.enters:  # else solve returns a constant
        assert report.unrolled_error < (1e-6 if sharp else 1e-2)
    words = (
        ("exactly zero", "float32") if problem.enters else ("exactly zero", "float32", "detached")
    )
    assert all(any(word in note for word in words) for note in report.notes)
    hypergradient = hypergrad.implicit_grad(
        problem.outer,
        problem.condition(),
        problem.solve(problem.hparams),
        problem.hparams,
        solver=solver,
        on_failure="ignore",  # of the warning that a leaf plays no part
    )
    expected = problem.hypergradient()
    size = flat(expected).norm().clamp(min=1e-30)
    assert (flat(hypergradient) - flat(expected)).norm() <= (1e-8 if sharp else 1e-3) * size


@settings(few, max_examples=4)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@given(problem=drawn_problems(entering=True, unknowns=2))
def test_a_planted_fault_speaks_and_the_right_part_is_blamed(fault, problem):
    arguments, part = fault(problem)
    report = hypergrad.check_hypergrad(**arguments)
    assert not report.ok
    assert report.blame == part, report


@settings(few, max_examples=20)
@given(drawn_problems(entering=True))
def test_the_derivative_through_a_decorated_solver_is_that_of_differences(problem):
    decorate = {
        "fixed point": hypergrad.custom_fixed_point,
        "root": hypergrad.custom_root,
    }.get(problem.kind, hypergrad.custom_argmin)

    @decorate(problem.inner)
    def fit(init: None, hparams: Any) -> Any:
        return problem.solve(hparams)

    report = hypergrad.check_hypergrad(**problem.problem(solve=lambda h: fit(None, h)))
    assert report.ok, report
    assert report.unrolled_error < 1e-6


@settings(few, max_examples=10)
@given(drawn_problems(entering=True))
def test_a_step_of_the_inner_solver_states_the_same_problem_as_a_fixed_point(problem):
    def step(params: Any, hparams: Any) -> Any:
        w = problem.vector(params)
        return problem.build(w - 0.2 * problem.by_hand(w, *problem.terms(hparams))[0])

    report = hypergrad.check_hypergrad(**problem.problem(inner=FixedPoint(step)))
    assert report.ok, report
    assert report.relative_error < 1e-6


# Against unrolled differentiation by others, run to convergence


@fewer
@given(inner_problems())
def test_the_implicit_hypergradient_is_what_higher_unrolls_to(problem):
    higher = pytest.importorskip("higher")
    model = Weights(problem)
    optimiser = torch.optim.SGD(model.parameters(), lr=problem.STEP)
    hparams = {name: value.clone().requires_grad_() for name, value in problem.hparams.items()}
    with higher.innerloop_ctx(model, optimiser, copy_initial_weights=True) as (fast, steps):
        for _ in range(STEPS):
            steps.step(problem.inner(problem.build(fast()), hparams))
        problem.outer(problem.build(fast()), hparams).backward()
    expected = {name: value.grad for name, value in hparams.items()}
    assert relative_error(problem.implicit(), expected) < 1e-9


@fewer
@given(inner_problems())
def test_the_implicit_hypergradient_is_what_torchopt_unrolls_to(problem):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports the deprecated functorch
        torchopt = pytest.importorskip("torchopt")
    hparams = {name: value.clone().requires_grad_() for name, value in problem.hparams.items()}
    optimiser = torchopt.sgd(lr=problem.STEP)
    weights = tuple(leaf.clone().requires_grad_() for leaf in pytree.tree_leaves(problem.init))
    state = optimiser.init(weights)
    for _ in range(STEPS):
        vector = torch.cat([w.reshape(-1) for w in weights])
        value = problem.inner(problem.build(vector), hparams)
        gradients = torch.autograd.grad(value, weights, create_graph=True)
        updates, state = optimiser.update(gradients, state, params=weights, inplace=False)
        weights = torchopt.apply_updates(weights, updates, inplace=False)
    vector = torch.cat([w.reshape(-1) for w in weights])
    problem.outer(problem.build(vector), hparams).backward()
    expected = {name: value.grad for name, value in hparams.items()}
    assert relative_error(problem.implicit(), expected) < 1e-9


# The two rules


class Equation:
    """A root problem with a matrix that is not symmetric, and several arguments."""

    def __init__(self, seed: int, n: int) -> None:
        self.M = data(seed, n, n, dtype=F64) / n + 2 * torch.eye(n, dtype=F64)
        self.P = data(seed + 1, n, 3, dtype=F64)
        self.args = (
            {"a": data(seed + 2, 3, dtype=F64)},
            torch.tensor(0.7, dtype=F64),
        )
        x = torch.zeros(n, dtype=F64)
        for _ in range(100):
            x = x - torch.linalg.solve(self.M, self(self.split(x), *self.args)["x"])
        self.params = self.split(x)

    @staticmethod
    def split(x: Tensor) -> dict[str, Tensor]:
        return {"x": x}

    def __call__(self, params: dict[str, Tensor], first: Any, second: Tensor) -> dict[str, Tensor]:
        x = params["x"]
        return {"x": self.M @ x + second * torch.sin(x) / 4 - self.P @ first["a"].tanh()}

    def jacobians(self) -> tuple[Tensor, Tensor]:
        """A, and the derivative by all arguments, as dense matrices by PyTorch."""
        x, (first, second) = self.params["x"], self.args
        blocks = torch.autograd.functional.jacobian(
            lambda x, a, b: self({"x": x}, {"a": a}, b)["x"], (x, first["a"], second)
        )
        return blocks[0], torch.cat([blocks[1], blocks[2][:, None]], dim=1)


equations = st.builds(Equation, st.integers(0, 10_000), st.integers(1, 6))
PAIR = st.tuples(st.floats(-3, 3), st.floats(-3, 3))


@few
@given(equations, st.integers(0, 1000))
def test_root_vjp_and_root_jvp_are_the_dense_formula(equation, seed):
    A, B = equation.jacobians()
    dense = -torch.linalg.solve(A, B)
    c, t = data(seed, len(A), dtype=F64), data(seed + 1, 4, dtype=F64)
    pulled = hypergrad.root_vjp(equation, equation.params, equation.args, {"x": c})
    assert relative_error(flat(pulled), dense.T @ c) < 1e-10
    tangents = ({"a": t[:3]}, t[3])
    pushed = hypergrad.root_jvp(equation, equation.params, equation.args, tangents)
    assert relative_error(pushed["x"], dense @ t) < 1e-10


@few
@given(equations, st.integers(0, 1000), PAIR)
def test_root_vjp_is_linear_in_the_cotangent(equation, seed, factors):
    n = len(equation.params["x"])
    u, v = data(seed, n, dtype=F64), data(seed + 1, n, dtype=F64)

    def pulled(c: Tensor) -> Tensor:
        return flat(hypergrad.root_vjp(equation, equation.params, equation.args, {"x": c})).detach()

    combined = pulled(factors[0] * u + factors[1] * v)
    expected = factors[0] * pulled(u) + factors[1] * pulled(v)
    torch.testing.assert_close(combined, expected, rtol=1e-10, atol=1e-10)


@few
@given(equations, st.integers(0, 1000), st.sampled_from([None, GMRES(rtol=1e-13)]))
def test_root_jvp_and_root_vjp_are_each_others_transpose(equation, seed, solver):
    n = len(equation.params["x"])
    c, t = {"x": data(seed, n, dtype=F64)}, data(seed + 1, 4, dtype=F64)
    tangents = ({"a": t[:3]}, t[3])
    given = (equation, equation.params, equation.args)
    pushed = flat(hypergrad.root_jvp(*given, tangents, solver=solver)) @ flat(c)
    pulled = flat(hypergrad.root_vjp(*given, c, solver=solver)) @ t
    torch.testing.assert_close(pushed, pulled, rtol=1e-9, atol=1e-11)


@few
@given(equations, st.integers(0, 1000))
def test_argnums_choose_among_the_answers_of_root_vjp(equation, seed):
    c = {"x": data(seed, len(equation.params["x"]), dtype=F64)}
    given = (equation, equation.params, equation.args, c)
    first, second = hypergrad.root_vjp(*given)
    torch.testing.assert_close(hypergrad.root_vjp(*given, argnums=1), first)
    torch.testing.assert_close(hypergrad.root_vjp(*given, argnums=2), second)
    torch.testing.assert_close(hypergrad.root_vjp(*given, argnums=(2, 1)), (second, first))


# Structure plays no part


@few
@given(inner_problems(), st.randoms(use_true_random=False))
def test_the_order_of_the_leaves_plays_no_part(problem, order):
    expected = problem.implicit()
    leaves = pytree.tree_leaves(problem.solve(problem.hparams))
    permutation = list(range(len(leaves)))
    order.shuffle(permutation)
    shuffled = [leaves[i] for i in permutation]

    def restored(params: list[Tensor]) -> Any:
        ordered = [params[permutation.index(i)] for i in range(len(leaves))]
        return problem.build(torch.cat([leaf.reshape(-1) for leaf in ordered]))

    for solver in (Exact(), CG(rtol=1e-12)):
        hypergradient = hypergrad.implicit_grad(
            lambda params, h: problem.outer(restored(params), h),
            lambda params, h: problem.inner(restored(params), h),
            shuffled,
            problem.hparams,
            solver=solver,
        )
        assert relative_error(hypergradient, expected) < 1e-9


@few
@given(inner_problems())
def test_one_flat_vector_gives_what_any_structure_gives(problem):
    w = flat(problem.solve(problem.hparams))
    theta = torch.cat([problem.hparams["shift"], problem.hparams["log"][None]])

    def hparams(theta: Tensor) -> dict[str, Tensor]:
        return {"shift": theta[:2], "log": theta[2]}

    hypergradient = hypergrad.implicit_grad(
        lambda w, theta: problem.outer(problem.build(w), hparams(theta)),
        lambda w, theta: problem.inner(problem.build(w), hparams(theta)),
        w,
        theta,
    )
    assert relative_error(hparams(hypergradient), problem.implicit()) < 1e-9


@few
@given(inner_problems(), st.sampled_from([None, 3, "text", torch.tensor(2)]))
def test_constants_among_the_hyperparameters_come_back_as_they_are(problem, constant):
    hparams = {**problem.hparams, "constant": constant}
    hypergradient = hypergrad.implicit_grad(
        problem.outer, problem.inner, problem.solve(problem.hparams), hparams
    )
    returned = hypergradient.pop("constant")
    assert relative_error(hypergradient, problem.implicit()) < 1e-12
    if isinstance(constant, Tensor):
        assert returned.dtype == constant.dtype
        assert not returned.any()
    else:
        assert returned is constant


# Batches of tasks


NAMES = st.sampled_from(["Exact", "CG", "GMRES", "Neumann"])


@few
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 5), NAMES)
def test_a_batch_of_hypergradients_is_the_loop_over_its_tasks(seed, tasks, n, name):
    solver = {
        "Exact": Exact(),
        "CG": CG(rtol=1e-3),
        "GMRES": GMRES(rtol=1e-3),
        "Neumann": Neumann(terms=1000, rtol=1e-3),
    }[name]
    spread = 3.0 ** torch.arange(tasks, dtype=F64)[:, None, None]
    Q = torch.linalg.qr(data(seed, tasks, n, n, dtype=F64)).Q
    H = Q * (1 + spread * torch.linspace(0, 1, n, dtype=F64)) @ Q.mT
    c, target = data(seed + 1, tasks, n, dtype=F64), data(seed + 2, tasks, n, dtype=F64)
    hparams = {"theta": data(seed + 3, n, dtype=F64), "log": torch.tensor(0.2, dtype=F64)}

    def task(H: Tensor, c: Tensor, target: Tensor) -> tuple[Any, SolveInfo]:
        lam = hparams["log"].exp()
        matrix = H + lam * torch.eye(n, dtype=F64)
        w = torch.linalg.solve(matrix, c + lam * hparams["theta"])

        def inner(w: Tensor, h: dict[str, Tensor]) -> Tensor:
            pull = h["log"].exp() / 2 * (w - h["theta"]).square().sum()
            return (w * (H @ w)).sum() / 2 - (c * w).sum() + pull

        def outer(w: Tensor, h: dict[str, Tensor]) -> Tensor:
            return (w - target).square().sum() / 2 + h["log"].square()

        answer: tuple[Any, SolveInfo] = hypergrad.implicit_grad(
            outer, inner, w, hparams, solver=solver, return_info=True, on_failure="raise"
        )
        return answer

    grads, info = torch.func.vmap(task)(H, c, target)
    looped = [task(H[i], c[i], target[i]) for i in range(tasks)]
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *[g for g, _ in looped])
    assert relative_error(grads, stacked) < 1e-9
    assert info.method == looped[0][1].method
    for i, (_, own) in enumerate(looped):
        for figure in ("status", "success", "iterations", "negative_curvature"):
            assert getattr(info, figure)[i] == getattr(own, figure), figure
        torch.testing.assert_close(info.solution[i], own.solution, rtol=1e-8, atol=1e-10)
        for figure in ("residual_norm", "inner_residual", "outer_error", "outer_value"):
            torch.testing.assert_close(
                getattr(info, figure)[i], getattr(own, figure), rtol=1e-6, atol=1e-12
            )


@fewer
@given(st.integers(0, 1000), st.sampled_from(["vmap of grad", "grad of vmap", "jacrev of vmap"]))
def test_a_batch_through_a_decorator_is_the_loop_with_an_affine_norm_layer(seed, way):
    """The trap of a vmapped derivative's derivative: batched norm layers (FACTS)."""
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Tanh(), torch.nn.Linear(3, 1)
    ).to(F64)
    start = {
        name: data(seed + i, *p.shape, dtype=F64)
        for i, (name, p) in enumerate(net.named_parameters())
    }
    x, y = data(seed + 20, 3, 6, 2, dtype=F64), data(seed + 21, 3, 6, 1, dtype=F64)

    def inner(w: Any, theta: Any, x: Tensor, y: Tensor) -> Tensor:
        fit = (torch.func.functional_call(net, w, (x,)) - y).square().mean()
        pull = pytree.tree_map(lambda a, b: (a - b).square().sum(), w, theta)
        return fit + 2 * sum(pytree.tree_leaves(pull))

    @hypergrad.custom_argmin(inner, on_failure="ignore")
    def fit(init: None, theta: Any, x: Tensor, y: Tensor) -> Any:
        return pytree.tree_map(lambda leaf: 0.9 * leaf, theta)  # the rule is the same at any point

    def value(theta: Any, x: Tensor, y: Tensor) -> Tensor:
        w = fit(None, theta, x, y)
        return (torch.func.functional_call(net, w, (x.flip(0),)) - y).square().mean()

    tasks = [torch.func.grad(value)(start, x[i], y[i]) for i in range(3)]
    each = pytree.tree_map(lambda *leaves: torch.stack(leaves), *tasks)
    batched = torch.func.vmap(value, in_dims=(None, 0, 0))
    if way == "vmap of grad":
        found = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0, 0))(start, x, y)
    elif way == "jacrev of vmap":
        found = torch.func.jacrev(batched)(start, x, y)
    else:
        found = torch.func.grad(lambda theta: batched(theta, x, y).sum())(start)
        each = pytree.tree_map(lambda leaf: leaf.sum(dim=0), each)
    assert relative_error(found, each) < 1e-10


# The evidence


@few
@given(inner_problems(), st.sampled_from([None, CG(maxiter=2), GMRES(maxiter=2), Neumann(terms=5)]))
def test_the_reported_figures_are_those_of_the_returned_solution(problem, solver):
    params = problem.solve(problem.hparams)
    moved = pytree.tree_map(lambda w: w + 1e-3, params)
    grads, info = hypergrad.implicit_grad(
        problem.outer,
        problem.inner,
        moved,
        problem.hparams,
        solver=solver,
        inner_tol=None,
        return_info=True,
    )
    w, u = flat(moved), flat(info.solution)

    def inner(w: Tensor) -> Tensor:
        return problem.inner(problem.build(w), problem.hparams)

    A = torch.autograd.functional.hessian(inner, w)
    F = torch.autograd.functional.jacobian(inner, w)
    b = torch.autograd.functional.jacobian(
        lambda w: problem.outer(problem.build(w), problem.hparams), w
    )
    size = float(info.residual_norm)
    assert size == pytest.approx(float((b - A @ u).norm() / b.norm()), rel=1e-6, abs=1e-13)
    assert float(info.outer_error) == pytest.approx(float(u @ F), rel=1e-9)
    # The relative length of the Newton step, in the worse of two units.
    length = float(torch.linalg.solve(A, F).norm() / w.norm())
    assert length / 2 <= float(info.inner_residual) <= 10 * length
    assert info.outer_value == problem.outer(moved, problem.hparams)

    def cross(h: dict[str, Tensor]) -> Tensor:
        gradient = torch.func.grad(lambda w: problem.inner(problem.build(w), h))(w)
        return problem.outer(moved, h) - gradient @ u

    assert relative_error(grads, torch.func.grad(cross)(problem.hparams)) < 1e-10


@few
@given(inner_problems())
def test_the_outer_error_predicts_how_far_the_outer_loss_is_from_its_true_value(problem):
    params = problem.solve(problem.hparams)
    moved = pytree.tree_map(lambda w: w + 1e-5, params)
    _, info = hypergrad.implicit_grad(
        problem.outer, problem.inner, moved, problem.hparams, return_info=True, inner_tol=None
    )
    true = problem.outer(moved, problem.hparams) - problem.outer(params, problem.hparams)
    assert float(info.outer_error) == pytest.approx(float(true), abs=1e-8)


@few
@given(inner_problems(), st.floats(1e-2, 10))
def test_an_inner_problem_that_is_not_solved_is_said_to_be_so(problem, distance):
    params = pytree.tree_map(lambda w: w + distance, problem.solve(problem.hparams))
    given = (problem.outer, problem.inner, params, problem.hparams)
    with pytest.raises(hypergrad.NotConverged, match="inner"):
        hypergrad.implicit_grad(*given, on_failure="raise", inner_tol=1e-6)
    with pytest.warns(hypergrad.ConvergenceWarning, match="inner_tol"):
        hypergrad.implicit_grad(*given, inner_tol=1e-6)
    hypergrad.implicit_grad(*given, inner_tol=None)


def matrix(kind: str, seed: int, n: int, decades: float) -> Tensor:
    """A matrix of a kind, with singular values over so many decades."""
    Q, P = (torch.linalg.qr(data(seed + i, n, n, dtype=F64)).Q for i in (0, 1))
    values = torch.logspace(0, -decades, n, dtype=F64)
    if kind == "not symmetric":
        return Q * values @ P
    if kind == "nilpotent":
        return torch.diag(values[1:], 1) if n > 1 else torch.zeros(1, 1, dtype=F64)
    if kind == "indefinite":
        values = values * torch.sign(data(seed + 2, n, dtype=F64))
    if kind == "singular":
        values = torch.where(torch.arange(n) % 3 == 0, 0.0, values)
    A = Q * values @ Q.T
    return (A + A.T) / 2


KINDS = st.sampled_from(["definite", "indefinite", "singular", "not symmetric", "nilpotent"])


@settings(few, max_examples=100)
@given(
    kind=KINDS,
    seed=st.integers(0, 10_000),
    n=st.integers(1, 20),
    decades=st.floats(0, 14),
    size=st.integers(-8, 8),
    consistent=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_success_means_a_small_residual_and_the_figure_is_true(
    kind, seed, n, decades, size, consistent, dtype
):
    A = (10.0**size * matrix(kind, seed, n, decades)).to(dtype)
    b = data(seed + 3, n, dtype=dtype)
    b = A @ b if consistent else b
    if not b.any():
        return
    solvers = [Exact(), GMRES(), GMRES(rtol=1e-3), GMRES(restart=3), Neumann(rtol=1e-3)]
    if kind in ("definite", "indefinite", "singular"):
        solvers += [CG(), CG(rtol=1e-3)]
    for solver in solvers:
        x, info = solver.solve(lambda v: A @ v, b)
        assert x.isfinite().all()
        exact_A, exact_b = A.to(F64), b.to(F64)
        true = float((exact_b - exact_A @ x.to(F64)).norm() / exact_b.norm())
        backward = float(exact_A.norm() * x.norm() / exact_b.norm())
        floor = 1000 * torch.finfo(dtype).eps * (1 + backward)  # of any method at this answer
        assert float(info.residual_norm) == pytest.approx(true, rel=1e-3, abs=floor)
        if info.success:
            wanted = 1e-3 if getattr(solver, "rtol", None) else 1e-4
            assert true < max(1.01 * wanted, min(floor, 0.1))


# Unrolled differentiation


def test_the_examples_of_this_file_do_not_depend_on_chance():
    state = random.getstate(), torch.get_rng_state()
    InnerProblem(0, [(2,)], "tuple").implicit()
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


def test_a_root_is_differentiated_where_its_arguments_carry_a_derivative():
    equation = Equation(0, 3)
    second = equation.args[1].clone().requires_grad_()
    c = {"x": torch.ones(3, dtype=F64)}
    pulled = hypergrad.root_vjp(
        Root(equation), equation.params, (equation.args[0], second), c, argnums=1
    )
    (found,) = torch.autograd.grad(pulled["a"].sum(), second)

    def by_hand(second: Tensor) -> Tensor:
        x, a = equation.params["x"], equation.args[0]["a"]
        A = equation.M + torch.diag(second * x.cos() / 4)
        B = -equation.P * (1 - a.tanh().square())
        return -(B.T @ torch.linalg.solve(A.T, c["x"])).sum()

    torch.testing.assert_close(found, torch.func.grad(by_hand)(second.detach()), rtol=1e-9, atol=0)
