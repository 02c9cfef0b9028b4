"""accelerate's prepared objects take the steps of a plain loop, and resume exactly."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_loop import (
    EPOCHS,
    MAX_NORM,
    OPTIMIZERS,
    STEPS,
    assert_same_weights,
    batches,
    network,
    plain_loop,
    schedule,
    seeded,
)
from torch import nn

accelerate = pytest.importorskip("accelerate")


class Prepared:
    """What accelerate's users write, with the block of `VIOptimizer` where it is one."""

    def __init__(self, name: str, accumulate: int = 1) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        self.is_sampled = name == "vi"
        self.net: nn.Module = self.accelerator.prepare(network())
        optimizer = seeded(OPTIMIZERS[name], self.net)
        self.optimizer, self.loader, self.falling = self.accelerator.prepare(
            optimizer, batches(), schedule(optimizer, STEPS // accumulate)
        )

    def block(self) -> AbstractContextManager[Any]:
        return self.optimizer.optimizer.sampled_params() if self.is_sampled else nullcontext()

    def epoch(self) -> list[torch.Tensor]:
        accelerator = self.accelerator
        for x, y in self.loader:
            with accelerator.accumulate(self.net):
                with self.block():
                    loss = F.cross_entropy(self.net(x), y)
                    if self.is_sampled:  # the optimizer takes the mean over the samples itself
                        loss = loss * accelerator.gradient_accumulation_steps
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and accelerator.gradient_accumulation_steps == 1:
                        accelerator.clip_grad_norm_(self.net.parameters(), MAX_NORM)
                self.optimizer.step()
                self.falling.step()
                self.optimizer.zero_grad()
        return [p.detach().clone() for p in self.net.parameters()]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_prepared_objects_are_the_plain_loop(name: str, accumulate: int) -> None:
    prepared = Prepared(name, accumulate)
    for _ in range(EPOCHS):
        prepared.epoch()
    expected = plain_loop(OPTIMIZERS[name], accumulate, clip=accumulate == 1)
    assert_same_weights(prepared.net, expected)


def test_a_loaded_state_goes_on_as_the_saved_one(tmp_path: Path) -> None:
    prepared = Prepared("vi")
    prepared.epoch()
    prepared.accelerator.save_state(str(tmp_path))
    expected = prepared.epoch()
    prepared.accelerator.load_state(str(tmp_path))
    found = prepared.epoch()
    assert all(torch.equal(p, q) for p, q in zip(found, expected, strict=True))
