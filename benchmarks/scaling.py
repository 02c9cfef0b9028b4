"""What a training step on several processes communicates and computes, by layer.

    python benchmarks/scaling.py --net lenet --workers 2
    python benchmarks/scaling.py --net resnet50 --workers 8 64 1024 --total
    python benchmarks/scaling.py --net transformer-1b --workers 8 64 1024 --total

Networks are run once, on two made examples, to find their layers; "transformer-1b" is a list of
shapes, 20 layers of width 2,048. Bytes are those that a process passes to the collective
operations; `tests/distributed/test_scaling.py` compares them with what the group was really given.
"wire" is what a process then sends in a ring of W: 2 (W-1)/W bytes for each of an all-reduce, W-1
for each of an all-gather, 1 for each of a broadcast. Flops are those of one process. "grad" is
communicated at every step, by `NGVI` or by `DistributedDataParallel`; "stat" are the statistics of
an estimate of the curvature, every `--every` steps, "eigen" the eigendecompositions, at every
`--eigen-every`-th, and "dir" the directions of "whitened-muon", shared out, at every step. Totals
are means over a cycle. The formulas are those of `docs/scaling.md`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.truncated_factor import MAX_ROWS
from pyrocurv.curvature.update_interval import NUM_DIRECTIONS
from pyrocurv.nn.networks import GPT, LeNet5, ResNet
from pyrocurv.optim import SecondOrderOptimizer
from pyrocurv.posterior.muon import MAX_SIDE
from pyrocurv.posterior.state import BlockState
from pyrocurv.structures import automatic_ranks

SHARES_EIGENBASES = True  # whether each is computed by one process, and sent to the others
POLAR_STEPS = 3  # of an orthogonalization
EIGH = 9  # flops of an eigendecomposition, times n³
INT, DOUBLE = 8, 8  # bytes


@dataclass(frozen=True)
class Shape:
    """A block: `groups` matrices [O, I] that are used at `positions` of an example."""

    name: str
    kind: str  # of the structure
    size: int  # P
    groups: int = 1
    outputs: int = 1
    inputs: int = 1
    ranks: tuple[int, int] = (1, 1)
    positions: int = 1
    is_matrix: bool = True
    corrects: bool = False  # EK-FAC's eigenvalues
    layers: int = 1

    @staticmethod
    def of(state: BlockState) -> Shape:
        """That of a block after an estimate."""
        block, layer = state.block, state.block.layers[0]
        *lead, outputs, inputs = layer.matrix_shape
        is_kronecker = block.structure.is_kronecker
        return Shape(
            block.name, block.kind, state.mean.numel(), math.prod(lead), outputs, inputs,
            block.ranks if is_kronecker else (outputs, inputs), state.curvature.positions,
            layer.is_matrix, is_kronecker and block.structure.corrects_eigenvalues,
            len(block.layers),
        )

    @property
    def is_kronecker(self) -> bool:
        return self.kind in ("kfac", "ekfac")

    @property
    def is_truncated(self) -> bool:
        return self.is_kronecker and self.ranks != (self.outputs, self.inputs) and self.groups == 1

    @property
    def is_whitened(self) -> bool:
        """Whether "whitened-muon" orthogonalizes it."""
        small = min(self.outputs, self.inputs) <= MAX_SIDE
        return self.is_kronecker and self.is_matrix and (small or self.positions > 1)

    def rows(self, examples: int, workers: int) -> int:
        """Of a truncated factor, that a process has `examples` of."""
        return examples * min(self.positions, max(1, MAX_ROWS // workers // max(1, examples)))


@dataclass(frozen=True)
class Traffic:
    """Bytes that a process passes to all-reduces, all-gathers and broadcasts."""

    reduced: float = 0.0
    gathered: float = 0.0
    broadcast: float = 0.0

    @property
    def total(self) -> float:
        return self.reduced + self.gathered + self.broadcast

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.reduced + other.reduced, self.gathered + other.gathered,
                       self.broadcast + other.broadcast)

    def __mul__(self, factor: float) -> Traffic:
        return Traffic(self.reduced * factor, self.gathered * factor, self.broadcast * factor)

    def wire(self, workers: int) -> float:
        """Bytes that a process sends in a ring."""
        return (2 * (workers - 1) / workers * self.reduced + (workers - 1) * self.gathered
                + self.broadcast)


def total(parts: Iterable[Traffic]) -> Traffic:
    return sum(parts, Traffic())


# ---- bytes --------------------------------------------------------------------------------------


def statistics_bytes(shape: Shape, examples: int, workers: int, item: int = 4) -> Traffic:
    """Of one estimate of a block, from `examples` of each process."""
    o, i = shape.outputs, shape.inputs
    if shape.kind == "diag":
        return Traffic(item * shape.size)
    if not shape.is_kronecker:
        return Traffic(item * shape.size**2)
    sides = [r + (r < n) for r, n in zip(shape.ranks, (o, i), strict=True)]
    spectrum = shape.groups * math.prod(sides)
    corrected = Traffic(item * spectrum if shape.corrects else 0)
    if not shape.is_truncated:
        return Traffic(item * (shape.groups * (o * o + i * i) + 1)) + corrected
    rows = shape.rows(examples, workers)  # a finite check, the diagonals, the number of inputs
    return Traffic(item * (1 + o + i) + DOUBLE, item * rows * (o + i) + 2 * INT) + corrected


def interval_bytes(shape: Shape, item: int = 4) -> Traffic:
    """What every="auto" adds to an estimate: two second moments and two traces of each layer."""
    side = min(shape.inputs, NUM_DIRECTIONS)
    return Traffic(item * (1 + shape.layers * (2 * shape.groups * side**2 + 2)))


def direction_bytes(shape: Shape, update: str, item: int = 4) -> Traffic:
    """A direction and its inner product with the gradient, from the process that computes it."""
    is_shared = update == "whitened-muon" and shape.is_whitened
    return Traffic(broadcast=item * (shape.size + 1) if is_shared else 0)


def eigenbasis_bytes(shape: Shape, item: int = 4) -> Traffic:
    """Eigenvectors and eigenvalues, where they are shared out."""
    if not (SHARES_EIGENBASES and shape.is_kronecker) or shape.is_truncated:
        return Traffic()
    (s, r), o, i = shape.ranks, shape.outputs, shape.inputs
    return Traffic(broadcast=item * shape.groups * (o * s + i * r + s + r))


def estimate_bytes(
    shapes: Sequence[Shape], examples: int, workers: int, method: str, item: int = 4,
    is_auto: bool = False,
) -> Traffic:
    """Of an estimate of all these blocks: their statistics and the numbers of examples."""
    scalars = Traffic(item * (4 if method == "ngvi" else 2))
    parts = [statistics_bytes(shape, examples, workers, item) for shape in shapes]
    parts += [interval_bytes(shape, item) for shape in shapes if is_auto]
    return scalars + total(parts)


def step_bytes(
    method: str, num_weights: int, num_others: int = 0, others: int = 0, item: int = 4
) -> Traffic:
    """At every step, without DistributedDataParallel's: its gradients are those of all weights.

    "ngvi" has one bucket of all gradients, loss and numbers of data; `num_weights` have a block,
    `others` tensors of `num_others` numbers have none. "vi" has the number of examples and a loss.
    """
    if method == "ngvi":
        return Traffic(item * (num_weights + num_others + 2 + 3 + others))
    return Traffic(DOUBLE + 3 * item if method == "vi" else 0)


# ---- flops of one process -----------------------------------------------------------------------


def statistics_flops(shape: Shape, examples: int, workers: int) -> float:
    o, i = shape.outputs, shape.inputs
    if not shape.is_kronecker:
        return 2 * examples * shape.positions * shape.size
    if shape.is_truncated:
        return sum(
            2 * (rank + m) * n * (rank + m + rank) + EIGH * (rank + m) ** 3
            for n, rank in zip((o, i), shape.ranks, strict=True)
            for m in [workers * shape.rows(examples, workers)]
        )
    return 2 * shape.groups * examples * shape.positions * (o * o + i * i)


def eigen_flops(shape: Shape, workers: int) -> float:
    if not shape.is_kronecker or shape.is_truncated:
        return 0.0
    share = workers if SHARES_EIGENBASES else 1
    return EIGH * shape.groups * (shape.outputs**3 + shape.inputs**3) / share


def direction_flops(shape: Shape, update: str, workers: int) -> float:
    """Those of whitening, and of an orthogonalization that iterates X, on average."""
    if update != "whitened-muon" or not shape.is_whitened:
        return 0.0
    o, i, (_, r) = shape.outputs, shape.inputs, shape.ranks
    n, m = sorted((o, i))
    return shape.groups * (8 * o * i * r + POLAR_STEPS * (4 * n * n * m + 2 * n**3)) / workers


# ---- networks -----------------------------------------------------------------------------------


def resnet50() -> nn.Module:
    return torchvision.models.resnet50()


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "lenet": (LeNet5, lambda: torch.randn(2, 1, 28, 28)),
    "resnet": (ResNet, lambda: torch.randn(2, 1, 28, 28)),
    "gpt": (GPT, lambda: torch.randint(96, (2, 64))),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10),
                 lambda: torch.randn(2, 3, 32, 32)),
    "resnet50": (resnet50, lambda: torch.randn(2, 3, 224, 224)),
}


def shapes_of(net: nn.Module, x: Tensor, **options: Any) -> list[Shape]:
    """The blocks that one step of `SecondOrderOptimizer` finds."""
    optimizer = SecondOrderOptimizer(net, curvature=Curvature("fisher", batch=1), **options)
    output = net(x)
    output = output.flatten(0, -2)
    F.cross_entropy(output, torch.zeros(len(output), dtype=torch.long)).backward()
    optimizer.step()
    return [Shape.of(state) for state in optimizer._posterior.blocks]


def transformer(layers: int = 20, width: int = 2048, context: int = 2048) -> list[Shape]:
    """The matrices of a transformer of about 12 layers width² weights."""
    sides = [("q", width, width), ("k", width, width), ("v", width, width), ("o", width, width),
             ("up", 4 * width, width), ("down", width, 4 * width)]
    return [
        Shape(f"layers.{number}.{name}", "kfac", o * (i + 1), 1, o, i + 1,
              automatic_ranks(o, i + 1), context)
        for number in range(layers) for name, o, i in sides
    ]


# ---- the table ----------------------------------------------------------------------------------


def number(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or unit == "T":
            return f"{value:.0f}{unit}" if not unit or value >= 100 else f"{value:.1f}{unit}"
        value /= 1000
    return ""


def line(name: str, *values: float) -> str:
    return f"{name:<24.24}" + "".join(f"{number(value):>9}" for value in values)


def table(shapes: Sequence[Shape], args: argparse.Namespace, workers: int, others: int) -> None:
    """By layer unless `--total`, and the means over a cycle."""
    examples = math.ceil(args.examples / workers)
    rows = []
    for shape in shapes:
        traffic = [
            Traffic(4 * shape.size), statistics_bytes(shape, examples, workers),
            eigenbasis_bytes(shape), direction_bytes(shape, args.update),
        ]
        flops = [statistics_flops(shape, examples, workers), eigen_flops(shape, workers),
                 direction_flops(shape, args.update, workers)]
        rows.append((shape, traffic, flops))
    print(f"{workers} processes; bytes, then flops of a process")
    print(f"{'':<24}" + "".join(f"{head:>9}" for head in (
        "grad", "stat", "eigen", "dir", "stat", "eigen", "dir")))
    for shape, traffic, flops in rows:
        if not args.total:
            print(line(shape.name, *(t.total for t in traffic), *flops))
    per_step = (1, 1 / args.every, 1 / args.eigen_every, 1)
    means = [total(t[k] for _, t, _ in rows) * share for k, share in enumerate(per_step)]
    means[0] += Traffic(4 * others)
    work = [sum(f[k] for *_, f in rows) * share for k, share in enumerate(per_step[1:])]
    print(line("mean of a step", *(t.total for t in means), *work))
    print(line("on the wire", *(t.wire(workers) for t in means)))
    extra = total(means[1:]).wire(workers) / means[0].wire(workers) if workers > 1 else 0.0
    print(f"besides the gradients: {extra:.3f} of their bytes on the wire\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--net", choices=[*NETS, "transformer-1b"], default="lenet")
    add("--workers", type=int, nargs="+", default=[8])
    add("--every", type=int, default=Curvature.every)
    add("--eigen-every", type=int, default=Curvature.eigen_every)
    add("--examples", type=int, default=Curvature.batch, help="in an estimate, of all processes")
    add("--update", choices=["natural", "whitened-muon"], default="whitened-muon")
    add("--total", action="store_true", help="the means alone")
    args = parser.parse_args()
    if args.net == "transformer-1b":
        shapes, weights = transformer(), 0
    else:
        make, data = NETS[args.net]
        net = make()
        shapes, weights = shapes_of(net, data()), sum(p.numel() for p in net.parameters())
    known = sum(shape.size for shape in shapes)
    others = max(0, weights - known)
    print(f"{args.net}: {known:,} weights in {len(shapes)} blocks, {others:,} others")
    for workers in args.workers:
        table(shapes, args, workers, others)


if __name__ == "__main__":
    main()
