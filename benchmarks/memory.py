"""The peak of memory over steps of resnet18, for Adam and for NGVI with K-FAC.

    python benchmarks/memory.py

Each method runs in a process of its own, where malloc gives back what is freed, so that the peak of
the resident set is that of the tensors alive; what the process needs before it has a network is
taken off. The bar: NGVI's peak is at most Adam's plus what the structures must hold, which are the
posterior's means, bases and spectra, what the curvature is averaged in, the momentum, and the noise
that the next step mirrors. Adam's side has the weights and its two moments. The steps, an even
number, end with noise to be mirrored, and take curvature estimates. A missed bar fails nothing.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import pyrocurv
from nets import BATCH, CLASSES, IMAGES, NETS
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI
from step_cost import make_step

MIB = 2**20
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak() -> float:
    """Of the process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

STRUCTURES = ("curvature", "precision", "preconditioner")


def tensors(value: Any) -> Iterator[Tensor]:
    """All in a nest of plain values."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def size(value: Any) -> float:
    """MiB of the tensors' memory, each once."""
    stores = [tensor.untyped_storage() for tensor in tensors(value)]
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values()) / MIB


def held(ngvi: NGVI) -> dict[str, float]:
    """What the structures must hold between two steps."""
    blocks = ngvi.state_dict()["posterior"]["blocks"]
    guide = dict(ngvi.guide.named_parameters()), dict(ngvi.guide.named_buffers())
    means = {name: value for name, value in guide[0].items() if "loc" in name}
    shapes = {name: value for part in guide for name, value in part.items() if name not in means}
    return {
        "means": size(means),
        "bases and spectra": size([shapes, [[b[key] for key in STRUCTURES] for b in blocks]]),
        "momentum": size([b["momentum"] for b in blocks]),
        "noise": size([b["mirror"] for b in blocks]),
    }


def child(method: str, net: str, steps: int) -> None:
    """Print the peak in MiB over the steps and, of NGVI, what is held."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(steps, BATCH[net], *IMAGES[net])
    y = torch.randint(CLASSES, (steps, BATCH[net]))
    before = peak()
    if method == "adam":
        step, ngvi = make_step("adam", NETS[net]()), None
    else:
        model = pyrocurv.nn.Classifier(pyrocurv.nn.bayesianize(NETS[net]()), num_data=12_800)
        ngvi = NGVI(model, KFACGuide(model), temperature=0.1)
        step = ngvi.step
    for number in range(steps):
        step(x[number], y[number])
    print(f"peak\t{peak() - before}")
    for name, value in (held(ngvi) if ngvi else {}).items():
        print(f"{name}\t{value}")


def measure(method: str, net: str, steps: int) -> dict[str, float]:
    """What a process of its own reports."""
    command = [sys.executable, __file__, "--child", method, "--net", net, "--steps", str(steps)]
    done = subprocess.run(
        command, env={**os.environ, **MALLOC}, check=True, capture_output=True, text=True
    )
    lines = (line.split("\t") for line in done.stdout.splitlines())
    return {name: float(value) for name, value in lines}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", choices=NETS, default="resnet18")
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--child", choices=("adam", "kfac"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.net, args.steps)
        return
    adam, kfac = (measure(method, args.net, args.steps) for method in ("adam", "kfac"))
    kept = {name: value for name, value in kfac.items() if name != "peak"}
    bar = adam["peak"] + sum(kept.values())
    print(f"{args.net}, batch {BATCH[args.net]}, {args.steps} steps, MiB above the start")
    print(f"Adam, peak          {adam['peak']:8.1f}")
    print(f"NGVI K-FAC, peak    {kfac['peak']:8.1f}")
    for name, value in kept.items():
        print(f"  {name:<18}{value:8.1f}")
    print(f"bar                 {bar:8.1f}  {'met' if kfac['peak'] <= bar else 'unsupported'}")


if __name__ == "__main__":
    main()
