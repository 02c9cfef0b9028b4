"""Pyro guides over network weights with a structured Gaussian posterior."""

from pyrocurv.guides.kinds import BlockGuide, DiagonalGuide, EKFACGuide, FullGuide, KFACGuide
from pyrocurv.guides.mixture import MixtureGuide
from pyrocurv.guides.start import init_to_network
from pyrocurv.guides.structured import StructuredGuide

__all__ = [
    "BlockGuide", "DiagonalGuide", "EKFACGuide", "FullGuide", "KFACGuide", "MixtureGuide",
    "StructuredGuide", "init_to_network",
]
