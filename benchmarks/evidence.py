"""What the evidence of a solve costs: CG and MINRES against bare recurrences over the same product.

Logistic regression with per-feature penalties, n = 2000, d = 5000, one thread, a fixed number of
iterations. Both sides are given the same replayed product. The bare recurrence computes the
answer and nothing else; ours adds a status, the true residual (one product more), the negative
curvature test, the best iterate and the extreme Ritz values.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

import hypergrad
from benchmarks.timing import ratios
from hypergrad._autograd.random_numbers import Draw
from hypergrad._implicit.linearisation import Linearisation
from hypergrad._pytrees import Tree
from hypergrad.conditions._inner_problem import Problem
from hypergrad.solvers._system import LinearSystem
from hypergrad.solvers._vectors import Product

ROWS, FEATURES, ROUNDS = 2000, 5000, 30


def bare_cg(product: Product, b: Tensor, steps: int) -> Tensor:
    """Conjugate gradients, and nothing else."""
    x, r, p = torch.zeros_like(b), b, b
    rr = r @ r
    for _ in range(steps):
        Ap = product(p)
        alpha = rr / (p @ Ap)
        x = x + alpha * p
        r = r - alpha * Ap
        rr, before = r @ r, rr
        p = r + rr / before * p
    return x


def bare_minres(product: Product, b: Tensor, steps: int) -> Tensor:
    """MINRES by the Lanczos recurrence and Givens rotations, and nothing else."""
    x, before, v = torch.zeros_like(b), torch.zeros_like(b), b
    w_before, w = torch.zeros_like(b), torch.zeros_like(b)
    beta = phi_bar = v.norm()
    v = v / beta
    zero = torch.zeros_like(beta)
    beta, c, s, delta_bar, epsilon = zero, zero - 1, zero, zero, zero
    for _ in range(steps):
        y = product(v) - beta * before
        alpha = v @ y
        y = y - alpha * v
        beta = y.norm()
        epsilon_last = epsilon
        delta, gamma_bar = c * delta_bar + s * alpha, s * delta_bar - c * alpha
        epsilon, delta_bar = s * beta, -c * beta
        gamma = torch.hypot(gamma_bar, beta)
        c, s = gamma_bar / gamma, beta / gamma
        w_before, w = w, (v - epsilon_last * w_before - delta * w) / gamma
        x = x + c * phi_bar * w
        phi_bar = s * phi_bar
        before, v = v, y / beta
    return x


def measure(dtype: torch.dtype) -> None:
    """Measure and print for one dtype."""
    torch.manual_seed(0)
    X = torch.randn(ROWS, FEATURES, dtype=dtype) / FEATURES**0.5
    y = (torch.rand(ROWS) > 0.5).to(dtype)
    w, b = torch.randn(FEATURES, dtype=dtype), torch.randn(FEATURES, dtype=dtype)
    log_penalty = torch.linspace(-8.0, -2.0, FEATURES, dtype=dtype)  # too hard for 50 steps

    def inner(w: Tensor, log_penalty: Tensor) -> Tensor:
        return cross_entropy(X @ w, y) + (log_penalty.exp() * w * w).sum() / 2

    problem = Problem.of(hypergrad.Minimum(inner), Tree("params", w), [Tree("h", log_penalty)])
    recorded = Linearisation(problem, [w, log_penalty], Draw())
    product = recorded.transposed
    bare = {hypergrad.CG: bare_cg, hypergrad.MINRES: bare_minres}
    for method, recurrence in bare.items():
        for steps in (20, 50):
            # A tolerance that is never met, so that exactly so many steps are made.
            solver = method(maxiter=steps, rtol=1e-30)
            system = LinearSystem(product, b, recorded.layout, problem.params, symmetric=True)

            def bare_solve(steps: int = steps, recurrence: object = recurrence) -> Tensor:
                return recurrence(product, b, steps)  # type: ignore[operator]

            def bare_and_residual(steps: int = steps, recurrence: object = recurrence) -> Tensor:
                return b - product(bare_solve(steps, recurrence))

            with torch.no_grad():
                found = solver.run(system)
                expected = bare_solve()
            off = float((found.x - expected).norm() / expected.norm())
            assert int(found.iterations) == steps, found
            assert off < (1e-3 if dtype == torch.float32 else 1e-9), off
            sides = {
                "bare": bare_solve,
                "bare and true residual": bare_and_residual,
                "with its evidence": lambda solver=solver, system=system: solver.run(system),
            }
            with torch.no_grad():
                figures = ratios(sides, "bare", rounds=ROUNDS)
            name = str(dtype).removeprefix("torch.")
            print(f"{method.__name__}, {name}, {steps} iterations, in bare recurrences:")
            for side, figure in figures.items():
                print(f"  {side}: {figure.median:.3f} ({figure.low:.3f} to {figure.high:.3f})")


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    print(f"logistic regression, n {ROWS}, d {FEATURES}, one thread,")
    print(f"processor time, median (quartiles) of {ROUNDS} interleaved rounds")
    for dtype in (torch.float32, torch.float64):
        measure(dtype)


if __name__ == "__main__":
    main()
