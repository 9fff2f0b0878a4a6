"""Losses that are sums over processes: two of them give the hypergradient of one."""

from __future__ import annotations

import datetime
import functools
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call

import hypergrad
from hypergrad import CG, MINRES, SOBA, Bilevel, Exact, all_reduced, implicit_grad
from tests.problems import F64, data

ROOT = Path(__file__).parents[2]
# Rows of the data of each process: unequal shares, and one that is empty.
SHARES = {"unequal": ([0, 7], [7, 30]), "empty": ([0, 30], [30, 30])}
ROWS, WIDTH = 30, 6


def problems():
    """Name: (outer, inner, params, hparams, solver), each made for one share of the rows."""
    x, y = data(0, ROWS, WIDTH, dtype=F64), data(1, ROWS, dtype=F64)
    x_val, y_val = data(2, ROWS, WIDTH, dtype=F64), data(3, ROWS, dtype=F64)
    labels = (y > 0).long()

    def logistic(rows, world):
        def inner(w, h):
            z = x[rows] @ w["w"] + w["b"]
            loss = nn.functional.softplus(-z * (2 * labels[rows] - 1)).sum() / ROWS
            return loss + (h["decay"].exp() @ w["w"].square() + w["b"] ** 2 / 8) / world

        def outer(w, h):
            return (x_val[rows] @ w["w"] + w["b"] - y_val[rows]).square().sum() / ROWS

        params = {"w": data(4, WIDTH, dtype=F64) / 3, "b": torch.tensor(0.2, dtype=F64)}
        return outer, inner, params, {"decay": data(5, WIDTH, dtype=F64) / 4 - 1}

    def weighted(rows, world):
        """A weight for each sample: each process's loss sees its own part of hparams alone."""

        def inner(w, h):
            errors = (x[rows] @ w - y[rows]).square()
            return (h["of each"][rows].sigmoid() * errors).sum() / ROWS + w @ w / (8 * world)

        def outer(w, h):
            return (x_val[rows] @ w - y_val[rows]).square().sum() / ROWS

        return outer, inner, data(6, WIDTH, dtype=F64), {"of each": data(7, ROWS, dtype=F64)}

    def root(rows, world):
        """A is not symmetric, and products with A itself are wanted too."""
        M = data(8, WIDTH, WIDTH, dtype=F64) / 6

        def equation(w, h):
            pull = x[rows].T @ (torch.tanh(x[rows] @ w) - h * y[rows]) / ROWS
            return pull + (w + M @ w.sin()) / world

        def outer(w, h):
            return (x_val[rows] @ w - y_val[rows]).square().sum() / ROWS + h**2 / world

        return outer, hypergrad.Root(equation), data(9, WIDTH, dtype=F64), data(10, dtype=F64)

    def network(rows, world):
        model = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, 2)).to(F64)
        params = {
            name: data(20 + i, *p.shape, dtype=F64) / 2
            for i, (name, p) in enumerate(model.named_parameters())
        }

        def loss(z, h):
            each = nn.functional.cross_entropy(z, labels[rows], reduction="none")
            return (h["of each"][rows].sigmoid() * each).sum() / ROWS

        def regulariser(w, h):
            return h["decay"].exp() * sum(p.square().sum() for p in w.values()) / world

        def outer(w, h):
            z = functional_call(model, w, (x_val[rows],))
            return nn.functional.cross_entropy(z, labels[rows], reduction="sum") / ROWS

        condition = hypergrad.GaussNewton(
            lambda w, h: functional_call(model, w, (x[rows],)), loss, regulariser
        )
        hparams = {"decay": torch.tensor(-2.0, dtype=F64), "of each": data(30, ROWS, dtype=F64)}
        return outer, condition, params, hparams

    return {
        "logistic, dense": (logistic, None),
        "logistic, CG": (logistic, CG(rtol=1e-13)),
        "logistic, MINRES": (logistic, MINRES(rtol=1e-13)),
        "weighted, dense": (weighted, Exact()),
        "weighted, CG": (weighted, CG(rtol=1e-13)),
        "root, dense": (root, None),
        "root, GMRES": (root, hypergrad.GMRES(rtol=1e-13)),
        "root, LSMR": (root, hypergrad.LSMR(rtol=1e-13)),
        "network, dense": (network, Exact()),
        "network, CG": (network, CG(rtol=1e-13)),
    }


def hypergradient(name, rows, world, wrap=lambda f: f):
    make, solver = problems()[name]
    outer, inner, params, hparams = make(rows, world)
    return implicit_grad(
        wrap(outer),
        wrap(inner),
        params,
        hparams,
        solver=solver,
        inner_tol=None,
        return_info=True,
    )


class Counted:
    """Counts the reductions, and their lengths."""

    def __enter__(self):
        self.lengths, self._real = [], dist.all_reduce

        def counted(tensor, *args, **options):
            self.lengths.append(tensor.numel())
            return self._real(tensor, *args, **options)

        dist.all_reduce = counted
        return self

    def __exit__(self, *error):
        dist.all_reduce = self._real


def raised(call):
    """The type and text of what a call raises, and how long it took."""
    begin = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "", "", time.monotonic() - begin


def in_a_rank(folder, rank):
    """Everything that two processes do together; what was seen is written to a file."""
    store = dist.FileStore(str(folder / "store"), 2)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    seen = {}
    for share, bounds in SHARES.items():
        rows = slice(*bounds[rank])
        for name in problems():
            with Counted() as reductions:
                grads, info = hypergradient(name, rows, 2, all_reduced)
            seen[share, name] = {
                "grads": grads,
                "value": info.outer_value,
                "solution": info.solution,
                "residual": info.inner_residual,
                "iterations": int(info.iterations),
                "matvecs": int(info.matvecs),
                "reductions": len(reductions.lengths),
            }
    rows = slice(*SHARES["unequal"][rank])
    seen["float32"] = in_float32(rows)
    seen["decorated"] = decorated(rows)
    seen["loop"] = loop(rows)
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    seen["mean"] = means(half, functools.partial(all_reduced, reduction="mean"))
    seen["errors"] = errors(rows, rank)
    torch.save(seen, folder / f"seen{rank}.pt")
    # One process ends in the middle: the other is told, and does not wait for the timeout.
    if rank == 1:
        os._exit(0)
    dead = raised(lambda: hypergradient("logistic, CG", rows, 2, all_reduced))
    torch.save({**seen, "dead": dead}, folder / f"seen{rank}.pt")
    os._exit(0)


def in_float32(rows):
    x, y = data(0, ROWS, WIDTH, dtype=torch.float32), data(1, ROWS, dtype=torch.float32)
    inner = all_reduced(lambda w, h: (x[rows] @ w - y[rows]).square().sum() + h.exp() * w @ w / 2)
    outer = all_reduced(lambda w, h: (x[rows] @ w).sum())
    return implicit_grad(outer, inner, torch.ones(WIDTH), torch.tensor(0.0), inner_tol=None)


def decorated(rows):
    x, y = data(0, ROWS, WIDTH, dtype=F64), data(1, ROWS, dtype=F64)

    @hypergrad.custom_argmin(
        all_reduced(lambda w, h: (x[rows] @ w - y[rows]).square().sum() + h * w @ w / 2)
    )
    def fit(init, h):
        return torch.linalg.solve(x.T @ x + h * torch.eye(WIDTH, dtype=F64), x.T @ y)

    h = torch.tensor(2.0, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(fit(None, h).square().sum(), h)
    return slope


def loop(rows, wrap=all_reduced, world=2):
    outer, inner, params, hparams = problems()["logistic, CG"][0](rows, world)
    found = []
    for method in (SOBA(inner_decay=0, outer_decay=0), hypergrad.HOAG(solver=CG())):
        bilevel = Bilevel(
            wrap(outer),
            wrap(inner),
            params,
            hparams,
            inner_optimizer=functools.partial(torch.optim.SGD, lr=0.2),
            outer_optimizer=functools.partial(torch.optim.SGD, lr=0.1),
            method=method,
        )
        for _ in range(4):
            bilevel.step()
        found.append([bilevel.params, bilevel.hparams])
    return found


def means(rows, wrap=lambda f: f):
    """Hypergradients with losses that are means over rows, penalties as in one process."""
    x, y = data(0, ROWS, WIDTH, dtype=F64)[rows], data(1, ROWS, dtype=F64)[rows]
    x_val, y_val = data(2, ROWS, WIDTH, dtype=F64)[rows], data(3, ROWS, dtype=F64)[rows]
    w, h = data(4, WIDTH, dtype=F64) / 3, data(5, WIDTH, dtype=F64) / 4
    count = x.shape[0]

    def inner(w, h):
        return (torch.tanh(x @ w) - y).square().mean() + h.exp() @ w.square()

    def outer(w, h):
        return (x_val @ w - y_val).square().mean() + h.square().sum()

    def equation(w, h):
        return x.T @ (torch.tanh(x @ w) - y) / count + h.exp() * w

    conditions = {
        "minimum": hypergrad.Minimum(inner),
        "Gauss-Newton": hypergrad.GaussNewton(
            lambda w, h: torch.tanh(x @ w),
            lambda z, h: (z - y).square().mean(),
            lambda w, h: h.exp() @ w.square(),
        ),
        "root": hypergrad.Root(equation),
        "fixed point": hypergrad.FixedPoint(lambda w, h: w - equation(w, h) / 4),
    }
    found = {}
    for name, condition in conditions.items():
        grads, info = implicit_grad(
            wrap(outer),
            wrap(condition),
            w,
            h,
            inner_tol=None,
            on_failure="ignore",
            return_info=True,
        )
        found[name] = grads, info.outer_value
    return found


class Fails:
    """Batches of which the second cannot be read in the second process."""

    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        yield 0.0
        yield 1.0 / (1 - self.rank)


def of_batches(inner, batches):
    return all_reduced(hypergrad.Minimum(lambda w, h, batch: inner(w, h), batches=batches))


def errors(rows, rank):
    """What goes wrong in one process is said in both, and they can go on."""
    outer, inner, params, hparams = problems()["logistic, CG"][0](rows, 2)
    whole = all_reduced(outer), all_reduced(inner)
    found = {}

    def broken(w, h):
        if rank == 1:
            raise ZeroDivisionError("no samples")
        return inner(w, h)

    def grad(outer, inner, params=params, hparams=hparams, **options):
        return lambda: implicit_grad(outer, inner, params, hparams, inner_tol=None, **options)

    found["a loss fails"] = raised(grad(whole[0], all_reduced(broken)))
    found["an equation fails"] = raised(
        grad(whole[0], all_reduced(hypergrad.Root(lambda w, h: broken(w, h) and w)))
    )
    other = {**params, "w": params["w"] + (0.01 if rank else 0.0)}
    found["other params"] = raised(grad(*whole, params=other))
    found["other hparams"] = raised(grad(*whole, hparams={"decay": hparams["decay"] + rank}))
    start = {**params, "w": params["w"] * (1 + rank)}
    found["other x0"] = raised(grad(*whole, solver=CG(), x0=start))
    found["one is not wrapped"] = raised(grad(outer, whole[1]))
    found["the other is not wrapped"] = raised(grad(whole[0], inner))
    found["batches"] = raised(grad(whole[0], of_batches(inner, [0.0] * (2 + rank))))
    found["batches fail"] = raised(grad(whole[0], of_batches(inner, Fails(rank))))
    found["not connected"] = raised(grad(whole[0], all_reduced(lambda w, h: (w["w"] ** 2).sum())))
    found["no part in outer"] = raised(grad(all_reduced(lambda w, h: h["decay"].sum()), whole[1]))
    found["transform"] = raised(lambda: torch.func.grad(whole[1])(params, hparams))
    found["NaN"] = raised(grad(all_reduced(lambda w, h: outer(w, h) * float("nan")), whole[1]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        implicit_grad(whole[0], whole[1], params, hparams, solver=CG(rtol=1e-14, maxiter=1))
    found["warnings"] = [str(w.message) for w in caught]
    found["afterwards"] = hypergradient("logistic, CG", rows, 2, all_reduced)[0]
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("WORLD_SIZE", None)
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"seen{rank}.pt") for rank in (0, 1)]


def flat(tree):
    leaves = torch.utils._pytree.tree_leaves(tree)
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


@pytest.mark.parametrize("name", problems())
@pytest.mark.parametrize("share", SHARES)
def test_two_processes_give_the_hypergradient_of_one(two, share, name):
    expected, info = hypergradient(name, slice(0, ROWS), 1)
    first, second = (seen[share, name] for seen in two)
    for found in (first, second):
        assert (flat(found["grads"]) - flat(expected)).norm() < 1e-10 * flat(expected).norm()
        assert (flat(found["solution"]) - flat(info.solution)).norm() < 1e-10 * flat(
            info.solution
        ).norm()
        torch.testing.assert_close(found["value"], info.outer_value, rtol=1e-12, atol=0)
        # The directions of CG, on which the Newton step is projected, make more of rounding.
        rtol = 1e-4 if "CG" in name else 1e-9
        torch.testing.assert_close(found["residual"], info.inner_residual, rtol=rtol, atol=0)
    # The same bits, and the same number of steps.
    assert flat(first["grads"]).equal(flat(second["grads"]))
    for figure in ("iterations", "matvecs", "reductions"):
        assert first[figure] == second[figure]


@pytest.mark.parametrize("name", ["minimum", "Gauss-Newton", "root", "fixed point"])
def test_means_over_equal_shares_give_the_hypergradient_of_the_mean_over_all(two, name):
    expected, value = means(slice(0, ROWS))[name]
    for seen in two:
        found, its_value = seen["mean"][name]
        assert (flat(found) - flat(expected)).norm() < 1e-10 * flat(expected).norm()
        torch.testing.assert_close(its_value, value, rtol=1e-12, atol=0)


def test_a_reduction_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="'sum' or 'mean'; got 'max'"):
        all_reduced(lambda w, h: w, reduction="max")


def test_there_is_one_reduction_for_each_product(two):
    for seen in two:
        for share in SHARES:
            found = seen[share, "logistic, CG"]
            # Two values, the gradient of the outer loss, that of the inner one twice (once to look
            # for Functions that cannot be differentiated again), and the cross derivative; then
            # the outer loss and its gradient again, a Newton step further on.
            assert found["reductions"] == found["matvecs"] + 8
            dense = seen[share, "logistic, dense"]
            assert dense["matvecs"] == WIDTH + 1
            assert dense["reductions"] == 1 + 8  # all columns in one


def test_in_float32_too(two):
    rows = slice(0, ROWS)
    x, y = data(0, ROWS, WIDTH, dtype=F64), data(1, ROWS, dtype=F64)
    expected = implicit_grad(
        lambda w, h: (x[rows] @ w).sum(),
        lambda w, h: (x[rows] @ w - y[rows]).square().sum() + h.exp() * w @ w,
        torch.ones(WIDTH, dtype=F64),
        torch.tensor(0.0, dtype=F64),
        inner_tol=None,
    )
    for seen in two:
        assert seen["float32"].dtype == torch.float32
        torch.testing.assert_close(seen["float32"].double(), expected, rtol=1e-4, atol=0)


def test_a_decorated_solver_has_the_derivative_of_one_process(two):
    x, y = data(0, ROWS, WIDTH, dtype=F64), data(1, ROWS, dtype=F64)

    def value(h):
        w = torch.linalg.solve(x.T @ x + h * torch.eye(WIDTH, dtype=F64), x.T @ y)
        return w.square().sum()

    # Each of the two shares holds half of the penalty, which is h |w|^2 together.
    truth = torch.func.grad(value)(torch.tensor(2.0, dtype=F64))
    for seen in two:
        torch.testing.assert_close(seen["decorated"], truth, rtol=1e-10, atol=0)


def test_the_loop_takes_the_steps_of_one_process(two):
    expected = loop(slice(0, ROWS), wrap=lambda f: f, world=1)
    for seen in two:
        assert (flat(seen["loop"]) - flat(expected)).norm() < 1e-10 * flat(expected).norm()
    assert flat(two[0]["loop"]).equal(flat(two[1]["loop"]))


@pytest.mark.parametrize("case", ["a loss fails", "an equation fails"])
def test_an_error_in_one_process_ends_both_at_once(two, case):
    first, second = (seen["errors"][case] for seen in two)
    assert first[0] == "RankFailed"
    assert "process 1" in first[1]
    assert second[:2] == ("ZeroDivisionError", "no samples")
    assert max(first[2], second[2]) < 20


@pytest.mark.parametrize(
    ("case", "error", "text"),
    [
        ("other params", "RankFailed", "Process 1 has other numbers than process 0"),
        ("other hparams", "RankFailed", "Process 1 has other numbers than process 0"),
        ("other x0", "RankFailed", "pass the same x0"),
        ("one is not wrapped", "UnsupportedOperation", "Wrap both in hypergrad.all_reduced"),
        ("the other is not wrapped", "UnsupportedOperation", "Wrap both"),
        ("not connected", "NotConnected", "params['b']"),
        ("no part in outer", "NotConnected", "outer does not depend on params"),
        ("transform", "UnsupportedOperation", "outside of transforms"),
        ("NaN", "NotFinite", "the outer loss"),
    ],
)
def test_mistakes_are_said_in_every_process(two, case, error, text):
    for seen in two:
        found = seen["errors"][case]
        assert found[0] == error, found
        assert text in found[1]


def test_batches_of_unequal_number_are_an_error_in_every_process(two):
    for seen in two:
        found = seen["errors"]["batches"]
        assert found[0] == "StructureMismatch", found
        assert "2 batches in this process" in found[1]


def test_batches_that_cannot_be_read_in_one_process_end_both(two):
    first, second = (seen["errors"]["batches fail"] for seen in two)
    assert first[0] == "RankFailed"
    assert "Reading batches" in first[1]
    assert second[0] == "ZeroDivisionError"


def test_warnings_are_the_same_and_the_processes_can_go_on(two):
    expected, _ = hypergradient("logistic, CG", slice(0, ROWS), 1)
    assert two[0]["errors"]["warnings"] == two[1]["errors"]["warnings"]
    (text,) = two[0]["errors"]["warnings"]
    assert "does not solve the inner problem" in text
    for seen in two:
        torch.testing.assert_close(seen["errors"]["afterwards"], expected, rtol=1e-10, atol=0)


def test_a_process_that_has_ended_is_noticed(two):
    error, text, seconds = two[0]["dead"]
    assert error == "RankFailed"
    assert "another process has ended" in text
    assert seconds < 20


def test_one_process_is_itself():
    name = "logistic, CG"
    found, _ = hypergradient(name, slice(0, ROWS), 1, all_reduced)
    expected, _ = hypergradient(name, slice(0, ROWS), 1)
    assert flat(found).equal(flat(expected))


def test_processes_that_have_not_been_joined_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(hypergrad.UnsupportedOperation, match="init_process_group"):
        hypergradient("logistic, CG", slice(0, ROWS), 1, all_reduced)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(TypeError, match="a loss or a condition"):
        all_reduced(3)

    class Other(hypergrad.conditions._base.Condition):
        functions = probe = record = None

    with pytest.raises(hypergrad.UnsupportedOperation, match="how a Other is made"):
        all_reduced(Other())


if __name__ == "__main__":
    in_a_rank(Path(sys.argv[1]), int(sys.argv[2]))
