"""Sequences whose tokens are the examples: N, the gradient and the curvature are one per token."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from toys import EXACT, GUIDES, NATURAL

from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, bayesianize

SEQUENCES, LENGTH, SIZE, CLASSES = 6, 5, 4, 3


class Tokens(PyroModule):
    """Inputs [B, T, I] and classes [B, T]."""

    def __init__(self, net: nn.Module, sequences: int) -> None:
        super().__init__()
        self.net, self.sequences = net, sequences

    def forward(self, x: Tensor, y: Tensor) -> None:
        logits = self.net(x)
        rows = torch.arange(len(x))
        with pyro.plate("sequences", self.sequences, subsample=rows, dim=-2):
            with pyro.plate("positions", x.shape[1], dim=-1):
                pyro.sample("next", dist.Categorical(logits=logits), obs=y)


def net() -> nn.Module:
    torch.manual_seed(3)
    return bayesianize(nn.Sequential(nn.Linear(SIZE, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double())


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    x = torch.randn(SEQUENCES, LENGTH, SIZE, dtype=torch.float64)
    return x, torch.randint(CLASSES, (SEQUENCES, LENGTH))


@pytest.mark.parametrize("structure", GUIDES)
@pytest.mark.parametrize("batch", [None, 2], ids=["all", "two sequences"])
def test_tokens_in_sequences_are_tokens(structure: str, batch: int | None) -> None:
    """Where no token sees another, [B, T] is the same model as its tokens [B·T] in one row.

    Twice as many data as in the call, so that N, B and T all have to be told apart.
    """
    x, y = data()
    flat = Classifier(net(), 2 * y.numel())
    rowed = Tokens(net(), 2 * SEQUENCES)
    tokens = None if batch is None else batch * LENGTH
    pairs = [(rowed, batch, (x, y)), (flat, tokens, (x.flatten(0, 1), y.flatten()))]
    posteriors, losses = [], []
    for model, rows, batch_of_data in pairs:
        guide = GUIDES[structure](model)
        spec = replace(EXACT, batch=rows)
        ngvi = NGVI(model, guide, curvature=spec, temperature=0.3)
        losses.append(ngvi.step(*batch_of_data))
        posteriors.append(guide.posterior)
    one, other = posteriors
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    torch.testing.assert_close(one.precision.dense(), other.precision.dense())
    torch.testing.assert_close(one.loc, other.loc)


class Padded(Tokens):
    """The same with a mask [B, T]."""

    def forward(self, x: Tensor, y: Tensor, keep: Tensor) -> None:
        logits = self.net(x)
        rows = torch.arange(len(x))
        with pyro.plate("sequences", self.sequences, subsample=rows, dim=-2):
            with pyro.plate("positions", x.shape[1], dim=-1), pyro.poutine.mask(mask=keep):
                pyro.sample("next", dist.Categorical(logits=logits), obs=y)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("structure", GUIDES)
def test_padding_has_no_part(structure: str, curvature: str) -> None:
    """The posterior of a batch with padding is that of the tokens alone, whatever is in the pads.

    N counts the pads of a mask: so that of the tokens alone is the same share of all.
    """
    x, y = data()
    keep = torch.rand(SEQUENCES, LENGTH) < 0.5
    x = torch.where(keep[..., None], x, torch.full((), 9.0, dtype=x.dtype))
    posteriors = []
    for model, arguments in [
        (Padded(net(), SEQUENCES), (x, y, keep)),
        (Classifier(net(), int(keep.sum())), (x[keep], y[keep])),
    ]:
        guide = GUIDES[structure](model)
        spec = replace(EXACT, kind=curvature)
        ngvi = NGVI(model, guide, curvature=spec, damping=0.0, kl_clip=None, **NATURAL)
        ngvi.step(*arguments)
        posteriors.append(guide.posterior)
    one, other = posteriors
    torch.testing.assert_close(one.precision.dense(), other.precision.dense())
    torch.testing.assert_close(one.loc, other.loc)
