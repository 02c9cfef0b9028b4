"""Small models and data that several test files share. All float64."""

from collections.abc import Callable, Iterator
from typing import Any

import oracles
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
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
NATURAL: dict[str, Any] = {"update": "natural", "temperature": 1.0}  # the step of the equations
NUM_DATA = 30
NOISE = 0.3
PRIORS = {"equal": (0.7, 0.7), "unequal": (0.7, 1.9)}  # standard deviations of weight and bias


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
    ngvi = NGVI(model, GUIDES[structure](model), lr=0.3, curvature=EXACT, **NATURAL)
    for _ in range(steps):
        ngvi.step(*data)
    return ngvi, data


def flat(samples: dict[str, Tensor], sites: dict[str, tuple[int, ...]]) -> Tensor:
    """{site: [n, *shape]} -> [n, P]."""
    return torch.cat([samples[name].flatten(1) for name in sites], 1)


def exactly(model: Any, structure: str, **options: Any) -> NGVI:
    """An NGVI whose first step is a Newton step."""
    newton = {"curvature": EXACT, "lr": 1.0, "momentum": 0.0, "damping": 0.0, **NATURAL}
    return NGVI(model, GUIDES[structure](model), kl_clip=None, **{**newton, **options})


def linear(priors: str, num_data: int = NUM_DATA, columns: int = 3) -> Regressor:
    net = bayesianize(nn.Linear(columns, 2).double(), normal_prior(*PRIORS[priors]))
    return Regressor(net, num_data, noise=NOISE)


def truth(x: Tensor, y: Tensor, priors: str, noise: float = NOISE) -> tuple[Tensor, ...]:
    """Mean, covariance and log evidence of the exact posterior of `linear`."""
    weight, bias = PRIORS[priors]
    return oracles.linear_layer_posterior(x, y, noise, weight**-2, bias**-2)


def assert_posterior(guide: StructuredGuide, mean: Tensor, covariance: Tensor) -> None:
    posterior = guide.posterior
    torch.testing.assert_close(posterior.loc, mean, rtol=1e-10, atol=1e-10)
    found = torch.linalg.inv(posterior.precision.dense())
    torch.testing.assert_close(found, covariance, rtol=1e-10, atol=1e-10)


class Line(PyroModule):
    """y ~ N(W x + b, NOISE²), whose observed site is a function of the caller."""

    def __init__(self, observe: Callable[[Tensor, Tensor], Any], num_data: int = NUM_DATA) -> None:
        super().__init__()
        self.net = bayesianize(nn.Linear(3, 2).double(), normal_prior(*PRIORS["unequal"]))
        self.observe, self.num_data = observe, num_data

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.net(x)
        with pyro.plate("data", self.num_data, subsample_size=len(x)):
            self.observe(mean, y)
        return mean


def plain(mean: Tensor, y: Tensor | None, name: str = "obs", noise: float = NOISE) -> None:
    pyro.sample(name, dist.Normal(mean, noise).to_event(1), obs=y)


def norm_net() -> nn.Module:
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 2)
    return nn.Sequential(*layers).double()


def sigma_model() -> Regressor:
    return Regressor(bayesianize(norm_net(), normal_prior(0.5, 1.0)), NUM_DATA)


def leaves(value: Any) -> Iterator[Any]:
    """The items of nested dicts and lists; tensors are copied."""
    if isinstance(value, dict):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    else:
        yield value.clone() if isinstance(value, Tensor) else value


def everything(ngvi: NGVI) -> list[Any]:
    """Copies of all that a step may change."""
    store = {name: value.detach() for name, value in pyro.get_param_store().items()}
    parts = [ngvi.guide.state_dict(), ngvi.state_dict(), store]
    if isinstance(ngvi.model, nn.Module):
        parts.append(ngvi.model.state_dict())
    return list(leaves(parts))


def identical(a: list[Any], b: list[Any]) -> bool:
    """Bit for bit."""
    pairs = zip(a, b, strict=False)
    same = (torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)
    return len(a) == len(b) and all(same)
