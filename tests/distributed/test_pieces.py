"""Parameters in pieces: DTensors, fully_shard and DDP in two processes, against one process."""

import copy
import datetime
import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call

import hypergrad
from hypergrad import CG, GMRES, LSMR, MINRES, BiCGSTAB, Exact, Minimum, Neumann, implicit_grad
from hypergrad._autograd import ranks
from tests.problems import F64, data

ROOT = Path(__file__).parents[2]
ROWS, WIDTH = 20, 5
ENDS = [
    ("DTensor", "fails"),
    ("fully_shard", "fails later"),
    ("fully_shard", "no model"),
    ("DDP", "fails"),
    ("DDP", "no model"),
]
#: Whether PyTorch's DTensors can be differentiated twice.
TWICE = hasattr(pytest.importorskip("torch.distributed.tensor._redistribute"), "NestedRedistribute")
if not TWICE:
    ENDS = ENDS[1:]
twice = pytest.mark.skipif(not TWICE, reason="this PyTorch loses second derivatives of DTensors")
SOLVERS = {
    "CG": CG(rtol=1e-12),
    "MINRES": MINRES(rtol=1e-12),
    "GMRES": GMRES(rtol=1e-12),
    "BiCGSTAB": BiCGSTAB(rtol=1e-12),
    "LSMR": LSMR(rtol=1e-12),
    "Neumann": Neumann(terms=40),
    "the default": None,
}
X, Y = data(0, ROWS, WIDTH, dtype=F64), data(1, ROWS, 3, dtype=F64)
X_VAL, Y_VAL = data(2, ROWS, WIDTH, dtype=F64), data(3, ROWS, 3, dtype=F64)
HPARAMS = {"decay": torch.tensor(-1.0, dtype=F64), "of each": data(4, ROWS, dtype=F64)}


class Counter(nn.Module):
    """The identity, with a buffer of how often it has run."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1, dtype=F64))

    def forward(self, x):
        self.count += 1
        return x


def network(hidden=7):
    """A network whose rows do not divide evenly, near a minimum of the inner loss."""
    return copy.deepcopy(solved(hidden))


@functools.cache
def solved(hidden):
    torch.manual_seed(0)
    layers = nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, 3), Counter()
    model = nn.Sequential(*layers).to(F64)
    _, inner = losses(lambda p, x: functional_call(model, p, (x,)))
    params = {k: v.detach().requires_grad_() for k, v in model.named_parameters()}
    optimiser = torch.optim.LBFGS(
        params.values(), max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = inner(params, HPARAMS)
        loss.backward()
        return loss

    optimiser.step(closure)
    params = {k: v.detach() for k, v in params.items()}
    model.load_state_dict(params, strict=False)
    return model, params


def alone(solver):
    model, params = network()
    outer, inner = losses(lambda p, x: functional_call(model, p, (x,)))
    return implicit_grad(
        outer, inner, params, HPARAMS, solver=solver, return_info=True, inner_tol=None
    )


def losses(run, rows=slice(None), scale=1.0, place=lambda t: t):
    """The two losses, of some of the rows, for a module that is run in some way."""
    x, y, x_val, y_val = (place(t[rows]) for t in (X, Y, X_VAL, Y_VAL))

    def inner(p, h):
        error = (run(p, x) - y).square().sum(dim=1)
        weights = place(h["of each"])[rows] if rows != slice(None) else place(h["of each"])
        penalty = sum(whole(v.square().sum()) for v in p.values())
        fit = whole((weights.sigmoid() * error).sum()) / ROWS * scale
        return fit + whole(h["decay"]).exp() * penalty

    def outer(p, h):
        return whole((run(p, x_val) - y_val).square().sum()) / ROWS * scale

    return outer, inner


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def raised(call):
    begin = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "", "", time.monotonic() - begin


def whole_tree(tree):
    return {k: whole(v).detach() for k, v in tree.items()}


def in_a_rank(folder, rank):
    """Everything that two processes do together; what was seen is written to a file."""
    join(folder / "store", rank)
    from torch.distributed.device_mesh import init_device_mesh

    ranks._PATIENCE = 0.3  # seconds, since both arrive at once here
    mesh = init_device_mesh("cpu", (2,))
    seen = {"dtensor": dtensors(mesh, rank) if TWICE else {}, "modules": {}, "ends": {}}
    for kind in ("fully_shard", "DDP", "DDP, views"):
        seen["modules"][kind] = of_module(kind, mesh, rank)
    for number, (kind, how) in enumerate(ENDS):
        dist.destroy_process_group()  # which the last error may have broken
        join(folder / f"store{number}", rank)
        seen["ends"][kind, how] = ends(kind, how, init_device_mesh("cpu", (2,)), rank)
    torch.save(seen, folder / f"seen{rank}.pt")
    os._exit(0)


def join(path, rank):
    store, timeout = dist.FileStore(str(path), 2), datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)


def placed(mesh):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    model, params = network()
    placements = {"0.weight": Shard(0), "0.bias": Shard(0), "2.weight": Shard(1)}
    split = {
        k: distribute_tensor(v, mesh, [placements.get(k, Replicate())]) for k, v in params.items()
    }

    def replicated(t):
        if isinstance(t, DTensor):
            return t
        return DTensor.from_local(t, mesh, [Replicate()], run_check=False)

    run = lambda p, x: functional_call(model, p, (x,))
    return split, *losses(run, place=replicated)


def dtensors(mesh, rank):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    params, outer, inner = placed(mesh)
    seen = {}

    def grad(inner=inner, hparams=HPARAMS, params=params, **options):
        grads, info = implicit_grad(
            outer, inner, params, hparams, return_info=True, inner_tol=None, **options
        )
        return whole_tree(grads), info.outer_value, info.error_estimate, int(info.iterations)

    for name, solver in SOLVERS.items():
        seen[name] = grad(solver=solver)
    seen["difference"] = grad(Minimum(inner, products="difference"), solver=CG(rtol=1e-8))
    hparams = {k: v.clone().requires_grad_() for k, v in HPARAMS.items()}
    fit = hypergrad.custom_argmin(inner, solver=CG(rtol=1e-12))(lambda init, h: init)
    outer(fit(params, hparams), hparams).backward()
    seen["custom_argmin"] = {k: v.grad for k, v in hparams.items()}

    model, alone = network(hidden=8)  # PyTorch's plan asks for an even number
    both = losses(lambda p, x: functional_call(model, p, (x,)))
    expected = implicit_grad(*both, alone, HPARAMS, solver=Exact(), inner_tol=None)
    parallel = parallelize_module(
        copy.deepcopy(model), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    own = dict(parallel.named_parameters())
    both = losses(lambda p, x: functional_call(parallel, p, (x,)))
    grads = implicit_grad(*both, own, HPARAMS, solver=CG(rtol=1e-12), inner_tol=None)
    seen["parallelize_module"] = whole_tree(grads), expected

    between = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)).to(
        F64
    )
    plan = {i: ColwiseParallel(output_layouts=_replicate()) for i in ("0", "2", "3")}
    parallelize_module(between, mesh, plan)
    lossy = losses(lambda p, x: functional_call(between, p, (x,)))
    theirs = dict(between.named_parameters())
    other = {**HPARAMS, "decay": HPARAMS["decay"] + rank}
    seen["errors"] = {
        "exact": raised(lambda: grad(solver=Exact())),
        "Nystrom": raised(lambda: grad(solver=hypergrad.Nystrom(rank=3))),
        "other hparams": raised(lambda: grad(hparams=other)),
        "a part of the loss": raised(lambda: grad(lambda p, h: inner(p, h) * (1 + rank))),
        "vmap": raised(
            lambda: torch.func.vmap(lambda d: grad(hparams={**HPARAMS, "decay": d}))(
                torch.zeros(2, dtype=F64)
            )
        ),
        "twice": raised(
            lambda: torch.autograd.grad(
                outer(fit(params, hparams), hparams), list(hparams.values()), create_graph=True
            )
        ),
        "plain between": raised(lambda: implicit_grad(*lossy, theirs, HPARAMS, solver=CG())),
        "all fail": raised(lambda: grad(lambda p, h: 1 / 0)),
        "batches": raised(lambda: grad(of_batches(inner, 2 + rank))),
    }
    return seen


def of_batches(inner, number, products="exact"):
    return Minimum(lambda p, h, batch: inner(p, h), batches=[0.0] * number, products=products)


def _replicate():
    from torch.distributed.tensor import Replicate

    return Replicate()


def module_of(kind, mesh):
    from torch.distributed.fsdp import fully_shard

    module = network()[0]
    if kind == "fully_shard":
        for layer in (module[0], module[2], module):
            fully_shard(layer, mesh=mesh)
        return module
    views = kind == "DDP, views"
    return nn.parallel.DistributedDataParallel(
        module, process_group=mesh.get_group(), gradient_as_bucket_view=views
    )


def local(tensor):
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().clone()


def of_module(kind, mesh, rank):
    module = module_of(kind, mesh)
    params = dict(module.named_parameters())
    rows = slice(rank, None, 2)
    outer, inner = losses(lambda p, x: module(x), rows, scale=2.0)
    module(X[rows]).sum().backward()
    first = next(iter(params.values()))
    first.grad = None
    objects = {k: p.grad for k, p in params.items()}
    before = {k: (local(p), p.grad is None or local(p.grad)) for k, p in params.items()}
    counts = [b.clone() for b in module.buffers()]
    numbers = torch.get_rng_state()

    def unchanged():
        same = all(map(torch.equal, counts, module.buffers()))
        return (
            same
            and torch.equal(numbers, torch.get_rng_state())
            and all(
                p.grad is objects[k]
                and torch.equal(local(p), before[k][0])
                and (p.grad is None or torch.equal(local(p.grad), before[k][1]))
                for k, p in params.items()
            )
        )

    def grad(inner=inner, params=params, products="difference", outer=outer):
        condition = Minimum(inner, products=products)
        return implicit_grad(
            outer, condition, params, HPARAMS, solver=CG(rtol=1e-8), return_info=True
        )

    grads, info = grad()
    seen = {"grads": grads, "value": info.outer_value, "estimate": info.error_estimate}
    seen["unchanged"] = {"an answer": unchanged()}

    def late(p, h):
        inner(p, h)
        raise ZeroDivisionError("at the end")

    parts = [losses(lambda p, x: module(x), slice(rank + 2 * k, None, 4), 4.0) for k in (0, 1)]
    by_parts = Minimum(lambda p, h, k: parts[k][1](p, h), batches=[0, 1], products="difference")
    seen["batches"] = implicit_grad(outer, by_parts, params, HPARAMS, solver=CG(rtol=1e-8))
    seen["unchanged"]["batches"] = unchanged()
    errors = {"exact": raised(lambda: grad(products="exact"))}
    uneven = of_batches(inner, 3 - rank, "difference")
    errors["batches"] = raised(lambda: implicit_grad(outer, uneven, params, HPARAMS))
    seen["unchanged"]["uneven batches"] = unchanged()
    if kind == "fully_shard":
        module.set_requires_gradient_sync(False)
        errors["no sync"] = raised(grad)
        module.set_requires_gradient_sync(True)
    else:
        with module.no_sync():
            errors["no sync"] = raised(grad)
    seen["unchanged"]["exact"] = unchanged()
    errors["fails"] = raised(lambda: grad(late))
    seen["unchanged"]["a failure"] = unchanged()
    if kind == "DDP":
        hooked = module_of(kind, mesh)
        hooked.register_comm_hook(None, lambda state, bucket: 1 / 0)
        own = dict(hooked.named_parameters())
        through = losses(lambda p, x: hooked(x), rows, scale=2.0)
        errors["communication hook"] = raised(lambda: grad(through[1], own, outer=through[0]))
    copies = {k: v.detach().clone() for k, v in params.items()}
    errors["copies"] = raised(lambda: grad(params=copies))
    hook = first.register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    errors["hook"] = raised(grad)
    hook.remove()
    seen["unchanged"]["a hook"] = unchanged()
    return {**seen, "errors": errors}


def ends(kind, how, mesh, rank):
    """What both processes say where the loss goes wrong in the second."""
    if kind == "DTensor":
        params, outer, inner = placed(mesh)
        products = "exact"
    else:
        module, products = module_of(kind, mesh), "difference"
        params = dict(module.named_parameters())
        outer, inner = losses(lambda p, x: module(x), slice(rank, None, 2), scale=2.0)
    calls = 0

    def wrong(p, h):
        nonlocal calls
        calls += 1
        if rank == 1 and how == "no model":
            return h["decay"] * 0.0
        if rank == 1 and calls > (3 if how == "fails later" else 0):
            raise ZeroDivisionError("no samples")
        return inner(p, h)

    return raised(lambda: implicit_grad(outer, Minimum(wrong, products=products), params, HPARAMS))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    pytest.importorskip("torch.distributed.tensor")
    folder = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("WORLD_SIZE", None)
    command = [sys.executable, "-W", "ignore", __file__, str(folder)]
    ranks = [
        subprocess.Popen(
            [*command, str(r)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for r in (0, 1)
    ]
    try:
        said = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"seen{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def one():
    return alone(Exact())


def distance(found, expected):
    return max(float((found[k] - v).norm() / v.norm()) for k, v in expected.items())


@pytest.mark.parametrize("name", SOLVERS)
@twice
def test_dtensors_give_the_hypergradient_of_one_process(two, one, name):
    expected, info = alone(SOLVERS[name]) if name == "Neumann" else one
    for seen in two:
        grads, value, _, _ = seen["dtensor"][name]
        assert distance(grads, expected) < (1e-5 if name == "the default" else 1e-9)
        torch.testing.assert_close(value, info.outer_value, rtol=1e-12, atol=0)
    first, second = (seen["dtensor"][name] for seen in two)
    assert all(first[0][k].equal(second[0][k]) for k in expected)
    assert first[3] == second[3]


@twice
def test_dtensors_work_in_a_decorator(two, one):
    for seen in two:
        assert distance(seen["dtensor"]["custom_argmin"], one[0]) < 1e-9


@twice
def test_a_module_of_parallelize_module_gives_the_hypergradient_of_one_process(two):
    for seen in two:
        found = seen["dtensor"]["parallelize_module"]
        assert distance(*found) < 1e-9


@twice
def test_dtensors_by_differences_are_as_near_as_the_estimate_says(two, one):
    for seen in two:
        grads, _, estimate, _ = seen["dtensor"]["difference"]
        assert distance(grads, one[0]) < min(float(estimate), 1e-6)


@pytest.mark.parametrize(
    ("case", "error", "text"),
    [
        ("exact", "UnsupportedOperation", "Use CG()"),
        ("Nystrom", "UnsupportedOperation", "Use CG()"),
        ("other hparams", "RankFailed", "Process 1 has other numbers than process 0"),
        ("a part of the loss", "RankFailed", "returns the whole loss"),
        ("vmap", "UnsupportedOperation", "inside which a collective cannot run"),
        ("twice", "UnsupportedOperation", "it has a first derivative"),
        ("plain between", "UnsupportedOperation", "use_local_output=False"),
        ("all fail", "ZeroDivisionError", "division by zero"),
        ("batches", "StructureMismatch", "2 batches in this process"),
    ],
)
@twice
def test_what_dtensors_cannot_do_is_said_in_both_processes(two, case, error, text):
    for seen in two:
        found = seen["dtensor"]["errors"][case]
        assert found[0] == error, found
        assert text in found[1]
        assert found[2] < 20


MODULES = ["fully_shard", "DDP", "DDP, views"]


@pytest.mark.parametrize("kind", MODULES)
def test_modules_of_several_processes_give_the_hypergradient_of_one(two, one, kind):
    expected, info = one
    for seen in two:
        found = seen["modules"][kind]
        assert distance(found["grads"], expected) < min(float(found["estimate"]), 1e-6)
        torch.testing.assert_close(found["value"], info.outer_value, rtol=1e-10, atol=0)
    first, second = (seen["modules"][kind]["grads"] for seen in two)
    assert all(first[k].equal(second[k]) for k in expected)


def test_a_communication_hook_is_refused(two):
    for seen in two:
        found = seen["modules"]["DDP"]["errors"]["communication hook"]
        assert found[0] == "UnsupportedOperation", found
        assert "register_comm_hook" in found[1]


@pytest.mark.parametrize("kind", MODULES)
def test_modules_of_several_processes_take_means_over_batches(two, one, kind):
    for seen in two:
        assert distance(seen["modules"][kind]["batches"], one[0]) < 1e-6


@pytest.mark.parametrize("kind", MODULES)
def test_parameters_and_gradients_are_as_before_bit_for_bit(two, kind):
    for seen in two:
        assert all(seen["modules"][kind]["unchanged"].values()), seen["modules"][kind]["unchanged"]


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(
    ("case", "error", "text"),
    [
        ("exact", "UnsupportedOperation", 'products="difference"'),
        ("fails", "ZeroDivisionError", "at the end"),
        ("copies", "StructureMismatch", "dict(module.named_parameters())"),
        ("hook", "UnsupportedOperation", "register_post_accumulate_grad_hook"),
        ("no sync", "UnsupportedOperation", "sync"),
        ("batches", "StructureMismatch", "2 batches in this process"),
    ],
)
def test_mistakes_with_modules_of_several_processes_are_named(two, kind, case, error, text):
    for seen in two:
        found = seen["modules"][kind]["errors"][case]
        assert found[0] == error, found
        assert text in found[1]


@pytest.mark.parametrize(("kind", "how"), ENDS)
def test_a_loss_that_goes_wrong_in_one_process_ends_both(two, kind, how):
    first, second = (seen["ends"][kind, how] for seen in two)
    assert max(first[2], second[2]) < 30
    assert first[0] == "RankFailed", first
    assert "process 1" in first[1]
    expected = "NotConnected" if how == "no model" else "ZeroDivisionError"
    assert second[0] == expected, second


if __name__ == "__main__":
    in_a_rank(Path(sys.argv[1]), int(sys.argv[2]))
