"""The guides as Pyro guides: sites, posterior, saving, what they refuse."""

import io
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_mean,
    init_to_value,
)
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.utils.checkpoint import checkpoint
from toys import (
    EXACT,
    GUIDES,
    NATURAL,
    NUM_DATA,
    class_data,
    classifier,
    flat,
    inputs,
    mlp,
    normal_prior,
    regression_data,
    regressor,
    trained,
)

import pyrocurv
from pyrocurv.curvature import EKFAC, KFAC, Curvature
from pyrocurv.guides import DiagonalGuide, KFACGuide, StructuredGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, Regressor, bayesianize
from pyrocurv.structures import Rescaled

SITES = {
    "net.0.weight": (4, 3), "net.0.bias": (4,), "net.2.weight": (2, 4), "net.2.bias": (2,),
}
SIZE = 26

each = pytest.mark.parametrize("structure", GUIDES)
store_or_local = pytest.mark.parametrize("local", [False, True], ids=["store", "local"])


@contextmanager
def parameters(local: bool) -> Iterator[None]:
    with pyro.settings.context(module_local_params=local):
        yield


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def draws_of(guide: StructuredGuide, seed: int = 5, n: int = 3) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return guide.sample_posterior(n)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def within(a: Tensor, b: Tensor, standard_error: Tensor) -> bool:
    """No entry farther than 5 standard errors: less than one in a million for each."""
    return bool(((a - b).abs() < 5 * standard_error).all())


# ---- sites and posterior ------------------------------------------------------------------------


@each
def test_sites(structure: str) -> None:
    model, (x, y) = regressor(), regression_data()
    guide = GUIDES[structure](model)
    result = guide(x, y)
    assert guide.sites == SITES and list(guide.sites) == list(SITES)
    assert {name: tuple(value.shape) for name, value in result.items()} == SITES
    trace = poutine.trace(guide).get_trace(x, y)
    assert set(SITES) <= set(trace.nodes)
    assert not guide.fallback_sites
    assert guide.posterior.loc.shape == (SIZE,) and guide.posterior.precision.size == SIZE


@each
def test_the_posterior_is_what_samples_come_from(structure: str) -> None:
    guide = trained(structure)[0].guide
    loc, n = guide.posterior.loc, 20_000
    covariance = torch.linalg.inv(guide.posterior.precision.dense())
    samples = guide.sample_posterior(n)
    assert list(samples) == list(SITES)
    assert all(samples[name].shape == (n, *shape) for name, shape in SITES.items())
    x = flat(samples, guide.sites)
    assert within(x.mean(0), loc, (covariance.diag() / n).sqrt())
    variances = torch.outer(covariance.diag(), covariance.diag())
    error = ((variances + covariance.square()) / n).sqrt()  # of an entry, by Isserlis
    assert within(x.mT.cov(), covariance, error)
    if structure != "diag":
        far = (covariance.square() / variances).fill_diagonal_(0).max()
        assert far > 0.1, "a covariance without correlations shows nothing"


@each
def test_forward_samples_are_of_the_posterior_too(structure: str) -> None:
    ngvi, data = trained(structure)
    n, guide = 500, ngvi.guide
    with torch.no_grad():
        draws = [guide(*data) for _ in range(n)]
    x = torch.stack([torch.cat([draw[name].flatten() for name in SITES]) for draw in draws])
    variance = guide.posterior.precision.inverse_diag()
    assert within(x.mean(0), guide.posterior.loc, (variance / n).sqrt())
    assert within(x.var(0), variance, variance * math.sqrt(2 / n))


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_samples_of_a_wide_layer(structure: str) -> None:
    """A side of 171 inputs keeps 16 directions, and one variance for all the others."""
    model = Regressor(bayesianize(nn.Linear(170, 2).double(), normal_prior(0.3, 1.0)), 100, 0.5)
    x, y = torch.randn(100, 170).double(), torch.randn(100, 2).double()
    ngvi = NGVI(model, GUIDES[structure](model), curvature="ggn")
    ngvi.step(x, y), ngvi.step(x, y)
    posterior, n = ngvi.guide.posterior, 2_000
    assert ngvi.guide.blocks[0].scale.shape == (2, 17)
    covariance = torch.linalg.inv(posterior.precision.dense().detach())
    torch.testing.assert_close(posterior.variance, covariance.diag())
    draws = flat(ngvi.guide.sample_posterior(n), ngvi.guide.sites)
    assert within(draws.mean(0), posterior.loc, (posterior.variance / n).sqrt())
    directions = torch.randn(342, 20).double()
    variance = (directions * (covariance @ directions)).sum(0)
    assert within((draws @ directions).var(0), variance, variance * math.sqrt(2 / n))


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_unequal_priors_make_a_rescaled_block(structure: str) -> None:
    guide = trained(structure)[0].guide
    assert all(isinstance(family.precision(), Rescaled) for family in guide.blocks)


@each
def test_marginals_median_and_quantiles(structure: str) -> None:
    guide = trained(structure)[0].guide
    loc = guide.posterior.loc.detach()
    deviation = torch.linalg.inv(guide.posterior.precision.dense().detach()).diag().sqrt()
    levels = [0.05, 0.5, 0.9]
    expected = torch.distributions.Normal(loc, deviation).icdf(torch.tensor(levels)[:, None])
    median, quantiles = guide.median(), guide.quantiles(levels)
    assert list(median) == list(quantiles) == list(SITES)
    torch.testing.assert_close(flat({n: v[None] for n, v in median.items()}, SITES)[0], loc)
    torch.testing.assert_close(flat(quantiles, SITES), expected.double(), rtol=1e-6, atol=1e-6)
    single = guide.quantiles(0.9)
    assert all(torch.equal(single[n], quantiles[n][2:]) for n in SITES)
    marginals = [guide.get_posterior(name) for name in SITES]
    assert [tuple(m.event_shape) for m in marginals] == list(SITES.values())
    torch.testing.assert_close(torch.cat([m.mean.flatten() for m in marginals]), loc)
    torch.testing.assert_close(torch.cat([m.stddev.flatten() for m in marginals]), deviation)
    with pytest.raises(ValueError, match="no site 'obs' here: net.0.weight, "):
        guide.get_posterior("obs")
    with pytest.raises(ValueError, match=r"numbers in \[0, 1\] are needed, got \[5, 95\]"):
        guide.quantiles([5, 95])


@each
def test_the_median_is_a_copy(structure: str) -> None:
    guide = trained(structure, steps=1)[0].guide
    before = guide.posterior.loc.clone()
    for value in guide.median().values():
        value.fill_(7)
    assert torch.equal(guide.posterior.loc, before)


@each
def test_a_posterior_is_a_value(structure: str) -> None:
    """What a user has kept does not change as training goes on."""
    ngvi, data = trained(structure)
    kept = ngvi.guide.posterior
    loc, dense = kept.loc.clone(), kept.precision.dense().clone()
    ngvi.step(*data)
    assert not torch.equal(ngvi.guide.posterior.loc, loc)
    assert torch.equal(kept.loc, loc) and torch.equal(kept.precision.dense(), dense)


THIN = {f"rank {rank}": KFAC(rank=rank) for rank in (1, 2, 3)} | {"thin ekfac": EKFAC(rank=2)}


def trained_with(structure: Any) -> StructuredGuide:
    """As `trained` has it, by name; or of layers of three and four rows, truncated."""
    if structure not in THIN:
        return trained(structure)[0].guide
    data, model = regression_data(), regressor()
    guide = KFACGuide(model, structure=lambda *_: THIN[structure])
    ngvi = NGVI(model, guide, lr=0.3, curvature=Curvature("ggn", every=1, batch=None))
    for _ in range(4):
        ngvi.step(*data)
    return guide


@pytest.mark.parametrize("structure", [*GUIDES, *THIN])
def test_samples_have_the_moments_of_the_posterior(structure: str) -> None:
    """In standard errors: those of a normal's mean, and of its covariances."""
    guide, n = trained_with(structure), 20_000
    draws = flat(guide.sample_posterior(n), guide.sites)
    covariance = guide.posterior.precision.dense().detach().inverse()
    variances = covariance.diag()
    mean = (draws.mean(0) - guide.posterior.loc.detach()) / (variances / n).sqrt()
    error = ((covariance.square() + torch.outer(variances, variances)) / n).sqrt()
    assert mean.abs().max() < 5
    assert ((draws.mT.cov() - covariance) / error).abs().max() < 5.5


@pytest.mark.parametrize("structure", [*GUIDES, *THIN])
def test_kl(structure: str) -> None:
    guide = trained_with(structure)
    scales = torch.cat([
        torch.full((math.prod(shape),), 0.8 if "weight" in name else 1.5)
        for name, shape in SITES.items()
    ]).double()
    posterior = MultivariateNormal(
        guide.posterior.loc, precision_matrix=guide.posterior.precision.dense()
    )
    prior = MultivariateNormal(torch.zeros(SIZE).double(), torch.diag(scales.square()))
    torch.testing.assert_close(
        guide.kl(), kl_divergence(posterior, prior), rtol=1e-6, atol=1e-6  # 0.8 is no float32
    )


@each
def test_summary_lists_every_latent(structure: str) -> None:
    model = regressor(noise=None)
    guide = GUIDES[structure](model)
    guide(*regression_data())
    lines = guide.summary().splitlines()
    for name, shape in SITES.items():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert str(shape) in line and structure in line and str(math.prod(shape)) in line
    (line,) = [line for line in lines if line.startswith("sigma")]
    assert "AutoNormal" in line


def test_before_the_first_call() -> None:
    guide = KFACGuide(regressor())
    for use in (lambda: guide.posterior, lambda: guide.sample_posterior(1), guide.median,
                lambda: guide.quantiles(0.5), guide.kl, guide.summary,
                lambda: guide.get_posterior("net.0.weight")):
        with pytest.raises(RuntimeError, match="guide is not initialized: call it once"):
            use()


@pytest.mark.parametrize("init_scale", [0.0, -1.0, math.nan])
def test_an_initial_scale_out_of_range(init_scale: float) -> None:
    with pytest.raises(ValueError, match="init_scale="):
        KFACGuide(regressor(), init_scale=init_scale)


@each
def test_initial_scale(structure: str) -> None:
    guide = GUIDES[structure](regressor(), init_scale=0.05)
    guide(*regression_data())
    torch.testing.assert_close(
        torch.linalg.inv(guide.posterior.precision.dense()), 0.05**2 * torch.eye(SIZE).double()
    )


# ---- where it starts ----------------------------------------------------------------------------


@each
def test_it_starts_at_the_networks_own_weights(structure: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    own = {f"net.{name}": value.detach().clone() for name, value in net.named_parameters()}
    guide = GUIDES[structure](Regressor(bayesianize(net), NUM_DATA, noise=0.3))
    guide(*regression_data())
    assert_equal(guide.median(), own)


def test_it_starts_at_given_values() -> None:
    values = {name: torch.randn(shape).double() for name, shape in SITES.items()}
    guide = KFACGuide(regressor(), init_loc_fn=init_to_value(values=values))
    guide(*regression_data())
    assert_equal(guide.median(), values)


def test_a_functional_model_starts_at_a_prior_sample() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("w", dist.Normal(5 * torch.ones(1, 3), 1e-3).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(nn.functional.linear(x, weight)[:, 0], 1.0), obs=y)

    guide = KFACGuide(model)
    guide(torch.randn(5, 3), torch.randn(5))
    assert guide.sites == {"w": (1, 3)}
    loc = guide.median()["w"]
    assert ((loc - 5).abs() < 5e-3 * 2).all() and not (loc == 5).any()


# ---- Pyro's inference ---------------------------------------------------------------------------


def conjugate(structure: str) -> tuple[NGVI, tuple[Tensor, Tensor]]:
    """A linear model whose exact posterior one step finds."""
    x, y = regression_data()
    net = bayesianize(nn.Linear(3, 2).double())
    model = Regressor(net, NUM_DATA, noise=0.3)
    ngvi = NGVI(model, GUIDES[structure](model), lr=1.0, momentum=0.0, damping=0.0, kl_clip=None,
                curvature=EXACT, **NATURAL)
    ngvi.step(x, y)
    return ngvi, (x, y)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "block", "full"])
def test_trace_elbo_has_no_noise_at_the_exact_posterior(structure: str, elbo: Any) -> None:
    ngvi, data = conjugate(structure)
    loss = ngvi.evaluate_loss(*data)
    for _ in range(3):
        assert elbo().loss(ngvi.model, ngvi.guide, *data) == pytest.approx(loss, abs=1e-8)


@each
def test_trace_elbo_agrees_with_evaluate_loss(structure: str) -> None:
    ngvi, data = trained(structure)
    n = 40
    theirs = torch.tensor([Trace_ELBO().loss(ngvi.model, ngvi.guide, *data) for _ in range(n)])
    ours = torch.tensor([ngvi.evaluate_loss(*data) for _ in range(n)])
    error = math.sqrt((theirs.var() + ours.var()) / n)
    assert abs(theirs.mean() - ours.mean()) < 4 * error


@each
def test_trace_elbo_agrees_with_the_fallback_in_it(structure: str) -> None:
    model, data, n = regressor(noise=None), regression_data(), 40
    ngvi = NGVI(model, GUIDES[structure](model), lr=0.1, temperature=1.0)
    for _ in range(3):
        ngvi.step(*data)
    theirs = torch.tensor([Trace_ELBO().loss(model, ngvi.guide, *data) for _ in range(n)])
    ours = torch.tensor([ngvi.evaluate_loss(*data) for _ in range(n)])
    error = math.sqrt((theirs.var() + ours.var()) / n)
    assert abs(theirs.mean() - ours.mean()) < 4 * error


@pytest.mark.parametrize(("structure", "local"), [
    ("diag", True), ("kfac", False), ("kfac", True), ("ekfac", False), ("block", True),
    ("full", False),
])
def test_svi_trains_the_guide(structure: str, local: bool) -> None:
    with parameters(local):
        model, data = regressor(noise=None), regression_data()
        guide = GUIDES[structure](model)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
        guide(*data)
        before = {name: value.clone() for name, value in guide.named_parameters()}
        losses = [svi.step(*data) for _ in range(60)]
        assert sum(losses[-10:]) < sum(losses[:10])
        moved = [n for n, v in guide.named_parameters() if not torch.equal(v, before[n])]
        assert len(moved) == len(before), "location and scales are all trained"
        guide.posterior.precision.dense()


@store_or_local
def test_ngvi_in_both_parameter_modes(local: bool) -> None:
    with parameters(local):
        model, data = regressor(noise=None), regression_data()
        ngvi = NGVI(model, KFACGuide(model), lr=0.1)
        losses = [ngvi.step(*data) for _ in range(60)]
    assert sum(losses[-10:]) / 10 < 0.8 * losses[0]


@each
def test_predictive(structure: str) -> None:
    ngvi, _ = trained(structure)
    x = inputs(7)
    samples = Predictive(ngvi.model, guide=ngvi.guide, num_samples=5)(x)
    assert samples["obs"].shape == (5, 7, 2)
    assert all(samples[name].shape[-len(shape):] == shape and len(samples[name]) == 5
               for name, shape in SITES.items())
    assert len({float(draw.sum()) for draw in samples["net.0.weight"]}) == 5
    one = Predictive(ngvi.model, guide=ngvi.guide, num_samples=5, return_sites=("_RETURN",))(x)
    assert one["_RETURN"].shape == (5, 7, 2)


def test_predictive_of_the_guide_alone() -> None:
    ngvi, data = trained("kfac")
    samples = Predictive(ngvi.guide, num_samples=5)(*data)
    assert samples["net.0.weight"].shape[0] == 5


@store_or_local
@each
def test_two_guides_of_one_class_share_nothing(structure: str, local: bool) -> None:
    with parameters(local):
        model, data = regressor(), regression_data()
        one, two = GUIDES[structure](model), GUIDES[structure](model)
        one(*data), two(*data)
        before = {name: value.clone() for name, value in two.named_parameters()}
        NGVI(model, one, lr=0.3).step(*data)
        SVI(model, one, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(*data)
        two(*data)
        assert_equal(dict(two.named_parameters()), before)
        assert not torch.equal(one.posterior.loc, two.posterior.loc)


def test_other_models_data_of_other_lengths() -> None:
    """A last mini-batch is smaller; the guide is not bound to the first one's size."""
    ngvi, (x, y) = trained("kfac")
    ngvi.guide(x[:7], y[:7])
    ngvi.step(x[:7], y[:7])


def test_guide_list() -> None:
    model, data = regressor(noise=None), regression_data()
    weights = list(SITES)
    guide = AutoGuideList(model)
    guide.append(KFACGuide(poutine.block(model, expose=weights)))
    guide.append(AutoNormal(poutine.block(model, hide=weights)))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    losses = [svi.step(*data) for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert guide[0].sites == SITES and not guide[0].fallback_sites
    assert set(guide.median(*data)) == {*SITES, "sigma"}
    samples = Predictive(model, guide=guide, num_samples=3)(inputs(7))
    assert samples["obs"].shape == (3, 7, 2)


def test_another_fallback() -> None:
    model = regressor(noise=None)
    guide = KFACGuide(model, fallback=AutoMultivariateNormal)
    guide(*regression_data())
    assert isinstance(guide.fallback, AutoMultivariateNormal)
    assert draws_of(guide)["sigma"].shape == (3,)


class Checkpointed(nn.Module):
    """Whose first layer is run anew in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        hidden = checkpoint(lambda x: self.first(x).tanh(), x, use_reentrant=self.reentrant)
        return self.last(hidden)


@pytest.mark.parametrize("reentrant", [False, True])
def test_weights_that_a_checkpoint_would_draw_anew_are_refused(reentrant: bool) -> None:
    """By Pyro's handlers they are what they are, which are gone when it is run again."""
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    model = Regressor(bayesianize(Checkpointed(reentrant)), 6, noise=0.3)
    with pytest.raises(ValueError, match="outside of Pyro's handlers"):
        KFACGuide(model)(x, y)
    model = Regressor(bayesianize(Checkpointed(reentrant), layers="last"), 6, noise=0.3)
    ngvi = NGVI(model, KFACGuide(model))
    assert [math.isfinite(ngvi.step(x, y)) for _ in range(3)] == [True] * 3


def test_a_dense_matrix_that_is_wide_has_a_word_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyrocurv.guides.partition.MAX_DENSE_SIZE", 15)
    for structure, size in (("full", 26), ("block", 16)):
        with pytest.warns(UserWarning, match=f"net.0 .*has a dense matrix of {size} x {size}"):
            GUIDES[structure](regressor())(*regression_data())
    for structure in ("diag", "kfac", "ekfac"):
        GUIDES[structure](regressor())(*regression_data())  # pytest takes a warning for an error


# ---- the fallback -------------------------------------------------------------------------------


class Scaled(PyroModule):
    """A linear regression whose weights' scale has a prior, and so have two more, in a vector."""

    def __init__(self, scale: dist.Distribution) -> None:
        super().__init__()
        self.scale = PyroSample(scale)
        self.layer = PyroModule[nn.Linear](3, 1)
        self.layer.weight = PyroSample(
            lambda _: dist.Normal(torch.zeros(1, 3), self.scale.mean()).to_event(2)
        )

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.layer(x)[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)
        return mean


@pytest.mark.parametrize(("prior", "median"), [
    (dist.HalfCauchy(0.1), 0.1), (dist.LogNormal(12.0, 1.0), math.exp(12)),
    (dist.HalfNormal(torch.full((2,), 0.2)).to_event(1), 0.2 * 0.6745),
], ids=["HalfCauchy", "LogNormal", "a vector"])
def test_latents_of_the_fallback_start_at_their_medians(
    prior: dist.Distribution, median: float
) -> None:
    """Exactly, where Pyro's own guide starts every scale at 1."""
    guide = KFACGuide(Scaled(prior))
    guide(*LINE)
    start = guide.median()["scale"]
    torch.testing.assert_close(start, torch.full_like(start, median), rtol=1e-3, atol=0)


@pytest.mark.parametrize("prior", [
    dist.Gamma(0.001, 0.001), dist.InverseGamma(0.01, 0.01), dist.Weibull(1.0, 0.01),
])
def test_a_prior_that_is_vague_has_no_middle_to_start_at(prior: dist.Distribution) -> None:
    guide = KFACGuide(Scaled(prior))
    guide(*LINE)
    assert guide.median()["scale"] == 1


def test_a_median_that_has_no_closed_form() -> None:
    guide = KFACGuide(Scaled(dist.Gamma(100.0, 1000.0)))
    guide(*LINE)
    assert 0.07 < guide.median()["scale"] < 0.13  # a median of 15 samples of sd .01


@pytest.mark.parametrize(("options", "start"), [
    ({}, 1.0), ({"init_loc_fn": init_to_mean}, 0.2 * math.sqrt(2 / math.pi)),
])
def test_a_fallback_of_ones_own_starts_where_it_says(options: Any, start: float) -> None:
    model = Scaled(dist.HalfNormal(0.2))
    guide = KFACGuide(model, fallback=lambda model: AutoNormal(model, **options))
    guide(*LINE)
    assert guide.median()["scale"].item() == pytest.approx(start)


@each
def test_sigma_goes_to_the_fallback(structure: str) -> None:
    model, data = regressor(noise=None), regression_data()
    guide = GUIDES[structure](model)
    guide(*data)  # without a warning: nobody expects a Gaussian of weights for it
    assert guide.sites == SITES and guide.fallback_sites == ("sigma",)
    n = 2_000
    samples = guide.sample_posterior(n)
    assert samples["sigma"].shape == (n,) and (samples["sigma"] > 0).all()
    loc, scale = guide.fallback._get_loc_and_scale("sigma")
    assert within(samples["sigma"].log().mean(), loc, scale / math.sqrt(n))
    assert within(samples["sigma"].log().std(), scale, scale / math.sqrt(2 * n))
    torch.testing.assert_close(guide.median()["sigma"], loc.exp())
    quantiles = guide.quantiles([0.1, 0.5], *data)["sigma"]
    expected = (loc + scale * torch.distributions.Normal(0, 1).icdf(torch.tensor([0.1, 0.5]))).exp()
    torch.testing.assert_close(quantiles, expected, check_dtype=False)


class Weights(PyroModule):
    """A linear regression with the priors given."""

    def __init__(self, weight: dist.Distribution, bias: dist.Distribution) -> None:
        super().__init__()
        self.layer = PyroModule[nn.Linear](3, 1)
        self.layer.weight, self.layer.bias = PyroSample(weight), PyroSample(bias)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.layer(x)[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)
        return mean


LINE = torch.randn(6, 3), torch.randn(6)


def one_warning(caught: Any, names: set[str], reason: str) -> None:
    (text,) = [str(warning.message) for warning in caught]
    assert all(text.count(name) == 1 for name in names) and reason in text


def test_weights_with_another_prior_go_to_the_fallback() -> None:
    model = Weights(dist.Laplace(torch.zeros(1, 3), 1.0).to_event(2),
                    dist.Normal(torch.zeros(1), 1.0).to_event(1))
    guide = KFACGuide(model)
    with pytest.warns(UserWarning) as caught:
        guide(*LINE)
    one_warning(caught, {"layer.weight"}, "Laplace")
    assert guide.sites == {"layer.bias": (1,)} and guide.fallback_sites == ("layer.weight",)
    guide(*LINE)  # no second warning
    assert draws_of(guide)["layer.weight"].shape == (3, 1, 3)
    assert guide.median()["layer.weight"].shape == (1, 3)
    assert "layer.weight" in guide.summary()


def test_without_a_block_there_is_no_posterior_but_a_reason() -> None:
    model = Weights(dist.Laplace(torch.zeros(1, 3), 1.0).to_event(2),
                    dist.Laplace(torch.zeros(1), 1.0).to_event(1))
    guide = KFACGuide(model)
    with pytest.warns(UserWarning, match="Laplace"):
        guide(*LINE)
    with pytest.raises(RuntimeError, match="fallback"):
        guide.posterior  # noqa: B018
    with pytest.raises(RuntimeError, match="fallback"):
        guide.kl()
    reason = r"has layer.weight, layer.bias \(a Laplace prior\).* pyro.infer.SVI .* FullGuide"
    with pytest.raises(ValueError, match=reason):
        NGVI(model, guide).step(*LINE)
    fresh = KFACGuide(model)
    fresh.load_state_dict(through_a_file(guide.state_dict()))
    with pytest.warns(UserWarning, match="Laplace"):
        fresh(*LINE)
    assert_equal(fresh.median(), guide.median())


@pytest.mark.parametrize("kind", ["point", "frozen"])
def test_a_guide_that_leaves_all_out_says_so(kind: str) -> None:
    model = regressor()
    guide = KFACGuide(model, structure={nn.Linear: kind})
    with pytest.raises(ValueError, match='structure= leaves out net.0.weight, .* as "point"'):
        NGVI(model, guide).step(*regression_data())


def test_a_warning_points_at_the_users_line() -> None:
    model = Weights(dist.Laplace(torch.zeros(1, 3), 1.0).to_event(2),
                    dist.Normal(torch.zeros(1), 1.0).to_event(1))
    for use in (lambda guide: guide(*LINE), lambda guide: NGVI(model, guide).step(*LINE),
                lambda guide: Trace_ELBO().loss(model, guide, *LINE)):
        with pytest.warns(UserWarning, match="Laplace") as caught:
            use(KFACGuide(model))
        assert [warning.filename for warning in caught] == [__file__]


def test_latents_in_a_vectorised_plate() -> None:
    class Hierarchy(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            with pyro.plate("outputs", 2):
                sigma = pyro.sample("sigma", dist.LogNormal(x.new_zeros(2), 1.0))
            mean = self.net(x)
            with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
                pyro.sample("obs", dist.Normal(mean, sigma).to_event(1), obs=y)

    model, data = Hierarchy(), regression_data()
    ngvi = NGVI(model, KFACGuide(model), lr=0.1)
    losses = [ngvi.step(*data) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert ngvi.guide.sites == SITES and ngvi.guide.fallback_sites == ("sigma",)
    assert draws_of(ngvi.guide)["sigma"].shape == (3, 2)
    svi = SVI(model, ngvi.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(*data)


# ---- models that are refused --------------------------------------------------------------------


def test_data_left_out_of_the_first_call() -> None:
    """A Normal `obs` must not become a latent that NGVI trains with."""
    x, y = regression_data()
    model = regressor()
    guide = KFACGuide(model)
    with pytest.raises(ValueError, match="no observed site.*were the data left out"):
        NGVI(model, guide).step(x)
    assert guide.sites == {} and guide.prototype_trace is None and len(guide.blocks) == 0
    guide(x, y)
    assert guide.sites == SITES and not guide.fallback_sites


def test_data_left_out_of_the_first_call_of_a_partly_blocked_model() -> None:
    x, y = regression_data()
    model = regressor(noise=None)
    guide = KFACGuide(poutine.block(model, hide=["sigma"]))
    guide(x, y)
    assert guide.sites == SITES and not guide.fallback_sites


def test_a_discrete_latent() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("obs", dist.Normal(0.0, 1.0), obs=y)

    with pytest.raises(ValueError, match="latent 'k' is discrete.*Bernoulli"):
        KFACGuide(model)(torch.zeros(()), torch.zeros(()))


def test_no_latent() -> None:
    net = Regressor(nn.Linear(3, 2).double(), NUM_DATA, noise=0.3)
    with pytest.raises(ValueError, match="has no latent.*bayesianized"):
        KFACGuide(net)(*regression_data())


def test_a_sequential_plate() -> None:
    def model(y: Tensor) -> None:
        for i in pyro.plate("units", 2):
            pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(0.0, 1.0), obs=y)

    with pytest.raises(ValueError, match="'z_0' is in a sequential plate"):
        KFACGuide(model)(torch.zeros(()))


# ---- saving -------------------------------------------------------------------------------------


@store_or_local
@each
def test_a_fresh_guide_is_loaded_without_data(structure: str, local: bool) -> None:
    with parameters(local):
        ngvi, data = trained(structure)
        state = through_a_file(ngvi.guide.state_dict())
        fresh = GUIDES[structure](ngvi.model)
        fresh.load_state_dict(state)
        assert fresh.sites == SITES and list(fresh.sites) == list(SITES)
        assert_equal(draws_of(fresh), draws_of(ngvi.guide))
        posteriors = fresh.posterior, ngvi.guide.posterior
        assert torch.equal(*(posterior.precision.dense() for posterior in posteriors))
        fresh(*data)  # the first call must not start anew
        assert_equal(draws_of(fresh), draws_of(ngvi.guide))
        torch.testing.assert_close(fresh.kl(), ngvi.guide.kl())
        again = through_a_file(fresh.state_dict())
        assert again.keys() == state.keys()


@each
def test_a_used_guide_is_loaded(structure: str) -> None:
    ngvi, data = trained(structure)
    other = GUIDES[structure](ngvi.model)
    other(*data)
    other.load_state_dict(through_a_file(ngvi.guide.state_dict()))
    assert_equal(draws_of(other), draws_of(ngvi.guide))


def with_a_fallback() -> tuple[NGVI, tuple[Tensor, Tensor]]:
    model, data = regressor(noise=None), regression_data()
    ngvi = NGVI(model, KFACGuide(model), lr=0.1)
    for _ in range(4):
        ngvi.step(*data)
    return ngvi, data


def test_a_fallback_is_loaded_with_its_guide() -> None:
    ngvi, data = with_a_fallback()
    fresh = KFACGuide(ngvi.model)
    fresh.load_state_dict(through_a_file(ngvi.guide.state_dict()))
    fresh(*data)
    assert fresh.fallback_sites == ("sigma",)
    assert_equal(draws_of(fresh), draws_of(ngvi.guide))


def test_a_loaded_guide_does_not_forget_its_fallback() -> None:
    """Without data it cannot sample `sigma`; then it says so and leaves nothing out."""
    ngvi, data = with_a_fallback()
    fresh = KFACGuide(ngvi.model)
    fresh.load_state_dict(through_a_file(ngvi.guide.state_dict()))
    try:
        samples = fresh.sample_posterior(2)
    except RuntimeError as error:
        assert "sigma" in str(error) or "call it once" in str(error)
    else:
        assert set(samples) == {*SITES, "sigma"}
    saved = through_a_file(fresh.state_dict())
    assert saved.keys() == ngvi.guide.state_dict().keys(), "saved again before its first call"


def test_a_state_of_another_structure() -> None:
    state = trained("kfac", steps=1)[0].guide.state_dict()
    for other in ("ekfac", "diag", "full"):
        guide = GUIDES[other](regressor())
        with pytest.raises(ValueError, match="structure 'kfac'"):
            guide.load_state_dict(state)
        assert guide.sites == {}


def test_a_state_of_another_network() -> None:
    state = trained("kfac", steps=1)[0].guide.state_dict()
    guide = KFACGuide(Classifier(mlp(outputs=3), NUM_DATA))
    with pytest.raises(ValueError, match="the state is of another network"):
        guide.load_state_dict(state)
    used = KFACGuide(Classifier(mlp(outputs=3), NUM_DATA))
    used(*class_data())
    with pytest.raises(ValueError, match="the state has weights .*, this guide"):
        used.load_state_dict(state)


@pytest.mark.parametrize("structure", GUIDES)
def test_pickling_leaves_the_live_guide_usable(structure: str) -> None:
    ngvi, data = trained(structure)
    expected = draws_of(ngvi.guide)
    again = pickle.loads(pickle.dumps(ngvi.guide))
    assert ngvi.guide.model is not None
    ngvi.guide(*data)
    assert_equal(draws_of(ngvi.guide), expected)
    assert_equal(draws_of(again), expected)
    ngvi.step(*data)


def test_an_unpickled_guide_knows_all_but_its_model() -> None:
    ngvi, data = with_a_fallback()
    again = pickle.loads(pickle.dumps(ngvi.guide))
    assert again.summary() == ngvi.guide.summary()  # a model without parameters
    assert_equal(again.median(), ngvi.guide.median())
    torch.testing.assert_close(again.kl(), ngvi.guide.kl())
    assert_equal(again.quantiles(0.3, *data), ngvi.guide.quantiles(0.3, *data))
    assert set(again(*data)) == {*SITES, "sigma"}
    never_called = pickle.loads(pickle.dumps(KFACGuide(ngvi.model)))
    with pytest.raises(RuntimeError, match=r"leave the model behind: .* KFACGuide\(model\)"):
        never_called(*data)


# ---- buffers, dtypes ----------------------------------------------------------------------------


def batch_norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 2))


@pytest.mark.parametrize("noise", [0.3, None])
def test_the_first_call_leaves_batch_norm_alone(noise: float | None) -> None:
    model = Regressor(bayesianize(batch_norm_net().double()), NUM_DATA, noise=noise)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    KFACGuide(model)(*regression_data())
    assert any("num_batches_tracked" in name for name in before)
    assert_equal(dict(model.named_buffers()), before)


def test_a_first_call_that_fails_leaves_batch_norm_alone() -> None:
    model = Regressor(bayesianize(batch_norm_net().double()), NUM_DATA, noise=0.3)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(ValueError, match="left out"):
        NGVI(model, KFACGuide(model)).step(inputs())
    with pytest.raises(ValueError, match="do not fit"):
        KFACGuide(model)(inputs(), torch.zeros(NUM_DATA, 5))
    assert_equal(dict(model.named_buffers()), before)


def test_evaluate_loss_leaves_batch_norm_alone() -> None:
    model = Regressor(bayesianize(batch_norm_net().double()), NUM_DATA, noise=0.3)
    data = regression_data()
    ngvi = NGVI(model, KFACGuide(model))
    ngvi.step(*data)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ngvi.evaluate_loss(*data)
    assert_equal(dict(model.named_buffers()), before)


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "double": lambda module: module.double(), "to": lambda module: module.to(torch.float64),
}


@store_or_local
@pytest.mark.parametrize("move", MOVES)
@each
def test_a_guide_moves_with_its_network(structure: str, move: str, local: bool) -> None:
    with parameters(local):
        net = bayesianize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), prior=0.5)
        model = Regressor(net, NUM_DATA)
        x, y = (part.float() for part in regression_data())
        guide = GUIDES[structure](model)
        guide(x, y)
        before = guide.median()
        MOVES[move](model), MOVES[move](guide)
        x, y = x.double(), y.double()
        ngvi = NGVI(model, guide)
        result = guide(x, y)
        ngvi.step(x, y), ngvi.step(x, y)
        assert all(value.dtype == torch.float64 for value in result.values())
        assert guide.posterior.precision.dense().dtype == torch.float64
        assert all(v.dtype == torch.float64 for v in draws_of(guide).values())
        assert all(torch.allclose(before[n].double(), guide.median()[n], atol=0.1) for n in SITES)


def test_a_run_goes_on_in_double() -> None:
    net = bayesianize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    model = Regressor(net, NUM_DATA)
    x, y = (part.float() for part in regression_data())
    ngvi = NGVI(model, KFACGuide(model), lr=0.1)
    ngvi.step(x, y), ngvi.step(x, y)
    model.double(), ngvi.guide.double()
    assert math.isfinite(ngvi.step(x.double(), y.double()))
    assert ngvi.guide.posterior.precision.dense().dtype == torch.float64
    assert ngvi.guide.kl().dtype == torch.float64


def test_diagonal_is_mean_field() -> None:
    guide = trained("diag")[0].guide
    precision = guide.posterior.precision.dense()
    assert isinstance(guide, DiagonalGuide)
    assert torch.equal(precision, torch.diag(precision.diag()))


def test_classifier_guides_too() -> None:
    model, data = classifier(), class_data()
    ngvi = NGVI(model, KFACGuide(model), lr=0.1, temperature=0.1)
    losses = [ngvi.step(*data) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


# ---- a network inside of a function -------------------------------------------------------------


class Service:
    """An object that is no module, with a model as its method."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        around(self.net, x, y)


def around(net: nn.Module, x: Tensor, y: Tensor | None = None) -> None:
    mean = net(x)
    scale = pyro.sample("scale", dist.HalfNormal(mean.new_ones(())))
    with pyro.plate("data", NUM_DATA, subsample=torch.arange(len(x))):
        pyro.sample("obs", dist.Normal(mean, scale).to_event(1), obs=y)


def closed_over(net: nn.Module) -> Callable[..., Any]:
    nets = {"first": net}
    return lambda x, y=None: around(nets["first"], x, y)


FUNCTIONS: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "closure": closed_over,
    "method": lambda net: Service(net).model,
    "partial": lambda net: partial(around, net),
    "handled": lambda net: poutine.scale(closed_over(net), 1.0),
    "reparametrised": lambda net: poutine.reparam(closed_over(net), config={}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("structure", ["diag", "kfac", "full"])
def test_a_network_inside_of_a_function_is_seen(name: str, structure: str) -> None:
    """It starts at its own weights, its buffers are kept, structures go by its names."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    weight, count = net[0].weight.detach().clone(), net[1].num_batches_tracked
    model = FUNCTIONS[name](bayesianize(net, layers=nn.Linear))
    guide, (x, y) = GUIDES[structure](model), regression_data()
    guide(x, y)
    assert torch.equal(guide.median()["0.weight"], weight)
    ngvi = NGVI(model, guide, on_nonfinite="skip")
    ngvi.evaluate_loss(x, y)
    assert int(count) == 0
    ngvi.step(x, y)
    assert int(count) == 1
    mean = net[1].running_mean.clone()
    assert math.isnan(ngvi.step(x * torch.nan, y))
    assert torch.equal(net[1].running_mean, mean)
    with pytest.warns(UserWarning, match="train.. mode"):
        pyrocurv.infer.Predictive(model, guide=guide, num_samples=3)(x)
    assert int(count) == 1
    other = KFACGuide(model, structure={"0": "block"})
    other(x, y)
    assert [family.block.kind for family in other.blocks] == ["block", "kfac"]


@pytest.mark.usefixtures("double")
def test_weights_start_at_the_scale_that_their_prior_starts_at() -> None:
    """Not at a draw of its heavy tail."""
    def model(x: Tensor, y: Tensor) -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        weight = pyro.sample("weight", dist.Normal(0.0, tau).expand([200, 3]).to_event(2))
        with pyro.plate("data", len(x)):
            mean = torch.nn.functional.linear(x, weight)
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(1), obs=y)

    x = torch.randn(10, 3)
    for _ in range(5):
        pyro.clear_param_store()
        guide = KFACGuide(model)
        guide(x, torch.randn(10, 200))
        assert float(guide.median()["tau"]) == pytest.approx(1.0, rel=1e-3)
        assert 0.8 < float(guide.median()["weight"].std()) < 1.2
