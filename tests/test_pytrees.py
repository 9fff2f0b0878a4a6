"""Row 52: one tensor under two names, what is frozen, `state_dict()`, and odd kinds of tensors."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad import CG, Bilevel, Exact, StructureMismatch, UnsupportedOperation, implicit_grad
from tests.weighted_ridge import expected, inner, outer, solution

D = torch.float64


@pytest.fixture(autouse=True)
def _silent():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", hypergrad.ConvergenceWarning)
        yield


def newton(loss, at, steps=8):
    """The minimiser of a loss of one flat vector."""
    for _ in range(steps):
        gradient, hessian = torch.func.grad(loss)(at), torch.func.hessian(loss)(at)
        at = at - torch.linalg.solve(hessian, gradient)
    return at.detach()


def central(f, h, e=1e-4):
    return (f(h + e) - f(h - e)) / (2 * e)


# One weight under two names


class TwoLayers(nn.Module):
    """``b(tanh(a(x)))``, both with one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Linear(3, 3, bias=False, dtype=D) for _ in range(2))
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Shared:
    """A ridge-like problem of such a module, its solution, and the true hypergradient."""

    def __init__(self, tie_weights=True):
        self.module, self.tie = TwoLayers(), tie_weights
        with torch.no_grad():
            self.module.a.weight.copy_(torch.randn(3, 3))
        self.x = torch.randn(20, 3, dtype=D)
        self.y = self.module(self.x).detach() + 0.1 * torch.randn(20, 3, dtype=D)
        self.h = torch.tensor(-4.0, dtype=D)
        w = self.solve(self.h)
        with torch.no_grad():
            self.module.a.weight.copy_(w.reshape(3, 3))
        self.params = dict(self.module.named_parameters(remove_duplicate=False))
        self.truth = central(lambda h: self.of_weight(self.solve(h)), self.h)

    def solve(self, h):
        def loss(w):
            W = w.reshape(3, 3)
            out = torch.tanh(self.x @ W.T) @ W.T
            return ((out - self.y) ** 2).mean() + 2 * h.exp() * (w**2).sum()

        start = self.module.a.weight.detach().reshape(-1)
        return newton(loss, start)

    def of_weight(self, w):
        return (torch.tanh(self.x @ w.reshape(3, 3).T) ** 2).sum()

    def inner(self, p, h):
        out = functional_call(self.module, p, (self.x,), tie_weights=self.tie)
        return ((out - self.y) ** 2).mean() + h.exp() * sum((w**2).sum() for w in p.values())

    def outer(self, p, h):
        return self.of_weight((p["a.weight"] + p["b.weight"]).reshape(-1) / 2)


@pytest.mark.parametrize("solver", [None, CG(), Exact()], ids=str)
@pytest.mark.parametrize("tie_weights", [True, False])
def test_row_52_a_weight_under_two_names_is_one_variable(tie_weights, solver):
    shared = Shared(tie_weights)
    hypergradient, info = implicit_grad(
        shared.outer, shared.inner, shared.params, shared.h, solver=solver, return_info=True
    )
    torch.testing.assert_close(hypergradient, shared.truth, rtol=1e-5, atol=0)
    assert list(info.solution) == ["a.weight", "b.weight"]
    assert torch.equal(info.solution["a.weight"], info.solution["b.weight"])
    again = implicit_grad(
        shared.outer, shared.inner, shared.params, shared.h, solver=solver, x0=info.solution
    )
    torch.testing.assert_close(again, shared.truth, rtol=1e-5, atol=0)


def test_row_52_a_weight_under_two_names_is_one_variable_for_gauss_newton_and_a_check():
    shared = Shared()
    condition = hypergrad.GaussNewton(
        lambda p, h: functional_call(shared.module, p, (shared.x,)),
        lambda z, h: ((z - shared.y) ** 2).mean(),
        lambda p, h: h.exp() * sum((w**2).sum() for w in p.values()),
    )
    _, info = implicit_grad(
        shared.outer, condition, shared.params, shared.h, on_failure="ignore", return_info=True
    )
    assert info.inner_residual < 1e-8

    def solve(h):
        weight = nn.Parameter(shared.solve(h.detach()).reshape(3, 3))
        return {"a.weight": weight, "b.weight": weight}

    assert hypergrad.check_hypergrad(shared.outer, shared.inner, solve, shared.h).ok


def test_row_52_a_weight_under_two_names_is_one_variable_for_the_estimators():
    shared = Shared()
    hypergradient = hypergrad.penalty_grad(
        shared.outer, shared.inner, shared.params, shared.h,
        penalty=1e4, lr=0.1, steps=300, rtol=1e-2,
    )  # fmt: skip
    torch.testing.assert_close(hypergradient, shared.truth, rtol=1e-2, atol=0)
    once = {"a.weight": shared.params["a.weight"]}
    twice = [lambda p, h, f=f: f(p | {"b.weight": p["a.weight"]}, h)
             for f in (shared.outer, shared.inner)]  # fmt: skip
    torch.testing.assert_close(
        hypergrad.finite_difference_grad(shared.outer, shared.inner, shared.params, shared.h),
        hypergrad.finite_difference_grad(*twice, once, shared.h),
    )


@pytest.mark.parametrize("ready", [True, False])
def test_row_52_a_weight_under_two_names_moves_once_in_a_loop(ready):
    shared = Shared()
    h = shared.h.clone().requires_grad_()
    weight = shared.params["a.weight"]
    loop = Bilevel(
        shared.outer, shared.inner, shared.params, h,
        inner_optimizer=torch.optim.SGD([weight], lr=0.1)
        if ready else lambda variables: torch.optim.SGD(variables, lr=0.1),
        outer_optimizer=lambda variables: torch.optim.SGD(variables, lr=1e-3),
    )  # fmt: skip
    step = loop.step()
    a, b = (loop.params[name].data_ptr() for name in ("a.weight", "b.weight"))
    assert a == b
    assert (a == weight.data_ptr()) == ready
    moved = (shared.h - loop.hparams) / 1e-3
    torch.testing.assert_close(moved, shared.truth, rtol=1e-4, atol=0)
    assert step.info.solution["b.weight"].shape == (3, 3)


def test_row_52_plain_tensors_are_values_and_equations_have_one_each():
    w = torch.tensor(2.0, dtype=D)  # solves both parts, which have nothing to do with each other
    inner = lambda p, h: (p["a"] - h) ** 2 + (p["b"] - 2 + 3 * (h - 2)) ** 2
    h = torch.tensor(2.0, dtype=D)
    hypergradient = implicit_grad(lambda p, h: p["a"] + 10 * p["b"], inner, {"a": w, "b": w}, h)
    torch.testing.assert_close(hypergradient, torch.tensor(-29.0, dtype=D))
    root = hypergrad.Root(lambda p, h: (p[0] - h, p[1] - 2 * h + 2))
    w = w.clone().requires_grad_()
    hypergradient = implicit_grad(lambda p, h: p[0] + 10 * p[1], root, (w, w), h)
    torch.testing.assert_close(hypergradient, torch.tensor(21.0, dtype=D))


def test_row_52_plain_copies_of_a_tied_weight_are_an_error_that_says_how():
    shared = Shared()
    params = {name: w.detach() for name, w in shared.params.items()}
    with pytest.raises(UnsupportedOperation, match=r"two names.*named_parameters"):
        implicit_grad(shared.outer, shared.inner, params, shared.h)


def test_row_52_a_hyperparameter_under_two_names_has_its_whole_derivative_at_each():
    inner = lambda w, h: (w - h["a"] * h["b"]) ** 2  # w = a b
    outer = lambda w, h: w + 5 * h["b"]
    h = torch.tensor(3.0, requires_grad=True)
    hparams = {"a": h, "b": h}
    hypergradient = implicit_grad(outer, inner, h.detach() ** 2, hparams)
    assert hypergradient["a"] == hypergradient["b"] == 11  # as torch.autograd.grad has it
    hypergrad.implicit_backward(outer, inner, h.detach() ** 2, hparams)
    assert h.grad == 11
    step = lambda w, h: w - 0.25 * torch.func.grad(inner)(w, h)
    hypergradient = hypergrad.unrolled_grad(outer, step, torch.tensor(0.0), hparams, steps=40)
    torch.testing.assert_close(hypergradient["a"], torch.tensor(11.0))
    plain = implicit_grad(outer, inner, h.detach() ** 2, {k: h.detach() for k in "ab"})
    assert (plain["a"], plain["b"]) == (3, 8)  # of values, as torch.func.grad has it
    loop = Bilevel(
        outer, inner, h.detach() ** 2, hparams,
        inner_optimizer=lambda variables: torch.optim.SGD(variables, lr=0.1),
        outer_optimizer=torch.optim.SGD([h], lr=0.1),
    )  # fmt: skip
    loop.step()
    torch.testing.assert_close(h.detach(), torch.tensor(3 - 0.1 * 11.0))


# Frozen


def frozen_problem(wrap):
    """A least-squares problem whose first matrix is frozen."""
    A, x, y = torch.randn(4, 4, dtype=D), torch.randn(12, 4, dtype=D), torch.randn(12, dtype=D)
    h = torch.tensor(-1.0, dtype=D)
    features = torch.tanh(x @ A)

    def solve(h):
        return torch.linalg.solve(features.T @ features + h.exp() * torch.eye(4, dtype=D),
                                  features.T @ y)  # fmt: skip

    def inner(p, h):
        residual = torch.tanh(x @ p["A"]) @ p["w"] - y
        return (residual @ residual + h.exp() * (p["w"] @ p["w"])) / 2

    outer = lambda p, h: (p["w"] ** 2).sum()
    params = {"A": A, "w": solve(h)}
    if wrap == "parameter":
        params = {n: nn.Parameter(t, requires_grad=n == "w") for n, t in params.items()}
    else:
        params["w"].requires_grad_()
    return outer, inner, params, h, central(lambda h: (solve(h) ** 2).sum(), h), solve


@pytest.mark.parametrize("wrap", ["parameter", "tensor"])
def test_row_52_what_is_frozen_beside_what_is_not_is_a_constant(wrap):
    outer, inner, params, h, truth, solve = frozen_problem(wrap)
    hypergradient, info = implicit_grad(outer, inner, params, h, return_info=True)
    torch.testing.assert_close(hypergradient, truth, rtol=1e-6, atol=0)
    assert not info.solution["A"].any()
    both = hypergrad.penalty_grad(
        outer, inner, params, h, penalty=1e4, lr=0.05, steps=300, rtol=1e-2
    )
    torch.testing.assert_close(both, truth, rtol=1e-2, atol=0)

    def fit(h):
        return params | {"w": solve(h).detach().requires_grad_()}

    assert hypergrad.check_hypergrad(outer, inner, fit, h).ok


def test_row_52_frozen_tensors_stay_where_they_are_in_a_loop():
    outer, inner, params, h, truth, _ = frozen_problem("tensor")
    before = params["A"].clone()
    loop = Bilevel(
        outer, inner, params, h,
        inner_optimizer=torch.optim.SGD([params["w"]], lr=1e-3),
        outer_optimizer=lambda variables: torch.optim.SGD(variables, lr=1e-3),
    )  # fmt: skip
    loop.step()
    torch.testing.assert_close((h - loop.hparams) / 1e-3, truth, rtol=1e-4, atol=0)
    assert torch.equal(loop.params["A"], before)


def test_row_52_the_result_of_an_operation_freezes_nothing_beside_it():
    h = torch.tensor(2.0, requires_grad=True)
    params = {"a": 3 * h, "b": torch.tensor(4.0)}  # the first carries a derivative by h
    inner = lambda p, h: (p["a"] - 3 * h) ** 2 + (p["b"] - 2 * h) ** 2
    assert implicit_grad(lambda p, h: p["b"], inner, params, h) == 2


# state_dict()


def normed():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(D)
    x, y = torch.randn(20, 3, dtype=D), torch.randn(20, 1, dtype=D)

    def inner(p, h):
        decay = sum((p[n] ** 2).sum() for n, _ in net.named_parameters())
        return F.mse_loss(functional_call(net, p, (x,)), y) + h.exp() * decay

    return net.eval(), inner, torch.tensor(-1.0, dtype=D)


def test_row_52_running_statistics_among_params_are_named():
    net, inner, h = normed()
    words = r"params\['1.running_mean'\], params\['1.running_var'\].*named_parameters\(\)"
    for call in (
        lambda: implicit_grad(inner, inner, net.state_dict(), h),
        lambda: hypergrad.finite_difference_grad(inner, inner, net.state_dict(), h),
    ):
        with pytest.raises(StructureMismatch, match=words):
            call()


def test_row_52_a_state_dict_without_buffers_of_floats_is_right():
    net = nn.Linear(3, 1).to(D)
    x, y = torch.randn(20, 3, dtype=D), torch.randn(20, 1, dtype=D)
    inner = lambda p, h: (
        F.mse_loss(functional_call(net, p, (x,)), y)
        + h.exp() * sum((w**2).sum() for w in p.values())
    )
    h = torch.tensor(-1.0, dtype=D)
    found, params = (
        implicit_grad(inner, inner, p, h, inner_tol=None)
        for p in (net.state_dict(), dict(net.named_parameters()))
    )
    torch.testing.assert_close(found, params)


# Odd tensors


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def compressed(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {"csr": torch.Tensor.to_sparse_csr, "csc": torch.Tensor.to_sparse_csc}
        return made[layout](torch.eye(4)) if layout in made else torch.eye(4).to_sparse_bsr((2, 2))


def uninitialised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.LazyLinear(3).weight


ODD = {
    "coo": (lambda: torch.eye(3).to_sparse(), "sparse.*values"),
    "csr": (lambda: compressed("csr"), "sparse.*values"),
    "csc": (lambda: compressed("csc"), "sparse.*values"),
    "bsr": (lambda: compressed("bsr"), "sparse.*values"),
    "nested": (nested, "nested.*unbind"),
    "lazy": (uninitialised, "no shape.*once"),
    "float8": (lambda: torch.ones(3).to(torch.float8_e4m3fn), r"float8.*\.float\(\)"),
    "quantised": (quantised, "quantised.*dequantize|no floating-point"),
    "meta": (lambda: torch.zeros(3, device="meta"), "meta.*to_empty"),
}


@pytest.mark.parametrize("kind", ODD)
def test_row_52_odd_tensors_are_refused_by_name_with_the_cure(kind):
    make, words = ODD[kind]
    leaf = {"w": make()}
    like = leaf["w"].device
    one, number = torch.ones(3, device=like), torch.tensor(1.0, device=like)
    loss = lambda p, h: (p["w"].float() ** 2).sum() if isinstance(p, dict) else (p**2).sum()
    square = lambda p, h: (h**2).sum()
    options = {
        name: lambda variables: torch.optim.SGD(variables, lr=0.1)
        for name in ("inner_optimizer", "outer_optimizer")
    }
    calls = {
        "params": [
            lambda: implicit_grad(loss, loss, leaf, number),
            lambda: hypergrad.finite_difference_grad(loss, loss, leaf, number),
            lambda: hypergrad.root_vjp(lambda p, h: {"w": p["w"] * h}, leaf, (number,), leaf),
            lambda: Bilevel(loss, loss, leaf, number, **options),
        ],
        "hparams": [
            lambda: implicit_grad(square, square, one, leaf),
            lambda: hypergrad.unrolled_grad(square, lambda w, h: w, one, leaf, steps=2),
        ],
        "init": [lambda: hypergrad.inner_solvers.LBFGS()(lambda p: loss(p, None), leaf)],
        "b": [lambda: CG().solve(lambda v: v, leaf)],
    }
    if kind == "meta":  # refused where values are read, and by the first leaf
        calls = {"params": calls["params"][:1]}
    for name, several in calls.items():
        for call in several:
            with pytest.raises(hypergrad.HypergradError, match=words) as caught:
                call()
            if "no floating-point" not in str(caught.value):
                assert str(caught.value).startswith(f"{name}['w'] ")


TRANSFORMS = ["grad", "jacfwd", "hessian", "vmap"]


@pytest.mark.parametrize("how", ["backward", *TRANSFORMS])
@pytest.mark.parametrize("layout", ["strided", "coo", "csr"])
def test_row_52_a_sparse_matrix_is_a_constant_argument_of_a_decorated_solver(layout, how):
    n = 8
    dense = (torch.rand(n, n) < 0.4).to(D) * 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = {"strided": dense, "coo": dense.to_sparse(), "csr": dense.to_sparse_csr()}[layout]

    def solve(x, d, m):
        return torch.linalg.solve(torch.eye(n, dtype=D) - d * dense, torch.ones(n, dtype=D))

    fixed = hypergrad.custom_fixed_point(lambda x, d, m: d * (m @ x) + 1)(solve)
    f, truth = lambda d: fixed(None, d, m).sum(), lambda d: solve(None, d, m).sum()
    d = torch.tensor(0.8, dtype=D)
    if (layout, how) in {("coo", "hessian"), *(("csr", how) for how in TRANSFORMS)}:
        # PyTorch itself does not go through the product there.
        transform = {"vmap": lambda f: lambda d: torch.func.vmap(f)(d[None])}
        with pytest.raises(UnsupportedOperation, match=r"to_dense\(\)"):
            transform.get(how, getattr(torch.func, how))(f)(d)
        return
    if how == "backward":
        leaf = d.clone().requires_grad_()
        f(leaf).backward()
        found, want = leaf.grad, torch.func.grad(truth)(d)
    elif how == "vmap":
        several = torch.stack([d, d / 2])
        found, want = torch.func.vmap(f)(several), torch.func.vmap(truth)(several)
    else:
        transform = getattr(torch.func, how)
        found, want = transform(f)(d), transform(truth)(d)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


def test_row_52_a_sparse_argument_that_is_to_be_differentiated_is_refused():
    m = torch.eye(3).to_sparse().requires_grad_()
    fixed = hypergrad.custom_fixed_point(lambda x, m: (m @ x) / 2 + 1)(
        lambda x, m: 2 * torch.ones(3)
    )
    with pytest.raises(UnsupportedOperation, match=r"^m is sparse.*values"):
        fixed(torch.ones(3), m)
    F = lambda x, m: x - (m @ x) / 2 - 1
    args = (m.detach(),)
    with pytest.raises(UnsupportedOperation, match=r"^args\[0\] is sparse"):
        hypergrad.root_vjp(F, torch.full((3,), 2.0), args, torch.ones(3))


def test_row_52_constants_of_a_decorated_solver():
    class Scale(nn.Module):
        def forward(self, x):
            return 2 * x

    def solve(w, h, data):
        return data["f"](h) if data["kind"] == "double" else h

    problem = lambda w, h, data: ((w - data["module"](h)) ** 2).sum()
    data = {"f": lambda h: 2 * h, "kind": "double", "module": Scale()}
    fit = hypergrad.custom_argmin(problem)(solve)
    assert torch.func.grad(lambda h: fit(None, h, data).sum())(torch.tensor(3.0)) == 2
    data["module"] = nn.Linear(1, 1)
    with pytest.raises(StructureMismatch, match=r"^data\['module'\] is an nn.Module"):
        fit(None, torch.tensor(3.0), data)


# Sparse gradients


@pytest.mark.parametrize("entrance", ["implicit", "cg", "unrolled", "penalty", "gather", "vmap"])
def test_row_52_a_sparse_gradient_is_the_dense_one(entrance):
    rows, y = torch.tensor([0, 2, 2, 1]), torch.randn(4, 2, dtype=D)
    table, h = torch.randn(5, 2, dtype=D), torch.tensor(0.5, dtype=D)

    def of(sparse):
        def taken(w):
            if entrance == "gather":
                return torch.gather(w, 0, rows[:, None].expand(4, 2), sparse_grad=sparse)
            return F.embedding(rows, w, sparse=sparse)

        inner = lambda w, h: ((taken(w) - y) ** 2).sum() + h.exp() * (w**2).sum()
        outer = lambda w, h: ((taken(w) - h) ** 2).sum()
        if entrance == "unrolled":
            step = lambda w, h: w - 0.1 * torch.func.grad(inner)(w, h)
            return hypergrad.unrolled_grad(outer, step, table, h, steps=3)
        if entrance == "penalty":
            return hypergrad.penalty_grad(
                outer, inner, table, h, penalty=10.0, lr=0.1, inner_tol=None, rtol=None
            )
        solver = CG() if entrance == "cg" else None
        call = lambda h: implicit_grad(outer, inner, table, h, inner_tol=None, solver=solver)
        return torch.func.vmap(call)(torch.stack([h, -h])) if entrance == "vmap" else call(h)

    torch.testing.assert_close(of(True), of(False))


# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


@pytest.fixture
def h():
    return torch.tensor([0.3, 0.7, 1.1], dtype=D)


def test_the_answer_has_the_structure_of_hparams(h):
    tree = {"a": (h[0].clone(), [h[1:].clone()]), "none": None, "rate": 0.1, "n": torch.tensor(3)}
    w = {"x": solution(h)[:1], "deep": (solution(h)[1:],)}

    def join(w, t):
        return torch.cat([w["x"], w["deep"][0]]), torch.cat([t["a"][0][None], t["a"][1][0]])

    hypergradient = implicit_grad(
        lambda w, t: outer(*join(w, t)), lambda w, t: inner(*join(w, t)), w, tree
    )
    assert pytree.tree_structure(hypergradient) == pytree.tree_structure(tree)
    flat = torch.cat([hypergradient["a"][0][None], hypergradient["a"][1][0]])
    torch.testing.assert_close(flat, expected(h), rtol=1e-9, atol=0)
    assert hypergradient["none"] is None
    assert hypergradient["rate"] == 0.1
    assert hypergradient["n"].dtype == torch.int64
    assert hypergradient["n"] == 0


def test_leaves_that_are_0d_empty_strided_expanded_or_overlapping_are_right():
    lam = torch.tensor(0.4, dtype=D)
    base = torch.arange(8, dtype=D)
    params = {
        "scalar": torch.tensor(0.0, dtype=D),
        "empty": torch.zeros(0, dtype=D),
        "strided": base[::3],  # 0, 3, 6
        "transposed": base[:6].reshape(2, 3).T,
        "expanded": torch.ones(1, dtype=D).expand(3),
        "overlapping": base.as_strided((3, 2), (1, 1)),
    }
    targets = {k: torch.cos(torch.arange(v.numel(), dtype=D)).reshape(v.shape) + 1
               for k, v in params.items()}  # fmt: skip

    def objective(p, lam):
        return sum(((p[k] - targets[k]) ** 2).sum() + lam * (p[k] ** 2).sum() for k in p)

    # Exact at any point: the system has the matrix 2 (1 + lam) I, so b = 1 gives this formula.
    hypergradient = implicit_grad(
        lambda p, lam: sum(p[k].sum() for k in p), objective, params, lam, inner_tol=None
    )
    want = -sum(v.sum() for v in params.values()) / (1 + lam)
    torch.testing.assert_close(hypergradient, want, rtol=1e-12, atol=0)


def test_hparams_that_are_strided_or_expanded_are_right(h):
    strided = torch.stack([h, h], dim=1)[:, 0]
    torch.testing.assert_close(
        implicit_grad(outer, inner, solution(h), strided), expected(h), rtol=1e-9, atol=0
    )
    wide = torch.tensor([0.5], dtype=D).expand(3)
    torch.testing.assert_close(
        implicit_grad(outer, inner, solution(wide), wide), expected(wide), rtol=1e-9, atol=0
    )


def test_float32_and_float64_leaves_each_keep_their_dtype():
    p = {"a": torch.tensor([0.5]), "b": torch.tensor([0.25], dtype=D)}
    t = {"a": torch.tensor([1.0]), "b": torch.tensor([3.0], dtype=D)}

    def objective(p, t):
        return ((p["a"] * (1 + t["a"]) - 1) ** 2).sum().double() + (
            (p["b"] * (1 + t["b"]) - 1) ** 2
        ).sum()

    hypergradient, info = implicit_grad(
        lambda p, t: p["a"].sum().double() + p["b"].sum(), objective, p, t, return_info=True
    )
    assert hypergradient["a"].dtype == torch.float32
    assert hypergradient["b"].dtype == D
    torch.testing.assert_close(hypergradient["a"], torch.tensor([-0.25]))
    torch.testing.assert_close(hypergradient["b"], torch.tensor([-1 / 16], dtype=D))
    assert info.solution["a"].dtype == torch.float32
    assert info.solution["b"].dtype == D


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", [None, CG()])
def test_half_precision_is_solved_in_float32_and_cast_back(dtype, solver):
    lam = torch.tensor([1.0, 3.0], dtype=dtype)
    w = 1 / (1 + lam)
    hypergradient, info = implicit_grad(
        lambda w, lam: w.sum(),
        lambda w, lam: ((w - 1) ** 2).sum() / 2 + (lam * w**2).sum() / 2,
        w,
        lam,
        solver=solver,
        inner_tol=3e-2,
        return_info=True,
    )
    assert hypergradient.dtype == dtype
    assert info.residual_norm.dtype == torch.float32
    torch.testing.assert_close(
        hypergradient.float(), torch.tensor([-0.25, -0.0625]), rtol=2e-2, atol=0
    )


def test_complex_leaves_are_refused_by_name(h):
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"hparams\['z'\] is complex"):
        implicit_grad(outer, inner, solution(h), {"z": torch.zeros(2, dtype=torch.complex64)})


def test_leaves_on_two_devices_are_an_error_that_names_both():
    params = {"a": torch.zeros(2), "b": torch.zeros(2, device="meta")}
    with pytest.raises(hypergrad.StructureMismatch, match=r"params\['b'\] is on meta.*\['a'\]"):
        implicit_grad(lambda p, t: p["a"].sum(), lambda p, t: t, params, torch.tensor(1.0))


@pytest.mark.parametrize("place", ["params", "hparams"])
@pytest.mark.parametrize("kind", ["module", "generator", "module in a dict"])
def test_a_module_or_a_generator_is_refused_and_the_cure_named(place, kind, h):
    model = nn.Linear(1, 1)
    bad = {"module": model, "generator": model.parameters(), "module in a dict": {"m": model}}[kind]
    arguments = (bad, h) if place == "params" else (solution(h), bad)
    with pytest.raises(hypergrad.StructureMismatch, match="named_parameters") as error:
        implicit_grad(outer, inner, *arguments)
    assert str(error.value).startswith(place)
