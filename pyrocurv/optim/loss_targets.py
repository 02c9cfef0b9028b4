"""From a network's output to terms of the curvature: the likelihood, and the data behind a loss.

The loss is the user's own. Its gradient in the output tells the targets and the weights of the
entries of "categorical" and "bernoulli" (`loss_weights`), and of every likelihood which entries
count: one whose gradient is exactly zero does not. Otherwise the loss is taken for PyTorch's mean
over all entries that count (rows; tokens; pixels); then that of "normal" has the gradient
(μ - y) / size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyrocurv.curvature.likelihood import Likelihood, LikelihoodTerm, as_likelihood
from pyrocurv.optim.loss_scale import LossSize, WeightSum, is_scale
from pyrocurv.optim.loss_weights import (
    LossReading,
    find_class_dim,
    mean_nll,
    read,
    read_distribution,
    tolerance,
)
from pyrocurv.optim.recorded_pass import MeanLoss, OutputGradients
from pyrocurv.runtime.distributions import unwrap
from pyrocurv.runtime.outputs import logits_of, named_outputs, replaced
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.runtime.validation import is_out_of_memory

DATA_KINDS = ("empirical", "hessian")


@dataclass(eq=False)
class LossLikelihood:
    """The likelihood of a loss, for one kind of curvature.

    `class_dim` is the axis of the classes of "categorical", found in the first pass if None.
    `has_finite_support`, `total_weight`, the sum of the loss's weights, and `scale`, how much of it
    is a GradScaler's, are as observed in the last pass. `late_scale` is how much of that the
    gradients still had.

    Raises ValueError for a likelihood that has not what the curvature needs.
    """

    likelihood: Likelihood
    kind: str
    class_dim: int | None = None
    has_finite_support: bool = False
    total_weight: float = 1.0
    scale: float = 1.0
    late_scale: float = 1.0
    weights: WeightSum | None = None  # without the scale
    warned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        as_likelihood(self.likelihood)
        self.has_finite_support = self.likelihood in ("categorical", "bernoulli")
        if self.kind in DATA_KINDS and not isinstance(self.likelihood, str):
            raise ValueError(
                f"curvature={self.kind!r} takes the targets from the loss's gradient, which a "
                "likelihood of your own does not allow: use 'fisher' or 'ggn'"
            )
        if self.class_dim is not None and self.likelihood != "categorical":
            raise ValueError(
                f"class_dim={self.class_dim!r}: only likelihood='categorical' has one, got "
                f"{self.likelihood!r}"
            )
        if self.class_dim == 0 or not isinstance(self.class_dim, (int, type(None))):
            raise ValueError(f"class_dim={self.class_dim!r}: an axis other than 0 is needed")

    def state_dict(self) -> dict[str, Any]:
        """What passes have shown, for a checkpoint."""
        return {"has_finite_support": self.has_finite_support, "class_dim": self.class_dim}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.has_finite_support = state["has_finite_support"]
        self.class_dim = state.get("class_dim", self.class_dim)

    def terms(
        self, output: Any, recorded: OutputGradients, size: LossSize
    ) -> list[LikelihoodTerm]:
        """The terms of another pass over the recorded examples: one, or those of a list.

        Raises ValueError for an output that the likelihood does not fit, FloatingPointError for one
        that is not finite.
        """
        outputs = named_outputs(output)
        for path in recorded.gradients or outputs:
            if not bool(torch.isfinite(outputs[path]).all()):
                raise FloatingPointError("the network's output is not finite")
        if not isinstance(self.likelihood, str):
            return self._terms_of_callable(output, recorded, size)
        name = self.logits_name(recorded.gradients or outputs)
        if name is None:
            least = 2 if self.likelihood == "categorical" else 1
            raise ValueError(
                f"likelihood={self.likelihood!r} wants an output of {least} axes or more, the "
                f"batch first, got {_shape(output)}"
            )
        gradient = recorded.gradients.get(name)
        logits = self._classes_last(outputs[name], gradient)
        density = as_likelihood(self.likelihood)
        fitted = self._checked(self._evaluated(density, logits), output, size.rows)
        if gradient is None:
            return [self._term(fitted, size.of(fitted), None)]
        before = self._classes_last(recorded.outputs[name], gradient)
        return [self._read(fitted, before, self._classes_last(gradient, gradient), size)]

    def logits_name(self, outputs: Mapping[str, Tensor]) -> str | None:
        """The path of the output that a named likelihood is of; None for a callable."""
        least = 2 if self.likelihood == "categorical" else 1
        return logits_of(outputs, least) if isinstance(self.likelihood, str) else None

    @torch.no_grad()
    def mean_loss(self, output: Tensor, gradient: Tensor) -> MeanLoss:
        """The mean negative log likelihood, by the gradient of the loss in the output."""
        output, gradient = (self._classes_last(x, gradient) for x in (output, gradient))
        classes = gradient.shape[-1] if self.likelihood == "categorical" else 1
        value = mean_nll(str(self.likelihood), output, gradient)
        return MeanLoss(value, gradient.numel() // classes)

    def _classes_last(self, x: Tensor, gradient: Tensor | None) -> Tensor:
        if self.likelihood != "categorical":
            return x
        if self.class_dim is None and gradient is not None:
            self.class_dim = find_class_dim(gradient)
        dim = -1 if self.class_dim is None else self.class_dim
        if not -x.dim() < dim < x.dim():
            raise ValueError(
                f"class_dim={dim}: an output {tuple(x.shape)} has axes 1 to {x.dim() - 1} for the "
                "classes"
            )
        return x.movedim(dim, -1)

    def _read(
        self, fitted: Distribution, before: Tensor, gradient: Tensor, size: LossSize
    ) -> LikelihoodTerm:
        """The term of a named likelihood, from the output before and the gradient in it."""
        size = size.of(fitted)
        if problem := _mismatch(str(self.likelihood), before, gradient):
            self._warn("mismatch", problem)
        reading = read(str(self.likelihood), before, gradient, size)
        if problem:
            reading = reading._replace(weight=None, doubt="")
        return self._term(fitted, size, reading, tolerance(gradient))

    def _terms_of_callable(
        self, output: Any, recorded: OutputGradients, size: LossSize
    ) -> list[LikelihoodTerm]:
        fitted = [self._checked(x, output, size.rows) for x in self._distributions(output)]
        if not recorded.gradients:
            return [self._term(each, size.of(each), None) for each in fitted]
        rows = {name: x.clone().requires_grad_() for name, x in recorded.outputs.items()}
        with torch.enable_grad():
            before = self._distributions(replaced(output, rows))
        tensors = [*rows.values()]
        gradients = [recorded.gradients.get(n, torch.zeros_like(x)) for n, x in rows.items()]
        readings = [
            read_distribution(there, tensors, gradients, size.of(here))
            for here, there in zip(fitted, before, strict=True)
        ]
        return [
            self._term(each, size.of(each), reading, tolerance(gradients[0]))
            for each, reading in zip(fitted, readings, strict=True)
        ]

    def _term(
        self, fitted: Distribution, size: LossSize, reading: LossReading | None,
        accuracy: float = 0.0,
    ) -> LikelihoodTerm:
        """The term of a distribution, with what the loss's gradient tells of its entries."""
        entries = unwrap(fitted)
        self.has_finite_support = entries.has_enumerate_support
        if reading is None:
            return LikelihoodTerm(fitted, torch.zeros(()), 1 / size.entries)
        if reading.doubt:
            self._warn("weights", f"likelihood={self.likelihood!r}: {reading.doubt}")
        value, mask = reading.target, None if bool(reading.mask.all()) else reading.mask
        if reading.weight is None:
            if mask is None:
                return LikelihoodTerm(fitted, value, 1 / size.entries)
            return LikelihoodTerm(entries, value, size.rows / mask.sum().clamp(min=1), mask)
        weight = size.total * torch.where(reading.mask, reading.weight, 0)
        scale = self._note_weights(WeightSum.of(weight, reading.mask, size), size)
        relative = weight * (size.entries / scale)
        if mask is None and bool(((relative - 1).abs() <= accuracy).all()):
            return LikelihoodTerm(fitted, value, 1 / size.entries)
        return LikelihoodTerm(entries, value, weight / scale, mask)

    def _note_weights(self, weights: WeightSum, size: LossSize) -> float:
        """Remember the loss's weights; returns how much of them is a GradScaler's."""
        scale = size.gradient_scale(weights)
        self.total_weight, self.scale = weights.total, scale
        self.late_scale = scale if scale > 1.01 * size.ratio else 1.0
        self.weights = replace(weights, total=weights.total / scale)
        return scale

    def scale_lost(self, ratio: float) -> float:
        """The scale that the gradients have lost since the last pass, `ratio` times larger then.

        It is 1 if they were clipped, as far as the loss's weights can tell.
        """
        if self.weights is None:
            return ratio if is_scale(ratio) else 1.0
        examples = self.weights.examples
        return LossSize(examples, examples, ratio).gradient_scale(self.weights)

    def _distributions(self, output: Any) -> list[Any]:
        given = self._evaluated(self.likelihood, output)
        return [*given] if isinstance(given, (list, tuple)) else [given]

    def _evaluated(self, density: Any, output: Any) -> Any:
        try:
            return density(output)
        except (AttributeError, TypeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"likelihood={self.likelihood!r} does not fit an output {_shape(output)}"
            ) from error

    def _checked(self, fitted: Any, output: Any, rows: int) -> Distribution:
        if not isinstance(fitted, Distribution):
            raise ValueError(
                f"likelihood={self.likelihood!r} gave no Distribution: {type(fitted).__name__}"
            )
        if fitted.batch_shape[:1] != (rows,):
            raise ValueError(
                f"likelihood={self.likelihood!r} has batch shape {tuple(fitted.batch_shape)} for "
                f"{rows} inputs and an output {_shape(output)}: the batch is the first axis"
            )
        return Independent(fitted, len(fitted.batch_shape) - 1)

    def _warn(self, kind: str, message: str) -> None:
        """Warn, once for each kind."""
        if kind not in self.warned:
            warn_user(message)
            self.warned.add(kind)


def _shape(output: Any) -> Any:
    return tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__


def _mismatch(likelihood: str, output: Tensor, gradient: Tensor) -> str:
    """What is wrong with a loss that cannot be the likelihood's, by its gradient in the output.

    That of a cross entropy sums to 0 over the classes, weighted or smoothed as it may be; that of
    the others does so by chance alone. Where a class is all but certain it is made of rounding.
    """
    if gradient.dim() < 2 or gradient.shape[-1] < 2:
        return ""
    if likelihood == "categorical":
        is_certain = output.float().softmax(-1).amax(-1, keepdim=True) > 1 - tolerance(gradient)
        gradient = torch.where(is_certain, 0, gradient)
    share = gradient.sum(-1).norm() / gradient.norm()
    if likelihood == "categorical" and bool(share > 0.1):
        return (
            "likelihood='categorical': the loss's gradient does not sum to 0 over an axis of the "
            f"output, the classes last [B{''.join(f', {n}' for n in gradient.shape[1:])}], as that "
            "of a cross entropy does over the classes: say likelihood='bernoulli', 'normal' or "
            "your own, or class_dim="
        )
    if likelihood != "categorical" and bool(share < 1e-5):
        return (
            f"likelihood={likelihood!r}: the loss's gradient sums to 0 over the last axis of the "
            "output, as that of a cross entropy does: say likelihood='categorical'"
        )
    return ""
