"""The structures a curvature can be kept in, and the options that the Kronecker ones have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyrocurv.structures.serialization import serializable

STRUCTURES = ("full", "block", "diag", "kfac", "ekfac", "kfac-block")
SHARING = ("expand", "reduce")


def _check_kronecker(spec: KFAC | EKFAC) -> None:
    rank = spec.rank
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not (whole or rank is None or rank == "auto"):
        raise ValueError(f"rank={rank!r}: a whole number from 1, 'auto' or None is needed")
    if spec.sharing not in SHARING:
        raise ValueError(f"sharing={spec.sharing!r}: choose one of {', '.join(SHARING)}")


@serializable
@dataclass(frozen=True)
class KFAC:
    """G [O, O] ⊗ A [I, I] for each layer, O outputs and I inputs with the bias.

    Exact for one datum at one position with one output vector, and for deep linear networks with a
    normal likelihood; for norm layers it is their exact 2 x 2 blocks.

    Args:
        num_blocks: cut A and G into so many diagonal blocks, one number or a pair (A, G). 1 is
            K-FAC; as many as a factor has rows is its diagonal. An eigendecomposition costs d³/p²
            for p blocks of a factor of d rows. What couples blocks is lost: nothing where they
            share no inputs and outputs, as the groups of a convolution.
        rank: how many eigenvectors each side keeps, the mean eigenvalue standing for the rest.
            "auto": all where neither side is wider than 160, else 16 of each side of more than 64.
            None: all. What is lost is which of the rest has more curvature than another; nothing
            while the data span no more directions than that.
        sharing: of weights used at many positions, "expand" (each position by itself) or "reduce"
            (inputs averaged, gradients summed over them; Eschenhagen et al. 2023,
            arXiv:2311.00636). They are the same at one position.

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

    num_blocks: int | tuple[int, int] = 1
    rank: int | str | None = "auto"
    sharing: str = "expand"

    def __post_init__(self) -> None:
        _check_kronecker(self)
        blocks = self.num_blocks
        pair = blocks if isinstance(blocks, tuple) else (blocks, blocks)
        if not (len(pair) == 2 and all(isinstance(n, int) and n >= 1 for n in pair)):
            raise ValueError(
                f"num_blocks={blocks!r}: a whole number from 1, or a pair (A, G), is needed"
            )

    @property
    def cuts(self) -> tuple[int, int]:
        """Blocks of G and of A."""
        if isinstance(self.num_blocks, int):
            return self.num_blocks, self.num_blocks
        return self.num_blocks[1], self.num_blocks[0]


@serializable
@dataclass(frozen=True)
class EKFAC:
    """The eigenbasis of `KFAC` with the best eigenvalues in it; `rank` and `sharing` as there.

    Of all matrices with these eigenvectors the nearest to the layer's in the Frobenius norm, so
    never farther from it than `KFAC` and exact where that is.

    Raises:
        ValueError: a number out of its range, or an unknown name.

    Reference: George et al. 2018, arXiv:1806.03884.
    """

    rank: int | str | None = "auto"
    sharing: str = "expand"

    def __post_init__(self) -> None:
        _check_kronecker(self)

    @property
    def cuts(self) -> tuple[int, int]:
        """One block of each factor."""
        return 1, 1


Spec = str | KFAC | EKFAC
KRONECKER: dict[str, Spec] = {"kfac": KFAC(), "ekfac": EKFAC(), "kfac-block": KFAC(num_blocks=2)}


def parse_structure(structure: Any) -> Spec:
    """A structure by name or by its specification, as the latter where it has options.

    Raises ValueError that says which there are, TypeError for a class in place of its instance.
    """
    if isinstance(structure, (KFAC, EKFAC)):
        return structure
    if isinstance(structure, type) and issubclass(structure, (KFAC, EKFAC)):
        name = structure.__name__
        raise TypeError(f"structure={name} is a class: give {name}()")
    if not isinstance(structure, str) or structure not in STRUCTURES:
        raise ValueError(
            f"structure={structure!r}: choose one of {', '.join(STRUCTURES)}, KFAC(...) or "
            "EKFAC(...)"
        )
    return KRONECKER.get(structure, structure)
