"""Products with the Hessian in the weights: exact for any network, a backward pass for each row.

With g the gradient of a scalar and its graph kept, a vector v gives H v = ∇(gᵀv). Vectors go in
batches, as many at once as `NUMBERS` allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pyrocurv.blocks import Block, positions
from pyrocurv.capture import Call

NUMBERS = 2**22  # that the vectors of one batched pass, and all on their way, should not exceed


def products(
    gradient: Tensor, inputs: Sequence[Tensor] | Sequence[GradientEdge], vectors: Tensor
) -> list[Tensor | None]:
    """For each of vectors [N, *gradient.shape] the gradients of its product with `gradient`.

    One batched pass, or a loop where an op on the way has no batched form. None: no path.
    """
    if not gradient.requires_grad:  # L is linear
        return [None] * len(inputs)
    if len(vectors) > 1:
        try:
            return list(torch.autograd.grad(
                gradient, inputs, vectors, retain_graph=True, allow_unused=True,
                is_grads_batched=True,
            ))
        except RuntimeError:
            pass  # a true fault comes up again below
    rows = [
        torch.autograd.grad(gradient, inputs, v, retain_graph=True, allow_unused=True)
        for v in vectors
    ]
    return [None if part[0] is None else torch.stack(part) for part in zip(*rows, strict=True)]


def signs(*shape: int, like: Tensor) -> Tensor:
    """Independent entries ±1."""
    return torch.randint(2, shape, device=like.device).to(like.dtype) * 2 - 1


def chunk_size(calls: Sequence[Call], size: int) -> int:
    """How many vectors of `size` to send at once."""
    return max(1, NUMBERS // max(size, *(call.output_shape.numel() for call in calls)))


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part: rounding is not."""
    return (matrix + matrix.mT) / 2


@dataclass(frozen=True, eq=False)
class InWeights:
    """g in the weights of a block, packed [P], with its graph; the weights are its leaves."""

    block: Block
    gradient: Tensor
    leaves: tuple[Tensor, ...]
    chunk: int

    def times(self, vectors: Tensor) -> Tensor:
        """H v for vectors [N, P]."""
        found = products(self.gradient, self.leaves, vectors)
        parts = [
            vectors.new_zeros(len(vectors), leaf.numel()) if part is None else part.flatten(1)
            for part, leaf in zip(found, self.leaves, strict=True)
        ]
        (order,) = positions((self.block,), self.block.tensors)
        return torch.cat(parts, 1)[:, order.to(vectors.device)]

    def rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Row numbers [N] and those rows of H [N, P], some at a time."""
        numbers = torch.arange(self.block.size, device=self.gradient.device)
        for some in numbers.split(self.chunk):
            vectors = self.gradient.new_zeros(len(some), self.block.size)
            yield some, self.times(vectors.scatter_(1, some[:, None], 1.0))

    def matrix(self) -> Tensor:
        """H [P, P]."""
        return symmetric(torch.cat([rows for _, rows in self.rows()]))

    def diagonal(self) -> Tensor:
        """diag H [P], in P passes."""
        return torch.cat([rows.gather(1, some[:, None])[:, 0] for some, rows in self.rows()])

    def probed_diagonal(self, num_samples: int) -> Tensor:
        """The mean of v ∘ H v over random signs; its variance is 2 sum_j≠i H_ij² / num_samples."""
        vectors = signs(num_samples, self.block.size, like=self.gradient)
        parts = [v * self.times(v) for v in vectors.split(self.chunk)]
        return torch.cat(parts).mean(0)
