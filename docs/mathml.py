"""A hook of mkdocs: ```math fences, which GitHub shows too, become MathML; no JavaScript."""

from typing import Any

from latex2mathml.converter import convert


def math_fence(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="math">{convert(source.strip(), display="block")}</div>'


def on_config(config: Any) -> Any:
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences.setdefault("custom_fences", []).append(
        {"name": "math", "class": "math", "format": math_fence}
    )
    return config
