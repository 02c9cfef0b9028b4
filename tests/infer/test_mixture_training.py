"""`MixtureGuide`: moments, prediction, files, what it refuses; and `train_mixture`."""

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
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
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from toys import (
    GUIDES,
    NUM_DATA,
    class_data,
    classifier,
    flat,
    inputs,
    mlp,
    regression_data,
    regressor,
)

import pyrocurv
from pyrocurv.guides import EKFACGuide, KFACGuide, MixtureGuide
from pyrocurv.infer import NGVI, choose_temperature, log_predictive_density, train_mixture
from pyrocurv.nn import Regressor, bayesianize

each = pytest.mark.parametrize("structure", GUIDES)


def three(structure: str = "kfac", noise: float | None = None) -> tuple[Any, MixtureGuide]:
    """A model and a mixture of three guides of it that are far apart."""
    model, data = regressor(noise), regression_data()
    guides = []
    for _ in range(3):
        start = {name: torch.randn(shape).double() for name, shape in SITES.items()}
        guide = GUIDES[structure](model, init_loc_fn=lambda site, at=start: at.get(
            site["name"], torch.tensor(0.5).double()), init_scale=0.1)
        NGVI(model, guide, lr=0.1, kl_clip=None).step(*data)
        guides.append(guide)
    return model, MixtureGuide(guides)


SITES = {
    "net.0.weight": (4, 3), "net.0.bias": (4,), "net.2.weight": (2, 4), "net.2.bias": (2,),
}  # fmt: skip


def assert_moments(draws: Tensor, mixture: MixtureGuide) -> None:
    """Those of an equal-weight mixture of normals, within 5 standard errors; draws [n, P]."""
    n, parts = len(draws), [guide.posterior for guide in mixture]
    means = torch.stack([part.loc for part in parts]).detach()
    variances = torch.stack([part.variance for part in parts]).detach()
    mean = means.mean(0)
    off = means - mean
    variance = (variances + off**2).mean(0)
    fourth = (off**4 + 6 * off**2 * variances + 3 * variances**2).mean(0)  # central
    assert ((draws.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    error = ((fourth - variance**2) / n).sqrt()
    assert ((draws.var(0) - variance).abs() < 5 * error).all()
    assert (variance > 1.5 * variances.mean(0)).double().mean() > 0.5, "the basins are apart"


# ---- what it draws ------------------------------------------------------------------------------


@each
def test_moments(structure: str) -> None:
    _, mixture = three(structure, noise=0.3)
    samples = mixture.sample_posterior(20_000)
    assert {name: tuple(v.shape) for name, v in samples.items()} == {
        name: (20_000, *shape) for name, shape in SITES.items()
    }
    assert_moments(flat(samples, mixture.sites), mixture)


def test_moments_of_its_calls() -> None:
    _, mixture = three("block", noise=0.3)
    x = inputs(1)
    with torch.no_grad():
        calls = [mixture(x) for _ in range(800)]
    draws = {name: torch.stack([call[name] for call in calls]) for name in SITES}
    assert_moments(flat(draws, mixture.sites), mixture)


def test_draws_are_in_no_order() -> None:
    """Each is of any component, whatever came before it."""
    _, mixture = three("diag", noise=0.3)
    n = 3_000
    draws = flat(mixture.sample_posterior(n), mixture.sites)
    means = torch.stack([guide.posterior.loc for guide in mixture])
    nearest = torch.cdist(draws, means).argmin(1)
    counts = nearest.bincount(minlength=3).double()
    assert ((counts - n / 3).abs() < 5 * (n * 2 / 9) ** 0.5).all()
    alike = (nearest[1:] == nearest[:-1]).double().mean()
    assert abs(alike - 1 / 3) < 5 * (2 / 9 / n) ** 0.5


def test_the_parts_of_a_draw_are_of_one_component() -> None:
    """Also those that the fallback guide has."""
    model, data = regressor(noise=None), regression_data()
    guides = []
    for at in (1.0, 2.0):
        guide = KFACGuide(model, init_scale=1e-6, fallback=lambda m: AutoNormal(m, init_scale=1e-6),
                          init_loc_fn=lambda site, at=at: torch.full_like(site["fn"].mean, at))
        guide(*data)
        guides.append(guide)
    mixture = MixtureGuide(guides)
    assert mixture.fallback_sites == ("sigma",)
    for samples in (mixture.sample_posterior(50), Predictive(mixture, num_samples=50)(*data)):
        at = samples["sigma"].reshape(50, 1).round()
        assert set(at.flatten().tolist()) == {1.0, 2.0}
        draws = torch.cat([samples[name].reshape(50, -1) for name in SITES], 1)
        torch.testing.assert_close(draws, at.expand_as(draws), atol=1e-4, rtol=0.0)


@each
@pytest.mark.parametrize("noise", [0.3, None])
def test_predictive(structure: str, noise: float | None) -> None:
    model, mixture = three(structure, noise)
    x, n = inputs(7), 40
    samples = Predictive(model, guide=mixture, num_samples=n)(x)
    assert samples["obs"].shape == (n, 7, 2)
    assert {*SITES, "obs", *(() if noise else ("sigma",))} == set(samples)
    assert all(samples[name].shape[-len(shape):] == shape for name, shape in SITES.items())
    again = Predictive(model, guide=mixture, num_samples=n, return_sites=("_RETURN",))(x)
    assert again["_RETURN"].shape == (n, 7, 2)
    components = Predictive(mixture, num_samples=n)(x)["_component"]
    assert {0, 1, 2} == set(components.flatten().tolist())


def test_the_prediction_is_the_mean_of_the_components_predictions() -> None:
    model, mixture = three("kfac", noise=0.3)
    x, n = inputs(3), 450

    def outputs(guide: Any, n: int) -> Tensor:
        return Predictive(model, guide=guide, num_samples=n, return_sites=("_RETURN",))(x)[
            "_RETURN"]

    mixed = outputs(mixture, n)
    apart = [outputs(guide, n // 3) for guide in mixture]
    mean = torch.stack([part.mean(0) for part in apart]).mean(0)
    error = mixed.var(0) / n + sum(part.var(0) / (n // 3) for part in apart) / 9
    assert ((mixed.mean(0) - mean).abs() < 5 * error.sqrt()).all()


def test_a_mixture_of_mixtures_and_of_structures() -> None:
    model, mixture = three("kfac", noise=0.3)
    other = EKFACGuide(model)
    other(*regression_data())
    nested = MixtureGuide([mixture, other])
    assert Predictive(model, guide=nested, num_samples=4)(inputs(5))["obs"].shape == (4, 5, 2)
    assert nested.sample_posterior(9)["net.0.weight"].shape == (9, 4, 3)


def test_a_mixture_of_one() -> None:
    assert MixtureGuide([three()[1][0]]).sample_posterior(2)["sigma"].shape == (2,)


# ---- on disk ------------------------------------------------------------------------------------


def draws_of(guide: Any) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return guide.sample_posterior(6)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@each
def test_on_disk(structure: str) -> None:
    model, mixture = three(structure)
    file = io.BytesIO()
    torch.save(mixture.state_dict(), file)
    file.seek(0)
    fresh = MixtureGuide([GUIDES[structure](model) for _ in range(3)])
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for predictive in (pyrocurv.infer.Predictive, Predictive):  # without data, ours first
        samples = predictive(model, guide=fresh, num_samples=20)(inputs(4))
        assert samples["obs"].shape == (20, 4, 2) and "sigma" in samples
    for guide in fresh:
        guide(inputs(4))
    assert same(draws_of(fresh), draws_of(mixture))


def test_a_state_of_another_number_of_guides() -> None:
    model, mixture = three()
    fresh = MixtureGuide([KFACGuide(model) for _ in range(2)])
    with pytest.raises(ValueError, match="a mixture of 3 guides, this one has 2"):
        fresh.load_state_dict(mixture.state_dict())
    assert not fresh.sites


def test_copies_and_pickles() -> None:
    model, mixture = three()
    for twin in (copy.deepcopy(mixture), pickle.loads(pickle.dumps(mixture))):
        assert same(draws_of(twin), draws_of(mixture))
        names = {guide._pyro_name for guide in (*twin, *mixture)}
        assert len(names) == 6
        assert Predictive(model, guide=twin, num_samples=2)(inputs(4))["obs"].shape == (2, 4, 2)
    mixture.double().to("cpu")


# ---- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "elbo", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO]
)
def test_an_elbo_of_it(elbo: type[Any]) -> None:
    model, mixture = three()
    data = regression_data()
    before = {name: value.clone() for name, value in mixture.state_dict().items()
              if isinstance(value, Tensor)}
    with pytest.raises(TypeError, match="for prediction: train its guides"):
        SVI(model, mixture, pyro.optim.Adam({"lr": 0.1}), elbo()).step(*data)
    with pytest.raises(TypeError, match="for prediction: train its guides"):
        elbo().loss(model, mixture, *data)
    assert all(torch.equal(mixture.state_dict()[name], value) for name, value in before.items())


def test_natural_gradients_on_it() -> None:
    model, mixture = three()
    with pytest.raises(TypeError, match="for prediction: train its guides"):
        NGVI(model, mixture)  # type: ignore[arg-type]


def test_what_has_no_answer() -> None:
    _, mixture = three()
    with pytest.raises(NotImplementedError, match=r"use mixture\[i\].median"):
        mixture.median()
    with pytest.raises(NotImplementedError, match="sample_posterior"):
        mixture.quantiles([0.5])
    assert set(mixture[1].median()) == {*SITES, "sigma"}


def test_draws_in_parallel() -> None:
    _, mixture = three()
    with pytest.raises(ValueError, match="without parallel=True, or sample_posterior"):
        Predictive(mixture, num_samples=3, parallel=True)(*regression_data())


def test_what_is_no_guide() -> None:
    with pytest.raises(ValueError, match="at least one"):
        MixtureGuide([])
    with pytest.raises(TypeError, match="got AutoNormal"):
        MixtureGuide([AutoNormal(regressor())])


def test_guides_of_other_sites() -> None:
    (_, one), model, data = three(), classifier(), class_data()
    other = KFACGuide(model)
    other(*data)
    with pytest.raises(ValueError, match="different sites"):
        MixtureGuide([one[0], other])


def test_a_model_of_another_architecture() -> None:
    models = [regressor(0.3), regressor(0.3)]
    models[1].net.register_buffer("offset", torch.zeros(2))
    guides = [KFACGuide(model) for model in models]
    with pytest.raises(ValueError, match="different parameters and buffers: net.offset"):
        MixtureGuide(guides)
    models[0].net.register_buffer("offset", torch.zeros(3))
    with pytest.raises(ValueError, match="net.offset of different shapes"):
        MixtureGuide(guides)


# ---- training several ---------------------------------------------------------------------------


class Recipe:
    """Makes runs and notes what it was asked for."""

    def __init__(self, noise: float | None = None) -> None:
        self.asked: list[int] = []
        self.noise = noise

    def __call__(self, seed: int) -> tuple[NGVI, Any]:
        self.asked.append(seed)
        model = Regressor(mlp(), NUM_DATA, noise=self.noise)
        ngvi = NGVI(model, KFACGuide(model), lr=0.1)
        return ngvi, torch.optim.lr_scheduler.ExponentialLR(ngvi.optimizer, 0.9)


def batches() -> list[tuple[Tensor, Tensor]]:
    return [*zip(*(part.split(15) for part in regression_data()), strict=True)]


def test_training_a_mixture() -> None:
    data, make, finished = batches(), Recipe(), {}
    state = torch.get_rng_state()
    mixture = train_mixture(make, data, 3, seeds=2, finished=finished, progress=False)
    assert torch.equal(torch.get_rng_state(), state), "the global stream goes on as it was"
    assert make.asked == [0, 1] and list(finished) == [0, 1]
    assert [guide for guide in mixture] == [ngvi.guide for ngvi in finished.values()]
    for ngvi in finished.values():
        assert ngvi._posterior is not None and ngvi._posterior.step == 6
        assert ngvi.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**6)
    means = [guide.posterior.loc for guide in mixture]
    assert (means[0] - means[1]).abs().max() > 0.1
    model = finished[1].model
    assert Predictive(model, guide=mixture, num_samples=4)(inputs(5))["obs"].shape == (4, 5, 2)


def test_a_seed_says_what_comes_out() -> None:
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*regression_data()), 10, shuffle=True
    )
    runs = []
    for seeds in ([3, 7], (7,)):
        torch.rand(5)  # whatever came before
        runs.append(train_mixture(Recipe(), data, 2, seeds=seeds, progress=False))
    assert torch.equal(runs[0][1].posterior.loc, runs[1][0].posterior.loc)
    assert not torch.equal(runs[0][0].posterior.loc, runs[1][0].posterior.loc)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_what_is_finished_stays(error: BaseException) -> None:
    data, finished, broken = batches(), {}, Recipe()

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            for batch in data:
                if broken.asked == [0, 1] and self.rounds > 3:
                    raise error
                yield batch
            self.rounds += 1

        rounds = 0

    state = torch.get_rng_state()
    with pytest.raises(type(error)):
        train_mixture(broken, Loader(), 3, seeds=3, finished=finished, progress=False)
    assert list(finished) == [0] and torch.equal(torch.get_rng_state(), state)
    kept = finished[0].guide.posterior.loc.clone()
    make = Recipe()
    mixture = train_mixture(make, data, 3, seeds=3, finished=finished, progress=False)
    assert make.asked == [1, 2] and torch.equal(mixture[0].posterior.loc, kept)
    whole = train_mixture(Recipe(), data, 3, seeds=3, progress=False)
    for one, other in zip(mixture, whole, strict=True):
        assert torch.equal(one.posterior.loc, other.posterior.loc)


@pytest.mark.parametrize("batch", ["list", "mapping"])
def test_kinds_of_batches(batch: str) -> None:
    kinds: dict[str, Callable[[Any], Any]] = {
        "list": list, "mapping": lambda pair: dict(zip("xy", pair, strict=True)),
    }
    data = [kinds[batch](pair) for pair in batches()]
    mixture = train_mixture(lambda seed: Recipe()(seed)[0], data, 1, seeds=2, progress=False)
    plain = train_mixture(lambda seed: Recipe()(seed)[0], [*map(_pair, data)], 1, 2, progress=False)
    assert torch.equal(mixture[1].posterior.loc, plain[1].posterior.loc)


def _pair(batch: Any) -> Any:
    return tuple(batch.values()) if isinstance(batch, dict) else tuple(batch)


def test_one_bar_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    train_mixture(Recipe(), batches(), 3, seeds=2)
    said = capsys.readouterr().err
    assert "12/12" in said and "loss=" in said and "seed=1" in said


def test_without_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(train_mixture(Recipe(), batches(), 1, seeds=2, progress=False)) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("options", "reason"), [
    ({"seeds": 0}, "seeds=0: one or more"), ({"seeds": [1, 1]}, "different seeds are needed"),
    ({"epochs": 0}, "epochs=0"), ({"loader": []}, "no batch in epoch 1"),
    ({"loader": iter(batches())}, "no batch in epoch 2"),
])  # fmt: skip
def test_a_wrong_argument(options: dict[str, Any], reason: str) -> None:
    given = {"loader": batches(), "epochs": 2, "seeds": 2, "progress": False, **options}
    with pytest.raises(ValueError, match=reason):
        train_mixture(Recipe(), **given)


def test_components_with_latents_at_points() -> None:
    def make(seed: int) -> NGVI:
        net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()
        model = Regressor(bayesianize(net, layers=[nn.Linear, nn.LayerNorm]), NUM_DATA)
        return NGVI(model, KFACGuide(model, structure={nn.LayerNorm: "point"}))

    mixture = train_mixture(make, batches(), 3, seeds=2, progress=False)
    scales = [guide.median()["net.1.weight"] for guide in mixture]
    assert not torch.equal(*scales)
    draws = mixture.sample_posterior(20)["net.1.weight"]
    assert all(any(torch.equal(draw, scale) for scale in scales) for draw in draws)


def test_its_density_of_held_out_data() -> None:
    """Components so narrow that they are points: the log of the mean of their densities."""
    model, (x, y) = regressor(0.3), regression_data()
    guides, densities = [], []
    for _ in range(3):
        start = {name: torch.randn(shape).double() for name, shape in SITES.items()}
        guide = KFACGuide(
            model, init_loc_fn=lambda site, at=start: at[site["name"]], init_scale=1e-9
        )
        guide(x, y)
        mean = poutine.condition(model, guide.median())(x)
        densities.append(dist.Normal(mean, 0.3).log_prob(y).sum(-1))
        guides.append(guide)
    wanted = (torch.stack(densities).logsumexp(0) - math.log(3)).mean()
    mixture = MixtureGuide(guides)
    found = log_predictive_density(model, mixture, [(x[:9], y[:9]), (x[9:], y[9:])], 6)
    assert found == pytest.approx(float(wanted), rel=1e-5)
    chosen = choose_temperature(lambda t: (model, mixture), [(x, y)], [0.5], 6)
    assert chosen.densities[0.5] == pytest.approx(float(wanted), rel=1e-5)


def test_a_state_that_is_of_a_mixture_and_what_is_no_ngvi() -> None:
    model, mixture = three()
    with pytest.raises(ValueError, match="not of a KFACGuide: it has components"):
        KFACGuide(model).load_state_dict(mixture.state_dict())
    with pytest.raises(TypeError, match="make: an NGVI.* got KFACGuide"):
        train_mixture(lambda seed: mixture[0], [regression_data()], 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fit: an NGVI or .* got KFACGuide"):
        choose_temperature(lambda t: mixture[0], [regression_data()])  # type: ignore[arg-type]
    lacks = "not of an NGVI: it lacks auxiliary, .*optimizer, posterior.*, and has"
    with pytest.raises(ValueError, match=lacks):
        NGVI(model, mixture[0]).load_state_dict(mixture[0].state_dict())


def test_the_number_of_batches_in_place_of_that_of_the_data() -> None:
    """`num_data=len(loader)` is not an error by itself: 30 data in 5 batches."""
    data = TensorDataset(*regression_data())
    loader = DataLoader(data, batch_size=6, shuffle=True)

    def make(num_data: int) -> Any:
        def ngvi(seed: int) -> NGVI:
            model = Regressor(mlp(), num_data, noise=0.3).eval()
            model.num_data = num_data
            return NGVI(model, KFACGuide(model))

        return ngvi

    small = DataLoader(data, batch_size=5)
    with pytest.warns(UserWarning, match="6 data in total, which is the number of batches .* 30 a"):
        train_mixture(make(6), small, 1, 1, progress=False)
    with pytest.warns(UserWarning, match="5 data in total, which is the size of one batch, of 30"):
        train_mixture(make(5), small, 1, 1, progress=False)
    few = DataLoader(data, sampler=RandomSampler(data, num_samples=12), batch_size=12)
    train_mixture(make(12), few, 1, 1, progress=False)
    train_mixture(make(30), loader, 1, 1, progress=False)
    train_mixture(make(12), loader, 1, 1, progress=False)  # distinct images, versions of which
