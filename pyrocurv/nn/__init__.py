"""Networks as Pyro models: weights become sample sites, with ready likelihoods around them."""

from pyrocurv.nn.bayesian import LAYERS, RECURRENT, bayesianize
from pyrocurv.nn.models import Classifier, Regressor

# pickled networks may have these by the names that they had in one file
from pyrocurv.nn.padding import _pad as _pad
from pyrocurv.nn.priors import _NormalPrior as _NormalPrior
from pyrocurv.nn.priors import rescale_prior
from pyrocurv.nn.ties import _borrow as _borrow
from pyrocurv.nn.ties import _give_back as _give_back

__all__ = ["LAYERS", "RECURRENT", "Classifier", "Regressor", "bayesianize", "rescale_prior"]
