"""The structures a curvature can be kept in, and the options that the Kronecker ones have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STRUCTURES = ("full", "block", "diag", "kfac", "ekfac", "kfac-block")
SHARING = ("expand", "reduce")


def _check_kronecker(spec: KFAC | EKFAC) -> None:
    rank = spec.rank
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not (whole or rank is None or rank == "auto"):
        raise ValueError(f"rank={rank!r}: a whole number from 1, 'auto' or None is needed")
    if spec.sharing not in SHARING:
        raise ValueError(f"sharing={spec.sharing!r}: choose one of {', '.join(SHARING)}")


@dataclass(frozen=True)
class KFAC:
    """G ⊗ A for each layer.

    Args:
        num_blocks: cut A and G into so many diagonal blocks, one number or a pair (A, G). 1 is
            K-FAC; as many as a factor has rows is its diagonal. An eigendecomposition costs d³/p²
            for p blocks of a factor of d rows.
        rank: how many eigenvectors each side keeps, the mean eigenvalue standing for the rest.
            "auto": all where neither side is wider than 160, else 16 of each side of more than 64.
            None: all. What is lost is which of the rest has more curvature than another.
        sharing: of weights used at many positions, "expand" (each position by itself) or "reduce"
            (inputs averaged, gradients summed over them; Eschenhagen et al. 2023,
            arXiv:2311.00636).

    Raises:
        ValueError: a number out of its range, or an unknown name.
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


@dataclass(frozen=True)
class EKFAC:
    """The eigenbasis of `KFAC` with the best eigenvalues in it; `rank` and `sharing` as there."""

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


def as_structure(structure: Any) -> Spec:
    """A structure by name or by its specification, as the latter where it has options.

    Raises ValueError that says which there are.
    """
    if isinstance(structure, (KFAC, EKFAC)):
        return structure
    if not isinstance(structure, str) or structure not in STRUCTURES:
        raise ValueError(
            f"structure={structure!r}: choose one of {', '.join(STRUCTURES)}, KFAC(...) or "
            "EKFAC(...)"
        )
    return KRONECKER.get(structure, structure)
