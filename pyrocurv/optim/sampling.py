"""Samples of the weights in a step: set them, collect what their gradients tell, average it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrocurv.curvature import Curvature
from pyrocurv.layers.block import Block
from pyrocurv.optim.parameter_blocks import (
    NamedParameters,
    ParameterBlocks,
    read_block,
    write_blocks,
)
from pyrocurv.posterior.sampling import Perturbation
from pyrocurv.posterior.state import BlockState
from pyrocurv.posterior.step import uses_sample_gradients


@dataclass(frozen=True, eq=False)
class Samples:
    """What the samples since the last step have left: their number, the examples, the curvature."""

    count: int
    rows: int  # of the first one
    layout: ParameterBlocks
    carried: tuple[BlockState, ...]
    estimates: tuple[Tensor | None, ...]  # sums of Λ ε ∘ g, for blocks that nothing else tells of
    size: Tensor | None = None  # the norm of those blocks' gradients

    def add(
        self, mirror: Sequence[
            Perturbation | None
        ], found: Sequence[Tensor | None], size: Tensor | None
    ) -> Samples:
        """With one more, which the next one may mirror, its Λ ε ∘ g and the gradients' norm."""
        noises = [*mirror, *[None] * (len(self.carried) - len(mirror))]
        carried = [replace(one, noise=n) for one, n in zip(self.carried, noises, strict=True)]
        estimates = [
            held if new is None else new if held is None else held + new
            for held, new in zip(self.estimates, found, strict=True)
        ]
        return replace(
            self, count=self.count + 1, carried=tuple(carried), estimates=tuple(estimates),
            size=size,
        )

    @property
    def means(self) -> list[Tensor | None]:
        """The mean estimate of each block; None where there is none, as for a new block."""
        means = [None if sum is None else sum / self.count for sum in self.estimates]
        return [*means, *[None] * (len(self.layout.blocks) - len(means))]


def mirrored(samples: Samples | None, carried: Sequence[BlockState]) -> list[Perturbation | None]:
    """What the next sample is the mirror image of: all its blocks are, or none."""
    last = samples.carried[: len(carried)] if samples else carried
    used = [one.noise for one in last]
    return [None] * len(used) if None in used else used  # where a block is new


# ---- being at one -------------------------------------------------------------------------------


@contextmanager
def restoring(blocks: Sequence[Block], places: NamedParameters) -> Iterator[list[Tensor]]:
    """Copies of what the blocks are, which they are again afterwards, bit for bit."""
    before = [read_block(block, places) for block in blocks]
    try:
        yield before
    finally:
        write_blocks(blocks, before, places)
        torch.clear_autocast_cache()


@contextmanager
def at_sample(
    blocks: Sequence[Block], noise: Sequence[Perturbation] | None, places: NamedParameters
) -> Iterator[tuple[Sequence[Block], list[Tensor]]]:
    """With a sample in the parameters; the blocks that moved for it, and their means."""
    moved = blocks if noise else ()
    with restoring(moved, places) as means:
        with torch.no_grad():
            for block, loc, one in zip(moved, means, noise or (), strict=True):
                for name, value in one.perturbed_weights(block, loc).items():
                    places[name][0].copy_(value)
        torch.clear_autocast_cache()
        yield moved, means


# ---- what it tells ------------------------------------------------------------------------------


def gradients(
    spec: Curvature, blocks: Sequence[Block], places: NamedParameters
) -> dict[str, Tensor]:
    """Copies of those there are, of blocks whose curvature comes from them."""
    names = [n for block in blocks if uses_sample_gradients(spec, block) for n in block.tensors]
    there = {name: places[name][0].grad for name in names}
    return {name: grad.clone() for name, grad in there.items() if grad is not None}


def size(spec: Curvature, blocks: Sequence[Block], places: NamedParameters) -> Tensor | None:
    """The norm of the gradients of such blocks, if there are any."""
    found = [*gradients(spec, blocks, places).values()]
    return torch.nn.utils.get_total_norm(found) if found else None


def check_grad_scale(before: Tensor | None, now: Tensor | None) -> None:
    """Raise RuntimeError where gradients were unscaled after a curvature had been made of them."""
    if before is not None and now is not None and bool(256 * now < before):
        raise RuntimeError(
            f"the gradients were {float(before / now):.0f} times as large when the sample was left "
            "as they are at step(), so the curvature from them is too large: with a GradScaler, "
            "call scaler.unscale_(optimizer) inside `with optimizer.sampled_params():`"
        )


def price_estimates(
    spec: Curvature, blocks: Sequence[Block], carried: Sequence[BlockState],
    noise: Sequence[Perturbation] | None, before: Mapping[str, Tensor], places: NamedParameters,
) -> list[Tensor | None]:
    """Λ ε ∘ g for blocks whose curvature comes from it; g is what `gradients` before grew by."""
    if noise is None:
        return [None] * len(blocks)
    return [
        one.known.precision.diag() * e.epsilon * _grown(block, before, places)
        if uses_sample_gradients(spec, block) else None
        for block, one, e in zip(blocks, carried, noise, strict=True)
    ]


def _grown(block: Block, before: Mapping[str, Tensor], places: NamedParameters) -> Tensor:
    after = {name: places[name][0] for name in block.tensors}
    return block.pack({
        name: torch.zeros_like(p) if p.grad is None else p.grad - before.get(name, 0)
        for name, p in after.items()
    })


# ---- several ------------------------------------------------------------------------------------


def sum_gradients(
    closure: Callable[[], Any], count: int, clear: Callable[[], None], places: NamedParameters
) -> Any:
    """The mean of the losses of so many calls, and the gradients' sum in the parameters.

    The closure may clear gradients itself.
    """
    losses, sums = [], dict[str, Tensor]()
    clear()
    for _ in range(count):
        losses.append(closure())
        for name, (p, _) in places.items():
            if p.grad is not None:
                sums[name] = sums[name] + p.grad if name in sums else p.grad.clone()
        clear()
    for name, (p, _) in places.items():
        p.grad = sums.get(name)
    known = [torch.as_tensor(loss).detach() for loss in losses if loss is not None]
    return torch.stack(known).mean() if known else None
