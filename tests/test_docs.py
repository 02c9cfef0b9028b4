"""The examples in docstrings, in README and in the pages of the documentation run as printed."""

import doctest
import importlib
import pkgutil
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import pyrocurv

MODULES = ["pyrocurv"] + [m.name for m in pkgutil.walk_packages(pyrocurv.__path__, "pyrocurv.")]
ROOT = Path(__file__).parents[1]
FENCE = re.compile(r'^```python(?: title="(.*?)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)
PEERS = {"laplace-torch": "laplace", "ivon": "ivon"}  # title of a block: module that it needs


class CodeBlock(NamedTuple):
    """A block of Python of a Markdown file; a title is a file's name, or that of a library."""

    title: str | None
    code: str  # on the lines that it has in the file


def code_blocks(path: Path) -> list[CodeBlock]:
    text = path.read_text()
    return [
        CodeBlock(fence[1], "\n" * text[: fence.start(2)].count("\n") + fence[2])
        for fence in FENCE.finditer(text)
    ]


def run(path: Path, block: CodeBlock, names: dict[str, Any]) -> None:
    exec(compile(block.code, str(path), "exec"), names)


README = code_blocks(ROOT / "README.md")
PAGES = [
    path for path in sorted((ROOT / "docs").glob("*.md"))
    if any(block.title not in PEERS for block in code_blocks(path))
]
LOOPS = sorted((ROOT / "docs" / "loops").glob("*.md"))  # each by the name of its library


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to run the programs of a page in; what they import from it is forgotten."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0


@pytest.mark.parametrize("number", range(len(README)))
def test_code_in_the_readme(number: int) -> None:
    run(ROOT / "README.md", README[number], {})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_code_of_a_page(path: Path, folder: Path) -> None:
    """Its blocks continue each other; those with a file's name are programs of their own."""
    names: dict[str, Any] = {}
    for block in code_blocks(path):
        if block.title is None:
            run(path, block, names)
        elif block.title not in PEERS:
            Path(block.title).write_text(block.code)
            runpy.run_path(block.title, run_name="__main__")


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*isinstance.treespec, LeafSpec.* is deprecated",
    "ignore:The number of training batches",
)  # of Lightning
@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
def test_code_of_a_loop(path: Path, folder: Path) -> None:
    pytest.importorskip(path.stem)
    test_code_of_a_page(path, folder)


@pytest.mark.peers
@pytest.mark.filterwarnings("default")  # of the peers
@pytest.mark.parametrize("peer", PEERS)
def test_program_of_another_library(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = str(ROOT / "examples")  # where laplace.py is another module
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != examples])
    monkeypatch.delitem(sys.modules, PEERS[peer], raising=False)
    pytest.importorskip(PEERS[peer])
    path = ROOT / "docs" / "coming-from.md"
    data, *blocks = code_blocks(path)
    theirs = next(index for index, block in enumerate(blocks) if block.title == peer)
    names: dict[str, Any] = {}
    for block in (data, blocks[theirs]):
        run(path, block, names)
    expected = names.pop("probs").shape
    run(path, blocks[theirs + 1], names)
    assert names["probs"].shape == expected


def test_every_public_name_has_a_docstring() -> None:
    for name in MODULES:
        module = importlib.import_module(name)
        assert module.__doc__, name
        for public in getattr(module, "__all__", ()):
            assert getattr(module, public).__doc__, f"{name}.{public}"


def test_every_public_name_is_in_the_reference() -> None:
    pages = [path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md")]
    listed = set(re.findall(r"^::: (\S+)$", "\n".join(pages), re.MULTILINE))
    public = {
        f"pyrocurv.{name}.{member}"
        for name in pyrocurv.__all__ for member in getattr(pyrocurv, name).__all__
    }
    assert public <= listed, public - listed


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [t for name in MODULES for t in finder.find(importlib.import_module(name), name)]
    assert sum(bool(test.examples) for test in tests) >= 8
