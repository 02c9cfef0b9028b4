"""The padding of an embedding, whose output stays what it was, whatever is sampled for its row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def keep_padding_output(module: nn.Embedding, weight: Tensor) -> None:
    """Let the padding be what it was: no data say anything of its row, which is prior alone."""
    if module.padding_idx is not None:
        row = weight.detach()[module.padding_idx].clone()
        module.register_buffer("_padding", row, persistent=False)
        module.register_forward_hook(_pad, with_kwargs=True)


def _pad(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    index = args[0] if args else kwargs["input"]
    return torch.where((index == module.padding_idx).unsqueeze(-1), module._padding, output)
