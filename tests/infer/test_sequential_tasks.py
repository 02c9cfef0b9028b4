"""The posterior of one task as the prior of the next, in sequence and all at once."""

import copy
import io
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from toys import (
    GUIDES,
    NOISE,
    NUM_DATA,
    PRIORS,
    assert_posterior,
    class_data,
    exactly,
    linear,
    mlp,
    normal_prior,
    regression_data,
    trained,
    truth,
)

from pyrocurv.curvature import Curvature
from pyrocurv.guides import DiagonalGuide, FullGuide, KFACGuide, MixtureGuide, StructuredGuide
from pyrocurv.guides.structured_normal import StructuredNormal
from pyrocurv.infer import NGVI, Laplace
from pyrocurv.nn import Classifier, Regressor, bayesianize, rescale_prior
from pyrocurv.nn.posterior_prior import CorrelatedNormal
from pyrocurv.structures import Diagonal

HALF = NUM_DATA // 2
CORRELATED = ["kfac", "ekfac", "block", "full"]
each_correlated = pytest.mark.parametrize("structure", CORRELATED)


def next_task(prior: Any, num_data: int = HALF) -> Regressor:
    """The model of `toys.linear` with a posterior as its prior."""
    return Regressor(bayesianize(nn.Linear(3, 2).double(), prior), num_data, noise=NOISE)


def first_task(structure: str, priors: str, x: Tensor, y: Tensor) -> NGVI:
    ngvi = exactly(linear(priors, HALF), structure)
    ngvi.step(x, y)
    return ngvi


# ---- exact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("priors", PRIORS)
@each_correlated
def test_two_halves_in_sequence_are_all_data_at_once(structure: str, priors: str) -> None:
    """Posterior and evidence; the evidence of all data is the product of both tasks'."""
    x, y = regression_data()
    mean, covariance, evidence = truth(x, y, priors)
    first = first_task(structure, priors, x[:HALF], y[:HALF])
    for prior in (first.guide, first.guide.posterior):
        second = exactly(next_task(prior), structure)
        second.step(x[HALF:], y[HALF:])
        assert_posterior(second.guide, mean, covariance)
        assert all(error < 1e-6 for error in second.prior_errors().values())
    total = first.evaluate_loss(x[:HALF], y[:HALF]) + second.evaluate_loss(x[HALF:], y[HALF:])
    assert -total == pytest.approx(float(evidence), rel=1e-10)


def test_independent_weights_on_an_orthogonal_design() -> None:
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    x, y = torch.cartesian_prod(signs, signs, signs), torch.randn(16, 2, dtype=torch.float64)
    mean, covariance, _ = truth(torch.cat([x, x]), y, "unequal")
    first = exactly(linear("unequal", 8), "diag")
    first.step(x, y[:8])
    second = exactly(next_task(first.guide, 8), "diag")
    second.step(x, y[8:])
    assert_posterior(second.guide, mean, covariance)
    assert second.prior_errors() == {}, "plain normals"


@pytest.mark.parametrize("structure", ["kfac", "full"])
def test_the_joint_gaussian_of_all_latents(structure: str) -> None:
    """The log joint has the prior's density; the Hessian finds it."""
    x, y = regression_data()
    mean, covariance, _ = truth(x, y, "unequal")
    model = next_task(first_task(structure, "unequal", x[:HALF], y[:HALF]).guide)
    second = NGVI(
        model, FullGuide(model), curvature=Curvature("hessian", decay=0.0), lr=1.0,
        num_particles=2, average=False,
    )
    for _ in range(40):
        second.step(x[HALF:], y[HALF:])
    assert_posterior(second.guide, mean, covariance)


def test_the_posterior_of_a_joint_gaussian() -> None:
    """The noise scale, which is not in the network, is integrated out."""
    x, y = regression_data()
    model = Regressor(bayesianize(nn.Linear(3, 2).double()), HALF)
    ngvi = NGVI(model, FullGuide(model), curvature="hessian")
    for _ in range(5):
        ngvi.step(x[:HALF], y[:HALF])
    assert set(ngvi.guide.sites) == {"net.weight", "net.bias", "sigma"}
    second = exactly(next_task(ngvi.guide), "full")
    second.step(x[HALF:], y[HALF:])
    posterior = ngvi.guide.posterior  # sites in the order of the model: the weights come first
    inside = torch.linalg.inv(posterior.precision.dense())[:8, :8]
    precision = torch.linalg.inv(inside) + likelihood_precision(x[HALF:])
    torch.testing.assert_close(second.guide.posterior.precision.dense(), precision)


def likelihood_precision(x: Tensor) -> Tensor:
    """Σ xxᵀ / NOISE² over weight [2, 3] and bias [2]."""
    x = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    full = torch.kron(torch.eye(2).double(), x.mT @ x / NOISE**2)
    order = torch.tensor([0, 1, 2, 4, 5, 6, 3, 7])
    return full[order][:, order]


@each_correlated
def test_laplace_approximations_in_sequence(structure: str) -> None:
    x, y = regression_data()
    mean, covariance, evidence = truth(x, y, "equal")
    model, total = linear("equal", HALF), 0.0
    for rows in (slice(HALF), slice(HALF, None)):
        ngvi = exactly(model, structure, num_particles=0)
        ngvi.step(x[rows], y[rows])
        laplace = Laplace(model, ngvi.guide).fit([(x[rows], y[rows])])
        total += laplace.log_marginal_likelihood()
        model = next_task(ngvi.guide)
    assert_posterior(ngvi.guide, mean, covariance)
    assert total == pytest.approx(float(evidence), rel=1e-10)
    with pytest.raises(ValueError, match="tune_prior: the prior of net is the posterior of an"):
        laplace.tune_prior()


# ---- the model that has the prior ---------------------------------------------------------------


def mlp_module() -> nn.Module:
    """The network of `toys.mlp`."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def normal_of(guide: StructuredGuide) -> dist.MultivariateNormal:
    posterior = guide.posterior
    return dist.MultivariateNormal(posterior.loc, precision_matrix=posterior.precision.dense())


def flatten(values: Any, names: Any) -> Tensor:
    return torch.cat([values[name].flatten() for name in names])


@each_correlated
def test_the_model_has_the_density_and_the_kl_of_the_prior(structure: str) -> None:
    """In a network of two layers, which one matrix or one for each layer correlates."""
    ngvi, data = trained(structure)
    prior = normal_of(ngvi.guide)
    model = Regressor(bayesianize(mlp_module(), ngvi.guide), NUM_DATA, noise=0.4)
    second = NGVI(model, GUIDES[structure](model), lr=0.1)
    for _ in range(3):
        second.step(*data)
    guide_trace = poutine.trace(second.guide).get_trace(*data)
    trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*data)
    values = {name: trace.nodes[name]["value"] for name in second.guide.sites}
    found = sum(trace.nodes[name]["fn"].log_prob(value) for name, value in values.items())
    torch.testing.assert_close(found, prior.log_prob(flatten(values, values)))
    exact = torch.distributions.kl_divergence(normal_of(second.guide), prior)
    torch.testing.assert_close(second.guide.kl(), exact)


def test_a_scaled_prior_is_a_power_of_the_density() -> None:
    x, y = regression_data()
    first = first_task("kfac", "unequal", x[:HALF], y[:HALF])
    model = next_task(first.guide)
    scaled = poutine.scale(model.net, 0.5)

    def half(x: Tensor, y: Tensor | None = None) -> None:
        mean = scaled(x)
        with pyro.plate("data", HALF):
            pyro.sample("obs", dist.Normal(mean, NOISE).to_event(1), obs=y)

    second = exactly(half, "kfac")
    second.step(x[HALF:], y[HALF:])
    prior = normal_of(first.guide).precision_matrix / 2
    expected = prior + likelihood_precision(x[HALF:])
    torch.testing.assert_close(second.guide.posterior.precision.dense(), expected)
    elbo = -Trace_ELBO().loss(half, second.guide, x[HALF:], y[HALF:])
    assert -second.evaluate_loss(x[HALF:], y[HALF:]) == pytest.approx(elbo, rel=1e-10)


@pytest.mark.parametrize("is_conditioned", [False, True])
def test_the_weights_are_sampled_from_the_prior(is_conditioned: bool) -> None:
    """Mean and covariance within 4.5 standard errors; given the weight those of the bias."""
    x, y = regression_data()
    guide = first_task("kfac", "unequal", x[:3], y[:3]).guide
    (part,), prior, like = guide.weight_gaussians(), normal_of(guide), torch.zeros(()).double()
    part = part.renamed({"net.weight": "weight", "net.bias": "bias"})
    mean, covariance, count, draws = prior.loc, prior.covariance_matrix, 250, []
    for _ in range(count):
        weight = CorrelatedNormal.of(part, "weight", like).sample()
        if is_conditioned:
            weight = mean[:6].view(2, 3) + 0.5
        bias = CorrelatedNormal.of(part, "bias", like, {"weight": weight}).sample()
        draws.append(torch.cat([weight.flatten(), bias]))
    if is_conditioned:
        gain = covariance[6:, :6] @ torch.linalg.inv(covariance[:6, :6])
        mean = mean[6:] + gain @ torch.full((6,), 0.5).double()
        covariance = covariance[6:, 6:] - gain @ covariance[:6, 6:]
    found, variance = torch.stack(draws)[:, -len(mean):], covariance.diag()
    assert ((found.mean(0) - mean).abs() < 4.5 * (variance / count).sqrt()).all()
    errors = ((covariance.square() + variance[:, None] * variance) / count).sqrt()
    assert ((found.T.cov() - covariance).abs() < 4.5 * errors).all()


def test_a_weight_knows_those_that_the_run_has_sampled() -> None:
    x, y = regression_data()
    net = bayesianize(nn.Linear(3, 2).double(), first_task("kfac", "equal", x[:3], y[:3]).guide)
    nodes = poutine.trace(net).get_trace(x).nodes
    fns = {name: nodes[name]["fn"].base_dist for name in ("weight", "bias")}
    assert fns["weight"].sampled == {} and set(fns["bias"].sampled) == {"weight"}
    assert fns["bias"].sampled["weight"] is nodes["weight"]["value"]
    assert net.weight.shape == fns["weight"].sample((4, 2)).shape[2:] == (2, 3)
    with pytest.raises(ValueError, match="'weight' is correlated .* cannot be in a plate"):
        fns["weight"].expand((5, 2, 3))


def test_guides_start_at_the_mean_and_the_prior_replaces_another() -> None:
    """The network of the first task goes on; normal priors of other tasks are forgotten."""
    x, y = regression_data()
    model = linear("equal", HALF)
    first = exactly(model, "full")
    first.step(x[:HALF], y[:HALF])
    mean, covariance, _ = truth(x, y, "equal")
    assert bayesianize(model.net, first.guide) is model.net
    assert not rescale_prior(model, "net.weight", torch.tensor(2.0))
    guide = FullGuide(model)
    guide(x[HALF:], y[HALF:])
    torch.testing.assert_close(guide.posterior.loc, first.guide.posterior.loc)
    second = exactly(model, "full")
    second.step(x[HALF:], y[HALF:])
    assert_posterior(second.guide, mean, covariance)
    bayesianize(model.net, trained_diagonal(model, x, y))
    assert rescale_prior(model, "net.weight", torch.tensor(2.0)), "normal priors again"


def trained_diagonal(model: Regressor, x: Tensor, y: Tensor) -> StructuredGuide:
    ngvi = exactly(model, "diag")
    ngvi.step(x[:HALF], y[:HALF])
    return ngvi.guide


def test_copies_pickles_and_other_dtypes() -> None:
    x, y = regression_data()
    guide = first_task("kfac", "unequal", x[:HALF], y[:HALF]).guide
    model = next_task(guide)
    expected = exactly(model, "kfac")
    expected.step(x[HALF:], y[HALF:])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        second = exactly(other, "kfac")
        second.step(x[HALF:], y[HALF:])
        torch.testing.assert_close(
            second.guide.posterior.precision.dense(), expected.guide.posterior.precision.dense()
        )
    third = exactly(model.float(), "kfac")
    third.step(x[HALF:].float(), y[HALF:].float())
    torch.testing.assert_close(
        third.guide.posterior.precision.dense(),
        expected.guide.posterior.precision.dense().float(), rtol=1e-4, atol=1e-3,
    )


def test_a_run_continues_from_its_state() -> None:
    """The prior is in the state with the posterior, in plain values."""
    ngvi, data = trained("kfac")
    runs = []
    for _ in range(2):
        model = Regressor(bayesianize(mlp_module(), ngvi.guide), NUM_DATA, noise=0.4)
        runs.append(NGVI(model, KFACGuide(model), lr=0.1))
    first, second = runs
    for _ in range(3):
        first.step(*data)
    file = io.BytesIO()
    torch.save([first.guide.state_dict(), first.state_dict()], file)
    file.seek(0)
    guide_state, state = torch.load(file, weights_only=True)
    second.guide.load_state_dict(guide_state)
    second.load_state_dict(state)
    assert [first.step(*data) for _ in range(3)] == [second.step(*data) for _ in range(3)]


def test_later_training_of_the_guide_does_not_change_the_prior() -> None:
    ngvi, data = trained("kfac")
    model = Regressor(bayesianize(mlp_module(), ngvi.guide), NUM_DATA, noise=0.4)
    before = ngvi.guide.posterior.loc.clone()
    fn = poutine.trace(model).get_trace(*data).nodes["net.0.weight"]["fn"]
    kept = fn.base_dist.loc.clone()
    ngvi.step(*data)
    assert not torch.equal(ngvi.guide.posterior.loc, before)
    again = poutine.trace(model).get_trace(*data).nodes["net.0.weight"]["fn"]
    torch.testing.assert_close(again.base_dist.loc, kept, rtol=0, atol=0)


# ---- other structures, layers and networks ------------------------------------------------------


@pytest.mark.parametrize("second_structure", CORRELATED)
@each_correlated
def test_guides_of_one_layer_may_have_any_structure(
    structure: str, second_structure: str
) -> None:
    x, y = regression_data()
    mean, covariance, _ = truth(x, y, "unequal")
    model = next_task(first_task(structure, "unequal", x[:HALF], y[:HALF]).guide)
    second = exactly(model, second_structure)
    second.step(x[HALF:], y[HALF:])
    assert_posterior(second.guide, mean, covariance)


def test_independent_weights_under_a_correlated_prior() -> None:
    """The best precision is the diagonal, and the mean is that of the prior's whole matrix."""
    x, y = regression_data()
    mean, covariance, _ = truth(x, y, "unequal")
    model = next_task(first_task("full", "unequal", x[:HALF], y[:HALF]).guide)
    second = exactly(model, "diag", lr=0.6, num_particles=0)
    for _ in range(60):
        second.step(x[HALF:], y[HALF:])
    torch.testing.assert_close(second.guide.posterior.loc, mean, rtol=1e-8, atol=1e-8)
    expected = torch.linalg.inv(covariance).diag()
    torch.testing.assert_close(second.guide.posterior.precision.diag(), expected)


def test_a_kronecker_sum_is_approximate_and_its_error_is_known() -> None:
    """Of two classifiers with other inputs; the posterior is not far from the dense one."""
    x, y = class_data(60)
    errors = {}
    for structure in ("kfac", "ekfac", "block"):
        prior: Any = normal_prior(0.7, 1.9)
        for rows in (slice(30), slice(30, None)):
            net = bayesianize(nn.Linear(3, 3).double(), prior)
            model = Classifier(net, 30)
            ngvi = NGVI(model, GUIDES[structure](model), lr=0.2, num_particles=0, kl_clip=None)
            for _ in range(8):
                ngvi.step(x[rows] * (1.0 if rows.start is None else 0.3), y[rows])
            prior = ngvi.guide
        errors.update({structure: ngvi.prior_errors()["net"]})
    assert errors["block"] < 1e-14
    assert 1e-6 < errors["kfac"] < 0.2 and 1e-6 < errors["ekfac"] < 0.2


def test_correlations_with_another_block_are_refused_by_name() -> None:
    ngvi, data = trained("full")
    model = Regressor(bayesianize(mlp_module(), ngvi.guide), NUM_DATA, noise=0.4)
    message = "prior of net.0.weight, net.0.bias is correlated with net.2.weight, net.2.bias"
    for structure in ("kfac", "block"):
        with pytest.raises(ValueError, match=message):
            NGVI(model, GUIDES[structure](model)).step(*data)
    NGVI(model, GUIDES["diag"](model)).step(*data)  # one matrix too


def test_the_posterior_of_a_last_layer() -> None:
    data, model = regression_data(), Regressor(mlp(), NUM_DATA, noise=0.4)
    guide = KFACGuide(model, structure={"net.0": "frozen"})
    NGVI(model, guide).step(*data)
    with pytest.raises(ValueError, match="no posterior of 0.weight, 0.bias: choose the other"):
        bayesianize(mlp_module(), guide)
    net = bayesianize(mlp_module(), guide, layers="2")
    assert [name for name, _ in net.named_parameters()] == ["0.weight", "0.bias"]
    second = Regressor(net, NUM_DATA, noise=0.4)
    ngvi = NGVI(second, KFACGuide(second))
    ngvi.step(*data)
    assert list(ngvi.prior_errors()) == ["net.2"]


def test_the_part_of_the_fallback_guide() -> None:
    """Weights with another prior than a normal have independent posteriors there."""

    def prior(module: nn.Module, name: str) -> dist.Distribution:
        zeros = torch.zeros_like(getattr(module, name))
        return (dist.Laplace if module.in_features == 3 else dist.Normal)(zeros, 1.0)

    data, net = regression_data(), bayesianize(mlp_module(), prior)
    model = Regressor(net, NUM_DATA, noise=0.4)
    ngvi = NGVI(model, KFACGuide(model))
    with pytest.warns(UserWarning, match="a Laplace prior"):
        ngvi.step(*data)
    second = Regressor(bayesianize(mlp_module(), ngvi.guide), NUM_DATA, noise=0.4)
    fns = {name: poutine.trace(second).get_trace(*data).nodes[name]["fn"].base_dist
           for name in ("net.0.weight", "net.2.weight")}
    loc, scale = ngvi.guide.fallback._get_loc_and_scale("net.0.weight")
    assert type(fns["net.0.weight"]) is dist.Normal
    torch.testing.assert_close(fns["net.0.weight"].loc, loc.detach())
    torch.testing.assert_close(fns["net.0.weight"].scale, scale.detach())
    guide = DiagonalGuide(second)
    NGVI(second, guide).step(*data)
    fallback = ngvi.guide.fallback
    exact = [torch.distributions.kl_divergence(
        guide.get_posterior(name).base_dist, dist.Normal(*fallback._get_loc_and_scale(name))
    ).sum() for name in ("net.0.weight", "net.0.bias")]
    last = [guide.get_posterior(name).base_dist for name in ngvi.guide.sites]
    means, variances = (torch.cat([getattr(normal, what).flatten() for normal in last])
                        for what in ("mean", "variance"))
    independent = dist.MultivariateNormal(means, torch.diag(variances))
    exact.append(torch.distributions.kl_divergence(independent, normal_of(ngvi.guide)))
    torch.testing.assert_close(guide.kl(), torch.stack(exact).sum())


def test_posteriors_of_another_network_are_refused_by_name() -> None:
    ngvi, _ = trained("kfac")
    wider = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"'net.0.weight' has shape \(4, 3\); '0.weight' has"):
        bayesianize(wider, ngvi.guide)
    deeper = nn.Sequential(*mlp_module(), nn.Tanh(), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match="no posterior of 4.weight, 4.bias"):
        bayesianize(deeper, ngvi.guide)
    for other, what in ((nn.ModuleDict({"a": nn.Linear(3, 4)}), "none of them is the same"),
                        (nn.Linear(3, 4), "several fit")):
        with pytest.raises(ValueError, match=f"net.0.weight .*: {what}"):
            bayesianize(other, ngvi.guide)
    assert isinstance(wider[0].weight, nn.Parameter), "nothing has changed"


def test_priors_that_are_no_posterior_of_this_package() -> None:
    ngvi, data = trained("kfac")
    with pytest.raises(TypeError, match="got AutoNormal"):
        bayesianize(mlp_module(), AutoNormal(ngvi.model))
    with pytest.raises(TypeError, match="got MixtureGuide; of a mixture, choose a component"):
        bayesianize(mlp_module(), MixtureGuide([ngvi.guide]))
    with pytest.raises(RuntimeError, match="the guide is not initialized"):
        bayesianize(mlp_module(), KFACGuide(ngvi.model))
    fresh = KFACGuide(ngvi.model)
    fresh(*data)
    with pytest.raises(ValueError, match="still has its initial scale"):
        bayesianize(mlp_module(), fresh)
    unnamed = StructuredNormal(torch.zeros(2), Diagonal(torch.ones(2)))
    with pytest.raises(TypeError, match="StructuredNormal without the names of its sites"):
        bayesianize(mlp_module(), unnamed)


@pytest.mark.parametrize("net", [
    lambda: nn.Linear(3, 2), lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
])
def test_a_network_goes_on_in_the_model_of_the_next_task(net: Any) -> None:
    net, prior, x, y = net(), "fan_in", torch.randn(12, 3), torch.arange(12) % 2
    for _ in range(3):
        net = bayesianize(net, prior=prior)
        model = Classifier(net, 12)
        prior = KFACGuide(model)
        ngvi = NGVI(model, prior)
        ngvi.step(x, y)
        ngvi.step(x, y)
    assert all(name.startswith("net.") for name in prior.sites)
