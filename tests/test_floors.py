"""Imports go down the floors; a new room must be given its floor here."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [  # no room imports another one of its floor
    {"runtime"},
    {"structures"},
    {"layers"},
    {"curvature", "handlers"},
    {"posterior", "nn"},
    {"guides", "optim", "checkpoint"},
    {"infer", "plots", "metrics"},
]
TORCH_ONLY = {"structures", "runtime", "layers", "curvature", "posterior", "optim", "checkpoint",
              "metrics"}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "pyrocurv").rglob("*.py")
}


def imports(node: ast.AST, inside_functions: bool = True) -> Iterator[str]:
    """Full names of what is imported: modules, or names in them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports here are absolute"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif inside_functions or not isinstance(child, ast.FunctionDef):
            if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
                yield from imports(child, inside_functions)


def uses(module: str) -> set[str]:
    """The modules of pyrocurv that a module imports."""
    names = [name for name in imports(ast.parse(FILES[module].read_text())) if name in FILES
             or name.rpartition(".")[0] in FILES]
    return {name if name in FILES else name.rpartition(".")[0] for name in names}


def room(module: str) -> str:
    """The part of the package that a module is in."""
    return module.split(".")[1]


def floor(module: str) -> int:
    """The number of the floor that a module is on, from the bottom."""
    rooms = [number for number, names in enumerate(FLOORS) if room(module) in names]
    assert rooms, f"which floor is {module} on?"
    return rooms[0]


@pytest.mark.parametrize("module", sorted(FILES.keys() - {"pyrocurv"}))
def test_imports_go_down(module: str) -> None:
    for used in uses(module):
        assert used != "pyrocurv"
        assert room(used) == room(module) or floor(used) < floor(module), used
        assert room(module) not in TORCH_ONLY or room(used) in TORCH_ONLY, used
    outside = {name.split(".")[0] for name in imports(ast.parse(FILES[module].read_text()))}
    assert room(module) not in TORCH_ONLY or "pyro" not in outside


def test_no_circle() -> None:
    tuple(TopologicalSorter({module: uses(module) for module in FILES}).static_order())


def test_fewer_than_50_arrows_between_rooms() -> None:
    arrows = {
        (room(module), room(used)) for module in FILES.keys() - {"pyrocurv"}
        for used in uses(module) if room(used) != room(module)
    }
    assert len(arrows) < 50


def test_matplotlib_is_imported_inside_functions_of_plots() -> None:
    for module, path in FILES.items():
        tree = ast.parse(path.read_text())
        assert not any(name.startswith("matplotlib") for name in imports(tree, False)), module
        drawn = any(name.startswith("matplotlib") for name in imports(tree))
        assert not drawn or room(module) == "plots", module


def test_a_plain_program_imports_no_launcher() -> None:
    """As `torchrun` is one."""
    code = (
        "import sys, pyrocurv, pyrocurv.infer, pyrocurv.optim\n"
        "starts = tuple('torch.distributed.' + name for name in ('run', 'launch', 'elastic'))\n"
        "print([name for name in sys.modules if name.startswith(starts)])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.strip() == "[]"
