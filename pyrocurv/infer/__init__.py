"""Inference: training a structured posterior by natural gradients."""

from pyrocurv.infer.ngvi import NGVI

__all__ = ["NGVI"]
