"""Guides with dense matrices are for few weights."""

from __future__ import annotations

from torch import nn

from resuming import Refusal

LIMIT = 8000  # weights of a dense matrix: half a gigabyte


def check_dense(net: nn.Module, guide: str) -> None:
    """Raise Refusal for a dense matrix of too many weights: of all, or of the largest layer."""
    if guide not in ("full", "block"):
        return
    layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    size = sum(sizes) if guide == "full" else max(sizes)
    if size > LIMIT:
        part = "weights" if guide == "full" else "weights in a layer"
        raise Refusal(
            f"--guide {guide} has a dense matrix of {size:,} x {size:,} numbers for the {size:,} "
            f"{part} of this network: take kfac, ekfac or diagonal, or --model small-cnn"
        )
