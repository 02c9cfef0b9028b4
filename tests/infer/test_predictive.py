"""Predictive against Pyro's own: the same sites, shapes and distribution, however it is run."""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import autoguide
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from toys import (
    GUIDES,
    NUM_DATA,
    class_data,
    classifier,
    inputs,
    regression_data,
    regressor,
    trained,
)

from pyrocurv.guides import DiagonalGuide, KFACGuide
from pyrocurv.handlers import vectorized
from pyrocurv.infer import Predictive, predictive
from pyrocurv.nn import Classifier, Regressor, bayesianize

Theirs = pyro.infer.Predictive


def shapes(samples: dict[str, Tensor]) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, value.shape, value.dtype) for name, value in samples.items()]


def assert_same_distribution(ours: Tensor, theirs: Tensor) -> None:
    """Means, and means of squares, within 5 standard errors of their difference in each entry."""
    for a, b in ((ours, theirs), (ours.square(), theirs.square())):
        a, b = a.double(), b.double()
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        assert bool(((a.mean(0) - b.mean(0)).abs() <= 5 * error + 1e-12).all())


def assert_different(samples: Tensor) -> None:
    """No two draws alike, of a continuous site."""
    assert len(samples.flatten(1).unique(dim=0)) == len(samples)


class Counting:
    """How often a model is called."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model, self.calls = model, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.model(*args, **kwargs)


# ---- models -------------------------------------------------------------------------------------


def plated(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Global and local latents, two plates, a deterministic site, a factor, two likelihoods."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("groups", 2, dim=-2):
        c = pyro.sample("c", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x), dim=-1):
            mean = pyro.deterministic("mean", a + (x * b).sum(-1) + c, event_dim=0)
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)
    pyro.factor("penalty", -a.square())
    pyro.sample("count", dist.Poisson(c.exp().sum()))
    return mean


def branching(x: Tensor) -> Tensor:
    """Control flow that hangs on a sampled value."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    mean = a * x if a > 0 else -2 * a * x
    return pyro.sample("obs", dist.Normal(mean, 0.1))


def posterior(n: int) -> dict[str, Tensor]:
    return {"a": torch.randn(n), "b": torch.randn(n, 3), "c": torch.rand(n, 2, 1) + 0.5}


# ---- interface ----------------------------------------------------------------------------------


def test_the_signature_is_that_of_pyro_and_a_group() -> None:
    def plain(thing: Any) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(thing).parameters.values()]

    assert plain(Predictive) == [*plain(Theirs), ("process_group", None)]
    assert issubclass(Predictive, Theirs) and issubclass(Predictive, nn.Module)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("sites", [(), None, ("obs",), ["_RETURN", "b", "none such"]])
@pytest.mark.parametrize("source", ["prior", "samples", "some samples", "autoguide"])
@pytest.mark.parametrize("given", [False, True])
def test_sites_and_shapes(source: str, sites: Any, parallel: bool, given: bool) -> None:
    x, y = torch.randn(4, 3), torch.randn(2, 4)
    options: dict[str, Any] = {"return_sites": sites, "parallel": parallel}
    if source == "autoguide":
        guide = AutoNormal(poutine.block(plated, hide=["count", "obs"]))
        guide(x, y)
        options |= {"guide": guide, "num_samples": 7}
    elif source == "prior":
        options |= {"num_samples": 7}
    else:
        samples = posterior(7)
        if parallel:  # as Pyro wants them then: broadcast over the plates
            samples = {"a": samples["a"][:, None, None], "b": samples["b"][:, None, None]} | {
                "c": samples["c"]}
        options |= {"posterior_samples": {"b": samples["b"]} if "some" in source else samples}
    args = (x, y) if given else (x,)
    ours, theirs = Predictive(plated, **options)(*args), Theirs(plated, **options)(*args)
    assert shapes(ours) == shapes(theirs)
    assert not any(value.requires_grad for value in ours.values())


@pytest.mark.parametrize("structure", GUIDES)
def test_with_the_guides_here(structure: str) -> None:
    ngvi, (x, _) = trained(structure)
    # Pyro's runs the model for each sample; what differs between structures is in test_guides
    num_samples = 400 if structure == "kfac" else 150
    options = {"guide": ngvi.guide, "num_samples": num_samples, "return_sites": None}
    model = Counting(ngvi.model)
    ours, theirs = Predictive(model, **options)(x), Theirs(ngvi.model, **options)(x)
    assert shapes(ours) == shapes(theirs)
    assert model.calls == 3  # to look, to try, and all samples
    for name in ours:
        assert_same_distribution(ours[name], theirs[name])
        assert_different(ours[name])


def test_latents_of_the_fallback_guide() -> None:
    model, (x, y) = regressor(noise=None), regression_data()
    guide = KFACGuide(model, init_scale=0.1)
    guide(x, y)
    options = {"guide": guide, "num_samples": 250, "return_sites": ("sigma", "obs", "_RETURN")}
    ours, theirs = Predictive(model, **options)(x), Theirs(model, **options)(x)
    assert shapes(ours) == shapes(theirs)
    for name in ours:
        assert_same_distribution(ours[name], theirs[name])
    assert_different(ours["sigma"])


AUTOGUIDES = [  # by site, one vector, points, parameters that are modules
    "AutoNormal", "AutoLowRankMultivariateNormal", "AutoDelta", "AutoIAFNormal",
]


@pytest.mark.parametrize("name", AUTOGUIDES)
def test_with_autoguides_of_pyro(name: str) -> None:
    net = bayesianize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    model, x, y = Regressor(net, NUM_DATA), torch.randn(6, 3), torch.randn(6, 2)
    guide = getattr(autoguide, name)(model)
    guide(x, y)
    options = {"guide": guide, "num_samples": 150, "return_sites": ("sigma", "net.0.weight", "obs")}
    ours, theirs = Predictive(model, **options)(x), Theirs(model, **options)(x)
    assert shapes(ours) == shapes(theirs)
    for site in ours:
        assert_same_distribution(ours[site], theirs[site])


def test_with_a_list_of_guides_and_with_a_function() -> None:
    model, (x, y) = regressor(noise=None), regression_data()
    both = AutoGuideList(model)
    both.append(DiagonalGuide(poutine.block(model, hide=["sigma"])))
    both.append(AutoNormal(poutine.block(model, expose=["sigma"])))
    both(x, y)

    def custom(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("sigma", dist.LogNormal(pyro.param("m", lambda: torch.zeros(())), 0.1))

    for guide in (both, custom):
        options = {"guide": guide, "num_samples": 200, "return_sites": ("sigma", "obs")}
        ours, theirs = Predictive(model, **options)(x), Theirs(model, **options)(x)
        assert shapes(ours) == shapes(theirs)
        for site in ours:
            assert_same_distribution(ours[site], theirs[site])
        assert_different(ours["sigma"])


# ---- in distribution ----------------------------------------------------------------------------

LIKELIHOODS: dict[str, Callable[[Tensor], Any]] = {
    "Normal": lambda m: dist.Normal(m, 1.0),
    "fixed": lambda m: dist.Normal(torch.zeros(3), torch.ones(3)),
    "Laplace": lambda m: dist.Laplace(m, 1.0),
    "Exponential": lambda m: dist.Exponential(m.exp()),
    "StudentT": lambda m: dist.StudentT(9.0, m, 1.0),
    "Poisson": lambda m: dist.Poisson(m.exp()),
    "NegativeBinomial": lambda m: dist.NegativeBinomial(3.0, logits=m - 1),
    "Bernoulli": lambda m: dist.Bernoulli(logits=m),
    "Binomial": lambda m: dist.Binomial(5, logits=m),
    "Categorical": lambda m: dist.Categorical(logits=torch.stack([m, 0 * m, -m], -1)),
    "OrderedLogistic": lambda m: dist.OrderedLogistic(m, torch.tensor([-1.0, 1.0])),
    "Gamma": lambda m: dist.Gamma(m.exp(), 1.0),
    "Beta": lambda m: dist.Beta(m.exp(), 2.0),
    "VonMises": lambda m: dist.VonMises(m, 4.0),
    "mixture": lambda m: dist.MixtureSameFamily(
        dist.Categorical(logits=torch.zeros(3, 2)), dist.Normal(torch.stack([m, -m], -1), 0.5)),
    "MultivariateNormal": lambda m: dist.MultivariateNormal(m, torch.eye(3) + 0.5),
}
ONE_BY_ONE = {"Beta", "VonMises"}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_draws_of_a_likelihood(name: str) -> None:
    def program(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        pyro.sample("obs", LIKELIHOODS[name](x @ w))

    model, x = Counting(program), torch.randn(2)
    samples = {"w": 0.3 * torch.randn(600, 2, 3)}
    ours = Predictive(model, samples)(x)["obs"]
    assert (model.calls < 10) is (name not in ONE_BY_ONE)
    theirs = Theirs(program, {"w": samples["w"][:2]})(x)["obs"]
    assert ours.shape[1:] == theirs.shape[1:] and ours.dtype == theirs.dtype
    draws = torch.stack([LIKELIHOODS[name](x @ w).sample() for w in samples["w"]])
    assert_same_distribution(ours, draws.reshape(ours.shape))
    if ours.is_floating_point() and name not in ("Poisson", "NegativeBinomial", "Bernoulli",
                                                 "Binomial"):
        assert_different(ours)


def test_a_site_that_hangs_on_another_without_a_value() -> None:
    x, n = torch.randn(4, 3), 400
    ours = Predictive(plated, num_samples=n)(x)
    theirs = Theirs(plated, num_samples=n)(x)
    for name in ("a", "b", "c", "mean", "obs", "count"):
        assert_same_distribution(ours[name], theirs[name])
    residual = ours["obs"] - ours["mean"]  # of the same draw: variance 0.25
    assert (residual.var() - 0.25).abs() < 5 * 0.25 * math.sqrt(2 / residual.numel())


def test_subsamples_differ_from_sample_to_sample() -> None:
    def model() -> Tensor:
        with pyro.plate("data", 50, subsample_size=3) as index:
            pyro.sample("obs", dist.Normal(0.0, 1.0))
        return index

    index = Predictive(model, num_samples=200, return_sites=("_RETURN",))()["_RETURN"]
    assert all(len(row.unique()) == 3 for row in index)
    mean, variance = 24.5, (50**2 - 1) / 12
    assert (index.double().mean() - mean).abs() < 5 * math.sqrt(variance / index.numel())
    assert len(index.unique(dim=0)) > 190


def test_dropout_is_another_in_each_sample() -> None:
    net = bayesianize(nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 3)))
    model, x = Classifier(net, 10), torch.randn(5, 3)
    guide = DiagonalGuide(model, init_scale=1e-6)
    guide(x, torch.randint(3, (5,)))
    predict = Predictive(model, guide=guide, num_samples=50, return_sites=("_RETURN",))
    assert predict(x)["_RETURN"].std(0).min() > 1e-2
    model.eval()
    assert predict(x)["_RETURN"].std(0).max() < 1e-3


# ---- however it is run --------------------------------------------------------------------------


def exact(model: Callable[..., Any], samples: dict[str, Tensor], *args: Any) -> None:
    """The model's result, given the latents, is Pyro's to rounding."""
    options: dict[str, Any] = {"return_sites": ["_RETURN"]}
    ours = Predictive(model, samples, **options)(*args)["_RETURN"]
    torch.testing.assert_close(ours, Theirs(model, samples, **options)(*args)["_RETURN"])


@pytest.mark.parametrize("largest", [1, 6_000, 1 << 24], ids=["one by one", "chunks", "at once"])
def test_what_the_model_returns(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectorized, "MAX_TENSOR_BYTES", largest)
    model, x = classifier(), inputs()
    guide = DiagonalGuide(model, init_scale=1.0)
    guide(x, x.argmax(1))
    counting = Counting(model)
    exact(counting, guide.sample_posterior(23), x)
    run = counting.calls - 25  # Pyro runs it twice more than there are samples
    assert run == {1: 24, 6_000: 2 + 4, 1 << 24: 3}[largest]


@pytest.mark.parametrize("kind", ["batch norm", "group norm", "attention", "lstm", "in place"])
def test_layers(kind: str) -> None:
    class InPlace(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = torch.zeros(len(x), self.out_features)
            out[:, 0] += F.linear(x, self.weight, self.bias)[:, 0]
            return out.relu_()

    class Attention(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x[:, None], x[:, None], x[:, None])[0].sum(1)

    class Recurrent(nn.LSTM):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x[:, :, None])[0][:, -1]

    layer: dict[str, Callable[[], nn.Module]] = {
        "batch norm": lambda: nn.BatchNorm1d(4), "group norm": lambda: nn.GroupNorm(2, 4),
        "attention": lambda: Attention(4, 2, batch_first=True), "in place": lambda: InPlace(4, 4),
        "lstm": lambda: Recurrent(1, 4, batch_first=True),
    }
    net = nn.Sequential(nn.Linear(3, 4), layer[kind](), nn.Linear(4, 3))
    net(torch.randn(50, 3))  # running statistics that are not those of the start
    model, x = Classifier(bayesianize(net).eval(), 10), torch.randn(5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an LSTM has independent Gaussians
        guide = DiagonalGuide(model, init_scale=0.5)
        guide(x, torch.randint(3, (5,)))
    exact(model, guide.sample_posterior(20), x)


def test_control_flow_on_a_sampled_value() -> None:
    x, n = torch.ones(2), 600
    model = Counting(branching)
    predict = Predictive(model, num_samples=n, return_sites=("a", "obs"))
    ours, theirs = predict(x), Theirs(branching, num_samples=n)(x)
    calls = model.calls
    assert_same_distribution(ours["obs"], theirs["obs"])
    assert bool((ours["obs"] > -0.7).all()) and bool((ours["a"] < 0).any())
    predict(x)
    assert model.calls == calls + n  # nothing is tried twice


def test_what_fails_at_some_values_only_is_run_there() -> None:
    def model() -> Tensor:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        if calls.calls > 2:
            bool(a > 0)
        return 2 * a

    calls = Counting(model)
    samples = {"a": torch.randn(9)}
    result = Predictive(calls, samples, return_sites=["_RETURN"])()["_RETURN"]
    assert torch.equal(result, 2 * samples["a"]) and calls.calls == 3 + 9


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["device", "host", "torch on the host"])
@pytest.mark.parametrize("call", [1, 2, 3], ids=["first run", "vmap is tried", "vmap runs"])
def test_out_of_memory_is_not_taken_for_a_program_without_a_vectorized_form(
    call: int, error: Exception
) -> None:
    def model() -> Tensor:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        if calls.calls == call:
            raise error
        return a

    calls = Counting(model)
    with pytest.raises(type(error)) as caught:
        Predictive(calls, {"a": torch.randn(9)})()
    assert caught.value is error and calls.calls == call


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["device", "host", "torch on the host"])
def test_out_of_memory_is_not_taken_for_a_guide_or_a_model_that_needs_another_call(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        calls.append(torch.is_grad_enabled())
        raise error

    calls: list[bool] = []
    with pytest.raises(type(error)):
        KFACGuide(model)(torch.randn(4, 3), torch.randn(4))
    assert calls == [False]

    def draw(n: int) -> None:
        raise error

    guide = KFACGuide(regressor())
    guide(*regression_data())
    monkeypatch.setattr(guide, "sample_posterior", draw)
    monkeypatch.setattr(guide, "forward", lambda *args: pytest.fail("called again"))
    with pytest.raises(type(error)) as caught:
        Predictive(regressor(), guide=guide, num_samples=3)(inputs())
    assert caught.value is error


def test_errors_of_the_model_are_its_own() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2|shape"):
        Predictive(classifier(), num_samples=5)(torch.randn(4, 7, dtype=torch.float64))


def test_in_groups_that_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    ngvi, (x, _) = trained("kfac")
    monkeypatch.setattr(predictive, "MAX_ELEMENTS", 26 * 4)
    samples = Predictive(ngvi.model, guide=ngvi.guide, num_samples=10)(x)
    assert all(len(value) == 10 for value in samples.values())
    assert_different(samples["net.0.weight"]), assert_different(samples["obs"])


# ---- what stays as it was -----------------------------------------------------------------------


def norm_model() -> tuple[Classifier, DiagonalGuide, Tensor]:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    model, x = Classifier(bayesianize(net), 10), torch.randn(10, 3)
    net[1].running_mean.fill_(0.1)  # not those of a new network
    guide = DiagonalGuide(model, init_scale=0.1)
    guide(x, torch.randint(3, (10,)))
    return model, guide, x


def test_batch_norm_in_train_mode_warns_once_and_is_not_moved() -> None:
    model, guide, x = norm_model()
    before = {name: value.clone() for name, value in model.named_buffers()}
    options = {"guide": guide, "num_samples": 150, "return_sites": ["_RETURN"]}
    predict = Predictive(model, **options)
    with pytest.warns(UserWarning, match="train\\(\\) mode: BatchNorm1d") as caught:
        ours = predict(x)["_RETURN"]
    assert len(caught) == 1 and caught[0].filename == __file__
    predict(x)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert_same_distribution(ours, Theirs(model, **options)(x)["_RETURN"])
    model.eval()
    Predictive(model, **options)(x)


def test_parameters_and_gradients() -> None:
    model, guide, x = norm_model()
    model.eval()
    frozen = model.net[1].weight.requires_grad_(False)
    samples = Predictive(model, guide=guide, num_samples=5)(x)
    assert not frozen.requires_grad and model.net[1].bias.requires_grad
    assert not any(value.requires_grad for value in samples.values())
    assert all(p.grad is None for p in guide.parameters())


def test_a_parameter_that_the_model_makes_is_no_batch() -> None:
    def model(x: Tensor) -> None:
        a = pyro.param("a", lambda: torch.zeros(3))
        pyro.sample("obs", dist.Normal(x @ a * pyro.sample("w", dist.Normal(0.0, 1.0)), 1.0))

    Predictive(model, num_samples=6)(torch.randn(2, 3))
    assert torch.equal(pyro.param("a").detach(), torch.zeros(3))


def test_results_are_memory_of_their_own() -> None:
    x, y, samples = torch.randn(4, 3), torch.randn(2, 4), posterior(5)
    kept, target = samples["b"].clone(), y.clone()
    result = Predictive(plated, samples, return_sites=("b", "obs", "count"))(x, y)
    for value in result.values():
        value[0] += 1
    assert torch.equal(samples["b"], kept) and torch.equal(y, target)
    assert torch.equal(result["obs"][1:], y.expand(4, 2, 4))


@pytest.mark.parametrize("name", ["vectorized", "branching"])
def test_reproducible_under_a_seed(name: str) -> None:
    """Also at the first call, which finds out how to run the model."""
    if name == "branching":
        predict, x = Predictive(branching, num_samples=8), torch.ones(2)
    else:
        ngvi, (x, _) = trained("kfac")
        predict = Predictive(ngvi.model, guide=ngvi.guide, num_samples=8)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(predict(x)["obs"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_validation_is_as_it_was() -> None:
    def state() -> tuple[bool, bool]:
        return pyro.settings.get("validate_distributions_pyro"), pyro.settings.get("validate_infer")

    before = state()
    Predictive(branching, num_samples=3)(torch.ones(2))
    assert state() == before


# ---- beside the beaten track --------------------------------------------------------------------


def test_a_loaded_guide_needs_no_data() -> None:
    ngvi, (x, _) = trained("kfac")
    fresh = KFACGuide(ngvi.model)
    fresh.load_state_dict(ngvi.guide.state_dict())
    found = []
    for guide in (fresh, ngvi.guide):
        torch.manual_seed(3)
        found.append(Predictive(ngvi.model, guide=guide, num_samples=5)(x)["obs"])
    assert torch.equal(*found)


def test_a_guide_that_has_not_met_its_model() -> None:
    model, (x, y) = classifier(), class_data()
    with pytest.raises(ValueError, match="is not initialized, .* train it first"):
        Predictive(model, guide=KFACGuide(model), num_samples=3)(x)
    samples = Predictive(model, guide=KFACGuide(model), num_samples=3)(x, y)
    assert torch.equal(samples["obs"], y.expand(3, -1))


def test_handlers_around_it_see_what_they_do_with_pyro() -> None:
    x = torch.ones(2)
    with poutine.condition(data={"a": torch.tensor(3.0)}):
        samples = Predictive(branching, num_samples=4, return_sites=("a",))(x)
    assert torch.equal(samples["a"], torch.full((4,), 3.0))


def test_a_result_that_is_no_tensor() -> None:
    def model() -> tuple[Tensor, Tensor]:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        return a, 2 * a

    assert Predictive(model, num_samples=4)()["a"].shape == (4,)
    a, twice = Predictive(
        model, num_samples=4, return_sites=["_RETURN"], parallel=True
    )()["_RETURN"]
    assert torch.equal(2 * a, twice) and len(a) == 4
    with pytest.raises(TypeError, match=r"return_sites='_RETURN': a list of names"):
        Predictive(regressor(), {}, num_samples=2, return_sites="_RETURN")
    with pytest.raises(TypeError):
        Predictive(model, num_samples=4, return_sites=["_RETURN"])()


def test_call_gives_a_tuple() -> None:
    samples = posterior(4)
    torch.manual_seed(0)
    named = Predictive(plated, samples)(torch.ones(4, 3))
    torch.manual_seed(0)
    listed = Predictive(plated, samples).call(torch.ones(4, 3))
    assert all(torch.equal(a, named[name]) for a, name in zip(listed, sorted(named), strict=True))


@pytest.mark.filterwarnings("ignore:.*left to the fallback")
def test_local_latents_are_those_of_the_data_at_hand() -> None:
    """A mini-batch after a guide has seen all data, in the order of the mini-batch."""
    def model(rows: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
        weight = pyro.sample("w", dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))
        with pyro.plate("data", 20, subsample=rows):
            local = pyro.sample("z", dist.Normal(torch.zeros(()), 500.0))
            return pyro.sample("obs", dist.Normal(F.linear(x, weight)[:, 0] + local, 0.1), obs=y)

    def plates(rows: Tensor, x: Tensor, y: Tensor | None = None) -> pyro.plate:
        return pyro.plate("data", 20, subsample=rows)

    guide = KFACGuide(model, create_plates=plates)
    guide(torch.arange(20), torch.zeros(20, 3), torch.zeros(20))
    with torch.no_grad():
        guide.fallback.locs.z.copy_(torch.arange(20.0) * 10)
        guide.fallback.scales.z.fill_(1e-3)
    predict = Predictive(model, guide=guide, num_samples=50)
    for rows in (torch.tensor([14, 3, 7]), torch.arange(20), torch.tensor([2])):
        found = predict(rows, torch.zeros(len(rows), 3))["obs"].mean(0)
        assert (found - 10.0 * rows).abs().max() < 0.2


def test_a_guide_of_another_model_is_refused() -> None:
    def parts(outputs: int) -> tuple[Classifier, KFACGuide]:
        pyro.clear_param_store()
        net = PyroModule[nn.Linear](3, outputs, bias=False)
        net.weight = PyroSample(dist.Normal(0.0, 1.0).expand([outputs, 3]).to_event(2))
        model = Classifier(net, 10)
        return model, KFACGuide(model)

    model, guide = parts(3)
    x = torch.randn(10, 3)
    guide(x, torch.randint(3, (10,)))
    state = guide.state_dict()
    model, guide = parts(4)
    guide.load_state_dict(state)
    with pytest.raises(ValueError, match="has shape .4, 3. in the model, the guide draws .3, 3."):
        Predictive(model, guide=guide, num_samples=3, return_sites=["_RETURN"])(x)
    other = KFACGuide(Classifier(bayesianize(nn.Linear(3, 4, bias=False)), 10))
    with pytest.raises(ValueError, match="it has net.weight .3, 3. in place of .4, 3."):
        other.load_state_dict(state)


def test_chunks_follow_what_is_inside_of_arguments() -> None:
    """A dict of tensors, or a number that sets a size: a chunk is of the runs that fit."""
    def model(data: dict[str, Tensor], size: int) -> Tensor:
        scale = pyro.sample("scale", dist.Normal(0.0, 1.0))
        return scale * data["x"].expand(size, -1)

    runs = vectorized.VectorizedRunner()
    for rows, size in ((1, 4), (1, 100_000), (3, 3)):
        values = {"scale": torch.randn(8)}
        runs(model, values, 8, ({"x": torch.ones(rows, 50)}, size), {})
    assert len({*runs.chunks.values()}) > 1 and len(runs.chunks) == 3


def test_samples_may_have_the_rows_of_a_plate() -> None:
    def model() -> Tensor:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6, subsample_size=3) as rows:
            return pyro.sample("obs", dist.Normal(mean + rows.float(), 0.01))

    given = {"mean": torch.zeros(5), "data": torch.tensor([[1, 4, 2]] * 5)}
    found = Predictive(model, given)()["obs"]
    torch.testing.assert_close(found, torch.tensor([[1.0, 4.0, 2.0]] * 5), atol=0.1, rtol=0)
