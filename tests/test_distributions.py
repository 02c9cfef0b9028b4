"""`StructuredNormal` against torch's dense normal, and what is read from the priors of a model."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, constraints, kl_divergence

from pyrocurv.guides.structured_normal import StructuredNormal
from pyrocurv.layers import Layer
from pyrocurv.layers.block import Block
from pyrocurv.layers.structure_spec import parse_structure
from pyrocurv.posterior.natural_gradient import sampled_kl
from pyrocurv.posterior.prior import BlockPrior, GaussianPrior, PriorSite, kl, read_prior, units
from pyrocurv.runtime.distributions import as_normal, compact, unwrap
from pyrocurv.structures import BlockDiagonal, Dense, Diagonal, KroneckerEigen, Rescaled, Structure

OUTPUTS, INPUTS = 3, 4  # bias included


def precision(name: str) -> Structure:
    root = torch.randn(5, 5, dtype=torch.float64)
    dense = Dense(root @ root.mT + torch.eye(5, dtype=torch.float64))
    bases = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in (3, 2))
    eigen = KroneckerEigen(*bases, torch.rand(3, 2, dtype=torch.float64) + 0.5)
    structures = {
        "Diagonal": Diagonal(torch.rand(5, dtype=torch.float64) + 0.5),
        "Dense": dense,
        "Rescaled": Rescaled(eigen, torch.rand(6, dtype=torch.float64) + 0.5),
        "BlockDiagonal": BlockDiagonal((dense, eigen), torch.randperm(11).split([5, 6])),
    }
    return structures[name]


STRUCTURES = ["Diagonal", "Dense", "Rescaled", "BlockDiagonal"]
every_structure = pytest.mark.parametrize("name", STRUCTURES)


def normals(name: str) -> tuple[StructuredNormal, MultivariateNormal]:
    """The same normal, ours and torch's."""
    matrix = precision(name)
    loc = torch.randn(matrix.size, dtype=torch.float64)
    return StructuredNormal(loc, matrix), MultivariateNormal(loc, precision_matrix=matrix.dense())


@every_structure
def test_density_and_entropy(name: str) -> None:
    ours, dense = normals(name)
    x = torch.randn(2, 3, len(ours.loc), dtype=torch.float64)
    torch.testing.assert_close(ours.log_prob(x), dense.log_prob(x))
    torch.testing.assert_close(ours.log_prob(x[0, 0]), dense.log_prob(x[0, 0]))
    torch.testing.assert_close(ours.entropy(), dense.entropy())
    torch.testing.assert_close(ours.mean, dense.mean)
    torch.testing.assert_close(ours.variance, dense.variance)


@every_structure
@pytest.mark.parametrize("scalar", [False, True])
def test_kl(name: str, scalar: bool) -> None:
    ours, dense = normals(name)
    shape = () if scalar else (len(ours.loc),)
    loc = torch.randn(shape, dtype=torch.float64)
    delta = torch.rand(shape, dtype=torch.float64) + 0.5
    prior = MultivariateNormal(loc.expand_as(ours.loc), torch.diag(1 / delta.expand_as(ours.loc)))
    torch.testing.assert_close(ours.kl(loc, delta), kl_divergence(dense, prior))


def test_kl_of_a_normal_to_itself_is_zero() -> None:
    entries = torch.tensor([0.5, 4.0], dtype=torch.float64)
    loc = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert abs(StructuredNormal(loc, Diagonal(entries)).kl(loc, entries)) < 1e-14


@every_structure
def test_samples_have_the_mean_and_the_covariance(name: str) -> None:
    ours, dense = normals(name)
    draws, covariance = 20_000, dense.covariance_matrix
    x = ours.sample((draws,))
    assert x.shape == (draws, len(ours.loc)) and ours.sample().shape == ours.loc.shape
    assert within(x.mean(0), ours.loc, (covariance.diag() / draws).sqrt())
    variances = torch.outer(covariance.diag(), covariance.diag())
    error = ((variances + covariance.square()) / draws).sqrt()  # of an entry, by Isserlis
    assert within(x.mT.cov(), covariance, error)


def within(estimate: Tensor, truth: Tensor, standard_error: Tensor) -> bool:
    """No entry farther than 5 standard errors: less than one in a million for each."""
    return bool(((estimate - truth).abs() < 5 * standard_error).all())


def test_gradients_reach_location_and_structure() -> None:
    loc = torch.zeros(2, requires_grad=True)
    entries = torch.ones(2, requires_grad=True)
    StructuredNormal(loc, Diagonal(entries)).rsample((3,)).square().sum().backward()
    assert loc.grad is not None and entries.grad is not None


@pytest.mark.parametrize("shape", [(3,), (1, 2), ()])
def test_a_location_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not fit a precision of 2"):
        StructuredNormal(torch.zeros(shape), Diagonal(torch.ones(2)))


def test_validation_knows_the_shape_of_a_value() -> None:
    normal = StructuredNormal(torch.zeros(2), Diagonal(torch.ones(2)), validate_args=True)
    assert normal.batch_shape == () and normal.event_shape == (2,)
    assert normal.has_rsample and normal.support.event_dim == 1


# ---- priors -------------------------------------------------------------------------------------


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
def test_units_are_exact_for_products(name: str) -> None:
    prior = layer_prior(*PRODUCTS[name])
    found = units(layer_block(), prior)
    torch.testing.assert_close(found.delta * found.root.square(), prior.precision)
    torch.testing.assert_close(found.delta.log(), prior.precision.log().mean())


def test_units_of_one_number_have_no_roots() -> None:
    found = units(layer_block(), layer_prior(0.5, 0.5))
    assert found.root is None and found.delta == 4


def test_a_prior_that_is_no_product_is_said_to_be_approximated() -> None:
    prior = layer_prior(torch.tensor([[1.0, 1, 1], [1, 1, 1], [1, 1, 5]]), 1.0)
    with pytest.warns(UserWarning, match="precision of 'weight' is no product") as caught:
        found = units(layer_block(), prior)
    assert len(caught) == 1
    torch.testing.assert_close(found.delta.log(), prior.precision.log().mean())


def test_a_block_prior_holds_while_its_distributions_do() -> None:
    weight, bias = PriorSite(normal(0.0, 0.5, 3, 3)), PriorSite(normal(0.0, 2.0, 3))
    fixed = {"weight": weight, "bias": bias}
    prior = BlockPrior.read(layer_block(), fixed)
    assert prior.still_holds(dict(fixed))
    assert not prior.still_holds({"weight": weight, "bias": PriorSite(normal(0.0, 2.0, 3))})
    assert not prior.still_holds({"weight": weight, "bias": PriorSite(bias.fn, 0.5)})
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    trained = PriorSite(dist.Normal(torch.zeros(3).double(), scale).to_event(1))
    prior = BlockPrior.read(layer_block(), {**fixed, "bias": trained})
    assert not prior.still_holds({**fixed, "bias": trained})


@pytest.mark.parametrize("powers", [(2.5, 2.5), (0.5, 3.0), (1.0, 2.0)])
@pytest.mark.parametrize("scales", [(0.5, 0.5), (0.5, 2.0)])
def test_a_prior_to_a_power(powers: tuple[float, float], scales: tuple[float, float]) -> None:
    """log q - s log p, at a sample of q and in the mean."""
    fns = {"weight": normal(0.3, scales[0], 3, 3), "bias": normal(0.3, scales[1], 3)}
    sources = {name: PriorSite(fn, s) for (name, fn), s in zip(fns.items(), powers, strict=True)}
    block = layer_block("block")
    prior = BlockPrior.read(block, sources).packed
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


@pytest.mark.parametrize(("structure", "taken_apart"), [
    ("kfac", True), ("ekfac", True), ("diag", False), ("block", False), ("full", False),
])
def test_only_kronecker_blocks_have_units(structure: str, taken_apart: bool) -> None:
    fns = {"weight": normal(0.0, 0.5, 3, 3), "bias": normal(0.0, 2.0, 3)}
    prior = BlockPrior.read(layer_block(structure), {n: PriorSite(fn) for n, fn in fns.items()})
    assert (prior.units is not None) == taken_apart


def test_as_normal() -> None:
    inner = dist.Normal(torch.zeros(2, 3), 1.0)
    assert as_normal(inner) is inner
    assert as_normal(inner.to_event(1).to_event(1)) is inner
    assert as_normal(dist.Laplace(0.0, 1.0)) is None
    assert as_normal(dist.Laplace(torch.zeros(3), 1.0).to_event(1)) is None


def test_compact() -> None:
    assert compact(torch.tensor(2.0).expand(3, 4)).shape == ()
    assert compact(torch.full((1, 1), 2.0)).shape == ()
    full = torch.full((3,), 2.0)
    assert compact(full) is full
    column = torch.rand(3, 1).expand(3, 4)
    assert compact(column) is column


def test_unwrap() -> None:
    normal = dist.Normal(torch.zeros(2, 3), 1.0)
    assert unwrap(normal) is normal
    assert unwrap(normal.to_event(1).to_event(1)) is normal
    masked = normal.to_event(1).mask(torch.tensor([True, False])).to_event(1)
    assert unwrap(masked) is masked.base_dist and as_normal(masked) is None
    assert unwrap(masked, masks=True) is normal
    assert unwrap(dist.LogNormal(0.0, 1.0), masks=True).support == constraints.positive
