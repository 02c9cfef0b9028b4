"""A predictive distribution over a line of inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Normal

from pyrocurv.plots.arguments import axes, check_label
from pyrocurv.runtime.validation import check_fraction, check_is, check_tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def predictive_band(
    x: Tensor, predictive: Tensor | Normal, ax: Axes | None = None, mass: float = 0.95,
    label: str | None = None,
) -> Axes:
    """Draw the median of a regression and a central band that holds `mass` of its probability.

    Args:
        x: inputs [N] or [N, 1], in any order.
        predictive: samples [S, N] (or [S, N, 1]) of the targets, as `Predictive` returns them for
            the site "obs", or of the mean function (the return value, "_RETURN"); or a `Normal`
            over [N], as `Laplace.predict` returns it.
        ax: the axes to draw on; None for a new figure. Its next color is taken.
        mass: of the band, between 0 and 1.
        label: of the median in the legend.

    Returns:
        The axes drawn on.

    Raises:
        TypeError: `predictive` is neither samples nor a `Normal`; draw samples of other ones.
        ValueError: the shapes do not match, or `mass` is not between 0 and 1.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 20)
        >>> ax = predictive_band(x, torch.distributions.Normal(x.sin(), 0.1), label="sine")
        >>> len(ax.lines), len(ax.collections)
        (1, 1)
    """
    check_fraction("mass", mass)
    check_label(label)
    check_tensor("x", x)
    check_is("predictive", predictive, (Tensor, Normal), "samples [S, N] or a Normal")
    points = x.detach().cpu().double().flatten()
    if x.ndim > 2 or (x.ndim == 2 and x.shape[1] != 1) or not len(points):
        raise ValueError(f"x has shape {list(x.shape)}: [N] or [N, 1] is needed")
    levels = torch.tensor([(1 - mass) / 2, 0.5, (1 + mass) / 2], dtype=torch.double)
    if isinstance(predictive, Normal):
        parts = predictive.loc, predictive.scale
        mean, scale = (part.detach().cpu().double().flatten() for part in parts)
        quantiles = Normal(mean, scale).icdf(levels.unsqueeze(1))
    else:
        samples = predictive.detach().cpu().double()
        if samples.ndim == 3 and samples.shape[-1] == 1:
            samples = samples.squeeze(-1)
        if samples.ndim != 2:
            raise ValueError(f"predictive has shape {list(predictive.shape)}: [S, N] is needed")
        quantiles = samples.quantile(levels, dim=0)  # [3, N]
    if quantiles.shape[1] != len(points):
        raise ValueError(f"predictive is for {quantiles.shape[1]} inputs, x has {len(points)}")
    ax = axes(ax)
    order = points.argsort()
    low, middle, high = (values[order].tolist() for values in quantiles)
    (line,) = ax.plot(points[order].tolist(), middle, label=label)
    ax.fill_between(
        points[order].tolist(), low, high, color=line.get_color(), alpha=0.25, linewidth=0
    )
    if label:
        ax.legend(fontsize="small")
    return ax
