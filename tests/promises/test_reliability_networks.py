"""RELIABILITY.md, rows 43 to 58, in its order: the networks that people train.

Rows 43 and 51 are in test_units.py and test_processes.py; beside the modules that they test stand
50 (autograd/test_module_state.py and test_refused_modules.py), 52 (test_pytrees.py), 54
(autograd/test_kernels.py) and 57 (autograd/test_turns.py), each by its name.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hypergrad
from hypergrad import (
    CG,
    Auto,
    ConvergenceWarning,
    GaussNewton,
    Root,
    Status,
    UnsupportedOperation,
    implicit_grad,
    root_jvp,
    root_vjp,
)
from tests import problems, systems

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
JIT = ".torch.jit.script. is deprecated"
pytestmark = pytest.mark.filterwarnings(f"ignore:{JIT}")

D, S = torch.float64, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [D, S], ids=str)
SOLVERS = {
    **systems.SOLVERS,
    "Auto, no dense matrix": Auto(dense_below=0),
    "CG, a budget": CG(maxiter=10),
}
EACH = pytest.mark.parametrize("name", SOLVERS)
LOOP = pytest.mark.parametrize("solver", [None, CG(maxiter=10)], ids=["None", "CG"])
TOLERANCES = pytest.mark.parametrize("options", [{}, {"inner_tol": None}], ids=["judged", "None"])


def randn(*shape, seed=0, dtype=D):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=D, generator=draw).to(dtype)


@dataclasses.dataclass
class Outcome:
    """What a call gave, and what it said: warnings, or an error."""

    answer: torch.Tensor | None
    info: hypergrad.SolveInfo | None
    texts: list[str]

    @property
    def silent(self):
        return not self.texts

    def error(self, want):
        if self.answer is None:
            return float("inf")
        found = torch.cat([
            leaf.reshape(-1) for leaf in torch.utils._pytree.tree_leaves(self.answer)
        ])
        return float((found.to(D) - want).norm() / want.norm())


def called(function, *args, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", JIT)
        try:
            found = function(*args, **options)
        except hypergrad.HypergradError as error:
            return Outcome(None, None, [f"{type(error).__name__}: {error}"])
    answer, info = found if options.get("return_info") else (found, None)
    return Outcome(answer, info, [str(w.message) for w in caught])


class Network:
    """A small tanh network under a penalty: fit `y`, and be judged by `-y`."""

    def __init__(self, dtype=D, seed=0, decay=0.3, width=6):
        self.x, self.y = randn(12, 3, seed=seed, dtype=dtype), randn(12, seed=seed + 1, dtype=dtype)
        self.shapes = [(width, 3), (width,), (width,)]
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        self.sizes, self.decay = sizes, decay
        self.start = self.tree(randn(sum(sizes), seed=seed + 2, dtype=dtype))
        self.h = torch.zeros((), dtype=dtype)

    def tree(self, w):
        parts = zip(torch.split(w, self.sizes), self.shapes, strict=True)
        return [part.reshape(shape) for part, shape in parts]

    def flat(self, p):
        return torch.cat([leaf.reshape(-1) for leaf in p])

    def call(self, p):
        return (self.x @ p[0].T + p[1]).tanh() @ p[2]

    def inner(self, p, h):
        fit = (self.call(p) - self.y).square().mean()
        return fit + self.decay * h.exp() * sum(leaf.square().sum() for leaf in p)

    def outer(self, p, h):
        return (self.call(p) + self.y).square().mean()

    def descend(self, steps, rate):
        p = self.start
        for _ in range(steps):
            p = [
                leaf - rate * slope
                for leaf, slope in zip(p, grad(self.inner)(p, self.h), strict=True)
            ]
        return p

    def minimum(self, p, h=None):
        """The minimum that is reached from `p`."""
        h = self.h if h is None else h
        return problems.minimum(lambda w: self.inner(self.tree(w), h), self.flat(p))

    def truth(self, p):
        """The hypergradient at the minimum that is reached from `p`: the formula, by hand."""
        inner = lambda w, h: self.inner(self.tree(w), h)
        outer = lambda w, h: self.outer(self.tree(w), h)
        return problems.dense_hypergradient(inner, outer, self.minimum(p), self.h)


def cast(tree, dtype):
    return [leaf.to(dtype) for leaf in tree]


def test_the_truth_of_this_file_is_that_of_differences():
    net = Network()
    step = 1e-4
    values = [
        net.outer(net.tree(net.minimum(net.start, torch.tensor(h, dtype=D))), None)
        for h in (step, -step)
    ]
    torch.testing.assert_close(
        (values[0] - values[1]) / (2 * step), net.truth(net.start), rtol=1e-6, atol=0
    )


# Row 44


@pytest.mark.parametrize("solver", [None, CG()], ids=["None", "CG"])
@pytest.mark.parametrize(
    ("n", "highest"),
    [(10**5, 1.0), (10**5, 100.0), (10**6, 100.0), (9 * 10**6, 1.0), (9 * 10**6, 4.0)],
)
def test_row_44_no_number_of_unknowns_in_float32_is_too_large(n, highest, solver):
    a = torch.linspace(1, highest, n)
    c = torch.linspace(-1, 1, n)
    inner = lambda w, t: (a * w * w).sum() / 2 - t * (c * w).sum()
    outer = lambda w, t: (w - c).square().sum() / 2
    start = time.process_time()
    found = called(
        implicit_grad, outer, inner, c / a, torch.tensor(1.0), solver=solver, return_info=True
    )
    assert time.process_time() - start < 60
    want = ((c / a).double() * (c / a - c).double()).sum() if highest > 1 else None
    assert found.silent, found.texts
    assert found.info.success
    if want is None:  # the target is reached: outer's slope is zero up to rounding
        assert found.answer.abs() <= 1e-3
    else:
        assert found.error(want) < 1e-3


def test_row_44_the_identity_is_solved_in_one_step():
    for n in (10**5, 10**6, 9 * 10**6):
        b = torch.linspace(1, 2, n)
        x, info = CG().solve(lambda v: v, b)
        torch.testing.assert_close(x, b)
        assert info.status == Status.CONVERGED
        assert info.iterations == 1


# Row 45


# The rate and the number of steps of a loop whose params grow to a norm of 1e3, 1e6, 1e13 and more.
RUNAWAYS = pytest.mark.parametrize(("rate", "steps"), [(1.5, 5), (3.0, 5), (2.0, 10), (3.0, 10)])


@DTYPES
@LOOP
@TOLERANCES
@RUNAWAYS
@pytest.mark.parametrize("seed", range(2))
def test_row_45_an_inner_loop_that_ran_away_is_no_success(
    dtype, solver, options, rate, steps, seed
):
    net = Network(dtype, seed)
    p = net.descend(steps, rate)
    assert net.flat(p).norm() > 900
    call = (net.outer, net.inner, p, net.h)
    found = called(implicit_grad, *call, solver=solver, return_info=True, **options)
    if options:  # where it is not judged, the figure is there
        assert not found.silent or found.info.inner_residual > 0.5
    else:
        assert not found.silent
        assert not found.info.success


@DTYPES
@LOOP
@RUNAWAYS
def test_row_45_the_message_names_the_inner_solver_its_rate_and_the_norm(
    dtype, solver, rate, steps
):
    net = Network(dtype)
    p = net.descend(steps, rate)
    (text,) = called(implicit_grad, net.outer, net.inner, p, net.h, solver=solver).texts
    assert re.search(r"inner (solver|problem)", text)
    assert "step size (learning rate)" in text
    assert "norm of params" in text
    assert "singular" not in text


@functools.cache
def cut_short(seed):
    """Points along an inner loop and on from there to the minimum, each with its truth."""
    net = Network(D, seed, decay=0.05)
    points = [net.descend(steps, 0.1) for steps in (0, 1, 3, 10, 30, 100, 300)]
    last, best = net.flat(points[-1]), net.minimum(points[-1])
    points += [net.tree(best + left * (last - best)) for left in (0.1, 1e-2, 1e-4, 1e-6, 0.0)]
    return [(p, net.truth(p)) for p in points]


@DTYPES
@LOOP
@pytest.mark.parametrize("seed", [0, 2])
def test_row_45_an_inner_loop_cut_short_anywhere_is_judged_as_it_deserves(dtype, solver, seed):
    net, bands = Network(dtype, seed, decay=0.05), set()
    for p, truth in cut_short(seed):
        found = called(implicit_grad, net.outer, net.inner, cast(p, dtype), net.h, solver=solver)
        error = found.error(truth)
        assert error < 0.1 or not found.silent, error
        assert error > 1e-4 or found.silent, (error, found.texts)
        bands.add(0 if error < 1e-4 else 1 if error < 0.1 else 2)
    assert bands == {0, 1, 2} or (dtype == S and bands == {1, 2})


@DTYPES
@LOOP
@TOLERANCES
def test_row_45_a_saddle_is_no_success(dtype, solver, options):
    # Without a bias, and at zero, the penalty's slope and the network's vanish together.
    net = Network(dtype, decay=0.01)
    p = [torch.zeros_like(leaf) for leaf in net.start]
    tilted = lambda p, h: net.outer(p, h) + sum(leaf.sum() for leaf in p)
    w, loss = net.flat(p).to(D), Network(decay=0.01)
    curvature = hessian(lambda w: loss.inner(loss.tree(w), loss.h), w)
    assert torch.linalg.eigvalsh(curvature)[0] < -0.01
    shifted = lambda p, h: net.inner(p, h) + 0.1 * h * p[2].sum()
    found = called(implicit_grad, tilted, shifted, p, net.h, solver=solver, **options)
    assert not found.silent


def test_row_45_the_error_has_the_figures():
    net = Network()
    p = net.descend(10, 3.0)
    with pytest.raises(hypergrad.HypergradError) as error:
        implicit_grad(net.outer, net.inner, p, net.h, on_failure="raise")
    norm = f"{float(net.flat(p).norm()):.3g}"
    assert re.search(rf"norm (of params is )?{re.escape(norm)}", str(error.value))


# Row 46


@DTYPES
@EACH
@TOLERANCES
def test_row_46_an_indefinite_minimum_is_said_and_the_same_matrix_as_a_root_is_not(
    dtype, name, options
):
    n = 12
    Q = torch.linalg.qr(randn(n, n)).Q
    A = (Q * torch.tensor([-2.0, -1.0, *range(1, n - 1)], dtype=D)) @ Q.T
    A, c, b = (
        ((A + A.T) / 2).to(dtype),
        randn(n, seed=1, dtype=dtype),
        randn(n, seed=2, dtype=dtype),
    )
    w = torch.linalg.solve(A.double(), c.double())
    inner = lambda w, t: w @ A @ w / 2 - t * (c @ w)
    outer = lambda w, t: b @ w
    call = (w.to(dtype), torch.ones((), dtype=dtype))
    found = called(implicit_grad, outer, inner, *call, solver=SOLVERS[name], **options)
    assert any("minimum" in text or "diverged" in text for text in found.texts), found.texts
    needs_definite = name.startswith(("CG", "Neumann"))
    if needs_definite:
        return
    root = Root(lambda w, t: A @ w - t * c, symmetric=True)
    found = called(implicit_grad, outer, root, *call, solver=SOLVERS[name], **options)
    assert found.silent, found.texts
    assert found.error(b.double() @ w) < (1e-4 if dtype == D else 1e-2)


@EACH
def test_row_46_a_network_at_a_saddle_is_said_whatever_solver_answers(name):
    net = Network(decay=0.01)
    p = [torch.zeros_like(leaf) for leaf in net.start]
    tilted = lambda p, h: net.outer(p, h) + sum((leaf * randn(*leaf.shape)).sum() for leaf in p)
    shifted = lambda p, h: net.inner(p, h) + 0.1 * h * p[2].sum()
    for options in ({}, {"inner_tol": None}):
        found = called(
            implicit_grad,
            tilted,
            shifted,
            p,
            net.h,
            solver=SOLVERS[name],
            return_info=True,
            **options,
        )
        assert not found.silent
        assert found.info is None or not found.info.success


# Row 47


@DTYPES
def test_row_47_a_conserved_total_is_said_in_both_modes_alike(dtype):
    start = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)

    def rates(x, k):
        """A ring of three states: the total is conserved, and in no equation."""
        out = k * x
        return torch.roll(out, 1) - out

    k = torch.tensor([1.0, 2.0, 4.0], dtype=dtype)
    x = start.sum() * (1 / k) / (1 / k).sum()
    forward = called(root_jvp, rates, x, (k,), (torch.ones_like(k) * k[0] + k,))
    reverse = called(root_vjp, rates, x, (k,), torch.tensor([1.0, 0.0, 0.0], dtype=dtype))
    assert any("ingular" in text for text in forward.texts)
    assert any("ingular" in text for text in reverse.texts)
    # With the total in place of one equation both are right, and silent.
    total = lambda x, k: torch.cat([rates(x, k)[:2], (x - start).sum()[None]])
    want = jacobian(lambda k: start.sum() * (1 / k) / (1 / k).sum(), k).to(D)
    for column in range(3):
        unit = torch.eye(3, dtype=dtype)[column]
        forward = called(root_jvp, total, x, (k,), (unit,))
        reverse = called(root_vjp, total, x, (k,), unit)
        assert forward.silent
        assert reverse.silent
        close = 1e-9 if dtype == D else 1e-4
        assert forward.error(want[:, column]) < close
        assert reverse.error(want[column]) < close


@DTYPES
def test_row_47_where_a_perturbation_leaves_no_solution_both_modes_say_so(dtype):
    # x^2 + y^2 = t and x = s touch in a double root at s^2 = t.
    F = lambda x, a: torch.stack([x[0] ** 2 + x[1] ** 2 - a[0], x[0] - a[1]])
    x, a = torch.tensor([2.0, 0.0], dtype=dtype), torch.tensor([4.0, 2.0], dtype=dtype)
    unit = torch.tensor([1.0, 0.0], dtype=dtype)
    assert not called(root_jvp, F, x, (a,), (unit,)).silent
    assert not called(root_vjp, F, x, (a,), unit).silent


@DTYPES
@pytest.mark.parametrize("name", ["None", "Auto, no dense matrix", "Exact", "CG", "MINRES"])
def test_row_47_a_regression_whose_predictions_are_determined_stays_silent(dtype, name):
    X, y, X_val = (
        randn(5, 9, dtype=dtype),
        randn(5, seed=1, dtype=dtype),
        randn(3, 5, seed=2, dtype=dtype),
    )
    mix = X_val @ X  # new data within the span of the old
    w = torch.linalg.pinv(X.double()) @ y.double()
    inner = lambda w, y: (X @ w - y).square().sum() / 2
    outer = lambda w, y: (mix @ w).square().sum() / 2
    found = called(implicit_grad, outer, inner, w.to(dtype), y, solver=SOLVERS[name])
    assert found.silent, found.texts
    want = X_val.double().T @ (X_val.double() @ y.double())
    assert found.error(want) < (1e-4 if dtype == D else 1e-2)


# Row 48


@DTYPES
@pytest.mark.parametrize("solver", [None, CG(), CG(maxiter=10)], ids=["None", "CG", "budget"])
@pytest.mark.parametrize("seed", range(3))
def test_row_48_the_estimate_covers_what_gauss_newton_leaves_out(dtype, solver, seed):
    exact, net = Network(D, seed, decay=0.1), Network(dtype, seed, decay=0.1)
    p = exact.tree(exact.minimum(exact.start))
    condition = GaussNewton(
        lambda p, h: net.call(p),
        lambda out, h: (out - net.y).square().mean(),
        lambda p, h: net.decay * h.exp() * sum(leaf.square().sum() for leaf in p),
    )
    found = called(
        implicit_grad, net.outer, condition, cast(p, dtype), net.h, solver=solver, return_info=True
    )
    error = found.error(exact.truth(p))
    assert error > 1e-3  # the residuals are large
    estimate = float(found.info.error_estimate)
    assert not estimate < error
    assert error < 0.1 or not found.info.success


# Row 49


class Detached(torch.autograd.Function):
    """x^2 / 2 with a backward that keeps its x as a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square() / 2

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return slope * x.detach()


@DTYPES
def test_row_49_a_wrong_second_derivative_is_found_each_time_it_is_used(dtype):
    theta = torch.tensor([0.5, 1.0, 2.0], dtype=dtype)
    inner = lambda w, t: Detached.apply(w).sum() + w.square().sum() / 2 - t @ w
    # Right is 2; the recorded Hessian says 1.
    for _ in range(2):
        with pytest.raises(
            UnsupportedOperation, match=r"DetachedBackward.*first derivatives alone"
        ):
            implicit_grad(lambda w, t: w.sum(), inner, theta / 2, theta)


@DTYPES
def test_row_49_the_fused_weight_norm_is_found_and_the_one_written_out_is_right(dtype):
    torch.manual_seed(0)
    net = nn.utils.parametrizations.weight_norm(nn.Linear(3, 1)).to(dtype)
    x, y = randn(10, 3, dtype=dtype), randn(10, 1, seed=1, dtype=dtype)
    p = {name: leaf.detach() for name, leaf in net.named_parameters()}

    def losses(call):
        inner = lambda p, h: F.mse_loss(call(p), y) + h * sum(q.square().sum() for q in p.values())
        return lambda p, h: F.mse_loss(call(p), y + 1), inner

    h = torch.tensor(0.5, dtype=dtype)
    outer, inner = losses(lambda p: functional_call(net, p, (x,)))
    with pytest.raises(UnsupportedOperation, match="WeightNorm"):
        implicit_grad(outer, inner, p, h, inner_tol=None)


# Row 53


@DTYPES
def test_row_53_fused_attention_works_in_its_default_configuration(dtype):
    torch.manual_seed(0)
    net = nn.MultiheadAttention(4, 2, batch_first=True)
    net = net.to(dtype)
    x, y = randn(2, 5, 4, dtype=dtype), randn(2, 5, 4, seed=1, dtype=dtype)
    p = {name: leaf.detach() for name, leaf in net.named_parameters()}

    def inner(p, h):
        out, _ = functional_call(net, p, (x, x, x), {"need_weights": False})
        return F.mse_loss(out, y) + h * sum((q - 1).square().sum() for q in p.values())

    outer = lambda p, h: F.mse_loss(
        functional_call(net, p, (x, x, x), {"need_weights": False})[0], -y
    )
    h = torch.tensor(3.0, dtype=dtype)
    options = {"inner_tol": None, "on_failure": "ignore"}
    hypergradient = implicit_grad(outer, inner, p, h, **options)
    with sdpa_kernel(SDPBackend.MATH):
        want = implicit_grad(outer, inner, p, h, **options)
    torch.testing.assert_close(hypergradient, want, rtol=1e-9 if dtype == D else 1e-3, atol=0)


# Row 55


def test_row_55_a_default_call_has_a_budget_at_any_size_and_says_what_it_left():
    n = 1_100_000
    c = torch.linspace(1, 2, n)
    for a in (torch.logspace(0, 6, n), torch.linspace(-1, 100, n) + 1e-5):
        inner = lambda w, t, a=a: (a * w * w).sum() / 2 - t * (c * w).sum()
        found = called(
            implicit_grad, lambda w, t: w.sum(), inner, c / a, torch.tensor(1.0), return_info=True
        )
        assert len(found.texts) == 1
        assert not found.info.success
        assert found.info.matvecs <= 25
        ended = Status.MAX_ITERATIONS if a.min() > 0 else Status.NEGATIVE_CURVATURE
        assert found.info.status == ended
        assert not found.info.residual_norm < 1e-3


# Row 56


@DTYPES
def test_row_56_a_warning_in_a_loop_has_one_text(dtype):
    net, texts = Network(dtype), set()
    for steps in range(12):
        found = called(implicit_grad, net.outer, net.inner, net.descend(steps, 0.02), net.h)
        texts |= {re.sub(r"\s+", " ", text) for text in found.texts}
    assert 1 <= len(texts) <= 2  # not a minimum, and not solved
    assert not any(re.search(r"\d\.\d+e|\d\.\d{3}", text) for text in texts)


def test_row_56_a_loop_says_a_kind_once_and_counts_it_in_one_line():
    net = Network(S)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop = hypergrad.Bilevel(
            net.outer,
            net.inner,
            net.start,
            net.h,
            inner_optimizer=lambda v: torch.optim.SGD(v, lr=1e-3),
            outer_optimizer=lambda v: torch.optim.SGD(v, lr=1e-3),
            method=hypergrad.Alternating(inner_steps=1),
        )
        steps = [loop.step() for _ in range(6)]
    texts = [str(w.message) for w in caught if issubclass(w.category, ConvergenceWarning)]
    assert len(texts) == len(set(texts)) == len(steps[-1].warned) >= 1
    assert sum(steps[-1].warned.values()) == 6
    for shown in (str(steps[-1]), str(steps[-1].info)):
        assert "\n" not in shown
        assert len(shown) < 300
    for shown in (repr(steps[-1]), repr(steps[-1].info), repr(loop)):
        assert "tensor(" not in shown
        assert "0x" not in shown


# Row 58


def test_row_58_the_oldest_torch_that_is_declared_is_tested():
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    (oldest,) = [re.fullmatch(r"torch>=([\d.]+)", d)[1] for d in project["dependencies"]]
    jobs = (root / ".github/workflows/ci.yml").read_text()
    tested = re.search(r"torch: \[(.*?)\]", jobs)[1].split(", ")
    assert tested[0] == f'"torch=={oldest}.0"'
    assert tested[-1] == '"torch"'  # the newest that there is


# What holds for all of them


def asked():
    """Problems of every kind: in order, unsolved, run away, at a saddle, singular."""
    net = Network()
    zeros = [torch.zeros_like(leaf) for leaf in net.start]
    singular = lambda p, h: (p[2].sum() - h) ** 2
    points = {
        "in order": (net.inner, net.tree(net.minimum(net.start))),
        "unsolved": (net.inner, net.descend(10, 0.05)),
        "run away": (net.inner, net.descend(20, 5.0)),
        "saddle": (Network(decay=0.01).inner, zeros),
        "singular": (singular, zeros),
    }
    tilted = lambda p, h: net.outer(p, h) + sum(leaf.sum() for leaf in p)
    return {name: (tilted, inner, p, net.h) for name, (inner, p) in points.items()}


PROBLEMS = ["in order", "unsolved", "run away", "saddle", "singular"]
SOME = {
    k: SOLVERS[k]
    for k in ("None", "Auto, no dense matrix", "CG", "CG, a budget", "MINRES", "GMRES")
}


@pytest.mark.parametrize("problem", PROBLEMS)
@TOLERANCES
def test_status_warning_and_error_do_not_depend_on_whether_the_info_is_asked_for(problem, options):
    call = asked()[problem]
    for name, solver in SOME.items():
        for on_failure in ("warn", "raise"):
            given = {"solver": solver, "on_failure": on_failure, **options}
            plain = called(implicit_grad, *call, **given)
            asked_for = called(implicit_grad, *call, return_info=True, **given)
            assert plain.texts == asked_for.texts, name
            assert (plain.answer is None) == (asked_for.answer is None)
            if plain.answer is not None:
                torch.testing.assert_close(plain.answer, asked_for.answer, rtol=0, atol=0)
                assert bool(asked_for.info.success) == plain.silent


@pytest.mark.parametrize("problem", PROBLEMS)
@TOLERANCES
def test_a_constant_that_is_added_to_a_loss_changes_nothing(problem, options):
    outer, inner, p, h = asked()[problem]
    for name, solver in SOME.items():
        given = {"solver": solver, "return_info": True, **options}
        plain = called(implicit_grad, outer, inner, p, h, **given)
        for moved in (
            called(implicit_grad, lambda p, h: outer(p, h) + 1000, inner, p, h, **given),
            called(implicit_grad, outer, lambda p, h: inner(p, h) - 1000, p, h, **given),
        ):
            assert moved.texts == plain.texts, name
            torch.testing.assert_close(moved.answer, plain.answer, rtol=1e-12, atol=0)
            if plain.info is not None:
                for field in dataclasses.fields(plain.info):
                    if field.name != "outer_value":
                        before = getattr(plain.info, field.name)
                        after = getattr(moved.info, field.name)
                        if field.name == "method":
                            assert after == before
                        elif before is not None:
                            torch.testing.assert_close(
                                after, before, rtol=1e-6, atol=1e-30, equal_nan=True
                            )
