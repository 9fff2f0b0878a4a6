"""What the decorators take and call: arguments, solvers, callbacks; and the two bare rules."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad import (
    CG,
    GMRES,
    Exact,
    Status,
    custom_argmin,
    custom_fixed_point,
    custom_root,
    root_jvp,
    root_vjp,
)
from tests.quartic import (
    LAM,
    LAMS,
    ONES,
    XS,
    C,
    D,
    X,
    Y,
    close,
    flat,
    inner,
    leaf,
    newton,
    randn,
    reference,
    skewed,
    solve,
    step,
)

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

FITS = {
    "argmin": custom_argmin(inner)(solve),
    "root": custom_root(skewed)(solve),
    "fixed point": custom_fixed_point(step)(solve),
}


@pytest.mark.parametrize("name", FITS)
def test_plain_backward_over_vmap_equals_the_loop_in_every_argument(name):
    fit = FITS[name]
    lam, xs = leaf(LAM), leaf(XS)
    value = (vmap(lambda X: flat(fit(None, X, Y, lam)))(xs) ** 2).sum()
    first = torch.autograd.grad(value, (lam, xs), create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), (lam, xs))
    ref_lam, ref_xs = leaf(LAM), leaf(XS)
    value = (torch.stack([flat(reference(None, X, Y, ref_lam)) for X in ref_xs]) ** 2).sum()
    want = torch.autograd.grad(value, (ref_lam, ref_xs), create_graph=True)
    close(first, want)
    close(second, torch.autograd.grad(want[0].square().sum(), (ref_lam, ref_xs)))


# Arguments


def _pair(**keywords):
    @custom_argmin(lambda w, a, b: ((w - a) ** 2).sum() / 2 + (b * w**2).sum() / 2, **keywords)
    def fit(init, a, b):
        return a / (1 + b)

    return fit


A, B = torch.tensor([1.0, 2.0], dtype=D), torch.tensor([1.0, 3.0], dtype=D)
BY_A, BY_B = 1 / (1 + B), -A / (1 + B) ** 2


@pytest.mark.parametrize(
    ("argnums", "parts"),
    [(None, (1, 1)), (1, (1, 0)), (2, (0, 1)), ((1, 2), (1, 1)), ((2, 1), (1, 1)), ([2], (0, 1))],
)
def test_argnums_restricts_what_is_differentiated(argnums, parts):
    fit = _pair(argnums=argnums)
    want = (parts[0] * BY_A, parts[1] * BY_B)
    close(grad(lambda a, b: fit(None, a, b).sum(), argnums=(0, 1))(A, B), want)
    a, b = leaf(A), leaf(B)
    found = torch.autograd.grad(fit(None, a, b).sum(), (a, b), allow_unused=True)
    for g, w, used in zip(found, want, parts, strict=True):
        assert (g is None) if not used else torch.allclose(g, w)
    moved = jvp(lambda a, b: fit(None, a, b), (A, B), (torch.ones_like(A), torch.ones_like(B)))[1]
    close(moved, sum(want))


def test_argnums_of_the_initial_guess_is_refused():
    for argnums in (0, (0, 1), (1, 0)):
        with pytest.raises(hypergrad.UnsupportedOperation, match="initial guess"):
            _pair(argnums=argnums)


def test_argnums_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="positive"):
        _pair(argnums=-1)
    with pytest.raises(ValueError, match="out of range"):
        _pair(argnums=3)(None, A, B)


def test_aux_is_passed_on_without_a_gradient():
    @custom_argmin(lambda w, a: ((w - a) ** 2).sum(), has_aux=True)
    def fit(init, a):
        return a.clone(), {"twice": 2 * a, "steps": 3}

    a = leaf(A)
    w, aux = fit(None, a)
    assert w.requires_grad
    assert not aux["twice"].requires_grad
    assert aux["steps"] == 3
    close(aux["twice"], 2 * A)
    _, aux = vmap(lambda a: (lambda w, x: (w, x["twice"]))(*fit(None, a)))(torch.stack([A, B]))
    close(aux, 2 * torch.stack([A, B]))
    with pytest.raises(hypergrad.StructureMismatch, match="has_aux"):
        custom_argmin(lambda w, a: ((w - a) ** 2).sum(), has_aux=True)(lambda i, a: a)(None, A)


def test_integers_and_none_are_constants_that_reach_everyone():
    seen = []

    @custom_argmin(
        lambda w, n, nothing, mask, a: ((w - n * a)[mask] ** 2).sum() + (w[~mask] ** 2).sum()
    )
    def fit(init, n, nothing, mask, a):
        seen.append((n, nothing, mask.dtype))
        return torch.where(mask, n * a, 0)

    mask = torch.tensor([True, False])
    a = leaf(A)
    fit(None, torch.tensor(3), None, mask, a).sum().backward()
    assert torch.equal(a.grad, torch.tensor([3.0, 0.0], dtype=D))
    close(grad(lambda a: fit(None, 3, None, mask, a).sum())(A), torch.tensor([3.0, 0.0], dtype=D))
    assert seen[0][1] is None
    assert seen[1][0] == 3


def test_keyword_arguments_reach_the_solver_alone_and_may_not_carry_a_derivative():
    @custom_argmin(lambda w, a: ((w - a) ** 2).sum())
    def fit(init, a, *, steps=1, weight=None):
        return a * min(steps, 1)

    close(fit(None, A, steps=5), A)
    fit(None, A, weight=torch.ones(2))
    with pytest.raises(hypergrad.UnsupportedOperation, match="weight"):
        fit(None, A, weight=leaf(A))
    with pytest.raises(hypergrad.UnsupportedOperation, match="weight"):
        grad(lambda a: fit(None, A, weight={"deep": a}).sum())(A)
    with pytest.raises(hypergrad.UnsupportedOperation, match="weight"):
        vmap(lambda a: fit(None, A, weight=a))(A[None])


def _weighted(w, lam, X, y, scale=1.0):
    return ((X @ w - y) ** 2).sum() / 2 + scale * lam * (w @ w) / 2


@pytest.mark.parametrize("derive", [grad, jacfwd])
def test_arguments_by_keyword_are_differentiated_like_positional_ones(derive):
    X, y, lam = randn(6, 2), randn(6), torch.tensor(0.5, dtype=D)
    closed = lambda lam, X, y: torch.linalg.solve(X.T @ X + lam * torch.eye(2, dtype=D), X.T @ y)

    @custom_argmin(_weighted)
    def fit(start, X, y, lam):  # in an order of its own
        return closed(lam, X, y)

    truth = derive(lambda lam: closed(lam, X, y)[0])(lam)
    close(derive(lambda lam: fit(None, y=y, X=X, lam=lam)[0])(lam), truth)
    close(derive(lambda lam: fit(start=None, lam=lam, X=X, y=y)[0])(lam), truth)
    by_data = jacrev(lambda X: fit(None, y=y, lam=lam, X=X))(X)
    close(by_data, jacrev(lambda X: closed(lam, X, y))(X))
    lams = torch.tensor([0.5, 2.0], dtype=D)
    both = vmap(grad(lambda lam: fit(None, lam=lam, X=X, y=y)[0]))(lams)
    close(both, torch.stack([grad(lambda lam: closed(lam, X, y)[0])(lam) for lam in lams]))
    with pytest.raises(TypeError, match=r"fit\(\) misses lam, which the inner problem takes"):
        fit(None, X=X, y=y)


def test_keywords_and_positions_may_be_mixed_and_argnums_are_the_decorated_functions():
    X, y, lam = randn(6, 2), randn(6), torch.tensor(0.5, dtype=D)
    seen = {}

    @custom_argmin(_weighted, argnums=1)
    def fit(init, lam, X, y, scale=1.0, *, steps=1):
        seen.update(scale=scale, steps=steps)
        return torch.linalg.solve(X.T @ X + scale * lam * torch.eye(2, dtype=D), X.T @ y)

    jacobian = jacrev(lambda lam: fit(None, lam, scale=2.0, y=y, X=X, steps=7))(lam)
    assert seen == {"scale": 2.0, "steps": 7}
    doubled = jacrev(
        lambda lam: torch.linalg.solve(X.T @ X + 2 * lam * torch.eye(2, dtype=D), X.T @ y)
    )
    close(jacobian, doubled(lam))
    found = fit(None, leaf(lam), X=leaf(X), y=y)
    found.sum().backward()  # X is a constant: argnums leaves it out
    with pytest.raises(TypeError, match="lam by position and by keyword"):
        fit(None, lam, lam=lam, X=X, y=y)
    with pytest.raises(TypeError, match="misses its first argument"):
        fit(lam=lam, X=X, y=y)


def test_a_keyword_of_another_name_is_bound_where_the_inner_problem_needs_it():
    @custom_argmin(lambda w, a: ((w - a) ** 2).sum())
    def fit(init, target, steps=1):
        return target * min(steps, 1)

    close(jacrev(lambda a: fit(None, target=a, steps=3))(A), torch.eye(2, dtype=D))

    @custom_argmin(lambda w, a, *, scale=1.0: scale * ((w - a) ** 2).sum())
    def refused(init, a, *, scale=1.0):
        return a

    close(refused(None, A), A)
    with pytest.raises(hypergrad.UnsupportedOperation, match="takes scale by keyword alone"):
        refused(None, A, scale=2.0)


@pytest.mark.parametrize(
    "context", [lambda f: f(A), lambda f: grad(lambda a: f(a).sum())(A), lambda f: vmap(f)(A[None])]
)
def test_the_solver_is_called_with_plain_detached_tensors_and_grad_mode_on(context):
    seen = []

    @custom_argmin(lambda w, a: ((w - a) ** 2).sum(), batching="loop")
    def fit(init, a):
        seen.append((type(a), a.requires_grad, a.grad_fn, torch.is_grad_enabled(), float(a.sum())))
        return a.clone()

    with torch.no_grad():
        context(lambda a: fit(torch.zeros(2, dtype=D), a))
    assert seen == [(torch.Tensor, False, None, True, 3.0)]
    fit(None, leaf(A))
    assert seen[1][:3] == (torch.Tensor, False, None)


def test_the_callback_gets_plain_tensors_for_every_linear_solve():
    infos = []
    fit = custom_argmin(inner, callback=infos.append)(solve)

    def total(lam):
        return flat(fit(None, X, Y, lam)).sum()

    grad(total)(LAM)
    vmap(grad(total))(LAMS)
    jvp(total, (LAM,), (ONES,))
    lam = leaf(LAM)
    total(lam).backward()
    assert len(infos) == 4
    assert [info.status.shape for info in infos] == [(), (4,), (), ()]
    for info in infos:
        assert (info.status == Status.CONVERGED).all()
        assert (info.inner_residual < 1e-8).all()
        for part in pytree.tree_leaves(info):
            assert type(part) is torch.Tensor
            assert not torch._C._functorch.is_functorch_wrapped_tensor(part)
            assert not part.requires_grad
            part.numpy()
    infos.clear()
    hessian(total)(LAM)
    assert len(infos) >= 2


def test_a_second_derivative_through_gauss_newton_raises():
    condition = hypergrad.GaussNewton(
        outputs=lambda w, lam: (X @ w) ** 2,
        loss=lambda z, lam: ((z - Y) ** 2).sum() / 2,
        regulariser=lambda w, lam: (lam * w**2).sum() / 2,
    )

    @custom_argmin(condition, inner_tol=None)
    def fit(init, lam):
        return torch.ones(3, dtype=D)

    def total(lam):
        return fit(None, lam).sum()

    A = (lambda J: J.T @ J)(jacrev(lambda w: (X @ w) ** 2)(ONES)) + torch.diag(LAM)
    close(grad(total)(LAM), -torch.linalg.solve(A, ONES))
    close(jvp(total, (LAM,), (ONES,))[1], -torch.linalg.solve(A, ONES).sum())
    for derivative in (
        lambda: grad(lambda s: grad(total)(s).sum())(LAM),
        lambda: hessian(total)(LAM),
        lambda: jvp(grad(total), (LAM,), (ONES,)),
        lambda: jacfwd(jacfwd(total))(LAM),
        lambda: torch.autograd.grad(
            torch.autograd.grad(total(lam := leaf(LAM)), lam, create_graph=True)[0].sum(), lam
        ),
    ):
        with pytest.raises(hypergrad.UnsupportedOperation, match="GaussNewton"):
            derivative()


def test_gauss_newton_counts_an_output_that_depends_on_another_once():
    def dependent(w, lam):
        z = X @ w
        return z, z * z

    def separate(w, lam):
        return X @ w, (X @ w) ** 2

    def loss(z, lam):
        return ((z[0] - Y) ** 2).sum() + ((z[1] - 1) ** 2).sum()

    found = [
        hypergrad.implicit_grad(
            lambda w, lam: w.sum(),
            hypergrad.GaussNewton(outputs, loss, lambda w, lam: (lam * w**2).sum()),
            ONES,
            LAM,
            inner_tol=None,
        )
        for outputs in (dependent, separate)
    ]
    close(*found, rtol=1e-12)


# What a solver may do


def descend(init, target, lam):
    """The way most people write an inner loop, in place on the initial guess."""
    w = init.requires_grad_()
    optimiser = torch.optim.SGD([w], lr=0.4)
    for _ in range(200):
        optimiser.zero_grad()
        value = ((w - target) ** 2).sum() / 2 + lam * (w**2).sum() / 2
        value.backward()
        if value.item() < 0:
            break
        optimiser.step()
    return w


def by_scipy(init, target, lam):
    target, lam = target.numpy(), float(lam)
    found = scipy.optimize.minimize(
        lambda w: ((w - target) ** 2).sum() / 2 + lam * (w**2).sum() / 2,
        init.numpy(),
        jac=lambda w: w - target + lam * w,
        method="BFGS",
        options={"gtol": 1e-12},
    )
    return torch.from_numpy(found.x)


def by_numpy(init, target, lam):
    return torch.as_tensor(np.asarray(target) / (1 + np.asarray(lam)))


@pytest.mark.parametrize("solver", [descend, by_scipy, by_numpy])
def test_any_solver_may_be_looped_over_tasks(solver):
    fit = custom_argmin(
        lambda w, t, lam: ((w - t) ** 2).sum() / 2 + lam * (w**2).sum() / 2, batching="loop"
    )(solver)
    init, targets, lam = torch.zeros(2, dtype=D), randn(3, 2), torch.tensor(0.5, dtype=D)
    close(vmap(lambda t: fit(init, t, lam))(targets), targets / 1.5)
    found = vmap(lambda t: grad(lambda lam: fit(init, t, lam).sum())(lam))(targets)
    close(found, -targets.sum(dim=1) / 1.5**2)
    both = vmap(lambda s: vmap(lambda t: fit(init, t, s))(targets))(torch.stack([lam, lam]))
    close(both, (targets / 1.5).expand(2, 3, 2))
    lam.requires_grad_()
    (found,) = torch.autograd.grad(vmap(lambda t: fit(init, t, lam))(targets).sum(), lam)
    close(found, -targets.sum() / 1.5**2)
    assert torch.equal(init, torch.zeros(2, dtype=D))


def test_a_solver_that_cannot_be_mapped_names_the_cure():
    fit = custom_argmin(lambda w, t, lam: ((w - t) ** 2).sum() + lam * (w**2).sum())(descend)
    with pytest.raises(Exception) as error:  # noqa: PT011
        vmap(lambda t: fit(torch.zeros(2, dtype=D), t, torch.ones(())))(randn(3, 2))
    assert any("batching='loop'" in note for note in error.value.__notes__)


def test_a_solver_that_works_in_place_on_the_initial_guess_leaves_the_callers_tensor_alone():
    """The initial guess is often the centre of the proximal term too, as in iMAML."""
    target = torch.tensor([1.0, 2.0], dtype=D)

    def objective(w, centre):
        return ((w - target) ** 2).sum() + ((w - centre) ** 2).sum()

    @custom_argmin(objective)
    def fit(init, centre):
        w = init.requires_grad_()
        optimiser = torch.optim.SGD([w], lr=0.2)
        for _ in range(100):
            optimiser.zero_grad()
            objective(w, centre).backward()
            optimiser.step()
        return w

    theta = torch.zeros(2, dtype=D, requires_grad=True)
    answer = fit(theta, theta)
    assert torch.equal(theta, torch.zeros(2, dtype=D))
    close(answer, target / 2)
    close(torch.autograd.grad((answer**2).sum(), theta)[0], target / 2)
    close(grad(lambda t: (fit(t, t) ** 2).sum())(theta.detach()), target / 2)
    assert torch.equal(theta, torch.zeros(2, dtype=D))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda a: {"w": a}, "structure"),
        (lambda a: a[:1], "shape"),
        (lambda a: a.float(), "dtype"),
        (lambda a: 3.0, "must be a tensor"),
    ],
)
def test_a_solver_that_returns_another_structure_than_the_guess_is_an_error(answer, words):
    fit = custom_argmin(lambda w, a: ((w - a) ** 2).sum())(lambda init, a: answer(a))
    with pytest.raises(hypergrad.StructureMismatch, match=words):
        fit(torch.zeros(2, dtype=D), A)


def test_without_a_guess_any_structure_may_be_returned():
    @custom_argmin(lambda w, a: ((w["u"][0] - a) ** 2).sum())
    def fit(init, a):
        return {"u": (a.clone(), None, 3)}

    a = leaf(A)
    answer = fit(None, a)
    assert answer["u"][1:] == (None, 3)
    answer["u"][0].sum().backward()
    close(a.grad, torch.ones(2, dtype=D))


def test_a_proximal_centre_that_is_captured_is_differentiated_or_named():
    """Elsewhere the gradient by the initial guess is exactly 0 where this was meant."""
    theta = torch.zeros(2, dtype=D, requires_grad=True)

    def task(theta):
        @custom_argmin(lambda w, a: ((w - a) ** 2).sum() + ((w - theta) ** 2).sum())
        def fit(init, a):
            return (a + theta.detach()) / 2

        return fit(theta, A).sum()

    close(torch.autograd.grad(task(theta), theta)[0], torch.full((2,), 0.5, dtype=D))
    with pytest.raises(hypergrad.UnsupportedOperation, match="captures theta"):
        grad(task)(theta.detach())


def test_an_argument_changed_in_place_before_the_backward_pass_is_an_error():
    a = leaf(A)
    b = a * 1
    fit = _pair()
    value = fit(None, b, B).sum()
    with torch.no_grad():
        b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_data_that_is_captured_and_has_changed_before_the_backward_pass_is_noticed():
    data = A.clone()

    @custom_argmin(lambda w, lam: ((w - data) ** 2).sum() / 2 + lam * (w**2).sum() / 2)
    def fit(init, lam):
        return data / (1 + lam)

    lam = torch.tensor(1.0, dtype=D, requires_grad=True)
    value = fit(None, lam).sum()
    data.copy_(B * 5)  # the next batch
    with pytest.warns(hypergrad.ConvergenceWarning, match="does not solve the inner problem"):
        value.backward()


def test_a_derivative_at_a_point_that_is_no_solution_is_judged():
    fit = custom_argmin(lambda w, a: ((w - a) ** 2).sum())(lambda init, a: a + 1)
    a = leaf(A)
    with pytest.warns(hypergrad.ConvergenceWarning, match="does not solve the inner problem"):
        fit(None, a).sum().backward()
    fit = custom_argmin(lambda w, a: ((w - a) ** 2).sum(), on_failure="raise")(lambda i, a: a + 1)
    with pytest.raises(hypergrad.NotConverged):
        grad(lambda a: fit(None, a).sum())(A)
    fit = custom_argmin(lambda w, a: ((w - a) ** 2).sum())(lambda init, a: a * torch.nan)
    with pytest.raises(hypergrad.NotFinite):
        grad(lambda a: fit(None, a).sum())(A)


def test_a_symmetric_solver_is_refused_for_a_root():
    fit = custom_root(lambda w, a: w - a, solver=CG())(lambda init, a: a.clone())
    with pytest.raises(hypergrad.UnsupportedOperation, match="symmetric"):
        fit(None, A)
    fit = custom_root(hypergrad.Root(lambda w, a: w - a, symmetric=True), solver=CG())(
        lambda init, a: a.clone()
    )
    close(grad(lambda a: fit(None, a).sum())(A), torch.ones(2, dtype=D))


# The two rules by themselves


def test_the_rules_equal_the_derivatives_of_the_decorated_solver():
    params = newton(X, Y, LAM, 12)
    cotangent = {"w": C[:3], "b": C[3]}
    want_x, want_lam = vjp(lambda X, lam: reference(None, X, Y, lam), X, LAM)[1](cotangent)
    for solver in (None, Exact(), GMRES(rtol=1e-13)):
        found = root_vjp(skewed, params, (X, Y, LAM), cotangent, solver=solver)
        close((found[0], found[2]), (want_x, want_lam))
        close(root_vjp(skewed, params, (X, Y, LAM), cotangent, argnums=3, solver=solver), want_lam)
        found = root_vjp(skewed, params, (X, Y, LAM), cotangent, argnums=(3, 1), solver=solver)
        close(found, (want_lam, want_x))
        found = root_jvp(skewed, params, (X, Y, LAM), (ONES,), argnums=(3,), solver=solver)
        want = jvp(lambda lam: reference(None, X, Y, lam), (LAM,), (ONES,))[1]
        close(found, want)
        found, info = root_jvp(
            skewed, params, (X, Y, LAM), ONES, argnums=3, solver=solver, return_info=True
        )
        close(found, want)
        assert info.success
    for argnums in (0, 4, -1):
        with pytest.raises(ValueError, match="argnums"):
            root_vjp(skewed, params, (X, Y, LAM), cotangent, argnums=argnums)
    with pytest.raises(hypergrad.StructureMismatch, match="cotangent"):
        root_vjp(skewed, params, (X, Y, LAM), C)


def test_the_rules_may_be_mapped_and_differentiated():
    fit = custom_root(skewed)(solve)

    def by_rule(X, lam):
        params = fit(None, X, Y, lam)
        return root_vjp(skewed, params, (X, Y, lam), {"w": C[:3], "b": C[3]}, argnums=3)

    def by_reference(X, lam):
        return vjp(lambda lam: reference(None, X, Y, lam), lam)[1]({"w": C[:3], "b": C[3]})[0]

    close(vmap(by_rule)(XS, LAMS), torch.stack([by_reference(X, s) for X, s in zip(XS, LAMS)]))  # noqa: B905
    close(jacrev(by_rule, argnums=1)(X, LAM), jacrev(by_reference, argnums=1)(X, LAM))


def dropped(w, a):
    """dw/da = m / (m + 1) for the weights m of a draw: another m in A and in the cross term."""
    weights = torch.nn.functional.dropout(torch.ones_like(w), 0.5) ** 2
    return (weights * (w - a) ** 2).sum() + (w**2).sum()


@pytest.mark.parametrize("rule", ["argmin", "root"])  # the root is looped over the tasks
@pytest.mark.parametrize("way", ["grad", "jvp", "backward"])
def test_all_products_of_a_vmapped_solve_see_one_draw_or_random_numbers_are_refused(rule, way):
    decorate = custom_argmin(dropped, inner_tol=None, solver=CG(rtol=1e-12))
    if rule == "root":
        decorate = custom_root(grad(dropped), inner_tol=None, solver=GMRES(rtol=1e-12))
    fit = decorate(lambda init, a: a / 2)
    at = randn(3, 200)

    def run(randomness):
        if way == "backward":
            tasks = leaf(at)
            found = vmap(lambda a: fit(None, a), randomness=randomness)(tasks)
            return torch.autograd.grad(found.sum(), tasks)[0]
        one = {
            "grad": grad(lambda a: fit(None, a).sum()),
            "jvp": lambda a: jvp(lambda a: fit(None, a), (a,), (torch.ones_like(a),))[1],
        }[way]
        return vmap(one, randomness=randomness)(at)

    found = run("same")
    zero, full = found.abs() < 1e-9, (found - 0.8).abs() < 1e-9
    assert (zero | full).all()
    assert 200 < full.sum() < 400
    assert torch.equal(full[0], full[2])
    with pytest.raises(hypergrad.UnsupportedOperation, match="draw them outside"):
        run("different")


def test_a_batch_evaluates_an_objective_as_often_as_one_task_does():
    counts = []

    def counted(p, *args):
        counts[-1] += 1
        return inner(p, *args)

    fit = custom_argmin(counted)(solve)
    for tasks in (1, 16):
        counts.append(0)
        vmap(grad(lambda lam: flat(fit(None, X, Y, lam)).sum()))(LAM.expand(tasks, 3))
    assert counts[0] == counts[1]
