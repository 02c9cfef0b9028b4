"""Is a classifier as right as it is confident, and does it know where it is wrong?

The reliability diagram is that of Guo et al. 2017, "On calibration of modern neural networks",
arXiv:1706.04599; the risk-coverage curve that of Geifman & El-Yaniv 2017, "Selective classification
for deep neural networks", arXiv:1705.08500. Shapes: N examples, C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrocurv.plots.arguments import axes, check_label, checked_labels, checked_probs, line_color
from pyrocurv.runtime.validation import check_integer

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def reliability(probs: Tensor, labels: Tensor, ax: Axes | None = None, bins: int = 15) -> Axes:
    """Draw the reliability diagram of a classifier.

    For each bin of confidence, solid bars are the accuracy, hatched ones the gap to the mean
    confidence, and those below zero the share of the examples. The mean of the gaps, weighted by
    the shares, is the expected calibration error (ECE) in the title.

    Args:
        probs: predictive probabilities [N, C].
        labels: true classes [N].
        ax: the axes to draw on; None for a new figure.
        bins: number of bins of equal width for confidences in [0, 1].

    Returns:
        The axes drawn on.

    Raises:
        ValueError: the shapes do not match, N is 0, rows of `probs` do not sum to 1, or `bins` < 1.

    Reference: Guo et al. 2017, arXiv:1706.04599.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.55, 0.45]])
        >>> ax = reliability(probs, torch.tensor([0, 1, 1]), bins=5)
        >>> ax.get_title()
        'ECE 0.3167'
    """
    check_integer("bins", bins, 1)
    probs = checked_probs("probs", probs)
    labels = checked_labels("labels", labels, probs)
    ax = axes(ax)
    share, accuracy, gap = _calibration(probs, labels, bins)  # [bins] each
    filled, zeros = share > 0, torch.zeros(bins)
    left = (torch.arange(bins)[filled] / bins).tolist()
    solid = dict(color="C0", edgecolor=ax.get_facecolor())
    hatched = dict(color=("C3", 0.25), edgecolor="C3", hatch="//")
    for label, height, bottom, style in (
        ("accuracy", accuracy, zeros, solid), ("gap to confidence", gap, accuracy, hatched),
        ("share of examples", -0.25 * share / share.max(), zeros, dict(color=(line_color(), 0.3))),
    ):
        heights, bottoms = height[filled].tolist(), bottom[filled].tolist()
        ax.bar(left, heights, 1 / bins, bottoms, align="edge", label=label, **style)
    ax.plot([0, 1], [0, 1], "--", color=line_color(), linewidth=1)
    ax.axhline(0, color=line_color(), linewidth=0.8)
    ax.set(xlim=(0, 1), ylim=(-0.28, 1), xlabel="confidence", ylabel="accuracy")
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
    ax.set_title(f"ECE {float(share @ gap.abs()):.4f}")
    ax.legend(loc="upper left", fontsize="small")
    return ax


def risk_coverage(
    probs: Tensor, labels: Tensor, ax: Axes | None = None, label: str | None = None
) -> Axes:
    """Draw the error rate among the most confident share of the examples, for each share.

    A classifier that says "not sure" for its least confident examples has the risk of the others.
    The legend has the area under the curve (AURC): the lower, the better its confidence ranks the
    errors. Call it again with the same `ax` for a second classifier.

    Args:
        probs: predictive probabilities [N, C].
        labels: true classes [N].
        ax: the axes to draw on; None for a new figure.
        label: of this curve in the legend.

    Returns:
        The axes drawn on, coverage and risk in [0, 1].

    Raises:
        ValueError: the shapes do not match, N is 0, or rows of `probs` do not sum to 1.

    Reference: Geifman & El-Yaniv 2017, arXiv:1705.08500.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.55, 0.45]])
        >>> ax = risk_coverage(probs, torch.tensor([0, 1, 1]), label="a network")
        >>> ax.get_legend().get_texts()[0].get_text()
        'a network, AURC 0.1111'
    """
    check_label(label)
    probs = checked_probs("probs", probs)
    labels = checked_labels("labels", labels, probs)
    ax = axes(ax)
    confidence, predicted = probs.max(-1)
    order = confidence.argsort(descending=True, stable=True)
    wrong = (predicted != labels).double()[order].cumsum(0)
    count = torch.arange(1, len(probs) + 1, dtype=torch.double)
    risk = wrong / count  # [N]
    name = f"AURC {float(risk.mean()):.4f}"
    name = f"{label}, {name}" if label else name
    ax.plot((count / len(probs)).tolist(), risk.tolist(), label=name)
    ax.set(xlim=(0, 1), xlabel="coverage: share of examples kept")
    ax.set_ylabel("risk: error rate of those")
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper left", fontsize="small")
    return ax


def _calibration(probs: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each bin, the share of examples, the accuracy, and confidence minus accuracy [bins]."""
    confidence, predicted = probs.max(-1)  # [N], [N]
    correct = (predicted == labels).double()
    bin_index = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bins are (k/K, (k+1)/K]
    count, correct_sum, confidence_sum = (
        torch.zeros(bins, dtype=torch.double).index_add_(0, bin_index, values)
        for values in (torch.ones_like(correct), correct, confidence)
    )
    filled = count.clamp(min=1)
    return count / len(probs), correct_sum / filled, (confidence_sum - correct_sum) / filled
