"""What `summary` says of a guide: every latent and parameter, which has a posterior in which form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pyrocurv.blocks import Block
from pyrocurv.table import table


def summary(
    latents: Mapping[str, Tensor], blocks: Sequence[Block], left_out: Mapping[str, str],
    fallback: str, modules: Mapping[str, nn.Module],
) -> str:
    """A row for each latent and each parameter, and how many numbers have a posterior in blocks."""
    structure = {name: block.label for block in blocks for name in block.tensors} | {**left_out}
    rows = [(name, value, structure.get(name, fallback)) for name, value in latents.items()]
    rows += [
        (f"{owner}.{name}".lstrip("."), p, "point" if p.requires_grad else "frozen")
        for owner, module in modules.items() for name, p in module.named_parameters(recurse=False)
    ]
    return table(rows, sum(block.size for block in blocks), "site", "a posterior")
