# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A second-order optimizer in your own loop
#
# Curvature is not only for posteriors. `SecondOrderOptimizer`, a plain `torch.optim.Optimizer`,
# estimates it layer by layer with Kronecker factors (K-FAC) and uses it for its steps. The
# question of this notebook is whether that pays, against four optimizers that people use: SGD
# with momentum, Adam, **Muon** (orthogonalized momentum, `torch.optim.Muon`) and **SOAP** (Adam
# in the eigenbasis of Shampoo's factors, from the package `pytorch-optimizer`).
#
# A comparison of optimizers is easy to get wrong. Here each gets the same first weights, the
# same batches, the same number of steps and the same number of learning rates to choose from,
# on data that are not those of the result; and results are over several seeds, in steps *and*
# in seconds.

# %%
import importlib.util
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pyrocurv.curvature import Curvature
from pyrocurv.optim import SecondOrderOptimizer

SHORT = "PYROCURV_SHORT" in os.environ  # a few steps only, to check that everything runs
STEPS, SEEDS, BATCH = (2, 2, 64) if SHORT else (200, 3, 128)
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})

# %% [markdown]
# ## Two problems
#
# scikit-learn's digits, 1,797 images of 8 x 8 pixels, which come with the package: 1,000 for
# training, 300 to choose learning rates, the other 497 for the result.
#
# - A **classifier**, 64-64-64-10: easy; any optimizer solves it.
# - An **autoencoder**, 64-48-24-6-24-48-64: every image has to pass through six numbers. Deep
#   and narrow networks are badly conditioned: some directions of the loss are far steeper than
#   others. It is the problem on which K-FAC was first shown to be fast.


# %%
class Problem(NamedTuple):
    """A network, its loss, and the likelihood that the loss belongs to."""

    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]  # of a network on images and classes
    likelihood: str
    unit: str


def layers(*sizes: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        parts += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*parts[:-1])


PROBLEMS = {
    "classifier": Problem(
        lambda: layers(64, 64, 64, 10), lambda net, x, y: F.cross_entropy(net(x), y),
        "categorical", "cross entropy (nats)",
    ),
    "autoencoder": Problem(
        lambda: layers(64, 48, 24, 6, 24, 48, 64), lambda net, x, y: F.mse_loss(net(x), x) / 2,
        "normal", "squared error / 2, per pixel",
    ),
}
digits = load_digits()
order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
images = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
images = (images - images[:1000].mean()) / images[:1000].std()
classes = torch.tensor(digits.target)[order]
train_x, held_x, test_x = images.split([1000, 300, 497])
train_y, held_y, test_y = classes.split([1000, 300, 497])

# %% [markdown]
# ## The loop
#
# It is the loop you know; only the line that makes the optimizer differs.
# `SecondOrderOptimizer` takes the network instead of its parameters, since it has to see each
# layer's inputs and the gradients in its outputs. Every 20 steps, `step()` runs the network
# once more on 32 examples to estimate the curvature; `likelihood=` says what the loss is the
# negative logarithm of, "categorical" for cross entropy, "normal" for squared error by 2.
#
# Two of its steps take part. "second order" is the default: Muon in coordinates in which the
# inputs of each layer are whitened. It would also let the weights decay, as AdamW does; here
# that is switched off, as in Muon and SOAP. "natural gradient" (`update="natural"`) is the
# classical step of K-FAC, the gradient divided by the curvature, in a trust region.
#
# Muon is for matrices only, so that biases get Adam, as its authors recommend.


# %%
class Muon:
    """Muon for matrices and Adam for everything else, as one optimizer."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        matrices = [p for p in net.parameters() if p.ndim == 2]
        others = [p for p in net.parameters() if p.ndim != 2]
        muon = torch.optim.Muon(matrices, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.parts = [muon, torch.optim.Adam(others, lr)]
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()


class Method(NamedTuple):
    """How to make an optimizer, and the learning rates to choose from."""

    make: Callable[[nn.Module, float, str], Any]
    rates: tuple[float, ...]


METHODS = {
    "SGD": Method(lambda net, lr, _: torch.optim.SGD(net.parameters(), lr, momentum=0.9),
                  (0.1, 0.3, 1.0, 3.0)),
    "Adam": Method(lambda net, lr, _: torch.optim.Adam(net.parameters(), lr),
                   (0.001, 0.003, 0.01, 0.03)),
    "natural gradient": Method(
        lambda net, lr, likelihood: SecondOrderOptimizer(
            net, lr, likelihood=likelihood, update="natural"),
        (0.1, 0.3, 1.0, 3.0),
    ),
    "second order": Method(
        lambda net, lr, likelihood: SecondOrderOptimizer(
            net, lr, likelihood=likelihood, decoupled_weight_decay=0.0),
        (0.01, 0.03, 0.1, 0.3),
    ),
}
if hasattr(torch.optim, "Muon"):  # torch has it from 2.9 on
    METHODS["Muon"] = Method(lambda net, lr, _: Muon(net, lr), (0.003, 0.01, 0.03, 0.1))
if importlib.util.find_spec("pytorch_optimizer"):
    from pytorch_optimizer import SOAP

    METHODS["SOAP"] = Method(
        lambda net, lr, _: SOAP(net.parameters(), lr, weight_decay=0.0),
        (0.003, 0.01, 0.03, 0.1)
    )
COLORS = {"SGD": "0.5", "Adam": "tab:blue", "natural gradient": "tab:red",
          "second order": "tab:orange", "Muon": "tab:green", "SOAP": "tab:purple"}


class Run(NamedTuple):
    """Of one training: the loss of each batch, seconds after each step, and held-out losses."""

    losses: list[float]
    seconds: list[float]
    held: float
    test: float
    net: nn.Module


def train(problem: Problem, method: Method, lr: float, seed: int) -> Run:
    torch.manual_seed(seed)
    net = problem.make()
    optimizer = method.make(net, lr, problem.likelihood)
    shuffle = torch.Generator().manual_seed(seed)  # the same batches for all
    epochs = BATCH * STEPS // 1000 + 1
    rows = torch.cat([torch.randperm(1000, generator=shuffle) for _ in range(epochs)])
    losses, seconds, passed = [], [], 0.0
    for step in range(STEPS):
        for group in optimizer.param_groups:  # a cosine to 0
            group["lr"] = lr * (1 + math.cos(math.pi * step / STEPS)) / 2
        batch = rows[step * BATCH : (step + 1) * BATCH]
        x, y = train_x[batch], train_y[batch]
        start = time.process_time()
        optimizer.zero_grad()
        loss = problem.loss(net, x, y)
        loss.backward()
        optimizer.step()
        passed += time.process_time() - start
        losses.append(loss.item())
        seconds.append(passed)
    with torch.no_grad():
        held, test = (problem.loss(net, x, y).item()
                      for x, y in ((held_x, held_y), (test_x, test_y)))
    return Run(losses, seconds, held, test, net)


# %% [markdown]
# ## Learning rates first
#
# Each method is trained with four learning rates, a factor of about three apart, and gets the
# one that is best on the held-out images. A best value at the edge of the four would mean that
# the range was badly chosen: look at the picture before believing the rest.

# %%
torch.manual_seed(0)
chosen: dict[tuple[str, str], float] = {}
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
for ax, (title, problem) in zip(axes, PROBLEMS.items(), strict=True):
    for name, method in METHODS.items():
        rates = method.rates[:1] if SHORT else method.rates
        held = [train(problem, method, lr, seed=100).held for lr in rates]
        chosen[title, name] = rates[held.index(min(held))]
        ax.plot(rates, held, "o-", color=COLORS[name], label=name)
    ax.set(xscale="log", yscale="log", xlabel="learning rate", title=title,
           ylabel=f"held-out {problem.unit}")
figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right")
plt.show()
for (title, name), lr in chosen.items():
    print(f"{title:<12} {name:<19} learning rate {lr}")

# %% [markdown]
# Two of the twelve are at the edge: on the autoencoder SGD and the natural gradient might gain
# from still larger learning rates. The section after the next has the reason for the latter.
#
# ## The comparison
#
# Several seeds with the chosen learning rates. The lines are means of the training loss,
# smoothed over 10 steps, the bands one standard deviation over seeds. Seconds are CPU seconds
# of one thread in the steps alone.

# %%
runs = {
    (title, name): [train(problem, method, chosen[title, name], seed) for seed in range(SEEDS)]
    for title, problem in PROBLEMS.items() for name, method in METHODS.items()
}


def smooth(values: list[float], width: int = 10) -> Tensor:
    """The mean of the last `width` values."""
    totals = F.pad(torch.tensor(values, dtype=torch.float64).cumsum(0), (1, 0))
    last = torch.arange(1, len(values) + 1)
    first = (last - width).clamp(min=0)
    return (totals[last] - totals[first]) / (last - first)


figure, axes = plt.subplots(2, 2, figsize=(10, 6.6), sharey="row")
for row, (title, problem) in zip(axes, PROBLEMS.items(), strict=True):
    for name in METHODS:
        curves = torch.stack([smooth(run.losses) for run in runs[title, name]])
        mean, std = curves.mean(0), curves.std(0)
        seconds = torch.tensor([run.seconds for run in runs[title, name]]).mean(0)
        for ax, horizontal in zip(row, (torch.arange(1, STEPS + 1), seconds), strict=True):
            ax.plot(horizontal, mean, color=COLORS[name], label=name)
            ax.fill_between(horizontal, mean - std, mean + std, color=COLORS[name], alpha=0.15)
    row[0].set(ylabel=f"training {problem.unit}", yscale="log", xlabel="steps", title=title)
    row[1].set(xlabel="CPU seconds", title=title)
axes[0, 0].legend(fontsize="small")
plt.show()
for title, problem in PROBLEMS.items():
    print(f"{title}, test {problem.unit}")
    for name in METHODS:
        test = torch.tensor([run.test for run in runs[title, name]])
        milliseconds = [1000 * run.seconds[-1] / STEPS for run in runs[title, name]]
        line = f"  {name:<19} {test.mean():.4f} ± {test.std():.4f}   "
        if title == "classifier":
            with torch.no_grad():
                right = [100 * (run.net(test_x).argmax(-1) == test_y).double().mean()
                         for run in runs[title, name]]
            right = torch.stack(right)
            line += f"accuracy {right.mean():.1f} ± {right.std():.1f} %   "
        print(line + f"{sum(milliseconds) / SEEDS:.1f} ms a step")

# %% [markdown]
# On the classifier all have an accuracy of 97 to 98 %, and SOAP the best cross entropy (0.071).
# What differs most is the training loss, a hundred times lower by the default step than by any
# other, which gains nothing on the test images (0.089), and the seconds: SGD and Adam are four
# to five times as fast. **For such a problem there is no reason to use curvature.**
#
# On the autoencoder it pays to look at matrices. The natural gradient beats Adam and SGD (0.088
# against 0.112 and 0.098), but **not** Muon and SOAP (0.072 and 0.079). The default step is the
# best of the six (0.065) after the same number of steps; but a step takes 3.2 ms, somewhat more
# than Muon's 2.8, and 3.6 times as long as Adam's. If seconds are what counts, look at the right
# of the picture: SGD is ahead for the first tenth of a second, until 0.2 seconds SOAP and the
# default step are level, and only then does the default step win. In larger networks the forward
# and backward passes dominate, and a step of it costs 1.3 to 1.5 of Adam's.
#
# ## One setting that matters to the natural gradient
#
# Until the curvature has been estimated often enough, the optimizer adds an isotropic one, 0.1
# by default, which fades over some hundred steps. That is a good size for cross entropy; for a
# squared error per pixel, whose curvature is much smaller, it makes the first natural gradients
# too short. (The default step has a fixed length and does not use it.) The held-out loss of the
# autoencoder after the same number of steps, for several values of `initial`:

# %%
RATES = (0.3,) if SHORT else (0.03, 0.1, 0.3, 1.0)
figure, ax = plt.subplots(figsize=(6, 3.4))
for initial in (0.01,) if SHORT else (0.1, 0.03, 0.01, 0.003):
    method = Method(
        lambda net, lr, likelihood, initial=initial: SecondOrderOptimizer(
            net, lr, likelihood=likelihood, update="natural",
            curvature=Curvature("fisher", initial=initial)), RATES,
    )
    held = [train(PROBLEMS["autoencoder"], method, lr, seed=100).held for lr in RATES]
    ax.plot(RATES, held, "o-", label=f"initial={initial}")
    print(f"initial={initial:<6} best held-out {min(held):.4f} at learning rate "
          f"{RATES[held.index(min(held))]}")
ax.set(xscale="log", yscale="log", xlabel="learning rate",
       ylabel=f"held-out {PROBLEMS['autoencoder'].unit}")
ax.legend(fontsize="small")
plt.show()

# %% [markdown]
# At the learning rate 1, a tenth of the default takes the held-out loss from 0.111 to 0.090. The
# price is at 0.003: with too little of it the first steps, from few examples, are too bold for
# the larger learning rates.
#
# ## What the autoencoders have learned
#
# Numbers in a loss are abstract. The same eight test images, passed through the six numbers of
# each autoencoder (first seed):

# %%
figure, axes = plt.subplots(1 + len(METHODS), 8, figsize=(7, 0.9 * (1 + len(METHODS))))
with torch.no_grad():
    pictures = {"test image": test_x[:8]}
    pictures |= {name: runs["autoencoder", name][0].net(test_x[:8]) for name in METHODS}
for row, (name, values) in zip(axes, pictures.items(), strict=True):
    for ax, image in zip(row, values, strict=True):
        ax.imshow(image.reshape(8, 8).numpy(), cmap="gray_r", vmin=-1, vmax=2)
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, rotation=0, ha="right", va="center")
plt.show()

# %% [markdown]
# ## Where to read on
#
# - [Without Pyro](https://pyrocurv.github.io/pyrocurv/latest/optimizers/): losses, schedulers,
#   mixed precision and what else may be in the loop.
# - [The step of the mean](https://pyrocurv.github.io/pyrocurv/latest/mean-step/): the choices
#   of `update=`.
# - [Benchmarks](https://pyrocurv.github.io/pyrocurv/latest/benchmarks/#optimizers):
#   Fashion-MNIST and a transformer.
# - The next tutorial, [active
#   learning](https://pyrocurv.github.io/pyrocurv/latest/tutorials/06_active_learning/).
