"""Many runs of one Pyro program, each at its own values of some sites.

The runs are one run under `torch.func.vmap`, in chunks small enough to stay in fast memory; sites
without a given value are sampled inside. Programs that vmap cannot run (control flow that depends
on a tensor, an op or a distribution without a batching rule), and programs so large that vmap gains
nothing, run in a loop instead. Nothing is traced and no density is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from pyrocurv.handlers.given_tensors import value_given_by
from pyrocurv.runtime.rng import device_of, isolated_rng
from pyrocurv.runtime.validation import is_out_of_memory

Program = Callable[..., Any]
Values = Mapping[str, Tensor]
Run = Callable[[Values], "RunResults"]  # one run at values {site: [*shape]}; no axis of runs

# bytes of the largest tensor in a chunk; for larger tensors malloc returns each page to the system
MAX_TENSOR_BYTES = 16 << 20
MIN_CHUNK = 4  # runs in a chunk, below which vmap gains nothing over a loop
MAX_SIGNATURES = 256  # calls of different shapes that are remembered
RETURN = "_RETURN"  # the site name of the program's return value, in the values if it is a tensor


@dataclass(frozen=True)
class SiteShape:
    """The shape of a site's value in one run, and its number of batch dimensions."""

    shape: torch.Size
    batch_dim: int = 0
    is_observed: bool = False


@dataclass(frozen=True, eq=False)
class RunResults:
    """Results of n runs: values {site: [n, *shape]} of wanted sites, and shapes of all sites."""

    values: dict[str, Tensor]
    sites: dict[str, SiteShape]
    max_plate_nesting: int  # of vectorized plates


def concatenate(results: Sequence[RunResults]) -> RunResults:
    """The results of several batches of runs as those of one."""
    return results[0] if len(results) == 1 else _combine(results, torch.cat)


def _combine(results: Sequence[RunResults], join: Callable[[list[Tensor]], Tensor]) -> RunResults:
    first = results[0]
    values = {name: join([result.values[name] for result in results]) for name in first.values}
    return replace(first, values=values)


@dataclass(eq=False)
class VectorizedRunner:
    """Runs one program many times, under vmap where possible.

    It decides how at the first call with arguments of new shapes, by one run in a loop and one
    under vmap, which leave the random generators untouched.
    """

    chunks: dict[Any, int] = field(default_factory=dict)  # runs in a chunk; 1 for a loop

    @torch.no_grad()
    def __call__(
        self, program: Program, values: Values, n: int, args: Any, kwargs: Any,
        is_wanted: Callable[[str], bool] = lambda name: True,
    ) -> RunResults:
        """n runs of program(*args, **kwargs) at values {site: [n, *shape]}."""
        results = self.at_once(program, values, n, args, kwargs, is_wanted)
        if results is None:
            results = _looped(_run_of(program, args, kwargs, is_wanted), values, n)
        return results

    @torch.no_grad()
    def at_once(
        self, program: Program, values: Values, n: int, args: Any, kwargs: Any,
        is_wanted: Callable[[str], bool] = lambda name: True,
    ) -> RunResults | None:
        """The same under vmap; None where vmap cannot run the program, or gains nothing."""
        run = _run_of(program, args, kwargs, is_wanted)
        signature = call_signature(program, args, kwargs)
        if signature not in self.chunks:
            with isolated_rng(device_of((*values.values(), *args))):
                remember(self.chunks, signature, _chunk_size(run, values))
        chunk = self.chunks[signature]
        if chunk > 1:
            try:
                return _vectorized(run, values, n, chunk)
            except Exception as error:  # vmap cannot run it at these values
                if is_out_of_memory(error):
                    raise
        return None


def _run_of(
    program: Program, args: Any, kwargs: Any, is_wanted: Callable[[str], bool]
) -> Run:
    """One run of a program, as a function of the values of its sites."""
    return lambda values: _RunMessenger(values, is_wanted)(program, args, kwargs)


def remember(table: dict[Any, int], signature: Any, value: int) -> None:
    """Add to a table of calls; it forgets the oldest ones."""
    while len(table) >= MAX_SIGNATURES:
        del table[next(iter(table))]
    table[signature] = value


def call_signature(program: Program, args: Any, kwargs: Any) -> Any:
    """The properties of a call that decide how it is run."""
    leaves, spec = tree_flatten((args, kwargs))
    kinds = tuple(
        (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor)
        else leaf if isinstance(leaf, (int, str)) else type(leaf)
        for leaf in leaves
    )
    return getattr(program, "training", None), kinds, str(spec)


def _looped(run: Run, values: Values, n: int) -> RunResults:
    """n runs, one after the other."""
    unbound = {name: value.unbind() for name, value in values.items()}
    results = [run({name: each[i] for name, each in unbound.items()}) for i in range(n)]
    return _combine(results, torch.stack)


def _vectorized(run: Run, values: Values, n: int, chunk_size: int) -> RunResults:
    """n runs under vmap, `chunk_size` at once."""
    results: list[RunResults] = []

    def one(values: dict[str, Tensor], number: Tensor) -> dict[str, Tensor]:
        with _BatchedFactories():
            results.append(run(values))
        return results[-1].values

    chunks = chunk_size if chunk_size < n else None  # a single chunk would be copied
    vmapped = torch.func.vmap(one, randomness="different", chunk_size=chunks)
    with _no_vmap_fallback():
        stacked = vmapped(dict(values), torch.arange(n))  # the numbers give vmap its size
    return replace(results[0], values=stacked)


def _chunk_size(run: Run, values: Values) -> int:
    """The number of runs that fit into a chunk, 1 where a loop is needed or is no slower."""
    with _LargestTensor() as largest:
        run({name: value[0] for name, value in values.items()})  # raises the program's own errors
    size = MAX_TENSOR_BYTES // largest.num_bytes
    if size < MIN_CHUNK:
        return 1
    try:
        _vectorized(run, {name: value[:1] for name, value in values.items()}, 1, size)
    except Exception as error:  # vmap has many ways to refuse a program
        if is_out_of_memory(error):
            raise
        return 1
    return size


class _RunMessenger(Messenger):
    """Runs a program at values of its sites, hidden from handlers outside.

    It is not a `ReplayMessenger`, whose checks read values, which is impossible under vmap, and
    which keeps distributions, whose tensors must not outlive vmap.
    """

    def __init__(self, values: Values, is_wanted: Callable[[str], bool]) -> None:
        super().__init__()
        self._given, self._is_wanted = values, is_wanted
        self._values: dict[str, Tensor] = {}
        self._sites: dict[str, SiteShape] = {}
        self._max_plate_nesting = 0

    def __call__(self, program: Program, args: Any, kwargs: Any) -> RunResults:
        with self:
            result = program(*args, **kwargs)
        self._record(RETURN, result, SiteShape(getattr(result, "shape", torch.Size())))
        return RunResults(self._values, self._sites, self._max_plate_nesting)

    def _process_message(self, msg: Any) -> None:
        super()._process_message(msg)
        msg["stop"] = True

    def _pyro_sample(self, msg: Any) -> None:
        value = self._given.get(msg["name"])
        if value is None:
            return
        if not site_is_subsample(msg):
            shape = msg["fn"].shape()
            if value.dim() > len(shape) and value.numel() == shape.numel():
                value = value.reshape(shape)  # without axes of plates that its site is not in
        msg["value"], msg["done"] = value, True

    def _pyro_post_sample(self, msg: Any) -> None:
        dims = [-frame.dim for frame in msg["cond_indep_stack"] if frame.vectorized]
        self._max_plate_nesting = max(self._max_plate_nesting, *dims, 0)
        if site_is_subsample(msg):
            return
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        shape = fn.shape() if name in self._given else value.shape
        self._record(name, value, SiteShape(shape, len(fn.batch_shape), msg["is_observed"]))

    def _record(self, name: str, value: Any, site: SiteShape) -> None:
        self._sites[name] = site
        if self._is_wanted(name) and isinstance(value, Tensor):
            self._values[name] = value


@value_given_by.register
def _(handler: _RunMessenger, name: str) -> Tensor | None:
    return handler._given.get(name)


class _LargestTensor(TorchFunctionMode):
    """Measures the largest result of torch functions, in bytes."""

    num_bytes = 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.num_bytes = max(self.num_bytes, result.numel() * result.element_size())
        return result


class _BatchedFactories(TorchFunctionMode):
    """Gives each run under vmap its own copy of a new tensor, which can be filled in place.

    `torch.distributions` fill a new tensor with samples, which vmap refuses if all runs share it.
    """

    factories = {
        torch.empty, torch.zeros, torch.ones, torch.full, torch.empty_like, torch.zeros_like,
        torch.ones_like, torch.full_like, Tensor.new, Tensor.new_empty, Tensor.new_zeros,
        Tensor.new_ones, Tensor.new_full,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.clamp_:  # has a batching rule out of place only
            return args[0].copy_(torch.clamp(*args, **kwargs))
        if func is torch.binomial:  # has one for two batched arguments only
            args = args[0] + 0 * args[1], args[1] + 0 * args[0]
        result = func(*args, **kwargs)
        if func in self.factories and result.is_floating_point():
            return result + 0 * torch.rand((), dtype=result.dtype, device=result.device)
        return result


@contextmanager
def _no_vmap_fallback() -> Iterator[None]:
    """Make vmap raise, instead of warn, for an op that it would run in a slow loop."""
    functorch: Any = torch._C._functorch
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)
