"""What a run has found, and what its numbers mean."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from vision.config import Config
from vision.datasets import ImageData
from vision.evaluation import Predictions, Scores
from vision.settings import Settings
from vision.training import History


@dataclass(frozen=True)
class Result:
    """Of one run; `test` and `unseen` have the predictions, the others what was made of them."""

    config: Config
    settings: Settings
    weights: int
    data: ImageData
    history: History
    test: Predictions
    unseen: dict[str, Predictions]
    scores: Scores
    detection: dict[str, Scores]  # by the kind of unseen images

    def as_json(self) -> dict[str, Any]:
        """Settings, scores and curves."""
        return {
            "config": {name: _plain(value) for name, value in asdict(self.config).items()},
            "settings": asdict(self.settings),
            "weights": self.weights,
            "classes": list(self.data.classes),
            "images": {"training": len(self.data.train), "test": len(self.data.test)},
            "scores": self.scores,
            "unseen": self.detection,
            "curves": self.history.rows,
        }


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


class Metric(NamedTuple):
    """A number in a table."""

    label: str
    unit: str
    digits: int
    better: str  # "higher", "lower" or ""
    meaning: str


METRICS = {
    "accuracy": Metric("accuracy", "%", 2, "higher", "share of the images classified right"),
    "NLL": Metric(
        "NLL", "nats", 4, "lower",
        "negative log likelihood: minus the log probability of the true class, per image",
    ),
    "ECE": Metric(
        "ECE", "%", 2, "lower",
        "expected calibration error: mean gap between confidence and accuracy, 15 bins",
    ),
    "Brier": Metric(
        "Brier score", "", 4, "lower",
        "squared distance of the probabilities from the true class, 0 to 2, per image",
    ),
    "selective 90": Metric(
        "accuracy at 90 % coverage", "%", 2, "higher",
        "accuracy if the least certain tenth of the images is left to a person",
    ),
    "selective 80": Metric(
        "accuracy at 80 % coverage", "%", 2, "higher",
        "the same for the least certain fifth",
    ),
    "entropy": Metric(
        "entropy", "nats", 3, "", "of the predictive distribution, mean: its total uncertainty"
    ),
    "epistemic": Metric(
        "epistemic part", "nats", 3, "",
        "of the entropy: what more data would remove (mutual information of class and weights)",
    ),
    "train s": Metric("training", "s", 1, "lower", "wall-clock time of all epochs"),
    "ms / image": Metric("prediction", "ms / image", 3, "lower", "wall-clock time"),
}
DETECTION = {
    "AUROC": Metric(
        "AUROC", "%", 1, "higher",
        "probability that an image of this kind has a higher entropy than a test image",
    ),
    "FPR95": Metric(
        "FPR95", "%", 1, "lower",
        "share of these images that pass as certain where 95 % of the test images do",
    ),
    "entropy": Metric("entropy", "nats", 3, "", "of the predictive distribution, mean"),
    "accuracy": Metric("accuracy", "%", 2, "higher", "of the corrupted images"),
}


def shown(metric: Metric, value: float | None) -> str:
    """A value with the digits of its metric; a dash where there is none."""
    return "-" if value is None else f"{value:.{metric.digits}f}"
