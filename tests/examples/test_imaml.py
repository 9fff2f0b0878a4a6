"""The two examples that teach iMAML are short and right, and they run."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.func import grad, hessian, jacrev
from torch.nn.functional import cross_entropy

from examples import imaml_omniglot, imaml_sinusoid
from examples.imaml import omniglot, sinusoid
from reproduction.method.episodes import Episodes
from reproduction.runs import omniglot as omniglot_runs
from reproduction.runs import sinusoid as sinusoid_runs

ROOT = Path(__file__).parents[2]
LENGTHS = {"imaml_sinusoid": 150, "imaml_omniglot": 250}
MAY_IMPORT = {"torch", "hypergrad", "matplotlib", "reproduction", *sys.stdlib_module_names}


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example as from the command line, in an empty folder; return what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMNIGLOT_DIR", raising=False)
    threads = torch.get_num_threads()

    def of(example, *flags):
        monkeypatch.setattr(sys, "argv", [example.__name__, *flags])
        example.main()
        return capsys.readouterr().out

    yield of
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", LENGTHS)
def test_an_example_is_read_from_top_to_bottom_in_ten_minutes(name):
    text = (ROOT / f"examples/{name}.py").read_text()
    assert len(text.splitlines()) <= LENGTHS[name]
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported <= MAY_IMPORT


# Sinusoids


def sine_task():
    torch.manual_seed(0)
    theta = torch.cat([
        b * (2 * torch.rand(n) - 1)
        for n, b in zip(imaml_sinusoid.SIZES, imaml_sinusoid.BOUNDS, strict=True)
    ])
    return theta, tuple(part[0] for part in imaml_sinusoid.draw_tasks(1))


def dense_system(theta, phi, x, y):
    """Return the Gauss-Newton matrix, and the gradient, of the inner objective at phi."""
    J = jacrev(lambda p: imaml_sinusoid.network(p, x))(phi).reshape(len(y), -1)
    A = 2 / len(y) * J.T @ J + imaml_sinusoid.LAM * torch.eye(len(phi))
    miss = (imaml_sinusoid.network(phi, x) - y).reshape(-1)
    return A, 2 / len(y) * J.T @ miss + imaml_sinusoid.LAM * (phi - theta)


@pytest.mark.usefixtures("float64")
def test_a_step_of_the_example_is_the_dense_one_and_never_rises():
    theta, (x, y, *_) = sine_task()

    def objective(phi):
        outputs = imaml_sinusoid.network(phi, x)
        return ((outputs - y) ** 2).mean() + imaml_sinusoid.LAM / 2 * ((phi - theta) ** 2).sum()

    phi = theta
    for steps in range(1, 5):
        after = imaml_sinusoid.adapt(theta, x, y, steps=steps)
        A, slope = dense_system(theta, phi, x, y)
        whole = -torch.linalg.solve(A, slope)
        sizes = (1.0, 0.5, 0.25, 0.1, 0.03, 0.0)
        best = min(sizes, key=lambda size: objective(phi + size * whole).item())
        torch.testing.assert_close(after, phi + best * whole, rtol=1e-6, atol=1e-8)
        assert objective(after) < objective(phi)
        phi = after


@pytest.mark.usefixtures("float64")
def test_the_meta_gradient_of_the_example_is_that_of_the_dense_system():
    theta, (x, y, query_x, query_y) = sine_task()

    gradient, info = imaml_sinusoid.meta_gradient(theta, x, y, query_x, query_y)

    phi = imaml_sinusoid.adapt(theta, x, y)
    A, _ = dense_system(theta, phi, x, y)
    b = grad(lambda p: ((imaml_sinusoid.network(p, query_x) - query_y) ** 2).mean())(phi)
    expected = imaml_sinusoid.LAM * torch.linalg.solve(A, b)
    assert (gradient - expected).norm() < 1e-3 * expected.norm()
    assert info.residual_norm < 1e-2


def test_sinusoids_run_and_repeat_themselves(run, tmp_path):
    shown = [run(imaml_sinusoid, "--meta-steps", "3", "--seed", "4") for _ in range(2)]

    assert "3 meta-steps: error" in shown[0]
    assert (tmp_path / "imaml_sinusoid.png").read_bytes().startswith(b"\x89PNG")
    results = [re.search(r"sines: (.*) before, (.*) after", text).groups() for text in shown]
    assert results[0] == results[1]
    before, after = (float(part.split(" ± ")[0]) for part in results[0])
    assert after < before
    assert run(imaml_sinusoid, "--meta-steps", "3", "--seed", "5") != shown[0]


# Omniglot


def drawn_task():
    torch.manual_seed(1)
    x = torch.randn(2, 2, 6, 1, 28, 28)
    y = torch.arange(3).repeat_interleave(2).repeat(2, 1)
    return Episodes(x[0], y, x[1], y)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("lam", [1e-3, 0.5])
def test_the_solver_of_the_example_finds_the_minimum(lam):
    torch.manual_seed(2)
    z, theta, y = torch.randn(6, 9), 3 * torch.randn(3, 9), torch.tensor([0, 0, 1, 1, 2, 2])

    phi = imaml_omniglot.solve(None, z, y, theta, torch.tensor(lam))

    other = theta.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [other], max_iter=5000, tolerance_grad=1e-12, tolerance_change=0, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimiser.zero_grad()
        loss = cross_entropy(z @ other.T, y) + lam / 2 * (other - theta).square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(phi, other.detach(), rtol=1e-6, atol=1e-6)
    curvature = hessian(lambda p: imaml_omniglot.inner(p, z, y, theta, torch.tensor(lam)))(phi)
    assert torch.linalg.eigvalsh(curvature.reshape(27, 27)).min() > 0.99 * lam


@pytest.mark.usefixtures("float64")
def test_the_derivatives_of_the_example_are_central_differences():
    torch.manual_seed(3)
    learner, tasks = imaml_omniglot.Learner(ways=3, shots=2, channels=2), drawn_task()

    def loss():
        return cross_entropy(learner(tasks).flatten(0, 1), tasks.query_y.flatten())

    loss().backward()
    assert learner.evidence[0].success.all()
    for name, leaf in learner.named_parameters():
        direction = torch.randn_like(leaf)
        values = []
        with torch.no_grad():
            for step in (1e-7, -2e-7):  # ReLUs bend between larger ones
                leaf += step * direction
                values.append(loss())
            leaf += 1e-7 * direction
        expected = (values[0] - values[1]).item() / 2e-7
        slope = (leaf.grad * direction).sum().item()
        assert slope == pytest.approx(expected, rel=1e-4, abs=1e-7), name


def test_omniglot_runs_on_strokes_and_says_so(run, tmp_path):
    flags = ("--smoke", "--meta-steps", "2")
    shown = [run(imaml_omniglot, *flags, "--picture", "drawn.png") for _ in range(2)]

    accuracy = [re.search(r"synthetic strokes.* ([\d.]+) ± ", text).group(1) for text in shown]
    assert accuracy[0] == accuracy[1]
    assert 20 < float(accuracy[0]) <= 100
    assert "solves converged: 100.0%" in shown[0]
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_omniglot_takes_other_settings(run):
    shown = run(imaml_omniglot, "--smoke", "--meta-steps", "1", "--ways", "12", "--shots", "2")
    assert "12-way 2-shot" in shown


# The laboratory's programs by their short names


@pytest.mark.parametrize(
    ("short", "program"), [(sinusoid, sinusoid_runs), (omniglot, omniglot_runs)]
)
def test_a_short_name_is_the_program_of_the_laboratory(short, program):
    assert short.main is program.main
    shown = subprocess.run(
        [sys.executable, "-m", short.__name__, "--inner-steps", "0"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert shown.returncode == 2
    assert "--inner-steps" in shown.stderr
