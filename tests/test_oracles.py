"""The oracles against each other, where two different computations must agree."""

import math

import oracles
import pytest
import torch
from oracles import assert_same
from torch import nn
from torch.distributions import Categorical, MultivariateNormal, Poisson

LIKELIHOODS = ["categorical", "bernoulli", "normal"]


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    pairs = zip(widths[:-1], widths[1:], strict=True)
    layers = [module for pair in pairs for module in (nn.Linear(*pair), activation())]
    return nn.Sequential(*layers[:-1]).double()


def data(likelihood: str, inputs: tuple[int, ...], outputs: tuple[int, ...]):
    x = torch.randn(inputs, dtype=torch.float64)
    targets = {
        "categorical": torch.randint(outputs[-1], outputs[:-1]),
        "bernoulli": torch.rand(outputs, dtype=torch.float64).round(),
        "normal": torch.randn(outputs, dtype=torch.float64),
    }
    return x, targets[likelihood]


def test_jacobian_of_a_linear_layer_is_its_design_matrix() -> None:
    net = mlp(3, 2)
    x = torch.randn(4, 3, dtype=torch.float64)
    assert_same(oracles.jacobian(net, x).flatten(0, 1), oracles.linear_layer_design(x, 2))


def test_output_hessian_of_logits_is_diag_p_minus_pp_per_position() -> None:
    f, y = torch.randn(1, 2, 3, dtype=torch.float64), torch.tensor([[0, 2]])
    blocks = [torch.diag(p) - torch.outer(p, p) for p in f[0].softmax(-1)]
    assert_same(oracles.output_hessian("categorical", f, y), torch.block_diag(*blocks))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("lead", [(), (2,)], ids=["vectors", "sequences"])
def test_the_expected_empirical_fisher_is_the_ggn(likelihood: str, lead: tuple[int, ...]) -> None:
    net = mlp(2, 3, 2)
    x, y = data(likelihood, (3, *lead, 2), (3, *lead, 2))
    mean, _ = oracles.fisher_moments(net, x, likelihood)
    assert_same(mean, oracles.ggn(net, x, y, likelihood))


def test_gaussian_fourth_moments_equal_a_quadrature() -> None:
    """Three Gauss-Hermite nodes per output integrate polynomials of degree five exactly."""
    J = torch.randn(2, 4, dtype=torch.float64)
    nodes = torch.tensor([-math.sqrt(3), 0, math.sqrt(3)], dtype=torch.float64)
    weights = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
    u = torch.cartesian_prod(nodes, nodes) @ J
    p = torch.cartesian_prod(weights, weights).prod(1)
    products = u[:, :, None] * u[:, None, :]
    mean = torch.einsum("m,mij->ij", p, products)
    second = torch.einsum("m,mij->ij", p, products.square())
    actual_mean, actual_variance = oracles._gaussian_moments(J)
    assert_same(actual_mean, mean)
    assert_same(actual_variance, second - mean.square())


def test_enumerated_moments_equal_a_loop_over_the_targets() -> None:
    """For one example, the empirical Fisher at each label, weighted by its probability."""
    net = mlp(2, 3)
    x = torch.randn(1, 2, dtype=torch.float64)
    draws = [oracles.empirical(net, x, torch.tensor([label]), "categorical") for label in range(3)]
    p = net(x).detach().softmax(-1)[0]
    mean = torch.einsum("m,mij->ij", p, torch.stack(draws))
    second = torch.einsum("m,mij->ij", p, torch.stack(draws).square())
    actual_mean, actual_variance = oracles.fisher_moments(net, x, "categorical")
    assert_same(actual_mean, mean)
    assert_same(actual_variance, second - mean.square())


def test_a_callable_likelihood_is_as_good_as_a_name() -> None:
    net = mlp(2, 3, 3)
    x, y = data("categorical", (3, 2), (3, 3))
    named = oracles.fisher_moments(net, x, "categorical")
    called = oracles.fisher_moments(net, x, lambda f: Categorical(logits=f), torch.arange(3))
    for actual, expected in zip(called, named, strict=True):
        assert_same(actual, expected)


def test_poisson_moments_by_a_cut_support() -> None:
    """With rate exp(f) the Fisher information in f is the rate."""
    net = mlp(2, 2, 1)
    x = torch.randn(3, 2, dtype=torch.float64)
    support = torch.arange(60, dtype=torch.float64)
    mean, _ = oracles.fisher_moments(net, x, lambda f: Poisson(f.exp()), support)
    J = oracles.jacobian(net, x)
    assert_same(mean, torch.einsum("nd,ndp,ndq->pq", net(x).exp().detach(), J, J))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_hessian_is_the_ggn_for_a_linear_net(likelihood: str) -> None:
    net = mlp(3, 3)
    x, y = data(likelihood, (4, 3), (4, 3))
    args = net, x, y, likelihood
    assert_same(oracles.hessian(*args), oracles.ggn(*args))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_layer_blocks_of_the_hessian_are_those_of_the_ggn_for_relu(likelihood: str) -> None:
    net = mlp(3, 8, 8, 3, activation=nn.ReLU)
    x, y = data(likelihood, (4, 3), (4, 3))
    sizes = oracles.block_sizes(net)
    hessian, ggn = oracles.hessian(net, x, y, likelihood), oracles.ggn(net, x, y, likelihood)
    assert sizes == [32, 72, 27]
    assert_same(oracles.blocks(hessian, sizes), oracles.blocks(ggn, sizes))
    assert (hessian - ggn).norm() > 1e-3 * ggn.norm()


@pytest.mark.parametrize("oracle", [oracles.kfac_dense, oracles.ekfac_dense])
def test_kronecker_is_exact_for_a_deep_linear_net_with_squared_error(oracle) -> None:
    net = mlp(3, 4, 2, activation=nn.Identity)
    x, y = data("normal", (5, 3), (5, 2))
    block = oracles.blocks(oracles.ggn(net, x, y, "normal"), oracles.block_sizes(net))
    assert_same(oracle(net, x, y, "normal"), block)


@pytest.mark.parametrize("oracle", [oracles.kfac_dense, oracles.ekfac_dense])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("curvature", ["ggn", "empirical"])
def test_kronecker_is_exact_on_one_datum_at_one_position(oracle, likelihood, curvature) -> None:
    """The conv sees its whole padded image at once, so it too has one position."""
    conv = nn.Conv2d(2, 3, (2, 3), dilation=2, stride=3, padding=(0, 1), padding_mode="circular")
    net = nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3, 2)).double()
    x, y = data(likelihood, (1, 2, 3, 3), (1, 2))
    block = oracles.blocks(getattr(oracles, curvature)(net, x, y, likelihood), [39, 8])
    assert_same(oracle(net, x, y, likelihood, curvature), block)


@pytest.mark.parametrize("curvature", ["ggn", "empirical"])
def test_ekfac_keeps_the_trace_and_is_no_farther_than_kfac(curvature: str) -> None:
    conv = nn.Conv2d(1, 2, 2, stride=2, padding="valid", bias=False)
    net = nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 2)).double()
    args = net, *data("categorical", (4, 1, 4, 4), (4, 2)), "categorical"
    true = oracles.blocks(getattr(oracles, curvature)(*args), oracles.block_sizes(net))
    kfac, ekfac = oracles.kfac_dense(*args, curvature), oracles.ekfac_dense(*args, curvature)
    assert_same(ekfac.trace(), true.trace())
    assert (ekfac - true).norm() < (kfac - true).norm()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_hessian_through_the_outputs_is_that_in_the_weights(likelihood: str) -> None:
    """In every layer that runs once, at several positions too."""
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).double()
    args = net, *data(likelihood, (3, 1, 3, 3), (3, 2)), likelihood
    found = []
    for layer, (seen,) in oracles.layer_output_hessians(*args).items():
        order = oracles.parameter_order(2, seen[0][0].shape[-1], bias=True)
        found.append(oracles.output_block(seen)[order][:, order])
        assert seen[0][1].shape[0] == (4 if isinstance(layer, nn.Conv2d) else 1)
    true = oracles.blocks(oracles.hessian(*args), oracles.block_sizes(net))
    assert_same(torch.block_diag(*found), true)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_kronecker_hessians_are_exact_on_one_datum_and_the_ggn_s_for_relu(structure: str) -> None:
    oracle = getattr(oracles, f"hessian_{structure}_dense")
    tanh = mlp(3, 4, 3), *data("categorical", (1, 3), (1, 3)), "categorical"
    true = oracles.blocks(oracles.hessian(*tanh), oracles.block_sizes(tanh[0]))
    assert_same(oracle(*tanh), true)
    relu = mlp(3, 8, 3, activation=nn.ReLU), *data("categorical", (5, 3), (5, 3)), "categorical"
    assert_same(oracle(*relu), getattr(oracles, f"{structure}_dense")(*relu), rtol=1e-8)


def test_linear_posterior_and_evidence_of_the_joint_gaussian() -> None:
    """Conditioning the joint Gaussian of w and y gives mean and covariance, its margin log p(y)."""
    X, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    m0, p = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    mean, covariance, evidence = oracles.linear_posterior(X, y, 0.3, m0, p)
    S0 = torch.diag(1 / p)
    margin = X @ S0 @ X.T + 0.3**2 * torch.eye(6, dtype=torch.float64)
    gain = torch.linalg.solve(margin, X @ S0).T
    assert_same(mean, m0 + gain @ (y - X @ m0), rtol=1e-10)
    assert_same(covariance, S0 - gain @ X @ S0, rtol=1e-10)
    assert_same(evidence, MultivariateNormal(X @ m0, margin).log_prob(y), rtol=1e-10)


def test_linear_layer_posterior_is_one_regression_per_output() -> None:
    x, y = torch.randn(7, 2, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    mean, covariance, evidence = oracles.linear_layer_posterior(x, y, 0.5, 2.0, 0.1)
    X, m0 = torch.cat([x, torch.ones_like(x[:, :1])], 1), torch.zeros(3, dtype=torch.float64)
    p = torch.tensor([2.0, 2.0, 0.1], dtype=torch.float64)
    single = [oracles.linear_posterior(X, column, 0.5, m0, p) for column in y.T]
    order = oracles.parameter_order(3, 3, bias=True)
    assert_same(mean, torch.cat([m for m, _, _ in single])[order], rtol=1e-10)
    blocks = torch.block_diag(*[S for _, S, _ in single])
    assert_same(covariance, blocks[order][:, order], rtol=1e-10)
    assert_same(evidence, oracles.sum_of(e for _, _, e in single), rtol=1e-10)
