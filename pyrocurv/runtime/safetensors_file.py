"""State dicts in files of safetensors: tensors, and all else as JSON in the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

PLAIN = "pyrocurv"  # the key in the metadata


def to_bytes(state: Mapping[str, Any]) -> bytes:
    """The content of a file. Raises TypeError for values that JSON has no form of."""
    tensors = {name: x.detach().cpu() for name, x in state.items() if isinstance(x, Tensor)}
    plain = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    copies = {name: x.contiguous().clone() for name, x in tensors.items()}  # of no shared memory
    try:
        text = json.dumps(plain, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the state has values that are no JSON ({error}): use save") from error
    saved: bytes = _library().torch.save(copies, {PLAIN: text})
    return saved


def read(path: Path) -> dict[str, Any]:
    """The state dict of a file, with its tensors on the CPU.

    Raises ValueError for a file that is damaged or was not written from `to_bytes`.
    """
    library = _library()
    try:
        with library.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return {**tensors, **json.loads(metadata[PLAIN])}
    except (library.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"path={str(path)!r} is no file of a guide, or a damaged one: "
            f"{type(error).__name__}: {error}"
        ) from error


def _library() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors is needed: pip install safetensors") from error
    return safetensors
