"""Plots of a predictive distribution: is it calibrated, and where is it uncertain?

The reliability diagram is that of Guo et al. 2017, "On Calibration of Modern Neural Networks",
arXiv:1706.04599. matplotlib is imported inside of the functions only.
Shapes: N examples, C classes, H x W pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrocurv.runtime.validation import check_integer, check_method, check_tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["reliability", "uncertain_images"]


def reliability(probs: Tensor, labels: Tensor, ax: Axes | None = None, bins: int = 15) -> Axes:
    """Draw the reliability diagram of a classifier.

    For each bin of confidence, blue is the accuracy, red the gap to the mean confidence and gray
    the share of the examples. The mean of the gaps, weighted by the shares, is the expected
    calibration error (ECE) in the title.

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
    if ax is not None:
        check_method("ax", ax, "bar", "an Axes of matplotlib, or None,")
    probs = _check_probs(probs)
    labels = _check_labels(labels, probs)
    share, accuracy, gap = _calibration(probs, labels, bins)  # [bins] each
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1]
    filled, zeros = share > 0, torch.zeros(bins)
    left = (torch.arange(bins)[filled] / bins).tolist()
    blue, gray = dict(color="tab:blue", edgecolor="white"), dict(color="0.7")
    red = dict(color=(0.84, 0.15, 0.16, 0.25), edgecolor="tab:red", hatch="//")
    for label, height, bottom, style in (
        ("accuracy", accuracy, zeros, blue), ("gap to confidence", gap, accuracy, red),
        ("share of examples", -0.25 * share / share.max(), zeros, gray),
    ):
        heights, bottoms = height[filled].tolist(), bottom[filled].tolist()
        ax.bar(left, heights, 1 / bins, bottoms, align="edge", label=label, **style)
    ax.plot([0, 1], [0, 1], "--", color="0.3", linewidth=1)
    ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set(xlim=(0, 1), ylim=(-0.28, 1), xlabel="confidence", ylabel="accuracy")
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
    ax.set_title(f"ECE {float(share @ gap.abs()):.4f}")
    ax.legend(loc="upper left", fontsize="small")
    return ax


def uncertain_images(
    images: Tensor, probs: Tensor, labels: Tensor | None = None,
    figure: Figure | SubFigure | None = None, n: int = 12,
) -> list[Axes]:
    """Show the images with the highest predictive entropy, the most uncertain first.

    The caption of each is the predicted class, its probability, and the true class if it differs.

    Args:
        images: gray [N, H, W] or [N, 1, H, W], or color [N, 3, H, W], on any scale.
        probs: predictive probabilities [N, C].
        labels: true classes [N]; None to show predictions only.
        figure: the figure or subfigure to fill; None for a new figure.
        n: number of images to show, at most N.

    Returns:
        The axes of the images.

    Raises:
        ValueError: the shapes do not match, N is 0, rows of `probs` do not sum to 1, or `n` < 1.

    Example:
        >>> import torch
        >>> images = torch.rand(3, 8, 8)
        >>> probs = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.5, 0.5]])
        >>> [ax.get_xlabel() for ax in uncertain_images(images, probs, n=2)]
        ['0 (50 %)', '1 (70 %)']
    """
    check_integer("n", n, 1)
    if figure is not None:
        check_method("figure", figure, "add_subplot", "a Figure of matplotlib, or None,")
    probs = _check_probs(probs)
    labels = None if labels is None else _check_labels(labels, probs)
    pictures = _check_images(images, probs)  # [N, H, W, 1 or 3]
    if figure is None:
        import matplotlib.pyplot as plt

        figure = plt.figure(layout="constrained")
    order = torch.special.entr(probs).sum(-1).argsort(descending=True, stable=True)[:n].tolist()
    columns = min(6, len(order))
    rows = -(-len(order) // columns)
    all_axes = []
    for position, i in enumerate(order, start=1):
        low, high = pictures[i].min(), pictures[i].max()
        picture = (pictures[i] - low) / (high - low).clamp(min=1e-12)  # in [0, 1]; constant: 0
        ax = figure.add_subplot(rows, columns, position)
        ax.imshow(picture.numpy(), cmap="gray_r", vmin=0, vmax=1)
        probability, predicted = (float(v) for v in probs[i].max(-1))
        caption = f"{predicted:.0f} ({probability:.0%})".replace("%", " %")
        if labels is not None and int(labels[i]) != int(predicted):
            caption += f", true {int(labels[i])}"
        ax.set(xlabel=caption, xticks=[], yticks=[])
        all_axes.append(ax)
    return all_axes


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


def _check_probs(probs: Tensor) -> Tensor:
    check_tensor("probs", probs)
    if probs.ndim != 2 or 0 in probs.shape:
        raise ValueError(f"probs has shape {list(probs.shape)}: [N, C] with N, C > 0 is needed")
    probs = probs.detach().cpu().double()
    if not torch.allclose(probs.sum(-1), probs.new_ones(()), atol=1e-3) or bool((probs < 0).any()):
        raise ValueError("probs must be >= 0 and sum to 1 in each row; are these logits?")
    return probs


def _check_labels(labels: Tensor, probs: Tensor) -> Tensor:
    check_tensor("labels", labels)
    if labels.shape != probs.shape[:1]:
        raise ValueError(f"labels has shape {list(labels.shape)} for {len(probs)} rows of probs")
    return labels.detach().cpu()


def _check_images(images: Tensor, probs: Tensor) -> Tensor:
    check_tensor("images", images)
    pictures = images.detach().cpu().float()
    if pictures.ndim == 3:
        pictures = pictures.unsqueeze(1)
    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3) or len(pictures) != len(probs):
        raise ValueError(
            f"images has shape {list(images.shape)} for {len(probs)} rows of probs: "
            "[N, H, W], [N, 1, H, W] or [N, 3, H, W] is needed"
        )
    return pictures.permute(0, 2, 3, 1)
