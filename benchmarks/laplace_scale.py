"""Laplace approximations of many outputs and of many weights: time and peak memory of each part.

    python benchmarks/laplace_scale.py            # under ten minutes on one core
    python benchmarks/laplace_scale.py classes    # one of the cases below
    python benchmarks/laplace_scale.py --smoke    # less of everything, to check the set-up

Cases, each in a process of its own, on random data:

    classes     1,000 classes, K-FAC over the last layer (512 inputs): 10,000 inputs predicted
    last_conv   images of 64 x 64 x 3 logits, K-FAC over the last convolution: 64 predicted
    all_convs   the same over all three convolutions
    head        a dense matrix over the last layer of ResNet-18, 10 classes
    peer        the same by laplace-torch, if it is installed
    resnet      K-FAC over all layers of ResNet-18

Prints wall and CPU seconds, and the peak memory of the process so far.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocurv.guides import FullGuide, KFACGuide
from pyrocurv.infer import Laplace
from pyrocurv.nn import Classifier, bayesianize

Smoke = bool


def measure(label: str, run: Callable[[], Any]) -> Any:
    """Run, and print the time and the peak memory so far."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if is_mac() else 2**20)
    print(f"{label:<44}{wall:>9.1f} s{cpu:>9.1f} CPU s{peak:>8.2f} GiB", flush=True)
    return result


def is_mac() -> bool:
    """Whether the peak memory is in bytes."""
    return sys.platform == "darwin"


def classes(smoke: Smoke) -> None:
    outputs, count = (50, 200) if smoke else (1000, 10_000)
    net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, outputs))
    x, y = torch.randn(2000, 64), torch.randint(outputs, (2000,))
    model = Classifier(bayesianize(net), num_data=len(y))
    laplace = Laplace(model, KFACGuide(model, structure={"net.0": "frozen"}), "empirical")
    measure(f"{outputs} classes, last layer: fit", lambda: laplace.fit([(x, y)]))
    parts = torch.randn(count, 64).split(1000)
    measure(f"predict {count:,}", lambda: torch.cat([laplace.predict(p).probs for p in parts]))


class Segmenter(PyroModule):
    """Images of logits from three convolutions."""

    def __init__(self, num_data: int) -> None:
        super().__init__()
        self.num_data = num_data
        self.net = bayesianize(nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 3, 3, padding=1),
        ))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        logits: Tensor = self.net(x).movedim(1, -1)
        with pyro.plate("data", self.num_data, subsample=x[:, 0, 0, 0]):
            pyro.sample("obs", dist.Categorical(logits=logits).to_event(2), obs=y)
        return logits


def segment(smoke: Smoke, structure: dict[str, str] | None) -> None:
    count, side = (4, 16) if smoke else (64, 64)
    x, y = torch.randn(count, 3, side, side), torch.randint(3, (count, side, side))
    model = Segmenter(count)
    laplace = Laplace(model, KFACGuide(model, structure=structure), "empirical")
    name = "last convolution" if structure else "all convolutions"
    loader = [*zip(x.split(16), y.split(16), strict=True)]
    measure(f"logits of {side} x {side} x 3, {name}: fit", lambda: laplace.fit(loader))
    measure(f"predict {count}", lambda: [laplace.predict(part) for part in x.split(8)])


def last_conv(smoke: Smoke) -> None:
    segment(smoke, {"net.0": "frozen", "net.2": "frozen"})


def all_convs(smoke: Smoke) -> None:
    segment(smoke, None)


def resnet18(smoke: Smoke) -> tuple[nn.Module, Tensor, Tensor]:
    from torchvision.models import resnet18 as make  # an import of seconds

    count = 2 if smoke else 64
    net = make(num_classes=10).eval()
    return net, torch.randn(count, 3, 32, 32), torch.randint(10, (count,))


def head(smoke: Smoke) -> None:
    net, x, y = resnet18(smoke)
    model = Classifier(bayesianize(net), num_data=len(y))
    guide = FullGuide(model, structure={"net.fc": "full", "*": "frozen"})
    laplace = Laplace(model, guide)
    loader = [*zip(x.split(32), y.split(32), strict=True)]
    measure("ResNet-18, last layer dense: fit", lambda: laplace.fit(loader))
    measure(f"predict {len(x)}", lambda: laplace.predict(x))


def peer(smoke: Smoke) -> None:
    try:
        from laplace import Laplace as Peer
    except ImportError:
        print("laplace-torch is not installed: without it")
        return
    net, x, y = resnet18(smoke)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 32)
    laplace = Peer(net, "classification", subset_of_weights="last_layer",
                   hessian_structure="full")
    measure("laplace-torch, the same: fit", lambda: laplace.fit(loader))
    measure(f"predict {len(x)}", lambda: laplace(x, link_approx="mc", n_samples=256))


def resnet(smoke: Smoke) -> None:
    net, x, y = resnet18(smoke)
    model = Classifier(bayesianize(net), num_data=len(y))
    laplace = Laplace(model, KFACGuide(model))
    loader = [*zip(x.split(16), y.split(16), strict=True)]
    measure("ResNet-18, all layers K-FAC: fit", lambda: laplace.fit(loader))
    measure(f"predict {len(x[:16])}", lambda: laplace.predict(x[:16]))


CASES: dict[str, Callable[[Smoke], None]] = {
    case.__name__: case for case in (classes, last_conv, all_convs, head, peer, resnet)
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", nargs="?", choices=CASES, help="one case, in this process")
    parser.add_argument("--smoke", action="store_true", help="less, to check the set-up")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.case:
        CASES[args.case](args.smoke)
        return
    options = ["--smoke"] if args.smoke else []
    for case in CASES:
        subprocess.run([sys.executable, __file__, case, *options], check=True)


if __name__ == "__main__":
    main()
