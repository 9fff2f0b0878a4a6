"""Right-hand sides that share a matrix, in one block."""

import torch
from torch import Tensor

from hypergrad import CG, Nystrom, Status
from hypergrad._pytrees import Layout, Tree
from hypergrad.solvers import LinearSystem, Solution

F64 = torch.float64


def spectrum(n: int, low: float, high: float, dtype: torch.dtype = F64) -> Tensor:
    """A symmetric matrix with eigenvalues spread evenly over their logarithms."""
    generator = torch.Generator().manual_seed(n)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=generator)).Q
    A = (basis * torch.logspace(low, high, n, dtype=F64)) @ basis.mT
    return ((A + A.mT) / 2).to(dtype)


def right_hand_sides(k: int, n: int, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(k)
    return torch.randn(k, n, dtype=F64, generator=generator).to(dtype)


def solved(A: Tensor, b: Tensor, solver: CG, widths: list[int] | None = None) -> Solution:
    tree = Tree("b", b[0])

    def matvec(v: Tensor) -> Tensor:
        if widths is not None:
            widths.append(v.shape[0] if v.ndim > 1 else 1)
        return v @ A

    layout = Layout(tree, tree.variables)
    return solver.solve_flat(
        LinearSystem(matvec, b, layout, tree, symmetric=True, shared=b.shape[0])
    )


def relative(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    true = torch.linalg.solve(A.double(), b.double().mT).mT
    return (x - true).norm(dim=-1) / true.norm(dim=-1)


def test_a_block_takes_a_fraction_of_the_products():
    A, b = spectrum(300, 0, 4), right_hand_sides(20, 300)
    alone = CG().solve(lambda v: A @ v, b[0])[1]
    together = solved(A, b, CG())
    assert together.success.all()
    assert 8 * together.matvecs < int(alone.matvecs)
    assert (torch.linalg.vector_norm(b - together.x @ A, dim=-1) <= 1e-6 * b.norm(dim=-1)).all()
    assert relative(together.x, A, b).max() < 1e-3


def test_dependent_equal_and_zero_right_hand_sides_leave_the_block():
    A, b = spectrum(60, 0, 2), right_hand_sides(8, 60)
    b[1], b[2], b[3], b[4] = b[0], -3e5 * b[0], 0.0, 1e-7 * (b[5] - 2 * b[6])
    widths: list[int] = []
    solution = solved(A, b, CG(rtol=1e-10), widths)
    assert solution.success.all()
    assert widths[0] == 4
    assert torch.equal(solution.x[3], torch.zeros(60, dtype=F64))
    found = relative(solution.x, A, b)
    assert found[[0, 1, 2, 4, 5, 6, 7]].max() < 1e-8


def test_a_block_of_one_direction_is_one_right_hand_side():
    A, b = spectrum(40, 0, 1), right_hand_sides(1, 40).expand(6, 40).contiguous()
    widths: list[int] = []
    solution = solved(A, b, CG(rtol=1e-10), widths)
    assert set(widths[:-1]) == {1}
    assert relative(solution.x, A, b).max() < 1e-8


def test_directions_that_are_solved_leave_the_block():
    A, b = spectrum(200, 0, 3), right_hand_sides(6, 200)
    b[3:] = b[3:] @ A  # combinations that are solved by one step more or less
    b[3] = torch.linalg.eigh(A).eigenvectors[:, 0]
    widths: list[int] = []
    assert solved(A, b, CG(rtol=1e-8), widths).success.all()
    assert widths[0] == 6
    assert widths[1] == 5
    assert sorted(widths[:-1], reverse=True) == widths[:-1]


def test_more_right_hand_sides_than_unknowns():
    A, b = spectrum(5, 0, 1), right_hand_sides(12, 5)
    solution = solved(A, b, CG(rtol=1e-12))
    assert solution.success.all()
    assert relative(solution.x, A, b).max() < 1e-10


def test_float32_reaches_its_tolerance_and_the_ritz_values_are_those_of_the_matrix():
    A, b = spectrum(100, 0, 2, torch.float32), right_hand_sides(7, 100, torch.float32)
    solution = solved(A, b, CG())
    assert solution.success.all()
    assert relative(solution.x, A, b).max() < 1e-2
    low, high = solution.eigenvalues[0].tolist()
    assert 0.99 < low < 1.5
    assert 90 < high < 101


def test_one_right_hand_side_that_is_not_finite_does_not_disturb_the_others():
    A, b = spectrum(50, 0, 1), right_hand_sides(4, 50)
    b[2, 7] = torch.nan
    solution = solved(A, b, CG(rtol=1e-10))
    assert solution.status[2] == Status.NOT_FINITE
    assert solution.x[2].isnan().all()
    others = [0, 1, 3]
    assert solution.success[others].all()
    assert relative(solution.x[others], A, b[others]).max() < 1e-8


def test_negative_curvature_is_said_of_the_matrix_that_all_share():
    A, b = spectrum(40, 0, 1), right_hand_sides(5, 40)
    A = A - 2 * torch.eye(40, dtype=F64)
    solution = solved(A, b, CG())
    assert solution.negative_curvature.all()
    assert not (solution.status == Status.CONVERGED).any()


def test_only_what_a_singular_matrix_cannot_reach_fails():
    A, b = spectrum(40, 0, 1), right_hand_sides(5, 40)
    null = torch.linalg.eigh(A).eigenvectors[:, 0]
    project = torch.eye(40, dtype=F64) - null[:, None] * null
    A, b = project @ A @ project, b @ project
    b[3] = b[3] + null
    solution = solved(A, b, CG(rtol=1e-8))
    assert solution.success.tolist() == [True, True, True, False, True]
    assert torch.isfinite(solution.x).all()
    left = torch.linalg.vector_norm(b - solution.x @ A, dim=-1) / b.norm(dim=-1)
    assert left[[0, 1, 2, 4]].max() <= 1e-8


def test_a_preconditioner_of_numpy_is_called_row_by_row():
    A, b = spectrum(80, 0, 4), right_hand_sides(6, 80)
    inverse = torch.linalg.inv(A).numpy()
    shapes = []

    def precondition(v: Tensor) -> Tensor:
        shapes.append(tuple(v.shape))
        return torch.from_numpy(inverse @ v.numpy())

    solution = solved(A, b, CG(rtol=1e-8, preconditioner=precondition))
    assert solution.success.all()
    assert solution.matvecs <= 4
    assert (80,) in shapes
    assert relative(solution.x, A, b).max() < 1e-6


def test_nystrom_preconditions_a_block():
    A, b = spectrum(120, -3, 1), right_hand_sides(6, 120)
    A = A + 0.01 * torch.eye(120, dtype=F64)
    plain = solved(A, b, CG(rtol=1e-8))
    helped = solved(A, b, CG(rtol=1e-8, preconditioner=Nystrom(rank=60, damping=0.01)))
    assert plain.success.all()
    assert helped.success.all()
    assert relative(helped.x, A, b).max() < 1e-5


def test_a_preconditioner_that_is_not_definite_ends_the_block_and_not_the_solve():
    A, b = spectrum(30, 0, 1), right_hand_sides(4, 30)
    solution = solved(A, b, CG(preconditioner=lambda v: -v))
    assert solution.success.all() or not solution.success.any()
    assert (torch.linalg.vector_norm(b - solution.x @ A, dim=-1) < 1e-5).all() or (
        solution.status != Status.CONVERGED
    ).all()


def test_a_budget_is_kept():
    A, b = spectrum(100, 0, 3), right_hand_sides(5, 100)
    widths: list[int] = []
    solution = solved(A, b, CG(maxiter=3), widths)
    assert solution.status.tolist() == [Status.MAX_ITERATIONS] * 5
    assert solution.iterations.tolist() == [3] * 5
    assert len(widths) == 4
    true = torch.linalg.vector_norm(b - solution.x @ A, dim=-1) / b.norm(dim=-1)
    torch.testing.assert_close(solution.residual_norm, true)
