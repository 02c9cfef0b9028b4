"""`NGVI.loss_terms` against log densities that the model itself writes down."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyrocurv.guides import DiagonalGuide, FullGuide, KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import bayesianize

pytestmark = pytest.mark.usefixtures("double")
N, B = 40, 10


class Recorded(PyroModule):
    """Regression that keeps the negative log likelihood, for all N data, of each of its runs."""

    def __init__(self, noise: bool = False, network: bool = True) -> None:
        super().__init__()
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.net = bayesianize(net) if network else None
        self.w = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        self.scale = PyroSample(dist.LogNormal(0.0, 0.3)) if noise else 0.5
        self.nlls: list[Tensor] = []

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = x @ self.w if self.net is None else self.net(x).squeeze(-1)
        fn = dist.Normal(mean, self.scale)
        self.nlls.append(-fn.log_prob(y).sum().detach() * N / len(x))
        with pyro.plate("data", N, subsample=torch.arange(len(x))):
            pyro.sample("obs", fn, obs=y)


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(B, 3)
    return x, x.sum(-1) + 0.5 * torch.randn(B)


def check(ngvi: NGVI, loss: float, runs: int) -> Any:
    """The terms of a step in which the model ran at as many samples."""
    terms, model = ngvi.loss_terms, ngvi.model
    assert terms is not None and isinstance(model, Recorded)
    torch.testing.assert_close(terms.nll, float(torch.stack(model.nlls[-runs:]).mean()))
    assert terms.loss == pytest.approx(loss, rel=1e-12)
    assert terms.num_data == N
    return terms


@pytest.mark.parametrize("guide", [KFACGuide, DiagonalGuide])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("particles", [0, 1, 4])
def test_layer_by_layer(guide: type[Any], noise: bool, particles: int) -> None:
    model = Recorded(noise)
    options = {"curvature": "ggn", "num_particles": particles, "temperature": 0.3, "kl_warmup": 3}
    ngvi = NGVI(model, guide(model), **options)
    assert ngvi.loss_terms is None
    for step in range(5):
        exact = float(ngvi.guide.kl().detach()) if step and not particles and not noise else None
        loss = ngvi.step(*data())
        terms = check(ngvi, loss, max(1, particles))
        assert terms.temperature == pytest.approx(0.3 * min(1, (step + 1) / 3))
        if exact is not None:  # no samples, and no latent in the fallback guide
            assert terms.kl == pytest.approx(exact, rel=1e-9)
        assert terms.kl > 0


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("particles", [0, 6])
def test_all_latents_jointly(particles: int, vectorized: bool) -> None:
    """In one vectorized run after the first step, and one by one."""
    model = Recorded(noise=True, network=False)
    ngvi = NGVI(model, FullGuide(model), curvature="hessian", num_particles=particles)
    x, y = data()
    check(ngvi, ngvi.step(x, y), max(1, particles))
    rule: Any = ngvi._rule
    rule._can_vectorize = vectorized
    for _ in range(2):
        loss = ngvi.step(x, y)
        if vectorized:  # the record is of tensors that vmap has taken back
            terms = ngvi.loss_terms
            assert terms is not None and terms.loss == pytest.approx(loss, rel=1e-12)
            assert rule._can_vectorize and terms.num_data == N
        else:
            terms = check(ngvi, loss, max(1, particles))
    rule._can_vectorize = False  # the terms are those of the same step one by one
    state, guide = ngvi.state_dict(), {n: p.clone() for n, p in ngvi.guide.state_dict().items()
                                       if isinstance(p, Tensor)}
    ngvi.step(x, y)
    single = ngvi.loss_terms
    with torch.no_grad():
        for name, p in (*ngvi.guide.named_parameters(), *ngvi.guide.named_buffers()):
            p.copy_(guide[name])
    ngvi.load_state_dict(state)
    rule._can_vectorize = True
    ngvi.step(x, y)
    assert single is not None and ngvi.loss_terms is not None
    assert ngvi.loss_terms.nll == pytest.approx(single.nll, rel=1e-10)
    assert ngvi.loss_terms.kl == pytest.approx(single.kl, rel=1e-8)


def test_a_conjugate_model_has_its_evidence() -> None:
    """At the exact posterior nll + KL is -log evidence, whatever the samples are."""
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)

    x, y = data()
    ngvi = NGVI(model, FullGuide(model), curvature="hessian", lr=1.0, kl_clip=None,
                average=False)
    for _ in range(60):
        ngvi.step(x, y)
    covariance = x @ x.mT + 0.25 * torch.eye(B)
    evidence = dist.MultivariateNormal(torch.zeros(B), covariance).log_prob(y)
    terms = ngvi.loss_terms
    assert terms is not None and terms.num_data == B
    assert terms.nll + terms.kl == pytest.approx(-float(evidence), rel=1e-6)
    assert terms.kl > 0


def test_several_likelihoods_and_an_unknown_number_of_data() -> None:
    def two(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", N, subsample=x):
            pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
        pyro.sample("total", dist.Normal(w.sum(), 1.0), obs=torch.tensor(3.0))

    def factor(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.factor("likelihood", dist.Normal(x @ w, 0.5).log_prob(y).sum())

    for model, number in ((two, N), (factor, None)):
        pyro.clear_param_store()
        ngvi = NGVI(model, FullGuide(model), curvature="hessian")
        for _ in range(3):  # vectorized too
            loss = ngvi.step(*data())
            terms = ngvi.loss_terms
            assert terms is not None and terms.num_data == number
            assert terms.loss == pytest.approx(loss, rel=1e-12)


def test_a_skipped_step_leaves_the_terms_of_the_last_one() -> None:
    model = Recorded()
    ngvi = NGVI(model, KFACGuide(model), on_nonfinite="skip")
    x, y = data()
    ngvi.step(x, y)
    before = ngvi.loss_terms
    ngvi.step(x * torch.nan, y)
    assert ngvi.loss_terms is before and ngvi.skipped == 1
