"""The functions that `Capture` recognizes, as torch dispatches on them.

OPS consume weights. The others make a view of a weight, or add a bias to the output of an op.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import getattr_static
from typing import Any

import torch
from torch import Tensor

from pyrocurv.layers.convolution import CONVOLUTIONS
from pyrocurv.layers.linear import PRODUCTS
from pyrocurv.layers.normalization import SCALES
from pyrocurv.layers.op import OpSpec

OPS: dict[Any, OpSpec] = {**PRODUCTS, **CONVOLUTIONS, **SCALES}

ADDITIONS = {
    torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__,
}


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _swaps_axes(input: Tensor, dim0: int, dim1: int) -> bool:
    return dim0 % 2 != dim1 % 2


# {function: whether a call of it on a matrix swaps the axes}
TRANSPOSES: dict[Any, Callable[..., bool]] = {
    getattr_static(Tensor, "T").__get__: _always,
    getattr_static(Tensor, "mT").__get__: _always,
    Tensor.t: _always,
    torch.t: _always,
    Tensor.transpose: _swaps_axes,
    torch.transpose: _swaps_axes,
}

SPLITS = {Tensor.chunk, torch.chunk, Tensor.split, torch.split}
