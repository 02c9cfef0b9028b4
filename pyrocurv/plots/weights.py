"""How wide a posterior is: the noise of the weights of each layer, beside their means."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from pyrocurv.guides import StructuredGuide
from pyrocurv.plots.arguments import axes
from pyrocurv.runtime.validation import check_is

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def weight_noise(guide: StructuredGuide, ax: Axes | None = None) -> Axes:
    """Draw the posterior standard deviations of each weight tensor, beside the size of its mean.

    A bar is the middle half of the marginal standard deviations of a tensor, a line 90 % of them;
    the diamond is the root mean square of its mean. Where noise and mean are alike, the data say
    little about the layer.

    Args:
        guide: one that has been called with data, trained or not.
        ax: the axes to draw on; None for a new figure.

    Returns:
        The axes drawn on, with a logarithmic scale.

    Raises:
        TypeError: `guide` is not a structured guide of `pyrocurv.guides`.
        ValueError: it has not been called yet.

    Example:
        >>> import torch, pyrocurv
        >>> net = pyrocurv.nn.bayesianize(torch.nn.Linear(3, 2))
        >>> model = pyrocurv.nn.Classifier(net, num_data=10)
        >>> guide = pyrocurv.guides.KFACGuide(model)
        >>> sample = guide(torch.randn(10, 3), torch.randint(2, (10,)))
        >>> ax = weight_noise(guide)
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['net.weight', 'net.bias']
    """
    check_is("guide", guide, StructuredGuide, "a guide of pyrocurv.guides")
    sites, posterior = guide.sites, guide.posterior
    ax = axes(ax)
    scale = posterior.precision.inverse_diag().detach().cpu().double().sqrt()
    loc = posterior.loc.detach().cpu().double()
    sizes = [math.prod(shape) for shape in sites.values()]
    levels = torch.tensor(LEVELS, dtype=torch.double)
    rows = zip(scale.split(sizes), loc.split(sizes), strict=True)
    for row, (noise, mean) in enumerate(rows):
        low, lower, middle, upper, high = noise.quantile(levels).tolist()
        ax.plot([low, high], [row, row], color="C0", linewidth=1)
        ax.plot([lower, upper], [row, row], color="C0", linewidth=7, solid_capstyle="butt")
        ax.plot([middle], [row], "s", color="C0", markersize=5)  # where all are alike
        ax.plot([middle], [row], "|", color=ax.get_facecolor(), markersize=7)
        size = float(mean.square().mean().sqrt())
        if size > 0:
            ax.plot([size], [row], "D", color="C1", markersize=5)
    ax.plot([], [], color="C0", linewidth=7, label="standard deviations")
    ax.plot([], [], "D", color="C1", markersize=5, label="root mean square of the mean")
    ax.set_xscale("log")
    ax.xaxis.set_minor_formatter("")  # whose labels overlap
    low, high = ax.get_xlim()
    if high < 12 * low:  # which may have no major tick
        middle = (low * high) ** 0.5
        ax.set_xlim(middle / 4, 4 * middle)
    ax.set_yticks(range(len(sizes)), [*sites])
    ax.set_ylim(len(sizes) - 0.5, -0.5)
    ax.set_xlabel("size of a weight")
    ax.legend(fontsize="small")
    return ax
