"""Every guide over a network in half precision: matrices are factorized in single precision."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor, nn
from toys import GUIDES

from pyrocurv.guides import FullGuide, StructuredGuide
from pyrocurv.infer import NGVI, Laplace, Predictive
from pyrocurv.nn import Classifier, Regressor, bayesianize

NUM_DATA = 30
both = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"]
)


def parts(dtype: torch.dtype) -> tuple[Classifier, Tensor, Tensor]:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    x = torch.randn(NUM_DATA, 3)
    return Classifier(bayesianize(net), NUM_DATA), x.to(dtype), x.argmax(1)


@both
@pytest.mark.parametrize("structure", GUIDES)
def test_training_and_reading(structure: str, dtype: torch.dtype) -> None:
    model, x, y = parts(dtype)
    guide = GUIDES[structure](model)
    ngvi = NGVI(model, guide)
    assert all(math.isfinite(ngvi.step(x, y)) for _ in range(2))
    samples = guide.sample_posterior(4)
    assert all(value.dtype == dtype and value.isfinite().all() for value in samples.values())
    read: list[Any] = [guide.kl(), guide.posterior.precision.dense(), guide.posterior.rsample()]
    read += [guide.posterior.log_prob(guide.posterior.loc), *guide.quantiles([0.1]).values()]
    assert all(value.isfinite().all() for value in read)
    assert Predictive(model, guide=guide, num_samples=3)(x)["obs"].shape[0] == 3
    assert math.isfinite(SVI(model, guide, ClippedAdam({"eps": 1e-3}), Trace_ELBO()).step(x, y))


@both
@pytest.mark.parametrize("structure", GUIDES)
def test_laplace(structure: str, dtype: torch.dtype) -> None:
    """Near the one of the same weights in double precision."""
    model, x, y = parts(dtype)
    guide = GUIDES[structure](model)
    found = Laplace(model, guide).fit([(x, y)])
    exact_model = parts(torch.float64)[0]
    exact_model.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    exact_guide = GUIDES[structure](exact_model, init_loc_fn=at(guide))
    exact = Laplace(exact_model, exact_guide).fit([(x.double(), y)])
    loose = {"rtol": 0, "atol": 0.05}
    for link in ("mc", "probit"):
        probs = found.predict(x, link=link).probs.double()
        torch.testing.assert_close(probs, exact.predict(x.double(), link=link).probs, **loose)
    evidence = exact.log_marginal_likelihood()
    assert found.log_marginal_likelihood() == pytest.approx(evidence, abs=0.5)
    assert all(value.isfinite().all() for value in found.tune_prior().values())


def at(guide: StructuredGuide) -> Callable[[Any], Tensor]:
    medians = guide.median()
    return lambda site: medians[site["name"]].double()


@both
def test_several_outputs_and_the_hessian(dtype: torch.dtype) -> None:
    net = nn.Linear(3, 2).to(dtype)
    model, x = Regressor(bayesianize(net), NUM_DATA, noise=0.5), torch.randn(NUM_DATA, 3).to(dtype)
    guide = FullGuide(model)
    found = Laplace(model, guide).fit([(x, x[:, :2])]).predict(x)
    assert found.covariance_matrix.dtype == torch.float32
    assert found.log_prob(found.mean).isfinite().all()
    ngvi = NGVI(model, FullGuide(model), curvature="hessian", num_particles=2)
    assert all(math.isfinite(ngvi.step(x, x[:, :2])) for _ in range(2))
