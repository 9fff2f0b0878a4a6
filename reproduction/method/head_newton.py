"""The inner problem of the last layer, solved exactly in the space of its outputs.

With the features Z of a support set of S examples (S, d), targets y and the meta-parameters theta
of the last layer (K, d), a task's parameters are those that minimise

    loss(Z phi', y) + lam / 2 * ||phi - theta||^2,

which is strongly convex. The gradient is zero where phi = theta + alpha' Z and
lam alpha + slope(Z phi') = 0: S x K unknowns in place of K x d. Newton's step on them takes a
system with the matrix lam I + H Q, with the Gram matrix Q = Z Z' and the curvature H of the loss in
the outputs. For a cross-entropy H is a diagonal minus a matrix of rank S, so that the system takes
K + 1 factorisations of S x S and no one of S K x S K (Rasmussen and Williams, Gaussian processes
for machine learning, 2006, algorithm 3.3, for the same posterior mode). With many examples
conjugate gradients are quicker: a product is S x S x K.

Everything here is written for one task; `torch.func.vmap` batches it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

STEP_SIZES = (1.0, 0.5, 0.25, 0.12, 0.06, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 0.0)
"""The smallest are for a head that is sure of the wrong class: there the curvature is nearly zero,
and the Newton step goes a thousand times too far."""


MOST_DIRECT = 50  # examples; with 100 of 20 classes conjugate gradients take a sixth of the time
CG_STEPS = 25


class OutputLoss(Protocol):
    """A loss that is convex in the outputs, with its derivatives in them."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        ...

    def slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return its gradient in the outputs, (S, K)."""
        ...

    def solve(self, outputs: Tensor, gram: Tensor, lam: Tensor, right: Tensor) -> Tensor:
        """Return d with (lam I + H gram) d = right, H the loss's curvature at the outputs."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """The mean cross-entropy of softmax, for targets that are classes."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        return F.cross_entropy(outputs, targets)

    def slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return its gradient in the outputs, (S, K)."""
        classes = torch.arange(outputs.shape[1], device=outputs.device)
        is_true = targets.unsqueeze(-1) == classes
        others = torch.softmax(outputs, -1).masked_fill(is_true, 0.0)
        # p - 1 as the sum of the others: where p is nearly one, the difference is all rounding.
        return torch.where(is_true, -others.sum(-1, keepdim=True), others) / len(outputs)

    def solve(self, outputs: Tensor, gram: Tensor, lam: Tensor, right: Tensor) -> Tensor:
        """Return d with (lam I + H gram) d = right; `right` sums to zero over the classes."""
        way = solve_directly if len(outputs) <= MOST_DIRECT else solve_by_conjugate_gradients
        return way(torch.softmax(outputs, -1), gram, lam, right)


def solve_directly(probabilities: Tensor, gram: Tensor, lam: Tensor, right: Tensor) -> Tensor:
    """Solve (lam I + H gram) d = right, where `right` sums to zero over the classes.

    With D_k the diagonal of class k's probabilities over S, M_k = lam I + D_k gram,
    E_k = M_k^-1 D_k and y_k = M_k^-1 right_k, the solution is d_k = y_k - E_k mu with
    (sum_k E_k) mu = sum_k y_k. It sums to zero over the classes too.

    Parameters
    ----------
    probabilities
        (S, K), of which H is the curvature.
    gram
        (S, S).
    lam
        Strength of the proximal term.
    right
        (S, K).

    Returns
    -------
    Tensor
        d, (S, K).
    """
    count = len(probabilities)
    weights = probabilities.mT / count
    identity = torch.eye(count, dtype=gram.dtype, device=gram.device)
    matrices = lam * identity + weights.unsqueeze(-1) * gram  # (K, S, S)
    both = torch.cat([right.mT.unsqueeze(-1), torch.diag_embed(weights)], -1)
    solved = torch.linalg.solve_ex(matrices, both)[0]
    single, E = solved[..., :1], solved[..., 1:]
    shared = torch.linalg.solve_ex(E.sum(0), single.sum(0))[0]
    return (single - E @ shared).squeeze(-1).mT


def solve_by_conjugate_gradients(
    probabilities: Tensor, gram: Tensor, lam: Tensor, right: Tensor
) -> Tensor:
    """Solve (lam I + H gram) d = right by `CG_STEPS` steps.

    The matrix is symmetric in the inner product <a, b> = a . (gram b), which is that of the
    parameters a' Z and b' Z: these are the conjugate gradients of the parameters' own system.

    Parameters
    ----------
    probabilities, gram, lam, right
        As in `solve_directly`.

    Returns
    -------
    Tensor
        d, (S, K).
    """
    tiny = torch.finfo(gram.dtype).tiny
    solution = torch.zeros_like(right)
    residual, gram_residual = right, gram @ right
    direction, gram_direction = residual, gram_residual
    square = (residual * gram_residual).sum()
    for _ in range(CG_STEPS):
        weighted = probabilities * gram_direction
        curved = weighted - probabilities * weighted.sum(-1, keepdim=True)
        product = lam * direction + curved / len(probabilities)
        length = square / (gram_direction * product).sum().clamp(min=tiny)
        solution, residual = solution + length * direction, residual - length * product
        gram_residual = gram @ residual
        before, square = square, (residual * gram_residual).sum()
        ratio = square / before.clamp(min=tiny)
        direction = residual + ratio * direction
        gram_direction = gram_residual + ratio * gram_direction
    return solution


@dataclass(frozen=True)
class SquaredError:
    """The mean squared error; one Newton step from anywhere is exact."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        return (outputs - targets).square().mean()

    def slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return its gradient in the outputs, (S, K)."""
        return 2 * (outputs - targets) / outputs.numel()

    def solve(self, outputs: Tensor, gram: Tensor, lam: Tensor, right: Tensor) -> Tensor:
        """Return d with (lam I + H gram) d = right; here H is 2 / (S K) times the identity."""
        identity = torch.eye(len(outputs), dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve_ex(lam * identity + 2 / outputs.numel() * gram, right)[0]


def solve_head(
    loss: OutputLoss, features: Tensor, targets: Tensor, centre: Tensor, lam: Tensor, steps: int
) -> Tensor:
    """Minimise loss(features phi', targets) + lam / 2 * ||phi - centre||^2 by Newton's method.

    A step is taken whole where that halves the gradient; elsewhere by that one of `STEP_SIZES`
    with the smallest objective. Near the solution all that can be seen of the objective is its
    rounding: where no size lowers it, the smallest gradient decides.

    Parameters
    ----------
    loss
        Which.
    features
        (S, d).
    targets
        As the loss takes them.
    centre
        theta, (K, d).
    lam
        Strength of the proximal term, above zero.
    steps
        Newton steps.

    Returns
    -------
    Tensor
        phi, (K, d).
    """
    gram = features @ features.mT
    start = features @ centre.mT
    alpha, outputs = torch.zeros_like(start), start
    sizes = torch.cat([start.new_full((1,), size) for size in STEP_SIZES])

    def residual(alpha: Tensor, outputs: Tensor) -> Tensor:
        return lam * alpha + loss.slope(outputs, targets)

    def look(alpha: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective and the squared length of its gradient."""
        value = loss(outputs, targets) + lam / 2 * (alpha * (outputs - start)).sum()
        slope = residual(alpha, outputs)
        return value, (slope * (gram @ slope)).sum()

    for _ in range(steps):
        step = loss.solve(outputs, gram, lam, -residual(alpha, outputs))
        change = gram @ step
        seen = vmap(lambda t: look(alpha + t * step, outputs + t * change))(sizes)  # noqa: B023
        values, slopes = (torch.nan_to_num(s, nan=torch.inf) for s in seen)
        lowest, flattest = (
            sizes.index_select(0, s.argmin(0, keepdim=True)) for s in (values, slopes)
        )
        size = torch.where(lowest > 0, lowest, flattest)
        size = torch.where(slopes[0] < 0.25 * slopes[-1], sizes[:1], size)
        alpha, outputs = alpha + size * step, outputs + size * change
    return centre + alpha.mT @ features
