"""Bayesian deep learning in Pyro with posteriors that know which weights move together."""

from pyrocurv import curvature, guides, infer, nn, structures

__version__ = "0.1.0"
__all__ = ["curvature", "guides", "infer", "nn", "structures"]
