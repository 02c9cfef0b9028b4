"""The first call of a guide: what it takes for data, where latents start, and in which mode."""

import math
import threading
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor, nn
from toys import GUIDES, class_data, classifier, inputs, mlp, regression_data, regressor

from pyrocurv.curvature import estimate
from pyrocurv.guides import DiagonalGuide, FullGuide, KFACGuide
from pyrocurv.infer import NGVI, Laplace, Predictive
from pyrocurv.nn import Classifier, Regressor, bayesianize

each = pytest.mark.parametrize("structure", GUIDES)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(no supported op|left to the fallback|sampling a Laplace)"
)

# ---- data that were left out --------------------------------------------------------------------


@each
def test_a_site_that_is_observed_later_is_named(structure: str) -> None:
    x, y = regression_data()
    model = regressor()
    guide = GUIDES[structure](model)
    assert "obs" in guide(x)
    match = "'obs' is observed in this call, and was a latent at the first call.*make a new guide"
    for call in (
        guide, NGVI(model, guide).step, NGVI(model, guide).evaluate_loss,
        SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO()).step,
        lambda x, y: Laplace(model, guide).fit([(x, y)]),
    ):
        with pytest.raises(ValueError, match=match):
            call(x, y)
    with pytest.raises(ValueError, match=match):
        guide(x, y=y)
    fresh = GUIDES[structure](model)
    fresh(x, y)
    assert fresh.fallback_sites == () and "obs" not in fresh(x)


def test_the_second_of_two_observed_sites_is_left_out() -> None:
    net = mlp()

    def model(x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> None:
        mean = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean[:, 0], 1.0), obs=y)
            pyro.sample("z", dist.Normal(mean[:, 1], 1.0), obs=z)

    x, y = inputs(), torch.zeros(30).double()
    guide = KFACGuide(model)
    guide(x, y)
    with pytest.raises(ValueError, match="'z' is observed in this call"):
        guide(x, y, y)


@each
def test_what_needs_data_refuses_a_call_without(structure: str) -> None:
    model, (x, _) = regressor(), regression_data()
    guide = GUIDES[structure](model)
    ngvi = NGVI(model, guide)
    for call in (
        ngvi.step, ngvi.evaluate_loss, Predictive(model, guide=guide, num_samples=2),
        lambda x: Laplace(model, guide).fit([(x,)]),
    ):
        with pytest.raises(ValueError, match="no observed site.*were the data left out"):
            call(x)
        assert not guide.is_initialized and not guide.sites


def test_a_prior_alone() -> None:
    """Pyro's guides take it, and Predictive samples from it."""
    def model() -> None:
        pyro.sample("z", dist.Gamma(2.0, 2.0))

    guide = FullGuide(model)
    guide()
    assert Predictive(model, guide=guide, num_samples=3)()["z"].shape == (3,)
    with pytest.raises(ValueError, match="no observed site"):
        NGVI(model, guide, curvature="hessian").step()


# ---- discrete latents ---------------------------------------------------------------------------


def mixture(data: Tensor) -> None:
    locs = pyro.sample("locs", dist.Normal(0, 10).expand_by([2]).to_event(1))
    with pyro.plate("data", len(data)):
        assignment = pyro.sample("assignment", dist.Bernoulli(0.5))
        pyro.sample("obs", dist.Normal(locs[assignment.long()], 1.0), obs=data)


@pytest.mark.parametrize("make", [FullGuide, DiagonalGuide, KFACGuide])
def test_enumeration_is_pointed_to_and_works(make: Any) -> None:
    data = torch.tensor([0.0, 1.0, 10.0])
    with pytest.raises(ValueError, match=r"'assignment' is discrete.*TraceEnum_ELBO.*enumeration"):
        make(mixture)(data)
    guide = make(poutine.block(mixture, hide=["assignment"]))
    curvature = "fisher" if make is KFACGuide else "hessian"
    with pytest.raises(ValueError, match="does not enumerate.*TraceEnum_ELBO|no latent has a Gaus"):
        NGVI(mixture, guide, curvature=curvature).step(data)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    svi = SVI(config_enumerate(mixture), guide, pyro.optim.Adam({"lr": 0.1}), elbo)
    losses = [svi.step(data) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_left_out_classes_are_no_latent() -> None:
    model, (x, _) = classifier(), class_data()
    with pytest.raises(ValueError, match="'obs' is discrete.*its data were left out"):
        KFACGuide(model)(x)


# ---- starts -------------------------------------------------------------------------------------

PRIORS = {
    "half-normal": lambda: dist.HalfNormal(0.5), "gamma": lambda: dist.Gamma(2.0, 4.0),
    "uniform": lambda: dist.Uniform(-0.1, 0.1), "log-normal": lambda: dist.LogNormal(-1.0, 0.5),
}


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("structure", ["full", "diag", "kfac"])
@pytest.mark.usefixtures("double")
def test_weights_that_the_prior_rules_out_start_inside(structure: str, prior: str) -> None:
    layer = nn.Linear(3, 2)
    initial = layer.weight.detach().clone()
    net = bayesianize(
        layer, lambda module, name: PRIORS[prior]().expand(getattr(module, name).shape)
    )
    model, data = Regressor(net, 30, noise=0.5), regression_data()
    guide = GUIDES[structure](model)
    guide.setup(data, {}, prefers_joint=structure != "kfac")  # as NGVI does
    start = guide.median()["net.weight"]
    inside = PRIORS[prior]().support.check(initial)
    assert 0 < inside.sum() < 6 or prior == "uniform"
    if structure != "kfac":  # whose fallback starts at the median everywhere
        torch.testing.assert_close(start[inside], initial[inside])
    assert bool(PRIORS[prior]().support.check(start).all())
    if structure != "kfac":
        ngvi = NGVI(model, guide, curvature="hessian", num_particles=4)
        assert all(math.isfinite(ngvi.step(*data)) for _ in range(3))


def test_the_median_is_the_priors() -> None:
    layer = nn.Linear(3, 2)
    negative = layer.weight.detach() < 0
    net = bayesianize(
        layer, lambda module, name: dist.HalfNormal(0.5).expand(getattr(module, name).shape)
    )
    guide = FullGuide(Regressor(net, 4, noise=0.5))
    guide.setup((torch.randn(4, 3), torch.randn(4, 2)), {}, prefers_joint=True)
    expected = dist.HalfNormal(0.5).icdf(torch.tensor(0.5)).expand(int(negative.sum()))
    torch.testing.assert_close(guide.median()["net.weight"][negative], expected)


@pytest.mark.parametrize("structure", ["full", "kfac"])
@pytest.mark.parametrize("value", [-1.0, math.inf])
def test_a_start_of_the_users_outside_of_the_support(structure: str, value: float) -> None:
    model, data = regressor(noise=None), regression_data()
    start = init_to_value(values={"sigma": torch.tensor(value).double()})
    guide = GUIDES[structure](model, init_loc_fn=start)
    with pytest.raises(ValueError, match="init_loc_fn: latent 'sigma' has its values in"):
        NGVI(model, guide, curvature="hessian").step(*data)


# ---- modes --------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_guide_meets_its_model_without_gradients(structure: str, mode: Any) -> None:
    model, data = regressor(noise=None), regression_data()
    guide, other = GUIDES[structure](model), GUIDES[structure](model)
    other(*data)
    with mode():
        guide(*(part.clone() for part in data))
        assert guide.median().keys() == other.median().keys()
    assert guide.sites == other.sites and guide.fallback_sites == other.fallback_sites
    with mode():
        losses = [NGVI(model, guide).step(*data), NGVI(model, guide).evaluate_loss(*data)]
    assert all(map(math.isfinite, losses))
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO()).step(*data)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_all_entry_points_without_gradients(mode: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = class_data()
    expected = estimate(net, x, y, curvature="ggn").dense()
    model = classifier()
    fit = Laplace(model, KFACGuide(model)).fit([(x, y)])
    with mode():
        batch = x.clone(), y.clone()
        torch.testing.assert_close(estimate(net, *batch, curvature="ggn").dense(), expected)
        again = Laplace(model, KFACGuide(model)).fit([batch])
        predicted = again.predict(x.clone()).probs
        assert again.tune_prior().keys() == again.guide.sites.keys()
        samples = Predictive(model, guide=again.guide, num_samples=2)(batch[0])
    assert again.guide.sites == fit.guide.sites and samples["obs"].shape == (2, 30)
    torch.testing.assert_close(predicted, fit.predict(x).probs)
    with torch.inference_mode():  # data made there are used outside of it
        batch = x.clone(), y.clone()
    NGVI(model, again.guide).step(*batch)


def test_a_state_loaded_without_gradients() -> None:
    model, data = regressor(noise=None), regression_data()
    guide, fresh = KFACGuide(model), KFACGuide(model)
    guide(*data)
    with torch.inference_mode():
        fresh.load_state_dict(guide.state_dict())
    NGVI(model, fresh).step(*data)
    state = pyro.get_param_store().get_state()
    with torch.inference_mode():
        copies = {name: value.detach().clone() for name, value in state["params"].items()}
        pyro.get_param_store().set_state({**state, "params": copies})
    NGVI(model, fresh).step(*data)


def test_a_network_without_gradients_is_refused() -> None:
    with torch.inference_mode():
        net = nn.Linear(3, 2).double()
    with pytest.raises(ValueError, match="weight of a Linear was made under torch.inference_mode"):
        estimate(net, *class_data())
    with torch.inference_mode():
        model = Regressor(bayesianize(nn.Linear(3, 2).double()), 30, noise=0.3)
    with pytest.raises(ValueError, match="was made under torch.inference_mode"):
        KFACGuide(model)(*regression_data())


# ---- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["step", "loss", "fit", "predict", "predictive", "guide"])
def test_a_second_thread_is_refused(call: str) -> None:
    """While one thread is in a step, another is refused before anything has changed."""
    inside, leave = threading.Event(), threading.Event()
    model, data = regressor(), regression_data()

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is worker:
                inside.set(), leave.wait(10)
            return x

    waiting = Regressor(bayesianize(nn.Sequential(Waits(), nn.Linear(3, 2)).double()), 30, 0.3)
    losses: list[float] = []
    worker = threading.Thread(
        target=lambda: losses.append(NGVI(waiting, KFACGuide(waiting)).step(*data))
    )
    trained = KFACGuide(model)
    laplace = Laplace(model, trained).fit([data])
    guide = KFACGuide(model)
    calls: dict[str, Any] = {
        "step": lambda: NGVI(model, guide).step(*data),
        "loss": lambda: NGVI(model, guide).evaluate_loss(*data),
        "fit": lambda: Laplace(model, guide).fit([data]),
        "predict": lambda: laplace.predict(data[0]),
        "predictive": lambda: Predictive(model, guide=trained, num_samples=2)(data[0]),
        "guide": lambda: guide(*data),
    }
    worker.start()
    try:
        assert inside.wait(10)
        with pytest.raises(RuntimeError, match="another thread of this process"):
            calls[call]()
        assert not guide.is_initialized
    finally:
        leave.set()
        worker.join()
    assert len(losses) == 1 and math.isfinite(losses[0])
    calls[call]()


# ---- tables -------------------------------------------------------------------------------------


def test_tables_of_shapes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyrocurv.handlers.vectorized.MAX_SIGNATURES", 3)
    model = regressor()
    guide = KFACGuide(model)
    guide(*regression_data())
    predictive = Predictive(model, guide=guide, num_samples=2)
    for rows in range(1, 8):
        assert predictive(inputs(rows))["obs"].shape == (2, rows, 2)
    assert len(predictive._num_elements) == 3 == len(predictive._run_model.chunks)
    normal = AutoNormal(model)
    normal(*regression_data())
    other = Predictive(model, guide=normal, num_samples=2)
    for rows in range(1, 6):
        other(inputs(rows))
    assert len(other._run_guide.chunks) <= 3


@pytest.mark.parametrize("sizes", [(4, 8, 2), (4, 16, 3)])
def test_a_new_guide_refuses_the_state_of_another_network(sizes: tuple[int, int, int]) -> None:
    """Before its first call already, as samples of it may be all that is wanted."""
    def make(inputs: int, hidden: int, outputs: int) -> KFACGuide:
        layers = nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        return KFACGuide(Classifier(bayesianize(nn.Sequential(*layers)), 6))

    trained = make(4, 8, 3)
    trained(torch.randn(6, 4), torch.arange(6) % 3)
    guide = make(*sizes)
    with pytest.raises(ValueError, match=r"of another network: it has net\.[02]\.weight \("):
        guide.load_state_dict(trained.state_dict())
    assert not guide.sites
    make(4, 8, 3).load_state_dict(trained.state_dict())
