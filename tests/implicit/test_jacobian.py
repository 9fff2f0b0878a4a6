"""The derivative of many outputs through one inner solution."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hypergrad

F64 = torch.float64


class Ridge:
    """Ridge regression with a penalty a feature: everything in closed form."""

    def __init__(self, rows: int, features: int, dtype: torch.dtype = F64) -> None:
        generator = torch.Generator().manual_seed(rows)
        self.X = torch.randn(rows, features, dtype=F64, generator=generator)
        self.y = torch.randn(rows, dtype=F64, generator=generator)
        self.log_penalty = torch.linspace(-1, 1, features, dtype=F64)
        self.X_val = torch.randn(12, features, dtype=F64, generator=generator)
        self.H = self.X.T @ self.X + self.log_penalty.exp().diag()
        self.w = torch.linalg.solve(self.H, self.X.T @ self.y)
        self.exact = -torch.linalg.solve(self.H, self.X_val.T).T * self.w * self.log_penalty.exp()
        for name, value in list(vars(self).items()):
            setattr(self, name, value.to(dtype))

    def inner(self, w: Tensor, log_penalty: Tensor) -> Tensor:
        return ((self.X @ w - self.y) ** 2).sum() / 2 + (log_penalty.exp() * w * w).sum() / 2

    def predictions(self, w: Tensor, log_penalty: Tensor) -> Tensor:
        return self.X_val @ w


@pytest.mark.parametrize(
    "solver",
    [
        None,
        hypergrad.CG(rtol=1e-12),
        hypergrad.MINRES(rtol=1e-12),
        hypergrad.GMRES(rtol=1e-12),
        hypergrad.Exact(),
        hypergrad.Auto(rtol=1e-12, dense_below=0),
        hypergrad.CG(rtol=1e-12, preconditioner=lambda v: torch.from_numpy(v.numpy() / 40)),
    ],
    ids=["default", "CG", "MINRES", "GMRES", "Exact", "Auto", "preconditioned by NumPy"],
)
def test_every_solver_gives_the_jacobian_of_ridge_regression(solver):
    p = Ridge(40, 30)
    J, info = hypergrad.jacobian(
        p.predictions, p.inner, p.w, p.log_penalty, solver=solver, return_info=True
    )
    torch.testing.assert_close(J, p.exact, rtol=1e-9, atol=1e-11)
    assert info.success.shape == (12,)
    assert info.success.all()
    assert (info.error_estimate[torch.isfinite(info.error_estimate)] < 1e-3).all()
    torch.testing.assert_close(info.outer_value, p.X_val @ p.w)
    torch.testing.assert_close(info.solution, torch.linalg.solve(p.H, p.X_val.T).T)


def test_pytrees_direct_terms_and_integers_come_back_as_from_jacrev():
    p = Ridge(20, 4)
    scale, count = torch.tensor(2.0, dtype=F64), torch.arange(3)
    hparams = {"penalty": p.log_penalty, "scale": scale, "count": count}

    def inner(w, h):
        return p.inner(w, h["penalty"])

    def outers(w, h):
        matrix = (p.X_val @ w).reshape(3, 4) * h["scale"]
        return {"matrix": matrix, "one": h["penalty"].sum() + w[0]}

    found = hypergrad.jacobian(outers, inner, p.w, hparams)
    rows = p.exact.reshape(3, 4, 4)
    of_w = -torch.linalg.inv(p.H)[0] * p.w * p.log_penalty.exp()
    torch.testing.assert_close(found["matrix"]["penalty"], 2 * rows)
    torch.testing.assert_close(found["matrix"]["scale"], (p.X_val @ p.w).reshape(3, 4))
    torch.testing.assert_close(found["one"]["penalty"], 1 + of_w)
    torch.testing.assert_close(found["one"]["scale"], torch.zeros((), dtype=F64))
    assert torch.equal(found["matrix"]["count"], torch.zeros(3, 4, 3, dtype=torch.int64))


@pytest.mark.parametrize("memory", [1, 150_000, 2**30])
def test_the_budget_sets_the_blocks_and_not_the_answer(memory):
    p = Ridge(160, 150)
    solver = hypergrad.CG(rtol=1e-11)
    J, info = hypergrad.jacobian(
        p.predictions, p.inner, p.w, p.log_penalty, solver=solver, memory=memory, return_info=True
    )
    torch.testing.assert_close(J, p.exact, rtol=1e-8, atol=1e-10)
    alone = hypergrad.implicit_grad(
        lambda w, h: p.predictions(w, h)[5], p.inner, p.w, p.log_penalty, solver=solver,
        return_info=True,
    )[1]  # fmt: skip
    if memory == 1:
        assert abs(int(info.matvecs[5]) - int(alone.matvecs)) <= 2
    else:
        assert info.matvecs.max() < alone.matvecs


def test_a_network_in_float32_agrees_with_implicit_grad_row_by_row():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    X, y, X_val = torch.randn(40, 4), torch.randint(3, (40,)), torch.randn(5, 4)

    def call(w, x):
        return torch.func.functional_call(model, w, (x,))

    def inner(w, h):
        decay = sum((t * t).sum() for t in w.values())
        return cross_entropy(call(w, X), y) + h["log"].exp() * decay / 2

    params = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    h = {"log": torch.tensor(-2.0)}
    optimiser = torch.optim.LBFGS(
        list(params.values()), max_iter=300, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = inner(params, h)
        loss.backward()
        return loss

    optimiser.step(closure)
    found, info = hypergrad.jacobian(
        lambda w, h: call(w, X_val), inner, params, h, return_info=True
    )
    assert found["log"].shape == (5, 3)
    assert info.success.all()
    for i, j in [(0, 0), (3, 1), (4, 2)]:
        row = hypergrad.implicit_grad(lambda w, h, i=i, j=j: call(w, X_val)[i, j], inner, params, h)
        torch.testing.assert_close(found["log"][i, j], row["log"], rtol=2e-3, atol=1e-4)


def test_an_unsolved_inner_problem_is_said_once_for_all_outputs():
    p = Ridge(40, 30)
    off = p.w + 0.1
    with pytest.warns(hypergrad.ConvergenceWarning, match=r"more than 3 of 12 outputs: params"):
        hypergrad.jacobian(p.predictions, p.inner, off, p.log_penalty, memory=1)
    with pytest.raises(hypergrad.NotConverged, match=r"12 of 12 outputs: params") as caught:
        hypergrad.jacobian(p.predictions, p.inner, off, p.log_penalty, memory=1, on_failure="raise")
    assert caught.value.info.success.shape == (12,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hypergrad.jacobian(p.predictions, p.inner, off, p.log_penalty, on_failure="ignore")


@pytest.mark.parametrize("solver", [hypergrad.CG(), hypergrad.Exact()], ids=repr)
def test_the_error_estimate_covers_an_inner_solution_that_is_a_little_off(solver):
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(60, 20, dtype=F64, generator=generator)
    y = (torch.randn(60, dtype=F64, generator=generator) > 0).to(F64)
    h = torch.zeros(20, dtype=F64)

    def inner(w, h):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(X @ w, y)
        return loss + (h.exp() * w * w).sum() / 20

    w = torch.zeros(20, dtype=F64)
    for _ in range(20):
        w = w - torch.linalg.solve(torch.func.hessian(inner)(w, h), torch.func.grad(inner)(w, h))

    def outers(w, h):
        return torch.tanh(X[:6] @ w)

    true = hypergrad.jacobian(outers, inner, w, h, solver=hypergrad.Exact())
    off = w + 1e-4 * torch.randn(20, dtype=F64, generator=generator)
    found, info = hypergrad.jacobian(outers, inner, off, h, solver=solver, return_info=True)
    error = (found - true).norm(dim=-1) / true.norm(dim=-1)
    assert info.success.all()
    assert (error <= info.error_estimate).all()
    assert (info.error_estimate < 0.1).all()


def test_one_output_that_is_not_finite_is_named():
    p = Ridge(20, 5)

    def outers(w, h):
        return torch.stack([w[0], torch.log(-(w[1] ** 2) - 1), w[2]])

    with pytest.raises(hypergrad.NotFinite, match="1 of 3 outputs: what outers returned"):
        hypergrad.jacobian(outers, p.inner, p.w, p.log_penalty)

    found = hypergrad.jacobian(outers, p.inner, p.w, p.log_penalty, on_failure="ignore")
    assert torch.isfinite(found[[0, 2]]).all()

    def steep(w, h):
        return torch.stack([w[0], torch.sqrt(w[1] - w[1])])

    with pytest.raises(hypergrad.NotFinite, match="outputs: the derivative of outers by params"):
        hypergrad.jacobian(steep, p.inner, p.w, p.log_penalty)
    found = hypergrad.jacobian(steep, p.inner, p.w, p.log_penalty, on_failure="ignore")
    assert found[1].isnan().all()


def test_a_saddle_is_an_error_of_all_outputs():
    signs = torch.tensor([1.0, 1.0, -1.0], dtype=F64)

    def saddle(w, t):
        return (signs * (w - t) ** 2).sum()

    one = torch.ones(3, dtype=F64)
    for solver in (None, hypergrad.CG(), hypergrad.Exact()):
        with pytest.raises(hypergrad.IndefiniteHessian, match="3 of 3 outputs"):
            hypergrad.jacobian(lambda w, t: w, saddle, one, one, solver=solver, on_failure="raise")


def test_conditions_without_symmetry():
    A = torch.tensor([[3.0, 1.0], [-1.0, 2.0]], dtype=F64)
    root = hypergrad.Root(lambda x, t: A @ x - t)
    t = torch.tensor([1.0, 2.0], dtype=F64)
    for solver in (None, hypergrad.GMRES(), hypergrad.BiCGSTAB()):
        found = hypergrad.jacobian(
            lambda x, t: torch.cat([x, x]), root, torch.linalg.solve(A, t), t, solver=solver
        )
        inverse = torch.linalg.inv(A)
        torch.testing.assert_close(found, torch.cat([inverse, inverse]), rtol=1e-5, atol=1e-8)


def test_a_start_saves_the_products():
    p = Ridge(160, 150)
    call = (p.predictions, p.inner, p.w, p.log_penalty)
    first = hypergrad.jacobian(*call, solver=hypergrad.CG(), return_info=True)[1]
    J, again = hypergrad.jacobian(
        *call, solver=hypergrad.CG(), x0=first.solution, return_info=True, memory=1
    )
    assert again.iterations.max() == 0
    torch.testing.assert_close(J, p.exact, rtol=1e-4, atol=1e-5)
    with pytest.raises(hypergrad.StructureMismatch, match="axis of 12 outputs"):
        hypergrad.jacobian(*call, x0=p.w)


def test_outputs_that_go_through_fused_attention_are_differentiated_one_by_one():
    p = Ridge(20, 5, dtype=torch.float32)

    def attended(w, h):  # of one vector by itself: what follows it is the softmax's derivative
        x = p.X_val.reshape(1, 1, 12, 5) * w
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)[0, 0, :, 0]

    def by_hand(w, h):
        x = p.X_val * w
        return ((x @ x.T / 5**0.5).softmax(dim=-1) @ x)[:, 0]

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = hypergrad.jacobian(attended, p.inner, p.w, p.log_penalty)
    assert not warned  # PyTorch's, of a kernel that it cannot map
    expected = hypergrad.jacobian(by_hand, p.inner, p.w, p.log_penalty)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_mistakes_are_named():
    p = Ridge(20, 5)
    with pytest.raises(hypergrad.StructureMismatch, match="tensors without entries"):
        hypergrad.jacobian(lambda w, h: w[:0], p.inner, p.w, p.log_penalty)
    with pytest.raises(hypergrad.NotConnected, match="outers does not depend on params"):
        hypergrad.jacobian(lambda w, h: h, p.inner, p.w, p.log_penalty)
    with pytest.raises(hypergrad.StructureMismatch, match=r"floating-point tensor.*int64"):
        hypergrad.jacobian(lambda w, h: w.long(), p.inner, p.w, p.log_penalty)
    with pytest.raises(ValueError, match="memory"):
        hypergrad.jacobian(p.predictions, p.inner, p.w, p.log_penalty, memory=0)
    with pytest.raises(hypergrad.UnsupportedOperation, match="custom_argmin"):
        torch.func.vmap(lambda h: hypergrad.jacobian(p.predictions, p.inner, p.w, h))(
            p.log_penalty[None]
        )
    unused = {"penalty": p.log_penalty, "other": torch.ones(2, dtype=F64)}
    with pytest.warns(hypergrad.ConvergenceWarning, match=r"Neither outers nor inner.*other"):
        found = hypergrad.jacobian(
            p.predictions, lambda w, h: p.inner(w, h["penalty"]), p.w, unused
        )
    assert torch.equal(found["other"], torch.zeros(12, 2, dtype=F64))


def test_aux_is_handed_on():
    p = Ridge(20, 5)
    J, aux = hypergrad.jacobian(
        lambda w, h: (p.X_val @ w, "aux"), p.inner, p.w, p.log_penalty, has_aux=True
    )
    assert aux == "aux"
    torch.testing.assert_close(J, p.exact)
