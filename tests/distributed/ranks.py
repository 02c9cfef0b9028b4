"""Processes of a gloo group that run functions of the tests, each as one rank.

They are forked from a server that has imported the packages once.
"""

from __future__ import annotations

import io
import os
import socket
import traceback
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

import pytest
import torch
import torch.distributed as dist

TIMEOUT = 300.0  # seconds, of one function
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "pyrocurv.infer", "pyrocurv.optim", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "torch.nn.parallel", "pytest",
])


class Ranks:
    """`size` processes, in a group that is made anew for each function."""

    def __init__(self, size: int) -> None:
        self.size = size
        pipes = [CONTEXT.Pipe() for _ in range(size)]
        self.ends = [end for end, _ in pipes]
        self.processes = [
            CONTEXT.Process(target=_serve, args=(rank, size, end), daemon=True)
            for rank, (_, end) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """What function(rank, *args) returns on each rank; fails if it raises on one of them."""
        port = _free_port()
        for end in self.ends:
            end.send((function, args, port))
        results = []
        for rank, end in enumerate(self.ends):
            if not end.poll(timeout):
                self.stop()
                pytest.fail(f"rank {rank} did not finish {function.__name__} in {timeout:.0f} s")
            try:
                results.append(end.recv())
            except EOFError:
                results.append(("rank has died", None))
        errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(results) if error]
        if errors:
            pytest.fail("\n".join(errors))
        return [torch.load(io.BytesIO(data), weights_only=False) for _, data in results]

    @property
    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def stop(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _serve(rank: int, size: int, end: Any) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, args, port = end.recv()
        except EOFError:
            return
        try:
            stream = io.BytesIO()
            torch.save(_call(function, args, rank, size, port), stream)
            end.send((None, stream.getvalue()))
        except BaseException:
            end.send((traceback.format_exc(), None))


def _call(function: Callable[..., Any], args: Any, rank: int, size: int, port: int) -> Any:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timedelta(seconds=TIMEOUT))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT / 2)
    )
    try:
        dist.barrier()  # one that ends at once would break the connections of a slower one
        return function(rank, *args)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
