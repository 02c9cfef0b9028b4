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
# # Your first Bayesian network in ten minutes
#
# You have trained classifiers with PyTorch, and you know the flaw: a network answers every
# question in the same firm voice, also those that its training data say nothing about. Here you
# turn an ordinary network into one that can say "I do not know", and see what that takes. You
# need neither Pyro nor Bayesian statistics; every term is explained where it first appears.
#
# The data are two interleaved half circles in the plane, so that everything can be drawn.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyrocurv
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI, Predictive, fit
from pyrocurv.metrics import uncertainty

SHORT = "PYROCURV_SHORT" in os.environ  # a few steps only, to check that everything runs
EPOCHS, SEEDS, SIDE = (2, 2, 10) if SHORT else (300, 5, 80)
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})


def half_circles(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points [count, 2] and classes [count]; the noise makes the classes overlap."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.pi * torch.rand(count, generator=generator)
    y = torch.arange(count) % 2
    side = 1 - 2 * y  # +1 or -1
    x = torch.stack([angle.cos() + 0.5 * y, side * (angle.sin() - 0.25)], -1)
    return x + 0.25 * torch.randn(count, 2, generator=generator), y


def draw_points(ax: plt.Axes, x: Tensor, y: Tensor) -> None:
    for label, color in ((0, "tab:blue"), (1, "tab:red")):
        ax.scatter(*x[y == label].T, s=14, color=color, edgecolor="white", linewidth=0.5,
                   label=f"class {label}")


x, y = half_circles(100, seed=0)
x_test, y_test = half_circles(2000, seed=1000)
figure, ax = plt.subplots(figsize=(5, 3.4))
draw_points(ax, x, y)
ax.set(xlabel="first input", ylabel="second input", title="100 training points")
ax.legend()
plt.show()

# %% [markdown]
# ## An ordinary network
#
# Two hidden layers of 20 units, Adam, cross entropy: nothing new.


# %%
def make_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 2)
    )


def train_ordinary(x: Tensor, y: Tensor, seed: int, epochs: int = EPOCHS) -> nn.Module:
    torch.manual_seed(seed)
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for _ in range(epochs):
        for inputs, classes in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(inputs), classes).backward()
            optimizer.step()
            schedule.step()
    return net


ordinary = train_ordinary(x, y, seed=0)

# %% [markdown]
# ## The Bayesian network
#
# An ordinary network has one value for each weight. A Bayesian network has a probability
# distribution over all of them. Four terms are enough to follow the code:
#
# - The **prior** says which weights are plausible before any data: here independent normals of
#   mean 0, with a variance of 1 / (number of inputs + 1), about the size of PyTorch's own
#   initial weights.
# - The **likelihood** says how probable the classes are, given weights and inputs: the softmax
#   of the logits. Its negative logarithm is the cross entropy.
# - The **posterior** is what prior and data together say about the weights. It cannot be
#   computed exactly for a network.
# - The **guide** (Pyro's word) is the family of distributions in which we look for an
#   approximation. `KFACGuide` is a Gaussian with a Kronecker-factored precision (inverse
#   covariance) for each layer, so that the weights of a layer may vary together.
#
# `bayesianize` gives the weights their prior, `Classifier` adds the likelihood. `num_data` is
# the number of training examples, not the size of a batch: it decides how much the data weigh
# against the prior.


# %%
def train_bayesian(x: Tensor, y: Tensor, seed: int):
    torch.manual_seed(seed)
    net = pyrocurv.nn.bayesianize(make_net())
    model = pyrocurv.nn.Classifier(net, num_data=len(x))
    ngvi = NGVI(model, KFACGuide(model))
    loader = DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True)
    history = fit(ngvi, loader, EPOCHS, progress=False)
    return ngvi, history


ngvi, history = train_bayesian(x, y, seed=0)
print(ngvi.guide.summary())

# %% [markdown]
# `NGVI` is natural-gradient variational inference: at each step it draws one set of weights
# from the guide, takes the gradient of the cross entropy there, and every 20 steps it estimates
# the **curvature** of the loss. The curvature is what makes the guide's width: a direction in
# which the loss rises steeply is a direction in which the data know the weights well, so the
# Gaussian is narrow there; along a flat direction it stays as wide as the prior.
#
# The loss is the sum of two terms: the cross entropy at sampled weights ("nll", negative log
# likelihood), and T times the divergence of the guide from the prior ("kl"). The temperature T
# is chosen by the library: at T = 1 the sum is the textbook objective, a lower T trusts the
# data more. `fit` is a convenience; a loop of your own around `ngvi.step(inputs, classes)` is
# as good.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
epochs = [epoch.epoch for epoch in history]
left.plot(epochs, [epoch.nll for epoch in history], label="negative log likelihood")
left.plot(epochs, [epoch.temperature * epoch.kl for epoch in history], label="T · divergence")
left.plot(epochs, [epoch.loss for epoch in history], color="black", label="loss: their sum")
left.set(xlabel="epoch", ylabel="nats per training point", title="Training")
left.set_ylim(bottom=0)
left.legend()
pyrocurv.plots.weight_noise(ngvi.guide, right)
right.set(title="Width of the posterior, layer by layer", xlim=(0.01, 1.0))
right.xaxis.set_minor_formatter("")
plt.show()

# %% [markdown]
# On the right, a blue bar shows the standard deviations of a layer's weights under the
# posterior, the orange diamond how large the weights are. Where bar and diamond are at the same
# place, many different values of a weight explain the data equally well.
#
# ## Predictions are averages
#
# To predict, draw weights from the posterior, run the network with each of them, and average
# the probabilities. `Predictive` does the first two. `"_RETURN"` is Pyro's name for what the
# model returns, here the logits.


# %%
def predict_bayesian(ngvi: NGVI, points: Tensor, num_samples: int = 64) -> Tensor:
    """Logits [samples, points, classes]."""
    model, guide = ngvi.model, ngvi.guide
    predict = Predictive(model, guide=guide, num_samples=num_samples, return_sites=["_RETURN"])
    return predict(points)["_RETURN"]


first, second = np.linspace(-4, 4.5, SIDE), np.linspace(-3.5, 3.5, SIDE)
grid = torch.cartesian_prod(torch.tensor(first), torch.tensor(second)).float()
with torch.no_grad():
    ordinary_probs = ordinary(grid).softmax(-1)[:, 1]
logits = predict_bayesian(ngvi, grid)
bayesian_probs = logits.softmax(-1).mean(0)[:, 1]

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
for ax, title, probs in zip(
    axes, ("Ordinary network", "Bayesian network"), (ordinary_probs, bayesian_probs), strict=True
):
    image = ax.pcolormesh(first, second, probs.reshape(SIDE, SIDE).T.numpy(), cmap="RdBu_r", vmin=0,
                          vmax=1, rasterized=True)
    draw_points(ax, x, y)
    ax.set(xlabel="first input", title=title)
axes[0].set_ylabel("second input")
figure.colorbar(image, ax=axes, label="probability of class 1")
plt.show()

# %% [markdown]
# White is "fifty-fifty". The ordinary network is nearly sure everywhere, also in the corners,
# where it has never seen a point. The Bayesian network is sure where there are data, and the
# white band widens with the distance from them. Here are the reasons: ten networks drawn from
# the same posterior agree between the training points and part ways outside.

# %%
figure, ax = plt.subplots(figsize=(6, 4))
for sample in logits[:10].softmax(-1)[..., 1]:
    ax.contour(first, second, sample.reshape(SIDE, SIDE).T.numpy(), levels=[0.5], colors="0.4",
               linewidths=0.8)
draw_points(ax, x, y)
ax.set(xlabel="first input", ylabel="second input",
       title="Where ten networks of the posterior change their mind")
ax.legend()
plt.show()

# %% [markdown]
# ## Two kinds of "I do not know"
#
# A prediction can be uncertain because the classes overlap there: more training data would not
# help. That part is called **aleatoric**: the mean entropy of the single networks. Or it can be
# uncertain because the networks disagree, as outside the data: more data would settle it. That
# part is **epistemic**. `pyrocurv.metrics.uncertainty` separates them; their sum is the entropy
# of the averaged prediction, at most ln 2 = 0.69 nats for two classes.

# %%
parts = uncertainty(logits=logits)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
for ax, title, part in zip(
    axes, ("Aleatoric: the classes overlap", "Epistemic: the networks disagree"),
    (parts.aleatoric, parts.epistemic), strict=True,
):
    image = ax.pcolormesh(first, second, part.reshape(SIDE, SIDE).T.numpy(), cmap="viridis", vmin=0)
    figure.colorbar(image, ax=ax, label="nats")
    ax.scatter(*x.T, s=4, color="white")
    ax.set(xlabel="first input", title=title)
axes[0].set_ylabel("second input")
plt.show()

# %% [markdown]
# ## Does it hold, or is it one lucky picture?
#
# Five repetitions, each with its own 100 training points and first weights, scored on the same
# 2,000 test points. **NLL** is the mean negative log probability of the true class, which
# punishes confident errors. **ECE** is the expected calibration error: how far confidence and
# accuracy are apart. **Far entropy** is the mean predictive entropy on a circle of radius 4,
# far from all data.


# %%
def scores(probs: Tensor, far: Tensor) -> list[float]:
    confidence, predicted = probs.max(-1)
    right = (predicted == y_test).float()
    bins = (confidence * 15).ceil().long()
    ece = sum(
        (bins == k).float().mean() * (confidence[bins == k].mean() - right[bins == k].mean()).abs()
        for k in bins.unique()
    )
    nll = F.nll_loss(probs.clamp(min=1e-12).log(), y_test)
    return [100 * right.mean().item(), nll.item(), 100 * float(ece),
            torch.special.entr(far).sum(-1).mean().item()]


angle = torch.linspace(0, 2 * torch.pi, 100)
circle = 4 * torch.stack([angle.cos(), angle.sin()], -1)
found: dict[str, list[list[float]]] = {}
for seed in range(SEEDS):
    data = half_circles(100, seed)
    for name, epochs in (("ordinary", EPOCHS), ("ordinary, a third of the epochs", EPOCHS // 3)):
        net = train_ordinary(*data, seed, epochs)
        with torch.no_grad():
            probs = [net(points).softmax(-1) for points in (x_test, circle)]
        found.setdefault(name, []).append(scores(*probs))
    trained, _ = train_bayesian(*data, seed)
    probs = [predict_bayesian(trained, points).softmax(-1).mean(0) for points in (x_test, circle)]
    found.setdefault("Bayesian", []).append(scores(*probs))
columns = ["accuracy %", "NLL (nats)", "ECE %", "far entropy (nats)"]
print(f"{'':<32}" + "".join(f"{name:>19}" for name in columns))
for name, rows in found.items():
    values = torch.tensor(rows)
    cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(values.mean(0), values.std(0), strict=True)]
    print(f"{name:<32}" + "".join(f"{cell:>19}" for cell in cells))

# %% [markdown]
# What the Bayesian network gains is far from the data: an entropy of 0.17 nats against 0.04,
# more than four times as much doubt where there is nothing to know. At the test points, which are
# like the training points, it is level: NLL (0.352 against 0.354) and calibration are those of the
# ordinary network that was trained for as long, and the accuracy is one to two points lower: with
# 100 points the prior still has a say, and the border between the classes comes out smoother than
# it could be. An ordinary network that is stopped after a third of the epochs has the best NLL of
# the three (0.32); only, one has to know when to stop, and far away it has less doubt.
#
# A step costs more, too: sampling and curvature make it several times as slow as Adam's in a
# network as small as this, about 1.4 times in a convolutional one.
#
# ## Where to read on
#
# - [Quick start](https://pyrocurv.github.io/pyrocurv/latest/quickstart/): the same in a few
#   blocks, with saving and loading.
# - [Which guide, curvature, temperature,
#   update?](https://pyrocurv.github.io/pyrocurv/latest/choosing/): what was measured.
# - [Temperature](https://pyrocurv.github.io/pyrocurv/latest/temperature/): what T does, and how
#   held-out data choose it.
# - The next tutorial, [Curvature you can
#   see](https://pyrocurv.github.io/pyrocurv/latest/tutorials/02_curvature/), looks at what
#   makes the width of the posterior.
