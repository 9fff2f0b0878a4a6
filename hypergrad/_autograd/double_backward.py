"""PyTorch's own refusals to differentiate twice, turned into advice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .._errors import StructureMismatch, UnsupportedOperation
from .._pytrees import Tree
from .kernels import cure_of
from .trace import graph


def changed_in_place(
    who: str, what: str = "one of its arguments", leaf: str | None = None
) -> UnsupportedOperation:
    """Say that a function of the caller's has overwritten what it was given."""
    return UnsupportedOperation(
        f"{who} changes {what} in place. Use an operation that returns a new tensor, or "
        "tensor.clone().",
        leaf=leaf,
    )


#: What needs no second derivative of an inner objective.
BY_DIFFERENCES = (
    'Minimum(..., products="difference"), or the same of GaussNewton, needs first derivatives of '
    "the inner problem alone."
)
_COMPILED = "aot_autograd does not currently support double backward"
# A part of PyTorch's message, and what to do about it.
_CURES = {
    "scaled_dot_product": (
        "A fused attention kernel has no second derivative. Evaluate the losses inside "
        f"torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH). {BY_DIFFERENCES}"
    ),
    "cudnn RNN": (
        "cuDNN's LSTM and GRU have no second derivative. Evaluate the losses inside "
        f"torch.backends.cudnn.flags(enabled=False). {BY_DIFFERENCES}"
    ),
    "can't optimize a non-leaf Tensor": (
        "A step of torch.optim cannot be differentiated. Write the step out, such as w - lr * "
        "torch.func.grad(loss)(w, hparams); or run the optimiser outside, and pass what it finds "
        "to implicit_grad, or the function that runs it to custom_argmin."
    ),
    "which are tied. Consider using tie_weights=False": (
        "The module holds one weight under two names, and params holds a tensor for each. Pass "
        "dict(module.named_parameters()), in which it stands once."
    ),
    _COMPILED: (
        "A loss calls a function made by torch.compile, which has no second derivative. Use the "
        f"function that was compiled. Or leave it as it is: {BY_DIFFERENCES}"
    ),
    "compiled backward function within vmap": (
        "A function made by torch.compile cannot be differentiated inside a vmap, as the default "
        "solver of small systems wants it. Use the function that was compiled, or GMRES()."
    ),
    "Cannot access data pointer of Tensor": (
        "A function leaves PyTorch, for NumPy or SciPy, inside a torch.func transform, where a "
        "tensor has no values to be read. Write it in PyTorch's operations, or as a "
        "torch.autograd.Function with setup_context and a vmap of its own; or make one call of "
        "hypergrad for each task in place of the transform."
    ),
    "do not have strides": (
        "PyTorch's transforms do not take a matrix of this sparse layout. Pass "
        "matrix.to_sparse_coo(), or matrix.to_dense(); .backward() takes it as it is."
    ),
    "'aten::_efficientzerotensor' with arguments from the 'Sparse": (
        "Forward mode does not go through a sparse matrix in PyTorch. Use reverse mode, with "
        "torch.func.jacrev twice in place of hessian, or pass matrix.to_dense()."
    ),
    "must override the setup_context": (
        "A loss calls a torch.autograd.Function that does not work inside torch.func transforms. "
        "Write it with setup_context and generate_vmap_rule = True, or call hypergrad outside of "
        "the transform."
    ),
    "got mixed torch.Tensor and DTensor": (
        "A loss puts a plain tensor beside a DTensor, which is in pieces on several processes. "
        "Take the whole of what is reduced first, as in p.square().sum().full_tensor(), or "
        "distribute the plain one by distribute_tensor(tensor, mesh, [Replicate()])."
    ),
    "is being used in an in-place operation": str(changed_in_place("A loss")),
    "once_differentiable": (
        "A loss calls a torch.autograd.Function whose backward is marked once_differentiable, so "
        "its second derivative is lost. Write the backward in differentiable operations. "
        f"{BY_DIFFERENCES}"
    ),
}


_TWO_DTYPES = ("same dtype", "expected scalar type", "to have the same data type")


@contextmanager
def advice(trees: Sequence[Tree] = ()) -> Iterator[None]:
    """Turn PyTorch's message about a missing second derivative into one with the cure.

    Parameters
    ----------
    trees : sequence of Tree
        The arguments, to be named where they do not go together.

    Raises
    ------
    UnsupportedOperation
        In place of a RuntimeError that is known.
    StructureMismatch
        In place of one about devices or dtypes, if the arguments are of several, and of one that
        `torch.func.functional_call` raises about its arguments.
    RuntimeError
        That of PyTorch, if it is not.
    ValueError
        The same.
    AttributeError
        The same.
    """
    try:
        yield
    except (RuntimeError, ValueError, AttributeError) as error:
        advise(error, trees)
        raise


def advise(error: RuntimeError | ValueError | AttributeError, trees: Sequence[Tree] = ()) -> None:
    """Raise what `advice` raises in place of an error that is known; else return."""
    if "parameter_and_buffer_dicts" in str(error):
        raise StructureMismatch(
            "torch.func.functional_call takes parameters by name: pass "
            f"dict(module.named_parameters()) as params, not a list of them. ({error})",
            argument="params",
        ) from error
    if isinstance(error, AttributeError):
        if "has no attribute `" in str(error):  # torch.func.functional_call writes it so
            raise StructureMismatch(
                "params has names that the module has not. Pass dict(module.named_parameters()) of "
                "the module that the loss calls: not that of another, nor of a wrapper, which puts "
                f"a word such as 'module.' or '_orig_mod.' in front. ({error})",
                argument="params",
            ) from error
        return
    for part, cure in _CURES.items():
        if part in str(error):
            raise UnsupportedOperation(f"{cure} ({error})") from error
    _refuse_statistics(trees, error)
    missing = cure_of(str(error))
    if missing is not None:
        raise UnsupportedOperation(f"{missing} ({error})") from error
    if "device" in str(error):
        _refuse_two_devices(trees, error)
    if any(part in str(error) for part in _TWO_DTYPES):
        _refuse_two_dtypes(trees, error)


def _named(trees: Sequence[Tree]) -> list[tuple[str, Tensor]]:
    """List all variables with their paths."""
    return [(tree.variable_path(i), v) for tree in trees for i, v in enumerate(tree.variables)]


def _refuse_statistics(trees: Sequence[Tree], error: Exception) -> None:
    """Raise where the running statistics of a norm layer are among the variables."""
    if "is not differentiable with respect to argument 'running_" not in str(error):
        return
    running = [path for path, _ in _named(trees) if "running_" in path]
    raise StructureMismatch(
        "The running statistics of a norm layer are among the variables "
        f"({', '.join(running) or 'a leaf'}): they are buffers, which a state_dict() holds too. "
        f"Pass dict(module.named_parameters()). ({error})",
        leaf=running[0] if running else None,
    ) from error


def _refuse_two_devices(trees: Sequence[Tree], error: Exception) -> None:
    leaves = _named(trees)
    for name, leaf in leaves:
        first, other = leaves[0]
        if leaf.device != other.device:
            raise StructureMismatch(
                f"{name} is on {leaf.device} but {first} is on {other.device}; move them to one "
                f"device, or one to the other's inside the loss. ({error})",
                leaf=name,
            ) from error


def _refuse_two_dtypes(trees: Sequence[Tree], error: Exception) -> None:
    names: dict[str, str] = {}
    for path, leaf in _named(trees):
        names.setdefault(str(leaf.dtype), path)
    if names:
        given = ", ".join(f"{name} is {dtype}" for dtype, name in names.items())
        raise StructureMismatch(
            f"A loss puts tensors of several dtypes into one operation: {given}, and the data that "
            "it captures have theirs. Convert them to one, with tensor.to(params.dtype) for the "
            f"data or module.double(). ({error})"
        ) from error


def refuse_once_differentiable(value: Tensor, inputs: Sequence[Tensor]) -> None:
    """Raise if a value goes through a Function whose backward has no derivative.

    PyTorch takes such a gradient for a constant, in silence, unless the incoming derivative
    requires grad itself.

    Raises
    ------
    UnsupportedOperation
        If there is one.
    """
    custom: set[Any] = {node for node in graph(value).nodes if isinstance(node, BackwardCFunction)}
    if not custom:
        return
    # Inside a backward pass torch.compile's own refusal of a second derivative is not raised.
    compiled = [node for node in custom if node.name() == "CompiledFunctionBackward"]
    if any(_reaches(node, inputs) for node in compiled):
        raise UnsupportedOperation(_CURES[_COMPILED])
    one = torch.ones_like(value).requires_grad_()
    gradients = torch.autograd.grad(value, inputs, one, create_graph=True, allow_unused=True)
    for gradient in gradients:
        reached = graph(gradient).nodes if gradient is not None else set()
        if any(node.name() == "torch::autograd::Error" for node in reached):
            raise UnsupportedOperation(_CURES["once_differentiable"])


def _reaches(node: Any, inputs: Sequence[Tensor]) -> bool:
    """Say whether a backward from a node arrives at one of the inputs."""
    leaves = {id(t) for t in inputs}
    edges = {(t.grad_fn, t.output_nr) for t in inputs if t.grad_fn is not None}
    visited, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node in visited:
            continue
        visited.add(node)
        if id(getattr(node, "variable", None)) in leaves:
            return True
        following = [edge for edge in node.next_functions if edge[0] is not None]
        if any(edge in edges for edge in following):
            return True
        stack += [edge[0] for edge in following]
    return False
