"""What Pyro's own tests of its autoguides ask, asked of the guides here.

The cases are those of Pyro's tests/infer/test_autoguide.py (1.9.2), with `FullGuide` in place of
`AutoMultivariateNormal`, `DiagonalGuide` in place of `AutoDiagonalNormal`, and `KFACGuide`, which
leaves latents that are no weights to its fallback guide, in place of `AutoNormal`. Amortized guides
are left out. Guides are trained in fewer steps.
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
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
)
from pyro.infer.autoguide import (
    AutoCallable,
    AutoDelta,
    AutoDiscreteParallel,
    AutoGuide,
    AutoGuideList,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
)
from pyro.infer.reparam import ProjectedNormalReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import Adam, ClippedAdam
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match
from torch import Tensor, nn
from torch.distributions import constraints

from pyrocurv.guides import DiagonalGuide, FullGuide, KFACGuide

NUM_CASES = 270  # at least
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(no supported op|left to the fallback)", "ignore::torch.jit.TracerWarning",
    "ignore:.torch.jit.*deprecated",
)
TWO = {"full": FullGuide, "diag": DiagonalGuide}
THREE = {**TWO, "kfac": KFACGuide}
STARTS = {
    "feasible": init_to_feasible, "mean": init_to_mean, "median": init_to_median,
    "sample": init_to_sample,
}  # fmt: skip
PLAIN = {"trace": Trace_ELBO, "graph": TraceGraph_ELBO, "enum": TraceEnum_ELBO}
Make = Callable[[Any], Any]
three = pytest.mark.parametrize("name", THREE)
every_start = pytest.mark.parametrize("start", STARTS)
every_elbo = pytest.mark.parametrize("elbo", PLAIN)


class ByHand(AutoGuide):
    """A guide of x with parameters of its own."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.x_loc = nn.Parameter(torch.tensor(1.0))
        self.x_scale = PyroParam(torch.tensor(0.1), constraints.positive)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {"x": pyro.sample("x", dist.Normal(self.x_loc, self.x_scale))}

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {"x": self.x_loc.detach()}


def beside_a_point(model: Any) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["x"])))
    guide.append(DiagonalGuide(poutine.block(model, hide=["x"])))
    return guide


def beside_a_callable(model: Any) -> AutoGuideList:
    def guide_x() -> None:
        loc = pyro.param("x_loc", torch.tensor(1.0))
        scale = pyro.param("x_scale", torch.tensor(0.1), constraint=constraints.positive)
        pyro.sample("x", dist.Normal(loc, scale))

    guide = AutoGuideList(model)
    guide.append(AutoCallable(model, guide_x, lambda: {"x": pyro.param("x_loc")}))
    guide.append(DiagonalGuide(poutine.block(model, hide=["x"])))
    return guide


def beside_a_module(model: Any) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.custom = ByHand(model)
    guide.rest = DiagonalGuide(poutine.block(model, hide=["x"]))
    return guide


def nested(model: Any) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["x"])))
    inner = AutoGuideList(poutine.block(model, expose=["y"]))
    inner.z = FullGuide(poutine.block(model, expose=["y"]))
    guide.append(inner)
    return guide


def started(*names: str) -> dict[str, Make]:
    return {f"diag-{n}": functools.partial(DiagonalGuide, init_loc_fn=STARTS[n]) for n in names}


LISTS: dict[str, Make] = {
    "point": beside_a_point, "callable": beside_a_callable, "module": beside_a_module
}
MANY: dict[str, Make] = {**THREE, **LISTS, **started(*STARTS)}


def make_elbo(elbo: str, **options: Any) -> Any:
    return PLAIN[elbo](strict_enumeration_warning=False, **options)


def train(model: Any, guide: Any, elbo: Any, steps: int, last: float, *data: Tensor) -> None:
    """SVI with a learning rate that falls from 0.2 to `last`."""
    optim = ClippedAdam({"lr": 0.2, "lrd": (last / 0.2) ** (1 / steps), "betas": (0.8, 0.95)})
    svi = SVI(model, guide, optim, elbo)
    for _ in range(steps):
        svi.step(*data)


# ---- scores and shapes --------------------------------------------------------------------------


@three
def test_scores(name: str) -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = THREE[name](model)
    guide_trace = poutine.trace(guide).get_trace()
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace()
    guide_trace.compute_log_prob(), model_trace.compute_log_prob()
    if name in TWO:
        latent = f"_{type(guide).__name__}_latent"
        assert latent not in model_trace.nodes and guide_trace.nodes[latent]["log_prob_sum"] != 0
        assert guide_trace.nodes["z"]["log_prob_sum"] == 0
    assert model_trace.nodes["z"]["log_prob_sum"] != 0


@three
@every_elbo
def test_factor(name: str, elbo: str) -> None:
    def model(log_factor: Tensor) -> None:
        pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.factor("f1", log_factor)
        pyro.sample("z2", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
        with pyro.plate("plate", 3):
            pyro.factor("f2", log_factor)
            pyro.sample("z3", dist.Normal(torch.zeros(3), torch.ones(3)))

    guide, loss = THREE[name](model), make_elbo(elbo)
    loss.loss(model, guide, torch.tensor(0.0))
    losses = []
    for log_factor in (5.0, 4.0):
        pyro.set_rng_seed(123)
        losses.append(loss.loss(model, guide, torch.tensor(log_factor)))
    assert losses[0] - losses[1] == pytest.approx(-4, abs=1e-4)


@pytest.mark.parametrize("num_particles", [1, 10])
@every_elbo
@every_start
@three
def test_shapes(name: str, start: str, elbo: str, num_particles: int) -> None:
    def model() -> None:
        pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.sample("z2", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
        with pyro.plate("plate", 3):
            pyro.sample("z3", dist.Normal(torch.zeros(3), torch.ones(3)))
        pyro.sample("z4", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
        pyro.sample("z5", dist.Dirichlet(torch.ones(3)))
        pyro.sample("z6", dist.Normal(0, 1).expand((2,)).mask(torch.arange(2) > 0).to_event(1))
        pyro.sample("z7", dist.LKJCholesky(2, torch.tensor(1.0)))

    guide = THREE[name](model, init_loc_fn=STARTS[start])
    loss = make_elbo(elbo, num_particles=num_particles, vectorize_particles=True)
    assert math.isfinite(loss.loss(model, guide))


@three
@pytest.mark.parametrize("elbo", ["trace", "graph"])
def test_sequential_plates_are_refused(name: str, elbo: str) -> None:
    """As by Pyro's guides; here with an error that says so."""

    def model() -> None:
        pyro.sample("x", dist.Normal(0, 1))
        for i in pyro.plate("plate", 3):
            pyro.sample(f"y_{i}", dist.Normal(0, 1).expand_by([2, 1 + i, 2]).to_event(3))
        pyro.sample("obs", dist.Bernoulli(0.1), obs=torch.tensor(0))

    svi = SVI(model, THREE[name](model), Adam({"lr": 1e-6}), make_elbo(elbo))
    with pytest.raises(ValueError, match="'y_0' is in a sequential plate"):
        svi.step()


@pytest.mark.parametrize("shape", [(), (6,), (5, 4)], ids=str)
@pytest.mark.parametrize("name", {**THREE, **started("mean", "median")})
def test_replay_in_plates(name: str, shape: tuple[int, ...]) -> None:
    def model() -> tuple[Tensor, ...]:
        a = pyro.sample("a", dist.Normal(0, 1))
        b = pyro.sample("b", dist.Normal(a[..., None], torch.ones(3)).to_event(1))
        c = pyro.sample(
            "c", dist.MultivariateNormal(torch.zeros(3) + a[..., None], torch.eye(3))
        )
        with pyro.plate("i", 2):
            d = pyro.sample("d", dist.Dirichlet((b + c).exp()))
            pyro.sample("e", dist.Categorical(logits=d), obs=torch.tensor([0, 0]))
        return a, b, c, d

    guide = MANY[name](model)
    with pyro.plate_stack("particles", shape, rightmost_dim=-2):
        guide_trace = poutine.trace(guide).get_trace()
        a, b, c, d = poutine.replay(model, guide_trace)()
    one = (*shape, 1) if shape else ()
    assert (a.shape, b.shape, c.shape, d.shape) == (one, (*one, 3), (*one, 3), (*shape, 2, 3))


# ---- median and quantiles -----------------------------------------------------------------------


def three_supports() -> None:
    pyro.sample("y", dist.LogNormal(0.0, 1.0))
    pyro.sample("z", dist.Beta(2.0, 2.0).expand([2]).to_event(1))
    pyro.sample("x", dist.Normal(0.0, 1.0))


@every_elbo
@pytest.mark.parametrize("name", MANY)
def test_median(name: str, elbo: str) -> None:
    guide = MANY[name](three_supports)
    loss = make_elbo(elbo, num_particles=50, vectorize_particles=True)
    far = name not in ("full", "diag", "kfac", "point", "diag-median")  # from the median
    train(three_supports, guide, loss, 40 if far else 10, 0.02)
    median = guide.median()
    for latent, truth in {"x": 0.0, "y": 1.0, "z": 0.5}.items():
        assert (median[latent] - truth).abs().max() < 0.1


@three
@every_elbo
def test_quantiles(name: str, elbo: str) -> None:
    guide = THREE[name](three_supports, init_scale=0.4)
    loss = make_elbo(elbo, num_particles=50, vectorize_particles=True)
    train(three_supports, guide, loss, 40 if name == "kfac" else 20, 0.05)
    median, quantiles = guide.median(), guide.quantiles([0.1, 0.5, 0.9])
    for latent, shape in {"x": (), "y": (), "z": (2,)}.items():
        assert quantiles[latent].shape == (3, *shape) and not quantiles[latent].requires_grad
        torch.testing.assert_close(quantiles[latent][1], median[latent])
    (a, b, c), (d, e, f), (g, h, i) = (quantiles[latent] for latent in ("x", "y", "z"))
    assert -3 < a and a + 1 < b and b + 1 < c and c < 3
    assert d > 0.01 and d * 2 < e and e * 2 < f and f < 100
    assert (g > 0.01).all() and (g + 0.1 < h).all() and (h + 0.1 < i).all() and (i < 0.99).all()


@every_elbo
@pytest.mark.parametrize("name", {**THREE, **LISTS, **started("mean", "median")})
def test_median_of_a_module(name: str, elbo: str) -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.x_loc = nn.Parameter(torch.tensor(1.0))
            self.x_scale = PyroParam(torch.tensor(0.1), constraints.positive)

        def forward(self) -> None:
            x = pyro.sample("x", dist.Normal(self.x_loc, self.x_scale))
            pyro.sample("y", dist.Normal(2.0, 0.1))
            pyro.sample("z", dist.Normal(1.0, 0.1), obs=x)

    model = Model()
    guide = MANY[name](model)
    svi = SVI(model, guide, Adam({"lr": 0.005}), make_elbo(elbo))
    for _ in range(5):
        svi.step()
    median = guide.median()
    assert median["x"].item() == pytest.approx(1.0, abs=0.1)
    assert median["y"].item() == pytest.approx(2.0, abs=0.1)


# ---- files --------------------------------------------------------------------------------------


def in_a_plate() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("plate", 2):
        pyro.sample("y", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Beta(2.0, 2.0))


SAVED = {**TWO, "point": beside_a_point, "module": beside_a_module, "nested": nested,
         **started(*STARTS)}


@pytest.mark.parametrize("jit", [False, True], ids=["nojit", "jit"])
@pytest.mark.parametrize("name", SAVED)
def test_serialization(name: str, jit: bool) -> None:
    guide, file = SAVED[name](in_a_plate), io.BytesIO()
    guide()
    pyro.set_rng_seed(0)
    expected = guide.call()
    parameters = {key: value.data for key, value in guide.named_parameters()}
    if jit:
        torch.jit.save(torch.jit.trace_module(guide, {"call": ()}, check_trace=False), file)
        pyro.clear_param_store()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(guide, file)
    del guide
    file.seek(0)
    loaded = torch.jit.load(file) if jit else torch.load(file, weights_only=False)
    pyro.set_rng_seed(0)
    for value, other in zip(expected, loaded.call(), strict=True):
        torch.testing.assert_close(value, other)
    found = {key: value.data for key, value in loaded.named_parameters()}
    assert found.keys() == parameters.keys()
    assert all(torch.equal(found[key], value) for key, value in parameters.items())


# ---- lists --------------------------------------------------------------------------------------


def two_latents() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(5), torch.eye(5, 5)))


@three
def test_a_list_of_two(name: str) -> None:
    guide = AutoGuideList(two_latents)
    guide.append(THREE[name](poutine.block(two_latents, expose=["x"])))
    guide.append(THREE[name](poutine.block(two_latents, expose=["y"])))
    assert guide().keys() == {"x", "y"}


@three
@pytest.mark.parametrize("gives", [False, True], ids=["nothing", "dict"])
def test_a_callable_in_a_list(name: str, gives: bool) -> None:
    def guide_x() -> Any:
        x = pyro.sample("x", dist.Delta(pyro.param("x_loc", torch.zeros(2)), event_dim=1))
        return {"x": x} if gives else None

    guide = AutoGuideList(two_latents)
    guide.append(guide_x)
    guide.append(THREE[name](poutine.block(two_latents, expose=["y"])))
    assert guide().keys() == ({"x", "y"} if gives else {"y"})


@three
def test_discrete_latents_in_parallel(name: str) -> None:
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])

    def model(data: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        locs = pyro.sample("locs", dist.Normal(0, 10).expand_by([2]).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0, 1))
        with pyro.plate("data", len(data)):
            weights = weights.expand(torch.Size((len(data),)) + weights.shape)
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    guide = AutoGuideList(model)
    guide.append(THREE[name](poutine.block(model, hide=["assignment"])))
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["assignment"])))
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    assert math.isfinite(loss.loss_and_grads(model, guide, data))


@every_elbo
def test_nested_guides(elbo: str) -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.x_loc = nn.Parameter(torch.tensor(1.0))
            self.x_scale = PyroParam(torch.tensor(0.1), constraints.positive)

        def forward(self) -> None:
            pyro.sample("x", dist.Normal(self.x_loc, self.x_scale))
            with pyro.plate("plate", 2):
                pyro.sample("y", dist.Normal(2.0, 0.1))

    model = Model()
    guide = nested(model)
    parts = [module for module in guide.modules() if isinstance(module, AutoGuide)]
    assert all(part.master() is guide for part in parts if part is not guide)
    svi = SVI(model, guide, Adam({"lr": 0.005}), make_elbo(elbo))
    for _ in range(5):
        svi.step()
    guide_trace = poutine.trace(guide).get_trace()
    check_model_guide_match(poutine.trace(model).get_trace(), guide_trace)
    starts = "AutoGuideList.0", "AutoGuideList.1.z"
    assert all(parameter.startswith(starts) for parameter in guide_trace.param_nodes)
    assert {"x", "y", "_AutoGuideList.1.z_latent"} <= {*guide_trace.stochastic_nodes}


# ---- starts -------------------------------------------------------------------------------------


def test_a_model_without_latents_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no latent"):
        DiagonalGuide(lambda: None)()


def test_a_latent_has_the_size_of_its_unconstrained_values() -> None:
    def model() -> Tensor:
        return pyro.sample("x", dist.LKJCholesky(2, torch.tensor(1.0)))

    guide = DiagonalGuide(model)
    assert guide()["x"].shape == model().shape
    assert guide.sites == {"x": (1,)} and guide.posterior.sample().shape == (1,)


@three
def test_init_loc_fn(name: str) -> None:
    starts = {"x": torch.randn(2), "y": torch.randn(5)}
    guide = THREE[name](two_latents, init_loc_fn=lambda site: starts[site["name"]])
    guide()
    for latent, value in guide.median().items():
        torch.testing.assert_close(value, starts[latent])


@pytest.mark.parametrize("init_scale", [1e-1, 1e-4, 1e-8])
@pytest.mark.parametrize("name", TWO)
def test_init_scale(name: str, init_scale: float) -> None:
    def model() -> None:
        two_latents()
        with pyro.plate("plate", 100):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = TWO[name](model, init_scale=init_scale)
    guide()
    rms = guide.posterior.variance.double().mean().sqrt().item()
    assert init_scale / 2 < rms < 2 * init_scale


# ---- networks -----------------------------------------------------------------------------------


class RandomLinear(nn.Linear, PyroModule):
    def __init__(self, inputs: int) -> None:
        super().__init__(inputs, 1)
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, inputs]).to_event(2))
        self.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))


class Regression(PyroModule):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear = RandomLinear(inputs)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.linear(x).squeeze(-1)
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("plate", len(x)):
            return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


NETWORKS = {**THREE, **started("mean", "median")}


@every_elbo
@pytest.mark.parametrize("name", NETWORKS)
def test_a_linear_regression(name: str, elbo: str) -> None:
    model = Regression(3)
    svi = SVI(model, NETWORKS[name](model), Adam({"lr": 0.005}), make_elbo(elbo))
    assert math.isfinite(svi.step(torch.randn(10, 3), torch.randn(10)))


@pytest.mark.parametrize("name", NETWORKS)
def test_predictive(name: str) -> None:
    x, y, model = torch.randn(3, 2), torch.randn(3), Regression(2)
    guide = NETWORKS[name](model)
    guide(x, y=y)
    model_trace = poutine.trace(model).get_trace(x, y=None)
    predictive = Predictive(model, guide=guide, num_samples=2)
    samples = predictive(x)
    assert {*prune_subsample_sites(model_trace).stochastic_nodes} <= {*samples}
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace_module(predictive, {"call": (x,)}, check_trace=False), file)
    file.seek(0)
    assert len(torch.jit.load(file).call(x)) == len(samples)


# ---- errors that help ---------------------------------------------------------------------------


@three
@every_start
def test_discrete_latents_are_refused(name: str, start: str) -> None:
    def model() -> None:
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        x = pyro.sample("x", dist.Bernoulli(p))
        data = torch.tensor([1.0, 0.0])
        pyro.sample("obs", dist.Bernoulli(p * x + (1 - p) * (1 - x)), obs=data)

    with pytest.raises(ValueError, match=r"enumeration\.html"):
        THREE[name](model, init_loc_fn=STARTS[start])()


@three
@every_start
def test_spheres_are_refused(name: str, start: str) -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        y = pyro.sample("y", dist.ProjectedNormal(x))
        pyro.sample("obs", dist.Normal(y, 1), obs=torch.tensor([1.0, 0.0]))

    with pytest.raises(ValueError, match="ProjectedNormalReparam"):
        THREE[name](model, init_loc_fn=STARTS[start])()


@three
@every_start
def test_reparametrized_spheres(name: str, start: str) -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        y = pyro.sample("y", dist.ProjectedNormal(x))
        data = torch.tensor([1.0, 0.0, 0.0])
        pyro.sample("obs", dist.Normal(y, 1).to_event(1), obs=data)

    reparametrized = poutine.reparam(model, {"y": ProjectedNormalReparam()})
    guide = THREE[name](reparametrized, init_loc_fn=STARTS[start])
    trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    assert {"x", "y_normal"} <= {*trace.nodes}


# ---- exact posteriors ---------------------------------------------------------------------------


def joint(precision: list[list[float]], data: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and sd of the latents given the data, the last variables, and -log p(data)."""
    matrix = torch.tensor(precision, dtype=torch.float64)
    covariance, n = torch.linalg.inv(matrix), len(precision) - len(data)
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(len(data)).double(), covariance[n:, n:]
    )
    latents = torch.linalg.inv(matrix[:n, :n])
    mean = -latents @ matrix[:n, n:] @ data.double()
    return mean, latents.diagonal().sqrt(), -marginal.log_prob(data.double()).item()


def fit(name: str, model: Any, data: Tensor) -> tuple[Any, float, dict[str, Tensor]]:
    """The guide after SVI, its loss, and samples of it."""
    guide = THREE[name](model, init_scale=0.4)
    elbo = Trace_ELBO(num_particles=200, vectorize_particles=True)
    train(model, guide, elbo, 60, 0.004, data)
    with torch.no_grad():
        particles = pyro.plate("particles", 10_000, dim=-2)
        trace = poutine.trace(particles(guide)).get_trace(data)
        poutine.replay(particles(model), trace)(data)
        samples = {n: s["value"].flatten(1) if s["value"].dim() > 1 else s["value"]
                   for n, s in trace.nodes.items() if s["type"] == "sample"}
        return guide, elbo.loss(model, guide, data), samples


@three
def test_exact(name: str) -> None:
    def model(data: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0, 1))
        with pyro.plate("data", len(data)):
            pyro.sample("obs", dist.Normal(loc, 1), obs=data)

    data = torch.randn(3)
    precision = [[4.0, -1, -1, -1], [-1, 1, 0, 0], [-1, 0, 1, 0], [-1, 0, 0, 1]]
    mean, sd, expected = joint(precision, data)
    _, loss, samples = fit(name, model, data)
    assert samples["loc"].mean().item() == pytest.approx(mean.item(), abs=0.05)
    assert samples["loc"].std().item() == pytest.approx(sd.item(), rel=0.05)
    assert loss == pytest.approx(expected, abs=0.01)


@three
def test_exact_batch(name: str) -> None:
    def model(data: Tensor) -> None:
        with pyro.plate("data", len(data)):
            loc = pyro.sample("loc", dist.Normal(0, 1))
            pyro.sample("obs", dist.Normal(loc, 1), obs=data)

    data = torch.randn(3)
    parts = [joint([[2.0, -1], [-1, 1]], data[i : i + 1]) for i in range(3)]
    _, loss, samples = fit(name, model, data)
    for i, (mean, sd, _) in enumerate(parts):
        assert samples["loc"][:, i].mean().item() == pytest.approx(mean.item(), abs=0.05)
        assert samples["loc"][:, i].std().item() == pytest.approx(sd.item(), rel=0.05)
    assert loss == pytest.approx(sum(part[2] for part in parts), abs=0.01)


@three
def test_exact_tree(name: str) -> None:
    def model(data: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0, 1))
        with pyro.plate("data", len(data)):
            y = pyro.sample("y", dist.Normal(x, 1))
            pyro.sample("obs", dist.Normal(y, 1), obs=data)

    data = torch.randn(2)
    mean, sd, expected = joint([
        [3.0, -1, -1, 0, 0], [-1, 2, 0, -1, 0], [-1, 0, 2, 0, -1], [0, -1, 0, 1, 0],
        [0, 0, -1, 0, 1],
    ], data)
    _, loss, samples = fit(name, model, data)
    both = torch.cat([samples["x"].reshape(-1, 1), samples["y"]], 1).double()
    torch.testing.assert_close(both.mean(0), mean, atol=0.05, rtol=0)
    if name == "full":
        torch.testing.assert_close(both.std(0), sd, atol=0, rtol=0.05)
        assert loss == pytest.approx(expected, abs=0.01)


def test_the_number_of_cases(request: pytest.FixtureRequest) -> None:
    here = [item for item in request.session.items if item.path == request.path]
    if any(len([*request.session.items]) < NUM_CASES for _ in here):
        pytest.skip("a selection of the cases")
    assert len(here) - 1 >= NUM_CASES
