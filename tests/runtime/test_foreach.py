"""Copies and magnitudes of many tensors."""

import math

import torch

from pyrocurv.runtime.foreach import copies, magnitudes


def test_copies_are_bit_for_bit() -> None:
    tensors = [
        torch.tensor([-0.0, math.inf, math.nan, 1e-45, 3.0]), torch.tensor([2**62 + 1]),
        torch.tensor([True]), torch.randn(3, 4).T.half(), torch.tensor(1 + 2j), torch.empty(0),
    ]
    for old, new in zip(tensors, copies(tensors), strict=True):
        assert new.dtype == old.dtype and new.shape == old.shape
        assert new.numel() == 0 or new.data_ptr() != old.data_ptr()
        assert torch.equal(new.nan_to_num(7.0), old.nan_to_num(7.0))
        assert new.is_complex() or torch.equal(new.signbit(), old.signbit())


def test_magnitudes() -> None:
    like = torch.zeros((), dtype=torch.float64)
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[0, 1]]), torch.tensor([1.0, math.nan]), (3,), check_invariants=True
    )
    tensors = [torch.tensor([1.0, -3.0]), torch.empty(0), torch.tensor([3e38, 3e38]), sparse,
               torch.tensor([1.0, math.nan, 2.0]), torch.tensor([-math.inf])]
    found = [float(value) for value in magnitudes(tensors, like)]
    assert found[0] == 3 and math.isfinite(found[1]) and math.isnan(found[2])
    assert math.isnan(found[3]) and found[4] == math.inf and magnitudes([], like) == []
