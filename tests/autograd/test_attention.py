"""Attention in its default configuration: fused kernels, which have no second derivative."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import hypergrad

D = torch.float64
FLAGS = ("flash", "mem_efficient", "math", "cudnn")


def _flags():
    return [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in FLAGS]


@pytest.fixture(autouse=True)
def kernels_are_as_they_were():
    before = _flags()
    yield
    assert _flags() == before


def written_out(q, k, v, **_):
    """Attention in elementary operations, the independent truth."""
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) @ v


def penalty(p):
    return sum(((w - 0.5) ** 2).sum() for w in p.values())


class Problem:
    """A regression on one layer of attention; theta weighs the examples and the penalty."""

    def __init__(self, attend=F.scaled_dot_product_attention, seed=0, n=6, length=5, data=None):
        self.attend = attend
        if data is not None:
            self.x, self.y = data
            return
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, dtype=D, generator=generator)
        self.x, self.y = draw(n, 2, length, 4), draw(n, 2, length, 4)
        self.params = {"q": 0.3 * draw(4, 4), "k": 0.3 * draw(4, 4), "v": 0.3 * draw(4, 4)}
        self.hparams = {"weights": draw(n).exp() / 4, "decay": torch.tensor(1.5, dtype=D)}

    def net(self, p, x):
        return self.attend(x @ p["q"], x @ p["k"], x @ p["v"])

    def inner(self, p, h):
        each = ((self.net(p, self.x) - self.y) ** 2).mean(dim=(1, 2, 3))
        return (h["weights"] * each).sum() + h["decay"] * penalty(p)

    def outer(self, p, h):
        return (self.net(p, self.x) - self.y.roll(1, 0)).pow(2).mean()

    def truth(self):
        """The hypergradient by double backward through attention written out, with a dense solve"""
        attend, self.attend = self.attend, written_out
        try:
            return double_backward(self.outer, self.inner, self.params, self.hparams)
        finally:
            self.attend = attend


def double_backward(outer, inner, params, hparams):
    """The hypergradient with nothing of the library."""
    p = {k: v.detach().clone().requires_grad_() for k, v in params.items()}
    h = {k: v.detach().clone().requires_grad_() for k, v in hparams.items()}
    P, H = list(p.values()), list(h.values())
    flat = lambda parts: torch.cat([part.reshape(-1) for part in parts])
    b = flat(torch.autograd.grad(outer(p, h), P))
    gradient = flat(torch.autograd.grad(inner(p, h), P, create_graph=True))
    rows = [flat(torch.autograd.grad(g, P, retain_graph=True)) for g in gradient]
    u = torch.linalg.solve(torch.stack(rows), b)
    cross = torch.autograd.grad(gradient, H, u)
    return {k: -c for k, c in zip(h, cross, strict=True)}


def close(found, expected, rtol=1e-9):
    for key, value in expected.items():
        assert (found[key] - value).norm() <= rtol * value.norm(), key


def solved(problem, **options):
    return hypergrad.implicit_grad(
        problem.outer, problem.inner, problem.params, problem.hparams, inner_tol=None, **options
    )


def is_fused():
    """Whether the default is a fused kernel here: else the tests below would test nothing."""
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    return F.scaled_dot_product_attention(q, q, q).grad_fn.name()


def test_the_default_kernel_of_this_machine_is_a_fused_one():
    assert is_fused().startswith("ScaledDotProduct")


@pytest.mark.parametrize("solver", [None, hypergrad.CG(rtol=1e-12), hypergrad.Exact()])
def test_the_default_kernel_gives_the_right_answer_in_silence(solver):
    problem = Problem()
    close(solved(problem, solver=solver), problem.truth())


def test_what_is_read_from_an_answer_is_the_same_as_under_the_math_kernel():
    problem = Problem()
    _, info = solved(problem, return_info=True)
    with sdpa_kernel(SDPBackend.MATH):
        _, known = solved(problem, return_info=True)
    assert info.status == known.status == hypergrad.Status.CONVERGED
    torch.testing.assert_close(info.inner_residual, known.inner_residual)
    torch.testing.assert_close(info.eigenvalues, known.eigenvalues)


def test_gauss_newton_through_attention():
    problem = Problem()

    def inner(p, h):
        return problem.inner(p, h)

    condition = hypergrad.GaussNewton(
        outputs=lambda p, h: problem.net(p, problem.x),
        loss=lambda z, h: (h["weights"] * ((z - problem.y) ** 2).mean(dim=(1, 2, 3))).sum(),
        regulariser=lambda p, h: h["decay"] * penalty(p),
    )
    call = lambda: hypergrad.implicit_grad(
        problem.outer, condition, problem.params, problem.hparams, inner_tol=None
    )
    found = call()
    problem.attend = written_out
    close(found, call())


def test_a_loss_without_attention_is_evaluated_once_and_one_with_it_twice():
    problem, calls = Problem(), []

    def inner(p, h):
        calls.append(_flags())
        return problem.inner(p, h)

    args = (problem.params, problem.hparams)
    hypergrad.implicit_grad(problem.outer, inner, *args, inner_tol=None)
    assert len(calls) == 2
    assert calls[1] == [False, False, True, False]
    problem.attend = written_out
    hypergrad.implicit_grad(problem.outer, inner, *args, inner_tol=None)
    assert len(calls) == 3


def test_the_outer_loss_keeps_its_fused_kernel():
    problem, seen = Problem(), []

    def outer(p, h):
        out = problem.net(p, problem.x)
        seen.append(out.grad_fn.name())
        return (out - problem.y.roll(1, 0)).pow(2).mean()

    args = (problem.params, problem.hparams)
    close(hypergrad.implicit_grad(outer, problem.inner, *args, inner_tol=None), problem.truth())
    assert len(seen) == 1
    assert seen[0].startswith("ScaledDotProduct")


def test_an_outer_loss_with_a_penalty_on_its_own_gradient():
    problem = Problem()

    def outer(p, h):
        x = problem.x.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(problem.net(p, x).pow(2).mean(), x, create_graph=True)
        return slope.pow(2).sum()

    def call():
        return hypergrad.implicit_grad(
            outer, problem.inner, problem.params, problem.hparams, inner_tol=None
        )

    found = call()
    problem.attend = written_out
    close(found, call())


def test_an_inner_loss_with_a_penalty_on_its_own_gradient():
    problem = Problem()

    def inner(p, h):
        x = problem.x.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(problem.net(p, x).pow(2).mean(), x, create_graph=True)
        return problem.inner(p, h) + h["decay"] * slope.pow(2).sum()

    hypergradient = hypergrad.implicit_grad(
        problem.outer, inner, problem.params, problem.hparams, inner_tol=None
    )
    problem.attend = written_out
    close(hypergradient, double_backward(problem.outer, inner, problem.params, problem.hparams))


# --- the caller's own choice of kernels -------------------------------------------------


def test_math_chosen_around_the_call_works_and_evaluates_once():
    problem, calls = Problem(), []

    def inner(p, h):
        calls.append(1)
        return problem.inner(p, h)

    with sdpa_kernel(SDPBackend.MATH):
        hypergradient = hypergrad.implicit_grad(
            problem.outer, inner, problem.params, problem.hparams, inner_tol=None
        )
    close(hypergradient, problem.truth())
    assert len(calls) == 1


def test_a_choice_without_math_around_the_call_is_an_error_that_names_it():
    problem = Problem()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with pytest.raises(hypergrad.UnsupportedOperation, match=r"sdpa_kernel.*Add SDPBackend"):
            solved(problem)
        assert _flags() == [True, False, False, False]


def test_math_switched_off_for_the_process_is_the_same_error():
    problem = Problem()
    torch.backends.cuda.enable_math_sdp(False)
    try:
        with pytest.raises(hypergrad.UnsupportedOperation, match="enable_math_sdp"):
            solved(problem)
    finally:
        torch.backends.cuda.enable_math_sdp(True)


def _within(*backends):
    def attend(q, k, v):
        with sdpa_kernel(list(backends)):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def test_a_choice_with_math_inside_the_loss_works():
    problem = Problem(_within(SDPBackend.FLASH_ATTENTION, SDPBackend.MATH))
    close(solved(problem), problem.truth())


def test_a_choice_without_math_inside_the_loss_is_an_error_that_names_it():
    problem = Problem(_within(SDPBackend.FLASH_ATTENTION))
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"a loss excludes.*leave the context"):
        solved(problem)


def test_a_choice_without_math_inside_the_outer_loss_alone_is_none_of_our_business():
    problem, other = Problem(), Problem(_within(SDPBackend.FLASH_ATTENTION))
    hypergradient = hypergrad.implicit_grad(
        other.outer, problem.inner, problem.params, problem.hparams, inner_tol=None
    )
    close(hypergradient, problem.truth())


def test_a_constant_encoder_may_choose_its_kernels_beside_attention_that_is_differentiated():
    problem = Problem()
    attend = _within(SDPBackend.FLASH_ATTENTION)
    encoded = attend(problem.x, problem.x, problem.x)

    def inner(p, h):
        return problem.inner(p, h) * attend(problem.x, problem.x, problem.x).norm()

    hypergradient = hypergrad.implicit_grad(
        problem.outer, inner, problem.params, problem.hparams, inner_tol=None
    )
    problem.attend = written_out
    expected = double_backward(
        problem.outer,
        lambda p, h: problem.inner(p, h) * encoded.norm(),
        problem.params,
        problem.hparams,
    )
    close(hypergradient, expected)


def test_an_error_inside_the_repeated_recording_leaves_the_kernels_as_they_were():
    problem, calls = Problem(), []

    def inner(p, h):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("mine")
        return problem.inner(p, h)

    with pytest.raises(KeyError, match="mine"):
        hypergrad.implicit_grad(
            problem.outer, inner, problem.params, problem.hparams, inner_tol=None
        )
    assert all(_flags())
    close(solved(problem), problem.truth())


# --- threads ----------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True], ids=["plain", "checkpointed"])
def test_two_threads_that_overlap_are_right_and_leave_the_kernels_as_they_were(kept):
    barrier, problems = threading.Barrier(2), [Problem(seed=0), Problem(seed=1)]

    def work(problem):
        calls = []

        def net(p, x):
            if kept:
                return checkpoint(problem.net, p, x, use_reentrant=False)
            return problem.net(p, x)

        def inner(p, h):
            calls.append(1)
            if len(calls) < 3:  # both are inside before one goes on
                with contextlib.suppress(threading.BrokenBarrierError):
                    barrier.wait(timeout=5)
            each = ((net(p, problem.x) - problem.y) ** 2).mean(dim=(1, 2, 3))
            return (h["weights"] * each).sum() + h["decay"] * penalty(p)

        return hypergrad.implicit_grad(
            problem.outer, inner, problem.params, problem.hparams,
            solver=hypergrad.CG(rtol=1e-12), inner_tol=None,
        )  # fmt: skip

    for _ in range(5):
        barrier.reset()
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(work, problems))
        for problem, found in zip(problems, answers, strict=True):
            close(found, problem.truth())
        assert all(_flags())


def test_a_recording_that_another_thread_overlaps_keeps_its_kernel_in_every_product():
    problem, entered, leave = Problem(), threading.Event(), threading.Event()

    def holding(p, h):
        if not all(_flags()):  # the repeated recording
            entered.set()
            leave.wait(timeout=20)
        return problem.inner(p, h)

    def other():
        args = (problem.params, problem.hparams)
        return hypergrad.implicit_grad(problem.outer, holding, *args, inner_tol=None)

    calls = []

    def inner(p, h):
        calls.append(1)
        out = checkpoint(problem.net, p, problem.x, use_reentrant=False)
        each = ((out - problem.y) ** 2).mean(dim=(1, 2, 3))
        if len(calls) == 2:  # the other one leaves while this one goes on
            leave.set()
            thread.join(timeout=20)
        return (h["weights"] * each).sum() + h["decay"] * penalty(p)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(timeout=20)
    hypergradient = hypergrad.implicit_grad(
        problem.outer, inner, problem.params, problem.hparams, inner_tol=None
    )
    leave.set()
    thread.join(timeout=20)
    close(hypergradient, problem.truth())


# --- modules ----------------------------------------------------------------------------


def _of_module(module, x, y, *, kept=False, call=None):
    """Regression on a module's output, with a weight for each example."""
    params = {k: v.detach().clone() for k, v in module.named_parameters()}
    call = call or (lambda m, p, x: torch.func.functional_call(m, p, (x,)))

    def net(p):
        if kept:
            return checkpoint(lambda p, x: call(module, p, x), p, x, use_reentrant=False)
        return call(module, p, x)

    def inner(p, h):
        each = ((net(p) - y) ** 2).mean(dim=(1, 2))
        return (h["weights"] * each).sum() + h["decay"] * penalty(p)

    def outer(p, h):
        return (call(module, p, x) - 1).pow(2).mean()

    hparams = {"weights": torch.rand(len(x), dtype=D) + 0.5, "decay": torch.tensor(300.0, dtype=D)}
    return outer, inner, params, hparams


def _data():
    torch.manual_seed(0)
    return torch.randn(3, 4, 4, dtype=D), torch.randn(3, 4, 4, dtype=D)


def _attention(m, p, x):
    return torch.func.functional_call(m, p, (x, x, x), {"need_weights": False})[0]


def _check(outer, inner, params, hparams, **options):
    hypergradient = hypergrad.implicit_grad(
        outer, inner, params, hparams, solver=hypergrad.Exact(), inner_tol=None, **options
    )
    with sdpa_kernel(SDPBackend.MATH):
        close(hypergradient, double_backward(outer, inner, params, hparams))
    return hypergradient


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kept", [False, True], ids=["plain", "checkpointed"])
def test_multihead_attention_without_weights(train, kept):
    x, y = _data()
    module = nn.MultiheadAttention(4, 2, batch_first=True, dtype=D).train(train)
    _check(*_of_module(module, x, y, kept=kept, call=_attention))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kept", [False, True], ids=["plain", "checkpointed"])
def test_a_transformer_layer(train, kept):
    x, y = _data()
    module = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True, dtype=D)
    module.self_attn.train(train)
    _check(*_of_module(module.train(train), x, y, kept=kept))


def test_the_fast_path_of_a_frozen_layer_in_eval_mode():
    x, y = _data()
    frozen = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True, dtype=D).eval()
    frozen.requires_grad_(False)
    module = nn.MultiheadAttention(4, 2, batch_first=True, dtype=D)
    call = lambda m, p, x: _attention(m, p, frozen(x))
    _check(*_of_module(module, x, y, call=call))


def test_a_frozen_layer_behind_parameters_that_are_not():
    x, y = _data()
    frozen = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True, dtype=D).eval()
    frozen.requires_grad_(False)
    module = nn.Linear(4, 4, dtype=D)
    call = lambda m, p, x: frozen(torch.func.functional_call(m, p, (x,)))
    _check(*_of_module(module, x, y, call=call))


def test_checkpoint_around_a_choice_of_kernels_that_keeps_math():
    problem = Problem(_within(SDPBackend.FLASH_ATTENTION, SDPBackend.MATH))

    def inner(p, h):
        out = checkpoint(problem.net, p, problem.x, use_reentrant=False)
        each = ((out - problem.y) ** 2).mean(dim=(1, 2, 3))
        return (h["weights"] * each).sum() + h["decay"] * penalty(p)

    hypergradient = hypergrad.implicit_grad(
        problem.outer, inner, problem.params, problem.hparams, inner_tol=None
    )
    close(hypergradient, problem.truth())


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()},
        {"attn_mask": torch.full((5, 5), -1e9, dtype=D).triu(1)},
        {"scale": 0.3},
    ],
    ids=["causal", "boolean mask", "float mask", "scale"],
)
def test_masks_and_scales(options):
    problem = Problem(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options))
    with sdpa_kernel(SDPBackend.MATH):
        expected = double_backward(problem.outer, problem.inner, problem.params, problem.hparams)
    close(solved(problem), expected)


# --- random numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("where", ["attention", "elsewhere", "both"])
def test_random_numbers_are_drawn_as_by_one_call(where):
    problem = Problem()

    def net(p, x):
        rate = 0.5 if where != "elsewhere" else 0.0
        # A layer without dropout beside it, so that there is a fused kernel.
        x = F.scaled_dot_product_attention(x @ p["q"], x @ p["k"], x @ p["v"])
        x = F.dropout(x, 0.5) if where != "attention" else x
        return F.scaled_dot_product_attention(x @ p["q"], x @ p["k"], x @ p["v"], dropout_p=rate)

    def inner(p, h):
        before = torch.get_rng_state()
        each = ((net(p, problem.x) - problem.y) ** 2).mean(dim=(1, 2, 3))
        states.append((before, torch.get_rng_state()))
        return (h["weights"] * each).sum() + h["decay"] * penalty(p)

    states = []
    args = (problem.outer, inner, problem.params, problem.hparams)
    torch.manual_seed(3)
    hypergradient = hypergrad.implicit_grad(*args, solver=hypergrad.Exact(), inner_tol=None)
    assert len(states) == 2
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(torch.get_rng_state(), states[1][1])
    torch.manual_seed(3)
    inner(problem.params, problem.hparams)
    assert torch.equal(torch.get_rng_state(), states[1][1])

    def same_draw(p, h):
        torch.manual_seed(3)
        return inner(p, h)

    with sdpa_kernel(SDPBackend.MATH):
        expected = double_backward(problem.outer, same_draw, problem.params, problem.hparams)
    close(hypergradient, expected)


# --- transforms and the other entrances -------------------------------------------------


def _batch(count=3):
    problems = [Problem(seed=i) for i in range(count)]
    stack = lambda parts: {k: torch.stack([p[k] for p in parts]) for k in parts[0]}
    return (
        problems,
        torch.stack([p.x for p in problems]),
        torch.stack([p.y for p in problems]),
        stack([p.params for p in problems]),
        stack([p.hparams for p in problems]),
    )


def test_a_batch_of_tasks_under_vmap_is_right_and_silent():
    problems, xs, ys, params, hparams = _batch()

    def one(x, y, p, h):
        task = Problem(data=(x, y))
        return hypergrad.implicit_grad(task.outer, task.inner, p, h, inner_tol=None)

    found = torch.func.vmap(one)(xs, ys, params, hparams)
    for i, problem in enumerate(problems):
        close({k: v[i] for k, v in found.items()}, problem.truth())


def _argmin(problem, **options):
    def inner(p, weights, decay):
        return problem.inner(p, {"weights": weights, "decay": decay})

    @hypergrad.custom_argmin(inner, solver=hypergrad.Exact(), **options)
    def fit(init, weights, decay):
        p = {k: v.detach().clone().requires_grad_() for k, v in init.items()}
        optimiser = torch.optim.LBFGS(
            p.values(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure():
            optimiser.zero_grad()
            loss = inner(p, weights, decay)
            loss.backward()
            return loss

        optimiser.step(closure)
        return {k: v.detach() for k, v in p.items()}

    def value(decay):
        p = fit(problem.params, problem.hparams["weights"], decay)
        # What is differentiated twice around the decorated solver is the caller's own.
        out = written_out(problem.x @ p["q"], problem.x @ p["k"], problem.x @ p["v"])
        return (out - 1).pow(2).mean()

    return value


def test_first_and_second_derivatives_of_a_decorated_solver():
    fused, plain = Problem(), Problem(written_out)
    decay = torch.tensor(1.5, dtype=D)
    for derivative in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        found = derivative(_argmin(fused))(decay)
        expected = derivative(_argmin(plain))(decay)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


def test_double_backward_through_a_decorated_solver_against_differences():
    value = _argmin(Problem())
    decay = torch.tensor(1.5, dtype=D, requires_grad=True)
    (first,) = torch.autograd.grad(value(decay), decay, create_graph=True)
    (second,) = torch.autograd.grad(first, decay)
    slope = lambda at: torch.func.grad(value)(torch.tensor(at, dtype=D))
    difference = (slope(1.5 + 2e-3) - slope(1.5 - 2e-3)) / 4e-3
    torch.testing.assert_close(second, difference, rtol=1e-5, atol=0)


def test_tensors_that_a_decorated_solver_captures():
    answers = []
    for attend in (F.scaled_dot_product_attention, written_out):
        problem = Problem(attend)
        decay = problem.hparams["decay"].requires_grad_()

        def inner(p, weights, problem=problem, decay=decay):
            return problem.inner(p, {"weights": weights, "decay": decay})

        @hypergrad.custom_argmin(inner, solver=hypergrad.Exact(), inner_tol=None)
        def fit(init, weights):
            return init

        p = fit(problem.params, problem.hparams["weights"])
        problem.outer(p, None).backward()
        answers.append(decay.grad)
    torch.testing.assert_close(*answers, rtol=1e-9, atol=0)


@pytest.mark.parametrize("batched", [False, True], ids=["one", "vmap"])
def test_newton_cg(batched):
    def solve(x, y, p, h, attend=F.scaled_dot_product_attention):
        task = Problem(attend, data=(x, y))
        return hypergrad.inner_solvers.NewtonCG(tol=1e-10)(task.inner, p, h)[0]

    problems, *stacked = _batch(2)
    if batched:
        found = torch.func.vmap(solve)(*stacked)
    else:
        found = {k: v[None] for k, v in solve(*[_first(part) for part in stacked]).items()}
    for i, task in enumerate(problems if batched else problems[:1]):
        expected = solve(task.x, task.y, task.params, task.hparams, written_out)
        close({k: v[i] for k, v in found.items()}, expected, rtol=1e-7)


def _first(part):
    return {k: v[0] for k, v in part.items()} if isinstance(part, dict) else part[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"truncate": 2}, {"checkpoint": True}, {"mode": "forward"}],
    ids=["reverse", "truncated", "checkpoint", "forward"],
)
@pytest.mark.parametrize("how", ["autograd", "torch.func"])
def test_unrolled_steps(options, how):
    def call(problem):
        def step(p, h):
            if how == "torch.func":
                slopes = torch.func.grad(problem.inner)(p, h)
                return {k: v - 0.05 * slopes[k] for k, v in p.items()}
            slopes = torch.autograd.grad(problem.inner(p, h), list(p.values()), create_graph=True)
            return {k: v - 0.05 * g for (k, v), g in zip(p.items(), slopes, strict=True)}

        return hypergrad.unrolled_grad(
            problem.outer, step, problem.params, problem.hparams, steps=4, **options
        )

    close(call(Problem()), call(Problem(written_out)))


@pytest.mark.parametrize(
    "method", [hypergrad.Alternating(inner_steps=30, inner_tol=None), hypergrad.SOBA()], ids=repr
)
def test_the_loop(method):
    ends = []
    for attend in (F.scaled_dot_product_attention, written_out):
        problem = Problem(attend)
        loop = hypergrad.Bilevel(
            problem.outer,
            problem.inner,
            problem.params,
            problem.hparams,
            inner_optimizer=lambda variables: torch.optim.SGD(variables, lr=0.05),
            outer_optimizer=lambda variables: torch.optim.SGD(variables, lr=0.05),
            method=method,
        )
        for _ in range(3):
            loop.step()
        ends.append({k: v.detach() for k, v in loop.hparams.items()})
        assert (ends[-1]["decay"] - problem.hparams["decay"]).abs() > 1e-5
    close(*ends, rtol=1e-7)


class Equilibrium:
    """A fixed point of one layer of attention."""

    def __init__(self, attend=F.scaled_dot_product_attention):
        torch.manual_seed(0)
        self.x, self.w = torch.randn(1, 1, 4, 3, dtype=D), 0.3 * torch.randn(3, 3, dtype=D)
        self.attend, self.kernels = attend, []

    def layer(self, z, w):
        self.kernels.append(_flags())
        return self.x + torch.tanh(self.attend(z @ w, z, z)) / 2

    def solve(self, w):
        z = self.x
        with torch.no_grad():
            for _ in range(200):
                z = self.layer(z, w)
        self.kernels.clear()
        return z

    def gradient(self, **options):
        return hypergrad.implicit_grad(
            lambda z, w: (z**2).sum(), hypergrad.FixedPoint(self.layer), self.solve(self.w),
            self.w, **options,
        )  # fmt: skip


@pytest.mark.parametrize(
    "solver",
    [None, hypergrad.GMRES(rtol=1e-12), hypergrad.Neumann(terms=200), hypergrad.Exact()],
    ids=["default", "GMRES", "Neumann", "Exact"],
)
def test_a_map_needs_one_derivative_and_keeps_its_fused_kernel(solver):
    fused, plain = Equilibrium(), Equilibrium(written_out)
    found = fused.gradient(solver=solver)
    torch.testing.assert_close(found, plain.gradient(solver=hypergrad.Exact()), rtol=1e-9, atol=0)
    if solver is not None:
        assert fused.kernels == [[True] * 4]


def test_a_map_whose_products_go_both_ways():
    found = Equilibrium().gradient(solver=hypergrad.LSMR(rtol=1e-12))
    expected = Equilibrium(written_out).gradient(solver=hypergrad.Exact())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_derivatives_of_every_kind_through_a_fixed_point():
    def value(problem):
        @hypergrad.custom_fixed_point(problem.layer, solver=hypergrad.Exact())
        def fit(init, w):
            return problem.solve(w)

        return lambda scale: (fit(None, scale * problem.w) ** 2).sum()

    scale = torch.tensor(1.0, dtype=D)
    for derivative in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        found = derivative(value(Equilibrium()))(scale)
        expected = derivative(value(Equilibrium(written_out)))(scale)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


def test_the_two_rules_by_themselves():
    answers = []
    for problem in (Equilibrium(), Equilibrium(written_out)):
        F_ = lambda z, w, problem=problem: z - problem.layer(z, w)
        z = problem.solve(problem.w)
        forward = hypergrad.root_jvp(F_, z, (problem.w,), (torch.ones_like(problem.w),))
        (backward,) = hypergrad.root_vjp(F_, z, (problem.w,), torch.ones_like(z))
        answers.append((forward, backward))
    torch.testing.assert_close(*answers, rtol=1e-9, atol=1e-14)


def test_a_compiled_layer_is_recorded_again_under_the_math_kernel():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    compiled, x = torch.compile(layer, backend="eager"), torch.randn(3, 4, 8)
    params = {name: p.detach() for name, p in layer.named_parameters()}

    def hypergradient(module, prefix):
        def loss(params):
            named = {prefix + name: p for name, p in params.items()}
            return torch.func.functional_call(module, named, (x,)).square().mean()

        def inner(params, log_decay):
            return loss(params) + log_decay.exp() * sum(p.square().sum() for p in params.values())

        return hypergrad.implicit_grad(
            lambda params, _: loss(params), inner, params, torch.tensor(0.0),
            solver=hypergrad.CG(maxiter=3), inner_tol=None,
        )  # fmt: skip

    plain = hypergradient(layer, "")
    assert torch.allclose(hypergradient(compiled, "_orig_mod."), plain, rtol=1e-4)
