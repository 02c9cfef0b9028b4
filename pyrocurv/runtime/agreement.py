"""What processes that evaluate something together agree on: errors, inputs, and who does what.

Each reads its own data at its own pace, and they communicate when all have finished: an error on
one of them is then raised on all, and none waits for numbers that do not come.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyrocurv.runtime.rng import RandomStream, derived_seed, next_seed
from pyrocurv.runtime.workers import Workers

MAX_NAMES = 3  # in an error message
SAME_INPUTS = (
    "to share the samples out, all ranks need the same posterior and inputs; with "
    "process_group=None each predicts its own"
)


def gather(workers: Workers, value: Any) -> list[Any]:
    """The plain values of all processes, by rank, pickled."""
    if workers.is_alone:
        return [value]
    values = [None] * workers.size
    dist.all_gather_object(values, value, group=workers.group)
    return values


@contextmanager
def raise_together(workers: Workers, where: str) -> Iterator[None]:
    """Wait for all processes at the end of the block, and raise if one of them has raised.

    A process raises its own exception, or else a RuntimeError with the first of the others. Nothing
    inside may communicate.
    """
    try:
        yield
    except Exception as error:
        gather(workers, f"{type(error).__name__}: {error}")
        raise
    for rank, message in enumerate(gather(workers, None)):
        if message is not None:
            raise RuntimeError(f"{where} failed on rank {rank}: {message}")


def check_same(workers: Workers, values: Mapping[str, Any], remedy: str) -> None:
    """Raise ValueError, on all processes, unless all have the same tensors and plain values.

    The values are trees; of tensors shapes and two checksums are compared.
    """
    if workers.is_alone:
        return
    marks = gather(workers, _fingerprints(values))
    names = [*dict.fromkeys(name for mark in marks for name in mark)]
    differing = [n for n in names if any(mark.get(n) != marks[0].get(n) for mark in marks)]
    if differing:
        more = " ..." if len(differing) > MAX_NAMES else ""
        raise ValueError(
            f"{', '.join(differing[:MAX_NAMES])}{more} of {workers.size} ranks differ: {remedy}"
        )


@torch.no_grad()
def _fingerprints(values: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    plain: dict[str, list[str]] = {}
    sums: dict[str, list[Tensor]] = {}
    for name, value in values.items():
        leaves, spec = tree_flatten(value)
        plain[name], sums[name] = [str(spec)], []
        for x in leaves:
            if isinstance(x, Tensor):
                plain[name].append(f"{tuple(x.shape)} {x.dtype}")
                sums[name] += _checksums(x)
            elif isinstance(x, (int, float, str, bytes)):
                plain[name].append(str(zlib.crc32(repr(x).encode())))
    return {
        name: (*plain[name], *(float(x).hex() for x in sums[name])) for name in values
    }


def _checksums(x: Tensor) -> tuple[Tensor, ...]:
    """Two numbers, the second of which depends on the order of the entries."""
    if x.is_sparse or x.is_quantized or x.is_meta:
        return ()
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    flat = (torch.view_as_real(x) if x.is_complex() else x).detach().reshape(-1).to(wide)
    order = torch.arange(1, flat.numel() + 1, dtype=wide, device=x.device)
    return flat.sum(), flat @ order.sin_()


def own_stream(
    workers: Workers, seed: int
) -> Callable[[torch.device], AbstractContextManager[None]]:
    """A stream of random numbers of this process, of those that a seed gives each of them.

    A process alone draws from torch's global generators.
    """
    if workers.is_alone:
        return lambda device: nullcontext()
    return RandomStream(derived_seed(seed, workers.rank))


@dataclass(frozen=True)
class SharedSamples:
    """The `total` samples that processes share out evenly, in the order of the ranks.

    All draw all samples, from torch's global generators, so that these are the same with any number
    of processes. What else is drawn at a sample is of each process's own, inside `noise`.
    """

    workers: Workers
    total: int
    noise: Callable[[torch.device], AbstractContextManager[None]]

    @staticmethod
    def of(workers: Workers, total: int) -> SharedSamples:
        """Those of the next samples, before any is drawn."""
        seed = 0 if workers.is_alone else next_seed()
        return SharedSamples(workers, total, own_stream(workers, seed))

    @property
    def own(self) -> range:
        """The numbers of the samples of this process."""
        size, rank = self.workers.size, self.workers.rank
        return range(self.total * rank // size, self.total * (rank + 1) // size)

    @property
    def evaluated(self) -> range:
        """Those that it evaluates: one at least, as the results have a shape."""
        return self.own or range(1)

    def evaluated_of(self, numbers: range) -> range:
        """Those of the numbers that it evaluates, counted from the first of `numbers`."""
        start = max(self.evaluated.start, numbers.start)
        stop = max(start, min(self.evaluated.stop, numbers.stop))
        return range(start - numbers.start, stop - numbers.start)

    def gather(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The results [total, ...] from those that this process has evaluated, [evaluated, ...]."""
        return {name: self.workers.rows(x[: len(self.own)]) for name, x in values.items()}
