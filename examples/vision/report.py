"""A run as one HTML file: settings, scores with their meaning, diagrams and images.

It needs no other file and no network, follows the light or dark scheme of the reader, and fits
phones.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import torch

from pyrocurv import plots
from vision.evaluation import BINS, Predictions
from vision.figures import CURVES, curve, png, svg
from vision.result import DETECTION, METRICS, Metric, Result, shown
from vision.tables import describe
from vision.transforms import to_pixels

IMAGES = 12  # of each kind
ARROWS = {"higher": "↑", "lower": "↓", "": ""}
STYLE = Path(__file__).with_name("report.css").read_text()


def page(result: Result) -> str:
    """The HTML text."""
    config = result.config
    title = f"{config.method} on {config.dataset}: {config.model}"
    sections = [
        _scores(result), _detection(result), _calibration(result), _images(result),
        _training(result), _settings(result),
    ]
    summary = escape(describe(result)).replace("\n", "<br>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n<p>{summary}</p>\n" + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


# ---- tables -------------------------------------------------------------------------------------


def _scores(result: Result) -> str:
    rows = []
    for name, metric in METRICS.items():
        if name not in result.scores:
            continue
        value = f"{shown(metric, result.scores[name])} {metric.unit}".strip()
        rows.append(
            f'<tr><th scope="row">{_label(metric)}</th><td class="number">{escape(value)}</td>'
            f'<td class="meaning">{escape(metric.meaning)}</td></tr>'
        )
    kind = f"{result.config.evaluate_on} images"
    head = ('<tr class="head"><th>metric</th><th class="number">value</th>'
            '<td class="meaning">meaning</td></tr>')
    return _section(
        "scores", f"Scores on the {kind}",
        f"<p>{len(result.test.labels):,} images that the network was not trained on. "
        "↑ higher is better, ↓ lower is better.</p>"
        f'<div class="card"><table class="scores">{head}{"".join(rows)}</table></div>',
    )


def _detection(result: Result) -> str:
    if not result.detection:
        return ""
    heads = "".join(
        f'<th class="number">{_label(metric)}<br><span class="quiet">{metric.unit}</span></th>'
        for metric in DETECTION.values()
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(kind)}</th>' + "".join(
            f'<td class="number">{shown(metric, found.get(name))}</td>'
            for name, metric in DETECTION.items()
        ) + "</tr>"
        for kind, found in result.detection.items()
    )
    meanings = "".join(
        f"<li><b>{escape(metric.label)}</b>: {escape(metric.meaning)}</li>"
        for metric in DETECTION.values()
    )
    drawn = {kind: found for kind, found in result.unseen.items()}
    first, *rest = drawn
    corrupted = {kind: drawn[kind] for kind in rest}
    diagrams = _figure(
        _entropies(result, {first: drawn[first]}),
        "Entropy of the predictions, from 0 to ln(number of classes): the less the two overlap, "
        "the better unknown images are told from known ones.",
    )
    if corrupted:
        diagrams += _figure(
            _entropies(result, corrupted),
            "The same for the test images, corrupted: a network should be less certain of them.",
        )
    return _section(
        "unseen", "Images that it should doubt",
        f"<ul>{meanings}</ul>"
        f'<div class="card wide"><table><tr><th>images</th>{heads}</tr>{rows}</table></div>'
        f'<div class="grid" style="margin-top: 1rem">{diagrams}</div>',
    )


def _settings(result: Result) -> str:
    found = result.as_json()
    data = {f"data: {name}": value for name, value in found["settings"].pop("data").items()}
    settings = found["settings"]
    given = {
        name: value for name, value in found["config"].items()
        if name not in settings and value is not None
    }
    rows = "".join(
        f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in {**given, **settings, **data}.items()
    )
    return _section("settings", "Settings", f'<dl class="card settings">{rows}</dl>')


# ---- diagrams -----------------------------------------------------------------------------------


def _entropies(result: Result, others: dict[str, Predictions]) -> str:
    probs = {name: found.log_probs.exp() for name, found in others.items()}
    return svg(lambda ax: plots.entropy_histogram(result.test.log_probs.exp(), probs, ax))


def _calibration(result: Result) -> str:
    probs, labels = result.test.log_probs.exp(), result.test.labels
    return _section(
        "calibration", "Can the probabilities be trusted?",
        '<div class="grid">' + _figure(
            svg(lambda ax: plots.reliability(probs, labels, ax, BINS)),
            "Reliability: of images with a confidence of 0.8, 80 % should be classified right. "
            "Bars below the diagonal are overconfident, above it underconfident.",
        ) + _figure(
            svg(lambda ax: plots.risk_coverage(probs, labels, ax)),
            "Risk and coverage: errors among the images that are left when the least confident "
            "ones are given to a person, and the area under the curve (AURC).",
        ) + "</div>",
    )


def _training(result: Result) -> str:
    rows = result.history.rows
    names = [name for name in CURVES if rows and name in rows[0]]
    if "kl" not in names:  # the loss is the NLL
        names = [name for name in names if name != "nll"]
    curves = "".join(
        _figure(svg(curve(rows, name), 3.6, 2.4), CURVES[name][2])
        for name in names
    )
    return _section(
        "training", "Training curves",
        "<p>Means over the training batches since the point before.</p>"
        f'<div class="grid">{curves}</div>',
    )


# ---- images -------------------------------------------------------------------------------------


def _images(result: Result) -> str:
    order = result.test.entropy.argsort(stable=True)
    most = f'<div class="card images">{_gallery(result, order[:IMAGES])}</div>'
    least = f'<div class="card images">{_gallery(result, order.flip(0)[:IMAGES])}</div>'
    return _section(
        "images", "Most and least certain images",
        "<p>With the predicted class and its probability; the true class where it is another. The "
        f"least certain ones, those of the highest entropy:</p>{least}"
        f'<p style="margin-top: 1rem">The most certain ones:</p>{most}',
    )


def _gallery(result: Result, rows: torch.Tensor) -> str:
    cells, classes, test = [], result.data.classes, result.test
    for row in rows.tolist():
        image, label = result.data.test[row]
        probability, predicted = (float(v) for v in test.log_probs[row].exp().max(-1))
        is_right = int(predicted) == label
        name = escape(classes[int(predicted)])
        caption = f'<span class="{"right" if is_right else "wrong"}">{name}</span> '
        caption += f"{100 * probability:.0f} %"
        if not is_right:
            caption += f"<br>true: {escape(classes[label])}"
        source = png(to_pixels(image, result.data.test.pipeline))
        cells.append(
            f'<figure><img src="{source}" alt="{escape(classes[label])}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return "".join(cells)


# ---- parts --------------------------------------------------------------------------------------


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{content}\n</section>'


def _figure(picture: str, caption: str) -> str:
    return f'<figure class="card">{picture}<figcaption>{escape(caption)}</figcaption></figure>'


def _label(metric: Metric) -> str:
    arrow = ARROWS[metric.better]
    return f"{escape(metric.label)}&nbsp;{arrow}" if arrow else escape(metric.label)
