"""The vectors of several blocks at once give what each gives alone."""

from dataclasses import replace

import torch
from test_block import BLOCKS

from pyrocurv.layers import packing
from pyrocurv.layers.block import Block
from pyrocurv.layers.structure_spec import Diagonal


def blocks_and_values() -> tuple[list[Block], dict[str, torch.Tensor]]:
    """Blocks with names of their own, of all orientations and in two dtypes."""
    blocks, values = [], {}
    for number, layers in enumerate(BLOCKS.values()):
        renamed = [
            replace(layer, weight=f"{number}.{layer.weight}",
                    bias=layer.bias and f"{number}.{layer.bias}")
            for layer in layers
        ]
        block = Block(tuple(renamed), Diagonal())
        blocks.append(block)
        dtype = torch.float64 if number % 3 == 0 else torch.float32
        values |= {name: torch.randn(shape, dtype=dtype) for name, shape in block.tensors.items()}
    return blocks, values


def test_pack_and_lerp() -> None:
    blocks, values = blocks_and_values()
    vectors, views = packing.pack(blocks, values)
    for name, view in views.items():
        assert torch.equal(view, values[name])
    for block, vector in zip(blocks, vectors, strict=True):
        assert torch.equal(vector, block.pack(values))
    _, others = blocks_and_values()
    before = [vector.clone() for vector in vectors]
    moved = packing.lerp(blocks, vectors, others, 0.3)
    for block, old, kept, new in zip(blocks, before, vectors, moved, strict=True):
        torch.testing.assert_close(new, torch.lerp(old, block.pack(others), 0.3))
        assert torch.equal(old, kept)
    assert packing.pack([], {}) == ([], {})


def test_of_flat_blocks_a_vector_is_the_tensor() -> None:
    flat = [block for block in blocks_and_values()[0] if block.is_flat]
    assert 0 < len(flat) < len(BLOCKS)
    for block in flat:
        ((name, shape),) = block.tensors.items()
        numbers = torch.arange(block.size)
        assert torch.equal(block.pack({name: numbers.view(shape)}), numbers)
