"""The operations that consume weights, each as "output = W input" at S positions.

Legend for the whole package:
    B batch (examples)   S positions that share the weights   P weights
    I inputs of a layer, bias included   O outputs   K output vectors that are pulled back
    Γ groups with a matrix each; most layers have no such axis
"""

from typing import Any

from pyrocurv.layers.convolution import CONVOLUTIONS
from pyrocurv.layers.layer import Layer
from pyrocurv.layers.linear import PRODUCTS
from pyrocurv.layers.normalization import SCALES
from pyrocurv.layers.op import OpArguments, OpSpec

__all__ = ["OPS", "Layer", "OpArguments", "OpSpec"]

OPS: dict[Any, OpSpec] = {**PRODUCTS, **CONVOLUTIONS, **SCALES}  # as torch dispatches on them
