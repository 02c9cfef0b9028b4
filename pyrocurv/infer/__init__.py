"""Inference: natural-gradient training of a structured posterior, and Laplace approximations."""

from pyrocurv.infer.laplace import Laplace
from pyrocurv.infer.ngvi import NGVI
from pyrocurv.infer.temperature import choose_temperature, log_predictive_density

__all__ = ["NGVI", "Laplace", "choose_temperature", "log_predictive_density"]
