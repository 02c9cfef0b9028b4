"""The only place that watches operations: which op consumed which weights, with what input.

A `TorchFunctionMode` recognises the watched tensors by identity, so PyroModules, converted networks
and functional models look alike. The gradient edge of an output is taken when the op is seen:
an in-place activation may overwrite the tensor, never the edge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from pyrocurv.layers import OPS, Arguments, Layer, Op


@dataclass(frozen=True, eq=False)
class Call:
    """One op that consumed watched weights. `edge` is None where no gradient flows."""

    op: Op
    layer: Layer
    input: Tensor
    settings: Mapping[str, Any]
    edge: GradientEdge | None
    output_shape: torch.Size
    leaves: Mapping[str, Tensor]  # the watched tensors by name
    _version: int

    @property
    def batch(self) -> int:
        """B, the length of the input's first axis."""
        return self.input.shape[0]

    def rows(self, count: int) -> Tensor:
        """The inputs of the first `count` examples, [count, S, I]; the bias is a column of ones."""
        if self.input._version != self._version:
            raise RuntimeError(
                f"the input of {self.layer.weight!r} was changed in place after the layer read it"
            )
        bias = self.layer.bias is not None
        return self.op.rows(self.input.detach()[:count], self.settings, bias)

    def gradients(self, gradient: Tensor | None, count: int) -> Tensor:
        """A gradient onto the output as [count, S, O]; None (no path) is zero."""
        if gradient is None:
            gradient = torch.zeros(
                self.output_shape, dtype=self.input.dtype, device=self.input.device
            )
        return self.op.gradients(gradient[:count])


@dataclass
class Capture(TorchFunctionMode):
    """Records in `calls` the supported ops on watched tensors, in `missed` {name: why} the rest.

    Enter it around the forward pass, on the steps that need curvature only.
    """

    watched: dict[str, Tensor] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    missed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in self.watched.items()}

    def watch(self, name: str, tensor: Tensor) -> None:
        """Look out for one more tensor, which is kept alive so that its identity stays its own."""
        self.watched[name] = tensor
        self._names[id(tensor)] = name

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        op = OPS.get(func)
        if op is not None:
            self._record(op, op.read(*args, **(kwargs or {})), output)
        elif _holds_tensor(output):  # not its shape, size, stride ...
            for name in self._among((*args, *(kwargs or {}).values())):
                self.missed.setdefault(name, getattr(func, "__name__", str(func)))
        return output

    def _record(self, op: Op, call: Arguments, output: Tensor) -> None:
        weight = self._names.get(id(call.weight))
        bias = None if call.bias is None else self._names.get(id(call.bias))
        if (name := self._names.get(id(call.input))) is not None:
            self.missed.setdefault(name, f"the input of {op.name}")
        if weight is None:
            if bias is not None:
                self.missed.setdefault(bias, f"{op.name} whose weight has no posterior")
            return
        if reason := op.refusal(call):
            self.missed.update(dict.fromkeys(filter(None, (weight, bias)), reason))
            return
        self.calls.append(
            Call(
                op,
                Layer(weight, bias, tuple(call.weight.shape)),
                call.input,
                call.settings,
                get_gradient_edge(output) if output.requires_grad else None,
                output.shape,
                {name: self.watched[name] for name in (weight, bias) if name is not None},
                call.input._version,
            )
        )

    def _among(self, values: Any) -> Iterator[str]:
        for value in values:
            if isinstance(value, (tuple, list)):
                yield from self._among(value)
            elif (name := self._names.get(id(value))) is not None:
                yield name

    def layers(self) -> list[Layer]:
        """The layers all of whose uses are supported, in order of first use.

        A weight met with two different biases, or a bias with two weights, is no layer: it goes to
        `missed`, and so does a layer of which one tensor has another, unsupported use.
        """
        layers = list(dict.fromkeys(call.layer for call in self.calls))
        owner: dict[str, Layer] = {}
        for layer in layers:
            for name in layer.tensors:
                other = owner.setdefault(name, layer)
                if other != layer:
                    reason = "a weight in two layers of different make"
                    self.missed.update(dict.fromkeys((*layer.tensors, *other.tensors), reason))
        for layer in layers:
            reasons = [self.missed[name] for name in layer.tensors if name in self.missed]
            if reasons:
                self.missed.update(dict.fromkeys(layer.tensors, reasons[0]))
        return [layer for layer in layers if layer.weight not in self.missed]


def _holds_tensor(output: Any) -> bool:
    if isinstance(output, (tuple, list)):
        return any(map(_holds_tensor, output))
    return isinstance(output, Tensor)
