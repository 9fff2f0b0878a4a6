"""Products by differences of gradients, against exact ones and closed forms."""

import warnings

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import hypergrad
from hypergrad import CG, MINRES, Exact, GaussNewton, Minimum, implicit_grad

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
F64 = torch.float64


def network(dtype, activation=torch.tanh, count=120):
    """A classifier with weight decay, its minimum, and its validation loss."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    x, v = draw(count, 5), draw(40, 5)
    teacher = draw(5, 3)
    y, t = ((z @ teacher + draw(len(z), 3)).argmax(dim=1) for z in (x, v))
    start = {"a": 0.5 * draw(4, 5), "b": 0.1 * draw(4), "c": 0.5 * draw(3, 4)}
    hparams = {"decay": torch.tensor(-3.0, dtype=F64), "weights": torch.ones(count, dtype=F64)}

    def outputs(p, h, x):
        return activation(x.to(p["a"].dtype) @ p["a"].T + p["b"]) @ p["c"].T

    def inner(p, h):
        each = functional.cross_entropy(outputs(p, h, x), y, reduction="none")
        return (h["weights"] * each).mean() + penalty(p, h)

    def penalty(p, h):
        return h["decay"].exp() * sum(w.square().sum() for w in p.values())

    def outer(p, h):
        return functional.cross_entropy(outputs(p, h, v), t)

    inner.outputs, inner.penalty = lambda p, h: outputs(p, h, x), penalty
    inner.loss = lambda z, h: (
        h["weights"] * functional.cross_entropy(z, y, reduction="none")
    ).mean()
    params = minimised(inner, start, hparams)
    cast = lambda tree: {k: w.to(dtype) for k, w in tree.items()}
    return inner, outer, cast(params), cast(hparams)


def minimised(inner, start, hparams):
    variables = {k: w.clone().requires_grad_() for k, w in start.items()}
    for _ in range(3):  # from a fresh start each, which takes it out of a slow end
        optimiser = torch.optim.LBFGS(
            list(variables.values()), max_iter=200, max_eval=2000, tolerance_grad=1e-11,
            tolerance_change=0, history_size=30, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure(optimiser=optimiser):
            optimiser.zero_grad()
            value = inner(variables, hparams)
            value.backward()
            return value

        optimiser.step(closure)
    return {k: w.detach() for k, w in variables.items()}


def relative(answer, expected):
    apart = sum((answer[k].double() - e.double()).square().sum() for k, e in expected.items())
    return (apart / sum(e.double().square().sum() for e in expected.values())).sqrt().item()


SOLVERS = [
    None, CG(), CG(maxiter=10), MINRES(), Exact(), hypergrad.GMRES(), hypergrad.BiCGSTAB(),
    hypergrad.LSMR(), hypergrad.NormalCG(), hypergrad.Neumann(terms=200),
    hypergrad.Nystrom(rank=39, damping=0.0),
]  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_solver_takes_products_by_differences(dtype, solver):
    inner, outer, params, hparams = network(dtype)
    exact = implicit_grad(outer, inner, params, hparams, solver=solver)
    condition = Minimum(inner, products="difference")
    answer, info = implicit_grad(
        outer, condition, params, hparams, solver=solver, on_failure="raise", return_info=True
    )
    apart = relative(answer, exact)
    # Two answers of one method, whose own error depends on the very last digits of a product.
    assert apart <= (2e-5 if dtype == F64 else 5e-3)
    assert 0 < info.product_error < 1e-2
    assert f"error of a product by differences {info.product_error:.1e}" in str(info)
    if info.error_estimate == info.error_estimate:
        inner, outer, params, hparams = network(F64)
        truth = implicit_grad(outer, inner, params, hparams, solver=Exact())
        most = 2.0 if info.status == hypergrad.Status.MAX_ITERATIONS else 0.5  # of a budget
        assert relative(answer, truth) <= info.error_estimate <= most


def test_exact_products_have_no_such_error():
    inner, outer, params, hparams = network(F64)
    _, info = implicit_grad(outer, inner, params, hparams, return_info=True)
    assert torch.isnan(info.product_error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gauss_newton_needs_first_derivatives_of_the_outputs(dtype):
    inner, outer, params, hparams = network(dtype)
    parts = inner.outputs, inner.loss, inner.penalty
    options = {"solver": CG(maxiter=10), "inner_tol": None, "return_info": True}
    exact, _ = implicit_grad(outer, GaussNewton(*parts), params, hparams, **options)
    answer, info = implicit_grad(
        outer, GaussNewton(*parts, products="difference"), params, hparams, **options
    )
    assert relative(answer, exact) <= (1e-6 if dtype == F64 else 5e-3)
    assert info.product_error < 1e-2


class Once(torch.autograd.Function):
    """tanh, whose backward has no derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, w):
        return w * (1 - ctx.saved_tensors[0] ** 2)


def test_a_function_without_second_derivative_is_differenced():
    inner, outer, params, hparams = network(F64, Once.apply)
    with pytest.raises(hypergrad.UnsupportedOperation, match='products="difference"'):
        implicit_grad(outer, inner, params, hparams)
    plain, plain_outer, *_ = network(F64)
    exact = implicit_grad(plain_outer, plain, params, hparams)
    answer = implicit_grad(outer, Minimum(inner, products="difference"), params, hparams)
    assert relative(answer, exact) <= 2e-5
    parts = inner.outputs, inner.loss, inner.penalty
    condition = GaussNewton(*parts, products="difference")
    implicit_grad(outer, condition, params, hparams, inner_tol=None, on_failure="raise")


@pytest.mark.parametrize("method", [None, hypergrad.SOBA()], ids=str)
def test_the_loop_for_the_outer_problem_forms_products_by_differences(method):
    chosen = {} if method is None else {"method": method}

    def after(activation, products):
        inner, outer, params, hparams = network(F64, activation)
        params, hparams = (
            {k: w.clone().requires_grad_() for k, w in tree.items()} for tree in (params, hparams)
        )
        loop = hypergrad.Bilevel(
            outer, Minimum(inner, products=products), params, hparams,
            inner_optimizer=torch.optim.SGD(params.values(), lr=0.1),
            outer_optimizer=torch.optim.SGD(hparams.values(), lr=0.1), on_failure="ignore",
            **chosen,
        )  # fmt: skip
        for _ in range(3):
            loop.step()
        return {k: w.detach() for k, w in hparams.items()}

    start = network(F64)[3]
    exact, answer = after(torch.tanh, "exact"), after(Once.apply, "difference")
    moves = {k: w - start[k] for k, w in exact.items()}
    assert relative({k: w - start[k] for k, w in answer.items()}, moves) <= 1e-4
    with pytest.raises(hypergrad.UnsupportedOperation, match='products="difference"'):
        after(Once.apply, "exact")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_loss_is_differenced_and_is_compiled_once(backend):
    params, hparams = network(torch.float32)[2:]
    made = []

    def counting(graph, inputs):
        made.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    module = torch.nn.Linear(5, 4)
    compiled = torch.compile(
        lambda p, x: torch.func.functional_call(module, p, (x,)), backend=counting
    )
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))

    def loss_by(call):
        return lambda p, h: (
            functional.softplus(call({"weight": p["a"], "bias": p["b"]}, x)).mean()
            + h["decay"].exp() * sum(w.square().sum() for w in p.values())
        )

    plain = loss_by(lambda p, x: torch.func.functional_call(module, p, (x,)))
    start = {k: torch.zeros_like(params[k]) for k in ("a", "b")}
    params = minimised(plain, start, hparams)
    goal = lambda p, h: (p["a"].sum() - 1).square() + p["b"].square().sum()
    if backend == "aot_eager":
        with pytest.raises(hypergrad.UnsupportedOperation, match='products="difference"'):
            implicit_grad(goal, loss_by(compiled), params, hparams)
    made.clear()
    only = {"decay": hparams["decay"]}
    exact = implicit_grad(goal, plain, params, only)
    answer = implicit_grad(goal, Minimum(loss_by(compiled), products="difference"), params, only)
    assert relative(answer, exact) <= 5e-3
    assert len(made) <= 2  # in some fifty evaluations


def attention(p, x):
    q, k, v = (x @ p[name] for name in ("q", "k", "v"))
    return functional.scaled_dot_product_attention(q, k, v)


def test_a_kernel_of_the_callers_choice_is_kept():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, 6, 4, generator=generator)
    y = torch.randn(8, 1, 6, 4, generator=generator)
    p = {n: 0.5 * torch.randn(4, 4, generator=generator) for n in ("q", "k", "v")}
    h = {"decay": torch.tensor(-1.0)}

    def inner(p, h):
        decay = h["decay"].exp() * sum(w.square().sum() for w in p.values())
        return (attention(p, x) - y).square().mean() + decay

    params = minimised(inner, p, h)
    outer = lambda p, h: (p["v"] - 0.1).square().sum() + p["q"].sum() + p["k"].sum()
    exact = implicit_grad(outer, inner, params, h)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with pytest.raises(hypergrad.UnsupportedOperation, match='products="difference"'):
            implicit_grad(outer, inner, params, h)
        answer = implicit_grad(outer, Minimum(inner, products="difference"), params, h)
    assert relative(answer, exact) <= 5e-3


def test_the_estimate_covers_half_precision_and_kinks():
    covered = []
    for activation, cast in ((torch.tanh, True), (torch.relu, False), (torch.relu, True)):
        inner, outer, params, hparams = network(torch.float32, activation)

        def narrow(p, h, inner=inner, cast=cast):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
                z = inner.outputs(p, h)
            return inner.loss(z.float(), h) + inner.penalty(p, h)

        wide = (
            {k: w.double() for k, w in params.items()},
            {k: w.double() for k, w in hparams.items()},
        )
        truth = implicit_grad(outer, inner, *wide, solver=Exact(), on_failure="ignore")
        answer, info = implicit_grad(
            outer, Minimum(narrow, products="difference"), params, hparams, solver=CG(maxiter=10),
            on_failure="ignore", return_info=True,
        )  # fmt: skip
        covered.append(relative(answer, truth) <= info.error_estimate)
        assert info.success or info.error_estimate > 1e-2
    assert all(covered)


def test_autocast_around_the_call_is_in_force_in_every_product():
    inner, outer, params, hparams = network(torch.float32)
    seen = set()

    def watched(p, h):
        seen.add(torch.is_autocast_enabled("cpu"))
        return inner(p, h)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        implicit_grad(outer, Minimum(watched, products="difference"), params, hparams,
                      on_failure="ignore")  # fmt: skip
    assert seen == {True}


def test_the_steps_of_every_scale_are_found():
    # f = (w - h s)^2 / 2 + (w / s)^4: the same problem in other units.
    for s in (1e-6, 1.0, 1e6):

        def inner(w, h, s=s):
            return (w / s - h).square().sum() / 2 + (w / s).pow(4).sum() / 40

        h = torch.tensor([0.3, -0.7, 1.2])
        u = h.double()
        for _ in range(50):
            u = u - (u - h + u**3 / 10) / (1 + 0.3 * u**2)
        answer = implicit_grad(
            lambda w, h, s=s: (w / s).sum(), Minimum(inner, products="difference"),
            (u * s).float(), h, solver=CG(),
        )  # fmt: skip
        torch.testing.assert_close(answer, (1 / (1 + 0.3 * u**2)).float(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", ["minimum", "gauss-newton"])
@pytest.mark.parametrize(("dtype", "small"), [(torch.float32, 1e-5), (F64, 1e-6)])
def test_a_step_that_is_too_long_for_a_leaf_of_other_units_is_said(dtype, small, kind):
    # Beyond where tanh bends both steps see the penalty alone, and agree on it.
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*s, generator=generator, dtype=F64) for s in ((30, 4), (30,)))
    large = 1 / small if dtype == F64 else 1.0
    scales = torch.tensor([large, large, small, small], dtype=F64)

    def outputs(p, h):
        w = torch.cat([p["a"], p["b"]]) / scales
        return torch.tanh(x @ w.double())

    def loss(z, h):
        return (z - y).square().mean()

    def penalty(p, h):
        return (h.exp() * (torch.cat([p["a"], p["b"]]) / scales) ** 2).sum()

    h, w = torch.full((4,), -2.0, dtype=F64), torch.zeros(4, dtype=F64)

    def of_unit(v):
        return loss(torch.tanh(x @ v), h) + (h.exp() * v**2).sum()

    for _ in range(60):
        w = w - torch.linalg.solve(hessian(of_unit)(w), grad(of_unit)(w))
    params = {"a": (w * scales)[:2].to(dtype), "b": (w * scales)[2:].to(dtype)}

    def outer(p, h):
        return (p["b"] / small).square().sum()

    inner = Minimum(lambda p, h: loss(outputs(p, h), h) + penalty(p, h), products="difference")
    if kind == "gauss-newton":
        inner = GaussNewton(outputs, loss, penalty, products="difference")
    with pytest.raises(hypergrad.HypergradError) as caught:
        implicit_grad(outer, inner, params, h.to(dtype), on_failure="raise")
    assert caught.value.info.product_error > 0.5


@pytest.mark.parametrize("small", [1e-2, 1e-4, 1e-7])
def test_leaves_that_happen_to_be_small_are_no_other_units(small):
    inner, outer, params, hparams = network(torch.float32)
    b = params["b"]
    params = {**params, "b": small * b}

    def shifted(p, h):  # the same minimum, with a bias that is small there
        return inner({**p, "b": p["b"] + (1 - small) * b}, h)

    answer, info = implicit_grad(
        lambda p, h: outer({**p, "b": p["b"] + (1 - small) * b}, h),
        Minimum(shifted, products="difference"), params, hparams, return_info=True,
    )  # fmt: skip
    assert info.success
    exact = implicit_grad(
        outer, inner, {k: v.double() for k, v in (params | {"b": b}).items()},
        {k: v.double() for k, v in hparams.items()}, on_failure="ignore",
    )  # fmt: skip
    error = sum((answer[k] - exact[k]).norm() ** 2 for k in exact) ** 0.5
    size = sum(exact[k].norm() ** 2 for k in exact) ** 0.5
    assert error <= 1e-2 * size
    assert error <= info.error_estimate * size


def test_curvature_below_the_noise_is_no_verdict():
    # The lowest curvature is a ten thousandth of the highest, and products are worse than that.
    curvature = torch.logspace(-4, 0, 30, dtype=F64)
    noise = torch.Generator().manual_seed(0)

    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            ctx.save_for_backward(w)
            return (curvature * w.square()).sum() / 2

        @staticmethod
        def backward(ctx, g):
            (w,) = ctx.saved_tensors
            return g * (curvature * w + 1e-6 * torch.randn(30, generator=noise, dtype=F64))

    def inner(w, h):
        return Noisy.apply(w) - (h * w).sum() * 1.0

    h = torch.ones(30, dtype=F64)
    _, info = implicit_grad(
        lambda w, h: w.sum(), Minimum(inner, products="difference"), h / curvature, h,
        solver=CG(), inner_tol=None, on_failure="ignore", return_info=True,
    )  # fmt: skip
    assert not info.negative_curvature
    assert info.status != hypergrad.Status.SINGULAR


def test_a_saddle_is_one_by_differences_too():
    def saddle(w, h):
        return w[0] ** 2 / 2 - w[1] ** 2 / 2 + (h * w).sum()

    w, h = torch.tensor([-1.0, 1.0], dtype=F64), torch.ones(2, dtype=F64)
    inner = Minimum(saddle, products="difference")
    with pytest.raises(hypergrad.IndefiniteHessian):
        implicit_grad(lambda w, h: w.sum(), inner, w, h, on_failure="raise")


def test_dropout_is_the_same_in_every_evaluation_and_buffers_are_kept():
    inner, outer, params, hparams = network(F64)
    norm = torch.nn.Dropout(0.2)

    def dropped(p, h):
        return inner.loss(norm(inner.outputs(p, h)), h) + inner.penalty(p, h)

    def answer(products):
        torch.manual_seed(4)
        gradient = implicit_grad(
            outer, Minimum(dropped, products=products), params, hparams, solver=Exact(),
            inner_tol=None, on_failure="ignore",
        )  # fmt: skip
        return gradient, torch.rand(1)

    (exact, after), (differences, after_too) = answer("exact"), answer("difference")
    assert relative(differences, exact) <= 1e-5
    assert after == after_too


# --- decorated solvers and transforms ---------------------------------------------------------


def quartic(w, t, M):
    return (w @ M @ w) / 2 + 0.1 * (w**4).sum() - (w * t.sin()).sum()


def newton(init, t, M):
    w = torch.zeros(4, dtype=F64)
    for _ in range(30):
        w = w - torch.linalg.solve(hessian(quartic)(w, t, M), grad(quartic)(w, t, M))
    return w


GENERATOR = torch.Generator().manual_seed(0)
T = torch.randn(6, 4, generator=GENERATOR, dtype=F64)
A = torch.randn(6, 4, 4, generator=GENERATOR, dtype=F64)
A = A @ A.mT + torch.eye(4, dtype=F64)
LOSSES = {
    "backward": lambda s: backward(lambda t: s(None, t, A[0]), T[0]),
    "backward of vmap, shared": lambda s: backward(
        vmap(lambda t, M: s(None, t, M), in_dims=(None, 0)), T[0], A
    ),
    "grad": lambda s: grad(lambda t: (s(None, t, A[0]) ** 3).sum())(T[0]),
    "jacrev": lambda s: jacrev(lambda t: s(None, t, A[0]))(T[0]),
    "jacrev by M": lambda s: jacrev(lambda M: s(None, T[0], M))(A[0]),
    "jacfwd": lambda s: jacfwd(lambda t: s(None, t, A[0]))(T[0]),
    "jvp": lambda s: jvp(lambda t: s(None, t, A[0]), (T[0],), (T[1],))[1],
    "vmap of grad": lambda s: vmap(grad(lambda t, M: (s(None, t, M) ** 3).sum()))(T, A),
    "vmap of grad, shared": lambda s: vmap(
        grad(lambda t, M: (s(None, t, M) ** 3).sum()), in_dims=(None, 0)
    )(T[0], A),
    "grad of vmap, shared": lambda s: grad(
        lambda t: (vmap(lambda t, M: s(None, t, M), in_dims=(None, 0))(t, A) ** 3).sum()
    )(T[0]),
    "vmap of jacrev": lambda s: vmap(jacrev(lambda t, M: s(None, t, M)))(T, A),
    "vmap of jacfwd, shared": lambda s: vmap(jacfwd(lambda t, M: s(None, t, M)), in_dims=(None, 0))(
        T[0], A
    ),
}


def backward(function, t, *args):
    t = t.clone().requires_grad_()
    (function(t, *args) ** 3).sum().backward()
    return t.grad


def decorated(products):
    return hypergrad.custom_argmin(Minimum(quartic, products=products))(newton)


@pytest.mark.parametrize("how", LOSSES)
def test_first_derivatives_are_right_under_every_transform(how):
    expected = LOSSES[how](decorated("exact"))
    answer = LOSSES[how](decorated("difference"))
    torch.testing.assert_close(answer, expected, rtol=1e-6, atol=1e-8)


SECOND = {
    "hessian": lambda s: hessian(lambda t: (s(None, t, A[0]) ** 3).sum())(T[0]),
    "jacfwd twice": lambda s: jacfwd(jacfwd(lambda t: s(None, t, A[0])))(T[0]),
    "jacrev of jacfwd": lambda s: jacrev(jacfwd(lambda t: s(None, t, A[0])))(T[0]),
    "create_graph": lambda s: twice(lambda t: s(None, t, A[0]), T[0]),
}


def twice(function, t):
    t = t.clone().requires_grad_()
    (slope,) = torch.autograd.grad((function(t) ** 3).sum(), t, create_graph=True)
    return torch.autograd.grad(slope.sum(), t)


@pytest.mark.parametrize("how", SECOND)
def test_second_derivatives_name_exact_products(how):
    with pytest.raises(hypergrad.UnsupportedOperation, match='products="exact"'):
        SECOND[how](decorated("difference"))


def test_a_captured_tensor_that_requires_grad_is_to_be_an_argument():
    t = T[0].clone().requires_grad_()
    fit = hypergrad.custom_argmin(Minimum(lambda w, M: quartic(w, t, M), products="difference"))(
        lambda init, M: newton(init, t.detach(), M)
    )
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"captures t.*as an argument"):
        fit(None, A[0])


@pytest.mark.parametrize(
    "solver", [CG(), MINRES(), hypergrad.GMRES(), hypergrad.LSMR(), hypergrad.NormalCG()], ids=repr
)
def test_every_solver_takes_the_noise_of_each_task(solver):
    W = torch.stack([newton(None, t, M) for t, M in zip(T, A, strict=True)])

    def gradients(make):
        def one(w, t, M):
            inner = make(lambda w, t: quartic(w, t, M))
            return implicit_grad(lambda w, t: (w**3).sum(), inner, w, t, solver=solver)

        return vmap(one)(W, T, A)

    answer = gradients(lambda f: Minimum(f, products="difference"))
    torch.testing.assert_close(answer, gradients(Minimum), rtol=1e-5, atol=1e-7)


def test_tasks_of_a_vmap_have_steps_of_their_own():
    W = torch.stack([newton(None, t, M) for t, M in zip(T, A, strict=True)])
    scale = torch.logspace(-4, 4, 6, dtype=F64)  # the units of each task

    def gradients(make):
        def one(w, t, M, s):
            inner = make(lambda w, t: quartic(w / s, t, M))
            return implicit_grad(lambda w, t: ((w / s) ** 3).sum(), inner, w, t)

        return vmap(one)(W * scale[:, None], T, A, scale)

    answer = gradients(lambda f: Minimum(f, products="difference"))
    torch.testing.assert_close(answer, gradients(Minimum), rtol=1e-6, atol=1e-8)


def test_the_two_rules_take_differences():
    w = newton(None, T[0], A[0])
    exact, differences = Minimum(quartic), Minimum(quartic, products="difference")
    for argnums in (1, 2):
        pulled, expected = (
            hypergrad.root_vjp(c, w, (T[0], A[0]), T[1], argnums=argnums)
            for c in (differences, exact)
        )
        torch.testing.assert_close(pulled, expected, rtol=1e-6, atol=1e-8)
    pushed, expected = (
        hypergrad.root_jvp(c, w, (T[0], A[0]), (T[1], A[1])) for c in (differences, exact)
    )
    torch.testing.assert_close(pushed, expected, rtol=1e-6, atol=1e-8)


# --- errors ---------------------------------------------------------------------------------------


def test_an_unknown_kind_of_products_is_refused():
    with pytest.raises(ValueError, match="products must be 'exact' or 'difference'"):
        Minimum(quartic, products="finite")


def test_a_variable_past_the_arguments_is_still_named():
    w = torch.ones(2, dtype=F64)
    inner = Minimum(lambda p, h: ((w - h) ** 2).sum() + (p**2).sum(), products="difference")
    w.requires_grad_()
    with pytest.raises(hypergrad.NotConnected, match="params past its arguments"):
        implicit_grad(lambda p, h: p.sum(), inner, w, torch.ones(2, dtype=F64))


def test_a_variable_that_plays_no_part_is_still_named():
    inner = Minimum(lambda p, h: ((p["a"] - h) ** 2).sum(), products="difference")
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(hypergrad.NotConnected, match=r"params\['b'\]"):
        implicit_grad(lambda p, h: p["a"].sum(), inner, params, torch.ones(2))


def test_products_that_are_not_sure_enough_are_no_success():
    inner, outer, params, hparams = network(torch.float32)

    def coarse(p, h):
        p = {k: w.bfloat16().float() for k, w in p.items()}
        return inner(p, h)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, info = implicit_grad(
            outer, Minimum(coarse, products="difference"), params, hparams, solver=CG(maxiter=8),
            on_failure="ignore", return_info=True,
        )  # fmt: skip
    assert not info.success
    assert info.error_estimate > 2e-2


def test_what_came_no_closer_names_differences():
    """Of a direction without curvature only the noise is seen: more digits are no cure."""

    def flat(w, h):
        return ((w[0] + w[1] - h) ** 2 / 2).exp()

    w, h = torch.tensor([0.25, 0.75]), torch.tensor(1.0)
    condition = Minimum(flat, products="difference")
    with pytest.raises(hypergrad.NotConverged, match="products by differences hide the rest"):
        implicit_grad(lambda w, h: w[0], condition, w, h, solver=CG(), on_failure="raise")
