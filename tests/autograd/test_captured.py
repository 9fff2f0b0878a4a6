"""What a closure captures is differentiated, or named in an error: never lost in silence."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn import functional as F

import hypergrad
from hypergrad import custom_argmin, implicit_grad
from tests.quartic import LAM, D, close, randn
from tests.weighted_ridge import expected, inner, outer, solution

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


# The decorators


def _ridge(scale):
    def objective(w, lam):
        return ((w - scale) ** 2).sum() / 2 + lam * (w**2).sum() / 2

    @custom_argmin(objective)
    def fit(init, lam):
        return scale.detach() / (1 + lam)

    return fit


def test_captured_leaves_and_non_leaves_are_differentiated_by_plain_backward():
    scale = torch.tensor([1.0, 2.0], dtype=D, requires_grad=True)
    lam = torch.tensor(1.0, dtype=D, requires_grad=True)
    for captured, factor in ((scale, 1.0), (scale * 3, 3.0)):
        answer = _ridge(captured)(None, lam)
        found = torch.autograd.grad(answer.sum(), (scale, lam))
        close(found[0], torch.full((2,), factor / 2, dtype=D))
        close(found[1], -factor * scale.detach().sum() / 4)
    # where nothing but the captured tensor requires grad
    answer = _ridge(scale)(None, torch.tensor(1.0, dtype=D))
    close(torch.autograd.grad(answer.sum(), scale)[0], torch.full((2,), 0.5, dtype=D))


@pytest.mark.parametrize("reduce", [False, True])
def test_captured_modules_are_differentiated_by_plain_backward(reduce):
    torch.manual_seed(0)
    net = nn.Linear(2, 2).double()
    x = torch.randn(5, 2, dtype=D)

    def objective(w, lam):
        return ((net(x) @ w - 1) ** 2).sum() / 2 + lam * (w**2).sum() / 2

    def closed(lam):
        z = net(x)
        return torch.linalg.solve(
            z.T @ z + lam * torch.eye(2, dtype=D), z.T @ torch.ones(5, dtype=D)
        )

    @custom_argmin(objective)
    def fit(init, lam):
        return closed(lam).detach()

    lam = torch.tensor(0.7, dtype=D, requires_grad=True)
    inputs = (*net.parameters(), lam)
    close(
        torch.autograd.grad((fit(None, lam) ** 3).sum(), inputs),
        torch.autograd.grad((closed(lam) ** 3).sum(), inputs),
    )


def test_a_captured_tensor_under_a_transform_is_an_error_that_names_it():
    lam = torch.tensor(1.0, dtype=D)

    def total(scale):
        return _ridge(scale)(None, lam).sum()

    scale = torch.tensor([1.0, 2.0], dtype=D)
    for derivative in (
        lambda: grad(total)(scale),
        lambda: jvp(total, (scale,), (scale,)),
        lambda: hessian(total)(scale),
        lambda: vmap(grad(total))(scale[None]),
        lambda: grad(lambda s: vmap(lambda lam: _ridge(s)(None, lam).sum())(LAM).sum())(scale),
    ):
        with pytest.raises(hypergrad.UnsupportedOperation, match="captures scale"):
            derivative()


def test_a_captured_parameter_under_a_transform_of_something_else_is_an_error_that_names_it():
    scale = torch.tensor([1.0, 2.0], dtype=D, requires_grad=True)
    fit = _ridge(scale)
    with pytest.raises(hypergrad.UnsupportedOperation, match="captures scale"):
        grad(lambda lam: fit(None, lam).sum())(torch.tensor(1.0, dtype=D))


def test_a_captured_tensor_in_forward_mode_is_an_error_that_names_it():
    with forward_ad.dual_level():
        scale = forward_ad.make_dual(torch.ones(2, dtype=D), torch.ones(2, dtype=D))
        with pytest.raises(hypergrad.UnsupportedOperation, match="captures scale"):
            _ridge(scale)(None, torch.tensor(1.0, dtype=D))


@pytest.mark.parametrize("hide", ["dict", "module", "list", "attribute"])
def test_a_captured_tensor_with_create_graph_is_an_error_that_names_it(hide):
    scale = nn.Parameter(torch.tensor([1.0, 2.0], dtype=D))
    box = {
        "dict": {"scale": scale},
        "list": [scale],
        "module": nn.ParameterDict({"scale": scale}),
        "attribute": type("Box", (), {"scale": scale}),
    }[hide]
    reach = {
        "dict": lambda: box["scale"],
        "list": lambda: box[0],
        "module": lambda: box["scale"],
        "attribute": lambda: box.scale,
    }[hide]

    def objective(w, lam):
        return ((w - reach()) ** 2).sum() / 2 + lam * (w**2).sum() / 2

    @custom_argmin(objective)
    def fit(init, lam):
        return reach().detach() / (1 + lam)

    lam = torch.tensor(1.0, dtype=D, requires_grad=True)
    value = fit(None, lam).sum()
    close(torch.autograd.grad(value, scale, retain_graph=True)[0], torch.full((2,), 0.5, dtype=D))
    with pytest.raises(hypergrad.UnsupportedOperation, match="captures"):
        torch.autograd.grad(value, lam, create_graph=True)


def test_a_batched_tensor_that_is_only_captured_is_an_error():
    lam = torch.tensor(1.0, dtype=D)
    table = {}

    def by_closure(scale):
        return _ridge(scale)(None, lam)

    def by_dict(scale):
        table["scale"] = scale

        @custom_argmin(lambda w, lam: ((w - table["scale"]) ** 2).sum() + lam * (w**2).sum())
        def fit(init, lam):
            return torch.ones(2, dtype=D) / (1 + lam)

        return fit(None, lam)

    for task in (by_closure, by_dict):
        with pytest.raises(hypergrad.UnsupportedOperation, match="captures"):
            vmap(task)(torch.ones(3, 2, dtype=D))
        with pytest.raises(hypergrad.UnsupportedOperation, match="captures"):
            vmap(vmap(task))(torch.ones(2, 3, 2, dtype=D))


def test_batched_data_that_comes_in_as_an_argument_is_right():
    @custom_argmin(lambda w, s, lam: ((w - s) ** 2).sum() / 2 + lam * (w**2).sum() / 2)
    def fit(init, s, lam):
        return s / (1 + lam)

    s = randn(3, 2)
    found = vmap(lambda s: grad(lambda lam: fit(None, s, lam).sum())(torch.ones((), dtype=D)))(s)
    close(found, -s.sum(dim=1) / 4)


# The two rules by themselves. F = s x^2 - a, so dx/da = 1 / (2 s x) and A depends on s.


def by_vjp(s, a, x):
    one = torch.ones_like(x)
    return hypergrad.root_vjp(lambda x, a: s * x**2 - a, x, (a,), one, argnums=1)


def by_jvp(s, a, x):
    one = torch.ones_like(a)
    return hypergrad.root_jvp(lambda x, a: s * x**2 - a, x, (a,), one, argnums=1)


S, A4, X2 = (torch.tensor(v, dtype=D) for v in (1.0, 4.0, 2.0))


@pytest.mark.parametrize("rule", [by_vjp, by_jvp])
def test_what_a_bare_rule_captures_under_a_transform_is_an_error_that_names_it(rule):
    one = torch.ones((), dtype=D)

    def dual():
        with forward_ad.dual_level():
            return rule(forward_ad.make_dual(S, one), A4, X2)

    for derivative in (
        lambda: grad(lambda s: rule(s, A4, X2))(S),
        lambda: jvp(lambda s: rule(s, A4, X2), (S,), (one,)),
        lambda: vmap(lambda s: rule(s, A4, X2))(torch.stack([S, 2 * S])),
        dual,
    ):
        with pytest.raises(hypergrad.UnsupportedOperation, match=r"F captures s.*Pass it in args"):
            derivative()


@pytest.mark.parametrize("rule", [by_vjp, by_jvp])
def test_what_a_bare_rule_captures_is_no_constant_of_plain_autograd(rule):
    s, a = S.clone().requires_grad_(), A4.clone().requires_grad_()
    for found in (rule(s, A4, X2), rule(s, a, X2)):
        torch.testing.assert_close(found.detach(), torch.tensor(0.25, dtype=D))
        with pytest.raises(hypergrad.UnsupportedOperation, match=r"F captures s.*Pass it in args"):
            found.backward()
    twice = 2 * s
    with pytest.raises(hypergrad.UnsupportedOperation, match="F captures s"):
        torch.autograd.grad(rule(twice, a, X2), twice)
    with torch.no_grad():
        assert not rule(s, a, X2).requires_grad
    assert not rule(s.detach(), A4, X2).requires_grad


# unrolled_grad


def test_a_module_that_a_step_calls_directly_is_named_with_the_cure():
    net = nn.Linear(2, 1).double()
    x, w = torch.ones(3, 2, dtype=D), torch.zeros((), dtype=D)
    hparams = dict(net.named_parameters())
    step = lambda w, h: w - 0.1 * (w - net(x).sum())
    by_outer = lambda w, h: (w - net(x).sum()) ** 2
    for loss, one_step in (
        (lambda w, h: w, step),
        (lambda w, h: w + functional_call(net, h, (x,)).sum(), step),
        (by_outer, lambda w, h: w - 0.1 * h["bias"][0]),
    ):
        for spare in (False, True):
            with pytest.raises(hypergrad.NotConnected, match=r"hparams\['weight'\].*functional"):
                hypergrad.unrolled_grad(loss, one_step, w, hparams, steps=4, checkpoint=spare)


@pytest.mark.parametrize("spare", [False, True])
def test_differentiating_the_unrolled_answer_by_what_any_step_captures_is_an_error(spare):
    h = torch.tensor(1.0, dtype=D)

    def in_step(s):
        step = lambda w, h: w - 0.1 * (w - h * s)
        return hypergrad.unrolled_grad(lambda w, h: w, step, h * 0, h, steps=4, checkpoint=spare)

    def in_first_step(s):
        step = lambda w, h, k: w - 0.1 * (w**2 - h) * (s if k == 0 else 1)
        return hypergrad.unrolled_grad(lambda w, h: w, step, h * 2, h, steps=4, checkpoint=spare)

    def in_init(s):
        step = lambda w, h: w - 0.1 * (w**2 - h)
        init = lambda h: h * s
        return hypergrad.unrolled_grad(lambda w, h: w, step, init, h, steps=4, checkpoint=spare)

    for answer in (in_step, in_first_step, in_init):
        for derivative in (grad(answer), lambda s, f=answer: jvp(f, (s,), (s,))):
            with pytest.raises(hypergrad.UnsupportedOperation, match="unrolled_grad"):
                derivative(torch.tensor(2.0, dtype=D))


# A detached hypergradient inside another problem


@pytest.mark.parametrize("where", ["argument", "captured"])
def test_a_hypergradient_that_another_objective_depends_on_is_not_lost_in_silence(where):
    """v = t / 2 solves the innermost problem, and its hypergradient is 1 / 2 + v."""
    bowl = lambda v, t: (v - t) ** 2 + v**2

    def once(t):
        if where == "argument":
            return hypergrad.implicit_grad(lambda v, t: v + v**2, bowl, t.detach() / 2, t)
        one = torch.ones((), dtype=D)
        return hypergrad.implicit_grad(
            lambda v, c: v + v**2, lambda v, c: bowl(v, c * t), t.detach() / 2, one
        )

    @custom_argmin(lambda u, s: (u - s) ** 2 + once(s) * u, inner_tol=None)
    def fit(init, s):
        return s.detach() * 0.8

    s = torch.tensor(1.0, dtype=D, requires_grad=True)
    with pytest.raises(hypergrad.UnsupportedOperation, match="custom_argmin"):
        fit(None, s).backward()


D = torch.float64


@pytest.fixture
def h():
    return torch.tensor([0.3, 0.7, 1.1], dtype=D)


@pytest.mark.parametrize("which", ["outer", "inner"])
def test_a_module_called_directly_is_named_with_the_cure(which):
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(8, 3, dtype=D), torch.randn(8, 1, dtype=D)
    params, lam = dict(model.named_parameters()), torch.tensor(0.1, dtype=D)

    def penalty(p, lam):
        return lam * sum((v**2).sum() for v in p.values())

    def right(p, lam):
        return F.mse_loss(functional_call(model, p, (x,)), y) + penalty(p, lam)

    def wrong(p, lam):
        return F.mse_loss(model(x), y) + penalty(p, lam)

    losses = (wrong, right) if which == "outer" else (right, wrong)
    for given in (params, {k: v.detach() for k, v in params.items()}):
        with pytest.raises(hypergrad.NotConnected, match=r"functional_call\(module, params, args"):
            implicit_grad(*losses, given, lam, inner_tol=None)


@pytest.mark.parametrize("which", ["outer", "inner"])
def test_a_hyper_module_called_directly_is_named_with_the_cure(which, h):
    net = nn.Linear(1, 3).double()
    hparams = dict(net.named_parameters())
    one = torch.ones(1, dtype=D)

    def weights(t):
        return functional_call(net, t, (one,)).exp()

    def wrong_inner(w, t):
        return inner(w, net(one).exp()) + 0 * weights(t).sum()

    def wrong_outer(w, t):
        return outer(w, net(one).exp())

    losses = {
        "outer": (wrong_outer, lambda w, t: inner(w, weights(t))),
        "inner": (lambda w, t: outer(w, weights(t)), wrong_inner),
    }[which]
    with pytest.raises(hypergrad.NotConnected, match=r"hparams\['weight'\].*functional_call"):
        implicit_grad(*losses, solution(h), hparams, inner_tol=None)


def test_captured_tensors_that_are_no_leaves_of_the_arguments_are_constants(h):
    other = torch.ones(3, dtype=D, requires_grad=True)
    hypergradient = implicit_grad(
        lambda w, h: outer(w, h) + (other * w).sum() - w.sum(),
        lambda w, h: inner(w, h) * other[0],
        solution(h),
        h,
    )
    torch.testing.assert_close(hypergradient, expected(h), rtol=1e-9, atol=0)
    assert other.grad is None


def test_differentiating_the_answer_by_what_the_losses_capture_is_an_error(h):
    w = solution(h)

    def by_inner(scale):
        return implicit_grad(outer, lambda w, h: inner(w, h) * scale, w, h).sum()

    def by_outer(scale):
        return implicit_grad(lambda w, h: outer(w, h) * scale, inner, w, h).sum()

    one = torch.tensor(1.0, dtype=D)
    for total in (by_inner, by_outer):
        with pytest.raises(hypergrad.UnsupportedOperation, match="custom_argmin"):
            torch.func.grad(total)(one)
        with pytest.raises(hypergrad.UnsupportedOperation, match="custom_argmin"):
            torch.func.jvp(total, (one,), (one,))
