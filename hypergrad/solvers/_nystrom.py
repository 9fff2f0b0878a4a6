"""The randomised Nyström approximation of a positive semidefinite matrix."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._autograd.rows import by_rows
from .._autograd.transforms import outside_transforms
from .._info import Status
from ._base import Solver
from ._fields import at_least, tolerance
from ._system import Counted, LinearSystem, Solution, Units, graded
from ._vectors import Product, norm

_SEED = 0x5EED
_ZERO = 30  # values below so many roundings of the largest are zero


@dataclasses.dataclass(frozen=True)
class Nystrom(Solver):
    """A symmetric positive semidefinite matrix taken as one of low rank plus the damping.

    By itself it solves with the approximation, ``(A_rank + damping I)^-1 b``, in `rank` products
    and one for the residual: the status is ``CONVERGED`` where the true residual meets what
    ``rtol=None`` means for the dtype, else ``MAX_ITERATIONS``. As the preconditioner of `CG` or
    `MINRES` it makes the iterations few where a matrix has few large eigenvalues; there a damping
    of zero means the solver's own. The random test matrix is the same in every call, and the
    caller's random numbers are left alone.

    Parameters
    ----------
    rank : int
        How many products are made; at most the unknowns are.
    damping : float
        The system solved is ``(A + damping I) x = b``. With zero, the part that the approximation
        does not see is left out of the answer.

    References
    ----------
    Frangella, Tropp and Udell, Randomized Nyström preconditioning, 2023, algorithm 2.1 and
    equation 5.3.

    Examples
    --------
    >>> import torch, hypergrad
    >>> A = torch.ones(50, 50, dtype=torch.float64)  # of rank one
    >>> b = torch.ones(50, dtype=torch.float64)
    >>> x, info = hypergrad.Nystrom(rank=2, damping=1.0).solve(lambda v: A @ v, b)
    >>> torch.allclose(A @ x + x, b), int(info.matvecs)
    (True, 3)
    """

    rank: int
    damping: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        at_least("rank", self.rank, 1)
        at_least("damping", self.damping, 0.0)

    def run(self, system: LinearSystem) -> Solution:
        """Approximate the matrix, solve, and measure the residual."""
        matvec = Counted(system.matvec, self.damping)
        units = Units(system.b)
        b = torch.where(units.present[..., None], units.b, 0.0)
        x, left, size = torch.zeros_like(b), b, torch.zeros_like(units.scale)
        if any_task(units.present):
            vectors, values = _approximation(matvec, b, self.rank)
            x = _solved(vectors, values, self.damping, b, beyond=self.damping)
            left = b - matvec(x)
            size = norm(left)
        met = size <= tolerance(None, system.layout.precision)
        ends = {Status.CONVERGED: met, Status.NOT_FINITE: ~torch.isfinite(size)}
        status = graded(ends, Status.MAX_ITERATIONS)
        x, status, size = units.settled(x * units.unit, status, size)
        return Solution(
            x,
            status,
            residual_norm=size,
            residual=left * units.unit,
            matvecs=matvec.count,
            method="Nystrom",
        )

    def as_preconditioner(self, matvec: Counted, b: Tensor) -> Product:
        """Make the approximate inverse, at its first use, from the products of the solver."""
        damping = self.damping or max(matvec.damping, 0.0)
        made: list[tuple[Tensor, Tensor]] = []

        def apply(v: Tensor) -> Tensor:
            if not made:
                made.append(_approximation(matvec, b, self.rank))
            vectors, values = made[0]
            # The part unseen by the approximation is taken to be as large as its least value.
            least = torch.maximum(values.amin(dim=-1), 1e-12 * values.amax(dim=-1)) + damping
            least = torch.where(least > 0, least, 1.0)[..., None]
            return _solved(vectors, values, damping, v, beyond=least)

        return apply


def _approximation(matvec: Counted, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Find orthonormal vectors ``(*tasks, n, rank)`` and values of the undamped matrix."""
    n = b.shape[-1]
    rank = min(rank, n)
    with outside_transforms():
        generator = torch.Generator().manual_seed(_SEED)
        test = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q
        test = test.to(b)
    columns = test.T.reshape(rank, *[1] * (b.ndim - 1), n).expand(rank, *b.shape)
    matvec.count += rank
    sketch = by_rows(matvec.matvec, columns).movedim(0, -1)
    sketch = torch.where(torch.isfinite(sketch), sketch, 0.0)
    core = test.T @ sketch
    spectrum, basis = torch.linalg.eigh((core + core.mT) / 2)
    floor = _ZERO * torch.finfo(b.dtype).eps * spectrum.abs().amax(dim=-1, keepdim=True)
    usable = spectrum > floor
    weight = torch.where(usable, spectrum, 1.0).rsqrt() * usable
    vectors, singular, _ = torch.linalg.svd(sketch @ (basis * weight[..., None, :]), False)
    values = singular.square()
    kept = values > _ZERO * torch.finfo(b.dtype).eps * values.amax(dim=-1, keepdim=True)
    return vectors, torch.where(kept, values, 0.0)


def _solved(
    vectors: Tensor, values: Tensor, damping: float, v: Tensor, beyond: Tensor | float
) -> Tensor:
    """Form ``(A_rank + damping I)^-1 v``, with `beyond` for the matrix where it is not known."""
    known = values > 0
    part = vectors.mT @ v[..., None]
    known, shifted = known[..., None], torch.where(known, values + damping, 1.0)[..., None]
    inside = (vectors @ torch.where(known, part / shifted, 0.0))[..., 0]
    if isinstance(beyond, float) and beyond == 0:
        return inside
    seen = (vectors @ torch.where(known, part, 0.0))[..., 0]
    return inside + (v - seen) / beyond
