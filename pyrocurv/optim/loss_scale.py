"""The scale of a GradScaler in a loss, told from the loss's weights and its gradients.

A scale is a power of 2. It is in the weights that are read off the gradient in the output; when the
gradients of the parameters are used they may have it still, may have lost it, and may be clipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyrocurv.runtime.distributions import unwrap
from pyrocurv.structures.linalg import at_least_single

LEAST_SCALE, GREATEST_SCALE = 2**8, 2**24  # of a GradScaler, which starts at 2¹⁶
LARGE_WEIGHT = 8  # on average over the entries: more than weights of classes and examples have


@dataclass(frozen=True)
class WeightSum:
    """The sum of a loss's weights over all `examples`, of whose `entries` some are `counted`.

    `is_exact` unless it is extrapolated, or entries may be masked because their loss is 0.
    """

    total: float
    counted: float
    entries: int
    examples: int
    is_uniform: bool = True
    is_exact: bool = True

    @staticmethod
    def of(weight: Tensor, mask: Tensor, size: LossSize) -> WeightSum:
        """Of weights [B, ...], relative to 1/B and 0 where the mask is."""
        weight = at_least_single(weight)
        sums = torch.stack([mask.sum().to(weight), weight.sum(), weight.square().sum()])
        counted, total, squares = (sums / size.rows).tolist()
        is_uniform = counted * squares < 1.001 * total**2
        is_exact = bool(mask.all()) and (is_uniform or size.rows == size.total)
        entries = size.total * size.entries
        return WeightSum(total, size.total * counted, entries, size.total, is_uniform, is_exact)

    @property
    def mean(self) -> float:
        """The weight of an entry."""
        return self.total / self.counted

    @property
    def is_plain(self) -> bool:
        """Whether a loss without a scale has such weights.

        That is a sum, or one divided by the number of its parts; a mean over the examples of sums;
        a sum over the examples of means.
        """
        parts = self.counted / self.total
        is_sum_of_means = abs(self.total / self.examples - 1) < 1e-3
        if self.total < 1.001 * self.examples:
            return is_sum_of_means or (parts > 0.9 and min(parts % 1, -parts % 1) < 1e-2)
        return is_sum_of_means or any(abs(parts / n - 1) < 1e-3 for n in (1, self.examples))

    @property
    def mean_scales(self) -> list[float]:
        """The scale of a mean that has such weights, if there is one."""
        sizes = self.total, self.mean * self.entries
        return [] if self.is_plain else [_power(x) for x in sizes if is_scale(x, 1e-3)]

    def scales(self) -> list[float]:
        """The scales that a GradScaler may have given the loss, the most likely first.

        A mean goes before a sum, which has the same weights at a smaller scale if the number of its
        entries is a power of 2.
        """
        if self.is_plain:
            return []
        sizes = self.mean, self.mean * self.examples, self.total / self.examples
        exact = [*self.mean_scales, *(_power(x) for x in sizes if is_scale(x, 1e-3))]
        if exact:
            return [scale for scale in exact if scale <= GREATEST_SCALE] or exact
        is_mean = not self.is_exact if self.is_uniform else self.mean > LARGE_WEIGHT
        power = _power(self.total)
        return [x for x in (power, power / 2) if x >= LEAST_SCALE] if is_mean else []


@dataclass(frozen=True)
class LossSize:
    """How many examples a loss is of, how many of them are looked at again, entries of each.

    `ratio` is by how much the parameters' gradients have shrunk since the backward pass. With
    `is_scaled` a GradScaler may shrink them later.
    """

    total: int
    rows: int
    ratio: float = 1.0
    is_scaled: bool = False
    entries: int = 1

    def of(self, fitted: Distribution) -> LossSize:
        """With the entries of a distribution."""
        return replace(self, entries=unwrap(fitted).batch_shape.numel() // self.rows)

    def gradient_scale(self, weights: WeightSum) -> float:
        """The factor of the loss that the gradients do not have at the step, of a GradScaler.

        | gradients since the backward pass | the factor |
        |---|---|
        | divided by a power of 2 from 256 on | that |
        | of a sum, divided by the number of entries | that |
        | changed otherwise, as by clipping | a scale in the weights that is not larger, else 1 |
        | unchanged, and `is_scaled` | a scale in the weights, if they are those of a mean |

        A sum that is clipped, and a mean that is unscaled and clipped, may look the same. If a loss
        without a scale has such weights, it is taken for one without.
        """
        if not 0 < weights.total < math.inf:
            return 1.0
        is_possible = weights.total > 0.9 * self.ratio or not weights.is_plain
        if (is_scale(self.ratio) and is_possible) or self._is_division(weights):
            return self.ratio
        possible = [scale for scale in weights.scales() if scale < 1.001 * self.ratio]
        if self.is_scaled:
            possible += weights.mean_scales
        return possible[0] if possible else 1.0

    def _is_division(self, weights: WeightSum) -> bool:
        """Whether the gradients were divided by a number that makes the loss a mean."""
        numbers = weights.total, weights.examples, weights.counted
        is_exact = any(abs(self.ratio / number - 1) < 1e-4 for number in numbers)
        return is_exact and abs(weights.total / self.ratio - 1) < 1e-2


def is_scale(value: float, accuracy: float = 1e-5) -> bool:
    """Whether a number is a power of 2 that is large enough for a GradScaler's."""
    is_large = (1 - accuracy) * LEAST_SCALE < value < math.inf
    return is_large and abs(value / _power(value) - 1) < accuracy


def _power(value: float) -> float:
    """The nearest power of 2."""
    return 2.0 ** round(math.log2(value))
