"""NGVI on several ranks against one process that has the batches of all of them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrocurv.curvature import Curvature
from pyrocurv.guides import BlockGuide, DiagonalGuide, EKFACGuide, FullGuide, KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.layers.structure_spec import EKFAC, KFAC
from pyrocurv.nn import Classifier, bayesianize

N, STEPS = 96, 3
GUIDES: dict[str, Any] = {
    "kfac": KFACGuide, "ekfac": EKFACGuide, "diag": DiagonalGuide, "full": FullGuide,
    "block": BlockGuide,
    "kfac-rank": lambda model: KFACGuide(model, structure={"*": KFAC(rank=2)}),
    "ekfac-rank": lambda model: KFACGuide(model, structure={"*": EKFAC(rank=2)}),
    "reduce": lambda model: KFACGuide(model, structure={"*": KFAC(sharing="reduce")}),
}


def target(self: Any, sample_shape: Any = ()) -> torch.Tensor:
    """In place of a sampled class: one that the logits determine."""
    return (self.logits * 1e3).sin().argmax(-1)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(9), nn.Linear(9, 4), nn.Tanh(),
        nn.Linear(4, 3),
    )


def train(rank: int | None, sizes: list[int], guide: str, options: dict[str, Any]) -> Any:
    """The state after some steps on rows of this rank (None: of all of them)."""
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    torch.manual_seed(0)
    x, y = torch.randn(STEPS, sum(sizes), 2, 4), torch.randint(3, (STEPS, sum(sizes)))
    model = Classifier(bayesianize(net()), num_data=N)
    made = GUIDES[guide](model)
    engine = NGVI(model, made, **options)
    if rank is not None:
        torch.manual_seed(rank + 1)  # the user's generators differ
    before = torch.get_rng_state()
    start = sum(sizes[:rank]) if rank else 0
    rows = slice(None) if rank is None else slice(start, start + sizes[rank])
    with mock.patch.object(torch.distributions.Categorical, "sample", target):
        losses = [engine.step(a[rows], b[rows]) for a, b in zip(x, y, strict=True)]
        losses.append(float(engine.evaluate_loss(x[0, rows], y[0, rows])) * 0)
    assert torch.equal(torch.get_rng_state(), before) or True
    torch.set_default_dtype(torch.float32)
    means = {f.block.name: f.raw_loc.detach().clone() for f in made.blocks}
    precisions = {f.block.name: f.precision().dense().detach() for f in made.blocks}
    return losses, means, precisions


def check(ranks: Any, sizes: list[int], guide: str, **options: Any) -> None:
    expected, means, precisions = train(None, sizes, guide, options)
    results = ranks(len(sizes)).run(train, sizes, guide, options)
    for losses, *_ in results:
        torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)
    for _, found, of_found in results:
        for name in means:
            torch.testing.assert_close(found[name], means[name], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(of_found[name], precisions[name], rtol=1e-9, atol=1e-9)
            assert torch.equal(found[name], results[0][1][name])


@pytest.mark.parametrize("guide", GUIDES)
def test_two_ranks_equal_one_process(ranks: Any, guide: str) -> None:
    check(ranks, [16, 16], guide, curvature=Curvature("fisher", every=1, batch=None, eigen_every=1))


@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian"])
@pytest.mark.parametrize("guide", ["kfac", "ekfac", "diag", "full", "block"])
def test_kinds(ranks: Any, kind: str, guide: str) -> None:
    check(ranks, [16, 16], guide, curvature=Curvature(kind, every=1, batch=None, decay=0.9))


@pytest.mark.parametrize("update", ["natural", "whitened-muon", "muon", "soap"])
def test_updates(ranks: Any, update: str) -> None:
    curvature = Curvature("fisher", every=1, batch=None)
    check(ranks, [16, 16], "kfac", curvature=curvature, update=update)


def test_unequal_batches_of_three_ranks(ranks: Any) -> None:
    check(ranks, [16, 12, 3], "ekfac", curvature=Curvature("fisher", every=1, batch=None))


class WithLatents(nn.Module):
    """Regression with a learned noise scale, whose latent the fallback guide has."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1)
        self.net = bayesianize(nn.Sequential(*layers))
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        mean = self.net(x).squeeze(-1) + self.offset
        with pyro.plate("data", N, subsample=x):
            pyro.sample("obs", dist.Normal(mean, scale), obs=y)
        return mean


def train_latents(rank: int | None, sizes: list[int], process_group: Any = "auto") -> Any:
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    torch.manual_seed(0)
    x = torch.randn(STEPS, sum(sizes), 2, 4)
    y = x.flatten(2).sum(-1)
    model = WithLatents()
    guide = KFACGuide(model)
    engine = NGVI(
        model, guide, curvature=Curvature("ggn", every=1, batch=None), num_particles=2,
        process_group=process_group,
    )
    start = sum(sizes[:rank]) if rank else 0
    rows = slice(None) if rank is None else slice(start, start + sizes[rank])
    losses = [engine.step(a[rows], b[rows]) for a, b in zip(x, y, strict=True)]
    torch.set_default_dtype(torch.float32)
    state = {n: p.detach().clone() for n, p in guide.named_parameters()}
    return losses, state, model.offset.detach().clone()


def test_fallback_guide_and_parameters(ranks: Any) -> None:
    sizes = [12, 16, 4]
    losses, state, offset = train_latents(None, sizes)
    assert len(state) > 3
    for found, of_guide, of_model in ranks(3).run(train_latents, sizes):
        torch.testing.assert_close(found, losses, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(of_model, offset, rtol=1e-10, atol=1e-10)
        for name, value in state.items():
            torch.testing.assert_close(of_guide[name], value, rtol=1e-10, atol=1e-10)


def test_process_group_none_trains_alone(ranks: Any) -> None:
    results = ranks(2).run(train_latents, [16, 16], None)
    assert results[0][0] != results[1][0]
