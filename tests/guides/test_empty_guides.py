"""Priors that leave a guide without a Gaussian: they are named, and the advice helps."""

from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrocurv.curvature import Curvature
from pyrocurv.guides import DiagonalGuide, FullGuide, KFACGuide
from pyrocurv.infer import NGVI, Laplace
from pyrocurv.nn import Regressor, bayesianize

N = 12


def multivariate(like: Tensor) -> Distribution:
    size = like.shape[-1]
    covariance = 0.3 + 0.7 * torch.eye(size)
    return dist.MultivariateNormal(torch.zeros(size), covariance).expand(like.shape[:-1])


def mixture(like: Tensor) -> Distribution:
    """The scale mixture of Blundell et al. 2015."""
    scales = torch.tensor([0.1, 1.0]).expand(*like.shape, 2)
    components = dist.Normal(torch.zeros_like(scales), scales)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones_like(scales)), components)


PRIORS: dict[str, Callable[[Tensor], Distribution]] = {
    "MultivariateNormal": multivariate,
    "Laplace": lambda like: dist.Laplace(torch.zeros_like(like), 1.0),
    "StudentT": lambda like: dist.StudentT(3.0, torch.zeros_like(like), 1.0),
    "Cauchy": lambda like: dist.Cauchy(torch.zeros_like(like), 1.0),
    "MixtureSameFamily": mixture,
    "MaskedDistribution": lambda like: dist.Normal(torch.zeros_like(like), 1.0).mask(like > 0),
}


def model_of(name: str) -> Regressor:
    def prior(module: nn.Module, parameter: str) -> Distribution:
        return PRIORS[name](getattr(module, parameter).detach())

    return Regressor(bayesianize(nn.Linear(3, 2), prior), N, noise=0.5)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 3), torch.randn(N, 2)


pytestmark = pytest.mark.filterwarnings("ignore:.*left to the fallback")


@pytest.mark.parametrize("name", PRIORS)
def test_the_prior_is_named(name: str) -> None:
    model, batch = model_of(name), data()
    reason = rf"fallback guide has net.weight, net.bias \(a {name} prior\).* normal priors"
    with pytest.raises(ValueError, match=reason):
        NGVI(model, KFACGuide(model)).step(*batch)
    with pytest.raises(ValueError, match=reason):
        Laplace(model, KFACGuide(model)).fit([batch])
    guide = KFACGuide(model)
    guide(*batch)
    with pytest.raises(RuntimeError, match=reason):
        guide.posterior  # noqa: B018


@pytest.mark.parametrize("name", sorted(PRIORS.keys() - {"MaskedDistribution"}))
def test_the_advice_helps(name: str) -> None:
    model, batch = model_of(name), data()
    guide = FullGuide(model)
    ngvi = NGVI(model, guide, curvature="hessian")
    losses = [ngvi.step(*batch) for _ in range(6)]
    assert set(guide.sites) == {"net.weight", "net.bias"} and losses[-1] < losses[0]


def test_the_advice_is_not_what_the_user_does_already() -> None:
    """Each of these programs has followed a part of it."""
    model, batch = model_of("Laplace"), data()
    plain = "in NGVI with curvature='hessian' and no other setting of Curvature"
    for guide, curvature, advice in (
        (DiagonalGuide(model), "hessian", "FullGuide(model) has one Gaussian"),
        (FullGuide(model), Curvature("hessian", every=5), plain),
        (FullGuide(model, structure={nn.Linear: "block"}), "hessian", "without structure=,"),
    ):
        with pytest.raises(ValueError) as caught:
            NGVI(model, guide, curvature=curvature).step(*batch)
        assert advice in str(caught.value)
