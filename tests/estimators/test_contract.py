"""What every estimator promises, whichever it is: structure, constants, contexts and errors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils import _pytree as pytree

import hypergrad
from tests.problems import F64, data

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

Call = Callable[..., Any]


def descent(inner: Any) -> Any:
    return lambda w, h: pytree.tree_map(lambda a, g: a - 0.1 * g, w, grad(inner)(w, h))


def evolution(outer: Any, inner: Any, w: Any, h: Any, **options: Any) -> Any:
    return hypergrad.evolution_strategies_grad(
        outer,
        descent(inner),
        w,
        h,
        steps=3,
        pairs=5,
        sigma=0.1,
        generator=torch.Generator().manual_seed(0),
        **options,
    )


def penalty(outer: Any, inner: Any, w: Any, h: Any, **options: Any) -> Any:
    loose: Any = {"rtol": None, "inner_tol": None}
    return hypergrad.penalty_grad(outer, inner, w, h, penalty=10.0, lr=0.1, **loose, **options)


BY_STEPS: dict[str, Call] = {
    "unrolled": lambda outer, inner, w, h, **o: hypergrad.unrolled_grad(
        outer, descent(inner), w, h, steps=3, **o
    ),
    "checkpoint": lambda outer, inner, w, h, **o: hypergrad.unrolled_grad(
        outer, descent(inner), w, h, steps=5, checkpoint=True, **o
    ),
    "forward": lambda outer, inner, w, h, **o: hypergrad.unrolled_grad(
        outer, descent(inner), w, h, steps=3, mode="forward", **o
    ),
    "one step": lambda outer, inner, w, h, **o: hypergrad.one_step_grad(
        outer, descent(inner), w, h, **o
    ),
}
BY_LOSSES: dict[str, Call] = {
    "finite difference": hypergrad.finite_difference_grad,
    "penalty": penalty,
    "value function": lambda *given, **o: hypergrad.value_function_grad(*given, lr=0.1, **o),
}
WITH_GRAPH = BY_STEPS | BY_LOSSES
EVERY = WITH_GRAPH | {"evolution": evolution}

every = pytest.mark.parametrize("estimate", EVERY.values(), ids=EVERY)
with_graph = pytest.mark.parametrize("estimate", WITH_GRAPH.values(), ids=WITH_GRAPH)


def inner(w: Any, h: Any) -> Tensor:
    u, v = w["u"], w["v"]
    return (
        (u - h["a"].sin()).square().sum()
        + (v - h["b"].to(v.dtype) * u.sum()).square()
        + (u**4).sum() / 10
    )


def outer(w: Any, h: Any) -> Tensor:
    assert h["none"] is None
    return (w["u"] ** 2 * h["n"]).sum() + w["v"] * h["k"] + h["a"].sum()


W = {"u": data(70, 3, dtype=F64), "v": torch.tensor(0.5, dtype=F64)}
H = {
    "a": data(71, 3, dtype=F64),
    "b": torch.tensor(0.7),
    "n": torch.tensor(2),
    "none": None,
    "k": 1.5,
}


@every
def test_the_answer_is_shaped_like_the_hyperparameters_with_constants_in_their_places(estimate):
    found = estimate(outer, inner, W, H)
    assert found["none"] is None
    assert found["k"] == 1.5
    assert found["n"].dtype == torch.int64
    assert found["n"] == 0
    for name in ("a", "b"):
        assert found[name].shape == H[name].shape
        assert found[name].dtype == H[name].dtype
        assert not found[name].requires_grad
        assert found[name].isfinite().all()
        assert found[name].any()


@every
def test_nothing_of_the_callers_is_changed_and_no_random_number_is_drawn(estimate):
    leaves = [leaf for leaf in pytree.tree_leaves((W, H)) if isinstance(leaf, Tensor)]
    given = [leaf.clone().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
    tensors = iter(given)
    w, h = pytree.tree_map(lambda leaf: next(tensors) if isinstance(leaf, Tensor) else leaf, (W, H))
    state = torch.get_rng_state()
    estimate(outer, inner, w, h)
    assert torch.equal(state, torch.get_rng_state())
    for leaf, tensor in zip(leaves, given, strict=True):
        assert torch.equal(leaf, tensor)
        assert tensor._version == 0
        assert tensor.grad is None


@every
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_the_answer_is_the_same(estimate, mode):
    expected = estimate(outer, inner, W, H)
    with mode():
        found = estimate(outer, inner, W, H)
        made_inside = estimate(outer, inner, {k: v * 1 for k, v in W.items()}, H)
    for name in ("a", "b"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
        torch.testing.assert_close(made_inside[name], expected[name], rtol=0, atol=0)


@every
def test_a_batch_of_tasks_is_the_loop_over_its_tasks(estimate):
    c = data(72, 4, 3, dtype=F64)

    def task(c: Tensor) -> Any:
        found = estimate(lambda w, h: outer(w, h) + (c * w["u"]).sum(), inner, W, H)
        return found["a"], found["b"]

    found = vmap(task)(c)
    expected = [task(row) for row in c]
    for place in (0, 1):
        want = torch.stack([answer[place] for answer in expected])
        torch.testing.assert_close(found[place], want, rtol=1e-6, atol=1e-9)


@with_graph
def test_a_norm_layer_in_a_batch_of_tasks_is_right(estimate):
    """PyTorch 2.13 has a derivative of a vmapped derivative wrong through layer norm."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
    w = {k: v.detach() + 0.3 * torch.randn_like(v) for k, v in net.named_parameters()}
    x = data(73, 3, 5, 2, dtype=F64)

    def task(x: Tensor) -> Any:
        fit = lambda w, h: (h.exp() * functional_call(net, w, (x,)).squeeze() ** 2).mean()
        return estimate(lambda w, h: fit(w, 0 * h), fit, w, torch.zeros(5, dtype=F64))

    expected = torch.stack([task(part) for part in x])
    torch.testing.assert_close(vmap(task)(x), expected, rtol=1e-6, atol=1e-9)


@every
def test_differentiating_the_answer_is_an_error(estimate):
    simple = lambda w, h: (w - h).square().sum()
    w = torch.ones(2, dtype=F64)

    def answer(h: Tensor) -> Tensor:
        return estimate(lambda w, h: (w**2).sum(), simple, w, h).sum()

    def by_captured(s: Tensor) -> Tensor:
        own = lambda w, h: (w - s * h).square().sum()
        return estimate(lambda w, h: (w**2).sum(), own, w, 2 * torch.ones_like(w)).sum()

    for function in (answer, by_captured):
        for derivative in (grad(function), lambda h, f=function: jvp(f, (h,), (h,))):
            with pytest.raises(hypergrad.UnsupportedOperation, match="detached hypergradient"):
                derivative(torch.full((2,), 3.0, dtype=F64))


@with_graph
def test_a_module_that_is_called_directly_is_named_with_the_cure(estimate):
    net = nn.Linear(2, 1).double()
    x = torch.ones(3, 2, dtype=F64)
    hparams = dict(net.named_parameters())
    w = torch.zeros((), dtype=F64)
    direct = lambda w, h: (w - net(x).sum()) ** 2
    proper = lambda w, h: (w - functional_call(net, h, (x,)).sum()) ** 2
    for pair in ((direct, proper), (proper, direct)):
        with pytest.raises(hypergrad.NotConnected, match=r"hparams\['weight'\].*functional_call"):
            estimate(*pair, w, hparams)


@pytest.mark.parametrize("estimate", BY_LOSSES.values(), ids=BY_LOSSES)
def test_parameters_reached_past_the_argument_are_named_with_the_cure(estimate):
    net = nn.Linear(2, 1).double()
    x, h = torch.ones(3, 2, dtype=F64), torch.tensor(1.0, dtype=F64)
    direct = lambda w, h: h * net(x).square().sum()
    proper = lambda w, h: h * functional_call(net, w, (x,)).square().sum()
    for pair in ((direct, proper), (proper, direct)):
        with pytest.raises(hypergrad.NotConnected, match=r"params\['weight'\].*functional_call"):
            estimate(*pair, dict(net.named_parameters()), h)


@pytest.mark.parametrize("estimate", BY_LOSSES.values(), ids=BY_LOSSES)
def test_an_outer_loss_without_params_is_an_error(estimate):
    with pytest.raises(hypergrad.NotConnected, match="outer does not depend on params"):
        estimate(lambda w, h: h["a"].sum(), inner, W, H)


@with_graph
def test_a_hyperparameter_that_nothing_uses_is_zero_with_a_warning_that_names_it(estimate):
    more = {**H, "unused": torch.ones(2)}
    with pytest.warns(hypergrad.ConvergenceWarning, match=r"hparams\['unused'\]"):
        found = estimate(outer, inner, W, more)
    assert not found["unused"].any()
    assert found["a"].any()


@every
def test_an_outer_loss_that_is_no_scalar_is_an_error(estimate):
    with pytest.raises(hypergrad.StructureMismatch, match="outer must return a scalar"):
        estimate(lambda w, h: w["u"], inner, W, H)


@every
def test_a_module_in_place_of_an_argument_is_an_error_with_the_cure(estimate):
    for given in ((nn.Linear(2, 1), H), (W, nn.Linear(2, 1))):
        with pytest.raises(hypergrad.StructureMismatch, match="named_parameters"):
            estimate(outer, inner, *given)


@every
def test_nan_is_an_error_that_says_where_unless_it_is_to_be_ignored(estimate):
    bad = lambda w, h: outer(w, h) * torch.tensor(float("nan"), dtype=F64)
    with pytest.raises(hypergrad.NotFinite, match=r"holds NaN or infinity"):
        estimate(bad, inner, W, H)
    found = estimate(bad, inner, W, H, on_failure="ignore")
    assert found["a"].isnan().any()
    with pytest.raises(ValueError, match="on_failure"):
        estimate(outer, inner, W, H, on_failure="no")


@with_graph
def test_what_the_outer_loss_returns_beside_its_value_comes_back_detached(estimate):
    found, aux = estimate(
        lambda w, h: (outer(w, h), {"size": w["u"].norm(), "word": "yes"}),
        inner,
        W,
        H,
        has_aux=True,
    )
    expected = estimate(outer, inner, W, H)
    torch.testing.assert_close(found["a"], expected["a"], rtol=0, atol=0)
    assert aux["word"] == "yes"
    assert not aux["size"].requires_grad
    with pytest.raises(hypergrad.StructureMismatch, match="has_aux=True"):
        estimate(outer, inner, W, H, has_aux=True)


@every
@pytest.mark.parametrize("argument", ["w", "h", "n"])
def test_a_loss_that_changes_its_arguments_in_place_does_not_reach_the_callers(estimate, argument):
    def spoil(w: Any, h: Any) -> Tensor:
        {"w": w["u"], "h": h["a"], "n": h["n"]}[argument].mul_(2)
        return outer(w, h)

    before = pytree.tree_map_only(Tensor, torch.clone, (W, H))
    with contextlib.suppress(hypergrad.UnsupportedOperation, RuntimeError):
        estimate(spoil, inner, W, H)
    for leaf, want in zip(pytree.tree_leaves((W, H)), pytree.tree_leaves(before), strict=True):
        assert leaf is want or leaf == want if not isinstance(leaf, Tensor) else leaf.equal(want)


@pytest.mark.parametrize("estimate", BY_LOSSES.values(), ids=BY_LOSSES)
@pytest.mark.parametrize("argument", ["w", "h", "n"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_loss_that_changes_an_argument_in_place_is_named(estimate, argument, which):
    losses = [outer, inner]

    def spoil(w: Any, h: Any, honest: Any = losses[which]) -> Tensor:
        {"w": w["u"], "h": h["a"], "n": h["n"]}[argument].mul_(2)
        return honest(w, h)

    losses[which] = spoil
    with pytest.raises(hypergrad.UnsupportedOperation, match="changes one of its arguments in"):
        estimate(*losses, W, H)


@every
def test_a_batch_norm_layer_with_running_statistics_is_an_error_and_keeps_them(estimate):
    norm = nn.BatchNorm1d(1).double()
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    loss = lambda w, h: outer(w, h) + norm(w["u"][:, None]).square().sum()
    with pytest.raises(hypergrad.UnsupportedOperation, match="running statistics"):
        estimate(loss, inner, W, H)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name])


@every
def test_low_precision_hyperparameters_get_answers_of_their_own_dtype(estimate):
    w = {k: v.to(torch.bfloat16) for k, v in W.items()}
    h = {**H, "a": H["a"].to(torch.bfloat16), "b": H["b"].to(torch.bfloat16)}
    found = estimate(outer, inner, w, h, on_failure="ignore")
    for name in ("a", "b"):
        assert found[name].dtype == torch.bfloat16
        assert found[name].isfinite().all()


@every
def test_at_the_defaults_a_network_in_float32_is_differentiated_in_silence(estimate):
    """The tests turn warnings into errors."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(30, 6), torch.arange(30) % 3
    params = {k: v.detach() for k, v in net.named_parameters()}

    def loss(w: Any, h: Tensor) -> Tensor:
        each = nn.functional.cross_entropy(functional_call(net, w, (x,)), y, reduction="none")
        return (h.sigmoid() * each).mean() + 1e-2 * sum(v.square().sum() for v in w.values())

    clean = lambda w, h: nn.functional.cross_entropy(functional_call(net, w, (x[:9],)), y[:9])
    found = estimate(clean, loss, params, torch.zeros(30))
    assert found.isfinite().all()


@with_graph
def test_where_the_outer_loss_is_at_its_minimum_the_answer_is_zero_in_silence(estimate):
    w, h = torch.ones(3), torch.ones(3)
    flat = lambda w, h: (w - 1).square().sum()
    found = estimate(flat, lambda w, h: (w - h).square().sum(), w, h)
    torch.testing.assert_close(found, torch.zeros(3))


def test_evolution_strategies_need_a_floating_point_tensor():
    with pytest.raises(hypergrad.StructureMismatch, match="hparams holds no floating-point"):
        evolution(lambda w, h: w.sum(), lambda w, h: w.sum(), torch.ones(2), {"k": 3, "none": None})


@pytest.mark.gpu
@with_graph
def test_on_a_cuda_device_the_answer_is_that_of_the_cpu(estimate):
    there = lambda tree: pytree.tree_map_only(Tensor, Tensor.cuda, tree)
    found = estimate(outer, inner, there(W), there(H))
    expected = estimate(outer, inner, W, H)
    for name in ("a", "b"):
        assert found[name].is_cuda
        torch.testing.assert_close(found[name].cpu(), expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.gpu
def test_on_a_cuda_device_evolution_strategies_draw_there():
    h = torch.ones(4, device="cuda", dtype=F64)
    generator = torch.Generator(device="cuda").manual_seed(0)
    hypergradient, info = hypergrad.evolution_strategies_grad(
        lambda w, h: w.sum(),
        None,
        lambda h: h**2,
        h,
        pairs=500,
        generator=generator,
        return_info=True,
    )
    assert hypergradient.is_cuda
    assert ((hypergradient - 2 * h).abs() < 4 * info.standard_error).all()
