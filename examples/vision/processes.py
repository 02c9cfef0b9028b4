"""One process, or those that `torchrun` has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Process:
    """The rank of this process, their number, and its device."""

    rank: int
    size: int
    device: torch.device


def choose_device(name: str) -> torch.device:
    """"auto": the accelerator of torch if it is there; of several CUDA devices, one per rank."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def process_group(device: str) -> Iterator[Process]:
    """The group of `torchrun`, if it has started this program; or the group that is there."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if is_parallel():  # made by who calls this
        yield Process(dist.get_rank(), dist.get_world_size(), chosen)
        return
    if "RANK" not in os.environ:
        yield Process(0, 1, chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        dist.destroy_process_group()


def is_parallel() -> bool:
    return dist.is_available() and dist.is_initialized()


def parallel(net: nn.Module) -> nn.Module:
    """The network, its gradients averaged over the processes."""
    return DistributedDataParallel(net) if is_parallel() else net


@contextmanager
def rank_0_first(rank: int) -> Iterator[None]:
    """Have rank 0 do something before the others, such as unpacking files."""
    if rank > 0 and is_parallel():
        dist.barrier()
    try:
        yield
    finally:
        if rank == 0 and is_parallel():
            dist.barrier()


def gather(values: list[Tensor]) -> list[list[Tensor]]:
    """The tensors of each rank, on rank 0; an empty list on the others."""
    if not is_parallel():
        return [values]
    parts: Any = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(values, parts)
    return parts or []


@torch.no_grad()
def broadcast_(net: nn.Module) -> None:
    """The parameters and buffers of rank 0 for all."""
    if is_parallel():
        for value in (*net.parameters(), *net.buffers()):
            dist.broadcast(value.data, 0)


@torch.no_grad()
def average_statistics_(net: nn.Module) -> None:
    """The statistics of batch norm, averaged over the processes."""
    for module in net.modules():
        if is_parallel() and isinstance(module, _BatchNorm):
            for value in (module.running_mean, module.running_var):
                if value is not None:
                    dist.all_reduce(value.div_(dist.get_world_size()))
