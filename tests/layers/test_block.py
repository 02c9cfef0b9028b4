"""Blocks of layers: their structure, and the tensors in their packed vectors."""

from typing import Any

import pytest
import torch

from pyrocurv import curvature, structures
from pyrocurv.curvature import EKFAC, KFAC, Diagonal, Full
from pyrocurv.layers import Layer, packing
from pyrocurv.layers.block import Block, make_blocks
from pyrocurv.layers.structure_spec import STRUCTURES, StructureSpec, parse_structure
from pyrocurv.structures.serialization import from_state, to_state

BLOCKS = {
    "linear": [Layer("w", "b", (4, 3))],
    "no bias": [Layer("w", None, (4, 3))],
    "convolution": [Layer("w", "b", (4, 2, 3, 3))],
    "groups": [Layer("w", "b", (6, 2, 3), groups=3)],
    "transposed": [Layer("w", "b", (4, 2, 3), "in_out")],
    "norm": [Layer("w", "b", (5,), "per_unit")],
    "vector": [Layer("b", None, (5,), "bias")],
    "untraced": [Layer("w", None, (2, 3), "untraced")],
    "several": [
        Layer("w", "b", (4, 3)), Layer("v", "c", (6, 2, 3), groups=3),
        Layer("u", None, (), "untraced"),
    ],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_strided_views(name: str) -> None:
    block = Block(tuple(BLOCKS[name]), Diagonal())
    whole = torch.randn(block.size + 7)
    for packed in (whole[3:-4], torch.randn(block.size, 2)[:, 1]):  # inside others, and with gaps
        strided, views = block.strided_views(packed), block.views(packed)
        assert strided.keys() == views.keys() == block.tensors.keys()
        for key, view in strided.items():
            assert tuple(view.shape) == block.tensors[key]
            assert torch.equal(view, views[key])
        assert torch.equal(block.pack(strided), packed)
    assert name == "transposed" or all(
        view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        for view in block.strided_views(whole[3:-4]).values()
    )


@pytest.mark.parametrize("orientation", ["out_in", "in_out"])
@pytest.mark.parametrize("bias", [None, "b"])
@pytest.mark.parametrize("groups", [1, 2])
def test_lerp_of_unpacked_values(orientation: str, bias: str | None, groups: int) -> None:
    """Like packed ones; gradients may share memory, or be the view of a single number."""
    layer = Layer("w", bias, (4, 6, 2), orientation, groups)
    block = Block((layer, Layer("v", None, (5,), "bias")), Diagonal())
    packed, shared = torch.randn(block.size), torch.randn(4, 6, 2)
    values = {
        "w": shared, "b": torch.ones(()).expand(layer.bias_shape), "v": shared.flatten()[:5],
    }
    values = {name: values[name] for name in block.tensors}
    before = {name: value.clone() for name, value in values.items()}
    (found,) = packing.lerp([block], [packed], values, 0.3)
    torch.testing.assert_close(found, torch.lerp(packed, block.pack(values), 0.3))
    assert all(torch.equal(values[name], before[name]) for name in before)


# ---- structures ---------------------------------------------------------------------------------

SPECS = {
    "full": Full(), "block": curvature.Block(), "diag": Diagonal(), "kfac": KFAC(),
    "ekfac": EKFAC(), "kfac-block": KFAC(num_blocks=2),
}
LAYERS = [
    Layer("w", "b", (4, 3)), Layer("u", None, (2, 3), "untraced"), Layer("v", None, (2, 2)),
    Layer("t", None, (), "untraced"),
]


def test_names_are_short_for_specs() -> None:
    assert SPECS == STRUCTURES
    for name, spec in SPECS.items():
        assert parse_structure(name) == parse_structure(spec) == spec
        assert spec.label == name and name.startswith(spec.kind)


@pytest.mark.parametrize("spec", [
    *SPECS.values(), KFAC(num_blocks=(1, 3), rank=2, sharing="reduce"), EKFAC(rank=None),
], ids=str)
def test_a_saved_block_has_its_structure(spec: StructureSpec) -> None:
    block = Block(tuple(LAYERS), spec)
    assert from_state(to_state(block)) == block


def test_a_saved_spec_is_not_the_matrix_of_its_name() -> None:
    matrix = structures.Diagonal(torch.ones(2))
    assert isinstance(from_state(to_state(matrix)), structures.Diagonal)
    assert from_state(to_state(Diagonal())) == Diagonal()


@pytest.mark.parametrize("name", SPECS)
def test_layers_that_no_supported_op_consumes(name: str) -> None:
    """They are diagonal in a separate block, unless dense structures are asked to keep them."""
    first, *others = make_blocks(LAYERS, name)
    assert [len(block.layers) for block in (first, *others)] == (
        [2, 2] if name in ("full", "diag") else [1, 2, 1]
    )
    (untraced,) = (block for block in others if block.is_untraced)
    assert untraced.layers == (LAYERS[1], LAYERS[3])
    assert first.structure == SPECS[name] and untraced.structure == Diagonal()
    dense = make_blocks(LAYERS, SPECS[name], dense_untraced=True)
    if name == "full":
        assert dense == [Block(tuple(LAYERS), Full())]
    elif name == "block":
        assert dense == [Block((layer,), curvature.Block()) for layer in LAYERS]
    else:
        assert dense == [first, *others]


@pytest.mark.parametrize(("make", "options"), [
    (KFAC, {"num_blocks": True}), (KFAC, {"num_blocks": 0}), (KFAC, {"num_blocks": (1, True)}),
    (KFAC, {"num_blocks": (1, 2, 3)}), (KFAC, {"num_blocks": 1.0}), (KFAC, {"rank": True}),
    (EKFAC, {"rank": 0}), (KFAC, {"rank": "all"}), (EKFAC, {"sharing": "mean"}),
    (KFAC, {"sharing": "mean"}),
])
def test_options_that_are_refused(make: Any, options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError) as error:
        make(**options)
    assert str(error.value).startswith(f"{name}={value!r}: ")
    assert name != "sharing" or "choose 'expand' or 'reduce'" in str(error.value)


@pytest.mark.parametrize("spec", SPECS.values(), ids=str)
def test_a_class_in_place_of_its_instance(spec: StructureSpec) -> None:
    name = type(spec).__name__
    with pytest.raises(TypeError, match=rf"structure={name} is a class: give {name}\(\)"):
        parse_structure(type(spec))


def test_a_block_without_kronecker_factors() -> None:
    with pytest.raises(TypeError, match="w ... t has no Kronecker factors, its structure is full"):
        _ = Block(tuple(LAYERS), Full()).kronecker
