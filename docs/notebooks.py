"""A hook of mkdocs: the notebooks of `tutorials/` become pages, with their outputs as committed."""

import base64
import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
SITE = "https://pyrocurv.github.io/pyrocurv/latest/"  # what links in notebooks begin with


def on_files(files: Any, config: Any, **_: Any) -> Any:
    for notebook in sorted((ROOT / "tutorials").glob("[0-9]*.ipynb")):
        text, pictures = page(notebook)
        files.append(File.generated(config, f"tutorials/{notebook.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    return files


def page(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """A page in Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    heading = notebook.stem
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            headings = [line for line in source.splitlines() if line.startswith("#")]
            heading = headings[-1].lstrip("# ").replace('"', "") if headings else heading
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append(f'```text\n{"".join(output["text"]).rstrip()}\n```')
            elif "image/png" in output.get("data", {}):
                name = f"{notebook.stem}_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(output["data"]["image/png"]))
                parts.append(f"![{heading}]({name})")
    parts.insert(1, where_it_runs(notebook))
    return local_links("\n\n".join(parts)), pictures


def where_it_runs(notebook: Path) -> str:
    return (
        f"*A [notebook](https://github.com/pyrocurv/pyrocurv/blob/main/tutorials/{notebook.name}): "
        "run it in a checkout, after `pip install -e \".[examples]\"`.*"
    )


def local_links(text: str) -> str:
    """Links to this site as links to its sources, which `mkdocs build --strict` checks."""
    start, *others = text.split(f"]({SITE}")
    for other in others:
        address, rest = other.split(")", 1)
        name, hash_mark, anchor = address.partition("#")
        start += f"](../{name.strip('/') or 'index'}.md{hash_mark}{anchor}){rest}"
    return start
