"""Inventories for intersphinx, made from lists of names, so that the build needs no network."""

import zlib
from pathlib import Path

# Page of the project's documentation -> role of the Python domain -> names on that page.
Names = dict[str, dict[str, list[str]]]

PYTHON: Names = {
    "library/functions.html": {"class": ["bool", "float", "int", "object", "str", "tuple", "type"]},
    "library/stdtypes.html": {"class": ["dict", "list"]},
    "library/constants.html": {"data": ["None", "NotImplemented"]},
    "library/exceptions.html": {
        "exception": [
            "Exception",
            "ArithmeticError",
            "NotImplementedError",
            "RuntimeError",
            "RuntimeWarning",
            "TypeError",
            "UserWarning",
            "ValueError",
            "Warning",
        ]
    },
    "library/collections.abc.html": {
        "class": [
            f"collections.abc.{name}"
            for name in ("Callable", "Iterable", "Iterator", "Mapping", "Sequence")
        ]
    },
    "library/enum.html": {"class": ["enum.IntEnum"]},
    "library/typing.html": {"data": ["typing.Any", "typing.Literal"]},
}

TORCH: Names = {
    "tensors.html": {"class": ["torch.Tensor"]},
    "tensor_attributes.html": {"class": ["torch.device", "torch.dtype"]},
    "generated/{name}.html": {
        "class": [
            "torch.Generator",
            "torch.autograd.Function",
            "torch.inference_mode",
            "torch.nn.Linear",
            "torch.nn.Module",
            "torch.no_grad",
        ],
        "function": [
            "torch.autograd.backward",
            "torch.autograd.grad",
            "torch.func.functional_call",
            "torch.func.grad",
            "torch.func.hessian",
            "torch.func.jacfwd",
            "torch.func.jacrev",
            "torch.func.jvp",
            "torch.func.vjp",
            "torch.func.vmap",
            "torch.linalg.lstsq",
            "torch.linalg.solve",
            "torch.nn.functional.cross_entropy",
            "torch.vmap",
        ],
        "method": ["torch.Tensor.backward", "torch.Tensor.detach"],
    },
    "optim.html": {"class": ["torch.optim.Optimizer"], "module": ["torch.optim"]},
    "autograd.html": {"function": ["torch.autograd.gradcheck"], "module": ["torch.autograd"]},
    "checkpoint.html": {"function": ["torch.utils.checkpoint.checkpoint"]},
    "func.html": {"module": ["torch.func"]},
}


def write_inventory(path: Path, project: str, names: Names) -> None:
    """Write ``names`` as a Sphinx inventory, format version 2."""
    lines = [
        f"{name} py:{role} 1 {page.format(name=name)}#{'module-' if role == 'module' else ''}$ -"
        for page, roles in names.items()
        for role, listed in roles.items()
        for name in listed
    ]
    header = (
        f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
        "# The remainder of this file is compressed using zlib.\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.encode() + zlib.compress("\n".join([*sorted(lines), ""]).encode()))
