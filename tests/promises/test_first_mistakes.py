"""The mistakes of the first ten minutes: the words in each message that lead to the cure."""

from __future__ import annotations

import dataclasses
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

import hypergrad
from hypergrad import (
    CG,
    GMRES,
    ConvergenceWarning,
    Neumann,
    NotConnected,
    StructureMismatch,
    UnsupportedOperation,
    custom_argmin,
    implicit_backward,
    implicit_grad,
)
from hypergrad.inner_solvers import LBFGS

torch.manual_seed(0)
X, X_VAL = torch.randn(80, 30), torch.randn(40, 30)
Y, Y_VAL = X.sum(1) + torch.randn(80), X_VAL.sum(1)
DECAY = torch.tensor(-2.0)


def inner(w, log_decay):
    return ((X @ w - Y) ** 2).mean() + log_decay.exp() * (w**2).sum()


def outer(w, log_decay):
    return ((X_VAL @ w - Y_VAL) ** 2).mean()


def ridge(log_decay):
    return torch.linalg.solve(X.T @ X / 80 + log_decay.exp() * torch.eye(30), X.T @ Y / 80)


W = ridge(DECAY)
STEP = lambda w, h: w - 0.05 * grad(inner)(w, h)
LINEAR = nn.Linear(30, 1)


def squares(params):
    return sum((p**2).sum() for p in params.values())


def of_network(network):
    """A training loss with the network called as it should be."""
    return lambda p, h: (
        ((functional_call(network, p, (X,))[:, 0] - Y) ** 2).mean() + h.exp() * squares(p)
    )


def of_linear(p, h):
    return ((functional_call(LINEAR, p, (X_VAL,))[:, 0] - Y_VAL) ** 2).mean()


def called_directly(p, h):
    return ((LINEAR(X)[:, 0] - Y) ** 2).mean() + h.exp() * squares(p)


def warned(call, *words):
    """What a call returns, after a check of the words in the one warning that it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = call()
    assert [w.category for w in caught] == [ConvergenceWarning]
    for word in words:
        assert word in str(caught[0].message)
    return found


def raised(kind, call, *words):
    with pytest.raises(kind, match=re.escape(words[0])) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


# An inner problem that is not solved


def test_an_unsolved_inner_problem_gives_the_figure_and_both_cures():
    words = (
        "does not solve the inner problem",
        "is above inner_tol=0.001",
        "Solve the inner problem further",
    )
    warned(lambda: implicit_grad(outer, inner, W + 0.3, DECAY), *words, "inner_tol=None")
    implicit_grad(outer, inner, W + 0.3, DECAY, inner_tol=None)  # the second cure, silent


def test_losses_that_are_exchanged_are_among_the_reasons():
    warned(lambda: implicit_grad(inner, outer, W, DECAY), "outer and inner not exchanged")


def test_a_module_called_directly_on_a_copy_of_its_parameters_is_among_the_reasons():
    copy = {name: p.detach().clone() for name, p in LINEAR.named_parameters()}
    warned(lambda: implicit_grad(of_linear, called_directly, copy, DECAY), "functional_call")


def test_dropout_in_the_inner_loss_stops_its_solver_and_eval_mode_is_the_cure():
    network = nn.Sequential(nn.Linear(30, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1))
    batch = (X, Y[:, None])
    problem = hypergrad.supervised(network, nn.functional.mse_loss, penalty="decay")
    losses, h = (problem.outer(batch), problem.inner(batch)), {"decay": torch.tensor(0.1)}

    def solved():
        return LBFGS()(losses[1], problem.params, h)

    params, info = solved()
    assert info.status == hypergrad.Status.STAGNATED
    assert info.iterations < 10
    warned(lambda: implicit_grad(*losses, params, h), "does not solve the inner problem")
    network.eval()
    params, info = solved()
    assert info.success
    implicit_grad(*losses, params, h, inner_tol=None)
    exact = hypergrad.supervised(
        network, nn.functional.mse_loss, penalty="decay", curvature="hessian"
    )
    implicit_grad(exact.outer(batch), exact.inner(batch), params, h)  # silent


def test_a_layer_whose_map_expands_has_a_residual_that_grows_and_a_norm_is_the_cure():
    layer, data = nn.Linear(6, 6, bias=False), torch.randn(5, 6)
    nn.init.orthogonal_(layer.weight, 2.0)
    step = lambda z, data: torch.relu(layer(z) + data)

    def residual(steps):
        @hypergrad.custom_fixed_point(step, callback=seen.append)
        def equilibrium(z, data):
            for _ in range(steps):
                z = step(z, data)
            return z

        equilibrium(torch.zeros(5, 6), data).square().mean().backward()

    seen = []
    warned(lambda: residual(20), "does not solve the inner problem")
    warned(lambda: residual(40), "does not solve the inner problem")
    assert min(float(info.inner_residual) for info in seen) > 0.1
    nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=20)
    layer.eval()
    residual(100)  # silent
    assert seen[-1].inner_residual < 1e-5


# A hyperparameter that is forgotten


@pytest.mark.parametrize(
    "forgetful",
    [
        lambda w, h: inner(w, DECAY),
        lambda w, h: inner(w, h.detach()),
        lambda w, h: inner(w, torch.tensor(h.item())),
    ],
    ids=["captured", "detached", "item"],
)
@pytest.mark.parametrize("entrance", ["implicit_grad", "unrolled_grad", "finite_difference_grad"])
def test_a_forgotten_hyperparameter_is_named(entrance, forgetful):
    call = {
        "implicit_grad": lambda: implicit_grad(outer, forgetful, W, DECAY),
        "unrolled_grad": lambda: hypergrad.unrolled_grad(
            outer, lambda w, h: w - 0.05 * grad(forgetful)(w, DECAY), W, DECAY, steps=2
        ),
        "finite_difference_grad": lambda: hypergrad.finite_difference_grad(
            outer, forgetful, W, DECAY
        ),
    }[entrance]
    words = ("depends on hparams: the gradient there is zero", ".detach()", ".item()", "captured")
    assert warned(call, *words) == 0


def test_a_forgotten_leaf_among_others_is_named():
    hparams = {"decay": DECAY, "rate": torch.tensor(0.1)}
    found = warned(
        lambda: implicit_grad(outer, lambda w, h: inner(w, h["decay"]), W, hparams),
        "depends on hparams['rate']",
    )
    assert found["rate"] == 0
    assert found["decay"] != 0


@pytest.mark.parametrize("how", ["backward", "grad"])
def test_a_forgotten_argument_of_a_decorated_solver_is_named(how):
    fit = custom_argmin(lambda w, rate, decay: inner(w, DECAY))(lambda init, rate, decay: W)
    rate = torch.tensor(0.1)

    def derivative():
        if how == "grad":
            return grad(lambda h: fit(None, rate, h).sum())(DECAY)
        h = DECAY.clone().requires_grad_()
        fit(None, rate, h).sum().backward()
        return torch.zeros(()) if h.grad is None else h.grad

    words = ("does not depend on decay", "captured in place of the argument")
    if how == "backward":  # a transform does not say which arguments it differentiates
        assert warned(derivative, *words) == 0
    else:
        assert warned(derivative, "does not depend on", "decay", words[1]) == 0


def test_an_argument_that_the_solver_alone_uses_beside_one_that_matters_is_silent():
    fit = custom_argmin(lambda w, rate, decay: inner(w, decay))(lambda init, rate, decay: W)
    rate, h = torch.tensor(0.1, requires_grad=True), DECAY.clone().requires_grad_()
    fit(None, rate, h).sum().backward()
    assert h.grad != 0


def test_hyperparameters_that_are_no_tensors_are_refused_with_the_cure():
    """A number came back as its own gradient."""
    for value in (-2.0, 3, None, {"a": 1.0, "b": 2}, torch.tensor(3), ()):
        for call in (
            lambda v=value: implicit_grad(outer, lambda w, h: inner(w, DECAY), W, v),
            lambda v=value: hypergrad.unrolled_grad(
                outer, lambda w, h: STEP(w, DECAY), W, v, steps=2
            ),
            lambda v=value: hypergrad.one_step_grad(outer, lambda w, h: STEP(w, DECAY), W, v),
            lambda v=value: hypergrad.finite_difference_grad(
                outer, lambda w, h: inner(w, DECAY), W, v
            ),
        ):
            raised(StructureMismatch, call, "hparams holds no floating-point", "torch.tensor(2.0)")


def test_a_loop_refuses_variables_that_are_no_tensors_with_the_cure():
    sgd = lambda variables: torch.optim.SGD(variables, lr=0.1)
    loop = lambda params, hparams: hypergrad.Bilevel(
        outer, inner, params, hparams, inner_optimizer=sgd, outer_optimizer=sgd
    )
    for value, kind in ((2.0, "float"), (torch.tensor(3), "torch.int64"), ({}, "nothing")):
        words = f"(it holds {kind}). Pass a number as torch.tensor(2.0)"
        raised(StructureMismatch, lambda v=value: loop(W, v), "hparams holds no", words)
        raised(StructureMismatch, lambda v=value: loop(v, DECAY), "params holds no", words)
    raised(StructureMismatch, lambda: loop(W, [DECAY, np.ones(2)]), "hparams[1] is a NumPy array")


def test_an_array_in_place_of_a_tensor_is_refused_with_the_cure():
    weights = {"a": W, "b": np.zeros(3)}
    of = lambda f: lambda p, h: f(p["a"] + 0 * float(p["b"].sum()), h)
    raised(
        StructureMismatch,
        lambda: implicit_grad(of(outer), of(inner), weights, DECAY),
        "params['b'] is a NumPy array",
        "torch.as_tensor",
    )
    raised(
        StructureMismatch,
        lambda: implicit_grad(outer, lambda w, h: inner(w, h[0]), W, [DECAY, np.array(1.0)]),
        "hparams[1] is a NumPy array",
    )


# Batch norm in train mode


def test_batch_norm_in_train_mode_names_three_cures():
    network = nn.Sequential(nn.Linear(30, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    params = {name: p.detach() for name, p in network.named_parameters()}
    train, val = of_network(network), lambda p, h: functional_call(network, p, (X_VAL,)).mean()
    words = ("batch-norm layer in train mode", "module.eval()", "track_running_stats=False")
    raised(
        UnsupportedOperation, lambda: implicit_grad(val, train, params, DECAY), *words, "GroupNorm"
    )
    fit = custom_argmin(train)(lambda init, h: params)
    raised(
        UnsupportedOperation,
        lambda: grad(lambda h: val(fit(None, h), h))(DECAY),
        *words,
    )
    network.eval()
    implicit_grad(val, train, params, DECAY, on_failure="ignore")


# Too small a budget


def test_too_few_iterations_name_the_field_that_the_solver_has():
    run = lambda solver: lambda: implicit_grad(outer, inner, W, DECAY, solver=solver)
    for solver in (CG(maxiter=3, rtol=1e-6), GMRES(maxiter=3, rtol=1e-6)):
        warned(run(solver), "ran out of iterations", "Raise maxiter")
    warned(run(Neumann(terms=3, rtol=1e-4)), "ran out of iterations", "Raise terms", "CG()")
    warned(run(Neumann(step_size=1.0)), "diverged", "Leave step_size=None")


def test_a_budget_without_a_tolerance_is_silent_and_leaves_its_figure():
    _, info = implicit_grad(outer, inner, W, DECAY, solver=CG(maxiter=3), return_info=True)
    assert 0.05 < info.residual_norm < 0.5


# Shapes and structures


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (LINEAR, ("params is an nn.Module", "dict(module.named_parameters())")),
        (LINEAR.parameters(), ("params is a generator", "dict(module.named_parameters())")),
        (list(LINEAR.parameters()), ("by name", "dict(module.named_parameters())")),
        (W.numpy(), ("params is a NumPy array", "torch.as_tensor")),
        (3.0, ("params holds no floating-point tensor", "it holds float")),
    ],
    ids=["module", "generator", "list", "array", "number"],
)
def test_what_is_not_a_pytree_of_tensors_is_refused_as_params(params, words):
    train = of_network(LINEAR) if words[0] == "by name" else lambda p, h: h
    raised(StructureMismatch, lambda: implicit_grad(of_linear, train, params, DECAY), *words)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda w, h: (X_VAL @ w - Y_VAL) ** 2, ("shape (40,)", ".mean()")),
        (lambda w, h: outer(w, h).item(), ("returned float", ".item()")),
        (lambda w, h: None, ("returned NoneType", "return missing")),
        (lambda w, h: (outer(w, h), 1), ("returned tuple", "has_aux=True")),
    ],
    ids=["vector", "float", "nothing", "pair"],
)
def test_an_outer_loss_that_is_no_scalar_says_what_it_is(bad, words):
    raised(
        StructureMismatch,
        lambda: implicit_grad(bad, inner, W, DECAY),
        "outer must return a scalar tensor",
        *words,
    )


def test_a_start_of_another_shape_or_structure_shows_both():
    call = lambda x0: lambda: implicit_grad(outer, inner, W, DECAY, x0=x0)
    raised(StructureMismatch, call(torch.zeros(31)), "x0 has shape (31,)", "params has shape (30,)")
    raised(
        StructureMismatch,
        call({"w": torch.zeros(30)}),
        "x0 must have the structure of params: expected tensor, got {'w': tensor}",
    )


def test_a_list_after_a_dict_shows_both():
    of = lambda f, key: lambda p, h: f(p[key], h)
    _, info = implicit_grad(of(outer, "w"), of(inner, "w"), {"w": W}, DECAY, return_info=True)
    raised(
        StructureMismatch,
        lambda: implicit_grad(of(outer, 0), of(inner, 0), [W], DECAY, x0=info.solution),
        "expected [tensor], got {'w': tensor}",
    )


@pytest.mark.parametrize("solver", [CG, "cg", torch.optim.SGD([torch.zeros(1)], lr=0.1)])
def test_what_is_no_linear_solver_is_refused(solver):
    raised(
        TypeError,
        lambda: implicit_grad(outer, inner, W, DECAY, solver=solver),
        "linear solver such as CG()",
    )


# What users of PyTorch bring with them


def test_an_answer_is_detached_and_the_message_of_a_derivative_names_the_way():
    h = DECAY.clone().requires_grad_()
    assert not implicit_grad(outer, inner, W, h).requires_grad
    raised(
        UnsupportedOperation,
        lambda: grad(lambda h: implicit_grad(outer, inner, W, h))(DECAY),
        "detached",
        "custom_argmin",
    )


def test_params_that_require_grad_or_carry_a_graph_give_the_same_answer():
    expected = implicit_grad(outer, inner, W, DECAY)
    h = DECAY.clone().requires_grad_()
    for params in (W.clone().requires_grad_(), ridge(h)):
        assert torch.equal(implicit_grad(outer, inner, params, h), expected)
        assert params.grad_fn is not None or params.grad is None
    assert h.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes_that_do_not_go_together_are_named(dtype):
    raised(
        StructureMismatch,
        lambda: implicit_grad(outer, inner, W.to(dtype), DECAY),
        f"params is {dtype}, hparams is torch.float32",
        "tensor.to(params.dtype)",
    )


def test_data_of_another_dtype_are_named():
    double = lambda w, h: ((X_VAL.double() @ w) ** 2).mean()
    words = ("params is torch.float32", "data that it captures", "several dtypes")
    for call in (
        lambda: implicit_grad(double, inner, W, DECAY),
        lambda: hypergrad.finite_difference_grad(double, inner, W, DECAY),
        lambda: hypergrad.unrolled_grad(double, STEP, W, DECAY, steps=2),
    ):
        raised(StructureMismatch, call, *words)


def test_hyperparameters_of_another_dtype_keep_it():
    hypergradient = implicit_grad(outer, inner, W, DECAY.double())
    assert hypergradient.dtype == torch.float64
    torch.testing.assert_close(hypergradient.float(), implicit_grad(outer, inner, W, DECAY))


@pytest.mark.parametrize("level", ["inner", "outer"])
def test_a_module_called_directly_is_named(level):
    params = dict(LINEAR.named_parameters())
    losses = {"inner": of_network(LINEAR), "outer": of_linear} | {level: called_directly}
    raised(
        NotConnected,
        lambda: implicit_grad(losses["outer"], losses["inner"], params, DECAY),
        f"{level} reaches params['weight'] past its arguments",
        "functional_call(module, params, args)",
    )


def test_there_is_nowhere_to_accumulate_without_requires_grad():
    raised(
        NotConnected,
        lambda: implicit_backward(outer, inner, W, DECAY),
        "No tensor in hparams requires grad",
        "requires_grad_()",
    )


def test_a_decorated_solver_says_what_it_returned_and_what_init_is():
    for returned, words in (
        ((W, 1.0), "expected tensor, got (tensor, float)"),
        (W[:, None], "has shape (30, 1), but init has shape (30,)"),
        (W.double(), "has dtype torch.float64, but init has dtype torch.float32"),
        (None, "must be a tensor of shape (30,), like init; got NoneType"),
    ):
        fit = custom_argmin(inner)(lambda init, h, returned=returned: returned)
        raised(StructureMismatch, lambda fit=fit: fit(torch.zeros(30), DECAY), words)


@dataclasses.dataclass
class Settings:
    decay: torch.Tensor


@pytest.mark.parametrize("hparams", [Settings(DECAY), [Settings(DECAY), DECAY], {DECAY}])
def test_a_container_that_is_no_pytree_is_refused_with_the_cure(hparams):
    """Beside a tensor it came back as its own gradient."""
    first = lambda h: next(iter(h)) if isinstance(h, list | set) else h
    decay = lambda h: getattr(first(h), "decay", DECAY)
    for call in (
        lambda: implicit_grad(outer, lambda w, h: inner(w, decay(h)), W, hparams),
        lambda: hypergrad.one_step_grad(outer, lambda w, h: STEP(w, decay(h)), W, hparams),
    ):
        raised(StructureMismatch, call, "does not know as a pytree", "pass a dict or a tuple")


def test_a_container_among_the_arguments_of_a_root_is_refused():
    one = torch.ones(())
    call = lambda: hypergrad.root_vjp(lambda x, s: x - s.decay, one, (Settings(one),), one)
    raised(StructureMismatch, call, "args[0] is a Settings", "pass a dict or a tuple")


@pytest.mark.parametrize("entrance", ["unrolled_grad", "evolution_strategies_grad"])
def test_an_initial_point_made_from_the_hyperparameters_is_an_error(entrance):
    """Only the tensor itself was noticed: of a slice or a multiple 0 came back in silence."""
    h = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    final = lambda w, h: w.sum() + h.prod()
    halve = lambda w, h: w / 2
    estimate = getattr(hypergrad, entrance)
    for leaf, start in ((h, h[:2]), (h, {"w": 2 * h}), (2 * h, None)):
        start = leaf.exp() if start is None else start
        of = (lambda w, h: final(w["w"], h)) if isinstance(start, dict) else final
        raised(
            NotConnected,
            lambda of=of, leaf=leaf, start=start: estimate(of, halve, start, leaf, steps=1),
            "was computed from hparams",
            "Pass init as a callable",
            "detach it",
        )
    hypergradient = hypergrad.unrolled_grad(final, halve, lambda h: 2 * h, h, steps=1)
    torch.testing.assert_close(hypergradient, 1 + h.detach().prod() / h.detach())
    hypergradient = hypergrad.unrolled_grad(final, halve, (2 * h).detach(), h, steps=1)
    torch.testing.assert_close(hypergradient, h.detach().prod() / h.detach())


@pytest.mark.parametrize("entrance", [implicit_grad, implicit_backward, hypergrad.jacobian])
def test_names_of_another_module_are_told_of(entrance):
    wrapped = {f"module.{name}": p for name, p in LINEAR.named_parameters()}
    other = dict(nn.Sequential(nn.Linear(30, 1)).named_parameters())
    decay = DECAY.clone().requires_grad_()
    for params in (wrapped, other):
        with pytest.raises(StructureMismatch, match="names that the module has not"):
            entrance(of_linear, of_network(LINEAR), params, decay)
