"""The composition matrix: what each entrance does in each composition of PyTorch's.

The tests check every cell of it. ``python docs/matrix.py`` writes it into ``composition.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

PAGE = Path(__file__).parent / "composition.md"
BEGIN, END = "<!-- made by docs/matrix.py -->\n", "<!-- until here -->\n"


@dataclasses.dataclass(frozen=True)
class Raises:
    """An error of `hypergrad.UnsupportedOperation` whose message holds an advice."""

    advice: str  # words of the message


RIGHT = "right"
DETACHED = "detached"

ROWS = (
    "custom_argmin",
    "custom_root",
    "custom_fixed_point",
    "implicit_grad",
    "hypergrad.compile",
    "unrolled_grad",
    "implicit_backward",
    "root_vjp",
    "root_jvp",
)

PLAIN = ("backward", "double backward", "triple backward", "gradcheck", "gradgradcheck")
DUAL = ("forward_ad", "forward_ad over backward")
FIRST = ("grad", "vjp", "jvp", "jacrev", "jacfwd")
SECOND = (
    "hessian",
    "grad of grad",
    "jacrev of jacrev",
    "jacfwd of jacfwd",
    "jacrev of jacfwd",
    "jvp of grad",
    "grad of jvp",
    "jvp of jvp",
)
VMAP = ("vmap", "nested vmap", "vmap with chunk_size")
OF_VMAP = tuple(f"{name} of vmap" for name in ("backward", "double backward", *FIRST, "hessian"))
VMAP_OF = tuple(f"vmap of {name}" for name in (*FIRST, *SECOND))
MIXED = ("nested vmap of grad", "jacrev of vmap of grad", "jacfwd of vmap of grad")
AROUND = (
    "no_grad",
    "inference_mode",
    "checkpoint",
    "saved-tensor hooks",
    "autocast",
    "compile",
    "threads",
)
INSIDE = ("another's objective", "three levels")
GROUPS = {
    "Plain autograd": (*PLAIN, "is_grads_batched", *DUAL),
    "Function transforms": (*FIRST, *SECOND),
    "Tasks": (*VMAP, *VMAP_OF, *OF_VMAP, *MIXED),
    "Contexts": AROUND,
    "Inside": INSIDE,
}
COLUMNS = tuple(name for group in GROUPS.values() for name in group)

_DERIVED = (*DUAL, *FIRST, *SECOND, *VMAP_OF, *OF_VMAP[2:], *MIXED, *INSIDE)
_OLD_VMAP = {"is_grads_batched": Raises("torch.func.jacrev")}


def _detached(advice: str) -> dict[str, str | Raises]:
    """An entrance whose answer is a plain value."""
    plain = dict.fromkeys((*PLAIN, "is_grads_batched", *OF_VMAP[:2]), DETACHED)
    return {**plain, **dict.fromkeys(_DERIVED, Raises(advice))}


# Where a cell is not right.
EXCEPTIONS: dict[str, dict[str, str | Raises]] = {
    "custom_argmin": _OLD_VMAP,
    "custom_root": _OLD_VMAP,
    "custom_fixed_point": _OLD_VMAP,
    "implicit_grad": _detached("custom_argmin"),
    "hypergrad.compile": _detached("custom_argmin"),
    "unrolled_grad": _detached("torch.func.grad"),
    "implicit_backward": {
        **_detached("implicit_grad"),
        **dict.fromkeys((*VMAP, *OF_VMAP[:2]), Raises("implicit_grad")),
        **dict.fromkeys(("no_grad", "inference_mode"), RIGHT),
        **dict.fromkeys(DUAL, Raises("custom_argmin")),
        "backward": RIGHT,
    },
    "root_vjp": _OLD_VMAP,
    "root_jvp": _OLD_VMAP,
}


def outcome(row: str, column: str) -> str | Raises:
    """What a cell promises: RIGHT, DETACHED or an error."""
    return EXCEPTIONS[row].get(column, RIGHT)


# What stands in the page, where a column's name does not say it all.
WORDS = {
    "backward": "`.backward()`",
    "gradcheck": "`gradcheck` (both modes)",
    "gradgradcheck": "`gradgradcheck` (both modes)",
    "is_grads_batched": "`autograd.grad(is_grads_batched=True)`",
    "forward_ad": "`torch.autograd.forward_ad`",
    "forward_ad over backward": "`forward_ad` over `.backward()`",
    "vmap with chunk_size": "`vmap(chunk_size=...)`, `jacrev(chunk_size=...)`",
    "checkpoint": "`torch.utils.checkpoint` around it",
    "saved-tensor hooks": "saved-tensor hooks around it",
    "autocast": "`torch.autocast` around it",
    "compile": "`torch.compile` around it (the graph breaks)",
    "threads": "eight threads at once",
    "another's objective": "in the objective of another solve",
    "three levels": "in the objective of one in the objective of another",
}


def alike(names: Iterable[str], key: Callable[[str], object]) -> list[list[str]]:
    """Names by what is the same of them, in the order of the first of each."""
    groups: dict[object, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return list(groups.values())


def table() -> str:
    """The matrix, in Markdown: entrances that are alike share a column, compositions a row."""
    rows = alike(ROWS, lambda row: str(EXCEPTIONS[row]))
    notes: list[str] = []
    lines = []
    for group, columns in GROUPS.items():
        head = [f"**{group}**", *(", ".join(f"`{row}`" for row in same) for same in rows)]
        lines += ["", "| " + " | ".join(head) + " |", "| --- |" + " :-: |" * len(rows)]
        for same in alike(columns, lambda column: tuple(outcome(row[0], column) for row in rows)):
            cells = []
            for row in rows:
                found = outcome(row[0], same[0])
                if isinstance(found, Raises):
                    if found.advice not in notes:
                        notes.append(found.advice)
                    found = f"raises ({'abcdef'[notes.index(found.advice)]})"
                cells.append(found)
            words = ", ".join(WORDS.get(column, f"`{column}`") for column in same)
            lines.append(f"| {words} | " + " | ".join(cells) + " |")
    lines += [""]
    for letter, note in zip("abcdef", notes, strict=False):
        lines.append(f"- ({letter}) {{class}}`~hypergrad.UnsupportedOperation`, naming `{note}`.")
    return "\n".join([*lines, ""])


def rendered(page: str) -> str:
    """The page with the matrix in its place."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
