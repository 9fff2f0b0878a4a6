"""A product against differences of the gradient: no false alarm, and every planted fault."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from hypergrad._autograd import tested_nodes
from hypergrad._autograd.second_derivative import Verdict, compare_product, nodes_of

NETWORKS = 300
DTYPES = [torch.float64, torch.float32]


class Problem:
    """A loss of a flat vector, its gradient and its recorded product."""

    def __init__(self, loss, leaves):
        self.sizes = [leaf.numel() for leaf in leaves]
        self.shapes = [leaf.shape for leaf in leaves]
        self.point = torch.cat([leaf.detach().reshape(-1) for leaf in leaves])
        self.loss = loss
        self.variable = self.point.clone().requires_grad_()
        self.value = self.of_vector(self.variable)
        (self.recorded,) = torch.autograd.grad(self.value, self.variable, create_graph=True)

    def of_vector(self, x):
        parts = [p.view(s) for p, s in zip(x.split(self.sizes), self.shapes, strict=True)]
        return self.loss(*parts)

    def gradient(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.of_vector(x), x)[0]

    def product(self, v):
        return torch.autograd.grad(self.recorded, self.variable, v, retain_graph=True)[0]

    def compared(self):
        return compare_product(self.gradient, self.point, self.product, self.sizes)


def network(module, loss, *data):
    """The problem of a module's parameters."""
    names = list(dict(module.named_parameters()))

    def of_leaves(*leaves):
        state = dict(zip(names, leaves, strict=True))
        return loss(functional_call(module, state, data[:1]), *data[1:])

    return Problem(of_leaves, list(module.parameters()))


def drawn_network(seed, dtype):
    """A small network at any point of its training: kinks, norms, scales and flat directions."""
    torch.manual_seed(seed)

    def pick(*options):
        return options[int(torch.randint(len(options), ()))]

    rows, width, depth = pick(3, 10, 50), pick(2, 8, 20), pick(1, 2, 3)
    activation = pick(
        nn.ReLU, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus
    )
    layers, features = [], 3
    for _ in range(depth):
        layers.append(nn.Linear(features, width))
        norm = pick(None, None, "batch", "layer")
        if norm == "batch":
            layers.append(nn.BatchNorm1d(width, track_running_stats=False))
        elif norm == "layer":
            layers.append(nn.LayerNorm(width))
        layers.append(activation())
        features = width
    module = nn.Sequential(*layers, nn.Linear(features, 3)).to(dtype)
    if pick(True, False):
        nn.init.zeros_(module[-1].bias)
    x = torch.randn(rows, 3, dtype=dtype) * pick(0.1, 1.0, 1.0, 30.0)
    decay, scale = pick(0.0, 1e-3, 1.0), pick(1e-4, 1.0, 1.0, 1e6)
    if pick(True, False):
        labels = torch.randint(3, (rows,))
        fit = lambda out: F.cross_entropy(out, labels)
    else:
        y = torch.randn(rows, 3, dtype=dtype) * pick(1.0, 1000.0)
        fit = lambda out: F.mse_loss(out, y, reduction="sum")
    optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(pick(0, 0, 5, 200)):
        optimiser.zero_grad()
        fit(module(x)).backward()
        optimiser.step()
    names = list(dict(module.named_parameters()))

    def loss(*leaves):
        value = fit(functional_call(module, dict(zip(names, leaves, strict=True)), (x,)))
        return scale * (value + decay * sum(p.square().sum() for p in leaves))

    return Problem(loss, list(module.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_network_raises_a_false_alarm(dtype):
    verdicts = [drawn_network(seed, dtype).compared().verdict for seed in range(NETWORKS)]
    assert verdicts.count(Verdict.WRONG) == 0
    # In float32 a large loss leaves too few digits of a difference, which is then no verdict.
    least = 0.9 if dtype == torch.float64 else 0.6
    assert verdicts.count(Verdict.RIGHT) >= least * NETWORKS


@functools.cache
def right_networks(dtype):
    drawn = [drawn_network(seed, dtype) for seed in range(25)]
    return [problem for problem in drawn if problem.compared().verdict is Verdict.RIGHT]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.0, 2.0, 0.5, 1.1, 1.02, -1.0])
def test_a_product_that_is_off_is_never_right(dtype, factor):
    verdicts = []
    for problem in right_networks(dtype):
        off = lambda v, product=problem.product: factor * product(v)
        found = compare_product(problem.gradient, problem.point, off, problem.sizes)
        verdicts.append(found.verdict)
    assert len(verdicts) > 10
    assert Verdict.RIGHT not in verdicts
    # 2% is more than some differences in float32 resolve.
    least = 0.5 if dtype == torch.float32 and factor == 1.02 else 0.9
    assert verdicts.count(Verdict.WRONG) >= least * len(verdicts)


class Slope(torch.autograd.Function):
    """The identity, whose own derivative is off by a factor: 0 is that of a detached tensor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return ctx.factor * g, None


class Kernel(torch.autograd.Function):
    """sin(x), with the right derivative, and a second derivative that is off by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * Slope.apply(ctx.saved_tensors[0].cos(), ctx.factor), None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.0, 2.0, 1.1, 1.02])
def test_a_custom_function(dtype, factor):
    torch.manual_seed(0)
    w, t = (torch.rand(40, dtype=dtype) + 1 for _ in range(2))
    problem = Problem(lambda w: (t * Kernel.apply(w, factor)).sum(), [w])
    assert (
        "KernelBackward" in nodes_of([problem.value, problem.recorded]) - tested_nodes.TESTED_NODES
    )
    found = problem.compared()
    assert found.verdict is (Verdict.RIGHT if factor == 1 else Verdict.WRONG)
    # A product that is 1.02 of the right one is 2/102 off.
    truth = abs(factor - 1) / max(factor, 1)
    assert found.error == pytest.approx(truth, abs=1e-6 if dtype == torch.float64 else 2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_a_fault_in_a_small_leaf_is_found_whatever_its_units(dtype, spread):
    torch.manual_seed(1)
    a, b = torch.randn(30, dtype=dtype) * spread, torch.randn(3, dtype=dtype) / spread

    def loss(a, b):
        scaled, other = a / spread, b * spread
        return (scaled.square().sum() + 1).log() + 0.1 * (other.sum() * scaled.mean()).sin()

    problem = Problem(loss, [a, b])
    assert problem.compared().verdict is Verdict.RIGHT

    def off(v):
        product = problem.product(v).clone()
        product[30:] *= 1.2
        return product

    found = compare_product(problem.gradient, problem.point, off, problem.sizes)
    assert found.verdict is Verdict.WRONG
    assert found.leaf == 1
    assert found.error == pytest.approx(1 / 6, rel=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_weight_norm_is_wrong(dtype):
    torch.manual_seed(0)
    put = nn.utils.parametrizations.weight_norm
    module = nn.Sequential(put(nn.Linear(3, 8)), nn.Tanh(), put(nn.Linear(8, 2))).to(dtype)
    x, y = torch.randn(20, 3, dtype=dtype), torch.randn(20, 2, dtype=dtype)
    problem = network(module, F.mse_loss, x, y)
    assert problem.compared().verdict is Verdict.WRONG
    assert "WeightNormInterfaceBackward0" in nodes_of([problem.value, problem.recorded])


@pytest.mark.parametrize("dtype", DTYPES)
def test_spectral_norm_lacks_the_movement_of_its_vectors(dtype):
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)).to(dtype)
    state = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    x, y = torch.randn(20, 4, dtype=dtype), torch.randn(20, 4, dtype=dtype)
    names = list(dict(layer.named_parameters()))

    def loss(*leaves):
        buffers = {name: buffer.clone() for name, buffer in state.items()}
        given = {**buffers, **dict(zip(names, leaves, strict=True))}
        return F.mse_loss(functional_call(layer, given, (x,)), y)

    layer.train()
    assert Problem(loss, list(layer.parameters())).compared().verdict is Verdict.WRONG
    layer.eval()
    assert Problem(loss, list(layer.parameters())).compared().verdict is Verdict.RIGHT


def test_what_cannot_be_resolved_is_no_verdict():
    nan = lambda x: x * torch.nan
    x = torch.ones(3, dtype=torch.float64)
    assert compare_product(nan, x, torch.zeros_like).verdict is Verdict.UNDECIDED
    assert compare_product(torch.zeros_like, x, nan).verdict is Verdict.UNDECIDED
    # The kink of |x| at 0: neither slope of the derivative is that of both sides.
    kink = torch.tensor([1e-9, 1.0], dtype=torch.float64)
    assert compare_product(torch.sign, kink, torch.zeros_like).verdict is Verdict.UNDECIDED
    noise = iter(torch.randn(20, 3, dtype=torch.float64))
    drawn = lambda x: x + next(noise)
    assert compare_product(drawn, x, lambda v: 2 * v).verdict is Verdict.UNDECIDED
    assert compare_product(nan, x.half(), nan).verdict is Verdict.UNDECIDED
    assert compare_product(nan, x[:0], nan).verdict is Verdict.UNDECIDED


def test_a_linear_gradient_and_none_at_all_are_right():
    x = torch.zeros(5, dtype=torch.float64)
    A = torch.randn(5, 5, dtype=torch.float64)
    assert compare_product(lambda x: A @ x, x, lambda v: A @ v).verdict is Verdict.RIGHT
    assert compare_product(torch.ones_like, x, torch.zeros_like).verdict is Verdict.RIGHT
    # A function of other length than its argument, and tasks in front.
    assert compare_product(lambda x: A[:2] @ x, x, lambda v: A[:2] @ v).verdict is Verdict.RIGHT
    x = torch.randn(4, 5, dtype=torch.float64)
    of_tasks = lambda product: compare_product(lambda x: x @ A.T, x, product, [2, 3]).verdict
    assert of_tasks(lambda v: v @ A.T) is Verdict.RIGHT
    assert of_tasks(lambda v: v @ A) is Verdict.WRONG


def test_no_random_numbers_of_the_caller_are_drawn_and_nothing_is_recorded():
    problem = drawn_network(3, torch.float64)
    before = torch.get_rng_state()
    asked = []
    gradient = lambda x: (asked.append(x.requires_grad), problem.gradient(x))[1]
    first = compare_product(gradient, problem.point, problem.product, problem.sizes)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == compare_product(gradient, problem.point, problem.product, problem.sizes)
    assert not any(asked)
