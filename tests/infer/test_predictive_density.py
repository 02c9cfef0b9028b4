"""Log densities at many samples at once: against a plain loop over the samples."""

import gc
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from toys import NUM_DATA, class_data, mlp, regression_data, regressor

from pyrocurv.curvature import KFAC
from pyrocurv.guides import EKFACGuide, FullGuide, KFACGuide, MixtureGuide
from pyrocurv.handlers.modules import modules
from pyrocurv.infer import NGVI, log_predictive_density, predictive_density
from pyrocurv.nn import Classifier, Regressor, bayesianize
from pyrocurv.runtime.module_state import eval_mode
from pyrocurv.runtime.rng import RandomStream

SAMPLES = 13
Case = tuple[Any, Any, Any]  # model, guide, arguments
CPU = torch.device("cpu")


def trained(model: Any, guide: Any, *args: Any, **options: Any) -> Case:
    ngvi = NGVI(model, guide, **options)
    for _ in range(3):
        ngvi.step(*args)
    return model, guide, args


# ---- the loop -----------------------------------------------------------------------------------


def draw(guide: Any, args: Any) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for family in guide.blocks:
        z = torch.randn_like(family.raw_loc)
        weights.update(family.block.unpack(family.raw_loc + family.precision().rsqrt_(z)))
    values = guide.constrain(weights)[0]
    return {**values, **guide.fallback(*args)} if guide.fallback_sites else values


def density_of_sample(model: Any, values: dict[str, Tensor], args: Any) -> Tensor:
    """[B], without masked data."""
    trace = poutine.trace(poutine.condition(model, values)).get_trace(*args)
    sites = [
        site for name, site in trace.nodes.items()
        if site["type"] == "sample" and site["is_observed"] and name not in values
        and not poutine.util.site_is_subsample(site) and site["cond_indep_stack"]
    ]
    each = torch.stack([site["fn"].log_prob(site["value"]) for site in sites]).sum(0)
    mask = sites[0]["mask"]
    return each if mask is None else each[mask]


@torch.no_grad()
def by_loop(model: Any, guide: Any, batches: Sequence[Any], num_samples: int = SAMPLES) -> float:
    leaves = guide.leaves if isinstance(guide, MixtureGuide) else [guide]
    seed, densities = RandomStream().seed, []
    for args in batches:
        with RandomStream(seed)(CPU), eval_mode(modules(model)):
            each = []
            for number in range(num_samples):
                component = leaves[number % len(leaves)]
                own = guide.tensors_of(component) if isinstance(guide, MixtureGuide) else {}
                each.append(density_of_sample(model, {**draw(component, args), **own}, args))
        densities.append(torch.stack(each).logsumexp(0) - math.log(num_samples))
    return float(torch.cat(densities).double().mean())


def outcome(score: Callable[..., float], *args: Any, seed: int = 1) -> Any:
    """The score, or the type of the error."""
    torch.manual_seed(seed)
    try:
        return score(*args)
    except ValueError:
        return ValueError


# ---- models -------------------------------------------------------------------------------------


def classifier() -> Case:
    model = Classifier(mlp(outputs=3), NUM_DATA)
    return trained(model, EKFACGuide(model), *class_data())


def truncated() -> Case:
    net = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    model = Classifier(bayesianize(net), NUM_DATA)
    guide = KFACGuide(model, structure={"*": KFAC(rank=2)})
    return trained(model, guide, *class_data())


def convolutional() -> Classifier:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    return Classifier(bayesianize(net), NUM_DATA)


def images(shift: float = 0.0) -> tuple[Tensor, Tensor]:
    return torch.randn(NUM_DATA, 1, 4, 4).double() + shift, torch.randint(3, (NUM_DATA,))


def batch_norm() -> Case:
    model = convolutional()
    return trained(model, KFACGuide(model), *images())


def mixture() -> Case:
    cases = [trained(m := convolutional(), KFACGuide(m), *images(shift)) for shift in (0.0, 2.0)]
    return cases[1][0], MixtureGuide([case[1] for case in cases]), cases[0][2]


def latent_noise() -> Case:
    model = regressor(noise=None)
    return trained(model, KFACGuide(model), *regression_data())


def point_estimate() -> Case:
    model = Classifier(mlp(outputs=3), NUM_DATA)
    return trained(model, KFACGuide(model, structure={"net.2": "point"}), *class_data())


def heteroscedastic() -> Case:
    model = Regressor(mlp(outputs=4), NUM_DATA, noise="heteroscedastic")
    return trained(model, KFACGuide(model), *regression_data())


def masked() -> Case:
    net = mlp()

    def model(x: Tensor, y: Tensor, keep: Tensor) -> None:
        mean = net(x)
        with poutine.scale(scale=0.3), pyro.plate("data", NUM_DATA, subsample=x[:, 0]):
            with poutine.mask(mask=keep):
                pyro.sample("obs", dist.Normal(mean, 0.3).to_event(1), obs=y)

    return trained(model, KFACGuide(model), *regression_data(), torch.arange(NUM_DATA) % 3 > 0)


def two_sites() -> Case:
    net = mlp(outputs=3)

    def model(x: Tensor, y: Tensor) -> None:
        output = net(x)
        with pyro.plate("data", NUM_DATA, subsample=x[:, 0]):
            pyro.sample("obs", dist.Normal(output[:, :2], 0.3).to_event(1), obs=y)
            pyro.sample("sign", dist.Bernoulli(logits=output[:, 2]), obs=(y[:, 0] > 0).double())
        pyro.sample("total", dist.Normal(output.sum(), 1.0), obs=torch.tensor(3.0).double())

    args = regression_data()
    guide = KFACGuide(model)
    guide(*args)
    return model, guide, args


def joint() -> Case:
    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 1.0))
        share = pyro.sample("share", dist.Dirichlet(x.new_ones(3)))
        with pyro.plate("groups", 3):
            level = pyro.sample("level", dist.Gamma(x.new_full((), 2.0), 2.0))
        with pyro.plate("data", NUM_DATA, subsample=x[:, 0]):
            pyro.sample("obs", dist.Normal(x @ slope + share @ level, scale), obs=y[:, 0])

    case = trained(model, FullGuide(model), *regression_data(), curvature="hessian")
    assert case[1].is_joint and case[1].has_constrained
    return case


def branching() -> Case:
    """Which vmap cannot run."""
    net = mlp()

    def model(x: Tensor, y: Tensor) -> None:
        mean = net(x)
        mean = mean + 1 if mean.sum() > 0 else mean
        with pyro.plate("data", NUM_DATA, subsample=x[:, 0]):
            pyro.sample("obs", dist.Normal(mean, 0.3).to_event(1), obs=y)

    return trained(model, KFACGuide(model), *regression_data())


def drawing() -> Case:
    """Random numbers of the model, between those of the samples."""
    net = mlp()

    def model(x: Tensor, y: Tensor) -> None:
        mean = net(x + torch.randn_like(x))
        with pyro.plate("data", NUM_DATA, subsample=x[:, 0]):
            pyro.sample("obs", dist.Normal(mean, 0.3).to_event(1), obs=y)

    return trained(model, KFACGuide(model), *regression_data())


AT_ONCE = [
    classifier, truncated, batch_norm, mixture, latent_noise, point_estimate, heteroscedastic,
    masked, two_sites, joint,
]
ONE_BY_ONE = {branching: 1, drawing: 0}  # and the runs in which vmap is tried


# ---- tests --------------------------------------------------------------------------------------


class Statements(Messenger):
    """Counts how often the model is run: its observed statements."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def _pyro_sample(self, msg: Any) -> None:
        self.count += msg["name"] == "obs"


def counted(model: Any, statements: Statements) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with statements:
            return model(*args)

    return run


def halves(args: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Two batches, of different sizes."""
    return [tuple(x[:11] for x in args), tuple(x[11:] for x in args)]


@pytest.mark.parametrize("make", [*AT_ONCE, *ONE_BY_ONE])
def test_the_density_is_that_of_a_loop(make: Callable[[], Case]) -> None:
    """And how often the model runs; whether vmap can run it is tried once."""
    model, guide, args = make()
    batches, statements = halves(args), Statements()
    buffers = [x for m in modules(model) for x in m.buffers()]
    before = [x.clone() for x in buffers]
    wanted = outcome(by_loop, model, guide, batches)
    run = counted(model, statements)
    num_runs = 1 + len(guide.leaves if isinstance(guide, MixtureGuide) else [guide])
    num_runs = num_runs if make in AT_ONCE else SAMPLES
    for num_tries in (ONE_BY_ONE.get(make, 2), 0):
        statements.count = 0
        found = outcome(log_predictive_density, run, guide, batches, SAMPLES)
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9)
        assert statements.count == len(batches) * (num_runs + num_tries)
    assert all(map(torch.equal, buffers, before)) and all(m.training for m in modules(model))


@pytest.mark.parametrize("make", [classifier, mixture, latent_noise, joint])
@pytest.mark.parametrize("size", [1, 5, 12])
def test_groups_of_samples(
    make: Callable[[], Case], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which are as large as the memory of the weights allows."""
    model, guide, args = make()
    wanted = outcome(by_loop, model, guide, [args])
    elements = sum(math.prod(shape) for shape in guide.sites.values())
    monkeypatch.setattr(predictive_density, "MAX_CPU_ELEMENTS", size * elements)
    found = outcome(log_predictive_density, model, guide, [args], SAMPLES)
    assert found == pytest.approx(wanted, rel=1e-9)


def test_errors_at_later_samples_are_those_of_the_loop() -> None:
    """A scale that is negative at some samples, which vmap's runs do not notice."""
    def model(x: Tensor, y: Tensor) -> None:
        scale = pyro.sample("scale", dist.Normal(x.new_ones(1), 1.0).to_event(1))
        with pyro.plate("data", NUM_DATA, subsample=x[:, 0]):
            pyro.sample("obs", dist.Normal(0.0, scale), obs=y[:, 0])

    guide = FullGuide(model, init_scale=0.5, init_loc_fn=lambda site: torch.ones(1).double())
    args = regression_data()
    guide(*args)
    found = []
    for seed in range(12):
        wanted = outcome(by_loop, model, guide, [args], seed=seed)
        found.append(outcome(log_predictive_density, model, guide, [args], SAMPLES, seed=seed))
        assert found[-1] == (wanted if wanted is ValueError else pytest.approx(wanted))
    assert ValueError in found and len({*found}) > 2


@pytest.mark.parametrize("is_inside", [True, False])
def test_autocast(is_inside: bool) -> None:
    """Of the model, or around the call."""
    net = bayesianize(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)))
    classify = Classifier(net, NUM_DATA)

    def model(x: Tensor, y: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            classify(x, y)

    x, y = class_data()
    guide = KFACGuide(model)
    guide(x.float(), y)
    chosen, batches = (model if is_inside else classify), [(x.float(), y)]
    with torch.autocast("cpu", torch.bfloat16, enabled=not is_inside):
        wanted = outcome(by_loop, chosen, guide, batches)
        found = outcome(log_predictive_density, chosen, guide, batches, SAMPLES)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_handlers_outside_see_each_run() -> None:
    model, guide, args = classifier()
    with Statements() as statements:
        log_predictive_density(model, guide, [args], SAMPLES)
    assert statements.count == SAMPLES


def test_no_guide_is_kept_alive() -> None:
    model, guide, args = classifier()
    log_predictive_density(model, guide, [args], SAMPLES)
    number = len(predictive_density._runners)
    assert guide in predictive_density._runners
    del model, guide, args
    gc.collect()
    assert len(predictive_density._runners) < number
