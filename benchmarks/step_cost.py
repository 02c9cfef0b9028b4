"""What a training step costs, as a multiple of a step of Adam on the same network.

    python benchmarks/step_cost.py                      # LeNet-5, batch 128; about a minute
    python benchmarks/step_cost.py --net mlp --rounds 5
    python benchmarks/step_cost.py --net resnet18 --methods kfac --steps 20 --rounds 5
    python benchmarks/step_cost.py --dispatches         # counts, of all three networks; seconds

All methods take turns in one process on one thread: in each round a block of steps of each, whole
cycles of the curvature (`every=20`), and each block's CPU time is divided by that of Adam's block
in the same round, so that a loaded machine slows both sides of a ratio alike. "x Adam" is the
median over the rounds; "sum" is the ratio of all time, in which the eigendecompositions (every 200
steps) have their due weight. NGVI runs with the library's defaults and temperature 0.1, "natural"
is "kfac" with `update="natural"`, on noisy blobs that can be learnt but not by heart. Then the
parts of an NGVI step.

A GPU waits for the launches, not for the arithmetic, of a small network. `--dispatches` counts the
operations that PyTorch dispatches in a quiet step, one in which no curvature is due, by a
`TorchDispatchMode`. Adam is the one for GPUs, `foreach=True`. Counted is the mean of two steps, as
antithetic samples are drawn in every second one; "views" are the operations that launch nothing. A
missed target fails nothing.
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
from torch.utils._python_dispatch import TorchDispatchMode

import pyrocurv
from nets import BATCH, CLASSES, IMAGES, NETS
from pyrocurv.guides import DiagonalGuide, EKFACGuide, KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer

try:
    from ivon import IVON
except ImportError:
    IVON = None

NUM_DATA = 12_800
CYCLE = 20  # steps from one curvature estimate to the next
GUIDES = {"kfac": KFACGuide, "ekfac": EKFACGuide, "diagonal": DiagonalGuide}
METHODS = ("adam", "sgd", *GUIDES, "natural", "second-order", "vi", "ivon")
TARGETS = {
    "lenet": {"kfac": 1.25, "diagonal": 1.15, "second-order": 1.2}, "mlp": {"kfac": 1.8},
    "resnet18": {"kfac": 1.5},
}
DISPATCH_TARGETS = {"lenet": 2.0, "resnet18": 1.6}
VIEWS = {
    "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "t", "unbind",
    "split_with_sizes", "squeeze", "transpose", "unsqueeze", "view", "_unsafe_view",
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


def vi_step(net: nn.Module) -> Step:
    optimizer = VIOptimizer(net, num_data=NUM_DATA, temperature=0.1)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with optimizer.sampled_params():
            F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def make_step(method: str, net: nn.Module) -> Step:
    if method in (*GUIDES, "natural"):
        model = pyrocurv.nn.Classifier(pyrocurv.nn.bayesianize(net), num_data=NUM_DATA)
        guide = GUIDES.get(method, KFACGuide)(model)
        options = {"update": "natural"} if method == "natural" else {}
        return NGVI(model, guide, temperature=0.1, **options).step
    if method == "ivon":
        return ivon_step(net)
    if method == "second-order":
        return torch_step(net, SecondOrderOptimizer(net))
    if method == "vi":
        return vi_step(net)
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
    from pyrocurv.infer import layerwise_step  # here, as step_ratio.py takes steps of older code
    from pyrocurv.infer.model_run import BatchModel, ModelRun
    from pyrocurv.posterior.sampling import Sampler

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


class DispatchCounter(TorchDispatchMode):
    """Counts the operations inside by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.namespace != "profiler":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count_dispatches(step: Step, x: Tensor, y: Tensor) -> tuple[float, float]:
    """The mean number of operations of two quiet steps, and how many of them are views."""
    for _ in range(3):
        step(x, y)  # the first has a curvature, the second a sample, the third its mirror
    with DispatchCounter() as counter:
        for _ in range(2):
            step(x, y)
    views = sum(count for name, count in counter.counts.items() if name in VIEWS)
    return counter.counts.total() / 2, views / 2


def dispatches(name: str, methods: Sequence[str]) -> str:
    """A table of the counts of all methods; they do not depend on the size of the batch."""
    x, y = torch.randn(4, *IMAGES[name]), torch.randint(CLASSES, (4,))
    torch.manual_seed(0)
    nets = {method: NETS[name]() for method in methods}
    steps = {method: make_step(method, net) for method, net in nets.items() if method != "adam"}
    steps["adam"] = torch_step(
        nets["adam"], torch.optim.Adam(nets["adam"].parameters(), foreach=True)
    )
    counts = {method: count_dispatches(steps[method], x, y) for method in methods}
    lines = [f"{name:<14}{'dispatches':>12}{'x Adam':>9}{'views':>9}{'launches':>10}  target"]
    for method, (count, views) in counts.items():
        target = "" if method != "kfac" or name not in DISPATCH_TARGETS else (
            f"<= {DISPATCH_TARGETS[name]:.2f}"
        )
        lines.append(
            f"{method:<14}{count:>12.1f}{count / counts['adam'][0]:>9.2f}{views:>9.1f}"
            f"{count - views:>10.1f}  {target}".rstrip()
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=10)
    add("--steps", type=int, default=2 * CYCLE, help=f"of a block, a multiple of {CYCLE}")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--net", choices=NETS, help="by default lenet")
    add("--dispatches", action="store_true", help="count operations; of all networks by default")
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
    if args.dispatches:
        for name in [args.net] if args.net else NETS:
            print(dispatches(name, wanted), flush=True)
        return
    args.net = args.net or "lenet"
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
