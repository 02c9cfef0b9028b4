"""The processes that train one posterior together, as a group of `torch.distributed`.

Each has a copy of the posterior and its share of the data. What they compute from the data is
summed, one flat bucket at a time, so that all take the same step. Work on matrices that all have,
as an eigendecomposition, is shared out by its cost, and the results are sent to the others.
A process alone communicates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from pyrocurv.runtime.rng import section

AUTO: Final = "auto"
CHECK_EVERY = 100  # steps


class LostProcessError(RuntimeError):
    """A process of the group does not answer."""

    step: int | None = None  # in which that was noticed


@contextmanager
def naming_step(step: int) -> Iterator[None]:
    """Have the error of a lost process say in which step it was missed."""
    try:
        yield
    except LostProcessError as error:
        if error.step is not None:
            raise
        named = LostProcessError(f"step {step}: {error}")
        named.step = step
        raise named from error.__cause__


@dataclass(frozen=True, eq=False)
class Workers:
    """A process group of `torch.distributed`, or None for this process alone.

    All processes of a group have to call the same methods, with tensors of the same shapes.
    """

    group: Any = None

    @staticmethod
    def of(group: Any) -> Workers:
        """Those of a group; "auto" is the default group, if there is one.

        Raises TypeError for anything else, ValueError for a group without this process.
        """
        if group == AUTO:
            group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        if group is None:
            return ALONE
        if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group: this process is not in the group")
        if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise TypeError(
                f"process_group={group!r}: 'auto', None for this process alone, or a process group "
                "of torch.distributed is needed"
            )
        return Workers(group) if dist.get_world_size(group) > 1 else ALONE

    @property
    def size(self) -> int:
        """The number of processes."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """The number of this one."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def is_alone(self) -> bool:
        return self.group is None

    # ---- data of all ----------------------------------------------------------------------------

    @torch.no_grad()
    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum of each tensor over the processes, all in one bucket for each dtype."""
        if self.is_alone or not tensors:
            return [*tensors]
        results: dict[int, Tensor] = {}
        for bucket in _buckets(tensors):
            flat = bucket.flat(tensors)
            with self._talking():
                dist.all_reduce(flat, group=self.group)
            results.update(bucket.unflatten(flat, tensors))
        return [results[index] for index in range(len(tensors))]

    @torch.no_grad()
    def sums_at(self, tensors: Sequence[Tensor], target: int) -> list[Tensor]:
        """`sums` at the process of rank `target`; the others have no use for theirs."""
        if self.is_alone:
            return [*tensors]
        results: dict[int, Tensor] = {}
        for bucket in _buckets(tensors):
            flat = bucket.flat(tensors)
            with self._talking():
                dist.reduce(flat, group_dst=target, group=self.group)
            results.update(bucket.unflatten(flat, tensors))
        return [results[index] for index in range(len(tensors))]

    def mean(self, value: Tensor, weight: float) -> float:
        """The mean of a scalar by weights."""
        if self.is_alone:
            return float(value)
        total, weights = self.sums([value * weight, value.new_tensor(weight)])
        return float(total / weights)

    def sum(self, value: float, like: Tensor) -> float:
        """The sum of a number; synchronizes with the device of `like`."""
        if self.is_alone:
            return value
        (total,) = self.sums([torch.tensor([value], dtype=torch.float64).to(_wide(like))])
        return float(total)

    @torch.no_grad()
    def rows(self, x: Tensor) -> Tensor:
        """The rows [B, ...] of all processes, of as many as each of them has."""
        if self.is_alone:
            return x
        counts = [int(row) for row in self.stacked(torch.tensor([len(x)], device=x.device))]
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        parts = self.stacked(padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @torch.no_grad()
    def stacked(self, x: Tensor) -> Tensor:
        """The tensors [*shape] of all processes, [size, *shape]."""
        if self.is_alone:
            return x[None]
        gathered = x.new_empty(self.size, *x.shape)
        with self._talking():
            dist.all_gather([*gathered.unbind()], x.contiguous(), group=self.group)
        return gathered

    # ---- one for all ----------------------------------------------------------------------------

    @torch.no_grad()
    def broadcast_from_(self, shares: Mapping[int, Sequence[Tensor]]) -> None:
        """Copy {rank: its tensors} of several processes into those of the others, all at once."""
        if self.is_alone:
            return
        sent = [
            (bucket, tensors, bucket.flat(tensors), rank)
            for rank, tensors in shares.items() for bucket in _buckets(tensors)
        ]
        with self._talking():
            pending = [
                dist.broadcast(flat, group_src=rank, group=self.group, async_op=True)
                for *_, flat, rank in sent
            ]
            for work in filter(None, pending):
                work.wait()
        for bucket, tensors, flat, _ in sent:
            for index, value in bucket.unflatten(flat, tensors).items():
                tensors[index].copy_(value)

    def broadcast_(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Copy the tensors of the process of rank `source` into those of the others."""
        self.broadcast_from_({source: tensors})

    def broadcast(self, value: Any) -> Any:
        """A plain value of the process of rank 0, pickled."""
        if self.is_alone:
            return value
        values = [value]
        with self._talking():
            dist.broadcast_object_list(values, group_src=0, group=self.group)
        return values[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """The plain values of all processes at rank 0, pickled; nothing on the others."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.size
        with self._talking():
            dist.gather_object(
                value, values if self.rank == 0 else None, group_dst=0, group=self.group
            )
        return values if self.rank == 0 else []

    def share_out(
        self, costs: Sequence[float], outputs: Sequence[Sequence[Tensor]],
        compute: Callable[[Sequence[int]], None],
    ) -> None:
        """Have each process fill the outputs of its items, and send them to the others.

        `outputs` are the tensors of each item, `compute` fills those of the items of given numbers.
        """
        owners = assign(costs, self.size)
        compute([item for item, owner in enumerate(owners) if owner == self.rank])
        shares: dict[int, list[Tensor]] = {rank: [] for rank in range(self.size)}
        for tensors, owner in zip(outputs, owners, strict=True):
            shares[owner] += tensors
        self.broadcast_from_(shares)

    @torch.no_grad()
    def gather(self, x: Tensor, target: int) -> Tensor | None:
        """The tensors [*shape] of all processes, [size, *shape], at that of rank `target`."""
        if self.rank != target:
            with self._talking():
                dist.gather(x, group_dst=target, group=self.group)
            return None
        gathered = x.new_empty(self.size, *x.shape)
        with self._talking():
            dist.gather(x, [*gathered.unbind()], group_dst=target, group=self.group)
        return gathered

    @torch.no_grad()
    def scatter_(self, x: Tensor, parts: Tensor | None, source: int) -> None:
        """Fill x [*shape] by the part of each process in [size, *shape], which `source` has."""
        pieces = None if parts is None else [*parts.unbind()]
        with self._talking():
            dist.scatter(x, pieces, group_src=source, group=self.group)

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Say what it means when a collective operation fails."""
        try:
            yield
        except RuntimeError as error:  # neither gloo nor NCCL has a class of errors for it
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise LostProcessError(
                f"rank {self.rank} cannot reach all of the {self.size} processes: a process of the "
                f"group has died, has left, or does not take part in this step ({reason})"
            ) from error

    # ---- random numbers -------------------------------------------------------------------------

    def local_noise(self, device: torch.device) -> AbstractContextManager[None]:
        """Draw numbers of this process's own inside, from torch's global generator.

        The stream that all share stays as it is.
        """
        return self.noise(device, self.rank)

    def same_noise(self, device: torch.device) -> AbstractContextManager[None]:
        """Draw the same numbers on all processes inside, and go on alike afterwards.

        It does not matter how many numbers each of them draws.
        """
        return section(device)

    def noise(self, device: torch.device, number: int) -> AbstractContextManager[None]:
        """Draw from the stream of a number inside, which all processes may use."""
        return nullcontext() if self.is_alone else section(device, number)

    # ---- agreement ------------------------------------------------------------------------------

    def any(self, value: bool, like: Tensor) -> bool:
        """Whether it is true for one of the processes."""
        return value if self.is_alone else self.sum(float(value), like) > 0

    @contextmanager
    def together(self, like: Tensor) -> Iterator[None]:
        """Raise on all processes what is raised inside, where they do not communicate, on one."""
        if self.is_alone:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if not self.any(error is not None, like):
            return
        kind = type(error) if type(error).__module__ == "builtins" else RuntimeError
        errors: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(errors, error and (kind, str(error)), group=self.group)
        if error is not None:
            raise error
        rank, (kind, text) = next((r, found) for r, found in enumerate(errors) if found)
        raise kind(f"rank {rank}: {text}")

    def check_equal(self, values: Mapping[str, Tensor], step: int) -> None:
        """Raise RuntimeError, on all processes, where a number differs between them.

        `values` are scalars by the names of what they belong to.
        """
        if self.is_alone or not values:
            return
        numbers = self.stacked(torch.stack([x.double() for x in values.values()])).cpu()
        bits = numbers.view(torch.int64)
        differs = bits != bits[0]
        if bool(differs.any()):
            names = [name for name, x in zip(values, differs.any(0), strict=True) if bool(x)]
            ranks = [str(rank) for rank, x in enumerate(differs.any(1)) if bool(x)]
            raise RuntimeError(
                f"step {step}: {', '.join(names)} of rank{'s' * (len(ranks) > 1)} "
                f"{', '.join(ranks)} {'differ' if len(ranks) > 1 else 'differs'} from rank 0: "
                "something has changed parameters or state on some of the ranks alone"
            )


ALONE = Workers()


def assign(
    costs: Sequence[float], size: int, loads: Sequence[float] | None = None
) -> tuple[int, ...]:
    """The rank that computes each item: always the one with the least to do, expensive ones first.

    `loads` are what the ranks have to do already.

    Example:
        >>> assign([1.0, 8.0, 4.0, 4.0], 2)
        (0, 0, 1, 1)
    """
    loads, owners = [*loads] if loads else [0.0] * size, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        owners[item] = loads.index(min(loads))
        loads[owners[item]] += costs[item]
    return tuple(owners)


@dataclass(frozen=True)
class _Bucket:
    """The numbers of tensors of one dtype on one device."""

    members: Sequence[int]

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensors[index].reshape(-1) for index in self.members])

    def unflatten(self, flat: Tensor, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
        parts = flat.split([tensors[index].numel() for index in self.members])
        return {
            index: part.view(tensors[index].shape)
            for index, part in zip(self.members, parts, strict=True)
        }


def _buckets(tensors: Sequence[Tensor]) -> list[_Bucket]:
    groups: dict[Any, list[int]] = {}
    for index, x in enumerate(tensors):
        groups.setdefault((x.dtype, x.device), []).append(index)
    return [_Bucket(members) for members in groups.values()]


def _wide(like: Tensor) -> Tensor:
    """A tensor on the device of `like`, in double precision where the device has it."""
    return torch.empty(0, device=like.device, dtype=torch.float32 if like.device.type == "mps"
                       else torch.float64)
