"""Who computes the hypergradient of logistic regression, by twenty steps where it iterates."""

from collections.abc import Callable, Sequence
from functools import partial

import higher
import torch
import torchopt
from torch import Tensor, nn

import hypergrad
from benchmarks.by_hand import conjugate_gradients
from benchmarks.logistic import LogisticRegression

STEPS = 20
WITH_INFO = "hypergrad, return_info=True"
COMPILED = "hypergrad, compiled"
RECYCLED = "hypergrad, compiled, recycle, along a loop"
JAXOPT_ALONG = "jaxopt under jit, from the last solution, along a loop"

Hypergradient = Callable[[], Tensor]


def sides(problem: LogisticRegression) -> dict[str, Hypergradient]:
    """Every side by name; hypergrad's own is called so."""
    return {
        "hypergrad": partial(by_hypergrad, problem),
        WITH_INFO: lambda: with_info(problem)[0],
        COMPILED: partial(compiled, problem),
        "by hand, autograd": partial(by_autograd, problem),
        "by hand, closed-form products": partial(by_closed_form, problem),
        "torchopt, CG": partial(
            by_torchopt, problem, torchopt.linear_solve.solve_cg(maxiter=STEPS)
        ),
        "torchopt as shipped, CG on the normal equations": partial(
            by_torchopt, problem, torchopt.linear_solve.solve_normal_cg(maxiter=STEPS)
        ),
        "higher, unrolled": unrolled_by_higher(problem),
    }


def by_hypergrad(problem: LogisticRegression) -> Tensor:
    """As anybody calls it: status, both residuals, Ritz values and all checks are on."""
    gradient: Tensor = hypergrad.implicit_grad(
        problem.outer,
        problem.inner,
        problem.w,
        problem.log_penalty,
        solver=hypergrad.CG(maxiter=STEPS),
    )
    return gradient


#: One function, whose programs live over the rounds.
compiled: Callable[[LogisticRegression], Tensor] = hypergrad.compile(
    by_hypergrad, on_fallback="raise"
)


def there_and_back(loop: Sequence[LogisticRegression]) -> list[LogisticRegression]:
    """Go along a loop and back, so that neighbours are always a step apart."""
    return [*loop, *reversed(loop[1:-1])]


class Recycled:
    """A compiled hypergradient along an outer loop, which keeps what it learns of the system.

    Each call takes the next problem, there and back.

    Parameters
    ----------
    loop
        The problems.
    """

    def __init__(self, loop: Sequence[LogisticRegression]) -> None:
        self.there_and_back = there_and_back(loop)
        self.calls = 0
        # The relative residual that the steps from zero reach is the one to reach.
        self.rtol = float(with_info(loop[0])[1].residual_norm)
        self._compiled = hypergrad.compile(self._solved, on_fallback="raise")

    def __call__(self) -> Tensor:
        return self.solved()[1]

    def solved(self) -> tuple[int, Tensor, hypergrad.SolveInfo]:
        """Return which problem it was too, and the evidence."""
        place = self.calls % len(self.there_and_back)
        self.calls += 1
        return place, *self._compiled(self.there_and_back[place])

    def _solved(self, problem: LogisticRegression) -> tuple[Tensor, hypergrad.SolveInfo]:
        return hypergrad.implicit_grad(
            problem.outer,
            problem.inner,
            problem.w,
            problem.log_penalty,
            solver=hypergrad.CG(maxiter=STEPS, rtol=self.rtol, recycle=True),
            on_failure="ignore",  # twenty steps may fall short of it by a little
            return_info=True,
        )


def with_info(problem: LogisticRegression) -> tuple[Tensor, hypergrad.SolveInfo]:
    """The same and an estimate of the error."""
    return hypergrad.implicit_grad(
        problem.outer,
        problem.inner,
        problem.w,
        problem.log_penalty,
        solver=hypergrad.CG(maxiter=STEPS),
        return_info=True,
    )


def by_autograd(problem: LogisticRegression) -> Tensor:
    w, log_penalty = problem.w.detach().requires_grad_(), problem.log_penalty.detach()
    log_penalty.requires_grad_()
    (b,) = torch.autograd.grad(problem.outer(w, log_penalty), w)
    (slope,) = torch.autograd.grad(problem.inner(w, log_penalty), w, create_graph=True)
    u = conjugate_gradients(
        lambda v: torch.autograd.grad(slope, w, v, retain_graph=True)[0], b, STEPS
    )
    return -torch.autograd.grad(slope, log_penalty, u)[0]


def by_closed_form(problem: LogisticRegression) -> Tensor:
    """Both gradients, the steps, the cross term, and the norms of both residuals."""
    x, w, penalty = problem.x, problem.w, problem.log_penalty.exp()
    wrong = (problem.x_val @ w).sigmoid() - problem.y_val
    b = problem.x_val.T @ wrong / len(wrong)
    probability = (x @ w).sigmoid()
    slope = x.T @ (probability - problem.y) / len(x) + penalty * w
    weights = probability * (1 - probability) / len(x)

    def product(v: Tensor) -> Tensor:
        return x.T @ (weights * (x @ v)) + penalty * v

    u = conjugate_gradients(product, b, STEPS)
    for residual in (b - product(u), slope):
        residual.norm()
    return -penalty * w * u


def by_torchopt(problem: LogisticRegression, solve: Callable) -> Tensor:
    slope = torch.func.grad(problem.inner)
    root = torchopt.diff.implicit.custom_root(slope, argnums=1, solve=solve)
    log_penalty = problem.log_penalty.detach().requires_grad_()
    w = root(lambda w, log_penalty: w)(problem.w, log_penalty)
    return torch.autograd.grad(problem.outer(w, log_penalty), log_penalty)[0]


def unrolled_by_higher(problem: LogisticRegression) -> Hypergradient:
    """Twenty steps of gradient descent from the solution, differentiated through."""
    module, lr = _Weights(problem.w), problem.step_size()

    def hypergradient() -> Tensor:
        log_penalty = problem.log_penalty.detach().requires_grad_()
        optimiser = torch.optim.SGD(module.parameters(), lr=lr)
        with higher.innerloop_ctx(module, optimiser) as (live, steps):
            for _ in range(STEPS):
                steps.step(problem.inner(live.w, log_penalty))
            return torch.autograd.grad(problem.outer(live.w, log_penalty), log_penalty)[0]

    return hypergradient


class _Weights(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())
