"""Distributions inside of wrappers, and numbers behind expanded tensors."""

import pyro.distributions as dist
import torch
from torch.distributions import constraints

from pyrocurv.runtime.distributions import as_normal, compact, unwrap


def test_as_normal() -> None:
    inner = dist.Normal(torch.zeros(2, 3), 1.0)
    assert as_normal(inner) is inner
    assert as_normal(inner.to_event(1).to_event(1)) is inner
    assert as_normal(dist.Laplace(0.0, 1.0)) is None
    assert as_normal(dist.Laplace(torch.zeros(3), 1.0).to_event(1)) is None


def test_compact() -> None:
    assert compact(torch.tensor(2.0).expand(3, 4)).shape == ()
    assert compact(torch.full((1, 1), 2.0)).shape == ()
    full = torch.full((3,), 2.0)
    assert compact(full) is full
    column = torch.rand(3, 1).expand(3, 4)
    assert compact(column) is column


def test_unwrap() -> None:
    normal = dist.Normal(torch.zeros(2, 3), 1.0)
    assert unwrap(normal) is normal
    assert unwrap(normal.to_event(1).to_event(1)) is normal
    masked = normal.to_event(1).mask(torch.tensor([True, False])).to_event(1)
    assert unwrap(masked) is masked.base_dist and as_normal(masked) is None
    assert unwrap(masked, masks=True) is normal
    assert unwrap(dist.LogNormal(0.0, 1.0), masks=True).support == constraints.positive
