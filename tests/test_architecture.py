"""The map in docs/architecture.md: what may import what, and where PyTorch's private names are."""

import ast
import re
from pathlib import Path

import pytest

import hypergrad

HOME = Path(hypergrad.__file__).parent
MAP = Path(__file__).parents[1] / "docs" / "architecture.md"
#: From the ground up: a room imports from those below it, and from itself.
FLOORS = [
    {"_autograd", "_errors", "_info", "_mistakes", "_public", "_pytrees", "_warnings"},
    {"prox", "projections", "solvers"},
    {"_compiled"},
    {"conditions"},
    {"_implicit"},
    {"inner_solvers", "estimators", "_distributed"},
    {"bilevel", "inner"},
    {"_check"},
    {"__init__"},
]
#: The rooms that may use names that PyTorch keeps to itself.
INSIDE = {"_autograd", "_distributed", "_compiled"}
PRIVATE = re.compile(r"\btorch(\.\w+)*\._(?!_)\w+|\bfrom torch(\.\w+)* import _\w+")
MODULES = sorted(HOME.rglob("*.py"))


def room(module: Path) -> str:
    """The folder of a module, or its own name at the top."""
    return module.relative_to(HOME).parts[0].removesuffix(".py")


def imported(module: Path) -> set[str]:
    """The rooms that a module imports from when it runs, by relative imports."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    only_types = {
        id(inside)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inside in ast.walk(node)
    }
    package = module.relative_to(HOME).parts[:-1]
    rooms = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in only_types:
            base = package[: len(package) - (node.level - 1)]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            rooms |= {[*base, *name.split(".")][0] for name in names}
    return rooms


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(HOME)))
def test_no_room_imports_from_above(module):
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    above = {
        name
        for name in imported(module)
        if name != room(module) and floor_of[name] >= floor_of[room(module)] > 0
    }
    above = {n for n in above if not (room(module) == "projections" and n == "prox")}
    assert not above


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(HOME)))
def test_private_names_of_pytorch_stay_inside(module):
    if room(module) in INSIDE:
        return
    code = "\n".join(
        line for line in module.read_text(encoding="utf-8").splitlines() if "#" not in line
    )
    assert not PRIVATE.search(code)


def test_the_top_of_the_package_is_a_list_of_what_is_shared():
    private = {m.stem for m in HOME.glob("_*.py")} - {"__init__"}
    assert private == FLOORS[0] - {"_autograd"}


def test_the_map_has_every_room_and_no_other():
    text = MAP.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    rooms = {m.name for m in HOME.iterdir() if m.is_dir() and m.name != "__pycache__"}
    named = set(re.findall(r"^\| `([\w_]+)/` \|", text, flags=re.MULTILINE))
    assert named == rooms


def test_no_title_of_a_test_stands_in_two_files():
    files: dict[str, set[Path]] = {}
    for module in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.parse(module.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                files.setdefault(node.name, set()).add(module)
    assert not {name for name, where in files.items() if len(where) > 1}
