"""Pyro guides over network weights with a structured Gaussian posterior."""

from pyrocurv.guides.initialization import init_to_network
from pyrocurv.guides.mixture import MixtureGuide
from pyrocurv.guides.presets import BlockGuide, DiagonalGuide, EKFACGuide, FullGuide, KFACGuide
from pyrocurv.guides.structured import StructuredGuide

__all__ = [
    "BlockGuide", "DiagonalGuide", "EKFACGuide", "FullGuide", "KFACGuide", "MixtureGuide",
    "StructuredGuide", "init_to_network",
]
