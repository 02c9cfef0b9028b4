"""What one forward pass gives for the curvature: masks, the batch axis and layer statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyrocurv.curvature.hessian import BlockStatistics, hessians
from pyrocurv.curvature.layer_statistics import (
    collect,
    select_examples,
)
from pyrocurv.curvature.likelihood import LikelihoodTerm
from pyrocurv.curvature.output_gradients import pullback
from pyrocurv.curvature.spec import Curvature
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall


class ForwardPass(NamedTuple):
    """The likelihood terms of a forward pass over `rows` examples, and the calls of its layers."""

    terms: Sequence[LikelihoodTerm]
    calls: Sequence[LayerCall]
    rows: int


def collect_statistics(
    spec: Curvature, blocks: Sequence[Block], terms: Sequence[LikelihoodTerm],
    calls: Sequence[LayerCall], count: int, kept: Tensor | None,
) -> Iterable[BlockStatistics]:
    """What each block is estimated from."""
    masked = masked_positions(terms, count)
    if spec.kind == "hessian":
        return hessians(blocks, terms, calls, count, spec.num_samples, kept, masked)
    gradients = pullback(spec.kind, terms, calls, count, spec.num_samples)
    return (
        select_examples(collect(block, calls, gradients, count, masked), kept) for block in blocks
    )


def masked_positions(terms: Sequence[LikelihoodTerm], count: int) -> Tensor | None:
    """Which positions [count, S] the mask of the one likelihood drops; None where it has none."""
    if len(terms) != 1 or terms[0].mask is None:
        return None
    mask, shape = torch.as_tensor(terms[0].mask), terms[0].likelihood.batch_shape
    return ~mask.expand(shape)[:count].flatten(1) if len(shape) > 1 and mask.dim() > 1 else None


def unmasked_examples(terms: Sequence[LikelihoodTerm], count: int) -> Tensor | None:
    """The rows that no mask drops from all terms; None where all are kept."""
    masks = [torch.as_tensor(term.mask) for term in terms if term.mask is not None]
    if len(masks) < len(terms) or not all(mask.dim() for mask in masks):
        return None
    rows = [mask.expand(term.likelihood.batch_shape)[:count].flatten(1).any(1) if mask.dim() > 1
            else mask[:count] for mask, term in zip(masks, terms, strict=True)]
    return torch.stack([row.expand(count) for row in rows]).any(0).nonzero().squeeze(1)


def check_batch(calls: Sequence[LayerCall], batch: int) -> None:
    """Examples must be the first axis of every layer's input."""
    for call in calls:
        if call.batch_size != batch:
            raise ValueError(
                f"{call.layer.weight!r} reads {call.batch_size} rows where there are {batch} "
                "examples: keep the batch as the first axis of the layer's input, other axes "
                "behind it"
            )
