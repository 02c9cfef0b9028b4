"""Networks by name: small ones that are written here, and all of torchvision's.

`ResNet20` is the residual network for CIFAR of He et al. 2016 (arXiv:1512.03385, section 4.2),
`TinyViT` a small vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) with an average
over the patches in place of the class token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from pyrocurv.nn.networks import LeNet5, ResidualBlock
from resuming import Refusal

SMALL_IMAGE = 64  # pixels; torchvision's ResNets would reduce smaller ones to a point
WITHOUT_AUXILIARY = {"aux_logits": False, "init_weights": True}
OPTIONS = {"googlenet": WITHOUT_AUXILIARY, "inception_v3": WITHOUT_AUXILIARY}


class ResNet20(nn.Sequential):
    """Nine residual blocks of 16, 32 and 64 channels: about 0.27 million weights."""

    def __init__(self, channels: int, classes: int) -> None:
        widths = [16] * 3 + [32] * 3 + [64] * 3
        blocks = [
            ResidualBlock(before, after, stride=after // before)
            for before, after in zip([16, *widths], widths, strict=False)
        ]
        super().__init__(
            nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes),
        )


class EncoderLayer(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)): [B, T, width] to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v)  # [B, heads, T, width / heads]
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyViT(nn.Module):
    """Four encoder layers of width 128 over 7 x 7 or 8 x 8 patches of the image."""

    def __init__(
        self, channels: int, classes: int, size: int, width: int = 128, heads: int = 4,
        layers: int = 4,
    ) -> None:
        super().__init__()
        side = 7 if size % 7 == 0 else 8
        if size % side:
            raise Refusal(f"--image-size {size}: vit-tiny needs a multiple of 7 or 8")
        self.patches = nn.Conv2d(channels, width, size // side, stride=size // side)
        self.position = nn.Parameter(0.02 * torch.randn(side * side, width))
        self.layers = nn.Sequential(*(EncoderLayer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT + self.position  # [B, T, width]
        return self.head(self.norm(self.layers(x)).mean(1))


def small_cnn(channels: int, classes: int) -> nn.Sequential:
    """Some 1,500 weights, for guides with dense matrices."""
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, stride=3), nn.ReLU(), nn.Conv2d(6, 12, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, classes),
    )


OWN = ("lenet5", "small-cnn", "resnet20", "vit-tiny")


def input_channels(model: str, channels: int) -> int:
    """Channels that a network reads: torchvision's read color images only."""
    return channels if model in OWN else 3


def make_network(
    model: str, channels: int, classes: int, size: int, pretrained: Path | None = None
) -> nn.Module:
    """The network `model` for images [channels, size, size].

    Raises Refusal for an unknown name, and for images that the network cannot read.
    """
    if model == "lenet5":
        if size not in (28, 32):
            raise Refusal(f"--image-size {size}: lenet5 reads images of 28 or 32 pixels")
        net: nn.Module = LeNet5(channels, classes, padding=2 if size == 28 else 0)
    elif model == "small-cnn":
        net = small_cnn(channels, classes)
    elif model == "resnet20":
        net = ResNet20(channels, classes)
    elif model == "vit-tiny":
        net = TinyViT(channels, classes, size)
    else:
        net = _torchvision(model, classes, size, keep_stem=pretrained is not None)
    if pretrained is not None:
        load_pretrained(net, pretrained)
    return net


def _torchvision(model: str, classes: int, size: int, keep_stem: bool) -> nn.Module:
    """One of torchvision's; the first layers of a ResNet keep the resolution of small images."""
    options: dict[str, Any] = dict(OPTIONS.get(model, {}))
    if model.startswith("vit_"):
        options["image_size"] = size
    try:
        net = torchvision.models.get_model(model, num_classes=classes, **options)
    except ValueError as error:
        names = ", ".join(OWN)
        reason = str(error) or "unknown"
        raise Refusal(
            f"--model {model}: {names}, or a name of torchvision.models ({reason})"
        ) from error
    if isinstance(net, torchvision.models.ResNet) and size <= SMALL_IMAGE and not keep_stem:
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    return net


def load_pretrained(net: nn.Module, path: Path) -> None:
    """Load a state dict; tensors of another shape than the network's, as of the head, are left out.

    Raises Refusal if the file is none, or has nothing for this network.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever is wrong with a file
        reason = str(error).splitlines()[0]
        raise Refusal(f"--pretrained {path} cannot be read: {reason}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {name.removeprefix("module."): value for name, value in state.items()}
    own = net.state_dict()
    fitting = {
        name: value for name, value in state.items()
        if name in own and getattr(value, "shape", None) == own[name].shape
    }
    if not fitting:
        raise Refusal(f"--pretrained {path} has no weights of this network")
    net.load_state_dict(fitting, strict=False)
    if left := [name for name in own if name not in fitting]:
        print(f"{path}: {len(fitting)} tensors loaded, not: {', '.join(left)}")
