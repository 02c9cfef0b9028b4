"""Curvature of the negative log likelihood: its vectors, structure and time."""

from pyrocurv.curvature.estimate import estimate
from pyrocurv.curvature.spec import Curvature

__all__ = ["Curvature", "estimate"]
