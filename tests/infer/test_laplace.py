"""`Laplace`: exact where the truth is Gaussian, the dense formulas elsewhere, no surprise."""

import copy
import io
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import init_to_value
from pyro.nn import PyroModule
from torch import Tensor, nn
from toys import (
    EXACT,
    GUIDES,
    NATURAL,
    NUM_DATA,
    class_data,
    classifier,
    inputs,
    mlp,
    normal_prior,
    regression_data,
    regressor,
)

from pyrocurv.curvature import KFAC
from pyrocurv.guides import BlockGuide, FullGuide, KFACGuide, StructuredGuide
from pyrocurv.infer import NGVI, Laplace
from pyrocurv.infer.linearized_predictive import predictive
from pyrocurv.infer.marginal_likelihood import LaplaceBlock, log_evidence
from pyrocurv.nn import Classifier, Regressor, bayesianize

NOISE = 0.3
PRIORS = {"equal": (0.7, 0.7), "unequal": (0.7, 1.9)}  # standard deviations of weight and bias
CORRELATED = ["kfac", "ekfac", "block", "full"]
each = pytest.mark.parametrize("structure", GUIDES)
each_correlated = pytest.mark.parametrize("structure", CORRELATED)
each_prior = pytest.mark.parametrize("priors", PRIORS)


def batches(x: Tensor, y: Tensor, size: int = 13) -> list[tuple[Tensor, Tensor]]:
    """Of unequal sizes."""
    return list(zip(x.split(size), y.split(size), strict=True))


def linear(priors: str, noise: float | None = NOISE) -> Regressor:
    net = bayesianize(nn.Linear(3, 2).double(), normal_prior(*PRIORS[priors]))
    return Regressor(net, NUM_DATA, noise=noise)


def truth(
    x: Tensor, y: Tensor, priors: str, noise: float = NOISE, factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = PRIORS[priors]
    return oracles.linear_layer_posterior(x, y, noise, factor * weight**-2, factor * bias**-2)  # type: ignore[return-value]


def at(mean: Tensor) -> Callable[[Any], Tensor]:
    """Start `linear` at a mean [8]."""
    return init_to_value(values={"net.weight": mean[:6].view(2, 3), "net.bias": mean[6:]})


def fitted_linear(structure: str, priors: str) -> tuple[Laplace, Tensor, Tensor]:
    x, y = regression_data()
    mean, _, _ = truth(x, y, priors)
    model = linear(priors)
    guide = GUIDES[structure](model, init_loc_fn=at(mean))
    return Laplace(model, guide).fit(batches(x, y)), x, y


def dense(guide: StructuredGuide) -> Tensor:
    return guide.posterior.precision.dense()


# ---- where it is exact --------------------------------------------------------------------------


@each_prior
@each_correlated
def test_posterior_and_evidence_of_a_linear_model(structure: str, priors: str) -> None:
    laplace, x, y = fitted_linear(structure, priors)
    mean, covariance, log_evidence = truth(x, y, priors)
    torch.testing.assert_close(torch.linalg.inv(dense(laplace.guide)), covariance, rtol=1e-9,
                               atol=1e-10)
    torch.testing.assert_close(laplace.guide.posterior.loc, mean)
    assert laplace.log_marginal_likelihood() == pytest.approx(float(log_evidence), rel=1e-8)


@each_prior
@each_correlated
def test_prediction_of_a_linear_model(structure: str, priors: str) -> None:
    laplace, x, y = fitted_linear(structure, priors)
    mean, covariance, _ = truth(x, y, priors)
    new = inputs(5)
    found = laplace.predict(new)
    for n in range(5):
        design = oracles.linear_layer_design(new[n: n + 1], 2)
        torch.testing.assert_close(found.mean[n], design @ mean)
        wanted = design @ covariance @ design.mT + NOISE**2 * torch.eye(2).double()
        torch.testing.assert_close(found.covariance_matrix[n], wanted, rtol=1e-8, atol=1e-10)


def test_a_prior_to_a_power_counts_so_often() -> None:
    x, y = regression_data()
    inner = linear("unequal")

    def model(x: Tensor, y: Tensor | None = None) -> None:
        with poutine.scale(scale=0.5):
            inner(x, y)

    once = Laplace(inner, FullGuide(inner)).fit([(x, y)])
    half = Laplace(model, FullGuide(model)).fit([(x, y)])
    torch.testing.assert_close(dense(half.guide), dense(once.guide) / 2)


@each_prior
def test_the_tuned_prior_maximises_the_exact_evidence(priors: str) -> None:
    """Of a linear model, but for the mean: that stays where the old prior had it."""
    laplace, x, y = fitted_linear("full", priors)
    mean, _, _ = truth(x, y, priors)
    found = laplace.tune_prior("model")
    factor = float(found["net.weight"]) * PRIORS[priors][0]**2
    torch.testing.assert_close(found["net.bias"].item(), factor * PRIORS[priors][1]**-2)
    weight, bias = PRIORS[priors]
    precision = torch.tensor([weight**-2] * 6 + [bias**-2] * 2).double()
    design = oracles.linear_layer_design(x, 2)

    def log_evidence(factor: float) -> float:
        matrix = design.mT @ design / NOISE**2 + torch.diag(factor * precision)
        quadratic = factor * (precision * mean.square()).sum()
        return float(8 * math.log(factor) - quadratic - torch.logdet(matrix)) / 2

    best = log_evidence(factor)
    assert all(log_evidence(factor * other) < best for other in (0.99, 1.01, 0.5, 2.0))


# ---- sums over the data -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian"])
@each
def test_batches_sum_to_the_whole(structure: str, kind: str) -> None:
    """K-FAC too: G is a sum, A a mean over all the data."""
    x, y = class_data()
    model = classifier()
    first, second = (Laplace(model, GUIDES[structure](model), kind) for _ in range(2))
    first.fit([(x, y)])
    second.fit(batches(x, y, 7))
    torch.testing.assert_close(dense(first.guide), dense(second.guide), rtol=1e-8, atol=1e-9)
    assert first.log_marginal_likelihood() == pytest.approx(second.log_marginal_likelihood())


def as_plain(guide: StructuredGuide, outputs: int) -> nn.Module:
    """The toy's network as torch has it, at the guide's mean."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    medians = guide.median()
    net.load_state_dict({name.removeprefix("net."): medians[name] for name in guide.sites})
    return net


def prior_precision(net: nn.Module) -> Tensor:
    return torch.cat([
        torch.full_like(p, 0.8 if p.dim() == 2 else 1.5).pow(-2).flatten() for p in net.parameters()
    ])


@pytest.mark.parametrize("kind", ["ggn", "hessian", "empirical"])
def test_the_precision_is_the_dense_curvature_and_the_prior(kind: str) -> None:
    x, y = class_data()
    model = classifier()
    laplace = Laplace(model, FullGuide(model), kind).fit(batches(x, y))
    net = as_plain(laplace.guide, 3)
    matrix = getattr(oracles, kind)(net, x, y, "categorical")
    if kind == "hessian":
        values, vectors = torch.linalg.eigh(matrix)
        assert values.min() < 0
        matrix = (vectors * values.clamp(min=0)) @ vectors.mT
    torch.testing.assert_close(dense(laplace.guide), matrix + torch.diag(prior_precision(net)))


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_kronecker_factors_of_batches_are_those_of_the_data(structure: str) -> None:
    x, y = class_data()
    model = Classifier(mlp(0.8, 0.8, 3), NUM_DATA)
    laplace = Laplace(model, GUIDES[structure](model)).fit(batches(x, y, 7))
    net = as_plain(laplace.guide, 3)
    matrix = getattr(oracles, f"{structure}_dense")(net, x, y, "categorical")
    wanted = matrix + 0.8**-2 * torch.eye(len(matrix)).double()
    torch.testing.assert_close(dense(laplace.guide), wanted)


def test_the_evidence_is_the_dense_formula() -> None:
    x, y = class_data()
    model = classifier()
    laplace = Laplace(model, FullGuide(model)).fit(batches(x, y))
    net = as_plain(laplace.guide, 3)
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    precision = prior_precision(net)
    matrix = oracles.ggn(net, x, y, "categorical") + torch.diag(precision)
    log_prior = dist.Normal(0.0, precision.rsqrt()).log_prob(weights).sum()
    wanted = -oracles.nll("categorical", net(x), y).sum() + log_prior + (
        len(weights) * math.log(2 * math.pi) - torch.logdet(matrix)
    ) / 2
    assert laplace.log_marginal_likelihood() == pytest.approx(float(wanted.detach()), rel=1e-10)


def test_masked_and_tempered_data() -> None:
    x, y = class_data()
    net, keep = mlp(outputs=3), torch.arange(NUM_DATA) % 3 > 0

    def model(x: Tensor, y: Tensor | None, keep: Tensor) -> None:
        logits = net(x)
        with poutine.scale(scale=0.25), pyro.plate("data", NUM_DATA, subsample=x[:, 0], dim=-1):
            with poutine.mask(mask=keep):
                pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    laplace = Laplace(model, BlockGuide(model))
    parts = zip(x.split(7), y.split(7), keep.split(7), strict=True)
    laplace.fit(list(parts))
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    plain.load_state_dict(laplace.guide.median())
    matrix = oracles.blocks(
        oracles.ggn(plain, x[keep], y[keep], "categorical"), oracles.block_sizes(plain)
    ) / 4
    wanted = matrix + torch.diag(prior_precision(plain))
    torch.testing.assert_close(dense(laplace.guide), wanted)


# ---- tuning -------------------------------------------------------------------------------------


def terms(laplace: Laplace) -> list[LaplaceBlock]:
    return laplace._fitted


@each
def test_the_gradient_of_the_evidence(structure: str) -> None:
    x, y = class_data()
    model = classifier()
    laplace = Laplace(model, GUIDES[structure](model)).fit([(x, y)])
    for size in (1, 2):
        factors = torch.randn(size, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda f: log_evidence(terms(laplace), f), factors)


@pytest.mark.parametrize("per", ["model", "layer"])
@each
def test_tuning_goes_to_the_top(structure: str, per: str) -> None:
    x, y = class_data()
    model = classifier()
    laplace = Laplace(model, GUIDES[structure](model)).fit([(x, y)])
    before, likelihood = laplace.log_marginal_likelihood(), laplace._log_likelihood
    old = dense(laplace.guide)
    found = laplace.tune_prior(per)
    assert laplace.log_marginal_likelihood() > before
    assert laplace._log_likelihood == likelihood
    layers = 1 if per == "model" else 2
    factors = torch.zeros(layers, dtype=torch.float64, requires_grad=True)
    log_evidence(terms(laplace), factors).backward()
    assert factors.grad is not None and factors.grad.abs().max() < 1e-5
    prior = torch.cat([
        found[name].expand(shape).flatten() for name, shape in laplace.guide.sites.items()
    ])
    moved = dense(laplace.guide) - old
    expected = torch.diag(prior - prior_precision(as_plain(laplace.guide, 3)))
    if structure in ("full", "block", "diag"):
        torch.testing.assert_close(moved, expected, rtol=1e-7, atol=1e-8)
    sites = poutine.trace(model).get_trace(x).nodes
    for name, precision in found.items():
        torch.testing.assert_close(
            sites[name]["fn"].base_dist.scale.pow(-2), precision.expand(sites[name]["value"].shape)
        )


def test_a_prior_in_code_of_ones_own_is_returned_alone() -> None:
    x, y = regression_data()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3).double(), 1.0).to_event(2))
        with pyro.plate("data", NUM_DATA, subsample=x[:, 0]):
            pyro.sample("obs", dist.Normal(x @ w.T, 0.3).to_event(1), obs=y)

    laplace = Laplace(model, KFACGuide(model)).fit([(x, y)])
    found = laplace.tune_prior()
    assert found["w"].shape == () and found["w"] != 1
    fresh = Laplace(model, KFACGuide(model)).fit([(x, y)])
    assert torch.dist(dense(fresh.guide), dense(laplace.guide)) > 0.01


def test_weights_at_their_prior_mean_and_data_that_say_nothing() -> None:
    """The evidence then rises for ever: the factor stops at a bound."""
    x, y = regression_data()
    model = linear("equal")
    laplace = Laplace(model, KFACGuide(model, init_loc_fn=at(torch.zeros(8).double())))
    found = laplace.fit([(x, y)]).tune_prior()
    assert torch.isfinite(found["net.weight"]) and found["net.weight"] > 1e6


def test_ngvi_goes_on_from_a_tuned_fit() -> None:
    x, y = regression_data()
    model = linear("equal")
    laplace = Laplace(model, FullGuide(model)).fit([(x, y)])
    precision = laplace.tune_prior()["net.weight"]
    ngvi = NGVI(model, laplace.guide, lr=1.0, momentum=0.0, damping=0.0, kl_clip=None,
                curvature=EXACT, **NATURAL)
    ngvi.step(x, y)
    mean, covariance, log_evidence = oracles.linear_layer_posterior(
        x, y, NOISE, float(precision), float(precision)
    )
    torch.testing.assert_close(laplace.guide.posterior.loc, mean)
    assert -ngvi.evaluate_loss(x, y) == pytest.approx(float(log_evidence))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        laplace.guide.sample_posterior(2)


# ---- prediction ---------------------------------------------------------------------------------


def nets() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    return {
        "mlp": (nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)), (3,)),
        "conv": (nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2, groups=1), nn.Flatten(),
            nn.Linear(18, 3)), (2, 4, 4)),
        "norm": (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)), (3,)),
        "recurrent": (Last(nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 3)), (4, 3)),
    }


class Last(nn.Module):
    def __init__(self, cell: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


@pytest.mark.filterwarnings("ignore:.*consumed by no supported op")
@pytest.mark.parametrize("structure", ["kfac", "full"])
@pytest.mark.parametrize("kind", nets())
def test_the_covariance_of_the_outputs(kind: str, structure: str) -> None:
    net, shape = nets()[kind]
    plain = copy.deepcopy(net.double())
    layers = [*{type(m) for m in net.modules() if [*m.parameters(recurse=False)]}]
    model = Regressor(bayesianize(net, layers=layers), NUM_DATA, noise=NOISE)
    guide = GUIDES[structure](model)
    x, y = torch.randn(NUM_DATA, *shape).double(), torch.randn(NUM_DATA, 3).double()
    laplace = Laplace(model, guide).fit(batches(x, y))
    found, new = laplace.predict(x[:4]), x[:4]
    names = [name.removeprefix("net.") for name in guide.sites]
    order = {name: parameter for name, parameter in plain.named_parameters()}
    weights = tuple(order[name].detach() for name in names)

    def outputs(*weights: Tensor) -> Tensor:
        return torch.func.functional_call(plain, dict(zip(names, weights, strict=True)), (new,))

    parts = torch.autograd.functional.jacobian(outputs, weights)
    jacobian = torch.cat([part.reshape(4, 3, -1) for part in parts], -1)  # [B, D, P]
    covariance = jacobian @ torch.linalg.inv(dense(guide)) @ jacobian.mT
    wanted = covariance + NOISE**2 * torch.eye(3).double()
    torch.testing.assert_close(found.mean, outputs(*weights))
    torch.testing.assert_close(found.covariance_matrix, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("priors", PRIORS)
@pytest.mark.parametrize("rank", [None, 2])
def test_no_jacobian_is_formed_at_one_position(rank: int | None, priors: str) -> None:
    net = bayesianize(nn.Linear(5, 3).double(), normal_prior(*PRIORS[priors]))
    model, x = Regressor(net, NUM_DATA, noise=NOISE), torch.randn(NUM_DATA, 5).double()
    guide = KFACGuide(model, structure=KFAC(rank=rank))
    # targets of one dimension make G of low rank, and so its basis matter
    laplace = Laplace(model, guide, "empirical").fit([(x, x[:, :1] * torch.ones(1, 3).double())])
    found = laplace.predict(x[:4]).covariance_matrix
    for n in range(4):
        design = oracles.linear_layer_design(x[n: n + 1], 3)
        wanted = design @ torch.linalg.inv(dense(guide)) @ design.mT
        torch.testing.assert_close(found[n], wanted + NOISE**2 * torch.eye(3).double())


def test_a_jacobian_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    laplace, x, _ = fitted_linear("kfac", "unequal")
    whole = laplace.predict(x).covariance_matrix
    monkeypatch.setattr("pyrocurv.curvature.output_covariance.MAX_ELEMENTS", 1)
    with torch.no_grad():
        found = laplace.predict(x).covariance_matrix
    torch.testing.assert_close(found, whole)


def gauss_hermite(mean: float, deviation: float) -> float:
    """E σ(f), f ~ N(mean, deviation²), by the trapezoid rule."""
    z = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(torch.sigmoid(mean + deviation * z) * density, z))


@pytest.mark.parametrize("deviation", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("mean", [-2.0, 0.5, 3.0])
def test_the_probit_is_near_the_integral(mean: float, deviation: float) -> None:
    """MacKay's approximation is good to .02 for any mean and variance."""
    logits = torch.tensor([[mean]]).double()
    covariance = torch.tensor([[[deviation**2]]]).double()
    found = predictive(torch.distributions.Bernoulli(logits=logits), 1, covariance)
    assert abs(float(found.mean) - gauss_hermite(mean, deviation)) < 0.02


def test_two_classes_are_the_bernoulli() -> None:
    """With the variance of the difference of their logits, whatever they have in common."""
    root = torch.randn(4, 2, 2).double()
    covariance, logits = root @ root.mT, torch.randn(4, 2).double()
    found = predictive(torch.distributions.Categorical(logits=logits), 0, covariance)
    turn = torch.tensor([-1.0, 1.0]).double()
    spread = (turn @ covariance @ turn).view(4, 1, 1)
    binary = predictive(torch.distributions.Bernoulli(logits=logits @ turn), 0, spread)
    torch.testing.assert_close(found.probs[:, 1], binary.probs)
    shared = covariance + 7.0
    again = predictive(torch.distributions.Categorical(logits=logits + 5), 0, shared)
    torch.testing.assert_close(again.probs, found.probs)


def test_pairs_of_classes_come_nearer_to_the_integral_than_single_ones() -> None:
    root = torch.randn(200, 5, 5).double()
    covariance, logits = root @ root.mT, 2 * torch.randn(200, 5).double()
    found = predictive(torch.distributions.Categorical(logits=logits), 0, covariance).probs
    draws = (logits + (root @ torch.randn(200, 5, 20000).double()).movedim(-1, 0)).softmax(-1)
    truth, error = draws.mean(0), draws.std(0) / math.sqrt(20000)
    single = logits / (1 + math.pi / 8 * covariance.diagonal(dim1=1, dim2=2)).sqrt()
    distances = [
        (probs - truth).abs().mean() for probs in (found, single.softmax(-1), logits.softmax(-1))
    ]
    assert distances[0] + 4 * error.mean() < distances[1] < distances[2]


def test_no_variance_is_the_softmax() -> None:
    logits = torch.randn(3, 2, 4).double()
    likelihood = torch.distributions.Categorical(logits=logits)
    found = predictive(likelihood, 1, torch.zeros(3, 8, 8).double())
    assert found.batch_shape == (3,) and found.event_shape == (2,)
    torch.testing.assert_close(found.base_dist.probs, likelihood.probs)


def test_several_places_take_their_own_blocks() -> None:
    root, logits = torch.randn(3, 8, 8).double(), torch.randn(3, 2, 4).double()
    covariance = root @ root.mT
    found = predictive(torch.distributions.Categorical(logits=logits), 1, covariance).base_dist
    for place in range(2):
        own = slice(4 * place, 4 * place + 4)
        alone = predictive(
            torch.distributions.Categorical(logits=logits[:, place]), 0, covariance[:, own, own]
        )
        torch.testing.assert_close(found.probs[:, place], alone.probs)


def test_shapes_of_a_regression() -> None:
    """One output: a normal for each example; the noise at the median of its scale."""
    x = inputs()
    model = Regressor(mlp(outputs=1), NUM_DATA)
    guide = KFACGuide(model)
    laplace = Laplace(model, guide).fit([(x, x[:, 0])])
    found = laplace.predict(x)
    assert isinstance(found, torch.distributions.Normal) and found.batch_shape == (NUM_DATA,)
    assert not found.loc.requires_grad and not found.scale.requires_grad
    noise = guide.median()["sigma"]
    assert (found.stddev > noise).all()
    far = laplace.predict(100 * x)
    assert far.stddev.mean() > 2 * found.stddev.mean()


def test_a_classifier_is_less_sure_than_its_mean() -> None:
    x, y = class_data()
    model = classifier()
    guide = KFACGuide(model)
    found = Laplace(model, guide).fit(batches(x, y)).predict(x)
    mean = as_plain(guide, 3)(x).softmax(-1)
    assert found.probs.shape == (NUM_DATA, 3)
    assert found.entropy().mean() > torch.special.entr(mean).sum(-1).mean()


# ---- the noise, the last layer, the rest --------------------------------------------------------


def test_the_evidence_is_given_the_noise() -> None:
    x, y = regression_data()
    model = linear("unequal", noise=None)
    guide = FullGuide(model)
    guide(x, y)
    sigma = float(guide.median()["sigma"])
    mean, covariance, log_evidence = truth(x, y, "unequal", sigma)
    values = {"net.weight": mean[:6].view(2, 3), "net.bias": mean[6:]}
    with torch.no_grad():
        guide.blocks[0].raw_loc.copy_(guide.blocks[0].block.pack(values))
    laplace = Laplace(model, guide).fit(batches(x, y))
    torch.testing.assert_close(torch.linalg.inv(dense(guide)), covariance)
    assert laplace.log_marginal_likelihood() == pytest.approx(float(log_evidence), rel=1e-8)
    laplace.tune_prior()
    assert float(guide.median()["sigma"]) == sigma


def test_the_last_layer_alone() -> None:
    x, y = class_data()
    model = classifier()
    guide = FullGuide(model, structure={"net.0": "frozen"})
    laplace = Laplace(model, guide).fit(batches(x, y))
    assert list(guide.sites) == ["net.2.weight", "net.2.bias"]
    medians = guide.median()
    features = torch.tanh(x @ medians["net.0.weight"].T + medians["net.0.bias"])
    head = nn.Linear(4, 3).double()
    head.load_state_dict({n: medians[f"net.2.{n}"] for n in ("weight", "bias")})
    wanted = oracles.ggn(head, features, y, "categorical") + torch.diag(prior_precision(head))
    torch.testing.assert_close(dense(guide), wanted)
    assert laplace.predict(x).probs.shape == (NUM_DATA, 3)


def test_truncated_sides_keep_the_leading_directions_of_all_data() -> None:
    x, y = torch.randn(NUM_DATA, 5).double(), torch.randn(NUM_DATA, 2).double()
    model = Regressor(bayesianize(nn.Linear(5, 2).double()), NUM_DATA, noise=NOISE)
    guide = KFACGuide(model, structure=KFAC(rank=3))
    Laplace(model, guide).fit(batches(x, y))
    rows = torch.cat([x, torch.ones(NUM_DATA, 1).double()], 1)
    values, vectors = torch.linalg.eigh(rows.mT @ rows / NOISE**2)
    values[:3] = values[:3].mean()
    factor = (vectors * values) @ vectors.mT + 6 * torch.eye(6).double()  # prior 1 / (fan_in + 1)
    posterior = guide.posterior.precision.blocks[0].dense()  # type: ignore[attr-defined]
    torch.testing.assert_close(posterior, torch.kron(torch.eye(2).double(), factor))


def test_eval_mode_and_buffers() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    model = Classifier(bayesianize(net.double()), NUM_DATA)
    x, y = class_data()
    model.train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    guide = KFACGuide(model)
    laplace = Laplace(model, guide).fit(batches(x, y))
    one, other = laplace.predict(x).probs, laplace.predict(x).probs
    torch.testing.assert_close(one, other)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert all(module.training for module in model.modules())


def test_keywords_and_the_global_random_numbers() -> None:
    x, y = class_data()
    model = classifier()
    state = torch.get_rng_state()
    laplace = Laplace(model, KFACGuide(model)).fit([{"x": x, "y": y}])
    laplace.predict(x=x)
    assert torch.equal(torch.get_rng_state(), state)


# ---- samples of it ------------------------------------------------------------------------------


def test_sampling_warns_once() -> None:
    x, y = class_data()
    model = classifier()
    guide = KFACGuide(model)
    laplace = Laplace(model, guide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        laplace.fit([(x, y)])
        laplace.predict(x), laplace.tune_prior(), laplace.log_marginal_likelihood()
        guide.median(), guide.quantiles([0.5]), guide.kl(), guide.summary()
    with pytest.warns(UserWarning, match="linearized"):
        Predictive(model, guide=guide, num_samples=3)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide.sample_posterior(3)


def test_a_loaded_guide_predicts_and_warns() -> None:
    x, y = class_data()
    model = classifier()
    laplace = Laplace(model, KFACGuide(model)).fit([(x, y)])
    buffer = io.BytesIO()
    torch.save(laplace.guide.state_dict(), buffer)
    buffer.seek(0)
    fresh = KFACGuide(model)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    found = Laplace(model, fresh).predict(x)
    torch.testing.assert_close(found.probs, laplace.predict(x).probs)
    with pytest.warns(UserWarning, match="linearized"):
        fresh.sample_posterior(1)


# ---- a mode by natural gradients ----------------------------------------------------------------


def test_no_particles_is_the_mode() -> None:
    x, y = regression_data()
    model = regressor()
    guide = FullGuide(model)
    ngvi = NGVI(model, guide, lr=0.6, momentum=0.0, curvature=replace(EXACT, decay=0.0),
                num_particles=0, damping=0.3, kl_clip=None)
    losses = [ngvi.step(x, y) for _ in range(150)]
    assert guide.is_laplace and losses[-1] < losses[0]
    again = ngvi.evaluate_loss(x, y)
    assert again == ngvi.evaluate_loss(x, y)  # nothing is drawn
    net = as_plain(guide, 2)
    weights = torch.cat([p.flatten() for p in net.parameters()])
    energy = (net(x) - y).square().sum() / (2 * NOISE**2)
    energy = energy + (prior_precision(net) * weights.square()).sum() / 2
    gradients = torch.autograd.grad(energy, [*net.parameters()])
    assert max(g.abs().max() for g in gradients) < 1e-6 * energy.detach()
    precision = dense(guide)
    Laplace(model, guide).fit(batches(x, y))
    torch.testing.assert_close(dense(guide), precision, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*consumed by no supported op")
def test_no_particles_say_nothing_of_weights_without_an_op() -> None:
    net = Last(nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 3)).double()
    model = Classifier(bayesianize(net), NUM_DATA)
    x, y = torch.randn(NUM_DATA, 4, 3).double(), torch.randint(3, (NUM_DATA,))
    with pytest.raises(ValueError, match="num_particles=0"):
        NGVI(model, KFACGuide(model), num_particles=0).step(x, y)


# ---- errors -------------------------------------------------------------------------------------


def test_data_too_few_or_too_many() -> None:
    x, y = class_data()
    model = classifier()
    guide = KFACGuide(model)
    guide(x, y)
    before = dense(guide)
    for parts in (batches(x, y)[:-1], batches(x, y) * 2):
        with pytest.raises(ValueError, match="the model's plate has size 30"):
            Laplace(model, guide).fit(parts)
    with pytest.raises(ValueError, match="no batch"):
        Laplace(model, guide).fit([])
    assert torch.equal(dense(guide), before) and not guide.is_laplace


def test_ekfac_wants_two_passes() -> None:
    x, y = class_data()
    model = classifier()
    with pytest.raises(ValueError, match="twice"):
        Laplace(model, GUIDES["ekfac"](model)).fit(iter(batches(x, y)))


def test_what_is_not_finite_changes_nothing() -> None:
    x, y = class_data()
    model = classifier()
    guide = KFACGuide(model)
    guide(x, y)
    before = dense(guide)
    x[3] = math.nan
    with pytest.raises((FloatingPointError, ValueError)):
        Laplace(model, guide).fit([(x, y)])
    assert torch.equal(dense(guide), before) and not guide.is_laplace


def test_before_fit_and_wrong_words() -> None:
    model = classifier()
    laplace = Laplace(model, KFACGuide(model))
    with pytest.raises(RuntimeError, match="fit"):
        laplace.log_marginal_likelihood()
    with pytest.raises(RuntimeError, match="call it once"):
        laplace.predict(inputs())
    laplace.guide(*class_data())
    with pytest.raises(RuntimeError, match="fit.loader. comes first"):
        laplace.predict(inputs())
    with pytest.raises(ValueError, match="per='site'"):
        laplace.tune_prior("site")
    with pytest.raises(ValueError, match="curvature='kfac'"):
        Laplace(model, KFACGuide(model), "kfac")
    with pytest.raises(ValueError, match="noise"):
        Laplace(model, KFACGuide(model), "noise")
    with pytest.raises(TypeError, match="KFACGuide"):
        Laplace(model, lambda: None)  # type: ignore[arg-type]


def test_a_likelihood_that_has_no_prediction() -> None:
    x = inputs()
    net = mlp(outputs=1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        rate = net(x).squeeze(-1).exp()
        with pyro.plate("data", NUM_DATA, subsample=rate):
            pyro.sample("obs", dist.Poisson(rate), obs=y)

    laplace = Laplace(model, KFACGuide(model), "fisher").fit([(x, torch.ones(NUM_DATA).double())])
    with pytest.raises(ValueError, match="Poisson"):
        laplace.predict(x)


def test_several_sites() -> None:
    class Two(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            out = self.net(x)
            with pyro.plate("data", NUM_DATA, subsample=x[:, 0]):
                for n in range(2):
                    value = None if y is None else y[:, n]
                    pyro.sample(f"obs{n}", dist.Normal(out[:, n], 0.3), obs=value)

    model, (x, y) = Two(), regression_data()
    laplace = Laplace(model, FullGuide(model)).fit(batches(x, y))
    net = as_plain(laplace.guide, 2)
    scaled = lambda f: dist.Normal(f, 0.3).to_event(1)  # noqa: E731
    wanted = oracles.ggn(net, x, y, scaled) + torch.diag(prior_precision(net))
    torch.testing.assert_close(dense(laplace.guide), wanted)
    with pytest.raises(ValueError, match="obs0, obs1"):
        laplace.predict(x)


def test_a_deterministic_site_is_no_likelihood() -> None:
    x, y = regression_data()
    net = mlp()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = net(x)
        pyro.deterministic("first", mean[:, 0])
        with pyro.plate("data", len(x) if y is None else NUM_DATA):
            pyro.sample("obs", dist.Normal(mean, 0.3).to_event(1), obs=y)

    predicted = Laplace(model, KFACGuide(model)).fit([(x, y)]).predict(x[:5])
    assert predicted.mean.shape == (5, 2)


def test_a_latent_that_has_no_normal_prior() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(x.new_ones(())))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, scale), obs=y[:, 0])

    x, y = regression_data()
    with pytest.raises(ValueError, match="'scale' has a HalfNormal prior.*num_particles=0"):
        Laplace(model, FullGuide(model), curvature="hessian").fit([(x, y)])


@pytest.mark.parametrize("structure", ["block", "full", "kfac", "ekfac"])
def test_curvature_of_many_scales_is_kept_in_single_precision(structure: str) -> None:
    """One column in other units: the others' eigenvalues are 1e-5 of its own, and count."""
    x, y = torch.randn(1000, 100), torch.randn(1000)
    x[:, 0] *= 300
    model = Regressor(bayesianize(nn.Linear(100, 1), 1.0), 1000, noise=1.0)
    guide = GUIDES[structure](model)
    Laplace(model, guide, curvature="ggn").fit([(x, y)])
    rows = torch.cat([x, torch.ones(1000, 1)], 1).double()
    exact = (rows.mT @ rows + torch.eye(101).double()).inverse().diag().sqrt()
    found = torch.cat([guide.get_posterior(site).stddev.flatten() for site in guide.sites])
    torch.testing.assert_close(found.double(), exact, rtol=0.03, atol=0)


def test_a_loaded_guide_with_other_latents_predicts_at_once() -> None:
    x = torch.randn(30, 3)
    y = x.sum(-1)

    def parts() -> tuple[Regressor, KFACGuide]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        model = Regressor(bayesianize(net), 30)
        return model, KFACGuide(model, structure={"net.0": "frozen"})

    model, guide = parts()
    expected = Laplace(model, guide).fit([(x, y)]).predict(x)
    state = guide.state_dict()
    model, guide = parts()
    guide.load_state_dict(state)
    found = Laplace(model, guide).predict(x)
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.stddev, expected.stddev)


def test_predictions_far_inside_of_the_data_in_single_precision() -> None:
    """Inputs that span the directions a truncated side keeps, and a precision of 10⁶ along them."""
    torch.manual_seed(0)
    x = torch.randn(256, 8) @ torch.randn(8, 200)
    variances = []
    for dtype in (torch.float32, torch.float64):
        pyro.clear_param_store()
        net = bayesianize(nn.Linear(200, 1).to(dtype))
        model = Regressor(net, 256, noise=0.01)
        laplace = Laplace(model, KFACGuide(model)).fit([(x.to(dtype), x[:, 0].to(dtype))])
        variances.append((laplace.predict(x[:50].to(dtype)).variance - 1e-4).double())
    torch.testing.assert_close(*variances, rtol=0.01, atol=0.0)


# ---- densities of several examples --------------------------------------------------------------


class Joined(PyroModule):
    """A linear model with a density of all its outputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = bayesianize(nn.Linear(3, 1).double(), prior=1.0), kind

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        mean = self.net(x).squeeze(-1)
        if self.kind == "correlated":
            pyro.sample("obs", dist.MultivariateNormal(mean, self.covariance(len(x))), obs=y)
            return
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)
        if self.kind == "factor":
            pyro.factor("penalty", -2 * mean.square().sum())
        else:
            pyro.sample("total", dist.Normal(mean.sum(), 2.0), obs=x.new_zeros(()))

    @staticmethod
    def covariance(size: int) -> Tensor:
        return torch.eye(size).double() + 0.5

    def precision(self, x: Tensor) -> Tensor:
        design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        one = torch.eye(len(x)).double()
        inside = {
            "correlated": self.covariance(len(x)).inverse(), "factor": 5 * one,
            "total": one + torch.ones_like(one) / 4,
        }[self.kind]
        return design.mT @ inside @ design + torch.eye(4).double()


@pytest.mark.parametrize("kind", ["correlated", "factor", "total"])
def test_a_density_of_all_examples(kind: str) -> None:
    """Its Hessian is exact; the kinds that take examples one by one say so."""
    model, x = Joined(kind), torch.randn(12, 3).double()
    guide = FullGuide(model)
    Laplace(model, guide, curvature="hessian").fit([(x, x[:, 0])])
    torch.testing.assert_close(guide.posterior.precision.dense(), model.precision(x))
    for name in ("ggn", "fisher", "empirical"):
        pyro.clear_param_store()
        with pytest.raises(ValueError, match="one density for all examples, .* use 'hessian'"):
            Laplace(model, FullGuide(model), curvature=name).fit([(x, x[:, 0])])


def test_predictions_of_correlated_outputs() -> None:
    noise = torch.tensor([[0.5, 0.2], [0.2, 0.4]]).double()

    class Two(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = bayesianize(nn.Linear(3, 2).double())

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            mean = self.net(x)
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.MultivariateNormal(mean, noise), obs=y)

    model, x = Two(), torch.randn(12, 3).double()
    guide = FullGuide(model)
    found = Laplace(model, guide).fit([(x, x[:, :2])]).predict(x)
    two = torch.eye(2).double()
    rows = torch.stack([torch.cat([torch.kron(two, row), two], 1) for row in x])
    covariance = rows @ guide.posterior.precision.dense().inverse() @ rows.mT + noise
    assert isinstance(found, dist.MultivariateNormal)
    torch.testing.assert_close(found.covariance_matrix, covariance)


def test_a_batch_is_no_loader() -> None:
    model, (x, y) = regressor(), regression_data()
    with pytest.raises(ValueError, match="batches in a list or a DataLoader"):
        Laplace(model, KFACGuide(model)).fit((x, y))
