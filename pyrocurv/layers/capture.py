"""The only place that watches operations: which op consumed which weights, with what input.

A `TorchFunctionMode` recognises the watched tensors by identity, so PyroModules, converted networks
and functional models look alike. The gradient edge of an output is taken when the op is seen:
an in-place activation may overwrite the tensor, never the edge.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pyrocurv.layers import OPS, Layer, OpArguments, OpSpec
from pyrocurv.layers.autograd_graph import consumers
from pyrocurv.layers.calls import LayerCall, OpRecord, TrackedTensor, build_layers

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


@dataclass
class Capture(TorchFunctionMode):
    """Records the supported ops on watched tensors, and in `unsupported` {name: why} the others.

    Enter it around the forward pass, on the steps that need curvature only. What no gradient flows
    through, a statistic for the log say, is no use of a tensor.
    """

    tracked: dict[str, Tensor] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)
    has_batch_coupling: bool = False  # whether examples met in a batch norm

    def __post_init__(self) -> None:
        super().__init__()
        self._known: dict[int, TrackedTensor] = {}
        self._uses: list[OpRecord] = []
        # outputs that a bias may be added to
        self._products: dict[int, tuple[OpRecord, Tensor]] = {}
        self._shifted: set[int] = set()  # uses whose product had a bias added,
        self._reused: set[int] = set()  # and those whose product was used otherwise
        self._sequence_first_batch: int | None = None
        self._made: dict[int, bool] = {}  # autograd's nodes of ops in sight; False: of a result
        for name, tensor in self.tracked.items():
            self.watch(name, tensor)

    def watch(self, name: str, tensor: Tensor) -> None:
        """Look out for one more tensor."""
        self.tracked[name] = tensor
        self._known[id(tensor)] = TrackedTensor(name, tensor, tensor)

    # ---- during the forward pass ----------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._inside_attention(args, kwargs)
        start = _next_node()
        output = func(*args, **kwargs)
        if not _has_gradient(output):  # nor does a shape, a size, a stride ...
            return output
        values = (*args, *kwargs.values())
        known = list(self._among(values))
        self._note_reuse(func, values)
        if known:
            self._meet(func, args, kwargs, output, known)
            self._made.update(dict.fromkeys(range(start, _next_node()), True))
            if isinstance(output, Tensor) and self._find(output) is None:
                self._made[_number(get_gradient_edge(output).node)] = False
        if func is F.batch_norm:
            self.has_batch_coupling |= OPS[func].read(*args, **kwargs).settings["coupled"]
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
            self.unsupported.setdefault(one.name, why)

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
            self._uses += [replace(use, bias=None), replace(use, weight=None)]
        else:
            self._uses.append(use)
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
        self._uses.append(OpRecord(
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

    @property
    def seen(self) -> set[str]:
        """The watched tensors that an op was seen to consume."""
        return {*self.unsupported, *(name for layer in self.layers() for name in layer.tensors)}

    def mark_untracked(self, total: Tensor) -> None:
        """Have those missed that `total` hangs on by an op that was not seen, whatever else was.

        As inside `torch.vmap`, by an `autograd.Function`, or in a derivative that the model takes.
        """
        readers = consumers(total)
        for name, tensor in self.tracked.items():
            ahead = [get_gradient_edge(tensor).node] if tensor.requires_grad else []
            while ahead:
                for node in readers.get(ahead.pop(), ()):
                    inside = self._made.get(_number(node))
                    if inside is None:
                        self.unsupported.setdefault(name, "an op out of sight")
                    elif inside:  # another may read that too
                        ahead.append(node)
        for use in self._uses:
            product = use.product
            if product is not None and any(
                _number(node) not in self._made for node in readers.get(product.edge.node, ())
            ):
                self._reused.add(id(product))

    def build_layers(self) -> tuple[list[Layer], list[LayerCall]]:
        """The layers all of whose uses are supported, and their calls; see `uses.build_layers`."""
        return build_layers(self._uses, self._reused, self.unsupported)

    def layers(self) -> list[Layer]:
        """The layers of `build_layers`."""
        return self.build_layers()[0]

    @property
    def calls(self) -> list[LayerCall]:
        """The calls of `build_layers`."""
        return self.build_layers()[1]


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


@torch.compiler.disable
def _next_node() -> int:
    """The number that the next node of this thread's graph will have."""
    return torch.autograd._get_sequence_nr()


def _number(node: Node) -> int:
    """Which of its thread a node is."""
    return node._sequence_nr()


def _has_gradient(output: Any) -> bool:
    """Whether one can flow back through it; a view has `requires_grad` under `no_grad` too."""
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in _flat([output])
    )
