"""Make the notebooks from their scripts, with outputs: `python tutorials/execute.py [NAME ...]`.

The scripts are the source, in jupytext's percent format; without names, all of them are run. Needs
the extras "docs" and "examples".
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def execute(script: Path) -> Path:
    """Run a script as a notebook in this folder, and write the notebook beside it."""
    notebook = jupytext.read(script)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # not a random one, for the sake of differences
    client = NotebookClient(
        notebook, timeout=1800, record_timing=False, resources={"metadata": {"path": FOLDER}}
    )
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata.pop("language_info", None)  # of this Python
    path = script.with_suffix(".ipynb")
    nbformat.write(notebook, path)
    return path


def main() -> None:
    os.environ.pop("MPLBACKEND", None)  # the kernel shows pictures by its own
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of tqdm, without ipywidgets
    names = sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("[0-9]*.py"))
    for name in names:
        start = time.perf_counter()
        path = execute(FOLDER / f"{name}.py")
        size = path.stat().st_size / 1000
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {size:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
