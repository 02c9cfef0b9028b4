"""Priors of blocks: packed, raised to powers, taken apart and cached; KL divergences from them."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyrocurv.guides.structured_normal import StructuredNormal
from pyrocurv.layers import Layer
from pyrocurv.layers.block import Block
from pyrocurv.layers.structure_spec import parse_structure
from pyrocurv.posterior.natural_gradient import sampled_kl
from pyrocurv.posterior.prior import (
    GaussianPrior,
    PriorCache,
    PriorSite,
    kl,
    kronecker_scaling,
    read_block_prior,
    read_prior,
)
from pyrocurv.structures import Dense

OUTPUTS, INPUTS = 3, 4  # bias included


def layer_block(structure: str = "kfac", bias: bool = True) -> Block:
    shape = OUTPUTS, INPUTS - bias
    layers = (Layer("weight", "bias" if bias else None, shape),)
    return Block(layers, parse_structure(structure))


def normal(loc: float | Tensor, scale: float | Tensor, *shape: int) -> dist.Distribution:
    loc, scale = (torch.as_tensor(v, dtype=torch.float64).expand(shape) for v in (loc, scale))
    return dist.Normal(loc, scale).to_event(len(shape))


def layer_prior(weight_scale: float | Tensor, bias_scale: float | Tensor) -> GaussianPrior:
    weight = normal(0.0, weight_scale, OUTPUTS, INPUTS - 1)
    return read_prior(layer_block(), {"weight": weight, "bias": normal(0.0, bias_scale, OUTPUTS)})


@pytest.mark.parametrize("structure", ["kfac", "diag", "full"])
def test_one_prior_for_all_weights_is_a_scalar(structure: str) -> None:
    sites = {
        "weight": normal(0.5, 0.1, OUTPUTS, INPUTS - 1),
        "bias": normal(0.5, 0.1, OUTPUTS),
    }
    prior = read_prior(layer_block(structure), sites)
    assert prior.loc.shape == prior.precision.shape == ()
    torch.testing.assert_close(prior.precision.item(), 100.0)
    assert prior.loc.item() == 0.5
    torch.testing.assert_close(prior.logdet(12).item(), 12 * math.log(100))


def test_priors_are_packed_as_the_weights_are() -> None:
    weight_loc, weight_scale = torch.randn(3, 3).double(), torch.rand(3, 3).double() + 0.5
    bias_loc, bias_scale = torch.randn(3).double(), torch.rand(3).double() + 0.5
    sites = {
        "weight": dist.Normal(weight_loc, weight_scale).to_event(2),
        "bias": dist.Normal(bias_loc, bias_scale).to_event(1),
    }
    prior = read_prior(layer_block(), sites)
    torch.testing.assert_close(prior.loc.view(3, 4), torch.cat([weight_loc, bias_loc[:, None]], 1))
    precision = torch.cat([weight_scale, bias_scale[:, None]], 1) ** -2
    torch.testing.assert_close(prior.precision.view(3, 4), precision)
    torch.testing.assert_close(prior.logdet(12), precision.log().sum())


# name: standard deviations of the weight [O, I-1] and of the bias [O]
PRODUCTS = {
    "weight and bias": (0.5, 2.0),
    "per input": (torch.tensor([[0.5, 1.0, 3.0]]), 2.0),
    "per output": (torch.tensor([[0.5], [1.0], [3.0]]), torch.tensor([0.5, 1.0, 3.0])),
    "both": (
        torch.outer(torch.tensor([0.5, 1.0, 3.0]), torch.tensor([1.0, 2.0, 5.0])),
        torch.tensor([0.5, 1.0, 3.0]) * 0.7,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_kronecker_scalings_are_exact_for_products(name: str) -> None:
    prior = layer_prior(*PRODUCTS[name])
    found = kronecker_scaling(layer_block(), prior)
    torch.testing.assert_close(found.delta * found.root.square(), prior.precision)
    torch.testing.assert_close(found.delta.log(), prior.precision.log().mean())


def test_the_scaling_of_one_number_have_no_roots() -> None:
    found = kronecker_scaling(layer_block(), layer_prior(0.5, 0.5))
    assert found.root is None and found.delta == 4


def test_a_prior_that_is_no_product_is_said_to_be_approximated() -> None:
    prior = layer_prior(torch.tensor([[1.0, 1, 1], [1, 1, 1], [1, 1, 5]]), 1.0)
    with pytest.warns(UserWarning, match="precision of 'weight' is not a product") as caught:
        found = kronecker_scaling(layer_block(), prior)
    assert len(caught) == 1
    torch.testing.assert_close(found.delta.log(), prior.precision.log().mean())


def test_a_cached_prior_holds_while_its_distributions_do() -> None:
    cache, block = PriorCache(), layer_block()
    weight, bias = PriorSite(normal(0.0, 0.5, 3, 3)), PriorSite(normal(0.0, 2.0, 3))
    sites = {"weight": weight, "bias": bias}
    prior = cache.read(block, sites)
    assert cache.read(block, dict(sites)) is prior and cache.sites == sites
    for other in (PriorSite(normal(0.0, 2.0, 3)), PriorSite(bias.fn, 0.5)):
        assert cache.read(block, {"weight": weight, "bias": other}) is not prior
        assert cache.sites["bias"] is other
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    trained = PriorSite(dist.Normal(torch.zeros(3).double(), scale).to_event(1))
    prior = cache.read(block, {**sites, "bias": trained})
    assert cache.read(block, {**sites, "bias": trained}) is not prior


@pytest.mark.parametrize("powers", [(2.5, 2.5), (0.5, 3.0), (1.0, 2.0)])
@pytest.mark.parametrize("scales", [(0.5, 0.5), (0.5, 2.0)])
def test_a_prior_to_a_power(powers: tuple[float, float], scales: tuple[float, float]) -> None:
    """log q - s log p, at a sample of q and in the mean."""
    fns = {"weight": normal(0.3, scales[0], 3, 3), "bias": normal(0.3, scales[1], 3)}
    sources = {name: PriorSite(fn, s) for (name, fn), s in zip(fns.items(), powers, strict=True)}
    block = layer_block("block")
    prior = read_block_prior(block, sources).gaussian
    plain = read_prior(block, fns)
    torch.testing.assert_close(prior.base.precision.expand(12), plain.precision.expand(12))
    root = torch.randn(12, 12, dtype=torch.float64)
    q = StructuredNormal(torch.randn(12).double(), Dense(root @ root.mT + torch.eye(12).double()))
    w = q.sample()
    sites = block.unpack(w)
    expected = q.log_prob(w) - sum(
        source.power * source.fn.log_prob(sites[name]) for name, source in sources.items()
    )
    deviation = w - q.loc
    square = deviation @ (q.precision @ deviation)
    found = sampled_kl([prior.distance(w)], [square], [q.precision], [prior])
    torch.testing.assert_close(found, expected)
    delta = prior.base.precision.expand(12)
    s = block.pack({n: torch.full(fns[n].event_shape, sources[n].power).double() for n in fns})
    second = (q.loc - 0.3).square() + q.variance
    cross = (s * (delta * second - delta.log() + math.log(2 * math.pi)) / 2).sum()
    torch.testing.assert_close(kl(q.loc, q.precision, prior), cross - q.entropy())


@pytest.mark.parametrize("scales", [(0.1, 0.1), (0.1, 0.5)])
def test_one_prior_for_each_tensor(scales: tuple[float, float]) -> None:
    """The distance is then a sum over norms."""
    block, prior = layer_block("diag"), layer_prior(*scales)
    by_tensor = prior.by_tensor(block)
    assert by_tensor is not None and prior.by_tensor(block) is not None
    torch.testing.assert_close(by_tensor, torch.tensor(scales, dtype=torch.float64) ** -2)
    weights = torch.randn(OUTPUTS * INPUTS, dtype=torch.float64)
    norms = torch.stack([x.norm() for x in block.views(weights).values()])
    torch.testing.assert_close(norms.square() @ by_tensor, prior.distance(weights))


def test_other_priors_are_not_of_tensors() -> None:
    unequal = layer_prior(torch.tensor([[0.1, 0.2, 0.3]]), 0.5)
    shifted = GaussianPrior(torch.tensor(0.5), torch.tensor(2.0))
    assert unequal.by_tensor(layer_block()) is None and shifted.by_tensor(layer_block()) is None


@pytest.mark.parametrize(("structure", "has_scaling"), [
    ("kfac", True), ("ekfac", True), ("diag", False), ("block", False), ("full", False),
])
def test_only_kronecker_blocks_have_a_scaling(structure: str, has_scaling: bool) -> None:
    fns = {"weight": normal(0.0, 0.5, 3, 3), "bias": normal(0.0, 2.0, 3)}
    prior = read_block_prior(layer_block(structure), {n: PriorSite(fn) for n, fn in fns.items()})
    assert (prior.scaling is not None) == has_scaling
