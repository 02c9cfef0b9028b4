"""The tutorials run, in a short form, and their notebooks are those of the scripts."""

from __future__ import annotations

import base64
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from test_links import check_links

FOLDER = Path(__file__).parents[1] / "tutorials"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))
tutorials = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def cells_of_script(script: Path) -> list[tuple[str, str]]:
    """(kind, source) of the cells in the percent format, after the header."""
    cells = []
    for cell in script.read_text().split("\n# %%")[1:]:
        kind, _, source = cell.partition("\n")
        if kind == " [markdown]":
            lines = source.strip().split("\n")
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)
            cells.append(("markdown", text))
        else:
            cells.append(("code", source.strip()))
    return cells


def notebook(script: Path) -> dict[str, Any]:
    return json.loads(script.with_suffix(".ipynb").read_text())


def test_there_are_eight() -> None:
    assert len(SCRIPTS) == 8
    size = sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file())
    assert size < 3_000_000


@tutorials
def test_a_tutorial_runs(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, with a few steps: what it imports takes longer than it does."""
    monkeypatch.setenv("PYROCURV_SHORT", "1")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))  # of processes that it starts
    monkeypatch.chdir(FOLDER)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setattr(plt, "show", lambda: None)
    dtype = torch.get_default_dtype()
    try:
        with plt.rc_context({"figure.max_open_warning": 0}):
            plt.switch_backend("Agg")
            runpy.run_path(str(script), run_name="__main__")
        assert len(plt.get_fignums()) >= 3
    finally:
        torch.set_default_dtype(dtype)
        plt.close("all")
    out, err = capsys.readouterr()
    assert out and not err


@tutorials
def test_a_notebook_is_that_of_its_script(script: Path) -> None:
    """`python tutorials/execute.py` makes it."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook(script)["cells"]]
    assert cells == cells_of_script(script)


@tutorials
def test_a_notebook_has_its_outputs(script: Path) -> None:
    cells = [cell for cell in notebook(script)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    pictures = [output["data"]["image/png"] for output in outputs if "data" in output]
    assert len(pictures) >= 3
    assert all(base64.b64decode("".join(p)).startswith(b"\x89PNG") for p in pictures)


@tutorials
def test_links_of_a_tutorial(script: Path, tmp_path: Path) -> None:
    text = "\n\n".join(source for kind, source in cells_of_script(script) if kind == "markdown")
    page = tmp_path / "page.md"
    page.write_text(text)
    check_links(page)
    assert "/latest/" in text.split("## ")[-1]  # where to read on
