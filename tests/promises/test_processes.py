"""Modules that are wrapped for, or split over, several processes: refused wherever they run."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call

import hypergrad
from hypergrad import UnsupportedOperation, implicit_grad
from hypergrad._implicit import linearisation

D = torch.float64
distributed = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")


@pytest.fixture
def group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def wrapped():
    return nn.parallel.DistributedDataParallel(nn.Linear(3, 1, dtype=D))


def loss(net, p):
    return functional_call(net, p, (torch.ones(2, 3, dtype=D),)).square().mean()


def decay(p, h):
    return h.exp() * sum((q**2).sum() for q in p.values())


class Owner:
    def __init__(self, net):
        self.net, self.nets, self.by_name = net, [net], {"net": net}

    def attribute(self, p, h):
        return loss(self.net, p) + decay(p, h)

    def in_a_list(self, p, h):
        return loss(self.nets[0], p) + decay(p, h)

    def in_a_dict(self, p, h):
        return loss(self.by_name["net"], p) + decay(p, h)

    def __call__(self, p, h):
        return self.attribute(p, h)


class Around(nn.Module):
    """A module that runs it somewhere inside."""

    def __init__(self, net):
        super().__init__()
        self.block = nn.Sequential(net, nn.Tanh())

    def forward(self, x):
        return self.block(x)


def hidden(net):
    """The same inner loss, with the module hidden in one way or another."""
    owner = Owner(net)
    helper = lambda p: loss(net, p)
    twice = lambda f: lambda p: f(p)
    deep = twice(twice(helper))
    around = Around(net)
    prefix = lambda p: {f"block.0.{k}": v for k, v in p.items()}
    return {
        "closure": lambda p, h: loss(net, p) + decay(p, h),
        "method": owner.attribute,
        "list": owner.in_a_list,
        "dict": owner.in_a_dict,
        "callable object": owner,
        "helper": lambda p, h: helper(p) + decay(p, h),
        "deep": lambda p, h: deep(p) + decay(p, h),
        "default": lambda p, h, net=net: loss(net, p) + decay(p, h),
        "keyword": lambda p, h, *, net=net: loss(net, p) + decay(p, h),
        "partial": functools.partial(lambda net, p, h: loss(net, p) + decay(p, h), net),
        "inside a module": lambda p, h: loss(around, prefix(p)) + decay(p, h),
        "no parameters of its own": lambda p, h: (
            net(torch.ones(2, 3, dtype=D)).detach().sum() + decay(p, h)
        ),
    }


@pytest.mark.parametrize("how", hidden(nn.Linear(1, 1)))
def test_row_51_data_parallel_modules_are_refused_wherever_they_hide(group, how):
    net = wrapped()
    params = {k: v.detach() for k, v in net.named_parameters()}
    h = torch.tensor(0.0, dtype=D)
    inner = hidden(net)[how]
    words = r"DistributedDataParallel.*\.module.*hypergrad\.all_reduced"
    with pytest.raises(UnsupportedOperation, match=words):
        implicit_grad(lambda p, h: decay(p, h), inner, params, h, inner_tol=None)
    with pytest.raises(UnsupportedOperation, match=words):  # in the outer loss too
        implicit_grad(inner, lambda p, h: decay(p, h) + 1, params, h, inner_tol=None)


def everywhere(net):
    params = {k: v.detach() for k, v in net.named_parameters()}
    h = torch.tensor(-1.0, dtype=D)
    inner = lambda p, h: loss(net, p) + decay(p, h)
    outer = lambda p, h: sum(q.sum() for q in p.values())

    def step(p, h):
        return {k: v - 0.1 * (loss(net, p) + h) for k, v in p.items()}

    def fit(init, h):
        return init

    def bilevel():
        p = {k: v.clone().requires_grad_() for k, v in params.items()}
        hypergrad.Bilevel(
            outer,
            inner,
            p,
            h.clone().requires_grad_(),
            inner_optimizer=functools.partial(torch.optim.SGD, lr=0.05),
            outer_optimizer=functools.partial(torch.optim.SGD, lr=0.05),
        ).step()

    def decorated(decorate):
        lam = h.clone().requires_grad_()
        solve = decorate(fit)
        outer(solve(params, lam), lam).backward()

    estimates = {
        "unrolled": lambda: hypergrad.unrolled_grad(outer, step, params, h, steps=2),
        "forward": lambda: hypergrad.unrolled_grad(outer, step, params, h, steps=2, mode="forward"),
        "truncated": lambda: hypergrad.unrolled_grad(outer, step, params, h, steps=3, truncate=1),
        "one step": lambda: hypergrad.one_step_grad(outer, step, params, h),
        "evolution": lambda: hypergrad.evolution_strategies_grad(outer, step, params, h, steps=1),
        "differences": lambda: hypergrad.finite_difference_grad(outer, inner, params, h, lr=0.1),
        "penalty": lambda: hypergrad.penalty_grad(outer, inner, params, h, lr=0.1, penalty=10.0),
        "value function": lambda: hypergrad.value_function_grad(outer, inner, params, h, lr=0.1),
    }
    return {
        **estimates,
        "argmin": lambda: decorated(hypergrad.custom_argmin(inner)),
        "fixed point": lambda: decorated(hypergrad.custom_fixed_point(step)),
        "bilevel": bilevel,
        **{
            f"inner solver {name}": lambda name=name: getattr(hypergrad.inner_solvers, name)()(
                inner, params, h
            )
            for name in ("GradientDescent", "LBFGS", "NewtonCG")
        },
        "root_vjp": lambda: hypergrad.root_vjp(step, params, (h,), params),
        "check": lambda: hypergrad.check_hypergrad(outer, inner, lambda h: params, h),
    }


@pytest.mark.parametrize("part", everywhere(nn.Linear(1, 1)))
def test_row_51_data_parallel_modules_are_refused_by_every_part(group, part):
    with pytest.raises(UnsupportedOperation, match="DistributedDataParallel"):
        everywhere(wrapped())[part]()


def test_row_51_a_subclass_is_named_with_what_it_is_made_from(group):
    class Mine(nn.parallel.DistributedDataParallel):
        pass

    net = Mine(nn.Linear(3, 1, dtype=D))
    with pytest.raises(UnsupportedOperation, match="Mine, a DistributedDataParallel"):
        everywhere(net)["inner solver LBFGS"]()


def test_row_51_the_module_inside_and_one_that_does_not_run_are_right(group):
    net = wrapped()
    plain = net.module
    params = {k: v.detach() for k, v in plain.named_parameters()}

    def inner(p, h, not_used=net):
        return loss(plain, p) + decay(p, h)

    h = torch.tensor(0.0, dtype=D)
    hypergradient = implicit_grad(lambda p, h: loss(plain, p), inner, params, h, inner_tol=None)
    alone = nn.Linear(3, 1, dtype=D)
    alone.load_state_dict(plain.state_dict())
    expected = implicit_grad(
        lambda p, h: loss(alone, p),
        lambda p, h: loss(alone, p) + decay(p, h),
        params,
        torch.tensor(0.0, dtype=D),
        inner_tol=None,
    )
    torch.testing.assert_close(hypergradient, expected)


@pytest.fixture(params=["this PyTorch", "one that loses second derivatives of DTensors"])
def torches(request, monkeypatch):
    if request.param != "this PyTorch":
        monkeypatch.setattr(linearisation, "loses_derivatives", lambda: True)


@pytest.mark.usefixtures("torches")
def test_row_51_fully_shard_is_refused_by_its_name(group):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(D)
    whole = {k: v.detach().clone() for k, v in net.named_parameters()}
    fsdp.fully_shard(net)
    h = torch.tensor(0.0, dtype=D)
    for params in (dict(net.named_parameters()), whole):
        inner = lambda p, h: loss(net, p) + decay(p, h)
        with pytest.raises(UnsupportedOperation, match=r"fully_shard.*all_reduced") as caught:
            implicit_grad(lambda p, h: decay(p, h), inner, params, h, inner_tol=None)
        assert "functional_call" not in str(caught.value)
        assert str(caught.value).count("See docs/errors.md") == 1


def test_row_51_dtensors_without_second_derivatives_are_refused(group, monkeypatch):
    tensors = pytest.importorskip("torch.distributed.tensor")
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    p = {"w": tensors.distribute_tensor(torch.ones(4, dtype=D), mesh, [tensors.Shard(0)])}
    h = torch.tensor(0.0, dtype=D)
    inner = lambda p, h: decay(p, h).full_tensor()
    monkeypatch.setattr(linearisation, "loses_derivatives", lambda: True)
    with pytest.raises(UnsupportedOperation, match="loses second derivatives") as caught:
        implicit_grad(inner, inner, p, h, inner_tol=None)
    assert 'products="difference"' in str(caught.value)
    assert caught.value.argument == "params"


def test_row_51_parameters_that_are_split_over_processes_are_refused(group):
    tensors = pytest.importorskip("torch.distributed.tensor")
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    split = tensors.distribute_tensor(torch.ones(4, dtype=D), mesh, [tensors.Shard(0)])
    h = torch.tensor(0.0, dtype=D)
    with pytest.raises(UnsupportedOperation, match=r"init\['w'\] is a DTensor.*full_tensor"):
        hypergrad.inner_solvers.LBFGS()(decay, {"w": split}, h)

    net = nn.Linear(3, 4, dtype=D)
    tensors.parallel.parallelize_module(net, mesh, tensors.parallel.ColwiseParallel())
    p = {"weight": torch.ones(1, dtype=D)}
    inner = lambda p, h: net(torch.ones(2, 3, dtype=D)).sum() + decay(p, h)
    with pytest.raises(UnsupportedOperation, match=r"weight is a DTensor.*tensor parallel"):
        implicit_grad(lambda p, h: p["weight"].sum(), inner, p, h, inner_tol=None)
