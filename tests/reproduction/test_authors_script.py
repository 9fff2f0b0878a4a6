"""What the script of iMAML's authors computes, against dense matrices."""

import torch
from torch.func import functional_call

import hypergrad
from reproduction.method.episodes import Episodes
from reproduction.method.meta import MetaLearner
from reproduction.studies import authors_script
from tests.reproduction.small_network import POINTS, dense_hessian, flat, learner, query_gradient


def test_the_authors_script_solves_another_system_at_another_point(network, meta, task):
    lam, steps, lr = 2.0, 3, 0.1
    pulled = authors_script.PulledGradientDescent(steps, lr)
    own = learner(
        network, "implicit", pulled, curvature="hessian", lam=lam,
        linear_solver=hypergrad.CG(maxiter=200, rtol=1e-12),
    )  # fmt: skip
    gradient = flat(authors_script.script_meta_gradient(own, meta, task))

    params = {name: leaf.clone().requires_grad_() for name, leaf in meta.items()}
    optimiser = torch.optim.SGD(params.values(), lr=lr)
    for k in range(steps + 1):
        optimiser.zero_grad()
        if k < steps:
            loss = (functional_call(network, params, (task.support_x,)) - task.support_y).square()
            loss.mean().backward()
        else:
            (lam / 2 * sum((params[n] - meta[n]).square().sum() for n in meta)).backward()
        optimiser.step()
    adapted = {name: leaf.detach() for name, leaf in params.items()}
    H = dense_hessian(network, adapted, task.support_x, task.support_y)
    operator = 2 * torch.eye(len(H)).double() + H / (lam + 10)
    expected = torch.linalg.solve(operator, query_gradient(network, adapted, task))
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


def test_the_authors_operator_hardly_damps_directions_of_large_curvature():
    curvatures = torch.tensor([0.0, 2.0, 24.0, 240.0], dtype=torch.float64)
    scale = (POINTS * curvatures / 2).sqrt()  # the mean over the four outputs of (scale w)^2
    task = Episodes(
        torch.diag(scale), torch.zeros(4).double(), torch.eye(4).double(), torch.ones(4).double()
    )
    own = MetaLearner(
        lambda params, x: x @ params["w"],
        lambda outputs, y: (outputs - y).square().mean(),
        "implicit",
        lambda problem, centre: centre,
        lam=2.0,
        linear_solver=hypergrad.CG(maxiter=50, rtol=1e-12),
        clip=1e9,
    )
    meta = {"w": torch.zeros(4).double()}
    slope = torch.full((4,), -0.5).double()

    paper = own.task_gradient(meta, task)[0]["w"] / slope
    script = authors_script.script_meta_gradient(own, meta, task)["w"] / slope

    torch.testing.assert_close(paper, 1 / (1 + curvatures / 2))
    torch.testing.assert_close(script, 1 / (2 + curvatures / 12))
    assert script[3] / script[0] > 10 * paper[3] / paper[0]


def test_the_table_of_the_authors_script_is_written(tmp_path):
    authors_script.main(["--smoke", "--out", str(tmp_path)])

    rows = (tmp_path / "authors_script.md").read_text().splitlines()
    assert len(rows) == 10
    figures = [float(cell) for row in rows[2:] for cell in row.split("|")[4:6]]
    assert all(0 < figure < 10 for figure in figures)
