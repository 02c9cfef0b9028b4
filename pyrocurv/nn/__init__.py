"""Networks as Pyro models: weights become sample sites, and ready models add a likelihood."""

from pyrocurv.nn.batch_norm import update_bn
from pyrocurv.nn.bayesianize import LAYERS, RECURRENT, bayesianize
from pyrocurv.nn.models import Classifier, Regressor
from pyrocurv.nn.weight_priors import rescale_prior

__all__ = [
    "LAYERS", "RECURRENT", "Classifier", "Regressor", "bayesianize", "rescale_prior", "update_bn",
]
