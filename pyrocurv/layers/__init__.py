"""Facts about the operations that consume weights: how each is "out = W in" at S positions.

Legend, here and everywhere:  B batch (examples)   S positions that share the weights
I inputs of a layer, bias included   O outputs   K output vectors pulled back   P weights
Γ groups, each with a matrix of its own; most layers have no such axis
"""



from pyrocurv.layers.layer import Layer
from pyrocurv.layers.op import OpArguments, OpSpec
from pyrocurv.layers.registry import OPS

__all__ = ["OPS", "Layer", "OpArguments", "OpSpec"]
