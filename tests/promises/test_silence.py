"""Silent where everything is in order, and one warning that names the fault where it is not."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, vmap

import hypergrad
from hypergrad import CG, ConvergenceWarning, Neumann, implicit_backward, implicit_grad
from reproduction.runs import omniglot, sinusoid
from reproduction.studies import curvature
from tests import problems

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
JIT = "ignore:.torch.jit.script. is deprecated"
pytestmark = pytest.mark.filterwarnings(JIT)

QUICKSTART = Path(__file__).parents[2] / "docs/quickstart.md"
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
D = torch.float64


@pytest.fixture
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")
        yield


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


# In order, at the defaults: nothing is said


@pytest.mark.parametrize("default", [torch.float32, D], ids=str)
@pytest.mark.parametrize("given", ["as written", "everything in the default dtype"])
def test_the_quickstart_is_silent(silence, default_dtype, capsys, default, given):
    snippets = re.findall(r"```\{testcode\}\n(.*?)```", QUICKSTART.read_text(), re.DOTALL)
    assert len(snippets) > 10
    default_dtype(default)
    names = {}
    for snippet in snippets:
        if given != "as written":
            snippet = snippet.replace("dtype=torch.float64", "dtype=torch.get_default_dtype()")
        exec(snippet, names)
    assert "not converged: True" in capsys.readouterr().out


@pytest.mark.parametrize("program", [sinusoid, omniglot, curvature], ids=lambda p: p.__name__)
def test_the_examples_are_silent(silence, tmp_path, program):
    program.main(["--smoke", "--out", str(tmp_path / "run")])


@DTYPES
@pytest.mark.parametrize("make", problems.WELL_POSED, ids=lambda make: make.__name__)
def test_every_well_posed_problem_is_silent_and_right(silence, make, dtype):
    problem = make(dtype)
    hparams = problem.hparams
    want = problem.hypergradient(hparams)
    close = 1e-5 if dtype == D else 2e-3
    params = problem.solve(hparams)
    found = implicit_grad(problem.outer, problem.condition, params, hparams)
    assert problems.relative_error(found, want) < close
    fit = problem.decorated()
    found = grad(lambda h: problem.outer(fit(h), h))(hparams)
    assert problems.relative_error(found, want) < close

    leaves, spec = torch.utils._pytree.tree_flatten(hparams)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    implicit_backward(problem.outer, problem.condition, params, again)
    found = torch.utils._pytree.tree_unflatten([leaf.grad for leaf in leaves], spec)
    assert problems.relative_error(found, want) < close


@DTYPES
@pytest.mark.parametrize("make", problems.WELL_POSED, ids=lambda make: make.__name__)
def test_every_well_posed_problem_is_silent_in_a_batch_of_tasks(silence, make, dtype):
    problem = make(dtype)
    scales = [0.9, 0.95, 1.0]
    tasks = [
        torch.utils._pytree.tree_map(lambda leaf, s=s: leaf * s, problem.hparams) for s in scales
    ]
    stacked = torch.utils._pytree.tree_map(lambda *leaves: torch.stack(leaves), *tasks)
    params = torch.utils._pytree.tree_map(
        lambda *leaves: torch.stack(leaves), *map(problem.solve, tasks)
    )
    found = vmap(lambda p, h: implicit_grad(problem.outer, problem.condition, p, h))(
        params, stacked
    )
    for k, task in enumerate(tasks):
        one = torch.utils._pytree.tree_map(lambda leaf, k=k: leaf[k], found)
        close = 1e-5 if dtype == D else 2e-3
        assert problems.relative_error(one, problem.hypergradient(task)) < close


# One planted fault each: one warning, or an error, that names it

H = torch.tensor([1.0, 3.0], dtype=D)
W = 1 / (1 + H)  # the minimum of `bowl`


def bowl(w, h):
    return ((w - 1) ** 2).sum() + (h * w**2).sum()


def total(w, h):
    return w.sum()


def quadratic(diagonal, slope=None):
    """Arguments of w.Dw/2 - h c.w at its stationary point for h = 1, where D may be singular."""
    d = torch.as_tensor(diagonal, dtype=D)
    c = torch.ones_like(d) if slope is None else torch.as_tensor(slope, dtype=D)
    w = torch.where(d == 0, 1.0, c / torch.where(d == 0, 1.0, d))
    return total, lambda w, h: (d * w * w).sum() / 2 - h * (c @ w), w, torch.ones((), dtype=D)


NORMED = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).double()


def batch_norm(w, h):
    model = NORMED
    x = torch.arange(6.0, dtype=D).view(3, 2) ** 2
    params = {**{n: p.detach() for n, p in model.named_parameters()}, "0.weight": w}
    return functional_call(model, params, (x,)).square().mean() + h.sum() * w.sum()


def dense(spectrum):
    """The same in float32, with a full matrix: a residual of exactly zero is out of reach."""
    n = len(spectrum)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=D, generator=torch.Generator().manual_seed(0))).Q
    A, c = (Q * torch.tensor(spectrum, dtype=D)) @ Q.T, torch.ones(n, dtype=D)
    w, A, c = torch.linalg.solve(A, c).float(), A.float(), c.float()
    return total, lambda w, h: w @ A @ w / 2 - h * (c @ w), w, torch.ones(())


SPREAD = torch.logspace(0, 3, 50).tolist()
NAN = torch.tensor([math.nan, 1.0], dtype=D)

WARNED = {
    "inner problem not solved": (
        (total, bowl, W * 1.1, H), {}, "does not solve the inner problem: its relative inner res",
    ),
    "negative curvature": (
        quadratic([1.0, -3.0, 2.0]), {"solver": CG()}, "CG met negative curvature",
    ),
    "singular, without a solution": (
        quadratic([2.0, 1.0, 0.0], slope=[1.0, 1.0, 0.0]), {}, "singular and the system has no so",
    ),
    "iterations run out": (
        quadratic(SPREAD), {"solver": CG(maxiter=5, rtol=1e-8)}, "CG ran out of iterations",
    ),
    "Neumann series diverges": (
        quadratic([1.0, 2.0, 30.0]), {"solver": Neumann(step_size=1.0)}, "Neumann diverged",
    ),
    "hyperparameter not used": (
        (lambda w, h: w.sum(), lambda w, h: bowl(w, h["used"]), W, {"used": H, "spare": H}),
        {}, r"Neither outer nor inner depends on hparams\['spare'\]",
    ),
    "float32 cannot reach rtol": (
        dense(SPREAD), {"solver": CG(rtol=1e-12)},
        "CG stagnated at the rounding floor",
    ),
}  # fmt: skip

REFUSED = {
    "NaN": ((total, bowl, NAN, H), hypergrad.NotFinite, "params holds NaN or infinity"),
    "BatchNorm in train mode": (
        (total, batch_norm, torch.eye(2, dtype=D), H),
        hypergrad.UnsupportedOperation, "batch-norm layer in train mode",
    ),
    "outer not connected": (
        (lambda w, h: h.sum(), bowl, W, H),
        hypergrad.NotConnected, "outer does not depend on params",
    ),
    "inner not connected": (
        (lambda w, h: w["a"].sum(), lambda w, h: bowl(w["a"], h), {"a": W, "b": W}, H),
        hypergrad.NotConnected, r"params\['b'\]",
    ),
    "outer loss not a scalar": (
        (lambda w, h: w, bowl, W, H), hypergrad.StructureMismatch, "scalar",
    ),
    "root not shaped like params": (
        (total, hypergrad.Root(lambda w, h: w[:1] - h[0]), W, H),
        hypergrad.StructureMismatch, r"\(1,\)|\[1\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", WARNED)
def test_a_planted_fault_is_warned_of_once_and_named(fault):
    arguments, options, words = WARNED[fault]
    with pytest.warns() as caught:
        implicit_grad(*arguments, **options)
    (one,) = caught
    assert one.category is ConvergenceWarning
    assert re.search(words, str(one.message)), str(one.message)
    assert one.filename == __file__


@pytest.mark.parametrize("fault", REFUSED)
def test_a_planted_mistake_is_an_error_that_names_it(silence, fault):
    arguments, error, words = REFUSED[fault]
    with pytest.raises(error, match=words):
        implicit_grad(*arguments)


@pytest.mark.parametrize("fault", WARNED)
def test_a_loop_of_fifty_steps_shows_the_warning_of_a_fault_once(fault):
    (outer, inner, params, hparams), options, words = WARNED[fault]
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(50):
            # Within a hundredth, so that the figures move from step to step.
            scale = 1 + 0.01 * torch.rand((), generator=generator).item()
            implicit_grad(lambda w, h, s=scale: s * outer(w, h), inner, params, hparams, **options)
    (one,) = caught
    assert re.search(words, str(one.message))


def shifted(count, tasks=32):
    """So many tasks of 32 whose parameters do not solve the inner problem."""
    shift = torch.zeros(tasks, dtype=D)
    shift[:count] = 0.5
    return lambda: vmap(lambda s: implicit_grad(total, bowl, W + s, H))(shift)


def test_a_loop_over_batches_shows_its_warning_once_though_other_tasks_fail_in_each():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for step in range(50):
            shifted(4 + step % 29)()
    (one,) = caught
    assert str(one.message).startswith("more than 3 of 32 tasks: params does not solve the inner")


def test_a_loop_in_which_any_number_of_tasks_fails_shows_four_warnings_at_most():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for step in range(50):
            shifted(step % 33)()
    starts = [str(one.message).partition(":")[0] for one in caught]
    assert starts == [*(f"{k} of 32 tasks" for k in (1, 2, 3)), "more than 3 of 32 tasks"]


@pytest.mark.parametrize("count", [1, 3, 4, 20, 32])
def test_an_error_counts_the_tasks_exactly(count):
    shift = torch.zeros(32, dtype=D)
    shift[:count] = 0.5
    with pytest.raises(hypergrad.NotConverged, match=f"^{count} of 32 tasks: "):
        vmap(lambda s: implicit_grad(total, bowl, W + s, H, on_failure="raise"))(shift)


def test_a_number_that_is_not_finite_is_not_counted_as_negative_curvature():
    for spoilt in (math.nan, math.inf, -math.inf):
        _, info = CG().solve(lambda v, s=spoilt: v * torch.tensor([1.0, s]), torch.ones(2))
        assert info.status == hypergrad.Status.NOT_FINITE
        assert not info.negative_curvature
