"""A run as one HTML file: scores, curve, and texts whose characters are colored by uncertainty.

It needs no other file and no network, follows the light or dark scheme of the reader, and fits
phones.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from language.prediction import Reading
from vision.figures import SERIES, svg
from vision.report import STYLE as PAGE_STYLE

if TYPE_CHECKING:
    from text import Result

FOLDER = Path(__file__).parent
LIKELY = 5  # alternatives that a character shows
STRONGEST = 0.9  # opacity of the color
COLORS = {  # by the letter of the CSS variable: name, meaning
    "e": ("epistemic", "the part that the samples of the posterior disagree about, in nats"),
    "t": ("total", "the entropy of the prediction, in nats"),
    "s": ("surprise", "-log p of the character that is there, in nats"),
}


def page(result: Result) -> str:
    """The HTML text."""
    config = result.config
    source = "Python's standard library" if config.text is None else config.text.name
    title = f"A character GPT on {source}: {config.method}"
    summary = (
        f"{result.weights:,} weights, {config.steps:,} steps of {config.batch * config.context:,} "
        f"characters, {result.seconds:.0f} s of training."
    )
    style = PAGE_STYLE + (FOLDER / "report.css").read_text()
    script = (FOLDER / "report.js").read_text()
    sections = [_texts(result), _scores(result), _curve(result), _settings(result)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(summary)}</p>\n" + "\n".join(sections)
        + f"\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


# ---- texts --------------------------------------------------------------------------------------


def _texts(result: Result) -> str:
    readings = result.readings
    values = {
        "e": [one.uncertainty.epistemic for one in readings],
        "t": [one.uncertainty.total for one in readings],
        "s": [one.surprise() for one in readings],
    }
    if result.config.method != "ngvi":
        del values["e"]  # one network agrees with itself
    tops = {letter: _top(torch.cat(parts)) for letter, parts in values.items()}
    first = next(iter(values))
    choices = "".join(
        f'<label><input type="radio" name="color" id="{COLORS[letter][0]}"'
        f'{" checked" if letter == first else ""}> {COLORS[letter][0]}</label>'
        for letter in values
    )
    legends = "".join(
        f'<div class="legend {letter}"><div class="scale"></div><div class="ends"><span>0</span>'
        f"<span>{top:.3g} nats or more</span></div></div>"
        for letter, top in tops.items()
    )
    meanings = "".join(
        f"<li><b>{COLORS[letter][0]}</b>: {COLORS[letter][1]}</li>" for letter in values
    )
    bodies = "".join(
        f'<figure class="card passage"><p class="text">{_characters(one, number, tops)}</p>'
        f"<figcaption>{escape(one.title)}</figcaption></figure>"
        for number, one in enumerate(readings)
    )
    data = json.dumps([_details(one) for one in readings]).replace("<", "\\u003c")
    return (
        '<section id="texts"><h2>How uncertain is each character?</h2>'
        "<p>The color of a character is that of its prediction, made before it was seen; the first "
        f'one has none.</p><ul class="meanings">{meanings}</ul>'
        f'<div class="card bar"><fieldset>{choices}</fieldset><div>{legends}</div>'
        '<div id="details">Point at a character, or tap it, for the likeliest ones in its '
        f"place.</div></div>{bodies}"
        f'<script type="application/json" id="readings">{data}</script></section>'
    )


def _top(values: Tensor) -> float:
    """Where the color is at its strongest, two digits of the 98th percentile."""
    top = max(1e-6, float(values.quantile(0.98)))
    digits = 1 - math.floor(math.log10(top))
    return round(top, digits)


def _characters(reading: Reading, number: int, tops: dict[str, float]) -> str:
    found = {"e": reading.uncertainty.epistemic, "t": reading.uncertainty.total,
             "s": reading.surprise()}
    opacity = {
        letter: (STRONGEST * found[letter] / top).clamp(0, STRONGEST).tolist()
        for letter, top in tops.items()
    }
    spans = [escape(reading.text[0])]
    for place, character in enumerate(reading.text[1:]):
        style = ";".join(f"--{letter}:{values[place]:.2f}" for letter, values in opacity.items())
        end = ' class="end"' if character == "\n" else ""
        shown = "⏎\n" if character == "\n" else escape(character)
        spans.append(f'<span{end} data-at="{number},{place}" style="{style}">{shown}</span>')
    return "".join(spans)


def _details(reading: Reading) -> list[dict[str, Any]]:
    """What the script shows of each character."""
    total, epistemic = reading.uncertainty.total.tolist(), reading.uncertainty.epistemic.tolist()
    probability = (-reading.surprise()).exp().tolist()
    return [
        {
            "total": round(total[place], 3), "epistemic": float(f"{epistemic[place]:.3g}"),
            "probability": round(probability[place], 4),
            "likely": [[c, round(p, 4)] for c, p in reading.alternatives(place, LIKELY)],
        }
        for place in range(len(total))
    ]


# ---- numbers ------------------------------------------------------------------------------------


def _scores(result: Result) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{found.nll:.4f} ± '
        f'{found.error:.4f}</td><td class="number">{found.nll / math.log(2):.4f}</td>'
        f'<td class="number">{100 * found.accuracy:.2f}</td></tr>'
        for name, found in result.scores.items()
    )
    units = ("nats per character ↓", "bits per character ↓", "accuracy, % ↑")
    heads = "".join(f'<th class="number">{unit}</th>' for unit in units)
    return (
        f'<section id="scores"><h2>Held-out text</h2><p>{result.characters["held-out"]:,} '
        "characters that it was not trained on, in windows that begin without context. ± is the "
        "standard error over the files. ↑ higher is better, ↓ lower is better.</p>"
        f'<div class="card wide"><table><tr><th>predictions of</th>{heads}</tr>{rows}</table></div>'
        "</section>"
    )


def _curve(result: Result) -> str:
    if not result.curve:
        return ""
    steps, losses = zip(*result.curve, strict=True)

    def draw(ax: Axes) -> None:
        ax.plot(steps, losses, color=SERIES[0], marker="o" if len(steps) < 5 else None)
        ax.set(xlabel="steps", ylabel="nats per character", xlim=(0, max(steps)))

    return (
        '<section id="training"><h2>Training</h2><figure class="card" style="max-width: 36rem">'
        f"{svg(draw, 5.6, 3)}<figcaption>NLL of the training batches, the mean since the point "
        "before.</figcaption></figure></section>"
    )


def _settings(result: Result) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th>'
        f"<td>{escape(str(value))}</td></tr>"
        for name, value in asdict(result.config).items() if value is not None
    )
    return (
        '<section id="settings"><h2>Settings</h2><div class="card wide"><table>'
        f"{rows}</table></div></section>"
    )
