"""What a training step costs, as a multiple of a step of Adam on the same network.

    python benchmarks/step_cost.py                      # LeNet-5, batch 128; about a minute
    python benchmarks/step_cost.py --net mlp --rounds 5
    python benchmarks/step_cost.py --net resnet18 --methods kfac --steps 20 --rounds 5

All methods take turns in one process on one thread: in each round a block of steps of each, whole
cycles of the curvature (`every=20`), and each block's CPU time is divided by that of Adam's block
in the same round, so that a loaded machine slows both sides of a ratio alike. "x Adam" is the
median over the rounds; "sum" is the ratio of all time, in which the eigendecompositions (every 200
steps) have their due weight. NGVI runs with the library's defaults and temperature 0.1, on noisy
blobs that can be learnt but not by heart. Then the parts of an NGVI step. A missed target fails
nothing.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyrocurv
from nets import BATCH, CLASSES, IMAGES, NETS
from pyrocurv.guides import DiagonalGuide, EKFACGuide, KFACGuide
from pyrocurv.infer import NGVI, layerwise_step
from pyrocurv.infer.model_run import BatchModel, ModelRun
from pyrocurv.optim import SecondOrderOptimizer
from pyrocurv.posterior.sampling import Sampler

try:
    from ivon import IVON
except ImportError:
    IVON = None

NUM_DATA = 12_800
CYCLE = 20  # steps from one curvature estimate to the next
GUIDES = {"kfac": KFACGuide, "ekfac": EKFACGuide, "diagonal": DiagonalGuide}
METHODS = ("adam", "sgd", *GUIDES, "second-order", "ivon")
TARGETS = {
    "lenet": {"kfac": 1.25, "diagonal": 1.15, "second-order": 1.2}, "mlp": {"kfac": 1.8},
    "resnet18": {"kfac": 1.5},
}
PARTS = ("sample", "forward + backward", "curvature", "update, rest")

Batch = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor], Any]


def keep_memory() -> None:
    """Have malloc keep what is freed.

    By default glibc gives a few freed megabytes back to the system and faults them in again at the
    next step, or not, as the heap happens to lie: up to 5 ms a step for whichever method it hits. A
    large block, once freed, raises that threshold for good.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def blobs(shape: tuple[int, ...]) -> Batch:
    """Ten clouds of images [N, *shape] of which a tenth have another's label [N]."""
    y = torch.randint(CLASSES, (NUM_DATA,))
    x = torch.randn(CLASSES, *shape)[y] / 4 + torch.randn(NUM_DATA, *shape)
    wrong = torch.rand(NUM_DATA) < 0.1
    return x, torch.where(wrong, torch.randint(CLASSES, (NUM_DATA,)), y)


def torch_step(net: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def plain_step(net: nn.Module) -> Step:
    """Forward and backward alone."""

    def step(x: Tensor, y: Tensor) -> None:
        net.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), y).backward()

    return step


def ivon_step(net: nn.Module) -> Step:
    optimizer = IVON(net.parameters(), lr=0.1, ess=NUM_DATA, hess_init=0.1)

    def step(x: Tensor, y: Tensor) -> None:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def make_step(method: str, net: nn.Module) -> Step:
    if method in GUIDES:
        model = pyrocurv.nn.Classifier(pyrocurv.nn.bayesianize(net), num_data=NUM_DATA)
        return NGVI(model, GUIDES[method](model), temperature=0.1).step
    if method == "ivon":
        return ivon_step(net)
    if method == "second-order":
        return torch_step(net, SecondOrderOptimizer(net))
    if method == "adam":
        return torch_step(net, torch.optim.Adam(net.parameters()))
    return torch_step(net, torch.optim.SGD(net.parameters(), lr=0.01))


def batches(x: Tensor, y: Tensor, size: int) -> Iterator[Batch]:
    """Without end, in a new order every epoch."""
    while True:
        for rows in torch.randperm(len(y)).split(size):
            if len(rows) == size:
                yield x[rows], y[rows]


def run(step: Step, data: Sequence[Batch]) -> float:
    """CPU seconds per step over these batches."""
    start = time.process_time()
    for x, y in data:
        step(x, y)
    return (time.process_time() - start) / len(data)


def measure(
    steps: dict[str, Step], source: Iterator[Batch], rounds: int, size: int
) -> dict[str, list[float]]:
    """Seconds per step of each method, one number for each round."""
    times: dict[str, list[float]] = {method: [] for method in steps}
    for number in range(rounds + 1):  # the first is the warm-up
        block = list(islice(source, size))
        for method, step in steps.items():
            spent = run(step, block)
            if number:
                times[method].append(spent)
    return times


def table(times: dict[str, list[float]], targets: dict[str, float]) -> str:
    lines = [
        f"{'method':<10}{'ms':>8}{'x Adam':>9}{'quartiles':>14}{'range':>14}{'sum':>8}  target"
    ]
    for method, mine in times.items():
        ratios = [a / b for a, b in zip(mine, times["adam"], strict=True)]
        low, high = torch.tensor(ratios).quantile(torch.tensor([0.25, 0.75])).tolist()
        target = f"<= {targets[method]:.2f}" if method in targets else ""
        lines.append(
            f"{method:<10}{1e3 * median(mine):>8.2f}{median(ratios):>9.3f}"
            f"{f'{low:.3f}-{high:.3f}':>14}{f'{min(ratios):.3f}-{max(ratios):.3f}':>14}"
            f"{sum(mine) / sum(times['adam']):>8.3f}  {target}"
        )
    return "\n".join(lines)


class Stopwatch:
    """CPU time by part. What is called inside a part is that part's."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self._busy = False

    def watch(self, part: str, owner: Any, name: str) -> Any:
        """A patch of owner.name that counts its time to `part`."""
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._busy:
                return function(*args, **kwargs)
            self._busy, start = True, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._busy = False
                self.spent[part] += time.process_time() - start

        return mock.patch.object(owner, name, watched)


def parts(step: Step, data: Sequence[Batch]) -> dict[str, float]:
    """Seconds per step of the parts of an NGVI step."""
    watch = Stopwatch()
    with (
        watch.watch("sample", Sampler, "draw"),
        watch.watch("forward + backward", BatchModel, "__call__"),
        watch.watch("forward + backward", ModelRun, "tempered_nll"),
        watch.watch("forward + backward", torch.autograd, "grad"),
        watch.watch("curvature", layerwise_step, "update_curvature"),
    ):
        total = run(step, data)
    known = {part: watch.spent[part] / len(data) for part in PARTS[:-1]}
    return {**known, PARTS[-1]: total - sum(known.values())}


def shares(steps: dict[str, Step], source: Iterator[Batch], count: int) -> str:
    """A table of the parts of a step, with forward + backward of the plain network beside."""
    lines = [f"{'ms (share)':<10}" + "".join(f"{part:>20}" for part in PARTS)]
    block = list(islice(source, count))
    for method in ("kfac", "diagonal"):
        if method in steps:
            found = parts(steps[method], block)
            total = sum(found.values())
            cells = (f"{1e3 * t:.2f} ({t / total:.1%})" for t in found.values())
            lines.append(f"{method:<10}" + "".join(f"{cell:>20}" for cell in cells))
    plain = 1e3 * run(steps["plain"], block)
    lines.append(f"{'plain net':<10}{'':>20}{plain:>20.2f}")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=10)
    add("--steps", type=int, default=2 * CYCLE, help=f"of a block, a multiple of {CYCLE}")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--net", choices=NETS, default="lenet")
    add("--batch", type=int, help="by default 32 for resnet18, 128 for the others")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.steps < 1 or args.steps % CYCLE:
        parser.error(f"--rounds: from 1; --steps: a multiple of {CYCLE}, whole curvature cycles")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    keep_memory()
    torch.manual_seed(0)
    wanted = [method for method in METHODS if method in ("adam", *args.methods)]
    if "ivon" in wanted and IVON is None:
        print("ivon is missing: pip install ivon-opt")
        wanted.remove("ivon")
    steps = {method: make_step(method, NETS[args.net]()) for method in wanted}
    batch = args.batch or BATCH[args.net]
    source = batches(*blobs(IMAGES[args.net]), batch)
    print(f"{args.net}, batch {batch}, {args.rounds} rounds of {args.steps} steps, one thread")
    times = measure(steps, source, args.rounds, args.steps)
    print(table(times, TARGETS[args.net]), flush=True)
    steps["plain"] = plain_step(NETS[args.net]())
    print(shares(steps, source, args.rounds * args.steps))


if __name__ == "__main__":
    main()
