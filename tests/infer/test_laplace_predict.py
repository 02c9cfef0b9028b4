"""`Laplace.predict`: probabilities against the integral, outputs by place, and large numbers."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from toys import GUIDES, NUM_DATA, class_data, classifier, inputs, mlp, normal_prior

from pyrocurv.curvature import KFAC
from pyrocurv.curvature.output_covariance import BlockCovariance, SpectralCovariance
from pyrocurv.guides import DiagonalGuide, FullGuide, KFACGuide, StructuredGuide
from pyrocurv.infer import Laplace, linearized_predictive
from pyrocurv.infer.linearized_draws import CovarianceDraws, WeightDraws
from pyrocurv.nn import Classifier, Regressor, bayesianize
from pyrocurv.structures import Dense

DRAWS = 5000
PAIRS = 128  # of the default number of draws


def no_closed_form(*_: Any, **__: Any) -> None:
    """In the place of `last_layer_covariance`."""


def integral(logits: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """E softmax(f) [N, C] by independent draws, and the standard deviation of one draw."""
    root = torch.linalg.cholesky(covariance)
    z = torch.randn(DRAWS, *logits.shape, 1).to(logits)
    probs = (logits + (root @ z).squeeze(-1)).softmax(-1)
    return probs.mean(0), probs.std(0)


def check_error(found: Tensor, truth: Tensor, deviation: Tensor) -> None:
    """Its mean square is less than that of independent draws, as many as by default."""
    error = (found - truth).square().mean()
    assert error < deviation.square().mean() * (1 / DRAWS + 1 / (2 * PAIRS))


def divergence(truth: Tensor, found: Tensor) -> Tensor:
    return (truth * (truth.log() - found.log())).sum(-1).mean()


# ---- probabilities ------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 10, 25])
def test_draws_are_the_integral_where_the_pairwise_rule_doubts(classes: int) -> None:
    root = 2 * torch.randn(20, classes, classes).double() / math.sqrt(classes)
    logits, covariance = 3 * torch.randn(20, classes).double(), root @ root.mT
    truth, deviation = integral(logits, covariance)
    likelihood = torch.distributions.Categorical(logits=logits)
    draws = CovarianceDraws(BlockCovariance(covariance), PAIRS)
    found = linearized_predictive.averaged(likelihood, 0, draws)
    assert found is not None
    check_error(found.probs, truth, deviation)
    pairwise = linearized_predictive.predictive(likelihood, 0, covariance).probs
    assert divergence(truth, found.probs) < divergence(truth, pairwise) / 4


def jacobian(guide: StructuredGuide, model: Callable[..., Any], x: Tensor) -> Tensor:
    """The Jacobian [B, M, P] of what a model returns, in the order of the guide's sites."""
    values = [guide.median()[name] for name in guide.sites]

    def outputs(*weights: Tensor) -> Tensor:
        found: Tensor = pyro.condition(model, dict(zip(guide.sites, weights, strict=True)))(x)
        return found.reshape(len(x), -1)

    parts = torch.autograd.functional.jacobian(outputs, tuple(values))
    return torch.cat([part.flatten(2) for part in parts], -1)


@pytest.mark.parametrize("structure", GUIDES)
def test_a_classifier_averages_over_the_linearised_logits(structure: str) -> None:
    x, y = class_data()
    model = classifier()
    laplace = Laplace(model, GUIDES[structure](model)).fit([(x, y)])
    rows = jacobian(laplace.guide, model, x)
    covariance = rows @ torch.linalg.inv(laplace.guide.posterior.precision.dense()) @ rows.mT
    logits = pyro.condition(model, laplace.guide.median())(x).detach()
    truth, deviation = integral(logits, covariance + 1e-12 * torch.eye(3).double())
    probit, found = laplace.predict(x, link="probit").probs, laplace.predict(x).probs
    check_error(found, truth, deviation)
    assert divergence(truth, found) < divergence(truth, probit)


def test_more_outputs_than_draws_are_drawn_by_weights() -> None:
    """A product of the Jacobian with drawn weights, in place of a backward pass for each output."""
    x, y = class_data()
    model = classifier()
    laplace = Laplace(model, KFACGuide(model)).fit([(x, y)])
    exact = laplace.predict(x)
    precisions = [family.precision() for family in laplace.guide.blocks]
    weights = {n: w.requires_grad_() for n, w in laplace.guide.median().items()}
    with torch.enable_grad():
        output = pyro.condition(model, weights)(x)
    blocks = [family.block for family in laplace.guide.blocks]
    draws = WeightDraws(blocks, precisions, weights, output, 400)
    deviations = torch.stack([*draws.deviations()])  # [K, B, C]
    rows = jacobian(laplace.guide, model, x)
    covariance = rows @ torch.linalg.inv(laplace.guide.posterior.precision.dense()) @ rows.mT
    found = (deviations.unsqueeze(-1) * deviations.unsqueeze(-2)).mean(0)
    variance = covariance.diagonal(dim1=1, dim2=2)
    error = (variance.unsqueeze(-1) * variance.unsqueeze(-2) + covariance.square()) / 400
    assert ((found - covariance).abs() < 5 * error.sqrt()).all()
    with torch.no_grad():
        averaged = linearized_predictive.averaged(
            torch.distributions.Categorical(logits=output.detach()), 0, draws
        )
    assert averaged is not None
    assert (averaged.probs - exact.probs).abs().max() < 0.05
    few = laplace.predict(x, num_samples=4)  # two pairs for three outputs: so weights are drawn
    assert not torch.equal(few.probs, exact.probs)
    assert torch.equal(few.probs, laplace.predict(x, num_samples=4).probs)


def test_two_classes_keep_the_probit_rule_and_can_be_drawn() -> None:
    x = inputs()
    model = Classifier(mlp(outputs=2), NUM_DATA)
    laplace = Laplace(model, FullGuide(model)).fit([(x, (x[:, 0] > 0).long())])
    assert torch.equal(laplace.predict(x).probs, laplace.predict(x, link="probit").probs)
    drawn = laplace.predict(x, link="mc").probs
    assert not torch.equal(drawn, laplace.predict(x).probs)
    torch.testing.assert_close(drawn, laplace.predict(x).probs, atol=0.02, rtol=0)


@pytest.mark.parametrize("deviation", [0.3, 4.0])
@pytest.mark.parametrize("mean", [-2.0, 0.5])
def test_draws_of_a_bernoulli(mean: float, deviation: float) -> None:
    logits = torch.tensor([[mean]]).double()
    covariance = SpectralCovariance(torch.tensor([[deviation**2]]).double())
    found = linearized_predictive.averaged(
        torch.distributions.Bernoulli(logits=logits), 1, CovarianceDraws(covariance, PAIRS)
    )
    z = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    truth = torch.trapezoid(torch.sigmoid(mean + deviation * z) * density, z)
    assert found is not None and abs(float(found.mean) - float(truth)) < 2e-3


def test_draws_repeat_leave_the_generators_and_see_each_example_alone() -> None:
    x, y = class_data()
    model = classifier()
    laplace = Laplace(model, KFACGuide(model)).fit([(x, y)])
    state = torch.get_rng_state()
    for count in (256, 4):  # of the outputs, and of the weights
        found = laplace.predict(x, num_samples=count).probs
        assert torch.equal(found, laplace.predict(x, num_samples=count).probs)
        some = laplace.predict(x[7:12], num_samples=count).probs
        torch.testing.assert_close(some, found[7:12])
    assert torch.equal(torch.get_rng_state(), state)


def test_probabilities_below_what_single_precision_can_hold() -> None:
    logits = torch.tensor([[0.0, -50.0, -200.0]])
    draws = CovarianceDraws(SpectralCovariance(torch.full((1, 3), 1e-4)), PAIRS)
    found = linearized_predictive.averaged(
        torch.distributions.Categorical(logits=logits), 0, draws
    )
    assert found is not None
    torch.testing.assert_close(found.logits, logits, atol=1e-3, rtol=0)


def test_outputs_that_always_move_together() -> None:
    """One weight for three classes: S has rank one, and no Cholesky factor."""
    root = torch.tensor([[[1.0, -2.0, 0.5]]]).double()
    draws = CovarianceDraws(BlockCovariance(root.mT @ root), 4096)
    logits = torch.zeros(1, 3).double()
    found = linearized_predictive.averaged(
        torch.distributions.Categorical(logits=logits), 0, draws
    )
    z = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    probs = (z[:, None] * root[0]).softmax(-1)
    assert found is not None
    torch.testing.assert_close(
        found.probs[0], torch.trapezoid(probs.mT * density, z), atol=2e-3, rtol=0
    )


@pytest.mark.parametrize("arguments", [
    {"link": "logit"}, {"link": None}, {"num_samples": 0}, {"num_samples": 2.5},
    {"num_samples": True}, {"num_samples": "many"},
])
def test_wrong_arguments(arguments: dict[str, Any]) -> None:
    x, y = class_data()
    model = classifier()
    laplace = Laplace(model, KFACGuide(model)).fit([(x, y)])
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name}="):
        laplace.predict(x, **arguments)


def test_draws_of_a_likelihood_without_them() -> None:
    x = inputs()
    model = Regressor(mlp(outputs=2), NUM_DATA, noise=0.3)
    laplace = Laplace(model, FullGuide(model)).fit([(x, x[:, :2])])
    exact = laplace.predict(x).covariance_matrix  # needs no draws
    assert torch.equal(laplace.predict(x, link="mc").covariance_matrix, exact)


# ---- the last layer in closed form --------------------------------------------------------------


class Pixels(PyroModule):
    """Images of logits, with the classes on axis 1 until the likelihood."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh())
        self.net = bayesianize(
            nn.Sequential(body, nn.Conv2d(4, 3, 3, padding=1)).double(), normal_prior(0.8, 1.5)
        )
        self.kind = kind

    def likelihood(self, out: Tensor) -> Any:
        return {
            "categorical": lambda: dist.Categorical(logits=out).to_event(2),
            "log_softmax": lambda: dist.Categorical(logits=out.log_softmax(-1)).to_event(2),
            "bernoulli": lambda: dist.Bernoulli(logits=out).to_event(3),
            "normal": lambda: dist.Normal(out, 0.3).to_event(3),
            "multivariate": lambda: dist.MultivariateNormal(out, torch.eye(3).double()).to_event(2),
        }[self.kind]()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        out: Tensor = self.net(x).permute(0, 2, 3, 1)
        with pyro.plate("data", NUM_DATA, subsample=x[:, 0, 0, 0]):
            pyro.sample("obs", self.likelihood(out), obs=y)
        return out


def images(count: int = NUM_DATA) -> Tensor:
    return torch.randn(count, 2, 4, 3).double()


def fitted_pixels(kind: str, guide: Callable[..., StructuredGuide], **options: Any) -> Laplace:
    model = Pixels(kind)
    out = model(images())
    with torch.no_grad():
        y = model.likelihood(out).sample()
    return Laplace(model, guide(model, **options), "empirical").fit([(images(), y)])


def as_tensors(found: Any) -> list[Tensor]:
    base = found.base_dist
    if isinstance(base, torch.distributions.MultivariateNormal):
        return [base.mean, base.covariance_matrix]
    return [base.probs] if base.has_enumerate_support else [base.mean, base.variance]


LAST = {"net.0.0": "frozen"}
HEADS: dict[str, tuple[Callable[..., StructuredGuide], dict[str, Any]]] = {
    "kfac": (KFACGuide, {"structure": LAST}),
    "kfac, thin": (KFACGuide, {"structure": {**LAST, "net.1": KFAC(rank=2)}}),
    "diagonal": (DiagonalGuide, {"structure": LAST}),
    "full": (FullGuide, {"structure": LAST}),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "kind", ["categorical", "log_softmax", "bernoulli", "normal", "multivariate"]
)
def test_the_last_layer_in_closed_form(
    kind: str, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to one backward pass for each output; no pass is taken."""
    guide, options = HEADS[head]
    laplace = fitted_pixels(kind, guide, **options)
    x = images(3)
    link = "mc" if kind in ("categorical", "log_softmax") else "auto"
    with monkeypatch.context() as patch:
        patch.setattr(linearized_predictive, "propagate", None)
        patch.setattr("pyrocurv.curvature.last_layer.MAX_ELEMENTS", 1)
        found = laplace.predict(x, link=link)
        pairwise = laplace.predict(x, link="probit")
    monkeypatch.setattr(linearized_predictive, "last_layer_covariance", no_closed_form)
    for wanted, closed in (
        (laplace.predict(x, link=link, num_samples=256), found),
        (laplace.predict(x, link="probit"), pairwise),
    ):
        # drawn, it is with another root of the same covariance
        loose = {"atol": 0.03, "rtol": 0} if closed is found and link == "mc" else {}
        for one, other in zip(as_tensors(closed), as_tensors(wanted), strict=True):
            torch.testing.assert_close(one, other, **loose)


@pytest.mark.parametrize("kind", ["categorical", "normal", "multivariate"])
def test_the_covariance_of_a_place_is_that_of_all_outputs(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few output gradients at once; of all layers."""
    laplace = fitted_pixels(kind, KFACGuide)
    x = images(2)
    rows = jacobian(laplace.guide, laplace.model, x)
    inverse = torch.linalg.inv(laplace.guide.posterior.precision.dense())
    covariance = (rows @ inverse @ rows.mT).unflatten(-1, (-1, 3)).unflatten(-3, (-1, 3))
    places = covariance.diagonal(dim1=1, dim2=3).movedim(-1, 1).unflatten(1, (4, 3))
    monkeypatch.setattr("pyrocurv.curvature.output_covariance.MAX_GRADIENTS", 2000)
    found = laplace.predict(x, link="probit").base_dist
    if kind == "categorical":
        logits = pyro.condition(laplace.model, laplace.guide.median())(x).detach()
        likelihood = torch.distributions.Categorical(logits=logits.reshape(-1, 3))
        wanted = linearized_predictive.predictive(likelihood, 0, places.reshape(-1, 3, 3))
        torch.testing.assert_close(found.probs.reshape(-1, 3), wanted.probs)
    elif kind == "normal":
        variance = places.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(found.variance, variance + 0.3**2)
    else:
        torch.testing.assert_close(found.covariance_matrix, places + torch.eye(3).double())


def test_tokens_and_tied_or_rearranged_outputs() -> None:
    """Where outputs are not the layer's own, the general way is taken."""

    class Head(PyroModule):
        def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.net = bayesianize(nn.Linear(5, 3).double(), normal_prior(0.8, 1.5))
            self.change = change

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            out = self.change(self.net(x))
            with pyro.plate("data", NUM_DATA, subsample=x[:, 0, 0]):
                pyro.sample("obs", dist.Normal(out, 0.5).to_event(2), obs=y)
            return out

    x = torch.randn(NUM_DATA, 4, 5).double()
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "tokens": lambda out: out, "flipped": lambda out: out.flip(1),
        "scaled": lambda out: 2 * out, "turned": lambda out: out.mT,
        "clipped": lambda out: out.clamp(-1, 1),
        "shifted": lambda out: out - out.logsumexp(-1, keepdim=True),
        "repeated": lambda out: out[:, :1].expand(-1, 4, -1),
    }
    for name, change in changes.items():
        pyro.clear_param_store()
        model = Head(change)
        guide = KFACGuide(model)
        y = model(x).detach()
        laplace = Laplace(model, guide).fit([(x, y)])
        rows = jacobian(guide, model, x)
        covariance = rows @ torch.linalg.inv(guide.posterior.precision.dense()) @ rows.mT
        variance = covariance.diagonal(dim1=1, dim2=2).reshape(y.shape)
        found = laplace.predict(x).base_dist.variance
        torch.testing.assert_close(found, variance + 0.25, msg=f"{name}: {found}")


@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian"])
def test_only_a_hessian_is_projected(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of squares has no negative part: no eigendecomposition to find that out."""
    calls = []
    psd = Dense.psd
    monkeypatch.setattr(Dense, "psd", lambda self: calls.append(1) or psd(self))
    x, y = class_data()
    model = classifier()
    Laplace(model, FullGuide(model), kind).fit([(x, y)])
    assert bool(calls) == (kind == "hessian")
