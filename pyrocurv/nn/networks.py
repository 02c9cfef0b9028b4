"""Small networks of `torch.nn` for examples, tests and benchmarks: images or characters -> logits.

`LeNet5`, `MLP` and `ResNet` classify images [B, channels, height, width], `GPT` predicts the next
token of a sequence. They are plain modules; `bayesianize` makes a Pyro model of any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from pyrocurv.runtime.validation import check_integer, check_iterable

__all__ = ["GPT", "MLP", "LeNet5", "ResNet"]


class LeNet5(nn.Sequential):
    """Two convolutions and three linear layers with ReLU, 61,706 weights by default.

    Args:
        channels: of the images.
        classes: number of logits.
        padding: of the first convolution: 2 for images of 28 x 28, 0 for 32 x 32.

    Raises ValueError for a number out of its range.

    Reference: LeCun et al. 1998, "Gradient-based learning applied to document recognition"; here
    with ReLU and max pooling.

    Example:
        >>> import torch
        >>> LeNet5()(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(self, channels: int = 1, classes: int = 10, padding: int = 2) -> None:
        _check_sizes(channels=channels, classes=classes)
        check_integer("padding", padding, 0)
        super().__init__(
            nn.Conv2d(channels, 6, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes),
        )


class MLP(nn.Sequential):
    """Linear layers with ReLU between them, 784-512-512-10 with 669,706 weights by default.

    Args:
        inputs: number of values of an example, which is flattened first.
        hidden: widths of the hidden layers.
        outputs: number of outputs.

    Raises ValueError for a size below 1, TypeError if `hidden` is not a sequence.

    Example:
        >>> import torch
        >>> MLP(8, [50], 1)(torch.zeros(5, 8)).shape
        torch.Size([5, 1])
    """

    def __init__(
        self, inputs: int = 784, hidden: Sequence[int] = (512, 512), outputs: int = 10
    ) -> None:
        check_iterable("hidden", hidden, "a sequence of layer widths")
        sizes = [inputs, *hidden, outputs]
        names = ["inputs", *(f"hidden[{number}]" for number in range(len(sizes) - 2)), "outputs"]
        _check_sizes(**dict(zip(names, sizes, strict=True)))
        linears = [nn.Linear(before, after) for before, after in pairwise(sizes)]
        activated = [module for linear in linears[:-1] for module in (linear, nn.ReLU())]
        super().__init__(nn.Flatten(), *activated, linears[-1])


class ResidualBlock(nn.Module):
    """ReLU(BN(conv(ReLU(BN(conv(x))))) + skip(x)), 3 x 3; `skip` is a 1 x 1 convolution if needed.

    [B, inputs, H, W] -> [B, outputs, H / stride, W / stride], rounded up.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.skip(x))


class ResNet(nn.Sequential):
    """A residual network with batch norm, 77,754 weights by default.

    A convolution of stride 2, one residual block for each width (the first of stride 1, the others
    of stride 2), an average over all positions and a linear layer.

    Args:
        channels: of the images.
        classes: number of logits.
        widths: channels of the residual blocks.

    Raises ValueError for a size below 1 or no width, TypeError if `widths` is not a sequence.

    Reference: He et al. 2016, "Deep residual learning for image recognition", arXiv:1512.03385.

    Example:
        >>> import torch
        >>> ResNet()(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self, channels: int = 1, classes: int = 10, widths: Sequence[int] = (16, 32, 64)
    ) -> None:
        check_iterable("widths", widths, "a sequence of numbers of channels")
        widths = [*widths]
        if not widths:
            raise ValueError("widths: at least one number of channels is needed")
        _check_sizes(channels=channels, classes=classes)
        _check_sizes(**{f"widths[{number}]": width for number, width in enumerate(widths)})
        stem = nn.Conv2d(channels, widths[0], 3, stride=2, padding=1, bias=False)
        norm = nn.BatchNorm2d(widths[0])
        blocks = [ResidualBlock(widths[0], widths[0])]
        blocks += [ResidualBlock(before, after, 2) for before, after in pairwise(widths)]
        super().__init__(
            stem, norm, nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(widths[-1], classes),
        )


class TransformerLayer(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)), with causal attention; [B, T, width] to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            part(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, T, width/heads]
            for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A pre-LN transformer over sequences: tokens [B, T] -> logits of the next [B, T, vocabulary].

    All matrices of the layers and the untied head are `nn.Linear`; token and position embeddings
    start with standard deviation 0.02. 429,664 weights by default.

    Args:
        vocabulary: number of tokens.
        context: the longest sequence.
        width: of the hidden states, a multiple of `heads`.
        heads: of the attention.
        layers: their number.

    Raises ValueError for a size below 1, or a width that `heads` does not divide.

    Reference: Radford et al. 2019, "Language models are unsupervised multitask learners".

    Example:
        >>> import torch
        >>> GPT(vocabulary=96)(torch.zeros(5, 64, dtype=torch.long)).shape
        torch.Size([5, 64, 96])
    """

    def __init__(
        self, vocabulary: int = 96, context: int = 64, width: int = 128, heads: int = 4,
        layers: int = 2,
    ) -> None:
        _check_sizes(vocabulary=vocabulary, context=context, width=width, heads=heads)
        check_integer("layers", layers, 1)
        if width % heads:
            raise ValueError(f"width={width}: a multiple of heads={heads} is needed")
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(context, width)
        self.layers = nn.ModuleList(TransformerLayer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        for embedding in (self.token, self.place):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.place.weight[: x.shape[1]]
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h))


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        check_integer(name, size, 1)
