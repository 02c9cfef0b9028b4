"""VIOptimizer with the posterior of an earlier task as its prior."""

import copy
import pickle
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import GUIDES, NATURAL, class_data, mlp

from pyrocurv.curvature import Curvature
from pyrocurv.guides import KFACGuide, MixtureGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer

HALF, PRECISION = 15, 2.0
EXACT: dict[str, Any] = {
    "lr": 1.0, "momentum": 0.0, "damping": 0.0, "kl_clip": None, "likelihood": "normal",
    "curvature": Curvature("ggn", every=1, batch=None, initial=0.0),
    "prior_precision": PRECISION, **NATURAL,
}
CORRELATED = ["kfac", "ekfac", "block", "full"]

pytestmark = pytest.mark.usefixtures("double")


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def half_squares(output: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(output, y) / 2


def step(optimizer: VIOptimizer, x: Tensor, y: Tensor, loss: Any = half_squares) -> None:
    optimizer.zero_grad()
    with optimizer.sampled_params():
        loss(optimizer.net(x), y).backward()
    optimizer.step()


def flat(optimizer: VIOptimizer) -> tuple[Tensor, Tensor]:
    """Mean and precision, of a linear layer with one output."""
    (part,) = optimizer.weight_gaussians()
    return part.loc, part.precision.dense()


@pytest.mark.parametrize("structure", CORRELATED)
def test_two_halves_in_sequence_are_all_data_at_once(structure: str) -> None:
    x, y, net = torch.randn(2 * HALF, 3), torch.randn(2 * HALF, 1), nn.Linear(3, 1)
    prior = None
    for rows in (slice(HALF), slice(HALF, None)):
        optimizer = VIOptimizer(net, HALF, structure=structure, prior=prior, **EXACT)
        step(optimizer, x[rows], y[rows])
        prior = optimizer
    mean, covariance, _ = oracles.linear_layer_posterior(x, y, 1.0, PRECISION, PRECISION)
    loc, precision = flat(optimizer)
    torch.testing.assert_close(loc, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.linalg.inv(precision), covariance, rtol=1e-10, atol=1e-10)
    assert len(optimizer.prior_errors()) == 1
    samples = optimizer.predict(x, num_samples=3)
    assert samples.shape == (3, 2 * HALF, 1)


@pytest.mark.parametrize("structure", GUIDES)
def test_steps_are_those_of_ngvi(structure: str) -> None:
    """From a guide, from its posterior, and from an optimizer of the same posterior."""
    x, y = class_data()
    first = VIOptimizer(classifier(), len(x), structure=structure, kl_clip=None)
    for _ in range(3):
        step(first, x, y, F.cross_entropy)
    start = copy.deepcopy(first.net)
    model = Classifier(bayesianize(copy.deepcopy(start), first), len(x))
    torch.manual_seed(1)
    guide = GUIDES[structure](model)
    ngvi = NGVI(model, guide, temperature=0.5)
    torch.manual_seed(1)
    second = VIOptimizer(start, len(x), structure=structure, temperature=0.5, prior=first)
    for _ in range(4):
        step(second, x, y, F.cross_entropy)
        ngvi.step(x, y)
    for name, p in second.net.named_parameters():
        torch.testing.assert_close(p.detach(), guide.median()[f"net.{name}"])
    torch.testing.assert_close(second.kl(), guide.kl().detach())
    errors = (second.prior_errors(), ngvi.prior_errors())
    assert [*errors[0].values()] == pytest.approx([*errors[1].values()], abs=1e-7)
    for prior in (guide, guide.posterior):
        third = VIOptimizer(copy.deepcopy(second.net), len(x), structure=structure, prior=prior)
        step(third, x, y, F.cross_entropy)
        assert float(third.kl()) > 0


def test_weights_without_a_posterior_keep_the_precision() -> None:
    """As in a guide of the last layer."""
    x, y = class_data()
    model = Classifier(mlp(outputs=3), len(x))
    guide = KFACGuide(model, structure={"net.0": "frozen"})
    NGVI(model, guide).step(x, y)
    optimizer = VIOptimizer(classifier(), len(x), prior_precision=7.0, prior=guide)
    step(optimizer, x, y, F.cross_entropy)
    first, last = (state.prior.gaussian for state in optimizer._posterior.blocks)
    assert float(first.diagonal) == pytest.approx(7.0)
    torch.testing.assert_close(
        last.precision.dense(), guide.blocks[0].precision().dense(), rtol=1e-12, atol=0
    )


def test_saving_and_copying() -> None:
    x, y = class_data()
    first = VIOptimizer(classifier(), len(x))
    step(first, x, y, F.cross_entropy)
    second = VIOptimizer(classifier(), len(x), prior=first)
    for _ in range(2):
        step(second, x, y, F.cross_entropy)
    pickled = pickle.loads(pickle.dumps(second))
    resumed = VIOptimizer(copy.deepcopy(second.net), len(x), prior=first)
    resumed.load_state_dict(second.state_dict())
    for optimizer in (second, pickled, resumed):
        for _ in range(2):
            step(optimizer, x, y, F.cross_entropy)
    for other in (pickled, resumed):
        for p, q in zip(second.net.parameters(), other.net.parameters(), strict=True):
            assert torch.equal(p, q)


def test_priors_that_are_refused() -> None:
    x, y = class_data()
    first = VIOptimizer(classifier(), len(x))
    with pytest.raises(RuntimeError, match="the VIOptimizer has not taken a step"):
        VIOptimizer(classifier(), len(x), prior=first)
    step(first, x, y, F.cross_entropy)
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(4, 3\); '0.weight' has shape"):
        VIOptimizer(nn.Sequential(nn.Linear(3, 5)), len(x), prior=first)
    with pytest.raises(ValueError, match="another network.* 0.weight .*none of them is the same"):
        VIOptimizer(nn.ModuleDict({"a": nn.Linear(3, 4)}), len(x), prior=first)
    with pytest.raises(TypeError, match=r"prior=0\.1: a trained guide.* prior_precision="):
        VIOptimizer(classifier(), len(x), prior=0.1)
    model = Classifier(mlp(outputs=3), len(x))
    guide = KFACGuide(model)
    guide(x, y)
    with pytest.raises(TypeError, match="got MixtureGuide"):
        VIOptimizer(classifier(), len(x), prior=MixtureGuide([guide]))
    net = classifier()
    with pytest.raises(TypeError, match="a trained guide, its posterior or a VIOptimizer"):
        VIOptimizer(net, len(x), prior=SecondOrderOptimizer(net))
