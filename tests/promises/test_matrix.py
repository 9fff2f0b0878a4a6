"""The composition matrix of the documentation: one test a cell.

`docs.matrix` says what each cell promises. A cell that is right equals the same composition of
Newton's method unrolled by hand, with loops in the place of vmap.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import hypergrad
from docs import matrix
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
    gradient,
    inner,
    leaf,
    reference,
    skewed,
    solve,
    step,
)

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

Fun = Callable[..., Any]


# The rows: an answer as a function of the data and the hyperparameters, and its truth.


@dataclasses.dataclass(frozen=True)
class Row:
    answer: Fun  # (X, y, lam, **options) -> vector
    truth: Fun  # the same by hand
    scalar: Fun  # t -> scalar, of the problem v + v^3 = t
    scalar_truth: Fun
    nest: Fun  # an objective of (u, s) and its minimiser, made differentiable by this row


def cardano(t: Tensor) -> Tensor:
    """The root of v + v^3 = t."""
    root = 2 / 3**0.5
    return root * torch.sinh(torch.asinh(1.5 * 3**0.5 * t) / 3)


def slope(t: Tensor) -> Tensor:
    return 1 / (1 + 3 * cardano(t) ** 2)


def cubic(v, t):
    return v**2 / 2 + v**4 / 4 - t * v


def equation(v, t):
    return v + v**3 - t


def minimised(objective: Fun, u0: float = 0.5) -> Fun:
    """The minimiser over a 0-d tensor, by Newton's method from its own solution."""
    first = grad(objective)
    second = grad(first)

    def newton(u, s, steps):
        for _ in range(steps):
            u = u - first(u, s) / second(u, s)
        return u

    return lambda s: newton(newton(torch.full_like(s, u0), s, 8).detach(), s, 3)


def solution(X, y, lam):
    return flat(reference(None, X, y, lam))


def decorated(decorate: Fun, condition: Any, scalar: Any, nested: Fun) -> Row:
    def answer(X, y, lam, **options):
        return flat(decorate(condition, **options)(solve)(None, X, y, lam))

    def nest(objective, minimiser):
        fit = decorate(nested(objective))(lambda init, s: minimiser(s).detach())
        return lambda s: fit(None, s)

    fit = decorate(scalar)(lambda init, t: cardano(t))
    return Row(answer, solution, lambda t: fit(None, t), cardano, nest)


def outer(p, lam):
    return (flat(p) @ C.to(lam.dtype)) ** 2 + lam.prod()


# The compiler need not look into Newton's method.
plainly_solved = functools.partial(hypergrad.custom_argmin(inner)(solve), None)


def once(X, y, lam, **options):
    params = plainly_solved(X, y, lam)
    return hypergrad.implicit_grad(outer, lambda p, h: inner(p, X, y, h), params, lam, **options)


def backward_through(X, y, lam, **options):
    """implicit_backward, with hyperparameters that are no leaf."""
    params = plainly_solved(X, y, lam)
    hypergrad.implicit_backward(outer, lambda p, h: inner(p, X, y, h), params, lam * 1, **options)


def by_backward(X, y, lam, **options):
    """What is accumulated."""
    if torch._C._are_functorch_transforms_active():
        return backward_through(X, y, lam, **options)
    with torch.inference_mode(False), torch.enable_grad():
        at = lam.clone() if lam.is_inference() else lam.view_as(lam)
        at = at if at.requires_grad else at.requires_grad_()
        at.retain_grad()
        backward_through(X, y, at, **options)
    return at.grad


def of_outer(X, y, lam):
    return grad(lambda lam: outer(reference(None, X, y, lam), lam))(lam)


START = {"w": torch.zeros(3, dtype=D), "b": torch.zeros((), dtype=D)}


def descent(X, y):
    def one(p, lam):
        g = gradient(p, X, y, lam)
        return {k: p[k] - 0.03 * g[k] for k in p}

    return one


def unrolled(X, y, lam, **options):
    start = {k: v.to(lam.dtype) for k, v in START.items()}
    return hypergrad.unrolled_grad(outer, descent(X, y), start, lam, steps=3)


def of_steps(X, y, lam):
    def value(lam):
        p = START
        for _ in range(3):
            p = descent(X, y)(p, lam)
        return outer(p, lam)

    return grad(value)(lam)


def scalar_steps(t):
    step = lambda v, t: v - 0.3 * equation(v, t)
    return hypergrad.unrolled_grad(lambda v, t: v**2, step, torch.zeros((), dtype=D), t, steps=3)


COTANGENT = {"w": C[:3], "b": C[3]}
TANGENT = torch.tensor([0.3, -1.0, 0.7], dtype=D)
ROOT = hypergrad.custom_root(skewed, inner_tol=None)(solve)
SCALAR_ROOT = hypergrad.custom_root(equation)(lambda init, t: cardano(t))


def pulled(X, y, lam, **options):
    c = {k: v.to(lam.dtype) for k, v in COTANGENT.items()}
    return hypergrad.root_vjp(skewed, ROOT(None, X, y, lam), (X, y, lam), c, argnums=3)


def pulled_by_hand(X, y, lam):
    return vjp(lambda lam: reference(None, X, y, lam), lam)[1](COTANGENT)[0]


def pushed(X, y, lam, **options):
    tangent = TANGENT.to(lam.dtype)
    params = ROOT(None, X, y, lam)
    return flat(hypergrad.root_jvp(skewed, params, (X, y, lam), tangent, argnums=3))


def pushed_by_hand(X, y, lam):
    # By reverse mode: linalg.solve is wrong in PyTorch under some forward modes.
    return jacrev(lambda lam: flat(reference(None, X, y, lam)))(lam) @ TANGENT


ARGMIN = decorated(hypergrad.custom_argmin, inner, cubic, lambda objective: objective)
ROWS = {
    "custom_argmin": ARGMIN,
    "custom_root": decorated(hypergrad.custom_root, skewed, equation, grad),
    "custom_fixed_point": decorated(
        hypergrad.custom_fixed_point,
        step,
        lambda v, t: v - 0.2 * equation(v, t),
        lambda objective: lambda u, s: u - 0.3 * grad(objective)(u, s),
    ),
    "implicit_grad": Row(
        once,
        of_outer,
        lambda t: hypergrad.implicit_grad(lambda v, t: v**2, cubic, cardano(t), t),
        lambda t: 2 * cardano(t) * slope(t),
        ARGMIN.nest,
    ),
    # Where a composition cannot be compiled it is right all the same.
    "hypergrad.compile": Row(
        hypergrad.compile(once, on_fallback="ignore"),
        of_outer,
        hypergrad.compile(
            lambda t: hypergrad.implicit_grad(lambda v, t: v**2, cubic, cardano(t), t),
            on_fallback="ignore",
        ),
        lambda t: 2 * cardano(t) * slope(t),
        ARGMIN.nest,
    ),
    "unrolled_grad": Row(unrolled, of_steps, scalar_steps, slope, ARGMIN.nest),
    "implicit_backward": Row(
        by_backward,
        of_outer,
        lambda t: hypergrad.implicit_backward(lambda v, t: v**2, cubic, cardano(t), t),
        slope,
        ARGMIN.nest,
    ),
    "root_vjp": Row(
        pulled,
        pulled_by_hand,
        lambda t: hypergrad.root_vjp(
            equation, SCALAR_ROOT(None, t), (t,), torch.ones_like(t), argnums=1
        ),
        slope,
        ARGMIN.nest,
    ),
    "root_jvp": Row(
        pushed,
        pushed_by_hand,
        lambda t: hypergrad.root_jvp(
            equation, SCALAR_ROOT(None, t), (t,), torch.ones_like(t), argnums=1
        ),
        slope,
        ARGMIN.nest,
    ),
}
# The iterative solvers in the compositions that the default ones are tried in.
VARIANTS = {
    "custom_argmin by CG": ("custom_argmin", hypergrad.CG(rtol=1e-13)),
    "custom_root by GMRES": ("custom_root", hypergrad.GMRES(rtol=1e-13)),
}


# The columns: what is made of an answer ``f``, a function of lam.


def vector(f):
    return lambda lam: f(lam) * lam.sum()


def total(f):
    def of(lam):
        found = f(lam)
        return (found @ C[: len(found)]) ** 2 + lam.prod()

    return of


def backward(f):
    def run(lam):
        lam = leaf(lam)
        total(f)(lam).backward()
        return lam.grad

    return run


def higher(order):
    def of(f):
        def run(lam):
            lam = leaf(lam)
            value = total(f)(lam)
            for k in range(order):
                (g,) = torch.autograd.grad(value, lam, create_graph=k < order - 1)
                value = (g**2).sum()
            return g

        return run

    return of


def dual_level(f):
    def run(lam):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(lam, ONES)
            return forward_ad.unpack_dual(vector(f)(dual)).tangent

    return run


def dual_over_backward(f):
    def run(lam):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaf(lam), ONES)
            (g,) = torch.autograd.grad(total(f)(dual), dual, create_graph=True)
            return forward_ad.unpack_dual(g).tangent.detach()

    return run


def along_ones(f, lam):
    return jvp(f, (lam,), (ONES,))[1]


def batched_gradients(f):
    return lambda lam: torch.autograd.functional.jacobian(
        vector(f), lam, vectorize=True, strict=False
    )


TRANSFORMS = {
    "grad": lambda f: grad(total(f)),
    "vjp": lambda f: lambda lam: vjp(total(f), lam)[1](torch.ones((), dtype=D))[0],
    "jvp": lambda f: functools.partial(along_ones, vector(f)),
    "jacrev": lambda f: jacrev(vector(f)),
    "jacfwd": lambda f: jacfwd(vector(f)),
    "hessian": lambda f: hessian(total(f)),
    "grad of grad": lambda f: grad(lambda lam: (grad(total(f))(lam) ** 2).sum()),
    "jacrev of jacrev": lambda f: jacrev(jacrev(vector(f))),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(vector(f))),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(vector(f))),
    "jvp of grad": lambda f: functools.partial(along_ones, grad(total(f))),
    "grad of jvp": lambda f: grad(lambda lam: along_ones(total(f), lam)),
    "jvp of jvp": lambda f: functools.partial(along_ones, functools.partial(along_ones, vector(f))),
}
PLAIN = {
    "backward": backward,
    "double backward": higher(2),
    "triple backward": higher(3),
    "forward_ad": dual_level,
    "forward_ad over backward": dual_over_backward,
    **TRANSFORMS,
}
EVERY = {"mapped": lambda g, xs: vmap(g)(xs), "looped": lambda g, xs: torch.stack([*map(g, xs)])}


def over_tasks(name: str, each: Fun) -> Fun:
    """A derivative of a sum over tasks, whose data differ and whose lam is shared."""
    derive = {**PLAIN, "hessian": TRANSFORMS["hessian"]}[name]

    def of(answer):
        return derive(lambda lam: (each(lambda X: answer(X, Y, lam), XS) ** 2).sum(dim=0))

    return of


def at_last(row: Row, f: Fun) -> tuple[Fun, Fun]:
    """The answer and the truth as functions of lam alone."""
    return lambda lam: f(X, Y, lam), lambda lam: row.truth(X, Y, lam)


@functools.cache
def known(truth: Fun, column: str) -> Any:
    """What a composition gives of a truth that several rows share."""
    f = lambda lam: truth(X, Y, lam)
    if column in PLAIN:
        return PLAIN[column](f)(LAM)
    if column.endswith(" of vmap"):
        return over_tasks(column.removesuffix(" of vmap"), EVERY["looped"])(truth)(LAM)
    derive = TRANSFORMS[column.removeprefix("vmap of ")]
    return torch.stack([derive(f)(lam) for lam in LAMS[:2]])


def value_and_slope(f, lam, differentiable):
    """An answer and its gradient by plain autograd, where it has one."""
    if not differentiable:
        return f(lam)
    lam = leaf(lam)
    found = f(lam)
    return found.detach(), torch.autograd.grad((found @ C[: len(found)].to(found)), lam)[0]


def run_cell(row: Row, answer: Fun, column: str, differentiable: bool) -> None:
    """Check one composition against the truth; an error of the library passes through."""
    f, truth = at_last(row, answer)
    if column == "backward" and row.answer is by_backward:
        close(f(LAM), truth(LAM))
    elif column in PLAIN:
        close(PLAIN[column](f)(LAM), known(row.truth, column))
    elif column == "gradcheck":
        assert gradcheck(vector(f), leaf(LAM), check_forward_ad=True)
    elif column == "gradgradcheck":
        assert gradgradcheck(vector(f), leaf(LAM), check_fwd_over_rev=True)
    elif column == "is_grads_batched":
        lam = leaf(LAM)
        found = vector(f)(lam)
        torch.autograd.grad(found, lam, torch.eye(len(found), dtype=D), is_grads_batched=True)
    elif column == "vmap":
        close(vmap(f)(LAMS), torch.stack([truth(lam) for lam in LAMS]))
        xs, ys = torch.stack(list(XS), dim=1), torch.stack([Y, 2 * Y, 3 * Y, 4 * Y], dim=-1)
        found = vmap(answer, in_dims=(1, -1, None), out_dims=1)(xs, ys, LAM)
        want = [row.truth(XS[i], (i + 1) * Y, LAM) for i in range(4)]
        close(found, torch.stack(want, dim=1))
    elif column == "nested vmap":
        found = vmap(lambda X: vmap(lambda lam: answer(X, Y, lam))(LAMS[:3]))(XS[:2])
        want = [torch.stack([row.truth(X, Y, lam) for lam in LAMS[:3]]) for X in XS[:2]]
        close(found, torch.stack(want))
    elif column == "vmap with chunk_size":
        close(vmap(f, chunk_size=3)(LAMS), torch.stack([truth(lam) for lam in LAMS]))
        if differentiable:
            close(jacrev(f, chunk_size=2)(LAM), jacrev(truth)(LAM))
    elif column.startswith("vmap of "):
        derive = TRANSFORMS[column.removeprefix("vmap of ")]
        close(vmap(derive(f))(LAMS[:2]), known(row.truth, column))
    elif column.endswith(" of vmap"):
        name = column.removesuffix(" of vmap")
        found = over_tasks(name, EVERY["mapped"])(answer)(LAM)
        close(found, known(row.truth, column))
    else:
        OTHERS[column](row, answer, differentiable)


def nested_vmap_of_grad(row, answer, differentiable):
    def one(f, X, lam):
        return grad(total(lambda lam: f(X, Y, lam)))(lam)

    found = vmap(lambda X: vmap(lambda lam: one(answer, X, lam))(LAMS[:3]))(XS[:2])
    want = [torch.stack([one(row.truth, X, lam) for lam in LAMS[:3]]) for X in XS[:2]]
    close(found, torch.stack(want))


def between(jacobian):
    def check(row, answer, differentiable):
        def each(f, X):
            return lambda lam: grad(total(lambda s: f(X, Y, s)))(lam)

        found = jacobian(lambda lam: vmap(lambda X: each(answer, X)(lam))(XS))(LAM)
        want = torch.stack([jacobian(each(row.truth, X))(LAM) for X in XS])
        close(found, want)

    return check


def under(context):
    def check(row, answer, differentiable):
        with context():
            found = answer(X, Y, LAM.clone())
        close(found.clone(), row.truth(X, Y, LAM))

    return check


def under_checkpoint(row, answer, differentiable):
    f, truth = at_last(row, answer)
    found = value_and_slope(
        lambda lam: checkpoint(f, lam, use_reentrant=False), LAM, differentiable
    )
    close(found, value_and_slope(truth, LAM, differentiable))


def under_hooks(row, answer, differentiable):
    f, truth = at_last(row, answer)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.detach().numpy().copy()

    def hooked(lam):
        with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
            return f(lam)

    found = value_and_slope(hooked, LAM, differentiable)
    close(found, value_and_slope(truth, LAM, differentiable))
    assert bool(packed) == differentiable or row.answer is by_backward


def under_autocast(row, answer, differentiable):
    """Matrix products in bfloat16: the answer is right to its rounding."""
    options = {"inner_tol": None}

    def cast(lam):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return answer(X.float(), Y.float(), lam, **options)

    found = value_and_slope(cast, LAM.float(), differentiable)
    want = value_and_slope(lambda lam: row.truth(X, Y, lam), LAM, differentiable)
    pairs = zip(found, want, strict=True) if differentiable else [(found, want)]
    for a, b in pairs:
        assert a.dtype == torch.float32
        assert (a.double() - b).norm() < 0.1 * b.norm()


def under_compile(row, answer, differentiable):
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        if row.answer is by_backward:
            at = leaf(LAM)
            torch.compile(lambda lam: backward_through(X, Y, lam * 1.5), backend=backend)(at)
            close(at.grad, 1.5 * row.truth(X, Y, LAM * 1.5))
            continue
        compiled = torch.compile(lambda lam: 2 * answer(X, Y, lam * 1.5), backend=backend)
        found = value_and_slope(compiled, LAM, differentiable)
        twice = lambda lam: 2 * row.truth(X, Y, lam * 1.5)
        close(found, value_and_slope(twice, LAM, differentiable))


def in_threads(row, answer, differentiable):
    """Reverse mode: forward mode's levels are one global counter in PyTorch itself."""
    f, truth = at_last(row, answer)
    derive = higher(2) if differentiable else lambda f: f
    want = [derive(truth)(LAMS[i % 4]) for i in range(8)]
    found, errors = [None] * 8, []

    def work(i):
        try:
            for _ in range(3):
                found[i] = derive(f)(LAMS[i % 4])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    close(found, want)


def objective_around(f):
    return lambda u, s: (u - 1) ** 2 / 2 + s * f(u * s) ** 2 / 10


def in_anothers_objective(row, answer, differentiable, levels=1):
    f, truth = row.scalar, row.scalar_truth
    for _ in range(levels):
        truth = minimised(objective_around(truth))
        f = row.nest(objective_around(f), truth)
    s = torch.tensor(0.8, dtype=D)
    want = grad(truth)(s)
    torch.testing.assert_close(grad(f)(s), want, rtol=1e-7, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(f(at := leaf(s)), at)[0], want, rtol=1e-7, atol=0
    )
    if levels > 1:
        return
    torch.testing.assert_close(jacfwd(f)(s), want, rtol=1e-7, atol=0)
    both = torch.stack([s, 1.3 * s])
    close(vmap(grad(f))(both), torch.stack([grad(truth)(s) for s in both]), rtol=1e-7)
    second = grad(grad(truth))(s)
    torch.testing.assert_close(grad(grad(f))(s), second, rtol=1e-6, atol=0)


OTHERS = {
    "nested vmap of grad": nested_vmap_of_grad,
    "jacrev of vmap of grad": between(jacrev),
    "jacfwd of vmap of grad": between(jacfwd),
    "no_grad": under(torch.no_grad),
    "inference_mode": under(torch.inference_mode),
    "checkpoint": under_checkpoint,
    "saved-tensor hooks": under_hooks,
    "autocast": under_autocast,
    "compile": under_compile,
    "threads": in_threads,
    "another's objective": in_anothers_objective,
    "three levels": functools.partial(in_anothers_objective, levels=2),
}


def is_differentiable(row):
    return matrix.outcome(row, "grad") == matrix.RIGHT


CELLS = [(row, column) for row in matrix.ROWS for column in matrix.COLUMNS]


def check_detached(row, answer, column):
    """A plain value: PyTorch itself says that it has no derivative."""
    f = lambda lam: answer(X, Y, lam)
    if "check" in column:
        with pytest.raises((GradcheckError, ValueError, TypeError)):
            {"gradcheck": gradcheck, "gradgradcheck": gradgradcheck}[column](f, leaf(LAM))
        return
    tasks = column.endswith("of vmap")
    lam = leaf(LAM)
    found = vmap(lambda X: answer(X, Y, lam))(XS) if tasks else f(lam)
    assert not found.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(found.sum(), lam)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler's
@pytest.mark.parametrize(
    ("row", "column"),
    CELLS,
    ids=["-".join(cell) for cell in CELLS],
)
def test_cell(row, column):
    promise = matrix.outcome(row, column)
    answer = ROWS[row].answer
    if promise == matrix.DETACHED:
        check_detached(ROWS[row], answer, column)
    elif isinstance(promise, matrix.Raises):
        with pytest.raises(hypergrad.UnsupportedOperation, match=promise.advice):
            run_cell(ROWS[row], answer, column, True)
    else:
        assert promise == matrix.RIGHT
        run_cell(ROWS[row], answer, column, is_differentiable(row))


SOLVED = [*PLAIN, "vmap", "nested vmap", "gradcheck", "gradgradcheck", *matrix.OF_VMAP]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("column", [*SOLVED, *(f"vmap of {n}" for n in matrix.FIRST)])
def test_the_iterative_solvers_give_the_same(variant, column):
    row, solver = VARIANTS[variant]
    answer = functools.partial(ROWS[row].answer, solver=solver)
    run_cell(ROWS[row], answer, column, True)


def test_the_page_is_in_step_with_the_table():
    page = matrix.PAGE.read_text()
    assert page == matrix.rendered(page), "run python docs/matrix.py"
