"""The examples of a forward pass, and their positions, that an estimate is taken from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrocurv.curvature.likelihood import LikelihoodTerm
from pyrocurv.layers.calls import LayerCall


@dataclass(frozen=True, eq=False)
class ExampleSelection:
    """The first `count` examples of a batch except those that the likelihood masks.

    `index` holds the examples that are left; None stands for all. `masked_positions` [count, S] is
    True at positions that the likelihood masks, such as padding in a sequence.
    """

    count: int
    index: Tensor | None = None
    masked_positions: Tensor | None = None

    @staticmethod
    def of(terms: Sequence[LikelihoodTerm], count: int) -> ExampleSelection:
        """The selection from the first `count` examples by the masks of the likelihood terms."""
        return ExampleSelection(
            count, _unmasked_examples(terms, count), _masked_positions(terms, count)
        )

    @property
    def size(self) -> int:
        """The number of examples that are left."""
        return self.count if self.index is None else len(self.index)

    def select(self, rows: Tensor) -> Tensor:
        """The rows of the examples that are left: [..., count, S, n] -> [..., B, S, n]."""
        return rows if self.index is None else rows.index_select(-3, self.index)


def _masked_positions(terms: Sequence[LikelihoodTerm], count: int) -> Tensor | None:
    """None if there are several terms, or the mask has no axis besides the examples."""
    if len(terms) != 1 or terms[0].mask is None:
        return None
    mask, shape = torch.as_tensor(terms[0].mask), terms[0].likelihood.batch_shape
    return ~mask.expand(shape)[:count].flatten(1) if len(shape) > 1 and mask.dim() > 1 else None


def _unmasked_examples(terms: Sequence[LikelihoodTerm], count: int) -> Tensor | None:
    """The examples that at least one term does not mask; None if a term has no mask."""
    masks = [torch.as_tensor(term.mask) for term in terms if term.mask is not None]
    if len(masks) < len(terms) or not all(mask.dim() for mask in masks):
        return None
    unmasked = [
        mask.expand(term.likelihood.batch_shape)[:count].flatten(1).any(1) if mask.dim() > 1
        else mask[:count] for mask, term in zip(masks, terms, strict=True)
    ]
    return torch.stack([mask.expand(count) for mask in unmasked]).any(0).nonzero().squeeze(1)


def check_batch(calls: Sequence[LayerCall], batch_size: int) -> None:
    """Raise ValueError for a layer whose input does not have the examples as its first axis."""
    for call in calls:
        if call.batch_size != batch_size:
            raise ValueError(
                f"{call.layer.weight!r} reads {call.batch_size} rows where there are {batch_size} "
                "examples: keep the batch as the first axis of the layer's input, other axes "
                "behind it"
            )
