"""What networks say about a text: the next character, a continuation, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from language.corpus import ALPHABET, decode, encode, windows
from pyrocurv.metrics import Uncertainty, uncertainty

ROWS = 32  # sequences of a forward pass


@torch.no_grad()
def log_probabilities(networks: Sequence[nn.Module], x: Tensor) -> Tensor:
    """[S, B, T, V] of the next characters, for characters [B, T]."""
    parts = [
        torch.stack([net(part).float().log_softmax(-1) for net in networks])
        for part in x.split(ROWS)
    ]
    return torch.cat(parts, 1)


def mixture(log_probs: Tensor) -> Tensor:
    """The mean over samples [S, ...] -> [...], in logarithms."""
    return log_probs.logsumexp(0) - math.log(len(log_probs))


@dataclass(frozen=True)
class Scores:
    """Of a text: nats per character, their standard error over files, share that is right."""

    nll: float
    error: float
    accuracy: float


def scores(networks: Sequence[nn.Module], text: Tensor, context: int) -> Scores:
    """Of texts [files, n], in windows that begin without any context."""
    x, y = windows(text, context)
    found = [
        mixture(log_probabilities(networks, part)).cpu()
        for part in x.to(_device(networks)).split(ROWS)
    ]
    log_probs = torch.cat(found)
    losses = F.nll_loss(log_probs.flatten(0, 1), y.flatten(), reduction="none")
    files = losses.view(len(text), -1).mean(1)
    error = float(files.std()) / math.sqrt(len(files)) if len(files) > 1 else math.nan
    right = (log_probs.argmax(-1) == y).float().mean()
    return Scores(float(files.mean()), error, float(right))


def write(
    networks: Sequence[nn.Module], prompt: str, length: int, temperature: float, context: int,
    seed: int,
) -> str:
    """The prompt and `length` characters, each drawn from the mean prediction of the networks.

    Probabilities are raised to the power of 1 / temperature.
    """
    generator = torch.Generator().manual_seed(seed)
    text = encode(prompt or "\n")
    device = _device(networks)
    for _ in range(length):
        x = text[None, -context:].to(device)
        log_probs = mixture(log_probabilities(networks, x))[0, -1].cpu()
        if temperature == 0:
            drawn = log_probs.argmax()[None]
        else:
            probs = (log_probs / temperature).softmax(-1)
            drawn = torch.multinomial(probs, 1, generator=generator)
        text = torch.cat([text, drawn])
    return decode(text)


@dataclass(frozen=True)
class Reading:
    """A text, and what the networks expected before each character but the first."""

    title: str
    text: str
    log_probs: Tensor  # [n - 1, V], means over the samples
    uncertainty: Uncertainty  # [n - 1] each, in nats

    def surprise(self) -> Tensor:
        """-log p of the characters that are there [n - 1], in nats."""
        return -self.log_probs.gather(1, encode(self.text)[1:, None])[:, 0]

    def alternatives(self, place: int, count: int) -> list[tuple[str, float]]:
        """The likeliest characters with their probabilities."""
        probs, numbers = self.log_probs[place].exp().topk(count)
        return [(ALPHABET[n], p) for n, p in zip(numbers.tolist(), probs.tolist(), strict=True)]


def read(networks: Sequence[nn.Module], title: str, text: str, context: int) -> Reading:
    """With at least half of the context before each character, where the text has it."""
    numbers = encode(text)
    size, half = len(numbers) - 1, max(1, context // 2)
    rows = []
    for start in range(0, max(1, size - half), half):
        part = numbers[start : min(start + context, size)]
        log_probs = log_probabilities(networks, part[None].to(_device(networks)))[:, 0].cpu()
        rows.append(log_probs if start == 0 else log_probs[:, half:])
    samples = torch.cat(rows, 1)
    return Reading(title, decode(numbers), mixture(samples), uncertainty(logits=samples))


def _device(networks: Sequence[nn.Module]) -> torch.device:
    return next(networks[0].parameters()).device
