"""Inference: training a structured posterior by natural gradients, and predicting with it."""

from pyrocurv.infer.mixture import train_mixture
from pyrocurv.infer.ngvi import NGVI
from pyrocurv.infer.predictive import Predictive

__all__ = ["NGVI", "Predictive", "train_mixture"]
