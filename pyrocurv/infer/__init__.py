"""Inference: training a structured posterior by natural gradients, and predicting with it."""

from pyrocurv.infer.ngvi import NGVI
from pyrocurv.infer.predictive import Predictive

__all__ = ["NGVI", "Predictive"]
