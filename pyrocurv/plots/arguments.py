"""Checks of what the plots are given, and the axes that they draw on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrocurv.runtime.validation import check_is, check_method, check_tensor


def axes(ax: Any) -> Any:
    """The axes to draw on; those of a new figure for None."""
    if ax is not None:
        check_method("ax", ax, "plot", "an Axes of matplotlib, or None,")
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def line_color() -> Any:
    """That of the text, which a style of matplotlib sets."""
    import matplotlib

    return matplotlib.rcParams["text.color"]


def check_label(label: Any) -> None:
    """Raise TypeError unless it is a text or None."""
    if label is not None:
        check_is("label", label, str, "a string, or None,")


def checked_probs(name: str, probs: Tensor) -> Tensor:
    """Probabilities [N, C] in float64 on the CPU."""
    check_tensor(name, probs)
    if probs.ndim != 2 or 0 in probs.shape:
        raise ValueError(f"{name} has shape {list(probs.shape)}: [N, C] with N, C > 0 is needed")
    probs = probs.detach().cpu().double()
    if not torch.allclose(probs.sum(-1), probs.new_ones(()), atol=1e-3) or bool((probs < 0).any()):
        raise ValueError(f"{name} must be >= 0 and sum to 1 in each row; are these logits?")
    return probs


def checked_labels(name: str, labels: Tensor, probs: Tensor) -> Tensor:
    """Classes [N] on the CPU."""
    check_tensor(name, labels)
    if labels.shape != probs.shape[:1]:
        raise ValueError(f"{name} has shape {list(labels.shape)} for {len(probs)} rows of probs")
    return labels.detach().cpu()
