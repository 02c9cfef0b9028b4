"""The tables that a run prints."""

from __future__ import annotations

from vision.result import DETECTION, METRICS, Result, shown


def describe(result: Result) -> str:
    """Two lines: what was trained, and on what."""
    config, settings = result.config, result.settings
    posterior = f", guide {config.guide}" if config.method in ("ngvi", "laplace") else ""
    return (
        f"{config.method}{posterior}: {config.model}, {result.weights:,} weights, "
        f"{settings.epochs} epoch{'s' * (settings.epochs != 1)} of "
        f"{len(result.data.train):,} images in batches of {settings.batch}, lr {settings.lr:g}\n"
        f"{config.dataset}: {len(result.data.test):,} {config.evaluate_on} images, "
        f"{len(result.data.classes)} classes"
    )


def tables(result: Result) -> str:
    """The scores, and how well unseen images are told from the test images."""
    lines = [describe(result), ""]
    for name, metric in METRICS.items():
        value = shown(metric, result.scores.get(name))
        lines.append(f"{metric.label:<28}{value:>10} {metric.unit}".rstrip())
    if result.detection:
        heads = [f"{metric.label} {metric.unit}" for metric in DETECTION.values()]
        lines += ["", f"{'unseen images':<28}" + "".join(f"{head:>15}" for head in heads)]
        for kind, found in result.detection.items():
            cells = (shown(metric, found.get(name)) for name, metric in DETECTION.items())
            lines.append(f"{kind:<28}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)
