"""A hook of mkdocs: ```math fences, which GitHub shows too, become MathML; no JavaScript."""

import re
from typing import Any

from latex2mathml.converter import convert

# browsers know no variants of letters but upright ones
LETTERS = {"script N": "𝒩", "script L": "ℒ", "double-struck E": "𝔼"}


def with_letters(html: str) -> str:
    for variant, letter in LETTERS.items():
        name, _, plain = variant.partition(" ")
        html = html.replace(f'<mi mathvariant="{name}">{plain}</mi>', f"<mi>{letter}</mi>")
    return html


def math_fence(source: str, *_: Any, **__: Any) -> str:
    html = with_letters(convert(source.strip(), display="block"))
    if missing := re.findall(r'mathvariant="(?!normal)[^<]*<', html):
        raise ValueError(f"letters that have to be added to LETTERS: {missing}")
    return f'<div class="math">{html}</div>'


def on_config(config: Any) -> Any:
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences.setdefault("custom_fences", []).append(
        {"name": "math", "class": "math", "format": math_fence}
    )
    return config


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Superfences turns a fence with an error into inline code, silently."""
    if "<code>math\n" in html or "<code>math " in html:
        raise ValueError(f"{page.file.src_path}: a math fence could not be converted")
    return html
