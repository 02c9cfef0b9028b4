"""Inference: natural-gradient training of a structured posterior, and Laplace approximations."""

from pyrocurv.infer.laplace import Laplace
from pyrocurv.infer.ngvi import NGVI

__all__ = ["NGVI", "Laplace"]
