"""The examples in docstrings and in the README run as they are printed."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import pyrocurv

MODULES = ["pyrocurv"] + [m.name for m in pkgutil.walk_packages(pyrocurv.__path__, "pyrocurv.")]

README = (Path(__file__).parents[1] / "README.md").read_text()
README_CODE = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0


@pytest.mark.parametrize("number", range(len(README_CODE)))
def test_code_in_the_readme(number: int) -> None:
    exec(compile(README_CODE[number], f"README.md, block {number}", "exec"), {})


def test_every_public_name_has_a_docstring() -> None:
    for name in MODULES:
        module = importlib.import_module(name)
        assert module.__doc__, name
        for public in getattr(module, "__all__", ()):
            assert getattr(module, public).__doc__, f"{name}.{public}"


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [t for name in MODULES for t in finder.find(importlib.import_module(name), name)]
    assert sum(bool(test.examples) for test in tests) >= 8
