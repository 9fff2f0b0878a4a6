"""Calls of networks, beside PyTorch's own list of samples: layers, losses, attention, writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

Call = tuple[str, Callable[..., Any], list[Tensor]]


def calls() -> Iterator[Call]:
    """The name of each, its function, and the tensors to differentiate by."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield from layers()
        yield from of_vectors()
        yield from attention()
        yield from writes()
        yield from products()


def layer(name: str, module: nn.Module, *inputs: Tensor) -> Call:
    """A module as a function of its inputs and parameters."""
    module = module.to(torch.float64)
    names, buffers = list(dict(module.named_parameters())), dict(module.named_buffers())
    parameters = [torch.randn_like(p) * 0.5 + 0.2 for p in module.parameters()]
    floating = [x for x in inputs if x.is_floating_point()]

    def function(*tensors: Tensor) -> Any:
        given = iter(tensors)
        called = [next(given) if x.is_floating_point() else x for x in inputs]
        state = {
            **{k: b.clone() for k, b in buffers.items()},
            **dict(zip(names, given, strict=True)),
        }
        return functional_call(module, state, tuple(called))

    return f"{name}, {'train' if module.training else 'eval'}", function, [*floating, *parameters]


def layers() -> Iterator[Call]:
    """Modules, in both modes where they differ."""
    x = {k: torch.randn(*s, dtype=torch.float64) for k, s in SHAPES.items()}
    x["i"] = torch.tensor([[0, 2, 5], [2, 3, 1]])
    modes = [
        ("BatchNorm1d", nn.BatchNorm1d(3), "2d"),
        ("BatchNorm1d of sequences", nn.BatchNorm1d(3), "1"),
        ("BatchNorm2d", nn.BatchNorm2d(3), "2"),
        ("BatchNorm2d, not affine", nn.BatchNorm2d(3, affine=False), "2"),
        ("BatchNorm2d, no statistics", nn.BatchNorm2d(3, track_running_stats=False), "2"),
        ("BatchNorm3d", nn.BatchNorm3d(3), "3"),
        ("InstanceNorm2d", nn.InstanceNorm2d(3, affine=True, track_running_stats=True), "2"),
        ("Dropout", nn.Dropout(0.3), "2d"),
        ("Dropout2d", nn.Dropout2d(0.3), "2"),
        ("AlphaDropout", nn.AlphaDropout(0.3), "2d"),
        ("RReLU", nn.RReLU(), "2d"),
        ("LSTM, dropout", nn.LSTM(3, 4, 2, dropout=0.3, batch_first=True), "1t"),
        ("TransformerEncoderLayer", nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), "e"),
        ("TransformerEncoderLayer, norm first",
         nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", norm_first=True), "e"),
    ]  # fmt: skip
    for name, module, shape in modes:
        yield layer(name, module.train(), x[shape])
        yield layer(name, module.eval(), x[shape])
    plain = [
        ("Linear", nn.Linear(3, 2), "2d"),
        ("Linear, no bias", nn.Linear(3, 2, bias=False), "2d"),
        ("Linear of a sequence", nn.Linear(5, 2), "1"),
        ("Linear of a vector", nn.Linear(3, 2), "v"),
        ("Conv1d", nn.Conv1d(3, 2, 3, padding=1), "1"),
        ("Conv1d, same", nn.Conv1d(3, 2, 3, padding="same", padding_mode="circular"), "1"),
        ("Conv2d", nn.Conv2d(3, 2, 3), "2"),
        ("Conv2d, strided", nn.Conv2d(3, 2, 3, stride=2, padding=1), "2"),
        ("Conv2d, dilated", nn.Conv2d(3, 2, 2, dilation=2), "2"),
        ("Conv2d, depthwise", nn.Conv2d(3, 6, 3, groups=3, bias=False), "2"),
        ("Conv2d, reflected", nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"), "2"),
        ("Conv2d, one picture", nn.Conv2d(3, 2, 3), "p"),
        ("Conv3d", nn.Conv3d(3, 2, 2), "3"),
        ("ConvTranspose1d", nn.ConvTranspose1d(3, 2, 3, stride=2), "1"),
        ("ConvTranspose2d", nn.ConvTranspose2d(3, 2, 3, stride=2, output_padding=1), "2"),
        ("ConvTranspose3d", nn.ConvTranspose3d(3, 2, 2), "3"),
        ("LayerNorm", nn.LayerNorm(5), "1"),
        ("LayerNorm, no bias", nn.LayerNorm(5, bias=False), "1"),
        ("LayerNorm of two", nn.LayerNorm((4, 5)), "2"),
        ("LayerNorm, not affine", nn.LayerNorm(5, elementwise_affine=False), "1"),
        ("GroupNorm", nn.GroupNorm(3, 3), "2"),
        ("GroupNorm, one group", nn.GroupNorm(1, 3), "2"),
        ("InstanceNorm1d", nn.InstanceNorm1d(3, affine=True), "1"),
        ("InstanceNorm3d", nn.InstanceNorm3d(3), "3"),
        ("RMSNorm", nn.RMSNorm(5), "1"),
        ("LocalResponseNorm", nn.LocalResponseNorm(2), "2"),
        ("RNN, tanh", nn.RNN(3, 4, batch_first=True), "1t"),
        ("RNN, relu", nn.RNN(3, 4, nonlinearity="relu"), "1t"),
        ("RNNCell", nn.RNNCell(3, 4), "2d"),
        ("LSTM", nn.LSTM(3, 4), "1t"),
        ("LSTM, bidirectional", nn.LSTM(3, 2, 2, bidirectional=True), "1t"),
        ("LSTM, projected", nn.LSTM(3, 4, proj_size=2), "1t"),
        ("LSTMCell", nn.LSTMCell(3, 4), "2d"),
        ("GRU", nn.GRU(3, 4), "1t"),
        ("GRU, bidirectional", nn.GRU(3, 2, bidirectional=True, batch_first=True), "1t"),
        ("GRUCell", nn.GRUCell(3, 4), "2d"),
        ("Bilinear", Pair(nn.Bilinear(3, 3, 2)), "2d"),
        ("PReLU", nn.PReLU(3), "2"),
        ("Embedding", nn.Embedding(6, 3), "i"),
        ("Embedding, padded", nn.Embedding(6, 3, padding_idx=1), "i"),
        ("Embedding, by frequency", nn.Embedding(6, 3, scale_grad_by_freq=True), "i"),
        ("EmbeddingBag, sum", nn.EmbeddingBag(6, 3, mode="sum"), "i"),
        ("EmbeddingBag, mean", nn.EmbeddingBag(6, 3), "i"),
        ("EmbeddingBag, max", nn.EmbeddingBag(6, 3, mode="max"), "i"),
        ("MaxPool2d", nn.MaxPool2d(2), "2"),
        ("AvgPool2d", nn.AvgPool2d(2, padding=1), "2"),
        ("LPPool2d", nn.LPPool2d(2, 2), "2+"),
        ("AdaptiveAvgPool2d", nn.AdaptiveAvgPool2d(1), "2"),
        ("AdaptiveAvgPool2d of 2", nn.AdaptiveAvgPool2d(2), "2"),
        ("AdaptiveMaxPool2d", nn.AdaptiveMaxPool2d(2), "2"),
        ("Upsample, nearest", nn.Upsample(scale_factor=2), "2"),
        ("Upsample, bilinear", nn.Upsample(scale_factor=2, mode="bilinear"), "2"),
        ("ZeroPad2d", nn.ZeroPad2d(1), "2"),
        ("ReplicationPad2d", nn.ReplicationPad2d(1), "2"),
        ("ReflectionPad1d", nn.ReflectionPad1d(2), "1"),
        ("PixelShuffle", nn.PixelShuffle(2), "4"),
        ("MultiheadAttention", Own(nn.MultiheadAttention(4, 2, batch_first=True)), "e"),
        ("MultiheadAttention, no weights",
         Own(nn.MultiheadAttention(4, 2, batch_first=True), need_weights=False), "e"),
        ("TransformerDecoderLayer", Pair(nn.TransformerDecoderLayer(4, 2, 6, 0.0)), "e"),
        ("AdaptiveLogSoftmaxWithLoss", Labelled(nn.AdaptiveLogSoftmaxWithLoss(3, 6, [2, 4])), "2d"),
        ("weight_norm, parametrised",
         nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), "2d"),
        ("weight_norm of old", nn.utils.weight_norm(nn.Linear(3, 2)), "2d"),
        ("orthogonal, exponential",
         nn.utils.parametrizations.orthogonal(nn.Linear(3, 3), "weight", "matrix_exp"), "2d"),
        ("orthogonal, Cayley",
         nn.utils.parametrizations.orthogonal(nn.Linear(3, 3), "weight", "cayley"), "2d"),
    ]  # fmt: skip
    for name, module, shape in plain:
        yield layer(name, module, x[shape])
    for activation in ACTIVATIONS:
        yield layer(activation, getattr(nn, activation)(), x["2d"])


SHAPES = {
    "v": (3,), "2d": (4, 3), "1": (2, 3, 5), "1t": (2, 3, 3), "e": (2, 3, 4), "2": (2, 3, 4, 5),
    "2+": (2, 3, 4, 4), "p": (3, 4, 5), "3": (2, 3, 3, 3, 4), "4": (1, 4, 2, 3),
}  # fmt: skip
ACTIVATIONS = (
    "ReLU", "ReLU6", "LeakyReLU", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish", "Sigmoid", "Tanh",
    "LogSigmoid", "Softplus", "Softsign", "Tanhshrink", "Hardtanh", "Hardswish", "Hardsigmoid",
    "Hardshrink", "Softshrink",
)  # fmt: skip


class Pair(nn.Module):
    """A module of two inputs, given one twice."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, x.sin())


class Own(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self, module: nn.MultiheadAttention, **options: Any) -> None:
        super().__init__()
        self.module, self.options = module, options

    def forward(self, x: Tensor) -> Any:
        return self.module(x, x, x, **self.options)


class Labelled(nn.Module):
    """A layer that is a loss."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x, torch.arange(x.shape[0]) % 6).loss


def of_vectors() -> Iterator[Call]:
    """Losses and functions of a few tensors."""
    y, z = (torch.randn(4, 3, dtype=torch.float64) for _ in range(2))
    positive, labels = z.exp(), torch.tensor([0, 2, 1, 2])
    p, q = y.softmax(1), z.softmax(1)
    binary = (z > 0).to(torch.float64)
    w = torch.rand(3, dtype=torch.float64) + 0.5
    sign = binary[:, 0] * 2 - 1
    yield "mse_loss", F.mse_loss, [y, z]
    yield "l1_loss", F.l1_loss, [y, z]
    yield "smooth_l1_loss", F.smooth_l1_loss, [y, z]
    yield "huber_loss", F.huber_loss, [y, z]
    yield "cross_entropy", lambda a: F.cross_entropy(a, labels), [y]
    yield "cross_entropy, weight", lambda a: F.cross_entropy(a, labels, w), [y]
    yield "cross_entropy, smoothed", lambda a: F.cross_entropy(a, labels, label_smoothing=0.1), [y]
    yield "cross_entropy, probabilities", F.cross_entropy, [y, q]
    yield "nll_loss", lambda a: F.nll_loss(a.log_softmax(1), labels, reduction="sum"), [y]
    yield "nll_loss2d", lambda a: F.nll_loss(a.view(1, 3, 2, 2), labels.view(1, 2, 2)), [y]
    yield "bce", lambda a: F.binary_cross_entropy(a.sigmoid(), binary), [y]
    yield "bce, logits", lambda a: F.binary_cross_entropy_with_logits(a, binary, w), [y]
    yield "bce, logits, targets", F.binary_cross_entropy_with_logits, [y, p]
    yield "kl_div", lambda a, b: F.kl_div(a.log_softmax(1), b), [y, q]
    yield "kl_div, log", lambda a, b: F.kl_div(a, b, log_target=True, reduction="sum"), [y, z]
    yield "poisson_nll_loss", F.poisson_nll_loss, [y, positive]
    yield "gaussian_nll_loss", F.gaussian_nll_loss, [y, z, positive]
    yield "soft_margin_loss", lambda a: F.soft_margin_loss(a, 2 * binary - 1), [y]
    yield "hinge_embedding_loss", lambda a: F.hinge_embedding_loss(a, 2 * binary - 1), [y]
    yield "cosine_embedding_loss", lambda a, b: F.cosine_embedding_loss(a, b, sign), [y, z]
    yield "margin_ranking_loss", lambda a, b: F.margin_ranking_loss(a, b, 2 * binary - 1), [y, z]
    yield "triplet_margin_loss", F.triplet_margin_loss, [y, z, positive]
    yield "multi_margin_loss", lambda a: F.multi_margin_loss(a, labels), [y]
    yield "multilabel_soft_margin_loss", lambda a: F.multilabel_soft_margin_loss(a, binary), [y]
    yield (
        "ctc_loss",
        lambda a: F.ctc_loss(a.view(4, 1, 3).log_softmax(2), torch.tensor([[1, 2]]), (4,), (2,)),
        [y],
    )
    yield "cosine_similarity", F.cosine_similarity, [y, z]
    yield "pairwise_distance", F.pairwise_distance, [y, z]
    yield "cdist", torch.cdist, [y, z]
    yield "pdist", F.pdist, [y]
    yield "normalize", F.normalize, [y]
    yield "softplus, steep", lambda a: F.softplus(a, 3.0, 2.0), [y]
    yield "gelu, tanh", lambda a: F.gelu(a, approximate="tanh"), [y]
    yield "glu", lambda a: F.glu(a, 0), [y]
    yield "weight_norm, fused", lambda v, g: torch._weight_norm(v, g, 0), [y, positive[:, :1]]
    yield (
        "checkpoint",
        lambda a, b: checkpoint(lambda s, t: (s @ t.T).tanh(), a, b, use_reentrant=False),
        [y, z],
    )


def attention() -> Iterator[Call]:
    """Scaled products of queries, keys and values, by each kernel."""
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(3, 3, dtype=torch.float64)

    def by(kernel: SDPBackend, **options: Any) -> Callable[..., Tensor]:
        def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v, mask, **options)

        return function

    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        yield f"attention, {kernel.name}", by(kernel), [q, k, v]
        yield f"attention, {kernel.name}, causal", by(kernel, is_causal=True), [q, k, v]
        yield f"attention, {kernel.name}, mask", by(kernel), [q, k, v, bias]
    yield "attention, MATH, dropout", by(SDPBackend.MATH, dropout_p=0.2), [q, k, v]
    grouped = by(SDPBackend.MATH, enable_gqa=True)
    yield "attention, MATH, grouped", grouped, [torch.cat([q, q * 2], 1), k, v]
    boolean = torch.tril(torch.ones(3, 3, dtype=torch.bool))
    yield "attention, MATH, bool", lambda *a: by(SDPBackend.MATH)(*a, boolean), [q, k, v]


def writes() -> Iterator[Call]:
    """Writes in place and views, which leave nodes of their own."""
    y, z = (torch.randn(4, 3, dtype=torch.float64) for _ in range(2))
    rows = torch.tensor([0, 2, 2, 1])
    mask = y > 0

    def wrote(write: Callable[..., Any]) -> Callable[..., Tensor]:
        def function(a: Tensor, *others: Tensor) -> Tensor:
            copy = a * 1.5
            write(copy, *others)
            return copy

        return function

    yield "write a row", wrote(lambda a, b: a[1].copy_(b[0])), [y, z]
    yield "write an index", wrote(lambda a, b: a.__setitem__(rows[:2], b[:2])), [y, z]
    yield "write a mask", wrote(lambda a, b: a.__setitem__(mask, b[mask])), [y, z]
    yield "write a slice", wrote(lambda a, b: a[:, 1:].mul_(b[:, 1:])), [y, z]
    yield "write a diagonal", wrote(lambda a, b: a.diagonal().add_(b[:3, 0])), [y, z]
    yield "write a transpose", wrote(lambda a, b: a.t().sub_(b.t() ** 2)), [y, z]
    yield "add_", wrote(lambda a, b: a.add_(b, alpha=0.3)), [y, z]
    yield "mul_", wrote(lambda a, b: a.mul_(b)), [y, z]
    yield "div_", wrote(lambda a, b: a.div_(b.exp())), [y, z]
    yield "addmm_", wrote(lambda a, b: a.addmm_(b, b[:3])), [y, z]
    yield "lerp_", wrote(lambda a, b: a.lerp_(b, 0.3)), [y, z]
    yield "addcmul_", wrote(lambda a, b: a.addcmul_(b, b)), [y, z]
    yield "index_add_", wrote(lambda a, b: a.index_add_(0, rows, b)), [y, z]
    yield "scatter_add_", wrote(lambda a, b: a.scatter_add_(0, rows.view(4, 1), b[:, :1])), [y, z]
    yield "masked_fill_", wrote(lambda a: a.masked_fill_(mask, 2.0)), [y]
    yield "fill_ a row", wrote(lambda a: a[0].fill_(2.0)), [y]
    yield "zero_ a column", wrote(lambda a: a[:, 0].zero_()), [y]
    yield "relu_", wrote(lambda a: a.relu_()), [y]
    yield "tanh_", wrote(lambda a: a.tanh_()), [y]
    yield "clamp_", wrote(lambda a: a.clamp_(-0.5, 0.7)), [y]
    yield "clamp_min_", wrote(lambda a: a.clamp_min_(0.1)), [y]
    yield "empty, filled by rows", by_rows, [y, z]
    yield "to float32 and back", lambda a: a.float().double() * a, [y]
    yield "flat parts", lambda a: torch.cat([p.reshape(-1) for p in a.flatten().split([5, 7])]), [y]
    yield "views", lambda a: a.view(2, 6).unfold(1, 3, 2).narrow(2, 1, 2).expand(3, 2, 2, 2), [y]


def by_rows(a: Tensor, b: Tensor) -> Tensor:
    """Rows computed one after another into a buffer, as loops over time do."""
    state = torch.zeros(3, dtype=torch.float64)
    out = torch.empty(4, 3, dtype=torch.float64)
    for t in range(4):
        state = torch.tanh(a[t] + 0.5 * state * b[t])
        out[t] = state
    return out


def products() -> Iterator[Call]:
    """Matrix products, linear algebra and small compositions of them."""
    A = torch.randn(3, 3, dtype=torch.float64) + 3 * torch.eye(3, dtype=torch.float64)
    B, y = torch.randn(3, 2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    batch = torch.randn(2, 3, 3, dtype=torch.float64)
    X = torch.sparse_coo_tensor(torch.tensor([[0, 1, 3], [2, 0, 1]]), torch.ones(3), (4, 3))
    X = X.to(torch.float64).coalesce()

    def definite(M: Tensor) -> Tensor:
        return M @ M.mT + torch.eye(M.shape[-1], dtype=M.dtype)

    yield "einsum", lambda a, b: torch.einsum("ij,bjk,ik->bi", a, b, a), [A, batch]
    yield "solve", lambda a, b: torch.linalg.solve(a, b), [A, B]
    yield "solve, left", lambda a, b: torch.linalg.solve(a, b, left=False), [A, y]
    yield "inverse", torch.linalg.inv, [A]
    yield "cholesky", lambda a: torch.linalg.cholesky(definite(a)), [A]
    yield (
        "cholesky_solve",
        lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky(definite(a))),
        [A, B],
    )
    yield (
        "cholesky_inverse",
        lambda a: torch.cholesky_inverse(torch.linalg.cholesky(definite(a))),
        [A],
    )
    yield "logdet", lambda a: torch.logdet(definite(a)), [A]
    yield "slogdet", lambda a: torch.linalg.slogdet(a)[1], [A]
    yield "eigvalsh", lambda a: torch.linalg.eigvalsh(definite(a)), [A]
    yield "eigh, square root", lambda a: symmetric_root(definite(a)), [A]
    yield "svdvals", torch.linalg.svdvals, [B]
    yield "pinv", torch.linalg.pinv, [B]
    yield "lstsq", lambda a, b: torch.linalg.lstsq(a, b).solution, [y, torch.cat([A, A[:1]])]
    yield "matrix_exp", torch.matrix_exp, [A / 3]
    yield "solve_triangular", lambda a, b: torch.linalg.solve_triangular(a, b, upper=True), [A, B]
    yield "sparse.mm", lambda a: torch.sparse.mm(X, a), [B]
    yield "sparse @", lambda a: X @ a, [B]
    yield "vmapped", lambda a, b: torch.func.vmap(lambda M: torch.tanh(M @ a))(b), [A, batch]
    yield (
        "gradient inside",
        lambda a, b: (
            torch.autograd.grad((a @ b).tanh().sum(), a, create_graph=True)[0]
            if a.requires_grad
            else a
        ),
        [A, B],
    )
    yield "jacobian inside", lambda a, b: torch.func.jacrev(lambda M: (M @ b).tanh())(a), [A, B]
    yield "logistic of normal quantiles", lambda a: torch.special.ndtri(a.sigmoid()), [y]
    yield "where", lambda a, b: torch.where(a > 0, a * b, b.exp()), [y, y.sin()]
    yield (
        "stack and cat",
        lambda a, b: torch.cat([torch.stack([a, b]), (a * b)[None]]),
        [y, y.cos()],
    )
    yield "mean and variance", lambda a: torch.cat(torch.var_mean(a, 0)), [y]
    yield "norms", lambda a: a.norm() + a.norm(dim=1).sum() + a.norm(1) + a.norm(3, 1).sum(), [y]
    yield "powers", lambda a: a**2 + a**3 + 2.0**a + (a**2 + 1) ** 0.5 + (a**2 + 1) ** -1.5, [y]


def symmetric_root(S: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(S)
    return (vectors * values.sqrt()) @ vectors.mT
