"""Inference: natural-gradient training of a structured posterior, Laplace, and prediction."""

from pyrocurv.infer.history import Epoch, History
from pyrocurv.infer.inference_data import to_arviz
from pyrocurv.infer.laplace import Laplace
from pyrocurv.infer.mixture_training import train_mixture
from pyrocurv.infer.ngvi import NGVI
from pyrocurv.infer.predictive import Predictive
from pyrocurv.infer.temperature_selection import choose_temperature, log_predictive_density
from pyrocurv.infer.training import fit

__all__ = [
    "Epoch", "History", "Laplace", "NGVI", "Predictive", "choose_temperature", "fit",
    "log_predictive_density", "to_arviz", "train_mixture",
]
