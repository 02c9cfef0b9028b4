"""The Fisher information of likelihoods in closed form, against sums over their supports."""

from __future__ import annotations

from collections.abc import Callable

import oracles
import pytest
import torch
from oracles import assert_same
from torch import Tensor
from torch.distributions import (
    Cauchy,
    Distribution,
    Exponential,
    Gamma,
    Gumbel,
    Independent,
    Laplace,
    LogNormal,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
)

from pyrocurv.curvature import estimate
from pyrocurv.curvature.fisher_information import root

RTOL = 1e-4  # of the sums: Laplace's score jumps between two of their points
F = torch.tensor([0.4, -0.3], dtype=torch.float64)
T = torch.linspace(-36, 36, 200_001, dtype=torch.float64)  # of a variable that covers a support
COUNTS = torch.arange(400, dtype=torch.float64)
SUPPORTS = {  # points, and their widths
    "counts": (COUNTS, torch.ones_like(COUNTS)),
    "line": (T.sinh(), T.cosh() * (T[1] - T[0])),
    "half line": (T.exp(), T.exp() * (T[1] - T[0])),
}
FAMILIES: dict[str, tuple[Callable[[Tensor], Distribution], str]] = {
    "Poisson": (lambda f: Poisson((f[..., 0] + f[..., 1].sin()).exp()), "counts"),
    "NegativeBinomial": (lambda f: NegativeBinomial(3.5, logits=f[..., 0] - f[..., 1]), "counts"),
    "NegativeBinomial, p": (lambda f: NegativeBinomial(2, f.sum(-1).sigmoid()), "counts"),
    "Normal": (lambda f: Normal(f[..., 0], f[..., 1].exp()), "line"),
    "Laplace": (lambda f: Laplace(f[..., 0], f[..., 1].exp()), "line"),
    "Cauchy": (lambda f: Cauchy(f[..., 0], f[..., 1].exp()), "line"),
    "StudentT": (lambda f: StudentT(4.0, f[..., 0], f[..., 1].exp()), "line"),
    "StudentT, joint": (lambda f: StudentT(3.0, f.sum(-1), (f[..., 1] / 2).exp()), "line"),
    "LogNormal": (lambda f: LogNormal(f[..., 0], f[..., 1].exp()), "half line"),
    "Exponential": (lambda f: Exponential((f[..., 0] * f[..., 1]).exp()), "half line"),
    "Gamma": (lambda f: Gamma(f[..., 0].exp(), f[..., 1].exp()), "half line"),
    "Gamma, rate": (lambda f: Gamma(torch.full_like(f[..., 0], 2.5), f.sum(-1).exp()), "half line"),
}


def by_roots(density: Callable[[Tensor], Distribution], f: Tensor) -> Tensor:
    f = f.detach().requires_grad_()
    scalars = [scalar for scalar in root(density(f)) if scalar.requires_grad]
    found = [torch.autograd.grad(s.sum(), f, retain_graph=True)[0] for s in scalars]
    return oracles.sum_of(torch.outer(v, v) for v in found)


@pytest.mark.parametrize("name", FAMILIES)
def test_roots_give_the_information(name: str) -> None:
    density, support = FAMILIES[name]
    assert_same(by_roots(density, F), oracles.information(density, F, *SUPPORTS[support]), RTOL)


def test_a_normal_vector() -> None:
    covariance = torch.tensor([[2.0, 0.7], [0.7, 0.5]], dtype=torch.float64)
    loc = F.clone().requires_grad_()
    (scalar,) = root(MultivariateNormal(loc, covariance))
    rows = torch.stack([torch.autograd.grad(s, loc, retain_graph=True)[0] for s in scalar])
    assert_same(rows.mT @ rows, covariance.inverse())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("structure", ["full", "diag", "kfac"])
def test_gauss_newton_of_a_network(name: str, structure: str) -> None:
    density, support = FAMILIES[name]
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2).double()
    x = torch.randn(1 if structure == "kfac" else 4, 3).double() / 2
    y = density(net(x)).sample()
    found = estimate(net, x, y, likelihood=density, curvature="ggn", structure=structure)
    outer = [
        J.T @ oracles.information(density, f, *SUPPORTS[support]) @ J
        for J, f in zip(oracles.jacobian(net, x), net(x).detach(), strict=True)
    ]
    wanted = oracles.sum_of(outer)
    assert_same(found.dense(), torch.diag(wanted.diag()) if structure == "diag" else wanted, RTOL)


def test_several_normal_vectors_and_events() -> None:
    torch.manual_seed(0)
    net, x = torch.nn.Linear(3, 2).double(), torch.randn(4, 3).double()
    covariance = torch.tensor([[2.0, 0.7], [0.7, 0.5]], dtype=torch.float64)
    found = estimate(
        net, x, net(x).detach(), curvature="ggn", structure="full",
        likelihood=lambda f: MultivariateNormal(f, covariance),
    )
    J = oracles.jacobian(net, x)
    assert_same(found.dense(), torch.einsum("nip,ij,njq->pq", J, covariance.inverse(), J))
    events = estimate(
        net, x, torch.ones(4, 2).double(), curvature="ggn", structure="full",
        likelihood=lambda f: Independent(Poisson(f.exp()), 1),
    )
    rates = net(x).exp().detach()
    assert_same(events.dense(), torch.einsum("nip,ni,niq->pq", J, rates, J))


def test_rates_that_underflow_have_no_information() -> None:
    f = torch.tensor([-800.0, 0.0], dtype=torch.float64)
    assert torch.equal(by_roots(lambda f: Poisson(f[..., 0].exp()), f), torch.zeros(2, 2).double())


def test_what_has_no_closed_form() -> None:
    f = F.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"Poisson.*got Gumbel: use 'fisher'"):
        next(root(Gumbel(f, torch.ones(2))))
    with pytest.raises(ValueError, match="StudentT for a df that is fixed, here it is a latent"):
        next(root(StudentT(f.exp())))
    with pytest.raises(ValueError, match="NegativeBinomial for a total_count that is fixed"):
        next(root(NegativeBinomial(f.exp(), logits=f)))
    with pytest.raises(ValueError, match="MultivariateNormal for a scale_tril that is fixed"):
        next(root(MultivariateNormal(f, scale_tril=f.exp().diag())))
