"""Small models and data that several test files share. All float64."""

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrocurv.curvature import Curvature
from pyrocurv.guides import (
    BlockGuide,
    DiagonalGuide,
    EKFACGuide,
    FullGuide,
    KFACGuide,
    StructuredGuide,
)
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, Regressor, bayesianize

GUIDES: dict[str, type[StructuredGuide]] = {
    "diag": DiagonalGuide,
    "kfac": KFACGuide,
    "ekfac": EKFACGuide,
    "block": BlockGuide,
    "full": FullGuide,
}
EXACT = Curvature("ggn", every=1, batch=None, initial=0.0)
NUM_DATA = 30


def normal_prior(weight: float, bias: float) -> Callable[[nn.Module, str], dist.Distribution]:
    """Independent normals of mean 0, with a standard deviation for weights and one for biases."""

    def prior(module: nn.Module, name: str) -> dist.Distribution:
        like = getattr(module, name)
        scale = like.new_full((), weight if name == "weight" else bias)
        return dist.Normal(like.new_zeros(()), scale).expand(like.shape)

    return prior


def mlp(weight: float = 0.8, bias: float = 1.5, outputs: int = 2) -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    return bayesianize(net, normal_prior(weight, bias))


def regressor(noise: float | None = 0.3) -> Regressor:
    return Regressor(mlp(), NUM_DATA, noise=noise)


def classifier() -> Classifier:
    return Classifier(mlp(outputs=3), NUM_DATA)


def inputs(rows: int = NUM_DATA) -> Tensor:
    return torch.randn(rows, 3, dtype=torch.float64)


def regression_data(rows: int = NUM_DATA) -> tuple[Tensor, Tensor]:
    x = inputs(rows)
    return x, torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], 1) + 0.3 * torch.randn(rows, 2)


def class_data(rows: int = NUM_DATA) -> tuple[Tensor, Tensor]:
    x = inputs(rows)
    return x, x.argmax(1)


def trained(structure: str, steps: int = 4) -> tuple[NGVI, tuple[Tensor, Tensor]]:
    """A regression whose posterior is far from its start, with correlations."""
    data, model = regression_data(), regressor()
    ngvi = NGVI(model, GUIDES[structure](model), lr=0.3, curvature=EXACT)
    for _ in range(steps):
        ngvi.step(*data)
    return ngvi, data


def flat(samples: dict[str, Tensor], sites: dict[str, tuple[int, ...]]) -> Tensor:
    """{site: [n, *shape]} -> [n, P]."""
    return torch.cat([samples[name].flatten(1) for name in sites], 1)
