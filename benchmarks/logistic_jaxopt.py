"""The same hypergradient by jaxopt under jit: ``python -m benchmarks.logistic_jaxopt``.

Alone from zero, and along the outer loop from the last solution, to the same residual. It needs a
process of its own, since the thread pool of XLA would disturb the others. On one core; torch's
gradient is timed beside it, so that there is one unit for all.
"""

import dataclasses
import json
import os
import statistics
import sys

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import torch
from jaxopt import implicit_diff, linear_solve

from benchmarks.logistic import LogisticRegression
from benchmarks.logistic_rows import loop
from benchmarks.logistic_sides import JAXOPT_ALONG, STEPS, there_and_back, with_info
from benchmarks.timing import in_units, seconds


def main(rows: int, features: int, dtype: str, rounds: int) -> None:
    """Measure, and print one line of JSON."""
    torch.set_num_threads(1)
    jax.config.update("jax_enable_x64", True)
    drawn = LogisticRegression.draw(rows, features)
    exact = drawn.exact()
    problem = drawn.to(getattr(torch, dtype))
    x, y, x_val, y_val, log_penalty, w = (
        jnp.array(part.numpy()) for part in vars(problem).values()
    )

    def cross_entropy(logits, labels):
        return (jnp.logaddexp(0.0, logits) - labels * logits).mean()

    def inner(w, log_penalty):
        return cross_entropy(x @ w, y) + (jnp.exp(log_penalty) * w * w).sum() / 2

    def outer(w):
        return cross_entropy(x_val @ w, y_val)

    @jax.jit
    def hypergradient(w, log_penalty):
        def solve(matvec, b):
            return linear_solve.solve_cg(matvec, b, maxiter=STEPS)

        return implicit_diff.root_vjp(
            jax.grad(inner), w, (log_penalty,), jax.grad(outer)(w), solve=solve
        )[0]

    rtol = float(with_info(problem)[1].residual_norm)
    steps = [
        (
            step.exact(),
            *(jnp.array(part.to(problem.w).numpy()) for part in (step.w, step.log_penalty)),
        )
        for step in there_and_back(loop(rows, features))
    ]

    @jax.jit
    def warm(w, log_penalty, start):
        solved = []

        def solve(matvec, b):
            u = linear_solve.solve_cg(matvec, b, init=start, maxiter=STEPS, tol=rtol)
            solved.append(u)
            return u

        grads = implicit_diff.root_vjp(
            jax.grad(inner), w, (log_penalty,), jax.grad(outer)(w), solve=solve
        )
        return grads[0], solved[0]

    last, calls = jnp.zeros_like(w), 0

    def along():
        nonlocal last, calls
        truth, *at = steps[calls % len(steps)]
        calls += 1
        answer, last = warm(*at, last)
        return truth, answer.block_until_ready()

    of_inner = jax.jit(jax.grad(inner))
    leaf = problem.w.detach().requires_grad_()
    found = seconds(
        {
            "torch": lambda: torch.autograd.grad(problem.inner(leaf, problem.log_penalty), leaf),
            "jax": lambda: of_inner(w, log_penalty).block_until_ready(),
            "jaxopt": lambda: hypergradient(w, log_penalty).block_until_ready(),
            "warm": along,
        },
        rounds=rounds,
    )
    in_torch = in_units(found, "torch")
    figures = {
        "jaxopt under jit, own process": in_torch["jaxopt"],
        "jaxopt under jit, in gradients of jax": in_units(found, "jax")["jaxopt"],
        JAXOPT_ALONG: in_torch["warm"],
    }

    def error(answer, exact):
        return (
            (torch.tensor(jax.device_get(answer)).double() - exact).norm() / exact.norm()
        ).item()

    alone = error(hypergradient(w, log_penalty), exact)
    errors = dict.fromkeys(figures, alone)
    errors[JAXOPT_ALONG] = statistics.median(
        error(answer, truth) for truth, answer in (along() for _ in steps)
    )
    print(
        json.dumps({
            "figures": {name: dataclasses.asdict(figure) for name, figure in figures.items()},
            "errors": errors,
        })
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
