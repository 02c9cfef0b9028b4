"""Optimizers with a structured curvature for any PyTorch loop; no Pyro in sight."""

from pyrocurv.optim.second_order import SecondOrderOptimizer

__all__ = ["SecondOrderOptimizer"]
