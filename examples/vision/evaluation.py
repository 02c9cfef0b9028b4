"""Scores of a predictive distribution on test images, and on images that it should doubt.

Entropies are in nats. The predictive distribution is the mean of the probabilities over S samples
of the posterior; its entropy is the mean entropy of the samples (aleatoric) plus the mutual
information of class and weights (epistemic).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_specificity_at_sensitivity,
    multiclass_accuracy,
    multiclass_calibration_error,
)

from pyrocurv.metrics import uncertainty
from vision.processes import gather

BINS, KEPT, COVERAGES = 15, 0.95, (0.8, 0.9)
Scores = dict[str, float]


@dataclass(frozen=True)
class Predictions:
    """Of N images, on the CPU."""

    log_probs: Tensor  # [N, classes] of the mean over the samples
    aleatoric: Tensor  # [N], the mean entropy of the samples
    labels: Tensor  # [N]; -1 for images of another kind
    num_samples: int = 1  # S; of a single one nothing is epistemic, or it is not known

    @property
    def entropy(self) -> Tensor:
        """The total uncertainty [N] in nats."""
        return torch.special.entr(self.log_probs.exp()).sum(-1)

    @property
    def is_correct(self) -> Tensor:
        return self.log_probs.argmax(-1) == self.labels


def collect(batches: Iterable[tuple[Tensor, Tensor]], length: int) -> Predictions:
    """Predictions from log probabilities [S, B, classes] and classes of batches.

    Of several processes, each with every `size`-th image, rank 0 gets all, in order; the others get
    their own.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    num_samples = 1
    for samples, y in batches:
        num_samples = len(samples)
        log_probs = samples.logsumexp(0) - math.log(num_samples)
        aleatoric = uncertainty(logits=samples).aleatoric
        parts.append((log_probs.cpu(), aleatoric.cpu(), y.cpu()))
    fields = [torch.cat(field) for field in zip(*parts, strict=True)]
    ranks = gather(fields)
    if len(ranks) > 1:
        fields = [torch.empty(length, *field.shape[1:], dtype=field.dtype) for field in fields]
        for rank, part in enumerate(ranks):
            for whole, values in zip(fields, part, strict=True):
                whole[rank::len(ranks)] = values
    log_probs, aleatoric, labels = fields
    return Predictions(log_probs, aleatoric, labels, num_samples)


def scores(predictions: Predictions) -> Scores:
    """On images with known classes; shares are in %."""
    log_probs, y = predictions.log_probs, predictions.labels
    probs, classes = log_probs.exp(), log_probs.shape[-1]
    found = {
        "accuracy": 100 * multiclass_accuracy(probs, y, classes, average="micro").item(),
        "NLL": F.nll_loss(log_probs.clamp(min=math.log(1e-12)), y).item(),
        "ECE": 100 * multiclass_calibration_error(probs, y, classes, n_bins=BINS).item(),
        "Brier": (probs - F.one_hot(y, classes)).square().sum(-1).mean().item(),
        "entropy": predictions.entropy.mean().item(),
    }
    if predictions.num_samples > 1:
        epistemic = predictions.entropy - predictions.aleatoric
        found["epistemic"] = epistemic.clamp(min=0).mean().item()
    risks = risk_coverage(predictions)
    for coverage in COVERAGES:
        number = max(1, round(coverage * len(risks)))
        found[f"selective {100 * coverage:.0f}"] = 100 * (1 - risks[number - 1].item())
    return found


def risk_coverage(predictions: Predictions) -> Tensor:
    """The share of errors [N] among the n images of highest confidence, for n from 1 to N."""
    order = predictions.log_probs.amax(-1).argsort(descending=True, stable=True)
    errors = (~predictions.is_correct[order]).double()
    return errors.cumsum(0) / torch.arange(1, len(errors) + 1)


def detection(test: Predictions, unseen: Predictions) -> Scores:
    """How well entropy tells images of another kind from the test images, in %.

    FPR95 is the share of them that pass for test images at the threshold that 95 % of those pass.
    """
    certainty = -torch.cat([test.entropy, unseen.entropy]).double()
    span = (certainty.max() - certainty.min()).clamp(min=1e-12)
    score = (certainty - certainty.min()) / span  # in [0, 1], where torchmetrics leaves it as it is
    is_test = (torch.arange(len(score)) < len(test.labels)).long()
    specificity, _ = binary_specificity_at_sensitivity(score, is_test, min_sensitivity=KEPT)
    found = {
        "AUROC": 100 * binary_auroc(score, is_test).item(),
        "FPR95": 100 * (1 - specificity.item()),
        "entropy": unseen.entropy.mean().item(),
    }
    if bool((unseen.labels >= 0).all()):  # corrupted images have the classes of the test images
        found["accuracy"] = 100 * unseen.is_correct.double().mean().item()
    return found
