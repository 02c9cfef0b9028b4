"""Small networks of every kind of layer, for all tests that go through a table of them. Float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Tokens(nn.Module):
    """An embedding under a head; one token is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).tanh().sum(1))


class Attention(nn.Module):
    """`nn.MultiheadAttention` over a sequence, read out at its mean."""

    def __init__(self, cross: bool = False, **kwargs) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **kwargs)
        self.head, self.cross = nn.Linear(4, 2), cross

    def forward(self, x: Tensor) -> Tensor:
        key = value = x.flip(1).sin() if self.cross else x
        if (sizes := (self.attention.kdim, self.attention.vdim)) != (4, 4):
            key, value = (key[..., :size] for size in sizes)
        x, _ = self.attention(x, key, value, need_weights=False)
        return self.head(x.mean(1))


class HandAttention(nn.Module):
    """The same self-attention by hand, with one `Linear` for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out, self.head = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in parts)
        heads = F.scaled_dot_product_attention(q, k, v)
        return self.head(self.out(heads.transpose(1, 2).flatten(2)).mean(1))


class Tied(nn.Module):
    """An embedding whose weight is the head's as well."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embed, self.middle = nn.Embedding(4, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 4, bias=bias)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(x).mean(1)).tanh())


class TwoBiases(nn.Module):
    """One weight in two linear layers, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())[:, :2]


class Products(nn.Module):
    """Bare tensors, used functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
        self.v, self.c = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2))
        self.scale = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x @ self.w.T + self.b).tanh() * self.scale
        return hidden @ self.v + self.c


class Recurrent(nn.Module):
    """Weights that no supported op consumes."""

    def __init__(self, kind: Callable[..., nn.Module] = nn.GRU) -> None:
        super().__init__()
        self.recurrent, self.head = kind(3, 2, batch_first=True), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class FromCode(nn.Module):
    """A layer whose weight another layer makes from a learned code, of any number of rows."""

    def __init__(self, *rows: int) -> None:
        super().__init__()
        self.code, self.maker = nn.Parameter(torch.randn(*rows, 2)), nn.Linear(2, 6)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.maker(self.code.sin()).tanh().reshape(-1, 2, 3).sum(0)
        return self.head(F.linear(x, weight).tanh())


class Positions(nn.Module):
    """A learned table of positions with a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(4, 3), nn.Linear(3, 3)
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        place = self.place(self.table(torch.arange(x.shape[1])).tanh())
        return self.head((self.layer(x) + place).tanh().mean(1))


class SequenceFirst(nn.Module):
    """Inputs [B, S, I] that are transposed to [S, B, I], and read out from one position or all."""

    def __init__(self, position: int | None = None) -> None:
        super().__init__()
        self.layer, self.head, self.position = nn.Linear(3, 3), nn.Linear(3, 2), position

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x.transpose(0, 1)).tanh()
        return self.head(hidden.mean(0) if self.position is None else hidden[self.position])


class InHalf(nn.Module):
    """A network that runs in bfloat16 by itself."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x)


class Mapped(nn.Module):
    """A layer inside `torch.vmap`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.vmap(lambda row: self.layer(row).tanh())(x).sum(1))


class Product(torch.autograd.Function):
    """x Wᵀ as a custom op."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.mT @ x


class OwnOp(nn.Module):
    """A weight in an `autograd.Function`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Product.apply(x, self.weight).tanh())


class OwnOpToo(OwnOp):
    """The same weight in a supported op too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head((F.linear(x, self.weight) + Product.apply(x.sin(), self.weight)).tanh())


class MappedToo(Mapped):
    """The layer outside of `torch.vmap` as well."""

    def forward(self, x: Tensor) -> Tensor:
        inside = torch.vmap(lambda row: self.layer(row).tanh())(x.sin())
        return self.head((inside + self.layer(x)).tanh().sum(1))


class Derivative(nn.Module):
    """The derivative of a network in its input, as a force is of an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            place = x.detach().requires_grad_()
            energy = self.head(self.layer(place).tanh()).sum()
            (force,) = torch.autograd.grad(energy, place, create_graph=True)
        return force[:, :2]


def around(*layers: nn.Module, features: int) -> nn.Sequential:
    """With a smooth function behind each layer and a head on top."""
    parts = [part for layer in layers for part in (layer, nn.Tanh())]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(features, 2))


def moved(net: nn.Module) -> nn.Module:
    """The scales and statistics of norm layers away from where they start, as after training."""
    batch_norm = nn.modules.batchnorm._BatchNorm
    for module in net.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, batch_norm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias)
        if isinstance(module, batch_norm):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
    return net.eval()


# name: (make the net, shape of one example); every layer is an op, one matrix for each group
LAYERED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "grouped": (lambda: around(nn.Conv2d(4, 6, 2, groups=2, padding=1), features=54), (4, 2, 2)),
    "depthwise": (lambda: around(nn.Conv1d(3, 6, 2, groups=3), features=12), (3, 3)),
    "grouped-3d": (
        lambda: around(nn.Conv3d(2, 2, 2, groups=2, bias=False), features=4), (2, 2, 2, 3),
    ),
    "transposed-1d": (
        lambda: around(nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), features=24),
        (2, 3),
    ),
    "transposed-2d": (
        lambda: around(
            nn.ConvTranspose2d(2, 2, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1)),
            features=20,
        ),
        (2, 2, 2),
    ),
    "transposed-3d": (
        lambda: around(
            nn.ConvTranspose3d(1, 2, (1, 2, 2), padding=(0, 1, 1), bias=False), features=8
        ),
        (1, 1, 3, 3),
    ),
    "transposed-grouped": (
        lambda: around(nn.ConvTranspose1d(4, 4, 2, stride=2, groups=2), features=16), (4, 2),
    ),
    "layer-norm": (lambda: around(nn.Linear(3, 4), nn.LayerNorm(4), features=4), (3,)),
    "layer-norm-2d": (lambda: around(nn.LayerNorm((2, 3)), features=12), (2, 2, 3)),
    "rms-norm": (lambda: around(nn.Linear(3, 4), nn.RMSNorm(4), features=8), (2, 3)),
    "group-norm": (lambda: around(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), features=12), (2, 4)),
    "batch-norm": (lambda: around(nn.Linear(3, 4), nn.BatchNorm1d(4), features=4), (3,)),
    "batch-norm-2d": (lambda: around(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), features=8), (1, 3, 3)),
    "embedding": (Tokens, (3,)),
    "hand-attention": (HandAttention, (3, 4)),
}  # fmt: skip

# nets whose layers are not modules: the dense matrices are their only oracle
WOVEN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (Attention, (3, 4)),
    "attention-cross": (lambda: Attention(cross=True), (3, 4)),
    "attention-apart": (lambda: Attention(kdim=3, vdim=2), (3, 4)),
    "attention-keys": (lambda: Attention(cross=True, kdim=3, vdim=3), (3, 4)),
    "tied": (Tied, (3,)),
    "two-biases": (TwoBiases, (3,)),
    "products": (Products, (3,)),
    "recurrent": (Recurrent, (3, 3)),
    "lstm": (lambda: Recurrent(nn.LSTM), (2, 3)),
    "rnn": (lambda: Recurrent(nn.RNN), (2, 3)),
}
# name: (make the net, shape of one example, the tensors of layers that do not see the examples)
MISREAD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "code": (lambda: FromCode(), (3,), {"maker.weight", "maker.bias"}),
    "code-row": (lambda: FromCode(1), (3,), {"maker.weight", "maker.bias"}),
    "code-rows": (lambda: FromCode(4), (3,), {"maker.weight", "maker.bias"}),
    "positions": (Positions, (4, 3), {"table.weight", "place.weight", "place.bias"}),
    "sequence": (SequenceFirst, (4, 3), {"layer.weight", "layer.bias"}),
    "sequence-start": (lambda: SequenceFirst(0), (4, 3), {"layer.weight", "layer.bias"}),
    "sequence-end": (lambda: SequenceFirst(-1), (4, 3), {"layer.weight", "layer.bias"}),
}
# the same, for tensors that are consumed where no function mode sees it
HIDDEN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "vmapped": (Mapped, (2, 3), {"layer.weight", "layer.bias"}),
    "own-op": (OwnOp, (3,), {"weight"}),
    "own-op-too": (OwnOpToo, (3,), {"weight"}),
    "mapped-too": (MappedToo, (2, 3), {"layer.weight", "layer.bias"}),
    "derivative": (Derivative, (3,), {"layer.weight", "head.weight"}),
}
HALF = {  # nets in single precision, with as many layers
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), (6,), 2),
    "norm": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)), (6,), 3
    ),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.ReLU(), nn.Flatten(),
            nn.Linear(36, 3),
        ),
        (2, 4, 4), 3,
    ),
    "attention": (Attention, (3, 4), 3),
}  # fmt: skip
TOKENS = {"embedding": 5, "tied": 4}
OPAQUE = {"recurrent", "lstm", "rnn"}


def make(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    """A net, always the same, and inputs."""
    build, shape = {**LAYERED, **WOVEN, **{n: r[:2] for n, r in (MISREAD | HIDDEN).items()}}[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        net = moved(build().double())
        if name in TOKENS:
            return net, torch.randint(TOKENS[name], (batch, *shape))
        return net, torch.randn(batch, *shape, dtype=torch.float64)
