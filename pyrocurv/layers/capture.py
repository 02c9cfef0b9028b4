"""The only place that watches operations: which op consumed which weights, with what input.

A `TorchFunctionMode` recognises the watched tensors by identity, so PyroModules, converted networks
and functional models look alike. The gradient edge of an output is taken when the op is seen:
an in-place activation may overwrite the tensor, never the edge.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
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
from pyrocurv.layers.trace import Recording, Trace

ADDITIONS = {
    torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__,
}
TURNS: dict[Any, Callable[..., bool]] = {  # whether the call swaps the axes of a matrix
    Tensor.T.__get__: lambda *_: True,  # type: ignore[attr-defined]  # mypy sees no descriptor
    Tensor.mT.__get__: lambda *_: True,  # type: ignore[attr-defined]  # the same
    Tensor.t: lambda *_, **__: True,
    torch.t: lambda *_, **__: True,
    Tensor.transpose: lambda input, dim0, dim1: dim0 % 2 != dim1 % 2,
    torch.transpose: lambda input, dim0, dim1: dim0 % 2 != dim1 % 2,
}
CUTS = {Tensor.chunk, torch.chunk, Tensor.split, torch.split}


class Capture(TorchFunctionMode):
    """Records the supported ops on the tracked tensors {name: tensor}, and other uses of them.

    Enter it around the forward pass and call `trace()` after it. Ops that no gradient flows
    through, as those of a statistic for the log, do not count.
    """

    def __init__(self, tracked: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self._tracked: dict[str, Tensor] = {}
        self._unsupported: dict[str, str] = {}
        self._has_batch_coupling = False
        self._known: dict[int, TrackedTensor] = {}
        self._ops: list[OpRecord] = []
        # outputs that a bias may be added to
        self._products: dict[int, tuple[OpRecord, Tensor]] = {}
        self._shifted: set[int] = set()  # uses whose product had a bias added,
        self._reused: set[int] = set()  # and those whose product was used otherwise
        self._sequence_first_batch: int | None = None
        self._nodes: dict[int, bool] = {}  # see `Recording`
        for name, tensor in (tracked or {}).items():
            self.watch(name, tensor)

    def watch(self, name: str, tensor: Tensor) -> None:
        """Look out for one more tensor."""
        self._tracked[name] = tensor
        self._known[id(tensor)] = TrackedTensor(name, tensor, tensor)

    # ---- during the forward pass ----------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._inside_attention(args, kwargs)
        start = next_sequence_number()
        output = func(*args, **kwargs)
        if not _has_gradient(output):  # nor does a shape, a size, a stride ...
            return output
        values = (*args, *kwargs.values())
        known = list(self._among(values))
        self._note_reuse(func, values)
        if known:
            self._meet(func, args, kwargs, output, known)
            self._nodes.update(dict.fromkeys(range(start, next_sequence_number()), True))
            if isinstance(output, Tensor) and self._find(output) is None:
                self._nodes[sequence_number(get_gradient_edge(output).node)] = False
        if func is F.batch_norm:
            self._has_batch_coupling |= OPS[func].read(*args, **kwargs).settings["coupled"]
        return output

    def _inside_attention(self, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run attention with its linear maps in view, which it would hide."""
        query = args[0] if args else kwargs["query"]
        before = self._sequence_first_batch
        self._sequence_first_batch = query.shape[1] if query.dim() == 3 else None
        try:
            with self:
                return _undispatched(F.multi_head_attention_forward)(*args, **kwargs)
        finally:
            self._sequence_first_batch = before

    def _meet(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, output: Any, known: list[TrackedTensor]
    ) -> None:
        op = OPS.get(func)
        if op is not None:
            swapped = op.commutes and len(args) == 2 and self._find(args[1]) is None
            self._record(op, op.read(*(args[::-1] if swapped else args), **kwargs), output, known)
        elif func in ADDITIONS and self._is_shift(args, kwargs, output):
            self._record_shift(args, output)
        elif func in TURNS and known[0].tensor.dim() == 2 and TURNS[func](*args, **kwargs):
            self._alias(replace(known[0], tensor=output, transposed=not known[0].transposed))
        elif func in CUTS and self._alias_cuts(args, kwargs, output, known[0]):
            pass
        else:
            name = getattr(func, "__name__", str(func))
            self._miss(known, name.strip("_") if name != "__get__" else "an attribute")

    def _miss(self, known: list[TrackedTensor], why: str) -> None:
        for one in known:
            self._unsupported.setdefault(one.name, why)

    def _alias(self, known: TrackedTensor) -> None:
        self._known[id(known.tensor)] = known

    def _alias_cuts(
        self, args: tuple[Any, ...], kwargs: Any, output: Any, known: TrackedTensor
    ) -> bool:
        """Whether a call cuts a whole watched tensor along its first axis, as attention does."""
        axis = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        if known.transposed or known.row_slice is not None or axis != 0:
            return False
        start = 0
        for part in output:
            stop = start + len(part)
            self._alias(replace(known, tensor=part, row_slice=(start, stop)))
            start = stop
        return True

    def _record(
        self, op: OpSpec, call: OpArguments, output: Tensor, known: list[TrackedTensor]
    ) -> None:
        weight, bias = self._find(call.weight), self._find(call.bias)
        reason = op.refusal(call)
        form = op.form
        if weight is not None and weight.transposed:
            if form == "units" or len(weight.shape) != 2:
                reason = f"{op.name} of a transpose"
            form = {"rows": "columns", "columns": "rows"}.get(form, form)
        if not reason and len(known) > sum(one is not None for one in (weight, bias)):
            reason = f"the input of {op.name}"
        cuts = {None if one is None else one.row_slice for one in (weight, bias)}
        groups = call.settings.get("groups", 1) if call.settings else 1
        if not reason and cuts != {None} and (form != "rows" or groups > 1):
            reason = "a part of a tensor"
        if reason:
            self._miss(known, reason)
            return
        use = OpRecord(
            op, weight, bias, form, call.input, call.settings, get_gradient_edge(output),
            output.shape, call.input._version, self._sequence_first_batch,
        )
        if weight is not None and bias is not None and len(cuts) > 1:  # part of one with the other
            self._ops += [replace(use, bias=None), replace(use, weight=None)]
        else:
            self._ops.append(use)
        if bias is None and op.last:
            self._products[id(output)] = use, output

    def _is_shift(self, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> bool:
        """Whether a call adds one watched vector to the last axis of something."""
        if len(args) != 2 or kwargs:
            return False
        found = [self._find(arg) for arg in args]
        if (found[0] is None) == (found[1] is None):
            return False
        known, other = (found[1], args[0]) if found[0] is None else (found[0], args[1])
        assert known is not None
        if not isinstance(other, Tensor) or known.tensor.dim() != 1 or known.row_slice is not None:
            return False
        fits = other.dim() >= 2 and other.shape[-1] == len(known.tensor)
        return fits and other.shape == output.shape

    def _record_shift(self, args: tuple[Any, ...], output: Tensor) -> None:
        first = self._find(args[0])
        known, other = (self._find(args[1]), args[0]) if first is None else (first, args[1])
        product, _ = self._products.pop(id(other), (None, None))
        self._ops.append(OpRecord(
            None, None, known, "vector", other, None, get_gradient_edge(output), output.shape, 0,
            self._sequence_first_batch, product,
        ))
        if product is None:
            return
        if id(product) in self._shifted:
            self._reused.add(id(product))
        self._shifted.add(id(product))
        if other is not output:  # not in place: what was added to may be used once more
            self._products[id(other)] = product, other

    def _note_reuse(self, func: Any, values: tuple[Any, ...]) -> None:
        if not self._products or func in ADDITIONS and any(map(self._find, values)):
            return
        for value in _flat(values):
            use, output = self._products.get(id(value), (None, None))
            if use is not None and output is value:
                self._reused.add(id(use))

    def _find(self, value: Any) -> TrackedTensor | None:
        return self._known.get(id(value)) if isinstance(value, Tensor) else None

    def _among(self, values: Any) -> Iterator[TrackedTensor]:
        for value in _flat(values):
            if (known := self._find(value)) is not None:
                yield known

    # ---- after it -------------------------------------------------------------------------------

    def trace(self) -> Trace:
        """The layers of what was recorded so far; nothing is changed."""
        return Trace.of(Recording(
            dict(self._tracked), tuple(self._ops), frozenset(self._reused), dict(self._nodes),
            dict(self._unsupported), self._has_batch_coupling,
        ))


@functools.cache
def _undispatched(function: FunctionType) -> FunctionType:
    """A function of torch.nn.functional that does not ask who wants to dispatch on it."""
    scope = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _flat(values: Any) -> Iterator[Any]:
    """The items of a nest of tuples and lists."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


def _has_gradient(output: Any) -> bool:
    """Whether one can flow back through it; a view has `requires_grad` under `no_grad` too."""
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in _flat([output])
    )
