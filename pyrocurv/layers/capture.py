"""Records which ops consume the tracked weights, and with which inputs.

A `TorchFunctionMode` recognizes the tracked tensors by identity, so PyroModules, converted networks
and functional models look alike. The gradient edge of an output is taken when the op runs: an
in-place activation may overwrite the tensor, but never the edge.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import getattr_static
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pyrocurv.layers import OPS, OpArguments, OpSpec
from pyrocurv.layers.autograd_graph import next_sequence_number, sequence_number
from pyrocurv.layers.calls import OpRecord, TrackedTensor
from pyrocurv.layers.linear import LINEAR
from pyrocurv.layers.trace import Trace

ADDITIONS = {
    torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__,
}
TRANSPOSES = {
    getattr_static(Tensor, "T").__get__, getattr_static(Tensor, "mT").__get__,
    torch.t, Tensor.t, torch.transpose, Tensor.transpose,
}
SPLITS = {torch.chunk, Tensor.chunk, torch.split, Tensor.split}


class Capture(TorchFunctionMode):
    """Records the supported ops on the tracked tensors {name: tensor}, and other uses of them.

    Enter it around the forward pass and call `trace()` after it. Ops that no gradient flows
    through, as those of a statistic for the log, do not count. A batch norm in training mode is
    seen; that over several processes is no op of its own, see `has_synchronized_norm`.
    """

    def __init__(self, tracked: Mapping[str, Tensor], has_batch_coupling: bool = False) -> None:
        super().__init__()
        self._bases = {**tracked}
        self._tracked: dict[int, TrackedTensor] = {}  # by the id of the tensor
        self._refused: dict[str, str] = {}
        self._records: list[OpRecord] = []
        # by the id of an output that a bias may be added to: the op, and the output, kept alive
        self._products: dict[int, tuple[OpRecord, Tensor]] = {}
        self._with_bias: set[int] = set()  # ids of records to whose output a bias was added
        self._reused: set[int] = set()  # ids of records whose output had another use
        self._nodes: dict[int, bool] = {}  # see `Trace`
        self._sequence_first_batch: int | None = None
        self._has_batch_coupling = has_batch_coupling
        for name, tensor in tracked.items():
            self._track(TrackedTensor(name, tensor, tensor))

    def trace(self) -> Trace:
        """The layers of the ops that were recorded so far."""
        return Trace(
            self._bases, tuple(self._records), frozenset(self._reused), dict(self._nodes),
            dict(self._refused), self._has_batch_coupling,
        )

    # ---- during the forward pass ----------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._inside_attention(args, kwargs)
        start = next_sequence_number()
        output = func(*args, **kwargs)
        if not _has_gradient(output):  # also a shape, a size, a stride ...
            return output
        values = [*_flatten((*args, *kwargs.values()))]
        operands = [tensor for value in values if (tensor := self._find(value)) is not None]
        if not (func in ADDITIONS and operands):
            self._record_reuse(values)
        if operands:
            self._record_op(func, args, kwargs, output, operands)
            self._nodes.update(dict.fromkeys(range(start, next_sequence_number()), True))
            if isinstance(output, Tensor) and self._find(output) is None:
                self._nodes[sequence_number(get_gradient_edge(output).node)] = False
        if func is F.batch_norm:
            settings = OPS[func].read(*args, **kwargs).settings
            self._has_batch_coupling |= settings["batch_coupling"]
        return output

    def _inside_attention(self, args: Any, kwargs: Any) -> Any:
        """Run attention so that its linear maps are dispatched too."""
        query = args[0] if args else kwargs["query"]
        before = self._sequence_first_batch
        self._sequence_first_batch = query.shape[1] if query.dim() == 3 else None
        try:
            with self:
                return _undispatched(F.multi_head_attention_forward)(*args, **kwargs)
        finally:
            self._sequence_first_batch = before

    def _record_op(
        self, func: Any, args: Any, kwargs: Any, output: Any, operands: Sequence[TrackedTensor]
    ) -> None:
        first, op = operands[0], OPS.get(func)
        if op is not None:
            swapped = op.commutes and len(args) == 2 and self._find(args[1]) is None
            arguments = op.read(*(args[::-1] if swapped else args), **kwargs)
            self._record_layer(op, arguments, output, operands)
        elif func in ADDITIONS and (addition := self._read_addition(args, kwargs, output)):
            self._record_addition(*addition, output)
        elif func in TRANSPOSES and first.tensor.dim() == 2 and _swaps_axes(*args, **kwargs):
            self._track(replace(first, tensor=output, transposed=not first.transposed))
        elif func in SPLITS and _splits_rows(first, args, kwargs):
            start = 0
            for rows in output:
                stop = start + len(rows)
                self._track(replace(first, tensor=rows, row_slice=(start, stop)))
                start = stop
        else:
            name = getattr(func, "__name__", str(func))
            self._refuse(operands, name.strip("_") if name != "__get__" else "an attribute")

    def _refuse(self, tensors: Sequence[TrackedTensor], reason: str) -> None:
        for tensor in tensors:
            self._refused.setdefault(tensor.name, reason)

    def _record_layer(
        self, op: OpSpec, arguments: OpArguments, output: Tensor, operands: Sequence[TrackedTensor]
    ) -> None:
        weight, bias = self._find(arguments.weight), self._find(arguments.bias)
        sources = [tensor for tensor in (weight, bias) if tensor is not None]
        row_slices = {tensor.row_slice for tensor in sources}
        orientation, reason = op.orientation, op.refusal(arguments)
        if weight is not None and weight.transposed:
            if orientation == "per_unit" or len(weight.shape) != 2:
                reason = f"{op.name} of a transpose"
            orientation = {"out_in": "in_out", "in_out": "out_in"}.get(orientation, orientation)
        if len(operands) > len(sources):
            reason = reason or f"the input of {op.name}"
        is_plain = orientation == "out_in" and arguments.settings.get("groups", 1) == 1
        if row_slices != {None} and not is_plain:
            reason = reason or "a part of a tensor"
        if reason:
            self._refuse(operands, reason)
            return
        record = OpRecord(
            op, weight, bias, orientation, arguments.input, arguments.settings,
            get_gradient_edge(output), output.shape, arguments.input._version,
            self._sequence_first_batch,
        )
        if len(row_slices) > 1:  # rows of one with all of the other
            self._records += [replace(record, bias=None), replace(record, weight=None)]
        else:
            self._records.append(record)
        if bias is None and op.outputs_last:
            self._products[id(output)] = record, output

    def _read_addition(
        self, args: Any, kwargs: Any, output: Any
    ) -> tuple[TrackedTensor, Tensor] | None:
        """The tracked bias and the tensor to whose last axis it is added, if a call does that."""
        pairs = zip(map(self._find, args), reversed(args), strict=True)
        found = [(bias, other) for bias, other in pairs if bias is not None]
        if len(args) != 2 or kwargs or len(found) != 1:
            return None
        bias, tensor = found[0]
        if not isinstance(tensor, Tensor) or bias.tensor.dim() != 1 or bias.row_slice is not None:
            return None
        fits = tensor.dim() >= 2 and tensor.shape[-1] == len(bias.tensor)
        return (bias, tensor) if fits and tensor.shape == output.shape else None

    def _record_addition(self, bias: TrackedTensor, tensor: Tensor, output: Tensor) -> None:
        product, _ = self._products.pop(id(tensor), (None, None))
        self._records.append(OpRecord(  # a linear op without a weight
            LINEAR, None, bias, "bias", tensor, {}, get_gradient_edge(output), output.shape, 0,
            self._sequence_first_batch, product,
        ))
        if product is None:
            return
        if id(product) in self._with_bias:
            self._reused.add(id(product))
        self._with_bias.add(id(product))
        if tensor is not output:  # not in place: the product may be used again
            self._products[id(tensor)] = product, tensor

    def _record_reuse(self, values: Sequence[Any]) -> None:
        for value in values:
            record, output = self._products.get(id(value), (None, None))
            if record is not None and output is value:
                self._reused.add(id(record))

    def _track(self, tensor: TrackedTensor) -> None:
        self._tracked[id(tensor.tensor)] = tensor

    def _find(self, value: Any) -> TrackedTensor | None:
        return self._tracked.get(id(value)) if isinstance(value, Tensor) else None


def _swaps_axes(input: Tensor, dim0: int = 0, dim1: int = 1) -> bool:
    return dim0 % 2 != dim1 % 2


def _splits_rows(tensor: TrackedTensor, args: Any, kwargs: Any) -> bool:
    """Whether a call splits a whole tracked tensor along its first axis, as attention does."""
    axis = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    return not tensor.transposed and tensor.row_slice is None and axis == 0


@functools.cache
def _undispatched(function: FunctionType) -> FunctionType:
    """A copy of a function of torch.nn.functional that does not look for overrides of itself."""
    scope = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _flatten(values: Any) -> Iterator[Any]:
    """The items of nested tuples and lists."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flatten(value)
        else:
            yield value


def _has_gradient(output: Any) -> bool:
    """Whether a gradient can flow back; a view has `requires_grad` under `no_grad` too."""
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in _flatten([output])
    )
