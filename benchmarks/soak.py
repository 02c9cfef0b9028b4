"""Long runs: memory, tensors, Pyro's store, eigenvalues and step times must stay as they are.

    python benchmarks/soak.py                                # about an hour of one processor
    python benchmarks/soak.py --steps 2000 --calls 200 --guides 50
    python benchmarks/soak.py --cases ngvi predictive

A case repeats one action on a small classifier: a step of NGVI or of an optimizer, a prediction, or
a new guide with its first steps. It is measured fifty times, and the first tenth of a run, in
which caches are filled, is compared with the last one: medians of the resident set, of the tensors
alive, of the entries in Pyro's parameter store, of the least eigenvalue of the precision (or of the
preconditioner), and of the CPU time of an action. A case passes if memory has grown by at most
1 MiB and 1 %, the numbers of tensors and entries have not grown, the least eigenvalue has stayed
above half of what it was, and an action takes at most 5 % longer. The exit status is 1 if one does
not. In runs of a few thousand steps the least eigenvalue falls, as the initial curvature fades.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from statistics import median

import pyro
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import pyrocurv
from pyrocurv.guides import KFACGuide, StructuredGuide
from pyrocurv.infer import NGVI, Predictive
from pyrocurv.nn import Classifier
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer
from pyrocurv.structures import Structure

N, FEATURES, CLASSES, BATCH = 512, 8, 3, 32
MEASUREMENTS = 50
MIB = 2**20
PAGE = 4096


@dataclass(frozen=True)
class Measurement:
    """At one point of a run; `seconds` of CPU time is that of one action since the last point."""

    seconds: float
    memory: float  # the resident set, in MiB
    tensors: int
    entries: int
    eigenvalue: float  # nan if the case has no matrix


@dataclass(frozen=True)
class Case:
    """An action, and the least eigenvalue of the matrix that it changes."""

    act: Callable[[], object]
    eigenvalue: Callable[[], float] = lambda: float("nan")


# ---- the cases ----------------------------------------------------------------------------------


def data() -> tuple[Tensor, Tensor]:
    centers = torch.randn(CLASSES, FEATURES)
    y = torch.randint(CLASSES, (N,))
    return centers[y] + torch.randn(N, FEATURES), y


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def make_model() -> Classifier:
    return Classifier(pyrocurv.nn.bayesianize(make_net()), N)


def least(guide: StructuredGuide) -> float:
    return float(guide.posterior.precision.eigenvalues().min())


def ngvi() -> Case:
    (x, y), model = data(), make_model()
    guide = KFACGuide(model)
    trainer = NGVI(model, guide)

    def step() -> None:
        rows = torch.randint(N, (BATCH,))
        trainer.step(x[rows], y[rows])

    return Case(step, lambda: least(guide))


def second_order() -> Case:
    (x, y), net = data(), make_net()
    optimizer = SecondOrderOptimizer(net, lr=0.01)

    def step() -> None:
        rows = torch.randint(N, (BATCH,))
        optimizer.zero_grad()
        cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()

    def eigenvalue() -> float:
        blocks = optimizer.state_dict()["posterior"]["blocks"]
        matrices = [Structure.from_state(block["preconditioner"]) for block in blocks]
        return min(float(matrix.eigenvalues().min()) for matrix in matrices)

    return Case(step, eigenvalue)


def vi() -> Case:
    (x, y), net = data(), make_net()
    optimizer = VIOptimizer(net, N)

    def step() -> None:
        rows = torch.randint(N, (BATCH,))
        optimizer.zero_grad()
        with optimizer.sampled_params():
            cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()

    def eigenvalue() -> float:
        parts = optimizer.weight_gaussians()
        return min(float(part.precision.eigenvalues().min()) for part in parts)

    return Case(step, eigenvalue)


def predictive() -> Case:
    """Batches of many sizes, and a new `Predictive` each time."""
    (x, y), model = data(), make_model()
    guide = KFACGuide(model)
    NGVI(model, guide).step(x, y)
    sizes = count()

    def predict() -> None:
        size = 1 + next(sizes) % 16
        Predictive(model, guide=guide, num_samples=8)(x[:size])

    return Case(predict, lambda: least(guide))


def guides() -> Case:
    (x, y), model = data(), make_model()

    def train() -> None:
        trainer = NGVI(model, KFACGuide(model))
        for _ in range(2):
            trainer.step(x[:BATCH], y[:BATCH])

    return Case(train)


CASES: dict[str, tuple[Callable[[], Case], str]] = {  # and the flag of its number of actions
    "ngvi": (ngvi, "steps"), "second-order": (second_order, "steps"), "vi": (vi, "steps"),
    "predictive": (predictive, "calls"), "guides": (guides, "guides"),
}


# ---- measuring ----------------------------------------------------------------------------------


def resident() -> float:
    """The resident set in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / MIB


@torch.no_grad()
def measure(seconds: float, case: Case) -> Measurement:
    gc.collect()
    tensors = sum(issubclass(type(item), Tensor) for item in gc.get_objects())
    entries = len(list(pyro.get_param_store().keys()))
    return Measurement(seconds, resident(), tensors, entries, case.eigenvalue())


def run(name: str, actions: int) -> list[Measurement]:
    torch.manual_seed(0)
    pyro.clear_param_store()
    case, found = CASES[name][0](), []
    each = max(1, actions // MEASUREMENTS)
    with tqdm(total=each * MEASUREMENTS, desc=name, disable=None, leave=False) as bar:
        for _ in range(MEASUREMENTS):
            start = time.process_time()
            for _ in range(each):
                case.act()
            found.append(measure((time.process_time() - start) / each, case))
            bar.update(each)
    return found


def tenths(measured: list[Measurement]) -> tuple[Measurement, Measurement]:
    """The medians of the first and of the last tenth."""
    size = len(measured) // 10

    def medians(part: list[Measurement]) -> Measurement:
        names = [field.name for field in fields(Measurement)]
        return Measurement(*(median(getattr(m, name) for m in part) for name in names))

    return medians(measured[:size]), medians(measured[-size:])


def failures(first: Measurement, last: Measurement) -> list[str]:
    """What has not stayed as it was."""
    has_grown = {
        "memory": last.memory > 1.01 * first.memory + 1,
        "tensors": last.tensors > first.tensors,
        "store": last.entries > first.entries,
        "eigenvalue": last.eigenvalue < first.eigenvalue / 2,
        "time": last.seconds > 1.05 * first.seconds,
    }
    return [what for what, grown in has_grown.items() if grown]


def row(name: str, actions: int, first: Measurement, last: Measurement) -> str:
    def pair(a: float, b: float, digits: int) -> str:
        return f"{a:.{digits}f} {b:.{digits}f}".rjust(18)

    times = pair(1e3 * first.seconds, 1e3 * last.seconds, 3)
    verdict = ", ".join(failures(first, last)) or "flat"
    return (
        f"{name:<14}{actions:>8}{times}{last.seconds / first.seconds:>7.3f}"
        f"{pair(first.memory, last.memory, 1)}{pair(first.tensors, last.tensors, 0)}"
        f"{pair(first.entries, last.entries, 0)}{pair(first.eigenvalue, last.eigenvalue, 4)}  "
        f"{verdict}"
    )


HEADER = (
    f"{'case':<14}{'actions':>8}{'ms':>18}{'ratio':>7}{'MiB':>18}{'tensors':>18}{'store':>18}"
    f"{'eigenvalue':>18}"
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100_000, help="of NGVI and each optimizer")
    parser.add_argument("--calls", type=int, default=5_000, help="of Predictive")
    parser.add_argument("--guides", type=int, default=1_000)
    parser.add_argument("--cases", nargs="+", default=[*CASES], choices=CASES)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows, has_failed = [], False
    for name in args.cases:
        actions = getattr(args, CASES[name][1])
        first, last = tenths(run(name, actions))
        rows.append(row(name, actions, first, last))
        has_failed |= bool(failures(first, last))
    print("first and last tenth of each run", HEADER, *rows, sep="\n")
    sys.exit(has_failed)


if __name__ == "__main__":
    main()
