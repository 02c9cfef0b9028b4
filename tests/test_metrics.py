"""`pyrocurv.metrics` against sums that are written out in float64."""

import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.special import rel_entr
from torch import Tensor

from pyrocurv.metrics import Uncertainty, uncertainty


def written_out(probs: Tensor) -> tuple[np.ndarray, ...]:
    """Total, aleatoric and epistemic [N] of probabilities [S, N, C], by their definitions."""
    p = probs.double().numpy()
    mean = p.mean(0)
    entropy = [np.where(q > 0, -q * np.log(np.where(q > 0, q, 1)), 0).sum(-1) for q in (mean, p)]
    return entropy[0], entropy[1].mean(0), rel_entr(p, mean).sum(-1).mean(0)


def same(found: Uncertainty, expected: Any, tolerance: float = 1e-12) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(
            x.double(), torch.as_tensor(y).double(), rtol=tolerance, atol=tolerance
        )
    assert torch.equal(found.total, found.aleatoric + found.epistemic)
    assert (found.epistemic >= 0).all() and (found.aleatoric >= 0).all()


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2),
])
def test_classes(dtype: torch.dtype, tolerance: float) -> None:
    logits = 3 * torch.randn(7, 5, 4, dtype=torch.float64)
    expected = written_out(logits.softmax(-1))
    same(uncertainty(logits=logits.to(dtype)), expected, tolerance)
    same(uncertainty(probs=logits.softmax(-1).to(dtype)), expected, tolerance)
    same(uncertainty(logits=logits.to(dtype).transpose(0, 1), dim=1), expected, tolerance)
    same(uncertainty(logits=logits.to(dtype).transpose(0, 1), dim=-2), expected, tolerance)


def test_shapes_of_images() -> None:
    logits = torch.randn(3, 2, 4, 5, 6).double()
    found = uncertainty(logits=logits)
    flat = uncertainty(logits=logits.flatten(1, 3))
    assert found.total.shape == (2, 4, 5)
    same(found, [x.reshape(2, 4, 5) for x in flat])
    single = uncertainty(logits=logits[:, 0, 0, 0])
    same(single, [x[0] for x in flat])


def test_outcomes_of_two_kinds() -> None:
    logits = 3 * torch.randn(6, 5).double()
    p = logits.sigmoid()
    expected = written_out(torch.stack([1 - p, p], -1))
    same(uncertainty(logits=logits, likelihood="bernoulli"), expected)
    same(uncertainty(probs=p, likelihood="bernoulli"), expected)
    same(uncertainty(dist.Bernoulli(logits=logits)), expected)
    same(uncertainty(dist.Bernoulli(p.mT), dim=-1), expected)


def test_distributions_of_classes() -> None:
    logits = torch.randn(6, 5, 3).double()
    expected = written_out(logits.softmax(-1))
    same(uncertainty(dist.Categorical(logits=logits)), expected)
    same(uncertainty(dist.OneHotCategorical(probs=logits.softmax(-1))), expected)
    same(uncertainty(dist.Categorical(logits=logits.transpose(0, 1)), dim=-1), expected)


def test_certain_classes_have_no_entropy() -> None:
    """0 log 0 is 0, of probabilities and of masked logits."""
    probs = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]])
    for found in (uncertainty(probs=probs), uncertainty(logits=probs.log())):
        same(found, [[math.log(2)], [0.0], [math.log(2)]], 1e-7)
    sure = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    same(uncertainty(probs=sure, likelihood="bernoulli"), [[0.0, 0.0]] * 3)
    far = torch.tensor([[200.0, -200.0], [200.0, 200.0]])
    half = torch.tensor([0.0, math.log(2)])
    same(uncertainty(logits=far, likelihood="bernoulli"), [half, half * 0, half], 1e-7)


def test_samples_that_agree_have_no_mutual_information() -> None:
    logits = torch.randn(1, 50, 10).expand(8, 50, 10)
    assert uncertainty(logits=logits).epistemic.max() < 1e-6


def test_variances() -> None:
    mean, scale = torch.randn(9, 5).double(), torch.rand(9, 5).double()
    expected = [(scale**2).mean(0) + mean.var(0, correction=0), (scale**2).mean(0),
                mean.var(0, correction=0)]
    same(uncertainty(mean=mean, scale=scale), expected)
    same(uncertainty(dist.Normal(mean, scale)), expected)
    same(uncertainty(mean=mean.mT, scale=scale.mT, dim=1), expected)
    same(uncertainty(mean=mean, scale=0.5), [expected[2] + 0.25, [0.25] * 5, expected[2]])
    per_sample = scale[:, :1]
    same(uncertainty(mean=mean, scale=per_sample),
         [expected[2] + (per_sample**2).mean(), [(per_sample**2).mean()] * 5, expected[2]])
    same(uncertainty(mean=mean), [expected[2], [0.0] * 5, expected[2]])


def test_variance_of_a_mixture_by_draws() -> None:
    mean, scale = torch.tensor([[0.0], [2.0]]).double(), torch.tensor([[1.0], [0.5]]).double()
    n = 40_000
    draws = (mean + scale * torch.randn(2, n).double()).flatten()
    error = ((draws - draws.mean()) ** 2).std() / math.sqrt(len(draws))
    assert abs(uncertainty(mean=mean, scale=scale).total - draws.var()) < 5 * error


@pytest.mark.parametrize("arguments, kind, text", [
    ({}, TypeError, "one of samples, logits, probs and mean is needed, got none"),
    ({"logits": torch.ones(2, 2), "mean": torch.ones(2)}, TypeError, "got logits and mean"),
    ({"probs": torch.randn(3, 4, 5)}, ValueError, "probs must .*: are these logits"),
    ({"probs": torch.randn(9, 5), "likelihood": "bernoulli"}, ValueError, "are these logits"),
    ({"logits": torch.full((3, 4, 2), 0.5)}, ValueError, "give them as probs="),
    ({"logits": torch.full((3, 4, 2), math.nan)}, ValueError, "logits has NaN"),
    ({"logits": torch.full((3, 4, 2), math.inf)}, ValueError, "logits has infinity"),
    ({"logits": torch.ones(3)}, ValueError, r"logits has shape \[3\]: \[S, N, C\] is needed"),
    ({"logits": torch.ones(2, 4, 1)}, ValueError, 'one class .* the likelihood is "bernoulli"'),
    ({"logits": torch.ones(0, 4, 2)}, ValueError, "logits has no samples"),
    ({"logits": torch.ones(2, 4, 2), "dim": 2}, ValueError, "dim=2"),
    ({"logits": torch.ones(2, 4, 2), "dim": -1}, ValueError, "dim=-1"),
    ({"logits": torch.ones(2, 4, 2), "dim": "a"}, ValueError, "dim='a'"),
    ({"logits": torch.ones(2, 4, 2).long()}, TypeError, "real numbers"),
    ({"logits": [[0.0]]}, TypeError, "logits: a Tensor is needed"),
    ({"samples": torch.ones(2, 2)}, TypeError, "samples: .* given by name"),
    ({"samples": dist.Poisson(torch.ones(2, 2))}, TypeError, "got Poisson"),
    ({"samples": dist.Normal(0.0, 1.0)}, ValueError, "dim=0"),
    ({"mean": torch.ones(2, 3), "scale": -1.0}, ValueError, "scale=-1"),
    ({"mean": torch.ones(2, 3), "scale": -torch.ones(2, 3)}, ValueError, "scale must"),
    ({"mean": torch.ones(2, 3), "scale": torch.ones(4)}, ValueError, "does not broadcast"),
    ({"logits": torch.ones(2, 3), "scale": 1.0}, TypeError, "belongs to mean"),
    ({"logits": torch.ones(2, 3), "likelihood": "normal"}, ValueError, "likelihood='normal'"),
])
def test_errors(arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        uncertainty(**arguments)
