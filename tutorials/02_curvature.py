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
# # Curvature you can see
#
# The gradient of a loss says which way is down. The curvature, the matrix of second
# derivatives, says how far it is safe to walk, and how precisely the data determine each
# weight. For a network of P weights it has P x P entries: too many to store for any network of
# interest, so every method in this library is a decision about which part of that matrix to
# keep.
#
# Here the network is so small that the whole matrix can be looked at. You will see four
# curvatures (Hessian, Gauss-Newton, Fisher, empirical Fisher) and six ways to store one (full,
# block, K-FAC in two forms, EK-FAC, diagonal), beside each other and with their errors in
# numbers. No Pyro is needed: `pyrocurv.curvature.estimate` takes a plain PyTorch network and a
# batch.

# %%
import os

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrocurv.curvature import Curvature, estimate
from pyrocurv.plots import heat_map, spectrum
from pyrocurv.structures import Structure

SHORT = "PYROCURV_SHORT" in os.environ  # a few steps only, to check that everything runs
STEPS, SEEDS = (10, 2) if SHORT else (600, 10)
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})
torch.set_default_dtype(torch.float64)  # so that errors are those of the structures alone

# %% [markdown]
# ## A network of 51 weights
#
# Four inputs, six tanh units, three classes: three clouds of points that overlap a little, with
# correlated inputs, as real ones are.

# %%
CLASSES = 3
torch.manual_seed(0)
centers = 1.5 * torch.randn(CLASSES, 4)
mixing = torch.eye(4) + 0.6 * torch.randn(4, 4)
y = torch.arange(300) % CLASSES
x = (centers[y] + torch.randn(300, 4)) @ mixing / 2


def make_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def train(net: nn.Module, steps: int) -> float:
    """Newton-like accuracy is not needed: Adam with a schedule, and a little weight decay."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        (loss + 0.5 * sum(p.square().sum() for p in net.parameters()) / len(x)).backward()
        optimizer.step()
        schedule.step()
    return loss.item()


net = make_net()
loss = train(net, STEPS)
right = (net(x).argmax(-1) == y).double().mean()
names = [f"{name} {list(p.shape)}" for name, p in net.named_parameters()]
sizes = [p.numel() for p in net.parameters()]
print(f"cross entropy {loss:.3f} nats, accuracy {right:.1%}, P = {sum(sizes)} weights")
print("rows of the matrix, in order:", ", ".join(names))

# %% [markdown]
# ## Four curvatures
#
# All are sums over the 300 data of P x P matrices, evaluated at the trained weights:
#
# - the **Hessian** is the second derivative of the cross entropy, exactly;
# - the **Gauss-Newton matrix** (GGN) drops the second derivatives of the network itself and
#   keeps those of the softmax: J' F J, with the Jacobian J of the logits. It has no negative
#   eigenvalue;
# - the **Fisher** matrix is the mean of g g' over gradients g at targets *sampled from the
#   network's own predictions*. Its expectation is the GGN; one sample for each datum makes it
#   noisy;
# - the **empirical Fisher** is the sum of g g' at the *observed* targets. It looks similar,
#   costs nothing extra, and estimates none of the others.
#
# Each picture shows a matrix with a row and a column for each weight; red entries are positive,
# blue ones negative, and all four share one scale. Lines separate the weights and biases of the
# two layers.

# %%
KINDS = {
    "hessian": "Hessian", "ggn": "Gauss-Newton", "fisher": "Fisher, sampled",
    "empirical": "empirical Fisher",
}


def draw(ax: plt.Axes, matrix: Structure | Tensor, title: str, limit: float) -> None:
    heat_map(matrix, ax, limit=limit)
    for edge in torch.tensor(sizes).cumsum(0)[:-1].tolist():
        ax.axhline(edge - 0.5, color="0.3", linewidth=0.5)
        ax.axvline(edge - 0.5, color="0.3", linewidth=0.5)
    ax.set_title(title, fontsize="medium")


def distance(a: Structure | Tensor, b: Structure | Tensor) -> float:
    """Relative to the size of b, in the Frobenius norm: root of the summed squares of entries."""
    a, b = (m.dense() if isinstance(m, Structure) else m for m in (a, b))
    return float((a - b).norm() / b.norm())


full = {kind: estimate(net, x, y, curvature=kind, structure="full") for kind in KINDS}
limit = float(full["ggn"].dense().abs().max())
figure, axes = plt.subplots(2, 2, figsize=(8.5, 7.2))
for ax, (kind, name) in zip(axes.flat, KINDS.items(), strict=True):
    draw(ax, full[kind], f"{name}: {distance(full[kind], full['ggn']):.0%} from GGN", limit)
plt.show()
for kind, name in KINDS.items():
    values = full[kind].eigenvalues().round(decimals=6) + 0.0
    print(f"{name:<18} distance to GGN {distance(full[kind], full['ggn']):6.1%}   trace "
          f"{values.sum():8.1f}   eigenvalues {values.min():8.3f} to {values.max():8.2f}")

# %% [markdown]
# At the trained weights Hessian and Gauss-Newton matrix nearly agree (6.5 % apart), but the
# Hessian has negative eigenvalues, down to -1.3: it is not the precision of any Gaussian,
# whereas the others are. The sampled Fisher matrix scatters around the Gauss-Newton matrix by
# 22 %, and the empirical one is 14 % away for another reason: not noise, but a different
# quantity.
#
# ## Before and after training
#
# How close Hessian and Gauss-Newton matrix are depends on the fit: the term that separates them
# is weighted by the residuals, predicted minus observed probabilities. The same comparison
# along training, for several first weights; the line is the mean, the band one standard
# deviation.

# %%
checkpoints = [0, 5, 20] if SHORT else [0, 10, 30, 60, 120, 250, 500]
gaps = torch.zeros(SEEDS, len(checkpoints), 2)
for seed in range(SEEDS):
    other = make_net(seed)
    done = 0
    for column, steps in enumerate(checkpoints):
        if steps > done:
            train(other, steps - done)
            done = steps
        ggn, hessian, empirical = (
            estimate(other, x, y, curvature=kind, structure="full")
            for kind in ("ggn", "hessian", "empirical")
        )
        gaps[seed, column] = torch.tensor([distance(hessian, ggn), distance(empirical, ggn)])
figure, ax = plt.subplots(figsize=(6, 3.4))
for column, name in enumerate(("Hessian", "empirical Fisher")):
    mean, std = gaps[..., column].mean(0), gaps[..., column].std(0)
    ax.plot(checkpoints, mean, "o-", label=name)
    ax.fill_between(checkpoints, mean - std, mean + std, alpha=0.2)
    print(f"{name:<17} distance to GGN at first {mean[0]:6.1%} ± {std[0]:.1%}, "
          f"in the end {mean[-1]:6.1%} ± {std[-1]:.1%}")
ax.set(xlabel="steps of training", ylabel="distance to GGN, relative", xscale="symlog",
       ylim=(0, None))
ax.set_xticks(checkpoints, [str(c) for c in checkpoints])
ax.legend()
plt.show()

# %% [markdown]
# At random weights the two are different matrices: residuals are large, and the Hessian is more
# than twice its own size away. The better the fit, the less it matters; the empirical Fisher
# stays at some 15 %. This is why methods that need a positive curvature early in training,
# natural gradients among them, use the Gauss-Newton or Fisher matrix.
#
# ## Six structures
#
# Now the Gauss-Newton matrix alone, and what different structures keep of it:
#
# - **block**: one dense matrix for each layer; what two layers have to do with each other is
#   dropped;
# - **K-FAC**: each layer's block is a Kronecker product G ⊗ A of the mean outer product of
#   gradients in the layer's outputs and that of its inputs. For a layer of O outputs and I
#   inputs that is O² + I² numbers in place of (O I)²;
# - **EK-FAC**: the eigenvectors of the Kronecker product, with eigenvalues estimated one by
#   one;
# - **K-FAC in blocks**: a Kronecker product whose factors are cut into blocks;
# - **diagonal**: every weight on its own.

# %%
STRUCTURES = {
    "full": "full", "block": "block", "ekfac": "EK-FAC", "kfac": "K-FAC",
    "kfac-block": "K-FAC in blocks", "diag": "diagonal",
}
exact = full["ggn"]
kept = {name: estimate(net, x, y, curvature="ggn", structure=name) for name in STRUCTURES}
figure, axes = plt.subplots(2, 3, figsize=(11.5, 6.6))
for ax, (structure, name) in zip(axes.flat, STRUCTURES.items(), strict=True):
    draw(ax, kept[structure], f"{name}: error {distance(kept[structure], exact):.0%}", limit)
plt.show()

# %% [markdown]
# ## Errors that matter
#
# A distance between matrices is easy to compute and hard to interpret. A posterior uses the
# *inverse* of curvature plus prior precision, so an error in a small eigenvalue may matter more
# than one in the largest entry. The last two columns are about the Gaussian N(0, (C + 1)⁻¹)
# that a structure leads to, with a prior of variance 1: its divergence from the one of the full
# matrix, in nats, and the mean ratio of the standard deviations of a weight. "Numbers" is what
# has to be stored.


# %%
def stored(structure: str) -> int:
    """Numbers that describe the matrix; symmetric ones are stored as squares."""
    layers = [(6, 5), (3, 7)]  # outputs, and inputs with the one of the bias
    blocks = {
        "full": sum(sizes) ** 2, "block": sum((o * i) ** 2 for o, i in layers),
        "ekfac": sum(o * o + i * i + o * i for o, i in layers),
        "kfac": sum(o * o + i * i for o, i in layers),
        "kfac-block": sum((o * o + i * i + 1) // 2 for o, i in layers), "diag": sum(sizes),
    }
    return blocks[structure]


def divergence(precision: Tensor, other: Tensor) -> Tensor:
    """KL(N(0, other⁻¹) ‖ N(0, precision⁻¹)) in nats."""
    ratio = torch.linalg.solve(other, precision)
    return 0.5 * (ratio.trace() - len(ratio) - torch.linalg.slogdet(ratio).logabsdet)


prior = torch.eye(sum(sizes))
reference = exact.dense() + prior
widths = reference.inverse().diag().sqrt()
print(f"{'':<17}{'numbers':>8}{'distance':>10}{'KL (nats)':>11}{'sd / exact sd':>15}")
for structure, name in STRUCTURES.items():
    precision = kept[structure].dense() + prior
    ratio = (precision.inverse().diag().sqrt() / widths).mean()
    nats = abs(divergence(precision, reference))
    print(f"{name:<17}{stored(structure):>8}{distance(kept[structure], exact):>10.1%}"
          f"{nats:>11.2f}{ratio:>15.2f}")

# %% [markdown]
# Two lessons. First, more than half of the Gauss-Newton matrix (58 % in this norm) is between
# the two layers, and every layer-wise method loses it. Second, the distance can mislead: the
# diagonal is slightly *closer* than K-FAC, 92 % against 96 %, with less than half of the
# numbers, and yet its Gaussian is twice as far away in nats and a third as wide as it should
# be, since it takes correlated weights for independent ones. K-FAC keeps the correlations
# within a layer and gets the widths right to about 12 %; its scale suffers here because a
# trained softmax has large gradients for few examples only, and the product of two means does
# not know which inputs these have. EK-FAC corrects the scale along each direction, for 51 more
# numbers.
#
# And the eigenvalues, the largest first. The sum of the eigenvalues (the trace) is the same for
# all that keep the diagonal; how it is spread over the directions is not.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
spectrum({name: kept[structure] for structure, name in STRUCTURES.items()}, left)
left.set(title="Structures of the Gauss-Newton matrix", ylim=(1e-4, None))
spectrum({name: full[kind] for kind, name in KINDS.items()}, right)
right.set(title="Full matrices of four curvatures", ylim=(1e-4, None))
plt.show()

# %% [markdown]
# ## Any curvature in any structure
#
# The two choices are independent. Each cell of the next picture is the distance of a structure
# to the *full matrix of the same curvature*.

# %%
errors = torch.tensor([
    [distance(estimate(net, x, y, curvature=kind, structure=structure), full[kind])
     if kind != "fisher" else float("nan") for structure in STRUCTURES] for kind in KINDS
])
errors[2] = torch.tensor([  # of the same sampled targets
    distance(estimate(net, x, targets, curvature="empirical", structure=structure), sampled)
    for targets in [torch.distributions.Categorical(logits=net(x)).sample()]
    for sampled in [estimate(net, x, targets, curvature="empirical", structure="full")]
    for structure in STRUCTURES
])
figure, ax = plt.subplots(figsize=(9, 3))
image = ax.imshow(errors.detach().numpy(), cmap="Reds", vmin=0, vmax=1)
for row, values in enumerate(errors.tolist()):
    for column, value in enumerate(values):
        ax.text(column, row, f"{value:.0%}", ha="center", va="center",
                color="white" if value > 0.6 else "black")
ax.set_xticks(range(len(STRUCTURES)), STRUCTURES.values(), fontsize="small")
ax.set_yticks(range(len(KINDS)), KINDS.values(), fontsize="small")
figure.colorbar(image, ax=ax, label="distance, relative")
plt.show()

# %% [markdown]
# ## What sampling costs
#
# "fisher" needs one backward pass where the Gauss-Newton matrix needs one for each class, which
# is why it is the default in training. Its noise falls with the number of sampled targets, and
# a running average over many batches averages it too.

# %%
draws = [1, 4] if SHORT else [1, 2, 4, 8, 16, 32, 64]
noise = torch.tensor([
    [distance(estimate(net, x, y, curvature=Curvature("fisher", num_samples=n), structure=kind),
              kept[kind]) for n in draws]
    for kind in ("full", "kfac", "diag") for _ in range(SEEDS)
]).reshape(3, SEEDS, len(draws))
figure, ax = plt.subplots(figsize=(6, 3.4))
for name, values in zip(("full", "K-FAC", "diagonal"), noise, strict=True):
    ax.errorbar(draws, values.mean(0), values.std(0), marker="o", capsize=3, label=name)
    print(f"{name:<9} one target {values[:, 0].mean():.1%} ± {values[:, 0].std():.1%}, "
          f"{draws[-1]} targets {values[:, -1].mean():.1%} ± {values[:, -1].std():.1%}")
ax.plot(draws, noise[0, :, 0].mean() / torch.tensor(draws).sqrt(), "--", color="0.5",
        label="1 / √targets")
ax.set(xlabel="sampled targets for each datum", ylabel="distance to the exact one", xscale="log",
       yscale="log")
ax.set_xticks(draws, [str(n) for n in draws])
ax.minorticks_off()
ax.legend()
plt.show()

# %% [markdown]
# With one target for each of 300 data the noise is 10 to 25 %, smaller than what the structure
# itself leaves out. So exact curvature in a coarse structure is seldom worth its price, which
# is one backward pass for each class.
#
# ## Where to read on
#
# - [Guides and structures](https://pyrocurv.github.io/pyrocurv/latest/guides/): each structure
#   as a posterior, and layers with different ones.
# - [Mathematics](https://pyrocurv.github.io/pyrocurv/latest/mathematics/): the equations of all
#   of the above.
# - [curvature.estimate](https://pyrocurv.github.io/pyrocurv/latest/reference/curvature/): its
#   arguments; products, solves, determinants and samples of a structure, without ever making it
#   dense.
# - The next tutorial, [From a trained network to a
#   posterior](https://pyrocurv.github.io/pyrocurv/latest/tutorials/03_laplace_to_vi/), uses
#   such a matrix.
