"""The diagrams of a report, as SVG that takes its colors of text and lines from the page.

Two palettes differ in light and dark; the page defines the CSS variables that the SVG names.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from vision.evaluation import BINS, Predictions, risk_coverage
from vision.training import Row

# stands for a CSS variable each, in the SVG that matplotlib writes
INK, MUTED, PAGE = "#010203", "#040506", "#070809"
SERIES = ["#0a0b0c", "#0d0e0f", "#101112", "#131415", "#161718"]
VARIABLES = {INK: "ink", MUTED: "muted", PAGE: "card"} | {
    color: f"series{number}" for number, color in enumerate(SERIES)
}
STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5, "text.color": INK,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.grid": True,
    "grid.color": MUTED, "grid.alpha": 0.25, "grid.linewidth": 0.6, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "legend.fontsize": 8.5, "axes.titlesize": 9.5,
    "axes.titleweight": "normal", "lines.linewidth": 1.8,
}
Draw = Callable[[Axes], Any]


def svg(draw: Draw, width: float = 4.4, height: float = 3.1) -> str:
    """An inline SVG of one diagram, without any link."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        figure.savefig(
            file := io.StringIO(), format="svg", transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
    text = file.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%"', text, count=1)
    for color, name in VARIABLES.items():
        text = text.replace(color, f"var(--{name})")
    return text


# ---- calibration --------------------------------------------------------------------------------


def reliability(test: Predictions) -> Draw:
    """Accuracy for each bin of confidence."""
    confidence, _ = test.log_probs.exp().max(-1)
    index = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    count, right = (
        torch.zeros(BINS, dtype=torch.double).index_add_(0, index, values.double())
        for values in (torch.ones_like(confidence), test.is_correct)
    )
    filled = count > 0
    accuracy = right[filled] / count[filled]
    share = count[filled] / count.sum()
    left = (torch.arange(BINS)[filled] / BINS).tolist()

    def draw(ax: Axes) -> None:
        ax.bar(left, (100 * accuracy).tolist(), 1 / BINS, align="edge", color=SERIES[0],
               edgecolor=PAGE, label="accuracy")
        ax.bar(left, (100 * share).tolist(), 1 / BINS, align="edge", color=MUTED, alpha=0.55,
               label="share of images")
        ax.plot([0, 1], [0, 100], "--", color=INK, linewidth=1, label="calibrated")
        ax.set(xlim=(0, 1), ylim=(0, 100), xlabel="confidence", ylabel="%")
        _legend_above(ax, 3)

    return draw


def risk(test: Predictions) -> Draw:
    """Errors among the images that are kept, for each share of images that is kept."""
    risks = risk_coverage(test)
    coverage = torch.arange(1, len(risks) + 1) / len(risks)
    best = torch.sort((~test.is_correct).double()).values.cumsum(0) / torch.arange(
        1, len(risks) + 1
    )
    rows = torch.linspace(0, len(risks) - 1, min(400, len(risks))).long()

    def draw(ax: Axes) -> None:
        x = (100 * coverage[rows]).tolist()
        ax.plot(x, (100 * risks[rows]).tolist(), color=SERIES[0], label="least entropy first")
        ax.plot(x, (100 * best[rows]).tolist(), ":", color=SERIES[1], label="errors last (best)")
        ax.axhline(100 * float(risks[-1]), color=MUTED, linewidth=1, linestyle="--",
                   label="in any order")
        ax.set(xlim=(0, 100), xlabel="coverage: images that are classified, %",
               ylabel="errors among them, %")
        ax.set_ylim(bottom=0)
        _legend_above(ax, 3)

    return draw


def entropies(test: Predictions, others: dict[str, Predictions]) -> Draw:
    """Histograms of the entropy of the predictive distribution."""
    highest = max(1e-3, float(torch.tensor(test.log_probs.shape[-1]).log()))

    def draw(ax: Axes) -> None:
        for number, (name, found) in enumerate({"test images": test, **others}.items()):
            values = found.entropy.numpy()
            weights = torch.full((len(values),), 100 / len(values)).numpy()
            options: Any = dict(
                bins=30, range=(0, highest), weights=weights, color=SERIES[number % 5]
            )
            ax.hist(values, alpha=0.35, **options)
            ax.hist(values, histtype="step", linewidth=1.5, label=name, **options)
        ax.set(xlim=(0, highest), xlabel="entropy, nats", ylabel="share of the images, %")
        _legend_above(ax, 2)

    return draw


def _legend_above(ax: Axes, columns: int) -> None:
    """Where it hides nothing."""
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, columnspacing=1.2)


# ---- training -----------------------------------------------------------------------------------

CURVES = {  # the label of the axis, what a value is multiplied by, the caption
    "loss": ("nats per image", 1.0, "Loss: what is minimized."),
    "nll": ("nats per image", 1.0, "Negative log likelihood (NLL) at samples of the weights."),
    "kl": ("nats per image", 1.0, "KL divergence of the posterior from the prior, over N."),
    "accuracy": ("%", 100.0, "Accuracy on the training batches."),
    "lr": ("learning rate", 1.0, "Learning rate."),
    "temperature": ("T", 1.0, "Temperature T: the loss is NLL + T KL."),
}


def curve(rows: list[Row], name: str) -> Draw:
    """A metric of the training batches over epochs."""
    label, factor, _ = CURVES[name]

    def draw(ax: Axes) -> None:
        x, y = [row["epoch"] for row in rows], [factor * row[name] for row in rows]
        ax.plot(x, y, color=SERIES[0], marker="o" if len(x) < 5 else None, markersize=4)
        ax.set(xlabel="epochs", ylabel=label, xlim=(0, max(x)))
        if min(y) > 0 and max(y) > 30 * min(y) and name not in ("accuracy", "lr"):
            ax.set_yscale("log")

    return draw


# ---- images -------------------------------------------------------------------------------------


def png(image: Tensor) -> str:
    """An image [C, H, W] in [0, 1] as a data URI."""
    to_pil_image(image.cpu()).save(file := io.BytesIO(), format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
