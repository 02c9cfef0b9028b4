"""Structured symmetric matrices: immutable values that act like the dense matrix they stand for."""

from pyrocurv.structures.base import LazySolution, Solution, Structure
from pyrocurv.structures.block_diagonal import BlockDiagonal
from pyrocurv.structures.dense import Dense
from pyrocurv.structures.diagonal import Diagonal
from pyrocurv.structures.inverse_dense import InverseDense
from pyrocurv.structures.kronecker import Kronecker, automatic_ranks
from pyrocurv.structures.kronecker_eigen import KroneckerEigen
from pyrocurv.structures.linalg import cut
from pyrocurv.structures.rescaled import Rescaled

__all__ = [
    "BlockDiagonal", "Dense", "Diagonal", "InverseDense", "Kronecker", "KroneckerEigen",
    "LazySolution", "Rescaled", "Solution", "Structure", "automatic_ranks", "cut",
]
