"""Packed vectors and the tensors in them."""

import pytest
import torch

from pyrocurv.layers import Layer
from pyrocurv.layers.block import Block

BLOCKS = {
    "linear": [Layer("w", "b", (4, 3))],
    "no bias": [Layer("w", None, (4, 3))],
    "convolution": [Layer("w", "b", (4, 2, 3, 3))],
    "groups": [Layer("w", "b", (6, 2, 3), groups=3)],
    "transposed": [Layer("w", "b", (4, 2, 3), "columns")],
    "norm": [Layer("w", "b", (5,), "units")],
    "vector": [Layer("b", None, (5,), "vector")],
    "opaque": [Layer("w", None, (2, 3), "opaque")],
    "several": [
        Layer("w", "b", (4, 3)), Layer("v", "c", (6, 2, 3), groups=3),
        Layer("u", None, (), "opaque"),
    ],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_parts_are_views(name: str) -> None:
    block = Block(tuple(BLOCKS[name]), "diag")
    whole = torch.randn(block.size + 7)
    for packed in (whole[3:-4], torch.randn(block.size, 2)[:, 1]):  # inside others, and with gaps
        parts, views = block.parts(packed), block.views(packed)
        assert parts.keys() == views.keys() == block.tensors.keys()
        for key, part in parts.items():
            assert tuple(part.shape) == block.tensors[key]
            assert torch.equal(part, views[key])
        assert torch.equal(block.pack(parts), packed)
    assert name == "transposed" or all(
        part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        for part in block.parts(whole[3:-4]).values()
    )


@pytest.mark.parametrize("form", ["rows", "columns"])
@pytest.mark.parametrize("bias", [None, "b"])
@pytest.mark.parametrize("groups", [1, 2])
def test_unpacked_values_are_blended_in(form: str, bias: str | None, groups: int) -> None:
    """As the packed ones are; gradients may share memory, or be no more than a view of a number."""
    layer = Layer("w", bias, (4, 6, 2), form, groups)
    block = Block((layer, Layer("v", None, (5,), "vector")), "diag")
    packed, shared = torch.randn(block.size), torch.randn(4, 6, 2)
    values = {
        "w": shared, "b": torch.ones(()).expand(layer.bias_shape), "v": shared.flatten()[:5],
    }
    values = {name: values[name] for name in block.tensors}
    before = {name: value.clone() for name, value in values.items()}
    found = block.lerp(packed, values, 0.3)
    torch.testing.assert_close(found, torch.lerp(packed, block.pack(values), 0.3))
    assert all(torch.equal(values[name], before[name]) for name in before)
