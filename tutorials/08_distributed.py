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
# # Going distributed
#
# One process is enough for everything so far. When it is not, the same program runs on several:
# every process has a copy of the network and of its posterior, reads its own share of each
# batch, and all take the same step. This notebook starts two processes on this machine, checks
# that they compute what one would have computed, counts every byte that they exchange, and then
# does the arithmetic for a thousand processes that nobody here has.

# %%
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import torch
from two_processes import UPDATES, train

SHORT = "PYROCURV_SHORT" in os.environ  # a few steps only, to check that everything runs
STEPS, PROCESSES = (2, 1) if SHORT else (150, 2)
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})
FOLDER = Path("two_processes.py").resolve().parent  # of this notebook

# %% [markdown]
# ## The program
#
# A process group is started by `torchrun`, which runs a program several times and tells each
# copy its number, the *rank*. So the program is a file beside this notebook,
# `two_processes.py`. Here is its middle; the only line for several processes is the one that
# takes every second row of a batch.

# %%
source = Path("two_processes.py").read_text()
print(source[source.index("def train") : source.index("@contextmanager")].rstrip())

# %% [markdown]
# `NGVI` finds the group that `torch.distributed.init_process_group` has made; there is no
# wrapper and no second API. `num_data` is that of all processes together. (In a loop of PyTorch
# alone, `SecondOrderOptimizer` and `VIOptimizer` do the same with `DistributedDataParallel`
# around the network.)
#
# First one process, this one; then two, by `torchrun`.

# %%
alone = {update: train(rank=0, size=1, steps=STEPS, update=update) for update in UPDATES}
with TemporaryDirectory() as folder:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
        str(PROCESSES), "two_processes.py", folder, str(STEPS),
    ]
    subprocess.run(command, check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(PROCESSES)]
for update in UPDATES:
    first, last, one = ranks[0][update], ranks[-1][update], alone[update]
    same = all(torch.equal(first[name], last[name]) for name in ("mean", "variance"))
    gaps = np.abs(np.array(first["losses"]) / np.array(one["losses"]) - 1)
    ends = [np.mean(run["losses"][-50:]) for run in (one, first)]
    print(f'update="{update}"')
    print(f"  all ranks have the same posterior, bit for bit: {same}")
    print(f"  losses of two processes and one differ by at most {gaps[:20].max():.0e}, relative, "
          "in the first 20 steps")
    print(f"  mean loss of the last 50 steps: one process {ends[0]:.0f} nats, two {ends[1]:.0f}")

# %% [markdown]
# All ranks have the same numbers, bit for bit, which is checked during training too. From those
# of one process they differ by rounding at first, as sums that are added up in another order
# do. Later the difference jumps. That is no fault: the curvature's eigenvectors are computed
# anew now and then, and where two eigenvalues are nearly equal, rounding decides how the two
# are rotated. The random numbers of a step belong to eigenvectors, so that from there on each
# run draws other samples of the same posterior; the losses go on together, as those of two
# seeds.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4))
step = np.arange(1, STEPS + 1)
for update, color in zip(UPDATES, ("tab:blue", "tab:orange"), strict=True):
    one, two = (np.array(run[update]["losses"]) for run in (alone, ranks[0]))
    left.plot(step, one, color=color, linewidth=4, alpha=0.35, label=f"one process, {update}")
    left.plot(step, two, color=color, linewidth=0.8, label=f"two processes, {update}")
    right.plot(step, np.maximum(np.abs(two / one - 1), 1e-9), ".", markersize=3, color=color,
               label=update)
left.set(xlabel="step", ylabel="loss (nats, all data)", yscale="log")
left.legend(fontsize="small")
right.set(xlabel="step", ylabel="difference of the losses, relative", yscale="log")
right.legend(fontsize="small")
plt.show()

# %% [markdown]
# ## What is communicated
#
# The program counts what is passed to three operations of `torch.distributed`:
#
# - **all_reduce** (everyone gets the sum): the gradients, at every step, and, at every 20th,
#   the statistics of the curvature, which for a layer of O outputs and I inputs are O² + I²
#   numbers;
# - **broadcast** (one sends, all others receive): the directions of the step, which are
#   expensive to compute and therefore shared out, each layer to one process; and eigenvectors,
#   now and then;
# - **all_gather** (everyone gets everyone's): checksums, so that a process that has gone astray
#   is noticed.
#
# The posterior itself is never sent: all compute it from the same numbers.

# %%
operations = ("all_reduce", "broadcast", "all_gather")
sent = {name: np.array([bytes_of.get(name, 0) for bytes_of in ranks[0]["auto"]["traffic"]]) / 1000
        for name in operations}
weights = len(alone["auto"]["mean"])
figure, ax = plt.subplots(figsize=(8, 3.4))
shown = min(STEPS, 105)
bottom = np.zeros(shown)
for name, color in zip(operations, ("tab:blue", "tab:orange", "tab:green"), strict=True):
    ax.bar(step[:shown], sent[name][:shown], 1.0, bottom, color=color, label=name)
    bottom += sent[name][:shown]
ax.axhline(4 * weights / 1000, color="black", linestyle="--", linewidth=1,
           label="the gradients alone")
ax.set(xlabel="step", ylabel="kB passed on by rank 0")
ax.legend(loc="upper right", fontsize="small")
plt.show()
print(f"{weights:,} weights, gradients of {4 * weights / 1000:.1f} kB; mean from step 2 on:")
for name in operations:
    print(f"  {name:<11}{sent[name][1:].mean():8.1f} kB")

# %% [markdown]
# The first step is larger: it broadcasts the weights of rank 0, so that all start from the
# same.
#
# ## A thousand processes
#
# The number of bytes does not have to be measured: it follows from the shapes of the layers.
# `benchmarks/scaling.py` has the formulas (a test compares them with such counts), so that they
# can be evaluated for networks and machines that are not at hand. W is the number of processes;
# bytes are those that a process sends in a ring, a mean over steps, for LeNet-5 and for a
# transformer of a billion weights.

# %%
sys.path.insert(0, str(FOLDER.parent / "benchmarks"))
import scaling  # noqa: E402

torch.manual_seed(0)
SHAPES = {
    "LeNet-5, 61,706 weights": scaling.shapes_of(*(make() for make in scaling.NETS["lenet"])),
    "transformer, 1.0 billion weights": scaling.transformer(),
}
PARTS = {
    "gradients": lambda shape, workers: scaling.Traffic(4 * shape.size),
    "directions": lambda shape, workers: scaling.direction_bytes(shape, "whitened-muon"),
    "statistics": lambda shape, workers: scaling.statistics_bytes(
        shape, -(-32 // workers), workers) * (1 / 20),
    "eigenvectors": lambda shape, workers: scaling.eigenbasis_bytes(shape) * (1 / 200),
}
WORKERS = [2, 8, 64, 1024]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
for ax, (title, shapes) in zip(axes, SHAPES.items(), strict=True):
    print(title)
    for number, (name, part) in enumerate(PARTS.items()):
        wire = [scaling.total(part(shape, workers) for shape in shapes).wire(workers) / 1e6
                for workers in WORKERS]
        place = np.arange(len(WORKERS)) + 0.2 * number - 0.3
        ax.bar(place, np.maximum(wire, 1e-9), 0.2, label=name)
        print(f"  {name:<13}" + "".join(f"{value:12,.3f}" for value in wire) + "  MB a step")
    ax.set_xticks(range(len(WORKERS)), [str(workers) for workers in WORKERS])
    ax.set(xlabel="processes", ylabel="MB that a process sends in a step", yscale="log")
    ax.set_title(title, fontsize="medium")
    ax.set_ylim(bottom=4e-9 * sum(shape.size for shape in shapes))  # a thousandth of the gradients
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
plt.show()

# %% [markdown]
# - **The gradients dominate**, as in any data-parallel training.
# - **The directions** of the default step, "whitened-muon", cost as many bytes on two processes
#   and half as many on a thousand. They save each process all but its share of the
#   orthogonalization. `update="natural"` sends none.
# - **The statistics** of the curvature, at every twentieth step, are a few percent of that on
#   up to 64 processes, and a quarter for LeNet-5 on 1,024: in wide layers rows are sent in
#   place of matrices, and each process sends at least those of one example. A longer interval,
#   `Curvature(every=...)`, helps then.
#
# And what it does not show: speed. Two processes of one thread each, on a machine of two idle
# cores, were measured at 1.1 to 1.6 times the throughput of one ([the
# table](https://pyrocurv.github.io/pyrocurv/latest/scaling/#two-processes-on-one-machine)),
# below what one hopes for, since a step has some milliseconds of Python that more processes do
# not share. Nothing here has been measured on a thousand processes.
#
# ## Where to read on
#
# - [Several processes](https://pyrocurv.github.io/pyrocurv/latest/processes/): what is shared
#   out, and by which functions.
# - [What several processes communicate](https://pyrocurv.github.io/pyrocurv/latest/scaling/):
#   the formulas, failures, several machines.
# - [Saving, loading, serving](https://pyrocurv.github.io/pyrocurv/latest/serving/): checkpoints
#   that continue on another number of processes.
