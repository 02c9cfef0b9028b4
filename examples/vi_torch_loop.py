"""A posterior over a network's weights in a plain PyTorch loop, without Pyro.

    python examples/vi_torch_loop.py             # under a minute; draws vi_torch_loop.png
    python examples/vi_torch_loop.py --method ivon --lr 0.1

Trains on 400 digits, and ranks the test images by the entropy of their predictions: accuracy rises
as the least certain ones are set aside. Prints the table and draws those images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import trange

from digits import Labeled, load, make_net
from pyrocurv.optim import VIOptimizer, ivon, noisy_ekfac, noisy_kfac, vogn
from pyrocurv.plots import uncertain_images

METHODS = {"noisy-kfac": noisy_kfac, "noisy-ekfac": noisy_ekfac, "vogn": vogn, "ivon": ivon}
BATCH = 50


def train(data: Labeled, args: argparse.Namespace) -> VIOptimizer:
    """The usual loop, except for the context manager around the loss and its gradient."""
    torch.manual_seed(args.seed)
    x, y = data
    net = make_net()
    options = {} if args.lr is None else {"lr": args.lr}
    optimizer = METHODS[args.method](net, len(y), temperature=args.temperature, **options)
    schedule = CosineAnnealingLR(optimizer, T_max=args.epochs * len(y) // BATCH)
    for _ in trange(args.epochs, desc=args.method, disable=None):
        for rows in torch.randperm(len(y)).split(BATCH):
            optimizer.zero_grad()
            with optimizer.sampled_params():
                F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--method", choices=METHODS, default="noisy-kfac")
    add("--epochs", type=int, default=40)
    add("--lr", type=float, help="the default depends on the method")
    add("--temperature", type=float, default=0.01)
    add("--samples", type=int, default=32, help="posterior samples for each prediction")
    add("--seed", type=int, default=0)
    add("--plot", type=Path, default=Path("vi_torch_loop.png"))
    add("--smoke", action="store_true", help="a few seconds, to check the set-up")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.samples = 2, 4
    data = load()
    optimizer = train(data.train, args)
    x, y = data.test
    probs = optimizer.predict(x, num_samples=args.samples).softmax(-1).mean(0)
    is_right = probs.argmax(-1) == y
    by_entropy = torch.special.entr(probs).sum(-1).argsort()  # the most certain images first
    print(f"{'kept':>6}{'accuracy':>10}")
    for share in (1.0, 0.9, 0.75, 0.5):
        kept = by_entropy[: int(share * len(y))]
        print(f"{share:>6.0%}{is_right[kept].double().mean():>10.4f}")
    num_weights = sum(p.numel() for p in optimizer.net.parameters())
    print(f"KL to the prior: {optimizer.kl():,.0f} nats for {num_weights:,} weights")
    figure = Figure(figsize=(9, 3), layout="constrained")
    uncertain_images(x, probs, y, figure)
    figure.savefig(args.plot)


if __name__ == "__main__":
    main()
