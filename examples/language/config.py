"""The command line: its fields are the options, its comments the help texts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Method = Literal["adam", "muon", "second-order", "ngvi"]


@dataclass(frozen=True)
class Config:
    """Train a character GPT, write text with it, and see where it is unsure."""

    # ---- what to train ----
    method: Method = "ngvi"
    """How the network is trained, and what predicts."""
    text: Path | None = None
    """Train on this file; its last tenth is held out. None: Python's standard library."""
    train_size: int = 1_500_000
    """Characters of the standard library to train on."""
    layers: int = 2
    """Layers of the network."""
    width: int = 128
    """Of its hidden states."""
    heads: int = 4
    """Of its attention."""
    context: int = 64
    """Characters that it sees."""
    # ---- training ----
    steps: int = 1000
    """Of training."""
    batch: int = 32
    """Sequences of --context characters in a step."""
    lr: float | None = None
    """Learning rate at its peak; it rises linearly, and falls to 0 as a cosine. None: adam 0.003,
    muon, second-order and ngvi 0.04."""
    kl_temperature: float = 0.1
    """T of the KL term of ngvi; the larger, the more do the samples of the posterior differ."""
    samples: int = 8
    """Samples of the posterior for a prediction (ngvi)."""
    seed: int = 0
    """Of weights, batches and samples."""
    device: str = "cpu"
    """cpu, cuda, mps, ..."""
    # ---- text that it writes ----
    prompt: str = "def "
    """What the text begins with; \\n is a new line."""
    length: int = 400
    """Characters of it."""
    temperature: float = 0.7
    """Below 1 the likelier characters come more often than their probability says; 0: always the
    likeliest."""
    show_every: int = 250
    """Steps between two texts during training."""
    # ---- results ----
    checkpoint: Path | None = None
    """Written after each --show-every steps."""
    resume: bool = False
    """Go on from --checkpoint, bit for bit, if the file is there."""
    report: Path | None = None
    """Write a self-contained HTML page."""
    smoke: bool = False
    """A few steps of a tiny network, to check the set-up."""

    def resolved(self) -> Config:
        """With the sizes of a smoke run, if it is one."""
        if not self.smoke:
            return self
        return replace(
            self, train_size=20_000, layers=1, width=16, heads=2, context=16, steps=8, batch=4,
            samples=2, length=24, show_every=4,
        )
