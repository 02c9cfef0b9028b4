"""A posterior over a network's weights in a plain PyTorch loop: no Pyro model, no Pyro.

    python examples/vi_torch_loop.py           # digits, some seconds
    python examples/vi_torch_loop.py --method ivon --lr 0.1

Trains on 400 images and asks the posterior which of the test images it is least sure of: accuracy
rises as they are set aside. Prints the table and draws those images, `vi_torch_loop.png`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from data import load
from nets import make_net
from pyrocurv.optim import VIOptimizer, ivon, noisy_ekfac, noisy_kfac, vogn
from pyrocurv.plots import uncertain_images

METHODS = {"noisy-kfac": noisy_kfac, "noisy-ekfac": noisy_ekfac, "vogn": vogn, "ivon": ivon}
KEPT = (1.0, 0.9, 0.75, 0.5)


def train(args: argparse.Namespace, x: torch.Tensor, y: torch.Tensor) -> VIOptimizer:
    """Any loop: what is new is the `with`."""
    torch.manual_seed(args.seed)
    net = make_net("digits", small=False)
    numbers = {} if args.lr is None else {"lr": args.lr}
    optimizer = METHODS[args.method](net, len(y), temperature=args.temperature, **numbers)
    total = args.epochs * ceil(len(y) / args.batch_size)
    schedule = CosineAnnealingLR(optimizer, total)
    with tqdm(desc=args.method, total=total, disable=None) as bar:
        for _ in range(args.epochs):
            for rows in torch.randperm(len(y)).split(args.batch_size):
                optimizer.zero_grad()
                with optimizer.sampled_params():
                    loss = F.cross_entropy(net(x[rows]), y[rows])
                    loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return optimizer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--method", choices=METHODS, default="noisy-kfac")
    add("--epochs", type=int, default=40)
    add("--batch-size", type=int, default=50)
    add("--lr", type=float, help="the default depends on the method")
    add("--temperature", type=float, default=0.01)
    add("--samples", type=int, default=32, help="posterior samples to predict with")
    add("--seed", type=int, default=0)
    add("--plot", type=Path, default=Path("vi_torch_loop.png"))
    add("--smoke", action="store_true", help="a few seconds, to see that everything runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.epochs, args.samples = 2, 4
    data = load("digits", train_size=400)
    optimizer = train(args, *data.train)
    x, y = data.test
    probs = optimizer.predict(x, num_samples=args.samples).softmax(-1).mean(0)
    right = probs.argmax(-1) == y
    order = torch.special.entr(probs).sum(-1).argsort()  # the surest first
    print(f"{'kept':>6}{'accuracy':>10}")
    for share in KEPT:
        surest = order[: int(share * len(y))]
        print(f"{share:>6.0%}{right[surest].double().mean():>10.4f}")
    weights = sum(p.numel() for p in optimizer.net.parameters())
    print(f"KL to the prior: {optimizer.kl():,.0f} nats for {weights:,} weights")
    figure = Figure(figsize=(9, 3), layout="constrained")
    uncertain_images(x, probs, y, figure)
    figure.savefig(args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
