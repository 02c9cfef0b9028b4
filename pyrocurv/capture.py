"""The only place that watches operations: which op consumed which weights, with what input.

A `TorchFunctionMode` recognises the watched tensors by identity, so PyroModules, converted networks
and functional models look alike. The gradient edge of an output is taken when the op is seen:
an in-place activation may overwrite the tensor, never the edge.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pyrocurv.layers import OPS, Arguments, Layer, Op

ADDITIONS = {
    torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__,
}
TURNS: dict[Any, Callable[..., bool]] = {  # whether the call swaps the axes of a matrix
    Tensor.T.__get__: lambda *_: True,  # type: ignore[attr-defined]
    Tensor.mT.__get__: lambda *_: True,  # type: ignore[attr-defined]
    Tensor.t: lambda *_: True,
    torch.t: lambda *_: True,
    Tensor.transpose: lambda _, a, b: a % 2 != b % 2,
    torch.transpose: lambda _, a, b: a % 2 != b % 2,
}
CUTS = {Tensor.chunk, torch.chunk, Tensor.split, torch.split}


@dataclass(frozen=True, eq=False)
class _Known:
    """A watched tensor, or a view of one: turned around, or the rows start:stop of `total`."""

    name: str
    tensor: Tensor  # kept alive, so that its identity stays its own
    shape: tuple[int, ...]  # of the watched tensor
    turned: bool = False
    cut: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class _Use:
    """One op that consumed a weight, a bias or both. `edge` is None where no gradient flows."""

    op: Op | None  # None for an addition of a bias alone
    weight: _Known | None
    bias: _Known | None
    form: str
    input: Tensor
    settings: Any
    edge: GradientEdge | None
    output_shape: torch.Size
    version: int
    batch_second: int | None = None  # B, inside attention: tensors are [L, B, E] or [L·B, E]
    product: _Use | None = None  # what a bias was added to

    @property
    def names(self) -> tuple[str | None, str | None]:
        weight, bias = self.weight, self.bias
        return None if weight is None else weight.name, None if bias is None else bias.name

    @property
    def groups(self) -> int:
        return self.settings.get("groups", 1) if self.settings else 1


@dataclass(frozen=True, eq=False)
class Call:
    """The part that one op had in a layer: inputs and output gradients as rows.

    `flipped` calls see the layer's matrix turned around, as an embedding that is tied to a head.
    """

    layer: Layer
    flipped: bool
    edge: GradientEdge | None
    _use: _Use
    _part: str  # "both", "weight" or "bias"

    @property
    def batch(self) -> int:
        """B."""
        use = self._use
        return use.batch_second or (use.output_shape if use.op is None else use.input.shape)[0]

    def rows(self, count: int) -> Tensor:
        """The inputs of the first `count` examples, [*lead, count, S, I]; 1 for the bias."""
        use = self._use
        if self._part == "bias":
            assert use.bias is not None
            start, stop = use.bias.cut or (0, self.layer.size)
            positions = math.prod(use.output_shape) // (self.batch * (stop - start))
            return use.input.new_ones(count, positions, 1, dtype=self._dtype)
        assert use.op is not None
        if use.input._version != use.version:
            raise RuntimeError(
                f"the input of {self.layer.weight!r} was changed in place after the layer read it"
            )
        input = self._batch_first(use.input.detach())
        return use.op.rows(input, use.settings, self._part == "both", count)

    def gradients(self, gradient: Tensor | None, count: int) -> Tensor:
        """A gradient onto the output as [*lead, count, S, O]; None (no path) is zero."""
        use = self._use
        if gradient is None:
            gradient = use.input.new_zeros(use.output_shape, dtype=self._dtype)
        gradient = self._batch_first(gradient)[:count]
        if use.op is None:
            rows = gradient.reshape(count, -1, self.layer.size)
        else:
            rows = use.op.gradients(gradient, use.settings)
        known = use.weight or use.bias
        if known is not None and known.cut is not None:
            start, stop = known.cut
            rows = F.pad(rows, (start, known.shape[0] - stop))
        if self._part == "bias" and rows.dim() == 4:  # [Γ, B, S, O] -> [B, S, Γ·O]
            rows = rows.movedim(0, -2).flatten(-2)
        return rows

    @property
    def _dtype(self) -> torch.dtype:
        known = self._use.weight or self._use.bias
        assert known is not None
        return known.tensor.dtype

    def _batch_first(self, tensor: Tensor) -> Tensor:
        batch = self._use.batch_second
        if batch is None:
            return tensor
        return tensor.reshape(-1, batch, tensor.shape[-1]).transpose(0, 1)


@dataclass
class Capture(TorchFunctionMode):
    """Records the supported ops on watched tensors, and in `missed` {name: why} the others.

    Enter it around the forward pass, on the steps that need curvature only.
    """

    watched: dict[str, Tensor] = field(default_factory=dict)
    missed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._known: dict[int, _Known] = {}
        self._uses: list[_Use] = []
        self._products: dict[int, tuple[_Use, Tensor]] = {}  # outputs that a bias may be added to
        self._shifted: set[int] = set()  # uses whose product had a bias added,
        self._reused: set[int] = set()  # and those whose product was used otherwise
        self._batch_second: int | None = None
        for name, tensor in self.watched.items():
            self.watch(name, tensor)

    def watch(self, name: str, tensor: Tensor) -> None:
        """Look out for one more tensor."""
        self.watched[name] = tensor
        self._known[id(tensor)] = _Known(name, tensor, tuple(tensor.shape))

    # ---- during the forward pass ----------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._inside_attention(args, kwargs)
        output = func(*args, **kwargs)
        values = (*args, *kwargs.values())
        known = list(self._among(values))
        self._note_reuse(func, values)
        if known and _holds_tensor(output):  # not its shape, size, stride ...
            self._meet(func, args, kwargs, output, known)
        return output

    def _inside_attention(self, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run attention with its linear maps in view, which it would hide."""
        query = args[0] if args else kwargs["query"]
        before = self._batch_second
        self._batch_second = query.shape[1] if query.dim() == 3 else None
        try:
            with self:
                return _undispatched(F.multi_head_attention_forward)(*args, **kwargs)
        finally:
            self._batch_second = before

    def _meet(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, output: Any, known: list[_Known]
    ) -> None:
        op = OPS.get(func)
        if op is not None:
            swapped = op.commutes and len(args) == 2 and self._find(args[1]) is None
            self._record(op, op.read(*(args[::-1] if swapped else args), **kwargs), output, known)
        elif func in ADDITIONS and self._is_shift(args, kwargs, output):
            self._record_shift(args, output)
        elif func in TURNS and known[0].tensor.dim() == 2 and TURNS[func](*args, **kwargs):
            self._alias(replace(known[0], tensor=output, turned=not known[0].turned))
        elif func in CUTS and self._alias_cuts(args, kwargs, output, known[0]):
            pass
        else:
            name = getattr(func, "__name__", str(func))
            self._miss(known, name.strip("_") if name != "__get__" else "an attribute")

    def _miss(self, known: list[_Known], why: str) -> None:
        for one in known:
            self.missed.setdefault(one.name, why)

    def _alias(self, known: _Known) -> None:
        self._known[id(known.tensor)] = known

    def _alias_cuts(
        self, args: tuple[Any, ...], kwargs: Any, output: Any, known: _Known
    ) -> bool:
        """Whether a call cuts a whole watched tensor along its first axis, as attention does."""
        axis = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        if known.turned or known.cut is not None or axis != 0:
            return False
        start = 0
        for part in output:
            stop = start + len(part)
            self._alias(replace(known, tensor=part, cut=(start, stop)))
            start = stop
        return True

    def _record(self, op: Op, call: Arguments, output: Tensor, known: list[_Known]) -> None:
        weight, bias = self._find(call.weight), self._find(call.bias)
        reason = op.refusal(call)
        form = op.form
        if weight is not None and weight.turned:
            if form == "units" or len(weight.shape) != 2:
                reason = f"{op.name} of a transpose"
            form = {"rows": "columns", "columns": "rows"}.get(form, form)
        if not reason and len(known) > sum(one is not None for one in (weight, bias)):
            reason = f"the input of {op.name}"
        cuts = {None if one is None else one.cut for one in (weight, bias)}
        if not reason and cuts != {None} and form != "rows":
            reason = "a part of a tensor"
        if reason:
            self._miss(known, reason)
            return
        edge = get_gradient_edge(output) if output.requires_grad else None
        use = _Use(
            op, weight, bias, form, call.input, call.settings, edge, output.shape,
            call.input._version, self._batch_second,
        )
        if weight is not None and bias is not None and len(cuts) > 1:  # part of one with the other
            self._uses += [replace(use, bias=None), replace(use, weight=None)]
        else:
            self._uses.append(use)
        if bias is None and op.name in ("linear", "matmul", "mul", "rms_norm"):
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
        if not isinstance(other, Tensor) or known.tensor.dim() != 1 or known.cut is not None:
            return False
        fits = other.dim() >= 2 and other.shape[-1] == len(known.tensor)
        return fits and other.shape == output.shape

    def _record_shift(self, args: tuple[Any, ...], output: Tensor) -> None:
        first = self._find(args[0])
        known, other = (self._find(args[1]), args[0]) if first is None else (first, args[1])
        product, _ = self._products.pop(id(other), (None, None))
        edge = get_gradient_edge(output) if output.requires_grad else None
        self._uses.append(_Use(
            None, None, known, "vector", other, None, edge, output.shape, 0, self._batch_second,
            product,
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
        for value in values:
            use, output = self._products.get(id(value), (None, None))
            if use is not None and output is value:
                self._reused.add(id(use))

    def _find(self, value: Any) -> _Known | None:
        return self._known.get(id(value)) if isinstance(value, Tensor) else None

    def _among(self, values: Any) -> Iterator[_Known]:
        for value in values:
            if isinstance(value, (tuple, list)):
                yield from self._among(value)
            elif (known := self._known.get(id(value))) is not None:
                yield known

    # ---- after it -------------------------------------------------------------------------------

    def resolve(self) -> tuple[list[Layer], list[Call]]:
        """The layers all of whose uses are supported, in order of first use, and their calls.

        A weight and a bias that always come together are one layer; those that do not, as a weight
        with two biases, are a layer each. A weight met in two forms that are not each other's
        transpose goes to `missed`.
        """
        uses = self._joined()
        makes: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
        partners: dict[str, set[str | None]] = defaultdict(set)
        for use in uses:
            weight, bias = use.names
            if use.weight is not None:
                makes[use.weight.name].append((use.form, use.groups, use.weight.shape))
                partners[use.weight.name].add(bias)
            if use.bias is not None:
                partners[use.bias.name].add(weight)
        biases = {use.bias.name for use in uses if use.bias is not None}
        for name, found in makes.items():
            if len(set(found)) > 1 and not _are_transposes(found) or name in biases:
                self.missed.setdefault(name, "a weight in two layers of different make")

        def together(weight: str | None, bias: str | None) -> bool:
            return (
                weight is not None and bias is not None
                and partners[weight] == {bias} and partners[bias] == {weight}
                and len(set(makes[weight])) == 1
                and weight not in self.missed and bias not in self.missed
            )

        calls: list[Call] = []
        for use in uses:
            weight, bias = use.names
            joined = together(weight, bias)
            if use.weight is not None and weight not in self.missed:
                assert weight is not None
                form, groups, shape = makes[weight][0]
                layer = Layer(weight, bias if joined else None, shape, form, groups)
                part = "both" if joined else "weight"
                calls.append(Call(layer, use.form != form, use.edge, use, part))
            if use.bias is not None and not joined and bias not in self.missed:
                assert bias is not None
                layer = Layer(bias, None, use.bias.shape, "vector")
                calls.append(Call(layer, False, use.edge, use, "bias"))
        return list(dict.fromkeys(call.layer for call in calls)), calls

    def _joined(self) -> list[_Use]:
        """The uses, with a bias that was added to a product of no other use joined to it."""
        shifts = {id(use.product): use for use in self._uses if use.product is not None}
        merged: list[_Use] = []
        for use in self._uses:
            shift = None if id(use) in self._reused else shifts.get(id(use))
            if shift is not None and _fits(use, shift):
                merged.append(replace(use, bias=shift.bias))
            elif not (use.product is not None and id(use.product) not in self._reused
                      and _fits(use.product, use)):
                merged.append(use)
        return merged

    def layers(self) -> list[Layer]:
        """The layers of `resolve`."""
        return self.resolve()[0]

    @property
    def calls(self) -> list[Call]:
        """The calls of `resolve`."""
        return self.resolve()[1]


def _fits(product: _Use, shift: _Use) -> bool:
    """Whether a bias can be the last column of a product's weight."""
    assert product.weight is not None and shift.bias is not None
    return product.weight.cut is None


def _are_transposes(makes: list[tuple[Any, ...]]) -> bool:
    """Whether they are rows and columns of one matrix."""
    forms, groups, shapes = map(set, zip(*makes, strict=True))
    return forms <= {"rows", "columns"} and groups == {1} and all(len(s) == 2 for s in shapes)


@functools.cache
def _undispatched(function: FunctionType) -> FunctionType:
    """A function of torch.nn.functional that does not ask who wants to dispatch on it."""
    scope = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _holds_tensor(output: Any) -> bool:
    if isinstance(output, (tuple, list)):
        return any(map(_holds_tensor, output))
    return isinstance(output, Tensor)
