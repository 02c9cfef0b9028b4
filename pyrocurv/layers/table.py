"""All supported operations, by the function that torch dispatches on."""

from __future__ import annotations

from typing import Any

from pyrocurv.layers.convolution import CONVOLUTIONS
from pyrocurv.layers.linear import PRODUCTS
from pyrocurv.layers.op import Op
from pyrocurv.layers.scale import SCALES

OPS: dict[Any, Op] = {**PRODUCTS, **CONVOLUTIONS, **SCALES}
