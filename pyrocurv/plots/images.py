"""Where a classifier is uncertain: the images, and the entropies of its predictions.

Shapes: N examples, C classes, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrocurv.plots.arguments import axes, checked_labels, checked_probs
from pyrocurv.runtime.validation import check_integer, check_method, check_tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


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
    probs = checked_probs("probs", probs)
    labels = None if labels is None else checked_labels("labels", labels, probs)
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


def entropy_histogram(
    probs: Tensor, unseen: Tensor | Mapping[str, Tensor] | None = None, ax: Axes | None = None,
    bins: int = 30,
) -> Axes:
    """Draw how the predictive entropies are distributed, also those of images of another kind.

    The better the two histograms are apart, the better the entropy detects what the classifier has
    not been trained for.

    Args:
        probs: predictive probabilities [N, C] of data of the trained kind.
        unseen: probabilities [M, C] of other data, or several by their names in the legend; None to
            draw one histogram.
        ax: the axes to draw on; None for a new figure.
        bins: number of bins of equal width between 0 and log C.

    Returns:
        The axes drawn on, entropies in nats and shares of the examples.

    Raises:
        ValueError: N or M is 0, the numbers of classes differ, rows do not sum to 1, or `bins` < 1.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
        >>> ax = entropy_histogram(probs, unseen=torch.tensor([[0.5, 0.5]]))
        >>> ax.get_xlabel()
        'predictive entropy (nats)'
    """
    check_integer("bins", bins, 1)
    checked = checked_probs("probs", probs)
    named: dict[str, Tensor] = {}
    others = {} if unseen is None else unseen
    for label, values in (
        others.items() if isinstance(others, Mapping) else [("other data", others)]
    ):
        where = "unseen" if isinstance(unseen, Tensor) else f"unseen[{label!r}]"
        named[label] = checked_probs(where, values)
        if values.shape[1] != probs.shape[1]:
            raise ValueError(f"{where} has {values.shape[1]} classes, probs has {probs.shape[1]}")
    ax = axes(ax)
    top = math.log(probs.shape[1]) or 1.0
    for label, values in [("data of the trained kind", checked), *named.items()]:
        entropy = torch.special.entr(values).sum(-1).clamp(max=top)
        weights = torch.full_like(entropy, 1 / len(entropy))
        ax.hist(
            entropy.tolist(), bins, range=(0, top), weights=weights.tolist(), alpha=0.6,
            label=label,
        )
    ax.set(xlim=(0, top), xlabel="predictive entropy (nats)", ylabel="share of examples")
    ax.legend(fontsize="small")
    return ax


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
