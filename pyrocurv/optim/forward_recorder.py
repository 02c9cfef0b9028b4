"""Follows the forward passes of a network, and runs it again on their first examples.

A training loop frees its graph in `backward`, before the optimizer's turn. So a watch keeps the
inputs of a few examples where a curvature is due, and gets itself a graph of its own from them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from pyrocurv.layers.capture import Capture
from pyrocurv.runtime.module_state import save_buffers
from pyrocurv.runtime.undo import complete


@dataclass(eq=False)
class ForwardRecorder:
    """The forward passes of `net` since the last `pop_passes`, those that a gradient came back
    through.

    `batch_size` examples of each are kept; None is all, 0 none.
    """

    net: nn.Module
    batch_size: int | None = 0
    passes: list[RecordedPass] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._inputs: ForwardInputs | None = None
        self._is_still = False
        self.listen()

    def __getstate__(self) -> dict[str, Any]:
        return {"net": self.net, "batch_size": self.batch_size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # hooks into a network that is a copy too

    @property
    def inner(self) -> nn.Module:
        """The network itself, under what compiles or distributes it."""
        net = self.net
        while True:
            under = getattr(net, "_orig_mod", None) or (
                net.module if isinstance(net, nn.parallel.DistributedDataParallel) else None
            )
            if under is None:
                return net
            net = under

    def listen(self) -> None:
        """Hook into the network; nothing else of it is touched."""
        for method, register in (
            ("_before", self.net.register_forward_pre_hook),
            ("_after", self.net.register_forward_hook),
        ):
            register(_WeakHook(self, method), with_kwargs=True)

    def pop_passes(self) -> list[RecordedPass]:
        """What was seen, which is forgotten."""
        passes, self.passes = self.passes, []
        return passes

    # ---- during the user's forward and backward passes ------------------------------------------

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inputs = None
        if self.batch_size == 0 or self._is_still or not torch.is_grad_enabled():
            return
        whole = any(isinstance(m, _BatchNorm) and m.training for m in self.inner.modules())
        self._inputs = ForwardInputs.of(args, kwargs, None if whole else self.batch_size)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs, self._inputs = self._inputs, None
        heads = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
        if self._is_still or not heads or not heads[0].dim():
            return
        seen: list[RecordedPass] = []

        def on_gradient(gradient: Tensor) -> None:
            if not seen:
                seen.append(RecordedPass(inputs, len(gradient)))
                self.passes.append(seen[0])
            if inputs is not None:
                more = gradient[: inputs.batch].detach()
                old = seen[0].gradient
                seen[0].gradient = more.clone() if old is None else old + more

        heads[0].register_hook(on_gradient)

    # ---- afterwards -----------------------------------------------------------------------------

    @contextmanager
    def rerun(
        self, inputs: ForwardInputs, tracked: dict[str, Tensor]
    ) -> Iterator[tuple[Any, Capture]]:
        """The output of another pass and its capture; buffers are put back at the end."""
        restore = save_buffers(self.inner.modules())
        self._is_still = True
        try:
            with torch.enable_grad():
                with torch.compiler.set_stance("force_eager"), Capture(tracked) as capture:
                    output = inputs.call(self.inner)
                yield output, capture
        finally:
            self._is_still = False
            complete(restore)


class _WeakHook:
    """Calls a method of a watch that is still there; nothing in copies of the network."""

    def __init__(self, watch: ForwardRecorder | None, method: str) -> None:
        self._watch = None if watch is None else weakref.ref(watch)
        self._method = method

    @torch.compiler.disable
    def __call__(self, *args: Any) -> None:
        watch = None if self._watch is None else self._watch()
        if watch is not None:
            getattr(watch, self._method)(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _WeakHook, (None, self._method)


@dataclass(eq=False)
class ForwardInputs:
    """The arguments of a forward pass, as leaves; where `rows`, of the first examples alone."""

    leaves: list[Any]
    shape: TreeSpec
    rows: list[bool]
    limit: int | None
    autocast: torch.dtype | None

    @staticmethod
    def of(args: Any, kwargs: Any, limit: int | None) -> ForwardInputs:
        """Copies: a network may overwrite what it is given."""
        leaves, shape = tree_flatten((args, kwargs))
        sizes = [len(x) for x in leaves if isinstance(x, Tensor) and x.dim()]
        rows = [isinstance(x, Tensor) and x.dim() > 0 and len(x) == sizes[0] for x in leaves]
        kept = [x[:limit].detach().clone() if r else x for x, r in zip(leaves, rows, strict=True)]
        device = next((x.device.type for x in leaves if isinstance(x, Tensor)), "cpu")
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return ForwardInputs(kept, shape, rows, limit, autocast)

    @property
    def batch(self) -> int:
        """How many examples there are."""
        return len(self.leaves[self.rows.index(True)])

    def fits(self, other: ForwardInputs) -> bool:
        """Whether the examples of both can go through the network together."""
        return (
            (self.shape, self.rows, self.autocast) == (other.shape, other.rows, other.autocast)
            and all(
                a.shape[1:] == b.shape[1:] if row else a is b or not torch.is_tensor(a) and a == b
                for a, b, row in zip(self.leaves, other.leaves, self.rows, strict=True)
            )
        )

    @staticmethod
    def joined(several: Sequence[ForwardInputs]) -> ForwardInputs:
        """The first examples of them all, which fit each other."""
        first = several[0]
        columns = zip(*(one.leaves for one in several), strict=True)
        leaves = [
            torch.cat(column)[: first.limit] if row else column[0]
            for column, row in zip(columns, first.rows, strict=True)
        ]
        return ForwardInputs(leaves, first.shape, first.rows, first.limit, first.autocast)

    def call(self, net: nn.Module) -> Any:
        """The network's output."""
        args, kwargs = tree_unflatten(self.leaves, self.shape)
        device = next((x.device.type for x in self.leaves if isinstance(x, Tensor)), "cpu")
        cast: AbstractContextManager[Any] = nullcontext()
        if self.autocast is not None:
            cast = torch.autocast(device, self.autocast, cache_enabled=False)
        with cast:
            return net(*args, **kwargs)


@dataclass(eq=False)
class RecordedPass:
    """A forward pass whose output had a gradient: its inputs, if kept, and that gradient."""

    inputs: ForwardInputs | None
    batch: int
    gradient: Tensor | None = None  # of the examples kept, as far as the loss has come


def num_examples(passes: Iterable[RecordedPass]) -> int:
    """The number of examples of all passes."""
    return sum(recorded.batch for recorded in passes)


def merge_compatible(passes: Sequence[RecordedPass]) -> tuple[ForwardInputs, list[Tensor]]:
    """The joined inputs of all passes that fit the first one with inputs, and their gradients."""
    kept = [(recorded.inputs, recorded.gradient) for recorded in passes if recorded.inputs]
    compatible = [(inputs, gradient) for inputs, gradient in kept if kept[0][0].fits(inputs)]
    gradients = [gradient for _, gradient in compatible if gradient is not None]
    return ForwardInputs.joined([inputs for inputs, _ in compatible]), gradients
