"""Follows the forward passes of a network, and runs it again on their first examples.

A training loop frees its graph in `backward`, before the optimizer's turn. So a watch keeps the
inputs of a few examples where a curvature is due, and gets itself a graph of its own from them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from pyrocurv.buffers import snapshot
from pyrocurv.capture import Capture
from pyrocurv.optim.passes import Inputs, Pass


@dataclass(eq=False)
class Watch:
    """The forward passes of `net` since the last `take`, those that a gradient came back through.

    `count` examples of each are kept; None is all, 0 none.
    """

    net: nn.Module
    count: int | None = 0
    passes: list[Pass] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._inputs: Inputs | None = None
        self._is_still = False
        self.listen()

    def __getstate__(self) -> dict[str, Any]:
        return {"net": self.net, "count": self.count}

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
            register(_Hook(self, method), with_kwargs=True)

    def take(self) -> list[Pass]:
        """What was seen, which is forgotten."""
        passes, self.passes = self.passes, []
        return passes

    # ---- during the user's forward and backward passes ------------------------------------------

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inputs = None
        if self.count == 0 or self._is_still or not torch.is_grad_enabled():
            return
        whole = any(isinstance(m, _BatchNorm) and m.training for m in self.inner.modules())
        self._inputs = Inputs.of(args, kwargs, None if whole else self.count)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs, self._inputs = self._inputs, None
        heads = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
        if self._is_still or not heads or not heads[0].dim():
            return
        seen: list[Pass] = []

        def came_back(gradient: Tensor) -> None:
            if not seen:
                seen.append(Pass(inputs, len(gradient)))
                self.passes.append(seen[0])
            if inputs is not None:
                more = gradient[: inputs.batch].detach()
                old = seen[0].gradient
                seen[0].gradient = more.clone() if old is None else old + more

        heads[0].register_hook(came_back)

    # ---- afterwards -----------------------------------------------------------------------------

    @contextmanager
    def again(self, inputs: Inputs, watched: dict[str, Tensor]) -> Iterator[tuple[Any, Capture]]:
        """The output of another pass and its capture; buffers are put back at the end."""
        restore = snapshot(self.inner.modules())
        self._is_still = True
        try:
            with torch.enable_grad():
                with torch.compiler.set_stance("force_eager"), Capture(watched) as capture:
                    output = inputs.call(self.inner)
                yield output, capture
        finally:
            self._is_still = False
            restore()


class _Hook:
    """Calls a method of a watch that is still there; nothing in copies of the network."""

    def __init__(self, watch: Watch | None, method: str) -> None:
        self._watch = None if watch is None else weakref.ref(watch)
        self._method = method

    @torch.compiler.disable
    def __call__(self, *args: Any) -> None:
        watch = None if self._watch is None else self._watch()
        if watch is not None:
            getattr(watch, self._method)(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, self._method)
