"""Jacobians by a compiled program: right, with the evidence of the call as it is."""

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hypergrad
from tests.implicit.test_jacobian import Ridge

F64 = torch.float64


def compiled(**options):
    return hypergrad.compile(hypergrad.jacobian, **{"on_fallback": "raise", **options})


def figures(info):
    names = [f.name for f in dataclasses.fields(info) if f.name not in ("solution", "aux")]
    return {name: getattr(info, name) for name in names}


def same_evidence(ours, theirs):
    assert ours.method == theirs.method
    for name, value in figures(theirs).items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(
                getattr(ours, name), value, rtol=1e-5, atol=1e-9, equal_nan=True, msg=name
            )


def warned(call, *args, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*args, **options)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    "solver",
    [
        None,
        hypergrad.CG(rtol=1e-12),
        hypergrad.CG(maxiter=25),
        hypergrad.MINRES(rtol=1e-12),
        hypergrad.GMRES(rtol=1e-12),
        hypergrad.BiCGSTAB(rtol=1e-12),
        hypergrad.Exact(),
        hypergrad.Auto(rtol=1e-12, dense_below=0),
    ],
    ids=lambda solver: repr(solver)[:20],
)
def test_new_data_at_each_call_gives_the_jacobian_of_ridge_regression_by_one_graph(solver):
    step = compiled()
    for rows in (40, 41, 42):  # which draws other numbers
        p = Ridge(rows, 30)
        X, y = p.X[:40] * (rows - 38), p.y[:40]
        H = X.T @ X + p.log_penalty.exp().diag()
        w = torch.linalg.solve(H, X.T @ y)
        exact = -torch.linalg.solve(H, p.X_val.T).T * w * p.log_penalty.exp()

        def inner(w, log_penalty, X=X, y=y):
            return ((X @ w - y) ** 2).sum() / 2 + (log_penalty.exp() * w * w).sum() / 2

        call = p.predictions, inner, w, p.log_penalty
        ours, info = step(*call, solver=solver, return_info=True)
        theirs, present = hypergrad.jacobian(*call, solver=solver, return_info=True)
        loose = solver is not None and getattr(solver, "maxiter", None) is not None
        torch.testing.assert_close(ours, exact, rtol=1e-4 if loose else 1e-9, atol=1e-9)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(info.solution, present.solution, rtol=1e-8, atol=1e-11)
        if isinstance(solver, hypergrad.BiCGSTAB):  # rounding decides where it ends
            assert info.status.equal(present.status)
        else:
            same_evidence(info, present)
    (program,) = step.session.programs
    assert program.calls == 3


def network(dtype, seed):
    """A classifier, its data, and parameters that minimise its loss."""
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    X = torch.randn(30, 3, generator=generator, dtype=F64).to(dtype)
    X_val = torch.randn(5, 3, generator=generator, dtype=F64).to(dtype)
    y = torch.randint(3, (30,), generator=generator)

    def call(w, x):
        return torch.func.functional_call(model, w, (x,))

    def inner(w, h):
        decay = sum(s * (t * t).sum() for s, t in zip(h["log"].exp(), w.values(), strict=True))
        return cross_entropy(call(w, X), y) + decay / 2

    shapes = {k: v.shape for k, v in model.named_parameters()}
    flat = 0.5 * torch.randn(31, generator=generator, dtype=F64)
    h = {"log": torch.tensor([-2.0, -1.5, -2.5, -1.0], dtype=F64).to(dtype)}

    def leaves(flat):
        sizes = [s.numel() for s in shapes.values()]
        pairs = zip(shapes.items(), flat.split(sizes), strict=True)
        return {k: part.reshape(shape) for (k, shape), part in pairs}

    return call, inner, X_val, leaves, flat.to(dtype), h


def trained(inner, leaves, flat, h):
    """Minimise by gradient descent, then by Newton's method."""

    def loss(flat):
        return inner(leaves(flat), h)

    gradient, hessian = torch.func.grad(loss), torch.func.hessian(loss)
    for _ in range(500):
        flat = flat - 0.5 * gradient(flat)
    for _ in range(12):
        flat = flat - torch.linalg.solve(hessian(flat), gradient(flat))
    assert gradient(flat).norm() < 1e-12
    assert torch.linalg.eigvalsh(hessian(flat))[0] > 1e-3
    return flat


def test_a_network_agrees_with_central_differences_of_retraining():
    step = compiled()
    for seed in (0, 1):
        call, inner, X_val, leaves, flat, h = network(F64, seed)
        flat = trained(inner, leaves, flat, h)

        def outers(w, h, call=call, X_val=X_val):
            return {"out": call(w, X_val), "scaled": h["log"].sum() * call(w, X_val)[0]}

        for solver in (hypergrad.CG(rtol=1e-11), hypergrad.Exact()):
            step(outers, inner, leaves(flat), h, solver=solver)
            ours = step(outers, inner, leaves(flat), h, solver=solver)
            for i in (0, 3):
                eps = torch.zeros(4, dtype=F64)
                eps[i] = 1e-4
                there = []
                for sign in (1, -1):
                    moved = {"log": h["log"] + sign * eps}
                    there.append(outers(leaves(trained(inner, leaves, flat, moved)), moved))
                for name in ours:
                    difference = (there[0][name] - there[1][name]) / 2e-4
                    torch.testing.assert_close(
                        ours[name]["log"][..., i], difference, rtol=1e-6, atol=1e-8
                    )


def test_a_network_in_float32_that_is_hardly_trained_agrees_with_the_call_as_it_is():
    step = compiled()
    call, inner, X_val, leaves, flat, h = network(torch.float32, 2)
    params = leaves(flat)
    for scale in (1.0, 0.9, 0.8):

        def outers(w, h, batch=scale * X_val):
            return call(w, batch)

        options = {"solver": hypergrad.CG(damping=2.0), "inner_tol": None, "return_info": True}
        ours, info = step(outers, inner, params, h, **options)
        theirs, present = hypergrad.jacobian(outers, inner, params, h, **options)
        torch.testing.assert_close(ours["log"], theirs["log"], rtol=1e-3, atol=1e-5)
        assert info.success.equal(present.success)
        torch.testing.assert_close(info.inner_residual, present.inner_residual, rtol=1e-3, atol=0)
    assert step.session.programs[0].calls == 3


def test_a_block_that_loses_rows_and_one_that_meets_zeros():
    p, step = Ridge(60, 40), compiled()

    def outers(w, h):
        z = p.X_val @ w
        return torch.cat([z[:3], z[:3], 2 * z[:1], 0 * z[:1], h[:1] + 0 * z[0]])

    for _ in range(2):
        ours, info = step(
            outers, p.inner, p.w, p.log_penalty, solver=hypergrad.CG(rtol=1e-11), return_info=True
        )
    J = p.exact
    zeros = torch.zeros(2, 40, dtype=F64)
    zeros[1, 0] = 1
    expected = torch.cat([J[:3], J[:3], 2 * J[:1], zeros])
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)
    assert info.success.all()


def test_blocks_of_a_small_budget_and_too_many_of_them():
    p, step = Ridge(60, 40), compiled()
    solver, call = hypergrad.CG(rtol=1e-11), (p.predictions, p.inner, p.w, p.log_penalty)
    for _ in range(2):
        J, info = step(*call, solver=solver, memory=80_000, return_info=True)
    theirs = hypergrad.jacobian(*call, solver=solver, memory=80_000, return_info=True)[1]
    assert len(set(info.matvecs.tolist())) > 1  # some blocks
    torch.testing.assert_close(J, p.exact, rtol=1e-8, atol=1e-10)
    same_evidence(info, theirs)
    with pytest.raises(hypergrad.NotCompiled, match="12 outputs are solved for in more than 4"):
        step(*call, solver=solver, memory=1)


def test_the_argument_and_the_first_answer():
    p = Ridge(40, 30)
    for _ in range(2):
        J = hypergrad.jacobian(p.predictions, p.inner, p.w, p.log_penalty, compile=True)
        torch.testing.assert_close(J, p.exact, rtol=1e-9, atol=1e-11)


def test_pytrees_integers_a_start_and_what_comes_beside_the_outputs():
    p, step = Ridge(160, 150), compiled()
    count = torch.arange(3)

    def outers(w, h):
        return {"z": (p.X_val @ w).reshape(3, 4)}, (w[:2] * 2, "text")

    def inner(w, h):
        return p.inner(w, h["penalty"])

    h = {"penalty": p.log_penalty, "count": count}
    solver, last = hypergrad.CG(), None
    for number in range(4):
        start = None if number < 2 else last
        J, info = step(
            outers, inner, p.w, h, solver=solver, x0=start, has_aux=True, return_info=True
        )
        last = info.solution
        torch.testing.assert_close(
            J["z"]["penalty"], p.exact.reshape(3, 4, 150), rtol=1e-4, atol=1e-5
        )
        assert torch.equal(J["z"]["count"], torch.zeros(3, 4, 3, dtype=torch.int64))
        assert info.aux[1] == "text"
        torch.testing.assert_close(info.aux[0], 2 * p.w[:2])
        assert bool(info.iterations.max() == 0) is (start is not None)
    with pytest.raises(hypergrad.StructureMismatch, match="axis of 12 outputs"):
        step(outers, inner, p.w, h, has_aux=True, x0=p.w)
    with pytest.raises(hypergrad.StructureMismatch, match="axis of 12 outputs"):
        step(outers, inner, p.w, h, has_aux=True, x0={"other": p.w})


def test_what_is_said_of_an_unsolved_problem_is_said_at_each_replay():
    p, step = Ridge(40, 30), compiled()
    call = p.predictions, p.inner, p.w + 0.1, p.log_penalty
    for _ in range(3):
        assert warned(step, *call) == warned(hypergrad.jacobian, *call) != []
    for _ in range(3):
        with pytest.raises(hypergrad.NotConverged, match=r"12 of 12 outputs: params") as caught:
            step(*call, on_failure="raise")
        assert caught.value.info.success.shape == (12,)
        assert warned(step, *call, on_failure="ignore") == []


@pytest.mark.parametrize("solver", [None, hypergrad.CG(), hypergrad.GMRES()], ids=repr)
def test_a_saddle_is_said_at_each_replay(solver):
    signs, step = torch.ones(12, dtype=F64), compiled()
    signs[5] = -1

    def saddle(w, t):
        return (signs * (w - t) ** 2).sum() + (w - t).sum() ** 2

    one = torch.ones(12, dtype=F64)
    call = lambda w, t: w[:3] * w[:3], saddle, one, one
    for _ in range(3):
        (said,) = warned(step, *call, solver=solver)
        assert "3 of 3 outputs" in said
        assert "curvature" in said
    assert step.session.programs[0].checked
    with pytest.raises(hypergrad.IndefiniteHessian, match="3 of 3 outputs"):
        step(*call, solver=solver, on_failure="raise")


@pytest.mark.parametrize("what", ["jacobian", "hypergradient"])
def test_units_that_hide_an_error_are_said_at_each_replay(what):
    # The spectrum alone tells: a residual of no more digits than the matrix takes.
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(30, 30, dtype=F64, generator=generator))
    A = (Q * torch.logspace(0, -2, 30, dtype=F64)) @ Q.T
    t, c = (torch.randn(30, dtype=F64, generator=generator) for _ in range(2))
    units = torch.logspace(0, -3, 30, dtype=F64)[torch.randperm(30, generator=generator)]

    def inner(w, t):
        return (w * units) @ (A @ (w * units)) / 2 - w @ (units * t)

    def outer(w, t):
        loss = (c * units) @ w
        return loss if what == "hypergradient" else torch.stack([loss, 2 * loss])

    call = hypergrad.implicit_grad if what == "hypergradient" else hypergrad.jacobian
    step = hypergrad.compile(call, on_fallback="raise")
    arguments = outer, inner, torch.linalg.solve(A, t) / units, t
    for _ in range(3):
        ours = warned(step, *arguments, solver=hypergrad.CG(rtol=1e-2))
        assert ours == warned(call, *arguments, solver=hypergrad.CG(rtol=1e-2)) != []
    assert step.session.programs[0].checked


def test_curvature_that_only_the_spectrum_of_gmres_shows_is_said_at_each_replay():
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(40, 40, dtype=F64, generator=generator))
    values = torch.linspace(1, 3, 40, dtype=F64)
    values[3] = -1.0
    A = (Q * values) @ Q.T
    b = Q.sum(dim=1)
    t = torch.randn(40, dtype=F64, generator=generator)
    step = hypergrad.compile(hypergrad.implicit_grad, on_fallback="raise")

    def inner(w, t):
        return w @ (A @ w) / 2 - w @ t

    for _ in range(3):
        (said,) = warned(
            step, lambda w, t: w @ b, inner, torch.linalg.solve(A, t), t, solver=hypergrad.GMRES()
        )
        assert "negative curvature" in said
    assert step.session.programs[0].checked
    assert b @ torch.linalg.solve(A, b) > 0  # which does not show it


def test_an_output_that_is_not_finite_is_named_at_a_replay():
    p, step = Ridge(20, 5), compiled()

    def outers(w, h, shift):
        return torch.stack([w[0], torch.log(w[1] ** 2 - shift), w[2]])

    for shift in (0.0, 0.0, 1e6):
        shift = torch.tensor(shift, dtype=F64)

        def shifted(w, h, shift=shift):
            return outers(w, h, shift)

        call = shifted, p.inner, p.w, p.log_penalty
        if shift:
            with pytest.raises(hypergrad.NotFinite, match="1 of 3 outputs: what outers returned"):
                step(*call)
            assert torch.isfinite(step(*call, on_failure="ignore")[[0, 2]]).all()
        else:
            assert torch.isfinite(step(*call)).all()


def test_a_replay_that_is_wrong_is_caught():
    p, step = Ridge(40, 30), compiled(check=2)
    call = p.predictions, p.inner, p.w, p.log_penalty
    for _ in range(3):  # the next is compared
        step(*call)
    (program,) = step.session.programs
    run = program.run
    program.run = lambda *inputs: [1.01 * t if t.is_floating_point() else t for t in run(*inputs)]
    with pytest.raises(hypergrad.CompileMismatch, match=r"off by 0\.01"):
        step(*call)


def test_what_falls_back_is_right_and_names_the_cause():
    p = Ridge(20, 5)
    step = compiled(on_fallback="warn")

    def apart(w, h):  # PyTorch maps the derivative of cdist wrongly
        return torch.cdist(p.X_val * w, p.X_val)[0, 1:4]

    def branching(w, h):
        return p.X_val @ w if w.sum().item() < 1e9 else w

    by_numpy = hypergrad.CG(preconditioner=lambda v: torch.from_numpy(v.numpy() / 20))
    for outers, options, cause in (
        (apart, {}, "formed one by one"),
        (branching, {}, "data-dependent"),
        (p.predictions, {"solver": by_numpy}, "preconditioner"),
    ):
        call = outers, p.inner, p.w, p.log_penalty
        with pytest.warns(hypergrad.CompileWarning, match=cause):
            ours = step(*call, **options)
        torch.testing.assert_close(ours, hypergrad.jacobian(*call, **options))
        assert warned(step, *call, **options) == []


def test_a_loss_that_reaches_its_hyperparameters_past_the_arguments_is_refused():
    p, step = Ridge(20, 5), compiled()
    h = p.log_penalty.clone().requires_grad_()

    def inner(w, log_penalty):
        return p.inner(w, log_penalty) + h.sum() * w.sum()

    for _ in range(2):
        with pytest.raises(hypergrad.NotConnected):
            step(p.predictions, inner, p.w, h)
