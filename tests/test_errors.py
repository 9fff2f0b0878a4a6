"""A program learns from an error what it needs to know, without reading its text."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch

import hypergrad
from hypergrad import (
    CG,
    KKT,
    CompileWarning,
    ConvergenceWarning,
    Exact,
    FixedPoint,
    HypergradError,
    Neumann,
    Root,
    Status,
    custom_argmin,
    implicit_backward,
    implicit_grad,
    projections,
    prox,
    root_jvp,
    root_vjp,
)
from hypergrad._errors import with_place

ROOT = Path(__file__).parents[1]
D = torch.float64
ONE = torch.ones(2, dtype=D)
SIGNS = torch.tensor([1.0, -1.0], dtype=D)
ERRORS = [
    error
    for error in map(hypergrad.__dict__.get, hypergrad.__all__)
    if isinstance(error, type) and issubclass(error, HypergradError)
]


def outer(w, t):
    return (w**2).sum()


def bowl(w, t):
    return ((w - t) ** 2).sum()


def raised(call):
    with pytest.raises(HypergradError) as caught:
        call()
    return caught.value


def read(error):
    return type(error).__name__, error.leaf, error.argument


# The attributes


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_has_the_attributes(kind):
    error = kind("text")
    assert error.args == ("text",)
    assert (error.info, error.leaf, error.argument) == (None, None, None)
    error = kind("text", leaf="params['a'][0]")
    assert (error.leaf, error.argument) == ("params['a'][0]", "params")
    assert kind(leaf="x0", argument="start").argument == "start"
    assert "`info`" in kind.__doc__ or "info :" in kind.__doc__ or "`leaf`" in kind.__doc__


@pytest.mark.parametrize(
    ("leaf", "argument"),
    [
        ("params", "params"),
        ("args[1]['w']", "args"),
        ("prox(v, ...)['w']", "prox"),
        ("tangents for args[0]", "tangents"),
        ("What step returned['w']", None),
        ("['w']", None),
    ],
)
def test_the_argument_is_that_of_the_leaf(leaf, argument):
    assert HypergradError(leaf=leaf).argument == argument


@pytest.mark.parametrize("kind", [*ERRORS, ConvergenceWarning, CompileWarning])
def test_a_message_ends_with_a_place_of_the_documentation(kind):
    if kind is HypergradError:
        assert str(kind("text")) == "text"
        return
    text = with_place("text", kind)
    if issubclass(kind, HypergradError):
        assert str(kind("text")) == text
        assert str(type("Mine", (kind,), {})("text")) == text
    page, anchor = re.fullmatch(r"text See (docs/errors.md)#(\w+)\.", text).groups()
    headings = re.findall(r"^## (\w+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in [heading.lower() for heading in headings]


@pytest.mark.parametrize(("scale", "kind"), [(1.0, "notconverged"), (-1.0, "indefinitehessian")])
def test_a_warning_names_the_place_of_the_error_that_it_stands_for(scale, kind):
    with pytest.warns(ConvergenceWarning, match=f" See docs/errors.md#{kind}.$"):
        implicit_grad(outer, lambda w, t: scale * bowl(w, t), ONE + 1, ONE)


def test_a_class_of_ones_own_has_its_own_text():
    class Mine(HypergradError):
        def __init__(self, number):
            super().__init__(f"number {number}", argument="number")

    assert (str(Mine(3)), Mine(3).args, Mine(3).argument) == ("number 3", ("number 3",), "number")


def test_the_errors_of_the_list_are_all():
    assert len(ERRORS) == 13
    assert {kind for kind in ERRORS if kind is not HypergradError} <= set(
        HypergradError.__subclasses__()
    )


# They travel


def travelled(error):
    return (
        pickle.loads(pickle.dumps(error)),
        copy.copy(error),
        copy.deepcopy(error),
        *(pickle.loads(pickle.dumps(error, protocol)) for protocol in (2, 5)),
    )


@pytest.mark.parametrize("kind", ERRORS)
def test_they_survive_pickle_and_copy(kind):
    _, info = CG().solve(lambda v: 2 * v, ONE)
    error = kind("text", info=info, leaf="params['a']", argument="init")
    error.add_note("a note")
    for other in travelled(error):
        assert type(other) is kind
        assert (other.args, str(other)) == (("text",), str(error))
        assert (other.leaf, other.argument, other.__notes__) == ("params['a']", "init", ["a note"])
        assert str(other.info) == str(info)
        assert other.info.residual_norm == info.residual_norm


def test_they_survive_being_raised_from_another():
    cause = KeyError("a")
    with pytest.raises(HypergradError) as caught:
        raise hypergrad.NotFinite("text", leaf="params['a']") from cause
    assert caught.value.__cause__ is cause
    assert read(caught.value) == ("NotFinite", "params['a']", "params")
    assert read(pickle.loads(pickle.dumps(caught.value))) == read(caught.value)


def test_what_implicit_grad_raises_travels():
    error = raised(lambda: implicit_grad(outer, bowl, ONE + 1, ONE, on_failure="raise"))
    for other in travelled(error):
        assert str(other) == str(error)
        assert other.info.inner_residual == error.info.inner_residual


# The evidence


def saddle(w, t):
    return (SIGNS * (w - t) ** 2).sum()


def line(w, t):
    return (w.sum() - t.sum()) ** 2


LASSO = hypergrad.ProximalGradient(
    lambda w, t: ((w - t) ** 2).sum() / 2, lambda v, step, t: prox.l1(v, step), 0.5
)


@pytest.mark.parametrize(
    ("inner", "params", "solver", "error", "status"),
    [
        (bowl, ONE + 1, None, "NotConverged", Status.CONVERGED),
        (saddle, ONE, CG(), "IndefiniteHessian", Status.NEGATIVE_CURVATURE),
        (line, ONE, Exact(), "SingularHessian", Status.SINGULAR),
        (LASSO, 0 * ONE, None, "NotDifferentiable", Status.CONVERGED),
        (bowl, ONE, Neumann(step_size=2.0), "Diverged", Status.DIVERGED),
    ],
)
def test_an_answer_that_is_refused_has_its_evidence(inner, params, solver, error, status):
    refused = raised(
        lambda: implicit_grad(
            lambda w, t: (SIGNS * w).sum() + w[0],
            inner,
            params,
            ONE,
            solver=solver,
            on_failure="raise",
        )
    )
    assert type(refused).__name__ == error
    assert Status(refused.info.status) == status
    assert not refused.info.success
    assert refused.info.method


def test_its_figures_are_those_of_the_answer():
    refused = raised(lambda: implicit_grad(outer, bowl, 1.5 * ONE, ONE, on_failure="raise"))
    _, info = implicit_grad(
        outer, bowl, 1.5 * ONE, ONE, on_failure="ignore", return_info=True, inner_tol=1e-3
    )
    assert refused.info.inner_residual == info.inner_residual
    assert f"{float(refused.info.inner_residual):.3g}" in str(refused)


@pytest.mark.parametrize("nested", [False, True])
def test_the_evidence_of_a_batch_outlives_its_transform(nested):
    fit = custom_argmin(bowl, inner_tol=1e-3, on_failure="raise")(lambda init, t: t + 1)
    slope = torch.func.grad(lambda t: fit(None, t).sum())
    batch = torch.ones(3, 2, dtype=D)
    if nested:
        slope, batch = torch.func.vmap(slope), batch.expand(2, 3, 2)
    info = raised(lambda: torch.func.vmap(slope)(batch)).info
    assert tuple(info.status.shape) == ((2, 3) if nested else (3,))
    torch.testing.assert_close(info.inner_residual, torch.full(info.status.shape, 0.5, dtype=D))
    assert "tasks" in str(info)
    assert not pickle.loads(pickle.dumps(info)).success.any()


def test_hoag_hands_over_its_evidence():
    method = hypergrad.HOAG(max_inner_steps=1)
    loop = hypergrad.Bilevel(
        outer,
        bowl,
        torch.zeros(2, dtype=D),
        ONE.clone(),
        inner_optimizer=lambda v: torch.optim.SGD(v, lr=1e-6),
        outer_optimizer=lambda v: torch.optim.SGD(v, lr=1e-6),
        method=method,
        on_failure="raise",
    )
    error = raised(loop.step)
    assert type(error).__name__ == "NotConverged"
    assert float(error.info.inner_residual) > 0.1


# The leaf and the argument


def two(w, t):
    return ((w["a"] - t["x"]) ** 2).sum() + (w["b"] ** 2).sum()


TWO = {"a": ONE, "b": 0 * ONE}
LEAF = ONE.clone().requires_grad_()
NAN = torch.tensor([1.0, torch.nan], dtype=D)
LEAVES = {
    "a leaf of params that inner does not use": (
        lambda: implicit_grad(lambda w, t: w["a"].sum(), lambda w, t: bowl(w["a"], t), TWO, ONE),
        ("NotConnected", "params['b']", "params"),
    ),
    "params that outer does not use": (
        lambda: implicit_grad(lambda w, t: t.sum(), bowl, ONE, ONE),
        ("NotConnected", None, "params"),
    ),
    "hparams that are reached past the arguments": (
        lambda: implicit_grad(
            lambda w, _: outer(w["a"], ONE), lambda w, _: two(w, {"x": LEAF}), TWO, {"x": LEAF}
        ),
        ("NotConnected", "hparams['x']", "hparams"),
    ),
    "hparams without a place for a gradient": (
        lambda: implicit_backward(outer, bowl, ONE, ONE),
        ("NotConnected", None, "hparams"),
    ),
    "an outer loss that is no scalar": (
        lambda: implicit_grad(lambda w, t: w, bowl, ONE, ONE),
        ("StructureMismatch", None, "outer"),
    ),
    "an x0 of another shape": (
        lambda: implicit_grad(lambda w, t: outer(w["a"], t), two, TWO, {"x": ONE}, x0={"a": ONE}),
        ("StructureMismatch", None, "x0"),
    ),
    "a leaf of x0 of another shape": (
        lambda: implicit_grad(
            lambda w, t: outer(w["a"], t), two, TWO, {"x": ONE}, x0={"a": ONE, "b": ONE[:1]}
        ),
        ("StructureMismatch", "x0['b']", "x0"),
    ),
    "a map that returns another shape": (
        lambda: implicit_grad(outer, FixedPoint(lambda w, t: w[:1]), ONE, ONE),
        ("StructureMismatch", "T(params, ...)", "T"),
    ),
    "a complex leaf": (
        lambda: implicit_grad(outer, bowl, ONE, {"x": ONE, "z": ONE * 1j}),
        ("UnsupportedOperation", "hparams['z']", "hparams"),
    ),
    "an array of numpy": (
        lambda: implicit_grad(outer, bowl, ONE, {"x": ONE, "n": ONE.numpy()}),
        ("StructureMismatch", "hparams['n']", "hparams"),
    ),
    "hparams without a tensor": (
        lambda: implicit_grad(outer, bowl, ONE, 2.0),
        ("StructureMismatch", None, "hparams"),
    ),
    "a module": (
        lambda: implicit_grad(outer, bowl, torch.nn.Linear(1, 1), ONE),
        ("StructureMismatch", "params", "params"),
    ),
    "an argument that is changed in place": (
        lambda: implicit_grad(lambda w, t: (w + w.detach().mul_(2)).sum(), bowl, ONE, ONE),
        ("UnsupportedOperation", "params", "params"),
    ),
    "arguments that are exchanged": (
        lambda: implicit_grad(
            lambda w, t: w["a"].sum(), lambda w, t: bowl(w["a"], t), ONE, {"a": ONE}
        ),
        ("StructureMismatch", None, "params"),
    ),
    "params of KKT": (
        lambda: implicit_grad(outer, KKT(bowl, equalities=lambda w, t: w - t), ONE, ONE),
        ("StructureMismatch", None, "params"),
    ),
    "a cotangent of another shape": (
        lambda: root_vjp(lambda w, t: w - t, ONE, (ONE,), ONE[:1]),
        ("StructureMismatch", "cotangent", "cotangent"),
    ),
    "tangents of another shape": (
        lambda: root_jvp(lambda w, t: w - t, ONE, (ONE,), (ONE[:1],)),
        ("StructureMismatch", "tangents for args[0]", "tangents"),
    ),
    "a vector to project": (
        lambda: projections.simplex(torch.tensor(1.0)),
        ("StructureMismatch", None, "v"),
    ),
    "a radius": (
        lambda: projections.l2_ball(ONE, "far"),
        ("StructureMismatch", None, "radius"),
    ),
    "a string that is to be mapped": (
        lambda: prox.l1({"a": ONE, "b": "text"}, 1.0),
        ("StructureMismatch", "v['b']", "v"),
    ),
    "an initial point that hangs together with hparams": (
        lambda: hypergrad.unrolled_grad(outer, lambda w, t: w - t, LEAF, LEAF, steps=1),
        ("NotConnected", "init", "init"),
    ),
    "NaN in params": (
        lambda: implicit_grad(lambda w, t: outer(w["b"], t), two, {"a": NAN, "b": ONE}, {"x": ONE}),
        ("NotFinite", "params['a']", "params"),
    ),
    "NaN in the outer loss": (
        lambda: implicit_grad(lambda w, t: (w - 2).log().sum(), bowl, ONE, ONE),
        ("NotFinite", None, "outer"),
    ),
    "NaN in the inner loss": (
        lambda: implicit_grad(outer, lambda w, t: bowl(w, t) * torch.nan, ONE, ONE),
        ("NotFinite", None, "inner"),
    ),
    "NaN in a gradient": (
        lambda: implicit_grad(
            lambda w, t: w["a"].sum() + w["b"].sum().abs().sqrt(), two, TWO, {"x": ONE}
        ),
        ("NotFinite", "params['b']", "params"),
    ),
    "NaN of a projection": (
        lambda: implicit_grad(
            outer,
            hypergrad.ProjectedGradient(bowl, lambda v, t: v + (-v.abs() - 1).sqrt(), 0.1),
            ONE,
            ONE,
        ),
        ("NotFinite", "params", "project"),
    ),
    "NaN of an unrolled solver": (
        lambda: hypergrad.unrolled_grad(
            lambda w, t: outer(w["a"], t),
            lambda w, t: {"a": w["a"] * torch.nan * t},
            {"a": ONE},
            2 * ONE,
            steps=1,
        ),
        ("NotFinite", "params['a']", "params"),
    ),
}


@pytest.mark.parametrize("case", LEAVES)
def test_the_leaf_and_the_argument(case):
    call, expected = LEAVES[case]
    error = raised(call)
    assert read(error) == expected
    assert error.leaf is None or error.leaf in str(error)


def test_numbers_that_are_not_finite_have_evidence_where_the_solve_came_so_far():
    error = raised(lambda: implicit_grad(outer, Root(lambda w, t: (w - t) * torch.nan), ONE, ONE))
    assert Status(error.info.status) == Status.NOT_FINITE


def test_what_makes_a_solution_nan_is_named_and_not_params():
    t = torch.ones(2, dtype=torch.float64)
    inner = lambda w, t: ((w - t) ** 2).sum()
    outer = lambda w, t: (w**2).sum()
    with pytest.raises(hypergrad.NotFinite, match=r"^x0 holds NaN") as caught:
        implicit_grad(outer, inner, t, t.clone(), solver=hypergrad.CG(), x0=t * float("nan"))
    assert caught.value.argument == "x0"
    solver = hypergrad.CG(preconditioner=lambda v: v * float("nan"))
    with pytest.raises(hypergrad.NotFinite, match="look at the preconditioner") as caught:
        implicit_grad(outer, inner, t, t.clone(), solver=solver)
    assert caught.value.argument is None
