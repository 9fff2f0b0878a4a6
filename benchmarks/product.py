"""One product with the Hessian, and one hypergradient, in units of one gradient.

Logistic regression with per-feature penalties, n = 2000, d = 500, float32, one thread.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

import hypergrad
from benchmarks.timing import ratios
from hypergrad._linearise import Linearisation
from hypergrad._problem import Problem
from hypergrad._randomness import Draw
from hypergrad._tree import Tree

ROWS, FEATURES, PRODUCTS = 2000, 500, 20


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    X, X_val = (torch.randn(n, FEATURES) / FEATURES**0.5 for n in (ROWS, ROWS // 4))
    y, y_val = ((torch.rand(n) > 0.5).float() for n in (ROWS, ROWS // 4))
    log_penalty = torch.full((FEATURES,), -5.0)

    def inner(w: Tensor, log_penalty: Tensor) -> Tensor:
        return cross_entropy(X @ w, y) + (log_penalty.exp() * w * w).sum() / 2

    def outer(w: Tensor, log_penalty: Tensor) -> Tensor:
        return cross_entropy(X_val @ w, y_val)

    w = torch.zeros(FEATURES, requires_grad=True)
    optimiser = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-8, tolerance_change=0)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = inner(w, log_penalty)
        loss.backward()
        return loss

    optimiser.step(closure)
    solution, v = w.detach(), torch.randn(FEATURES)
    problem = Problem.of(
        hypergrad.Minimum(inner), Tree("params", solution), [Tree("hparams", log_penalty)]
    )
    recorded = Linearisation(problem, [solution, log_penalty], Draw())
    # A tolerance that is never met, so that exactly so many products are made.
    solver = hypergrad.CG(maxiter=PRODUCTS, atol=1e-30, rtol=1e-30)

    def gradient() -> None:
        leaf = solution.detach().requires_grad_()
        torch.autograd.grad(inner(leaf, log_penalty), leaf)

    def hypergradient() -> None:
        hypergrad.implicit_grad(
            outer, inner, solution, log_penalty, solver=solver, on_failure="ignore"
        )

    sides = {
        "gradient": gradient,
        "one product": lambda: recorded.transposed(v),
        f"hypergradient, {PRODUCTS} CG steps": hypergradient,
    }
    print(f"logistic regression, n {ROWS}, d {FEATURES}, float32, one thread; in gradients,")
    print("median (quartiles) of 60 interleaved rounds")
    for name, figure in ratios(sides, "gradient").items():
        print(f"  {name}: {figure}")


if __name__ == "__main__":
    main()
