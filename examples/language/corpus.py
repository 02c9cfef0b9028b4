"""Text that every Python has: its standard library, split by file; or a file of one's own."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
SPLIT_SEED, WINDOW, FILES = 0, 2048, {"val": 16, "test": 32}
TRAIN_SIZE = 1_500_000

Batch = tuple[Tensor, Tensor]  # characters and the next ones, [B, T]


def encode(text: str) -> Tensor:
    """Characters as numbers [n]; tabs are blanks and what is not in the alphabet is a '?'."""
    place = {character: number for number, character in enumerate(ALPHABET)}
    other = place["?"]
    return torch.tensor(
        [place.get(character, other) for character in text.replace("\t", " ")], dtype=torch.long
    )


def decode(numbers: Tensor) -> str:
    """The text of numbers [n]."""
    return "".join(ALPHABET[number] for number in numbers.tolist())


def corpus(train_size: int = TRAIN_SIZE) -> dict[str, Tensor]:
    """train [n], and val, test [files, WINDOW]; without tests, tables and what is installed."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if not LEFT_OUT & {*p.relative_to(root).parts})
    random.Random(SPLIT_SEED).shuffle(paths)
    texts = (encode(path.read_text(encoding="utf-8", errors="replace")) for path in paths)
    texts = (text for text in texts if len(text) >= 2 * WINDOW)
    held_out = {}
    for name, count in FILES.items():
        files = [next(texts) for _ in range(count)]
        held_out[name] = torch.stack([file[len(file) // 2 :][:WINDOW] for file in files])
    train, size = [], 0
    while size < train_size:
        train.append(next(texts))
        size += len(train[-1])
    return {"train": torch.cat(train)[:train_size], **held_out}


def own_corpus(path: Path, window: int = WINDOW) -> dict[str, Tensor]:
    """train [n] and test [parts, window] of a file, whose last tenth is the test text.

    Raises ValueError for a text that is too short for that.
    """
    text = encode(path.read_text(encoding="utf-8", errors="replace"))
    parts = len(text) // 10 // window
    if parts == 0:
        raise ValueError(
            f"{path} has {len(text):,} characters: at least {10 * window:,} are needed"
        )
    size = parts * window
    return {"train": text[:-size], "test": text[-size:].view(parts, window)}


def windows(text: Tensor, context: int) -> Batch:
    """All of a text [..., n] in sequences of `context` characters, [B, T], and the next ones."""
    count = (text.shape[-1] - 1) // context
    x = text[..., : count * context].reshape(-1, context)
    return x, text[..., 1 : count * context + 1].reshape(-1, context)


def batches(
    text: Tensor, steps: int, seed: int, batch: int, context: int, start: int = 0
) -> Iterator[Batch]:
    """Sequences that begin anywhere, the same for every method, from step `start` on."""
    order = torch.Generator().manual_seed(seed)
    for step in range(steps):
        first = torch.randint(len(text) - context, (batch, 1), generator=order)
        if step >= start:
            places = first + torch.arange(context)
            yield text[places], text[places + 1]
