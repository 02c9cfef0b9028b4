"""From pixels to what a network reads: augmentation, size, corruption, normalization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from vision.settings import DataSettings

Transform = Callable[[Tensor], Tensor]
MARGIN = 256 / 224  # of photographs around the crop that is evaluated


@dataclass(frozen=True)
class Pipeline:
    """Images of bytes to normalized floats: `augment` takes one image, the others also batches."""

    resize: Transform
    normalize: Transform  # of floats in [0, 1]
    augment: Transform | None = None
    corrupt: Transform | None = None  # of floats in [0, 1], after resizing

    def batch(self, pixels: Tensor) -> Tensor:
        """Bytes [B, C, H, W] to floats [B, C, size, size]."""
        if self.augment is not None:
            return self._finish(torch.stack([self.augment(image) for image in pixels]))
        return self._finish(self.resize(pixels))

    def one(self, image: Any) -> Tensor:
        """An image of PIL to floats [C, size, size]."""
        pixels = v2.functional.pil_to_tensor(image.convert("RGB"))
        return self._finish((self.augment or self.resize)(pixels))

    def corrupted(self, corrupt: Transform) -> Pipeline:
        """The same for corrupted images."""
        return replace(self, corrupt=corrupt)

    def _finish(self, pixels: Tensor) -> Tensor:
        x = v2.functional.to_dtype(pixels, torch.float32, scale=True)
        if self.corrupt is not None:
            x = self.corrupt(x).clamp(0, 1)
        return self.normalize(x)


def pipelines(data: DataSettings, channels: int) -> tuple[Pipeline, Pipeline]:
    """Those of training and of all else, for a network that reads so many channels."""
    mean, std = (_for_channels(values, channels) for values in (data.mean, data.std))
    convert: list[Any] = [v2.RGB() if channels == 3 else v2.Grayscale()]  # from either
    resize: list[Any] = [v2.Resize((data.size, data.size), antialias=True)]
    if data.augmentation == "resized-crop":
        resize = [v2.Resize(round(MARGIN * data.size), antialias=True), v2.CenterCrop(data.size)]
    augment = {
        "none": None,
        "crop-flip": [*resize, v2.RandomCrop(data.size, padding=data.size // 8),
                      v2.RandomHorizontalFlip()],
        "resized-crop": [v2.RandomResizedCrop(data.size, antialias=True),
                         v2.RandomHorizontalFlip()],
    }[data.augmentation]
    plain = Pipeline(v2.Compose(convert + resize), v2.Normalize(mean, std))
    if augment is None:
        return plain, plain
    return replace(plain, augment=v2.Compose(convert + augment)), plain


def to_pixels(x: Tensor, pipeline: Pipeline) -> Tensor:
    """Normalized images back to [0, 1]."""
    mean, std = (torch.tensor(v, device=x.device) for v in _constants(pipeline.normalize))
    return (x * std[:, None, None] + mean[:, None, None]).clamp(0, 1)


def _constants(normalize: Any) -> tuple[list[float], list[float]]:
    return list(normalize.mean), list(normalize.std)


def _for_channels(values: tuple[float, ...], channels: int) -> list[float]:
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels
