"""Follows the forward passes of a network, and runs it again on their first examples.

A training loop frees its graph in `backward`, before the optimizer's turn. So a watch keeps the
inputs of a few examples where a curvature is due, and gets itself a graph of its own from them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from pyrocurv.layers.capture import Capture
from pyrocurv.layers.module_types import has_synchronized_norm
from pyrocurv.optim.loss_targets import LossLikelihood
from pyrocurv.optim.recorded_pass import ForwardInputs, RecordedPass, num_rows
from pyrocurv.runtime.module_state import save_buffers
from pyrocurv.runtime.outputs import named_outputs
from pyrocurv.runtime.sharding import whole
from pyrocurv.runtime.undo import complete
from pyrocurv.runtime.validation import is_out_of_memory
from pyrocurv.runtime.workers import ALONE, Workers


@dataclass(eq=False)
class ForwardRecorder:
    """The forward passes of `net` since the last `pop_passes` whose gradients reached `parameters`.

    A pass counts if a backward pass through it has accumulated into the `.grad` of one of them. One
    whose gradient is in the inputs alone, as of an attack, does not, nor does one inside of a
    `torch.func` transform. `batch_size` examples of each are kept; None is all, 0 none. With a
    `likelihood` the loss of each is computed in its backward pass.
    """

    net: nn.Module
    batch_size: int | None = 0
    parameters: Sequence[Tensor] = ()
    passes: list[RecordedPass] = field(default_factory=list)
    likelihood: LossLikelihood | None = None

    def __post_init__(self) -> None:
        self._inputs: ForwardInputs | None = None
        self._is_still = False
        self._runnable: Callable[..., Any] | None = None  # in place of the network
        self._around: weakref.ref[DistributedDataParallel] | None = None  # put on afterwards
        self.gradient_norm: Tensor | None = None  # after the last backward pass, if rows are kept
        self.listen()

    def __getstate__(self) -> dict[str, Any]:
        names = "net", "batch_size", "parameters", "likelihood"
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # hooks into a network that is a copy too

    @property
    def inner(self) -> nn.Module:
        """The network itself, under what compiles or distributes it."""
        *_, inner = self._wrappers()
        return inner

    @property
    def local(self) -> nn.Module:
        """The network of this process, whose forward pass communicates nothing."""
        nets = [*self._wrappers()]
        is_parallel = [isinstance(net, DistributedDataParallel) for net in nets]
        return nets[len(nets) - is_parallel[::-1].index(True)] if any(is_parallel) else self.net

    @property
    def workers(self) -> Workers:
        """The processes of `DistributedDataParallel`, where it is around the network."""
        for net in self._parallel():
            return Workers.of(net.process_group)
        return ALONE

    @property
    def is_synchronized(self) -> bool:
        """Whether the next backward pass gives the gradients of all workers, not in `no_sync`."""
        return all(net.require_backward_grad_sync for net in self._parallel())

    def _parallel(self) -> Iterator[DistributedDataParallel]:
        """What averages the network's gradients: a wrapper, or what the passes came from."""
        yield from (n for n in self._wrappers() if isinstance(n, DistributedDataParallel))
        around = None if self._around is None else self._around()
        if around is not None:
            yield around

    def _follow_parallel(self) -> None:
        """Note a `DistributedDataParallel` that runs the network, which was passed in without."""
        active = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if active is None or any(True for _ in self._parallel()):
            return
        if any(module is self.inner for module in active.modules()):
            self._around = weakref.ref(active)

    def _wrappers(self) -> Iterator[nn.Module]:
        """What compiles or distributes the network, from the outside, and the network itself."""
        net: Any = self.net
        while net is not None:
            yield net
            is_parallel = isinstance(net, DistributedDataParallel)
            net = getattr(net, "_orig_mod", None) or (net.module if is_parallel else None)

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
        self._follow_parallel()
        if self.batch_size == 0 or self._is_ignored() or not torch.is_grad_enabled():
            return
        whole = any(isinstance(m, _BatchNorm) and m.training for m in self.inner.modules())
        self._inputs = ForwardInputs.of(args, kwargs, None if whole else self.batch_size)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs, self._inputs = self._inputs, None
        heads = {n: x for n, x in named_outputs(output).items() if x.dim() and x.requires_grad}
        if not heads or self._is_ignored():
            return
        examples = len(next(iter(heads.values())))
        if inputs is not None and examples != num_rows(args, kwargs):
            inputs = ForwardInputs.of(args, kwargs, None, examples)
        _Backward(self, inputs, heads)

    def _is_ignored(self) -> bool:
        """Whether a pass is one of this recorder, or inside of a `torch.func` transform."""
        return self._is_still or torch._C._functorch.peek_interpreter_stack() is not None

    def add(self, recorded: RecordedPass, gradients: Mapping[str, Tensor]) -> None:
        """Count a pass, and what a backward pass through it gave; again if it was counted."""
        if not any(recorded is other for other in self.passes):
            recorded.gradients = {}
            self.passes.append(recorded)
        for name, gradient in gradients.items():
            old = recorded.gradients.get(name)
            recorded.gradients[name] = gradient if old is None else old + gradient
        grads = [p.grad for p in self.parameters if p.grad is not None]
        self.gradient_norm = whole(get_total_norm(grads)) if recorded.inputs is not None else None

    def shrinkage(self) -> float:
        """By how much the parameters' gradients have shrunk since the last backward pass."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if self.gradient_norm is None or not grads:
            return 1.0
        ratio = float(self.gradient_norm / whole(get_total_norm(grads)))
        return ratio if 0 < ratio < math.inf else 1.0

    def versions(self) -> list[tuple[int, int] | None]:
        """What changes when a gradient is accumulated."""
        grads = (p.grad for p in self.parameters)
        return [None if g is None else (id(g), g._version) for g in grads]

    # ---- afterwards -----------------------------------------------------------------------------

    @contextmanager
    def rerun(
        self, inputs: ForwardInputs, tracked: dict[str, Tensor]
    ) -> Iterator[tuple[Any, Capture]]:
        """The output of another pass and its capture; buffers are put back at the end."""
        restore = save_buffers(self.inner.modules())
        capture = Capture(tracked, has_synchronized_norm(self.inner.modules()))
        self._is_still = True
        try:
            with torch.enable_grad():
                with torch.compiler.set_stance("force_eager"), capture:
                    output = self._output(inputs)
                yield output, capture
        finally:
            self._is_still = False
            complete(restore)

    def _output(self, inputs: ForwardInputs) -> Any:
        try:
            return inputs.call(self._runnable or self.inner)
        except (RuntimeError, IndexError, ValueError) as error:
            if inputs.limit is None or is_out_of_memory(error):
                raise
            raise ValueError(
                f"the network does not run on the first {inputs.batch} examples of a batch alone, "
                "which its curvature is estimated from: use Curvature(batch=None)"
            ) from error


class _Backward:
    """Follows the backward passes through one forward pass, until the end of each."""

    def __init__(
        self, recorder: ForwardRecorder, inputs: ForwardInputs | None, heads: Mapping[str, Tensor]
    ) -> None:
        self.recorder, self.tasks = weakref.ref(recorder), dict[int, dict[str, Tensor]]()
        rows = {} if inputs is None else {
            name: x.detach()[: inputs.batch].clone() for name, x in heads.items()
        }
        self.recorded = RecordedPass(inputs, len(next(iter(heads.values()))), rows)
        self.logits: tuple[str, Tensor, int] | None = None  # that the loss is of, and their version
        if recorder.likelihood and (path := recorder.likelihood.logits_name(heads)) is not None:
            self.logits = path, heads[path].detach(), heads[path]._version
        for name, head in heads.items():
            head.register_hook(partial(self.on_gradient, name))

    def on_gradient(self, name: str, gradient: Tensor) -> None:
        recorder, task = self.recorder(), torch._C._current_graph_task_id()
        if recorder is None or torch._C._functorch.is_functorch_wrapped_tensor(gradient):
            return
        if task not in self.tasks:
            self.tasks[task] = {}
            finish = partial(self.finish, task, recorder.versions())
            if not recorder.workers.is_alone:  # after that of DistributedDataParallel
                finish = partial(_at_the_end, finish)
            _at_the_end(finish)
        if self.recorded.inputs is not None:
            rows = gradient.detach()[: self.recorded.inputs.batch].clone()
            self.tasks[task][name] = rows
        if self.logits is not None and recorder.likelihood:
            path, logits, version = self.logits
            if path == name and logits._version == version and gradient.shape == logits.shape:
                self.recorded.loss = recorder.likelihood.mean_loss(logits, gradient.detach())

    def finish(self, task: int, before: Sequence[Any]) -> None:
        """At the end of a backward pass: it counts if a gradient was accumulated."""
        gradients, recorder = self.tasks.pop(task), self.recorder()
        if recorder is not None and recorder.versions() != before:
            recorder.add(self.recorded, gradients)


def _at_the_end(callback: Callable[[], None]) -> None:
    """Call it after the backward pass that runs now, as the last so far."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


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
