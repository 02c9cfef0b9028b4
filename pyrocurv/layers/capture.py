"""Records which ops consume the tracked weights, and with which inputs.

A `TorchFunctionMode` recognizes the tracked tensors by identity, so PyroModules, converted networks
and functional models look alike. The gradient edge of an output is taken when the op runs: an
in-place activation may overwrite the tensor, but never the edge.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pyrocurv.layers import OPS, OpArguments, OpSpec
from pyrocurv.layers.autograd_graph import next_sequence_number, sequence_number
from pyrocurv.layers.calls import OpRecord, TrackedTensor
from pyrocurv.layers.linear import ADDED_BIAS
from pyrocurv.layers.registry import ADDITIONS, SPLITS, TRANSPOSES
from pyrocurv.layers.trace import Recording, Trace


class _Product(NamedTuple):
    """An op without a bias, and its output, which a bias may be added to."""

    record: OpRecord
    output: Tensor


class Capture(TorchFunctionMode):
    """Records the supported ops on the tracked tensors {name: tensor}, and other uses of them.

    Enter it around the forward pass and call `trace()` after it. Ops that no gradient flows
    through, as those of a statistic for the log, do not count.
    """

    def __init__(self, tracked: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self._bases: dict[str, Tensor] = {}
        self._tracked: dict[int, TrackedTensor] = {}  # by the id of the tensor
        self._unsupported: dict[str, str] = {}
        self._records: list[OpRecord] = []
        self._products: dict[int, _Product] = {}  # by the id of the output
        self._with_bias: set[int] = set()  # ids of records to whose output a bias was added
        self._reused: set[int] = set()  # ids of records whose output had another use
        self._nodes: dict[int, bool] = {}  # see `Recording`
        self._sequence_first_batch: int | None = None
        self._has_batch_coupling = False
        for name, tensor in (tracked or {}).items():
            self.track(name, tensor)

    def track(self, name: str, tensor: Tensor) -> None:
        """Record the ops on one more tensor from now on."""
        self._bases[name] = tensor
        self._add(TrackedTensor(name, tensor, tensor))

    def trace(self) -> Trace:
        """The layers of the ops that were recorded so far."""
        return Trace.of(Recording(
            dict(self._bases), tuple(self._records), frozenset(self._reused), dict(self._nodes),
            dict(self._unsupported), self._has_batch_coupling,
        ))

    # ---- during the forward pass ----------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._inside_attention(args, kwargs)
        start = next_sequence_number()
        output = func(*args, **kwargs)
        if not _has_gradient(output):  # also a shape, a size, a stride ...
            return output
        values = (*args, *kwargs.values())
        operands = list(self._tracked_in(values))
        self._record_reuse(func, values)
        if operands:
            self._record_op(func, args, kwargs, output, operands)
            self._nodes.update(dict.fromkeys(range(start, next_sequence_number()), True))
            if isinstance(output, Tensor) and self._find(output) is None:
                self._nodes[sequence_number(get_gradient_edge(output).node)] = False
        if func is F.batch_norm:
            settings = OPS[func].read(*args, **kwargs).settings
            self._has_batch_coupling |= settings["batch_coupling"]
        return output

    def _inside_attention(self, args: tuple[Any, ...], kwargs: Any) -> Any:
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
        self, func: Any, args: tuple[Any, ...], kwargs: Any, output: Any,
        operands: Sequence[TrackedTensor],
    ) -> None:
        first, op = operands[0], OPS.get(func)
        if op is not None:
            swapped = op.commutes and len(args) == 2 and self._find(args[1]) is None
            arguments = op.read(*(args[::-1] if swapped else args), **kwargs)
            self._record_layer(op, arguments, output, operands)
        elif func in ADDITIONS and (addition := self._read_addition(args, kwargs, output)):
            self._record_addition(*addition, output)
        elif func in TRANSPOSES and first.tensor.dim() == 2 and TRANSPOSES[func](*args, **kwargs):
            self._add(replace(first, tensor=output, transposed=not first.transposed))
        elif func in SPLITS and _splits_rows(first, args, kwargs):
            self._add_row_slices(first, output)
        else:
            name = getattr(func, "__name__", str(func))
            reason = name.strip("_") if name != "__get__" else "an attribute"
            self._mark_unsupported(operands, reason)

    def _mark_unsupported(self, tensors: Sequence[TrackedTensor], reason: str) -> None:
        for tensor in tensors:
            self._unsupported.setdefault(tensor.name, reason)

    def _add(self, tensor: TrackedTensor) -> None:
        self._tracked[id(tensor.tensor)] = tensor

    def _add_row_slices(self, tensor: TrackedTensor, slices: Sequence[Tensor]) -> None:
        start = 0
        for rows in slices:
            stop = start + len(rows)
            self._add(replace(tensor, tensor=rows, row_slice=(start, stop)))
            start = stop

    def _record_layer(
        self, op: OpSpec, arguments: OpArguments, output: Tensor,
        operands: Sequence[TrackedTensor],
    ) -> None:
        weight, bias = self._find(arguments.weight), self._find(arguments.bias)
        orientation = op.orientation
        if weight is not None and weight.transposed:
            orientation = {"out_in": "in_out", "in_out": "out_in"}.get(orientation, orientation)
        sources = [tensor for tensor in (weight, bias) if tensor is not None]
        if reason := _refusal(op, arguments, weight, sources, orientation, len(operands)):
            self._mark_unsupported(operands, reason)
            return
        record = OpRecord(
            op, weight, bias, orientation, arguments.input, arguments.settings,
            get_gradient_edge(output), output.shape, arguments.input._version,
            self._sequence_first_batch,
        )
        if len({tensor.row_slice for tensor in sources}) > 1:  # rows of one with all of the other
            self._records += [replace(record, bias=None), replace(record, weight=None)]
        else:
            self._records.append(record)
        if bias is None and op.outputs_last:
            self._products[id(output)] = _Product(record, output)

    def _read_addition(
        self, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> tuple[TrackedTensor, Tensor] | None:
        """The tracked bias and the tensor to whose last axis it is added, if a call does that."""
        if len(args) != 2 or kwargs:
            return None
        first, second = map(self._find, args)
        if first is not None and second is None:
            bias, tensor = first, args[1]
        elif second is not None and first is None:
            bias, tensor = second, args[0]
        else:
            return None
        if not isinstance(tensor, Tensor) or bias.tensor.dim() != 1 or bias.row_slice is not None:
            return None
        fits = tensor.dim() >= 2 and tensor.shape[-1] == len(bias.tensor)
        return (bias, tensor) if fits and tensor.shape == output.shape else None

    def _record_addition(self, bias: TrackedTensor, tensor: Tensor, output: Tensor) -> None:
        settings = ADDED_BIAS.read(tensor, bias.tensor).settings
        product, _ = self._products.pop(id(tensor), (None, None))
        self._records.append(OpRecord(
            ADDED_BIAS, None, bias, ADDED_BIAS.orientation, tensor, settings,
            get_gradient_edge(output), output.shape, 0, self._sequence_first_batch, product,
        ))
        if product is None:
            return
        if id(product) in self._with_bias:
            self._reused.add(id(product))
        self._with_bias.add(id(product))
        if tensor is not output:  # not in place: the product may be used again
            self._products[id(tensor)] = _Product(product, tensor)

    def _record_reuse(self, func: Any, values: tuple[Any, ...]) -> None:
        if not self._products or func in ADDITIONS and any(map(self._find, values)):
            return
        for value in _flatten(values):
            product = self._products.get(id(value))
            if product is not None and product.output is value:
                self._reused.add(id(product.record))

    def _find(self, value: Any) -> TrackedTensor | None:
        return self._tracked.get(id(value)) if isinstance(value, Tensor) else None

    def _tracked_in(self, values: Any) -> Iterator[TrackedTensor]:
        for value in _flatten(values):
            if (tensor := self._find(value)) is not None:
                yield tensor


def _refusal(
    op: OpSpec, arguments: OpArguments, weight: TrackedTensor | None,
    sources: Sequence[TrackedTensor], orientation: str, num_operands: int,
) -> str:
    """The reason why the call of an op on tracked weights is not supported, or ""."""
    if weight is not None and weight.transposed and (
        orientation == "per_unit" or len(weight.shape) != 2
    ):
        return f"{op.name} of a transpose"
    if reason := op.refusal(arguments):
        return reason
    if num_operands > len(sources):
        return f"the input of {op.name}"
    is_grouped = arguments.settings.get("groups", 1) > 1
    is_part = any(tensor.row_slice is not None for tensor in sources)
    return "a part of a tensor" if is_part and (orientation != "out_in" or is_grouped) else ""


def _splits_rows(tensor: TrackedTensor, args: tuple[Any, ...], kwargs: Any) -> bool:
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
