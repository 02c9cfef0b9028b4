"""Diagrams as SVG that takes its colors from the page, and the training curves of a report.

The page defines the CSS variables that the SVG names: one palette in light, another in dark.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

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
    "axes.titleweight": "normal", "lines.linewidth": 1.8, "axes.facecolor": PAGE,
    "axes.prop_cycle": cycler(color=SERIES),
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
