"""Inference: training a structured posterior by natural gradients."""

from pyrocurv.infer.mixture import train_mixture
from pyrocurv.infer.ngvi import NGVI

__all__ = ["NGVI", "train_mixture"]
