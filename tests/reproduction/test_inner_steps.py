"""The inner steps against closed forms of a quadratic, torch.optim and central differences."""

import dataclasses
import math

import pytest
import torch
from torch.func import functional_call, grad, jacrev, vmap

from reproduction.method.hessian_free import HessianFree
from reproduction.method.inner import GradientDescent, Nesterov, ProximalProblem
from reproduction.method.torchopt_steps import OPTIMISERS, UNROLLABLE, TorchOptSteps
from tests.reproduction.small_network import (
    LAM,
    LR,
    POINTS,
    dense_hessian,
    flat,
    learner,
    network_problem,
)

UNKNOWNS = 6


@dataclasses.dataclass
class Quadratic:
    """1/2 w.Hw - b.w, with the proximal term, and what is known of it in closed form."""

    H: torch.Tensor
    b: torch.Tensor
    centre: torch.Tensor

    @classmethod
    def draw(cls):
        torch.manual_seed(3)
        root = torch.randn(UNKNOWNS, UNKNOWNS).double()
        b, centre = torch.randn(2, UNKNOWNS).double()
        return cls(root @ root.T / UNKNOWNS, b, centre)

    @property
    def problem(self):
        # H may be indefinite: the whole loss is then the "outputs", and the outer loss is linear.
        return ProximalProblem(
            lambda p: (p["w"] @ self.H @ p["w"] / 2 - self.b @ p["w"]).unsqueeze(0),
            lambda outputs: outputs.sum(),
            LAM,
        )

    @property
    def A(self):
        return self.H + LAM * torch.eye(UNKNOWNS).double()

    @property
    def solution(self):
        return torch.linalg.solve(self.A, self.b + LAM * self.centre)

    def objective(self, w):
        return w @ self.H @ w / 2 - self.b @ w + LAM / 2 * (w - self.centre).square().sum()

    def adapt(self, solver):
        return solver(self.problem, {"w": self.centre})["w"]


@pytest.fixture
def quadratic():
    return Quadratic.draw()


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("proximal", [True, False])
def test_nesterov_is_the_linear_recursion_of_a_quadratic(quadratic, steps, proximal):
    found = quadratic.adapt(Nesterov(steps, LR, proximal, momentum=0.6))

    # With e the distance to the solution: e' = (I - lr A)((1 + m) e - m e_before).
    identity = torch.eye(UNKNOWNS).double()
    matrix = quadratic.A if proximal else quadratic.H
    target = quadratic.solution if proximal else torch.linalg.solve(quadratic.H, quadratic.b)
    shrink = identity - LR * matrix
    step = torch.cat([
        torch.cat([1.6 * shrink, -0.6 * shrink], dim=1),
        torch.cat([identity, torch.zeros_like(identity)], dim=1),
    ])
    start = torch.cat([quadratic.centre - target, quadratic.centre - target])
    expected = target + (torch.linalg.matrix_power(step, steps) @ start)[:UNKNOWNS]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_nesterov_at_its_best_momentum_beats_gradient_descent(quadratic):
    eigenvalues = torch.linalg.eigvalsh(quadratic.A)
    lr = 1 / eigenvalues[-1].item()
    root = math.sqrt(lr * eigenvalues[0].item())
    best = Nesterov(30, lr, momentum=(1 - root) / (1 + root))

    accelerated = (quadratic.adapt(best) - quadratic.solution).norm()
    plain = (quadratic.adapt(GradientDescent(30, lr)) - quadratic.solution).norm()
    assert accelerated < plain / 3


@pytest.mark.parametrize("cg_steps", [1, 3, 5])
def test_a_hessian_free_step_is_the_minimum_over_the_krylov_space(quadratic, cg_steps):
    found = quadratic.adapt(HessianFree(1, cg_steps))

    slope = quadratic.A @ quadratic.centre - (quadratic.b + LAM * quadratic.centre)
    powers = [torch.linalg.matrix_power(quadratic.A, k) @ slope for k in range(cg_steps)]
    basis = torch.linalg.qr(torch.stack(powers, dim=1)).Q
    inside = torch.linalg.solve(basis.T @ quadratic.A @ basis, basis.T @ slope)
    torch.testing.assert_close(found, quadratic.centre - basis @ inside, rtol=1e-8, atol=1e-8)


def test_hessian_free_steps_solve_a_quadratic(quadratic):
    found = quadratic.adapt(HessianFree(4, cg_steps=5))

    torch.testing.assert_close(found, quadratic.solution, rtol=1e-5, atol=1e-5)


def test_a_hessian_free_step_under_negative_curvature_is_a_gradient_step(quadratic):
    bent = dataclasses.replace(quadratic, H=-quadratic.H - 2 * LAM * torch.eye(UNKNOWNS).double())
    found = bent.adapt(HessianFree(1))

    slope = bent.A @ bent.centre - (bent.b + LAM * bent.centre)
    torch.testing.assert_close(found, bent.centre - slope)  # 1, the longest step, is the lowest
    assert bent.objective(found) < bent.objective(bent.centre)


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_hessian_free_with_all_its_steps_is_damped_newton(network, meta, task, curvature):
    problem = network_problem(task.support_x, task.support_y, network, lam=2.0)
    solver = HessianFree(1, cg_steps=60, curvature=curvature)
    found = flat(solver(problem, meta)) - flat(meta)

    if curvature == "hessian":
        matrix = dense_hessian(network, meta, task.support_x, task.support_y)
    else:
        jacobian = jacrev(lambda p: functional_call(network, p, (task.support_x,)).flatten())(meta)
        J = torch.cat([leaf.flatten(1) for leaf in jacobian.values()], dim=1)
        matrix = 2 / POINTS * J.T @ J
    matrix = matrix + 2.0 * torch.eye(len(matrix)).double()
    assert torch.linalg.eigvalsh(matrix)[0] > 0  # else conjugate gradients would have stopped
    newton = -torch.linalg.solve(matrix, flat(grad(problem.data_loss)(meta)))
    length = found @ newton / (newton @ newton)
    assert any(math.isclose(length, size, rel_tol=1e-5) for size in (1.0, 0.5, 0.25, 0.1))
    torch.testing.assert_close(found, length * newton, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_torchopt_takes_the_steps_of_torch_optim(network, meta, task, optimiser):
    pytest.importorskip("torchopt")
    problem = network_problem(task.support_x, task.support_y, network)
    found = flat(TorchOptSteps(optimiser, 4, 0.01, proximal=True)(problem, meta))

    params = {name: leaf.clone().requires_grad_() for name, leaf in meta.items()}
    names = {"sgd": "SGD", "adam": "Adam", "rmsprop": "RMSprop", "adagrad": "Adagrad"}
    by_torch = getattr(torch.optim, names[optimiser])(params.values(), lr=0.01)
    for _ in range(4):
        by_torch.zero_grad()
        problem.objective(params, meta).backward()
        by_torch.step()
    # torchopt's roots are of a sum with 1e-8, and its decays differ from torch's for RMSprop.
    tolerance = 1e-10 if optimiser == "sgd" else 1e-3
    torch.testing.assert_close(found, flat(params).detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "solver",
    [
        GradientDescent(3, LR),
        Nesterov(3, LR),
        HessianFree(2),
        HessianFree(2, curvature="gauss-newton"),
        *(("torchopt", name) for name in OPTIMISERS),
    ],
    ids=str,
)
def test_a_batch_of_tasks_is_the_loop_over_tasks(network, meta, solver):
    if isinstance(solver, tuple):
        pytest.importorskip("torchopt")
        solver = TorchOptSteps(solver[1], 3, 0.01)
    torch.manual_seed(6)
    x, y = torch.randn(3, POINTS, 2).double(), torch.randn(3, POINTS, 1).double()

    def adapt(x, y):
        return flat(solver(network_problem(x, y, network), meta))

    each = torch.stack([adapt(x[k], y[k]) for k in range(3)])
    torch.testing.assert_close(vmap(adapt)(x, y), each)


@pytest.mark.parametrize("optimiser", UNROLLABLE)
def test_unrolling_torchopt_is_the_central_difference(network, meta, task, optimiser):
    pytest.importorskip("torchopt")
    solver = TorchOptSteps(optimiser, 3, 0.05)
    own = learner(network, "unrolled", solver)
    gradient = flat(own.task_gradient(meta, task)[0])

    torch.manual_seed(7)
    direction = {name: torch.randn_like(leaf) for name, leaf in meta.items()}

    def outer(size):
        moved = {name: meta[name] + size * direction[name] for name in meta}
        outputs = own.model(own.adapt(moved, task.support_x, task.support_y), task.query_x)
        return (outputs - task.query_y).square().mean()

    difference = (outer(1e-5) - outer(-1e-5)) / 2e-5
    torch.testing.assert_close(gradient @ flat(direction), difference, rtol=1e-5, atol=1e-8)
