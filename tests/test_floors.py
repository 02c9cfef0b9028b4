"""Imports go down the floors; a new module must be given its floor here."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"notice"},
    {"structures", "layers", "specs", "precision", "buffers", "stream", "table", "graph"},
    {"blocks", "uses"},
    {"capture", "choice", "modules", "priors", "rows"},
    {"distributions", "natural", "prototype", "repeated"},
    {"families"},
    {"curvature", "guides", "nn", "plots"},  # one floor: none of them knows another
    {"state"},
    {"engine"},
    {"counts"},
    {"infer", "optim"},
]
TORCH_ONLY = {
    "notice", "structures", "layers", "specs", "precision", "blocks", "uses", "capture", "choice",
    "priors", "rows", "curvature", "natural", "state", "engine", "buffers", "stream", "optim",
    "table", "counts", "graph",
}
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


def floor(module: str) -> int:
    part = module.split(".")[1]
    assert any(part in names for names in FLOORS), f"which floor is {module} on?"
    return next(number for number, names in enumerate(FLOORS) if part in names)


@pytest.mark.parametrize("module", sorted(FILES.keys() - {"pyrocurv"}))
def test_imports_go_down(module: str) -> None:
    package = module.split(".")[1]
    for used in uses(module):
        at_home = used.split(".")[1:2] == [package]
        assert at_home or (used != "pyrocurv" and floor(used) < floor(module)), used
        assert package not in TORCH_ONLY or used.split(".")[1] in TORCH_ONLY, used
    outside = {name.split(".")[0] for name in imports(ast.parse(FILES[module].read_text()))}
    assert package not in TORCH_ONLY or "pyro" not in outside


def test_no_circle() -> None:
    tuple(TopologicalSorter({module: uses(module) for module in FILES}).static_order())


def test_matplotlib_is_imported_inside_functions_of_plots() -> None:
    for module, path in FILES.items():
        tree = ast.parse(path.read_text())
        assert not any(name.startswith("matplotlib") for name in imports(tree, False)), module
        drawn = any(name.startswith("matplotlib") for name in imports(tree))
        assert not drawn or module == "pyrocurv.plots", module
