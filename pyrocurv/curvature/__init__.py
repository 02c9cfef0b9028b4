"""Curvature of the negative log likelihood: which vectors, in which structure, and when."""

from pyrocurv.curvature.estimate import estimate
from pyrocurv.curvature.spec import Curvature
from pyrocurv.layers.structure_spec import EKFAC, KFAC, Block, Diagonal, Full

__all__ = ["EKFAC", "KFAC", "Block", "Curvature", "Diagonal", "Full", "estimate"]
