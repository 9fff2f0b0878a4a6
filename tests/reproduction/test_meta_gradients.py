"""The meta-gradient of each way of differentiating, against autograd and dense matrices."""

import dataclasses

import pytest
import torch
from torch.func import functional_call

import hypergrad
from reproduction.method.episodes import Episodes
from reproduction.method.inner import GaussNewtonSteps, GradientDescent, Nesterov
from reproduction.method.models import PooledConvNet
from reproduction.method.systems import build_linear_solver
from tests.reproduction.small_network import (
    LAM,
    LR,
    dense_hessian,
    flat,
    learner,
    network_problem,
    query_gradient,
)


def test_the_operator_is_the_identity_and_the_hessian_over_lambda(network, meta, task):
    solver = GradientDescent(3, LR)  # the inner problem need not be solved for this
    gradient, measures = learner(
        network, "implicit", solver, curvature="hessian", lam=1.0,
        linear_solver=hypergrad.CG(maxiter=200, rtol=1e-12),
    ).task_gradient(meta, task)  # fmt: skip

    adapted = dict(meta)
    for _ in range(3):
        leaves = {n: leaf.detach().requires_grad_() for n, leaf in adapted.items()}
        outputs = functional_call(network, leaves, (task.support_x,))
        pull = sum((leaves[n] - meta[n]).square().sum() for n in meta) / 2
        loss = (outputs - task.support_y).square().mean() + pull
        slopes = torch.autograd.grad(loss, list(leaves.values()))
        adapted = {n: leaves[n] - LR * s for n, s in zip(leaves, slopes, strict=True)}
    H = dense_hessian(network, adapted, task.support_x, task.support_y)
    operator = torch.eye(len(H)).double() + H
    expected = torch.linalg.solve(operator, query_gradient(network, adapted, task))
    assert not measures["negative_curvature"]
    torch.testing.assert_close(flat(gradient), expected, rtol=1e-8, atol=1e-10)


def test_reptile_goes_to_where_sgd_on_all_examples_ends(network, meta, task):
    steps = 3
    gradient, _ = learner(
        network, "reptile", GradientDescent(steps, LR, proximal=False)
    ).task_gradient(meta, task)

    # A plain step at rate 1 takes the meta-parameters to where SGD on all examples ends.
    params = {name: leaf.clone().requires_grad_() for name, leaf in meta.items()}
    optimiser = torch.optim.SGD(params.values(), lr=LR)
    x, y = torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y])
    for _ in range(steps):
        optimiser.zero_grad()
        (functional_call(network, params, (x,)) - y).square().mean().backward()
        optimiser.step()
    torch.testing.assert_close(flat(meta) - flat(gradient), flat(params).detach())


@pytest.mark.parametrize("solver", [GradientDescent(5, LR), Nesterov(5, LR, momentum=0.5)])
@pytest.mark.parametrize("truncate", [1, 3, 5])
def test_truncation_is_autograd_through_the_last_steps(network, meta, task, solver, truncate):
    gradient, _ = learner(network, "truncated", solver, truncate=truncate).task_gradient(meta, task)

    theta = {name: leaf.clone().requires_grad_() for name, leaf in meta.items()}
    momentum = getattr(solver, "momentum", 0.0)
    start = truncate == solver.steps
    before = ahead = theta if start else meta
    for k in range(solver.steps):
        if k < solver.steps - truncate:
            centre = meta
            ahead = {n: leaf.detach().requires_grad_() for n, leaf in ahead.items()}
        else:
            centre = theta
            if not start and k == solver.steps - truncate:
                ahead = {n: leaf.detach().requires_grad_() for n, leaf in ahead.items()}
                before = {n: leaf.detach() for n, leaf in before.items()}
        loss = (functional_call(network, ahead, (task.support_x,)) - task.support_y).square().mean()
        slopes = torch.autograd.grad(loss, list(ahead.values()), create_graph=True)
        after = {
            n: ahead[n] - LR * (s + LAM * (ahead[n] - centre[n]))
            for n, s in zip(ahead, slopes, strict=True)
        }
        ahead = {n: after[n] + momentum * (after[n] - before[n]) for n in after}
        before = after
    outer = (functional_call(network, before, (task.query_x,)) - task.query_y).square().mean()
    expected = torch.autograd.grad(outer, list(theta.values()))
    torch.testing.assert_close(flat(gradient), torch.cat([g.reshape(-1) for g in expected]))


@pytest.mark.parametrize("kept", [1, 10, 40])
def test_truncation_near_a_solution_is_a_neumann_series(task, kept):
    torch.manual_seed(9)
    line = torch.nn.Linear(2, 1).double()  # the Hessian does not depend on the parameters
    start = {name: leaf.detach() for name, leaf in line.named_parameters()}
    solver = GradientDescent(400, LR)
    gradient, _ = learner(line, "truncated", solver, truncate=kept).task_gradient(start, task)

    adapted = solver(network_problem(task.support_x, task.support_y, line), start)
    A = dense_hessian(line, adapted, task.support_x, task.support_y)
    A = A + LAM * torch.eye(len(A)).double()
    shrink = torch.eye(len(A)).double() - LR * A
    series = sum(torch.linalg.matrix_power(shrink, k) for k in range(kept))
    expected = LAM * LR * series @ query_gradient(line, adapted, task)
    torch.testing.assert_close(flat(gradient), expected)


@pytest.mark.parametrize("solver", [GradientDescent(5, LR), Nesterov(5, LR)])
def test_truncation_to_all_steps_is_unrolling(network, meta, task, solver):
    whole, _ = learner(network, "unrolled", solver).task_gradient(meta, task)
    kept, _ = learner(network, "truncated", solver, truncate=5).task_gradient(meta, task)
    fewer, _ = learner(network, "truncated", solver, truncate=4).task_gradient(meta, task)

    torch.testing.assert_close(flat(kept), flat(whole))
    assert not torch.allclose(flat(fewer), flat(whole), rtol=1e-2)


def test_taking_the_matrix_for_lambda_is_first_order_maml(network, meta, task):
    solver = GaussNewtonSteps(2)
    identity = build_linear_solver("identity", 5, 0.0, LAM)

    implicit, _ = learner(network, "implicit", solver, linear_solver=identity).task_gradient(
        meta, task
    )
    first_order, _ = learner(network, "first-order", solver).task_gradient(meta, task)

    torch.testing.assert_close(flat(implicit), flat(first_order))


def test_a_neumann_series_is_the_sum_of_its_terms(network, meta, task):
    solver, alpha = GaussNewtonSteps(2), 0.2
    gradient, _ = learner(
        network, "implicit", solver, curvature="hessian",
        linear_solver=hypergrad.Neumann(terms=4, step_size=alpha),
    ).task_gradient(meta, task)  # fmt: skip

    adapted = solver(network_problem(task.support_x, task.support_y, network), meta)
    A = dense_hessian(network, adapted, task.support_x, task.support_y)
    A = A + LAM * torch.eye(len(A)).double()
    term = query_gradient(network, adapted, task)
    total = torch.zeros_like(term)
    for _ in range(4):
        total, term = total + alpha * term, term - alpha * A @ term
    torch.testing.assert_close(flat(gradient), LAM * total)


def test_the_pooled_network_in_a_batch_of_tasks_is_the_loop():
    torch.manual_seed(8)
    network = PooledConvNet(ways=2, side=32, channels=3).double()
    params = {name: leaf.detach() for name, leaf in network.named_parameters()}
    labels = torch.arange(2).expand(2, 2)
    pictures = torch.rand(2, 2, 2, 1, 32, 32).double()
    tasks = Episodes(pictures[0], labels, pictures[1], labels)
    own = dataclasses.replace(
        learner(network, "implicit", GradientDescent(2, 0.1), curvature="hessian"),
        loss=torch.nn.functional.cross_entropy,
    )

    batched, _ = own.meta_gradient(params, tasks)

    each = [flat(own.task_gradient(params, Episodes(*(p[k] for p in tasks)))[0]) for k in range(2)]
    torch.testing.assert_close(flat(batched), sum(each) / 2)
