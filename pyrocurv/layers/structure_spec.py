"""The structures of a curvature matrix, each with its options.

A spec determines which layers share a block; its type, how the matrix of a block is computed.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from pyrocurv.layers.layer import Layer
from pyrocurv.runtime.choices import Auto, Sharing
from pyrocurv.runtime.validation import check_choice, check_integer, is_integer, shown
from pyrocurv.structures.serialization import serializable

SHARING = ("expand", "reduce")


class StructureSpec:
    """Base of all structures, which are frozen dataclasses."""

    kind: ClassVar[str]  # the name without the options
    is_kronecker: ClassVar[bool] = False
    corrects_eigenvalues: ClassVar[bool] = False  # in the eigenbasis of the Kronecker factors

    def __init_subclass__(cls) -> None:
        serializable(cls, f"{cls.__name__}Spec")  # since structures have the same names

    @property
    def label(self) -> str:
        """The name that `summary` prints."""
        return self.kind

    def group(self, layer: Layer) -> Hashable:
        """A key of the block that `layer` belongs to: by default each layer has its own."""
        return layer


@dataclass(frozen=True)
class Full(StructureSpec):
    """One dense matrix [P, P] over all layers that have this structure."""

    kind = "full"

    def group(self, layer: Layer) -> Hashable:
        return None


@dataclass(frozen=True)
class Block(StructureSpec):
    """One dense matrix [P, P] for each layer."""

    kind = "block"


@dataclass(frozen=True)
class Diagonal(StructureSpec):
    """The diagonal alone."""

    kind = "diag"

    def group(self, layer: Layer) -> Hashable:
        """For speed there are two blocks: of the traced and of the untraced layers."""
        return layer.is_untraced


class KroneckerSpec(StructureSpec):
    """Base of the structures with Kronecker factors, whose options are checked here."""

    is_kronecker = True
    rank: int | Auto | None
    sharing: str

    @property
    def cuts(self) -> tuple[int, int]:
        """The number of diagonal blocks of G and of A."""
        return 1, 1

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1, "auto", None)
        check_choice("sharing", self.sharing, SHARING)


@dataclass(frozen=True)
class KFAC(KroneckerSpec):
    """G [O, O] ⊗ A [I, I] for each layer, O outputs and I inputs with the bias.

    Exact for one datum at one position with one output vector, and for deep linear networks with a
    normal likelihood; for norm layers it is their exact 2 x 2 blocks.

    Args:
        num_blocks: the number of diagonal blocks that A and G are cut into, one number or a pair
            (A, G). 1 is K-FAC; the number of rows of a factor gives its diagonal. An
            eigendecomposition costs d³/p² for p blocks of a factor with d rows. The coupling of
            different blocks is lost, which is nothing where they share no inputs and outputs, as
            the groups of a convolution.
        rank: the number of eigenvectors that each factor keeps; the mean eigenvalue stands for the
            rest. "auto": all if neither side is wider than 160, otherwise 16 for each side wider
            than 64. None: all. The differences among the other eigenvalues are lost, which is
            nothing as long as the data span no more directions than that.
        sharing: for weights used at many positions, "expand" (each position separately) or "reduce"
            (inputs averaged and gradients summed over them; Eschenhagen et al. 2023,
            arXiv:2311.00636). They agree if there is one position.

    Raises:
        ValueError: a number out of its range, or an unknown name.

    Reference: Martens & Grosse 2015, arXiv:1503.05671.

    Example:
        >>> import torch
        >>> from pyrocurv.curvature import KFAC, estimate
        >>> net, x, y = torch.nn.Linear(4, 2), torch.randn(9, 4), torch.randint(2, (9,))
        >>> len(estimate(net, x, y, structure=KFAC(num_blocks=2)).eigenvalues())
        10
    """

    kind = "kfac"
    num_blocks: int | tuple[int, int] = 1
    rank: int | Auto | None = "auto"
    sharing: Sharing = "expand"

    def __post_init__(self) -> None:
        super().__post_init__()
        pair = self._pair
        if not (len(pair) == 2 and all(is_integer(number, 1) for number in pair)):
            allowed = "an integer of at least 1, or a pair (A, G)"
            raise ValueError(f"num_blocks={shown(self.num_blocks)}: {allowed}, is needed")

    @property
    def _pair(self) -> tuple[int, int]:
        blocks = self.num_blocks
        return blocks if isinstance(blocks, tuple) else (blocks, blocks)

    @property
    def label(self) -> str:
        return self.kind if self.cuts == (1, 1) else "kfac-block"

    @property
    def cuts(self) -> tuple[int, int]:
        return self._pair[1], self._pair[0]


@dataclass(frozen=True)
class EKFAC(KroneckerSpec):
    """The eigenbasis of `KFAC` with the optimal eigenvalues; `rank` and `sharing` as there.

    Of all matrices with these eigenvectors it is the nearest to the layer's in the Frobenius norm,
    so it is never farther from it than `KFAC`, and exact where that is.

    Raises:
        ValueError: a number out of its range, or an unknown name.

    Reference: George et al. 2018, arXiv:1806.03884.
    """

    kind = "ekfac"
    corrects_eigenvalues = True
    rank: int | Auto | None = "auto"
    sharing: Sharing = "expand"


STRUCTURES: dict[str, StructureSpec] = {
    "full": Full(), "block": Block(), "diag": Diagonal(), "kfac": KFAC(), "ekfac": EKFAC(),
    "kfac-block": KFAC(num_blocks=2),
}


def parse_structure(structure: Any) -> StructureSpec:
    """The spec of a structure that is given by name or as a spec.

    Raises ValueError for an unknown name, TypeError for a class in place of its instance.
    """
    if isinstance(structure, StructureSpec):
        return structure
    if isinstance(structure, type) and issubclass(structure, StructureSpec):
        name = structure.__name__
        raise TypeError(f"structure={name} is a class: give {name}()")
    if not isinstance(structure, str) or structure not in STRUCTURES:
        names = ", ".join(STRUCTURES)
        raise ValueError(
            f"structure={shown(structure)}: choose one of {names}, KFAC(...) or EKFAC(...)"
        )
    return STRUCTURES[structure]
