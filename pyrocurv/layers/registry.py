"""All supported operations, by the function that torch dispatches on."""

from __future__ import annotations

from typing import Any

from pyrocurv.layers.convolution import CONVOLUTIONS
from pyrocurv.layers.linear import PRODUCTS
from pyrocurv.layers.normalization import SCALES
from pyrocurv.layers.op import OpSpec

OPS: dict[Any, OpSpec] = {**PRODUCTS, **CONVOLUTIONS, **SCALES}
