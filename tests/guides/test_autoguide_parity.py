"""What Pyro's own tests ask of AutoNormal and AutoMultivariateNormal, asked of the guides here.

The models have an observed site, which these guides want; networks have latents beside the weights.
"""

import functools
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from designs import pairs
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import (
    AutoCallable,
    AutoDelta,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoNormal,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.inspect import get_model_relations
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import Adam
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match
from torch import Tensor, nn
from torch.distributions import constraints
from toys import GUIDES, NUM_DATA, inputs, regression_data, regressor, trained

from pyrocurv.guides import KFACGuide, StructuredGuide
from pyrocurv.infer import NGVI

# latents that are no network's weights: which guide they have is no matter here
pytestmark = pytest.mark.filterwarnings("ignore:.*(no supported op|left to the fallback)")
each = pytest.mark.parametrize("structure", GUIDES)
ELBOS = {
    "trace": Trace_ELBO, "graph": TraceGraph_ELBO, "mean-field": TraceMeanField_ELBO,
    "enum": functools.partial(TraceEnum_ELBO, strict_enumeration_warning=False),
}  # fmt: skip
every_elbo = pytest.mark.parametrize("elbo", ELBOS)
some_elbos = pytest.mark.parametrize(("structure", "elbo"), [  # each guide and each elbo
    ("diag", "trace"), ("kfac", "graph"), ("ekfac", "mean-field"), ("block", "enum"),
    ("full", "trace"), ("kfac", "trace"), ("full", "graph"), ("full", "mean-field"),
])
STARTS = {
    "feasible": init_to_feasible, "mean": init_to_mean, "median": init_to_median,
    "sample": init_to_sample, "uniform": init_to_uniform, "value": init_to_value(values={}),
}  # fmt: skip


def weights(x: Tensor, y: Tensor | None = None) -> Tensor:
    """A linear regression, its weight [1, 3] a latent that a supported op consumes."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(1, 3), 1.0).to_event(2))
    mean = nn.functional.linear(x, w)[..., 0]
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)
    return mean


def batched(x: Tensor, y: Tensor) -> None:
    """The same in a product that takes weights [..., 1, 1, 3] of many particles."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(1, 3), 1.0).to_event(2))
    mean = (x @ w.mT)[..., 0]
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean.reshape(*mean.shape[:-2], len(x)), 1.0), obs=y)


def observe() -> None:
    pyro.sample("obs", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


def three_supports() -> None:
    """Latents on the line, the half-line and the interval, of which the data say nothing."""
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.LogNormal(0.0, 1.0))
    pyro.sample("z", dist.Beta(2.0, 2.0))
    observe()


def line(rows: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3), torch.randn(rows)


# ---- scores -------------------------------------------------------------------------------------


@each
def test_scores(structure: str) -> None:
    guide, data = GUIDES[structure](weights), line()
    guide_trace = poutine.trace(guide).get_trace(*data)
    model_trace = poutine.trace(poutine.replay(weights, guide_trace)).get_trace(*data)
    guide_trace.compute_log_prob(), model_trace.compute_log_prob()
    auxiliary = f"_{guide._pyro_name}_latent"
    assert auxiliary not in model_trace.nodes
    assert guide_trace.nodes[auxiliary]["log_prob_sum"] != 0
    assert model_trace.nodes["w"]["log_prob_sum"] != 0
    assert guide_trace.nodes["w"]["log_prob_sum"] == 0
    assert model_trace.nodes["w"]["value"] is guide_trace.nodes["w"]["value"]


@each
def test_the_score_of_a_sample_is_the_density_of_the_posterior(structure: str) -> None:
    ngvi, data = trained(structure)
    trace = poutine.trace(ngvi.guide).get_trace(*data)
    sample = torch.cat([trace.nodes[name]["value"].flatten() for name in ngvi.guide.sites])
    expected = torch.distributions.MultivariateNormal(
        ngvi.guide.posterior.loc, precision_matrix=ngvi.guide.posterior.precision.dense()
    ).log_prob(sample)
    torch.testing.assert_close(trace.log_prob_sum(), expected)


@each
@every_elbo
def test_factor(structure: str, elbo: str) -> None:
    def model(log_factor: Tensor) -> None:
        pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.factor("f1", log_factor)
        pyro.sample("z2", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
        with pyro.plate("plate", 3):
            pyro.factor("f2", log_factor)
            pyro.sample("z3", dist.Normal(torch.zeros(3), torch.ones(3)))

    guide, loss = GUIDES[structure](model), ELBOS[elbo]()
    loss.loss(model, guide, torch.tensor(0.0))
    losses = []
    for log_factor in (5.0, 4.0):
        pyro.set_rng_seed(123)
        losses.append(loss.loss(model, guide, torch.tensor(log_factor)))
    assert losses[0] - losses[1] == pytest.approx(-1 - 3, abs=1e-4)


@some_elbos
def test_every_elbo_takes_a_network(structure: str, elbo: str) -> None:
    model, data = regressor(noise=None), regression_data()
    guide = GUIDES[structure](model)
    loss = ELBOS[elbo]()
    svi = SVI(model, guide, Adam({"lr": 0.03}), loss)
    before = svi.evaluate_loss(*data)
    for _ in range(25):
        svi.step(*data)
    assert svi.evaluate_loss(*data) < before


# ---- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "structure", "elbo"), pairs(STARTS, GUIDES, ELBOS))
def test_shapes(structure: str, elbo: str, start: str) -> None:
    def model() -> None:
        pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.sample("z2", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
        with pyro.plate("plate", 3):
            pyro.sample("z3", dist.Normal(torch.zeros(3), torch.ones(3)))
        pyro.sample("z4", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
        pyro.sample("z5", dist.Dirichlet(torch.ones(3)))
        pyro.sample("z6", dist.Normal(0, 1).expand((2,)).mask(torch.arange(2) > 0).to_event(1))
        observe()

    guide = GUIDES[structure](model, init_loc_fn=STARTS[start])
    assert math.isfinite(ELBOS[elbo]().loss(model, guide))
    shapes = {name: tuple(value.shape) for name, value in guide().items()}
    expected = {"z1": (), "z2": (2,), "z3": (3,), "z4": (2,), "z5": (3,), "z6": (2,)}
    assert shapes == expected
    assert {name: tuple(value.shape) for name, value in guide.median().items()} == expected
    quantiles = {name: tuple(value.shape) for name, value in guide.quantiles([0.2, 0.8]).items()}
    assert quantiles == {name: (2, *shape) for name, shape in expected.items()}


@each
@pytest.mark.parametrize("start", STARTS)
def test_networks_start_anywhere(structure: str, start: str) -> None:
    guide = GUIDES[structure](regressor(noise=None), init_loc_fn=STARTS[start])
    result = guide(*regression_data())
    medians = guide.median()
    assert {n: v.shape for n, v in result.items()} == {n: v.shape for n, v in medians.items()}
    if start == "mean":
        assert all(not medians[name].any() for name in guide.sites), "the mean of the prior"


@each
def test_init_loc_fn_is_where_the_median_is(structure: str) -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(5), torch.eye(5, 5)))
        observe()

    inits = {"x": torch.randn(()), "y": torch.randn(5)}
    guide = GUIDES[structure](model, init_loc_fn=lambda site: inits[site["name"]])
    guide()
    for name, value in guide.median().items():
        torch.testing.assert_close(value, inits[name])


@each
def test_values_by_name_start_the_fallback_too(structure: str) -> None:
    model, data = regressor(noise=None), regression_data()
    own = GUIDES[structure](model)
    own(*data)
    for values in ({"sigma": torch.tensor(0.7).double()}, {"net.2.bias": torch.ones(2).double()}):
        guide = GUIDES[structure](model, init_loc_fn=init_to_value(values=values))
        guide(*data)
        started = {**own.median(), **values}
        for name in ("sigma", *values):
            torch.testing.assert_close(guide.median()[name], started[name])


@each
@pytest.mark.parametrize("init_scale", [1e-1, 1e-4, 1e-8])
def test_init_scale(structure: str, init_scale: float) -> None:
    guide = GUIDES[structure](regressor(), init_scale=init_scale)
    guide(*regression_data())
    scale = guide.posterior.variance.sqrt()
    torch.testing.assert_close(scale, torch.full_like(scale, init_scale), rtol=1e-6, atol=0.0)


# ---- median and quantiles -----------------------------------------------------------------------


def fitted(structure: str, elbo: str) -> StructuredGuide:
    guide = GUIDES[structure](three_supports)
    loss = ELBOS[elbo](num_particles=100, vectorize_particles=True)
    svi = SVI(three_supports, guide, Adam({"lr": 0.05, "betas": (0.8, 0.99)}), loss)
    for _ in range(150):
        svi.step()
    return guide


@pytest.mark.parametrize(("structure", "elbo"), [
    ("diag", "trace"), ("kfac", "graph"), ("full", "trace"),
])  # no site has a layer here: the guides differ in what they leave to their fallback
def test_median_and_quantiles(structure: str, elbo: str) -> None:
    """The true medians are 0, 1 and 1/2; the tolerance is that of Pyro's own test."""
    guide = fitted(structure, elbo)
    median, quantiles = guide.median(), guide.quantiles([0.1, 0.5, 0.9])
    for name, truth in {"x": 0.0, "y": 1.0, "z": 0.5}.items():
        assert median[name].item() == pytest.approx(truth, abs=0.1)
        torch.testing.assert_close(quantiles[name][1], median[name])
    levels = {name: value.tolist() for name, value in quantiles.items()}
    for name, (low, high, apart) in {
        "x": (-3.0, 3.0, lambda a, b: b - a > 1), "y": (0.01, 100.0, lambda a, b: b / a > 2),
        "z": (0.01, 0.99, lambda a, b: b - a > 0.1),
    }.items():
        a, b, c = levels[name]
        assert low < a and c < high and apart(a, b) and apart(b, c)


@some_elbos
def test_median_of_a_module(structure: str, elbo: str) -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.x_loc = nn.Parameter(torch.tensor(1.0))
            self.x_scale = PyroParam(torch.tensor(0.1), constraints.positive)

        def forward(self) -> None:
            pyro.sample("x", dist.Normal(self.x_loc, self.x_scale))
            pyro.sample("y", dist.Normal(2.0, 0.1))
            observe()

    model = Model()
    guide = GUIDES[structure](model, init_loc_fn=init_to_median)
    svi = SVI(model, guide, Adam({"lr": 0.005}), ELBOS[elbo]())
    for _ in range(20):
        svi.step()
    median = guide.median()
    assert median["x"].item() == pytest.approx(1.0, abs=0.15)
    assert median["y"].item() == pytest.approx(2.0, abs=0.15)


# ---- lists and nesting --------------------------------------------------------------------------


def two_latents() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(5), torch.eye(5, 5)))


@each
def test_guide_list_of_two(structure: str) -> None:
    guide = AutoGuideList(two_latents)
    guide.append(GUIDES[structure](poutine.block(two_latents, expose=["x"])))
    guide.append(GUIDES[structure](poutine.block(two_latents, expose=["y"])))
    assert {name: tuple(value.shape) for name, value in guide().items()} == {"x": (2,), "y": (5,)}
    assert set(guide.median()) == set(guide.quantiles([0.5])) == {"x", "y"}


@each
@pytest.mark.parametrize("gives", [True, False], ids=["dict", "nothing"])
def test_guide_list_with_a_callable(structure: str, gives: bool) -> None:
    def guide_x() -> Any:
        value = pyro.sample("x", dist.Delta(pyro.param("x_loc", torch.zeros(2)), event_dim=1))
        return {"x": value} if gives else None

    guide = AutoGuideList(two_latents)
    guide.append(guide_x)
    guide.append(GUIDES[structure](poutine.block(two_latents, expose=["y"])))
    assert set(guide()) == ({"x", "y"} if gives else {"y"})
    guide = AutoGuideList(two_latents)
    guide.append(AutoCallable(two_latents, guide_x, lambda: {"x": pyro.param("x_loc")}))
    guide.append(GUIDES[structure](poutine.block(two_latents, hide=["x"])))
    guide()
    assert set(guide.median()) == {"x", "y"}


@each
def test_nested_guides(structure: str) -> None:
    model, data = regressor(noise=None), regression_data()
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["sigma"])))
    inner = AutoGuideList(poutine.block(model, hide=["sigma"]))
    inner.z = GUIDES[structure](poutine.block(model, hide=["sigma"]))
    guide.append(inner)
    parts = [part for part in guide.modules() if hasattr(part, "master") and part is not guide]
    assert len(parts) == 3 and all(part.master() is guide for part in parts)
    svi = SVI(model, guide, Adam({"lr": 0.005}), Trace_ELBO())
    for _ in range(5):
        svi.step(*data)
    guide_trace = poutine.trace(guide).get_trace(*data)
    check_model_guide_match(poutine.trace(model).get_trace(*data), guide_trace)
    assert all(name.startswith(("AutoGuideList.0", "AutoGuideList.1.z"))
               for name in guide_trace.param_nodes)
    one = len(inner.z.blocks) == 1
    latent = "_AutoGuideList.1.z_latent" if one else "_AutoGuideList.1.z.net.0_latent"
    assert latent in guide_trace.stochastic_nodes
    assert set(guide.state_dict()) >= {"0.sigma_unconstrained", "1.z.blocks.0.loc_unconstrained"}


@each
def test_the_fallback_has_the_guide_for_its_master(structure: str) -> None:
    guide = GUIDES[structure](regressor(noise=None))
    guide(*regression_data())
    assert guide.fallback.master() is guide


@each
def test_discrete_latents_beside_it(structure: str) -> None:
    """A mixture of normals: the assignment is enumerated, the rest has a guide of ours."""

    def model(data: Tensor) -> None:
        shares = pyro.sample("shares", dist.Dirichlet(0.5 * torch.ones(2)))
        locs = pyro.sample("locs", dist.Normal(0, 10).expand_by([2]).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0, 1))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(shares.expand(len(data), 2)))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    guide = AutoGuideList(model)
    guide.append(GUIDES[structure](poutine.block(model, hide=["assignment"])))
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["assignment"])))
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    assert math.isfinite(elbo.loss_and_grads(model, guide, data))


# ---- regression and prediction ------------------------------------------------------------------


class RandomLinear(nn.Linear, PyroModule):
    """A layer of Pyro's own kind, its weights given priors by hand."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([outputs, inputs]).to_event(2))
        self.bias = PyroSample(dist.Normal(0.0, 10.0).expand([outputs]).to_event(1))


class LinearRegression(PyroModule):
    """Of 10 data, in a plate that knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = RandomLinear(3, 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.linear(x).squeeze(-1)
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("plate", 10):
            return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


@each
@every_elbo
def test_linear_regression(structure: str, elbo: str) -> None:
    model = LinearRegression()
    guide = GUIDES[structure](model)
    svi = SVI(model, guide, Adam({"lr": 0.005}), ELBOS[elbo]())
    assert math.isfinite(svi.step(*line(10)))
    assert guide.sites == {"linear.weight": (1, 3), "linear.bias": (1,)}


@each
def test_predictive_has_all_sites(structure: str) -> None:
    model, (x, y) = LinearRegression(), line(10)
    guide = GUIDES[structure](model)
    guide(x, y=y)
    sites = prune_subsample_sites(poutine.trace(model).get_trace(x, y=None)).stochastic_nodes
    predictive = Predictive(model, guide=guide, num_samples=10)
    pyro.set_rng_seed(0)
    samples = predictive(x)
    assert set(sites) <= set(samples)
    pyro.set_rng_seed(0)
    again = predictive(x)
    assert all(torch.equal(samples[site], again[site]) for site in samples)


@each
def test_draws_in_parallel(structure: str) -> None:
    """Of the guide alone, with the moments of the posterior."""
    ngvi, data = trained(structure)
    n = 4_000
    samples = Predictive(ngvi.guide, num_samples=n, parallel=True)(*data)
    for name, shape in ngvi.guide.sites.items():
        assert samples[name].shape == (n, *shape)
        marginal = ngvi.guide.get_posterior(name)
        error = marginal.stddev / math.sqrt(n)
        assert ((samples[name].mean(0) - marginal.mean).abs() < 5 * error).all()


@each
def test_particles_in_a_vector(structure: str) -> None:
    guide, data = GUIDES[structure](batched), line()
    guide(*data)
    assert guide.sites == {"w": (1, 3)}
    vector = Trace_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1)
    single = torch.tensor([Trace_ELBO().loss(batched, guide, *data) for _ in range(40)])
    error = single.std() * math.sqrt(1 / 400 + 1 / 40)
    assert (vector.loss(batched, guide, *data) - single.mean()).abs() < 5 * error


@each
def test_particles_in_a_vector_for_a_network(structure: str) -> None:
    model, data = regressor(), regression_data()
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    with pytest.raises(ValueError, match="vectorize_particles=True: 'net.0.weight' is a weight of"):
        elbo.loss(model, GUIDES[structure](model), *data)


# ---- plates and subsampling ---------------------------------------------------------------------


@each
def test_replay_under_plates(structure: str) -> None:
    def model(scales: Tensor) -> None:
        plate = pyro.plate("plate", 4)
        with plate:
            pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with plate, pyro.plate("outer", 2, dim=-2):
            pyro.sample("c", dist.LogNormal(torch.zeros(2, 1), 1.0))
            pyro.sample("obs", dist.Normal(0.0, 1.0), obs=scales)

    guide, data = GUIDES[structure](model), torch.ones(2, 4)
    guide(data)
    guide_trace = poutine.trace(guide).get_trace(data)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(data)
    check_model_guide_match(model_trace, guide_trace)
    model_trace.compute_log_prob(), guide_trace.compute_log_prob()
    for name, shape in {"a": (4,), "b": (3,), "c": (2, 4)}.items():
        assert model_trace.nodes[name]["value"] is guide_trace.nodes[name]["value"]
        assert guide_trace.nodes[name]["value"].shape == shape


def local_noise(x: Tensor, y: Tensor, batch_size: int | None = None) -> Tensor:
    """A noise of its own for each datum, drawn for the data in the batch."""
    loc = pyro.param("loc", lambda: torch.tensor(0.0))
    with pyro.plate("batch", len(x), subsample_size=batch_size) as index:
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        mean = loc + pyro.subsample(x, event_dim=0)
        pyro.sample("obs", dist.Normal(mean, sigma), obs=pyro.subsample(y, event_dim=0))
    return index


@each
def test_subsample_of_the_model(structure: str) -> None:
    x, y = torch.randn(50), torch.randn(50)
    guide = GUIDES[structure](local_noise)
    svi = SVI(local_noise, guide, Adam({"lr": 0.02}), Trace_ELBO())
    assert all(math.isfinite(svi.step(x, y, batch_size=20)) for _ in range(5))
    trace = poutine.trace(guide).get_trace(x, y, batch_size=20)
    index = poutine.replay(local_noise, trace)(x, y, batch_size=20)
    assert torch.equal(index, trace.nodes["batch"]["value"]), "model and guide draw the same data"


@each
def test_natural_gradients_subsample_model_and_guide_alike(structure: str) -> None:
    """The local latents of a step are those of the data that the model sees in it."""

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(1, 3), 1.0).to_event(2))
        with pyro.plate("batch", len(x), subsample_size=5) as index:
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            mean = nn.functional.linear(x[index], w)[:, 0] + shift
            pyro.sample("obs", dist.Normal(mean, 0.1), obs=y[index])
        seen.append(index.clone())

    class Local(AutoNormal):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            result = super().forward(*args, **kwargs)
            drawn.append(self._create_plates()["batch"].indices.clone())
            return result

    seen: list[Tensor] = []
    drawn: list[Tensor] = []
    ngvi = NGVI(model, GUIDES[structure](model, fallback=Local))
    data = line(40)
    ngvi.step(*data)
    if not isinstance(getattr(ngvi.guide, "fallback", None), Local):
        pytest.skip("a guide that has the local latents itself")
    seen.clear(), drawn.clear()
    for _ in range(4):
        ngvi.step(*data)
    assert len(seen) == len(drawn) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen, drawn, strict=True))


@each
def test_data_that_the_model_chose_are_asked_of_the_guide(structure: str) -> None:
    """Pyro puts the guide's rows in place of the model's, without a word."""

    def model(x: Tensor, y: Tensor, rows: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(1, 3), 1.0).to_event(2))
        with pyro.plate("batch", 40, subsample=rows):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            mean = nn.functional.linear(x, w)[:, 0] + shift
            pyro.sample("obs", dist.Normal(mean, 0.1), obs=y)

    def create_plates(x: Tensor, y: Tensor, rows: Tensor) -> pyro.plate:
        return pyro.plate("batch", 40, subsample=rows)

    x, y = line(40)
    batches = [(x[rows], y[rows], rows) for rows in torch.randperm(40).split(15)]
    guide = GUIDES[structure](model)
    ngvi = NGVI(model, guide)
    guide(*batches[0])
    if guide.fallback_sites:
        with pytest.raises(ValueError, match="subsamples plate 'batch' itself.*create_plates"):
            ngvi.step(*batches[0])
    ngvi = NGVI(model, GUIDES[structure](model, create_plates=create_plates))
    assert all(math.isfinite(ngvi.step(*batch)) for batch in batches)
    assert ngvi.guide.median()["shift"].shape == (40,)


@each
@pytest.mark.parametrize("start", [None, init_to_mean, init_to_median])
def test_subsample_of_the_guide(structure: str, start: Callable[[Any], Tensor] | None) -> None:
    """The state-space model of Pyro's tutorial on guides, in mini-batches by `create_plates`."""

    def model(batch: Any, subsample: Tensor, full_size: int) -> Tensor:
        drift, states = pyro.sample("drift", dist.LogNormal(-1, 0.5)), []
        with pyro.plate("data", full_size, subsample=subsample):
            z: Any = 0.0
            for t, now in enumerate(batch):
                z = pyro.sample(f"state_{t}", dist.Normal(z, drift))
                states.append(pyro.sample(f"obs_{t}", dist.Bernoulli(logits=z), obs=now))
        return torch.stack(states)

    def create_plates(batch: Tensor, subsample: Tensor, full_size: int) -> pyro.plate:
        return pyro.plate("data", full_size, subsample=subsample)

    data = model([None] * 8, torch.arange(50), 50)
    pyro.clear_param_store()
    kwargs = {} if start is None else {"init_loc_fn": start}
    guide = GUIDES[structure](model, create_plates=create_plates, **kwargs)
    svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO())
    for begin in (0, 20, 40):
        rows = torch.arange(begin, min(50, begin + 20))
        assert math.isfinite(svi.step(data[:, rows], rows, full_size=50))


@each
@pytest.mark.parametrize("independent", [True, False])
def test_two_plates_of_the_guide(structure: str, independent: bool) -> None:
    def model(data: Tensor) -> None:
        size = len(data)
        weight = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("origin", size, dim=-2), pyro.plate("destin", size, dim=-1):
            batch = pyro.subsample(data, event_dim=0)
            assert batch.size(0) == batch.size(1)
            pyro.sample("obs", dist.Normal(weight, 1), obs=batch)

    def create_plates(data: Tensor) -> tuple[pyro.plate, pyro.plate]:
        origin = pyro.plate("origin", len(data), subsample_size=5, dim=-2)
        if independent:
            return origin, pyro.plate("destin", len(data), subsample_size=5, dim=-1)
        with origin as subsample:
            pass
        return origin, pyro.plate("destin", len(data), subsample=subsample, dim=-1)

    guide = GUIDES[structure](model, create_plates=create_plates)
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step(torch.randn(10, 10))) for _ in range(2))


# ---- errors -------------------------------------------------------------------------------------


@each
def test_discrete_helpful_error(structure: str) -> None:
    def model() -> None:
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        pyro.sample("x", dist.Bernoulli(p))
        observe()

    with pytest.raises(ValueError, match="'x' is discrete .Bernoulli.*hide it.*enumeration"):
        GUIDES[structure](model)()


@each
def test_sphere_helpful_error(structure: str) -> None:
    def model() -> None:
        pyro.sample("x", dist.ProjectedNormal(torch.tensor([1.0, 0.0, 0.0])))
        observe()

    with pytest.raises(ValueError, match="ProjectedNormalReparam"):
        GUIDES[structure](model)()


@each
def test_an_empty_model(structure: str) -> None:
    for model in (lambda: None, observe):
        with pytest.raises(ValueError, match="no latent"):
            GUIDES[structure](model)()


# ---- tracing and drawing ------------------------------------------------------------------------


@each
def test_call_gives_the_values_by_name(structure: str) -> None:
    guide, data = GUIDES[structure](regressor(noise=None)), regression_data()
    names = sorted(guide(*data))
    pyro.set_rng_seed(0)
    values = guide(*data)
    pyro.set_rng_seed(0)
    called = guide.call(*data)
    assert all(torch.equal(values[n], value) for n, value in zip(names, called, strict=True))


@each
def test_torchscript(structure: str) -> None:
    """As Pyro's guides are serialized: a traced guide, saved, loaded, draws what the guide does."""
    guide, data = GUIDES[structure](regressor(noise=None)), regression_data()
    guide(*data)
    pyro.set_rng_seed(0)
    expected = guide.call(*data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, and that it is to be retired
        traced = torch.jit.trace_module(guide, {"call": data}, check_trace=False)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        again = torch.jit.load(file)
        pyro.set_rng_seed(0)
        actual = again.call(*data)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    own = dict(guide.named_parameters())
    loaded = dict(again.named_parameters())
    assert own.keys() == loaded.keys()
    assert all(torch.equal(own[name], loaded[name]) for name in own)


@each
def test_the_graph_of_model_and_guide(structure: str) -> None:
    model, data = regressor(noise=None), regression_data()
    guide = GUIDES[structure](model)
    guide(*data)
    relations = get_model_relations(guide, data)
    assert set(guide.sites) <= set(relations["sample_sample"])
    assert relations["sample_sample"]["net.0.weight"] == [
        f"_{guide.blocks[0]._pyro_name}_latent"
    ]
    assert set(get_model_relations(model, data)["sample_dist"]) == {*guide.sites, "sigma", "obs"}
    pytest.importorskip("graphviz")
    assert "net.0.weight" in pyro.render_model(model, model_args=data).source
    assert "net.0.weight" in pyro.render_model(guide, model_args=data).source


@each
def test_inputs_of_another_length(structure: str) -> None:
    ngvi, _ = trained(structure)
    samples = Predictive(ngvi.model, guide=ngvi.guide, num_samples=2)(inputs(7))
    assert samples["obs"].shape == (2, 7, 2)


def test_a_guide_of_a_function_and_one_of_a_bound_method() -> None:
    model, data = regressor(), regression_data()
    guides = KFACGuide(model.forward), KFACGuide(lambda *args: model(*args))
    assert all(guide(*data).keys() == KFACGuide(model)(*data).keys() for guide in guides)
    assert NUM_DATA == len(data[0])
