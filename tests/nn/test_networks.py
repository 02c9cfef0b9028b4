"""The shared networks: against torch's and torchvision's own layers, and as Pyro models."""

import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from pyrocurv.nn import bayesianize
from pyrocurv.nn.networks import GPT, MLP, LeNet5, ResidualBlock, ResNet, TransformerLayer

IMAGES = torch.linspace(-1, 1, 2 * 28 * 28).reshape(2, 1, 28, 28)
TOKENS = torch.arange(2 * 6).reshape(2, 6) % 5


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """By order, to a module with other names."""
    values = source.state_dict().values()
    target.load_state_dict(dict(zip(target.state_dict(), values, strict=True)))


@pytest.mark.parametrize(("net", "x", "shape", "weights"), [
    (LeNet5(), IMAGES, (2, 10), 61_706),
    (LeNet5(3, 7, padding=0), torch.zeros(2, 3, 32, 32), (2, 7), 61_751),
    (MLP(), IMAGES, (2, 10), 669_706),
    (MLP(8, [], 3), torch.zeros(2, 8), (2, 3), 27),
    (ResNet(), IMAGES, (2, 10), 77_754),
    (ResNet(3, 5, [8]), torch.zeros(2, 3, 32, 32), (2, 5), 1_461),
    (GPT(), TOKENS, (2, 6, 96), 429_664),
    (GPT(5, 6, width=8, heads=2, layers=1), TOKENS, (2, 6, 5), 1_021),
])
def test_sizes(net: nn.Module, x: Tensor, shape: tuple[int, ...], weights: int) -> None:
    assert net(x).shape == shape
    assert sum(parameter.numel() for parameter in net.parameters()) == weights


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 6, 2), (4, 4, 2)])
def test_a_residual_block_is_torchvisions(inputs: int, outputs: int, stride: int) -> None:
    block = ResidualBlock(inputs, outputs, stride)
    skip = block.skip if isinstance(block.skip, nn.Sequential) else None
    theirs = BasicBlock(inputs, outputs, stride, nn.Sequential(*skip) if skip else None)
    copy_weights(block, theirs)
    x = torch.randn(3, inputs, 7, 7)
    torch.testing.assert_close(block(x), theirs(x))


def test_a_transformer_layer_is_torchs() -> None:
    layer = TransformerLayer(8, 2)
    theirs = nn.TransformerEncoderLayer(
        8, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    parts = (layer.q, layer.k, layer.v)
    theirs.self_attn.load_state_dict({
        "in_proj_weight": torch.cat([part.weight for part in parts]),
        "in_proj_bias": torch.cat([part.bias for part in parts]),
        "out_proj.weight": layer.o.weight, "out_proj.bias": layer.o.bias,
    })
    for mine, other in (("norm1", "norm1"), ("norm2", "norm2"), ("up", "linear1"),
                        ("down", "linear2")):
        copy_weights(getattr(layer, mine), getattr(theirs, other))
    x = torch.randn(3, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    torch.testing.assert_close(layer(x), theirs(x, src_mask=mask, is_causal=True))


def test_a_gpt_does_not_see_the_future() -> None:
    net, later = GPT(5, 6, width=8, heads=2), TOKENS.clone()
    later[:, 3] = 4 - later[:, 3]
    before, after = net(TOKENS), net(later)
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert (before[:, 3:] - after[:, 3:]).abs().amax(-1).min() > 1e-4


def test_lenet_has_the_weights_of_its_layers_in_order() -> None:
    """One seed gives the same first weights as a network that is written out."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5), nn.Linear(400, 120), nn.Linear(120, 84),
              nn.Linear(84, 10)]
    torch.manual_seed(0)
    ours = LeNet5().parameters()
    expected = [parameter for layer in layers for parameter in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize(("net", "x"), [
    (LeNet5(), IMAGES), (MLP(), IMAGES), (ResNet(), IMAGES), (GPT(5, 6, 8, 2), TOKENS),
])
def test_they_are_bayesian_models(net: nn.Module, x: Tensor) -> None:
    trace = poutine.trace(bayesianize(net)).get_trace(x)
    sites = {name for name in trace.stochastic_nodes if name.endswith("weight")}
    expected = (nn.Linear, nn.Conv2d)
    assert sites >= {f"{n}.weight" for n, m in net.named_modules() if isinstance(m, expected)}


@pytest.mark.parametrize(("make", "message"), [
    (lambda: LeNet5(channels=0), "channels=0"),
    (lambda: LeNet5(padding=-1), "padding=-1"),
    (lambda: MLP(hidden=[5, 0]), r"hidden\[1\]=0"),
    (lambda: MLP(hidden=5), "hidden: a sequence"),
    (lambda: ResNet(widths=[]), "widths: at least one"),
    (lambda: ResNet(widths=[8, 2.5]), r"widths\[1\]=2.5"),
    (lambda: GPT(width=10, heads=4), "width=10: a multiple of heads=4"),
    (lambda: GPT(layers=0), "layers=0"),
])
def test_sizes_that_are_not_possible(make: type, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()
