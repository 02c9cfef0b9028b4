"""`StructuredNormal` against torch's dense normal."""


import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyrocurv.guides.structured_normal import StructuredNormal
from pyrocurv.layers import Layer
from pyrocurv.layers.block import Block
from pyrocurv.layers.structure_spec import parse_structure
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
