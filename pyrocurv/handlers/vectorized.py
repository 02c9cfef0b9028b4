"""Many runs of one Pyro program, each at its own values of some sites.

The runs are one run under `torch.func.vmap`, sites that have no value sampled inside it, in chunks
small enough to stay in fast memory. Where they cannot be (control flow that hangs on a tensor, an
op or a distribution that vmap does not know) or where a single run is large enough by itself, they
go one by one, with the same light messenger. Nothing is traced, nothing scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from pyrocurv.runtime.rng import RandomStream

Program = Callable[..., Any]
Values = Mapping[str, Tensor]

# bytes of the largest tensor in a chunk: more, and malloc gives back each page
MAX_TENSOR_BYTES = 16 << 20
MIN_CHUNK = 4  # runs of a chunk: for fewer, vmap gains nothing over single runs
RETURN = "_RETURN"  # what the program returns, as a site


@dataclass(frozen=True)
class SiteShape:
    """A site in one run: the shape of its value, its plates' dimensions, and who gave the value."""

    shape: torch.Size | None  # None where the value is no tensor
    batch_dim: int = 0
    is_observed: bool = False


@dataclass(eq=False)
class RunResults:
    """What came of n runs: {site: [n, *shape]} of the sites wanted, the shapes of all."""

    values: dict[str, Tensor]
    sites: dict[str, SiteShape]
    max_plate_nesting: int  # of vectorized plates, at most


class _Once(Messenger):
    """Sets sites to `values`, and keeps the sites that are wanted; handlers outside see nothing."""

    def __init__(self, values: Values, wanted: Callable[[str], bool]) -> None:
        super().__init__()
        self.given, self.wanted = values, wanted
        self.found = RunResults({}, {}, 0)

    def _process_message(self, msg: Any) -> None:
        super()._process_message(msg)
        msg["stop"] = True

    def _pyro_sample(self, msg: Any) -> None:
        value = self.given.get(msg["name"])
        if value is not None and site_is_subsample(msg):
            msg["value"], msg["done"] = value, True
        elif value is not None:
            shape = _shape(msg["fn"])
            if value.dim() > len(shape) and value.numel() == shape.numel():
                value = value.reshape(shape)  # axes of 1 for plates that the site is not in
            msg["value"], msg["done"] = value, True

    def _pyro_post_sample(self, msg: Any) -> None:
        dims = [-frame.dim for frame in msg["cond_indep_stack"] if frame.vectorized]
        self.found.max_plate_nesting = max(self.found.max_plate_nesting, *dims, 0)
        if site_is_subsample(msg):
            return
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        shape = _shape(fn) if name in self.given else value.shape
        site = SiteShape(shape, len(fn.batch_shape), msg["is_observed"])
        self.keep(name, value, site)

    def keep(self, name: str, value: Any, site: SiteShape) -> None:
        self.found.sites[name] = site
        if self.wanted(name) and isinstance(value, Tensor):
            self.found.values[name] = value

    def __call__(self, program: Program, args: Any, kwargs: Any) -> RunResults:
        with self:
            result = program(*args, **kwargs)
        self.keep(RETURN, result, SiteShape(getattr(result, "shape", None)))
        return self.found


def _shape(fn: Any) -> torch.Size:
    return fn.batch_shape + fn.event_shape


class _Largest(TorchFunctionMode):
    """The size in bytes of the largest result."""

    size = 1

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.numel() * result.element_size())
        return result


class _Batched(TorchFunctionMode):
    """Makes new tensors inside vmap one for each run, so that they can be filled in place.

    `torch.distributions` draw into a new tensor (`torch.empty(...).normal_()`), which vmap refuses
    if all runs share it.
    """

    makers = {
        torch.empty, torch.zeros, torch.ones, torch.full, torch.empty_like, torch.zeros_like,
        torch.ones_like, torch.full_like, torch.Tensor.new, torch.Tensor.new_empty,
        torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_full,
    }

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.clamp_:  # vmap knows it out of place only
            return args[0].copy_(torch.clamp(*args, **kwargs))
        if func is torch.binomial:  # and this with both arguments of a batch
            args = args[0] + 0 * args[1], args[1] + 0 * args[0]
        result = func(*args, **kwargs)
        if func in self.makers and result.is_floating_point():
            return result + 0 * torch.rand((), dtype=result.dtype, device=result.device)
        return result


@contextmanager
def _no_slow_rules() -> Iterator[None]:
    """Let vmap raise, rather than warn, at an op which it would run in a loop of its own."""
    functorch: Any = torch._C._functorch
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)


@dataclass(eq=False)
class VectorizedRunner:
    """Runs a program many times, and remembers how for arguments of the same shapes.

    One object serves one program. How it runs follows from the shapes and from what vmap can do;
    finding out (a run of it, and one under vmap) takes no random numbers from torch's generator.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def program(x):
        ...     return pyro.sample("y", dist.Normal(x * pyro.sample("w", dist.Normal(0, 1)), 1))
        >>> runs = Repeated()(program, {"w": torch.arange(6.0)}, 6, (torch.ones(2, 3),), {})
        >>> runs.values["y"].shape
        torch.Size([6, 2, 3])
    """

    chunks: dict[Any, int] = field(default_factory=dict)  # runs at once; 1 for one by one

    @torch.no_grad()
    def __call__(
        self, program: Program, values: Values, n: int, args: Any, kwargs: Any,
        wanted: Callable[[str], bool] = lambda name: True,
    ) -> RunResults:
        """n runs of program(*args, **kwargs) at values {site: [n, *shape]}."""
        key = call_signature(program, args, kwargs)
        if key not in self.chunks:
            with RandomStream(0)(_device(values, args)):
                self.chunks[key] = _chunk(program, values, args, kwargs)
        size = self.chunks[key] if self.chunks[key] > 1 else n
        runs = _vectorized if self.chunks[key] > 1 else _in_turn
        parts = []
        for start in range(0, n, size):
            part = {name: value[start : start + size] for name, value in values.items()}
            parts.append(runs(program, part, min(size, n - start), args, kwargs, wanted))
        return join(parts)


def join(parts: list[RunResults]) -> RunResults:
    """Runs one after the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    values = {name: torch.cat([part.values[name] for part in parts]) for name in first.values}
    return RunResults(values, first.sites, first.max_plate_nesting)


def call_signature(program: Program, args: Any, kwargs: Any) -> Any:
    """What of a call decides how it is run."""
    leaves, spec = tree_flatten((args, kwargs))
    kinds = [
        (one.shape, one.dtype) if isinstance(one, Tensor)
        else one if isinstance(one, (int, str)) else type(one)
        for one in leaves
    ]
    return getattr(program, "training", None), (*kinds,), str(spec)


def _device(values: Values, args: Any) -> torch.device:
    tensors = (one for one in (*values.values(), *args) if isinstance(one, Tensor))
    return next((one.device for one in tensors), torch.device("cpu"))


def _chunk(program: Program, values: Values, args: Any, kwargs: Any) -> int:
    """How many runs at once, after one run: it raises what the program does."""
    first = {name: value[:1] for name, value in values.items()}
    with _Largest() as largest:
        _in_turn(program, first, 1, args, kwargs, lambda name: False)
    size = MAX_TENSOR_BYTES // largest.size
    if size < MIN_CHUNK:
        return 1
    try:
        _at_once(program, first, 1, args, kwargs, lambda name: True)
    except Exception:  # vmap has many ways to say no; what is wrong elsewhere was raised above
        return 1
    return size


def _vectorized(
    program: Program, values: Values, n: int, args: Any, kwargs: Any,
    wanted: Callable[[str], bool],
) -> RunResults:
    try:
        return _at_once(program, values, n, args, kwargs, wanted)
    except Exception:  # at these values, or for want of memory
        return _in_turn(program, values, n, args, kwargs, wanted)


def _at_once(
    program: Program, values: Values, n: int, args: Any, kwargs: Any,
    wanted: Callable[[str], bool],
) -> RunResults:
    found: list[RunResults] = []

    def run(values: dict[str, Tensor], number: Tensor) -> dict[str, Tensor]:
        with _Batched():
            found.append(_Once(values, wanted)(program, args, kwargs))
        return found[0].values

    with _no_slow_rules():
        results = torch.func.vmap(run, randomness="different")(dict(values), torch.arange(n))
    return RunResults(results, found[0].sites, found[0].max_plate_nesting)


def _in_turn(
    program: Program, values: Values, n: int, args: Any, kwargs: Any,
    wanted: Callable[[str], bool],
) -> RunResults:
    each = {name: value.unbind() for name, value in values.items()}
    runs = [
        _Once({name: one[i] for name, one in each.items()}, wanted)(program, args, kwargs)
        for i in range(n)
    ]
    results = {name: torch.stack([run.values[name] for run in runs]) for name in runs[0].values}
    return RunResults(results, runs[0].sites, runs[0].max_plate_nesting)
