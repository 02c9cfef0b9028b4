"""A hook of mkdocs: the notebooks of tutorials/ become pages, with the outputs saved in them.

A notebook is Markdown cells, code cells, and outputs, of which text and PNG pictures are shown. The
place `<!-- tutorials -->` of a page becomes a list of links to all of them.
"""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

NOTEBOOKS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))
PLACE = "<!-- tutorials -->"


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def title(path: Path) -> str:
    """Its first heading."""
    texts = ("".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "markdown")
    found = re.search(r"^# (.*)$", "\n".join(texts), re.MULTILINE)
    return found[1] if found else path.stem


def fence(text: str, language: str = "") -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def output(cell: dict[str, Any], pictures: dict[str, bytes], stem: str) -> Iterator[str]:
    """What a code cell has printed and drawn; pictures are added to `pictures` by file name."""
    for item in cell["outputs"]:
        data = item.get("data", {})
        if "image/png" in data:
            name = f"{stem}-{len(pictures) + 1}.png"
            pictures[name] = base64.b64decode("".join(data["image/png"]))
            yield f"![Output of the code above]({name})"
        elif item.get("name") == "stdout" or "text/plain" in data:
            yield fence("".join(item.get("text", data.get("text/plain", ""))), "text")


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in cells(path):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source.strip():
            parts += [fence(source, "python"), *output(cell, pictures, path.stem)]
    return "\n\n".join(parts) + "\n", pictures


def on_config(config: Any) -> Any:
    """The pages follow the first one of the section."""
    for section in config.nav:
        for name, pages in section.items():
            if name == "Tutorials":
                pages.extend(f"tutorials/{path.stem}.md" for path in NOTEBOOKS)
    return config


def on_files(files: Files, config: Any) -> Files:
    for path in NOTEBOOKS:
        text, pictures = page(path)
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    links = [f"- [{title(path)}]({path.stem}.md)" for path in NOTEBOOKS]
    return markdown.replace(PLACE, "\n".join(links) or "There are no tutorials yet.")
