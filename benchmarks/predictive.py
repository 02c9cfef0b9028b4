"""What prediction costs: `pyro.infer.Predictive` against `pyrocurv.infer.Predictive`.

    python benchmarks/predictive.py                   # about five minutes
    python benchmarks/predictive.py --nets small --batches 1 32 --rounds 9

100 samples of the posterior of a K-FAC guide, default return sites or only what the model returns
(`--returned`). Both take turns in one process on one thread, three calls at a time, and the CPU
time of Pyro's is divided by that of ours in the same round, so that a loaded machine slows both
alike; "ratio" is the median over the rounds, with their range. "first" is the same for the first
call of each, where ours also finds out how to run the model. The networks: a small conv net for
8 x 8 images ("digits"), another for 28 x 28 ("small", whose convolutions take most of the time from
batch 32 on: no way of calling them is five times as fast), LeNet-5, MLPs 8-50-1 ("uci") and
8-50-50-1 for regression with a latent noise scale, and a wide MLP 784-512-512-10, most of whose
time goes into drawing its 670,000 weights. A missed target fails nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import pyro
import pyro.infer
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyrocurv
from nets import CLASSES
from pyrocurv.guides import DiagonalGuide, KFACGuide
from pyrocurv.infer import NGVI, Predictive
from pyrocurv.nn import Classifier, Regressor, bayesianize
from pyrocurv.nn.networks import MLP, LeNet5
from step_cost import keep_memory

NUM_DATA = 1_000
SAMPLES = 100
CALLS = 3  # of a round
GUIDES = {"kfac": KFACGuide, "diagonal": DiagonalGuide, "autonormal": AutoNormal}


def digits() -> nn.Sequential:
    """For images of 8 x 8, 1,898 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 2 * 2, CLASSES),
    )


def small() -> nn.Sequential:
    """For images of 28 x 28, 4,266 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 7 * 7, CLASSES),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "digits": (digits, (1, 8, 8)), "small": (small, (1, 28, 28)), "lenet": (LeNet5, (1, 28, 28)),
    "uci": (partial(MLP, 8, [50], 1), (8,)), "mlp": (partial(MLP, 8, [50, 50], 1), (8,)),
    "wide": (MLP, (1, 28, 28)),
}
TARGETS = {
    ("digits", 1): 30.0, ("digits", 32): 5.0, ("digits", 256): 1.5, ("uci", 32): 30.0,
    ("mlp", 32): 30.0,
}


def trained(net: str, guide: str) -> tuple[Any, Any]:
    """A model and its guide after a few steps, which is enough to have a posterior."""
    pyro.clear_param_store()
    make, shape = NETS[net]
    body = bayesianize(make())
    x = torch.randn(64, *shape)
    model = Regressor(body, NUM_DATA) if net in ("uci", "mlp") else Classifier(body, NUM_DATA)
    y = torch.randn(64) if net in ("uci", "mlp") else torch.randint(CLASSES, (64,))
    posterior = GUIDES[guide](model)
    if isinstance(posterior, pyrocurv.guides.StructuredGuide):
        ngvi = NGVI(model, posterior, temperature=0.1)
        for _ in range(3):
            ngvi.step(x, y)
    else:
        posterior(x, y)
    return model, posterior


def seconds(function: Callable[[Tensor], Any], x: Tensor, calls: int) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    for _ in range(calls):
        function(x)
    return (time.process_time() - start) / calls


def row(net: str, batch: int, model: Any, guide: Any, sites: Sequence[str], rounds: int) -> str:
    x = torch.randn(batch, *NETS[net][1])
    options: dict[str, Any] = {
        "guide": guide, "num_samples": SAMPLES, "return_sites": tuple(sites)
    }
    theirs, ours = pyro.infer.Predictive(model, **options), Predictive(model, **options)
    first = seconds(theirs, x, 1) / seconds(ours, x, 1)
    times = [(seconds(theirs, x, CALLS), seconds(ours, x, CALLS)) for _ in range(rounds)]
    ratios = [a / b for a, b in times]
    pyro_ms, ours_ms = (1e3 * median(column) for column in zip(*times, strict=True))
    target = f">= {max(1.0, TARGETS.get((net, batch), 1.0)):.1f}"
    spread = f"{min(ratios):.1f}-{max(ratios):.1f}"
    return (
        f"{net:<8}{batch:>6}{pyro_ms:>10.1f}{ours_ms:>10.1f}{median(ratios):>8.1f}{spread:>14}"
        f"{first:>8.1f}  {target}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--nets", nargs="+", choices=NETS, default=list(NETS))
    add("--batches", nargs="+", type=int, default=[1, 32, 256])
    add("--guide", choices=GUIDES, default="kfac")
    add("--rounds", type=int, default=5)
    add("--returned", action="store_true", help='return_sites=("_RETURN",)')
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds: from 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    keep_memory()
    torch.manual_seed(0)
    print(f"{SAMPLES} samples, {args.guide}, {args.rounds} rounds, one thread; ms of CPU")
    print(
        f"{'net':<8}{'batch':>6}{'Pyro':>10}{'pyrocurv':>10}{'ratio':>8}{'range':>14}{'first':>8}"
        "  target"
    )
    for net in args.nets:
        model, guide = trained(net, args.guide)
        for batch in args.batches:
            sites = ("_RETURN",) if args.returned else ()
            print(row(net, batch, model, guide, sites, args.rounds), flush=True)


if __name__ == "__main__":
    main()
