"""Today's optimizers against those of this library, on equal steps and equal grids.

    python benchmarks/optimizers.py --out results.jsonl             # the grids, on validation data
    python benchmarks/optimizers.py --out results.jsonl --test      # then the best rates, on test
    python benchmarks/optimizers.py --out results.jsonl --cost      # CPU time of a step
    python benchmarks/optimizers.py --out results.jsonl --report    # Markdown tables of the file
    python benchmarks/optimizers.py --tasks resnet --methods muon ngvi --out results.jsonl

Tasks: the character GPT of `transformer.py`, 500 or 1,000 steps, or 800 on a tenth of the text
("gpt-800-of-150k", 11 epochs, where each method is scored at the best of sixteen times by its
validation NLL); and a ResNet with batch norm, LeNet-5 and an MLP on the first 12,000 images of
Fashion-MNIST, 10 epochs of batches of 128, LeNet-5 also on 55,000, 5 epochs ("lenet-55k"). All
methods have the same first weights, batches, cosine schedule (the GPT after a warm-up of 50 steps),
number of learning rates in the first grid, and one thread. Schedule-free AdamW has no schedule, and
a warm-up of its own.

A learning rate is chosen by the NLL on validation data at the end, with seed 0 (GPT: 16 files;
images: the training images 12,000-15,999). While the best is at an end of the grid, up to two more
are tried beyond it, for every method. `--test` trains with seeds 1 and 2 at these rates and
scores the test data, once. Scores are accuracy and expected calibration error (15 bins) in %, and
NLL in nats (GPT: per character), after a quarter, half and all of the steps. On the ResNet NGVI has
T = 0.03 and priors of half the usual width, chosen on the validation data too, in nine runs; Muon
has a decoupled weight decay of 0.1, SGD one of 5e-4. NGVI and IVON predict
with their mean weights ("mean") and with an average over samples of the posterior. "ngvi-decay", if
named, has a decoupled weight decay of 0.3 and T = 0.003; "second-order-natural" natural gradients.

Every run is a line of JSON in the file `--out`, and a run that is there is not repeated. `--cost`
times the steps of all methods in turns, as `step_cost.py` does. `--ensembles` adds the averages of
five AdamW and of five Muon runs on the ResNet. `--smoke` runs everything on a little made-up data.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.functional.classification import multiclass_calibration_error
from tqdm import tqdm

import fashion_mnist
import transformer
from pyrocurv.curvature import KFAC, Curvature
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI, Predictive
from pyrocurv.nn import Classifier, bayesianize, rescale_prior
from pyrocurv.nn.networks import GPT, MLP, LeNet5, ResNet
from pyrocurv.optim import SecondOrderOptimizer
from step_cost import CYCLE, keep_memory, measure, table

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from language.posterior import WARM_UP, Tokens
from matrix_muon import MatrixMuon

try:
    from ivon import IVON
    from pytorch_optimizer import SOAP
    from schedulefree import AdamWScheduleFree
except ImportError:
    IVON = SOAP = AdamWScheduleFree = None

Batch = tuple[Tensor, Tensor]  # inputs [B, ...] and classes [B] or [B, T]
Predict = Callable[[Tensor], Tensor]  # inputs -> log probabilities [B, classes] or [B, T, classes]
Record = dict[str, Any]

# ---- settings -----------------------------------------------------------------------------------

# what NGVI and SecondOrderOptimizer are given besides the learning rate
OURS: dict[str, dict[str, dict[str, Any]]] = {
    "ngvi": {
        "resnet": {"temperature": 0.03},
        "gpt": {
            "curvature": Curvature("fisher", batch=8),
            "optim": lambda parameters: torch.optim.AdamW(parameters, lr=4e-3),
        },
    },
    "second-order": {
        "gpt": {"structure": KFAC(rank=64), "curvature": Curvature("fisher", batch=8)},
    },
}
RATES: dict[str, dict[str, tuple[float, ...]]] = {  # the grids
    "adamw": {
        "gpt": (3e-3, 5e-3, 8e-3), "resnet": (1e-3, 3e-3, 8e-3), "lenet": (3e-3, 5e-3, 8e-3),
        "mlp": (3e-4, 1e-3, 3e-3),
    },
    "schedule-free": {
        "gpt": (5e-3, 0.01, 0.02), "resnet": (3e-3, 0.01, 0.02), "lenet": (3e-3, 0.01, 0.02),
        "mlp": (1e-3, 3e-3, 0.01),
    },
    "sgd": {
        "gpt": (0.1, 0.3, 1.0), "resnet": (0.05, 0.1, 0.2), "lenet": (0.05, 0.1, 0.2),
        "mlp": (0.05, 0.1, 0.2),
    },
    "muon": {
        "gpt": (0.02, 0.04, 0.08), "resnet": (5e-3, 0.01, 0.02), "lenet": (5e-3, 0.02, 0.04),
        "mlp": (5e-3, 0.01, 0.02),
    },
    "soap": {
        "gpt": (3e-3, 0.01, 0.02), "resnet": (1e-3, 3e-3, 8e-3), "lenet": (1e-3, 3e-3, 8e-3),
        "mlp": (3e-4, 1e-3, 3e-3),
    },
    "ivon": {
        "gpt": (0.5, 1.0, 2.0), "resnet": (0.5, 1.0, 2.0), "lenet": (0.5, 1.0, 2.0),
        "mlp": (0.5, 1.0, 2.0),
    },
    "second-order": {
        "gpt": (0.03, 0.04, 0.06), "resnet": (0.02, 0.03, 0.04), "lenet": (0.02, 0.03, 0.04),
        "mlp": (0.02, 0.03, 0.04),
    },
    "ngvi": {
        "gpt": (0.03, 0.04, 0.06), "resnet": (0.03, 0.06, 0.08), "lenet": (0.01, 0.02, 0.04),
        "mlp": (0.01, 0.02, 0.04),
    },
}
PRIOR_SCALE = {"resnet": 0.5}  # of weights, relative to "fan_in"; a prior is a weight decay
BETA2 = {"images": 0.999, "gpt": 0.99}  # of AdamW
REST_LR = 3e-3  # of Muon's AdamW
PARTS = {"1/4": 4, "1/2": 2, "end": 1}
EXTRA_RATES = 2
TEST_SEEDS, MEMBERS, ENSEMBLES = (1, 2), 5, ("adamw", "muon")


# ---- tasks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A network, its data, and the number of steps."""

    name: str
    network: Callable[[], nn.Module]
    bayesian: Callable[[nn.Module], nn.Module]  # the Pyro model of a network
    num_data: int  # images or tokens
    steps: int
    batches: Callable[[int], Iterator[Batch]]  # by seed; longer than a run for `--cost`
    splits: dict[str, Batch]  # "val" and "test"
    samples: int  # of a posterior, for a prediction
    warm_up: int = 0
    stops_early: bool = False  # the test data are scored where the validation NLL was lowest

    @property
    def net(self) -> str:
        return self.name.split("-")[0]

    @property
    def kind(self) -> str:
        return "gpt" if self.net == "gpt" else "images"

    def factor(self, step: int) -> float:
        """Of the learning rate: a linear warm-up times a cosine."""
        fall = (1 + math.cos(math.pi * step / self.steps)) / 2
        return min(1, (step + 1) / max(1, self.warm_up)) * fall


def image_task(name: str, sets: dict[str, Batch], epochs: int) -> Task:
    train = sets["train"]
    num_data = len(train[1])
    return Task(
        name, {"resnet": ResNet, "lenet": LeNet5, "mlp": MLP}[name.split("-")[0]],
        lambda net: Classifier(with_prior(net, PRIOR_SCALE.get(name, 1.0)), num_data=num_data),
        num_data,
        epochs * math.ceil(num_data / fashion_mnist.BATCH),
        lambda seed: fashion_mnist.batches(train, 10**6, seed), sets, samples=16,
    )


def with_prior(net: nn.Module, scale: float) -> nn.Module:
    """The network with priors of `scale` times the usual width for the weights of its layers."""
    net = bayesianize(net)
    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and scale != 1:
            rescale_prior(net, f"{name}.weight", torch.tensor(scale))
    return net


def gpt_task(name: str, texts: dict[str, Tensor], steps: int, network: Any = GPT) -> Task:
    train = texts["train"]
    return Task(
        name, network,
        lambda net: Tokens(
            bayesianize(net, layers=[nn.Linear]), len(train) // transformer.CONTEXT
        ),
        len(train), steps, lambda seed: transformer.batches(
            train, 10**6, seed, transformer.BATCH, transformer.CONTEXT
        ),
        {
            split: transformer.windows(texts[split], transformer.CONTEXT)
            for split in ("val", "test")
        },
        samples=8, warm_up=min(WARM_UP, steps),
    )


OVERFITTED = "gpt-800-of-150k"  # 11 epochs
TASKS = ("gpt-500", "gpt-1000", OVERFITTED, "resnet", "lenet", "lenet-55k", "mlp")


def load_tasks(names: Sequence[str], root: str) -> Iterator[Task]:
    texts = transformer.corpus() if any("gpt" in name for name in names) else {}
    sets = {}
    if any("gpt" not in name for name in names):
        x, y = fashion_mnist.images(root, train=True)
        sets["test"] = fashion_mnist.images(root, train=False)
    for name in names:
        if name == OVERFITTED:
            few = {**texts, "train": texts["train"][:150_000]}
            yield replace(gpt_task(name, few, 800), stops_early=True)
        elif name.startswith("gpt"):
            yield gpt_task(name, texts, int(name[4:]))
        else:
            is_large = name.endswith("55k")
            val = slice(55_000, 60_000) if is_large else fashion_mnist.VALIDATION
            own = {**sets, "train": (x[: val.start], y[: val.start]), "val": (x[val], y[val])}
            yield image_task(name, own, 5 if is_large else 10)


def made_up_tasks(names: Sequence[str]) -> Iterator[Task]:
    """Four steps on random data, and a smaller GPT."""
    images = {
        split: (torch.randn(16, 1, 28, 28), torch.randint(10, (16,)))
        for split in ("train", "val", "test")
    }
    lengths = {"train": transformer.BATCH, "val": 2, "test": 2}
    texts = {
        split: torch.randint(96, (length * transformer.CONTEXT + 1,))
        for split, length in lengths.items()
    }
    for name in names:
        task = (
            gpt_task(name, texts, 4, partial(GPT, width=16, layers=1))
            if name.startswith("gpt") else image_task(name, images, 4)
        )
        yield replace(task, samples=2)


# ---- methods ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A step, and the predictives by name, inside of `evaluating()`."""

    step: Callable[[Tensor, Tensor], Any]
    predict: dict[str, Predict]
    evaluating: Callable[[], AbstractContextManager[None]]


@contextmanager
def evaluation(net: nn.Module) -> Iterator[None]:
    net.eval()
    yield
    net.train()


def loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def averaged(logits: Tensor) -> Tensor:
    """Log probabilities of the average over the samples [S, ...]."""
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def plain(
    make: Callable[[nn.Module, float, Task], Sequence[torch.optim.Optimizer]]
) -> Callable[[Task, float], Run]:
    """The training loop of an optimizer, or of several that share the weights of a network."""

    def run(task: Task, lr: float) -> Run:
        net = task.network()
        optimizers = make(net, lr, task)
        schedules = [LambdaLR(optimizer, task.factor) for optimizer in optimizers]

        def step(x: Tensor, y: Tensor) -> None:
            net.zero_grad(set_to_none=True)
            loss(net(x), y).backward()
            for part in (*optimizers, *schedules):
                part.step()

        return Run(step, {"mean": lambda x: net(x).log_softmax(-1)}, partial(evaluation, net))

    return run


def adamw(net: nn.Module, lr: float, task: Task) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, BETA2[task.kind]))]


def sgd(net: nn.Module, lr: float, task: Task) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)]


def muon(net: nn.Module, lr: float, task: Task) -> list[torch.optim.Optimizer]:
    """Muon for the weights of linear and convolutional layers, AdamW for the rest."""
    layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    weights = [layer.weight for layer in layers]
    rest = [p for p in net.parameters() if all(p is not weight for weight in weights)]
    adam = torch.optim.AdamW(rest, lr=REST_LR, betas=(0.9, BETA2[task.kind]))
    return [MatrixMuon(weights, lr=lr, weight_decay=0.1), adam]


def soap(net: nn.Module, lr: float, task: Task) -> list[torch.optim.Optimizer]:
    return [SOAP(net.parameters(), lr=lr, precondition_frequency=10)]


def second_order(
    net: nn.Module, lr: float, task: Task, **options: Any
) -> list[torch.optim.Optimizer]:
    return [SecondOrderOptimizer(net, lr, **OURS["second-order"].get(task.net, {}), **options)]


def schedule_free(task: Task, lr: float) -> Run:
    """With statistics of batch norm from 50 batches at the averaged weights, as its authors do."""
    net = task.network()
    optimizer = AdamWScheduleFree(net.parameters(), lr=lr, warmup_steps=task.steps // 20)
    optimizer.train()
    has_statistics = any(isinstance(m, nn.BatchNorm2d) for m in net.modules())

    def step(x: Tensor, y: Tensor) -> None:
        net.zero_grad(set_to_none=True)
        loss(net(x), y).backward()
        optimizer.step()

    @contextmanager
    def evaluating() -> Iterator[None]:
        optimizer.eval()
        with torch.no_grad():
            for x, _ in islice(task.batches(0), 50 if has_statistics else 0):
                net(x)
        with evaluation(net):
            yield
        optimizer.train()

    return Run(step, {"mean": lambda x: net(x).log_softmax(-1)}, evaluating)


def ivon(task: Task, lr: float) -> Run:
    net = task.network()
    optimizer = IVON(net.parameters(), lr=lr, ess=task.num_data, hess_init=0.1, beta2=0.9995)
    schedule = LambdaLR(optimizer, task.factor)

    def step(x: Tensor, y: Tensor) -> None:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad(set_to_none=True)
            loss(net(x), y).backward()
        optimizer.step()
        schedule.step()

    def samples(x: Tensor) -> Tensor:
        logits = []
        for _ in range(task.samples):
            with optimizer.sampled_params():
                logits.append(net(x))
        return averaged(torch.stack(logits))

    predict = {"mean": lambda x: net(x).log_softmax(-1), "samples": samples}
    return Run(step, predict, partial(evaluation, net))


def ngvi(task: Task, lr: float, **options: Any) -> Run:
    model = task.bayesian(task.network())
    guide = KFACGuide(model, structure={"*": KFAC(rank=64)} if task.kind == "gpt" else None)
    engine = NGVI(model, guide, lr=lr, **{**OURS["ngvi"].get(task.net, {}), **options})
    schedule = LambdaLR(engine.optimizer, task.factor)
    predictive = Predictive(
        model, guide=guide, num_samples=task.samples, return_sites=("_RETURN",)
    )

    def step(x: Tensor, y: Tensor) -> None:
        engine.step(x, y)
        schedule.step()

    def mean_weights(x: Tensor) -> Tensor:
        return pyro.condition(model, data=guide.median())(x).log_softmax(-1)

    predict = {"mean": mean_weights, "samples": lambda x: averaged(predictive(x)["_RETURN"])}
    return Run(step, predict, partial(evaluation, model))


METHODS: dict[str, Callable[[Task, float], Run]] = {
    "adamw": plain(adamw), "schedule-free": schedule_free, "sgd": plain(sgd), "muon": plain(muon),
    "soap": plain(soap), "ivon": ivon, "second-order": plain(second_order), "ngvi": ngvi,
}
VARIANTS = {  # if named in --methods, with the rates of another method
    "second-order-natural": "second-order", "ngvi-decay": "ngvi",
}
METHODS["second-order-natural"] = plain(partial(second_order, update="natural"))
METHODS["ngvi-decay"] = partial(
    ngvi, decoupled_weight_decay=0.3, temperature=3e-3, nesterov=True
)
RATES |= {variant: RATES[method] for variant, method in VARIANTS.items()}
PEERS = {"schedule-free": AdamWScheduleFree, "soap": SOAP, "ivon": IVON}


# ---- training and scores ------------------------------------------------------------------------


@torch.no_grad()
def log_probabilities(predict: Predict, x: Tensor) -> Tensor:
    """[N, classes] of all images or tokens."""
    return torch.cat([predict(part).flatten(0, -2) for part in x.split(250)])


def scores(log_probs: Tensor, y: Tensor) -> dict[str, float]:
    y = y.flatten()
    ece = multiclass_calibration_error(log_probs.exp(), y, log_probs.shape[-1], n_bins=15)
    accuracy = (log_probs.argmax(-1) == y).float().mean()
    found = {"accuracy": 100 * accuracy, "NLL": F.nll_loss(log_probs, y), "ECE": 100 * ece}
    return {name: round(value.item(), 5) for name, value in found.items()}


def evaluate(run: Run, data: Batch) -> dict[str, dict[str, float]]:
    """The scores of each predictive; training goes on as if it had not been called."""
    x, y = data
    with run.evaluating(), torch.random.fork_rng(devices=[]):
        return {
            name: scores(log_probabilities(predict, x), y) for name, predict in run.predict.items()
        }


def train(task: Task, method: str, lr: float, seed: int) -> tuple[Run, Record]:
    """A trained run, and its scores on the validation data on the way.

    Of a task that stops early also those on the test data, at the best of sixteen times.
    """
    torch.manual_seed(seed)
    run = METHODS[method](task, lr)
    due = {task.steps // part: name for name, part in PARTS.items()}
    if task.stops_early:
        due = {task.steps * n // 16: f"{n}/16" for n in range(1, 17)} | due
    found, tested, seconds, start = {}, {}, 0.0, time.process_time()
    batches = islice(task.batches(seed), task.steps)
    label = f"{task.name} {method} {lr:g} {seed}"
    for number, (x, y) in enumerate(tqdm(batches, label, task.steps, disable=None), 1):
        run.step(x, y)
        if number in due:
            seconds += time.process_time() - start
            found[due[number]] = evaluate(run, task.splits["val"])
            if task.stops_early and seed:
                tested[due[number]] = evaluate(run, task.splits["test"])
            start = time.process_time()
    record = {"val": found, "seconds": round(seconds, 2)}
    if task.stops_early:
        best = min(found, key=lambda part: nll(found[part]))
        record |= {"best": best, **({"test": tested[best]} if tested else {})}
    return run, record


def ensemble(task: Task, method: str, lr: float) -> Record:
    """The average of networks from several seeds, on the test data."""
    x, y = task.splits["test"]
    logits, seconds = [], 0.0
    for seed in range(1, 1 + MEMBERS):
        run, found = train(task, method, lr, seed)
        seconds += found["seconds"]
        with run.evaluating():
            logits.append(log_probabilities(run.predict["mean"], x))
    return {"test": {"mean": scores(averaged(torch.stack(logits)), y)}, "seconds": seconds}


# ---- the file of results ------------------------------------------------------------------------

KEY = ("task", "method", "lr", "seed", "steps", "kind")


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(path: Path, key: Record, make: Callable[[], Record]) -> None:
    """Run and append it, unless it is there."""
    if any(all(record[name] == key[name] for name in KEY) for record in read(path)):
        return
    record = {**key, **make()}
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    shown = record.get("test") or record.get("val", {}).get("end", {})
    print(*(key[name] for name in KEY), shown, record.get("seconds", ""), flush=True)


def nll(found: dict[str, dict[str, float]]) -> float:
    """Of the samples, if a method has them."""
    value = found.get("samples", found["mean"])["NLL"]
    return value if math.isfinite(value) else math.inf


def final_nll(record: Record) -> float:
    """By which learning rates are chosen: at the end, or where it was lowest."""
    return nll(record["val"][record.get("best", "end")])


def grid(records: Sequence[Record], task: str, method: str) -> list[Record]:
    mine = [r for r in records if (r["task"], r["method"], r["kind"]) == (task, method, "grid")]
    return sorted(mine, key=lambda record: record["lr"])


def best_rate(records: Sequence[Record], task: str, method: str) -> float:
    found = grid(records, task, method)
    if not found:
        sys.exit(f"{task}, {method}: there is no run on the validation data yet, leave out --test")
    return min(found, key=final_nll)["lr"]


def run_grid(path: Path, task: Task, method: str, rates: Sequence[float]) -> None:
    for lr in rates:
        key = {"task": task.name, "method": method, "lr": lr, "seed": 0, "steps": task.steps}
        add(path, {**key, "kind": "grid"}, lambda lr=lr: train(task, method, lr, 0)[1])


def extend_grid(path: Path, task: Task, method: str) -> None:
    """Up to two rates beyond those of the grid, twice or half the last, while it is the best."""
    while True:
        rates = [record["lr"] for record in grid(read(path), task.name, method)]
        best = best_rate(read(path), task.name, method)
        beyond = {rates[0]: best / 2, rates[-1]: 2 * best}
        if best not in beyond or len({*rates} - {*RATES[method][task.net]}) >= EXTRA_RATES:
            return
        run_grid(path, task, method, [float(f"{beyond[best]:g}")])


def run_test(path: Path, task: Task, method: str) -> None:
    lr = best_rate(read(path), task.name, method)
    for seed in TEST_SEEDS:
        def tested(seed: int = seed) -> Record:
            run, found = train(task, method, lr, seed)
            return {"test": evaluate(run, task.splits["test"]), **found}

        key = {"task": task.name, "method": method, "lr": lr, "seed": seed, "steps": task.steps}
        add(path, {**key, "kind": "test"}, tested)


def run_ensemble(path: Path, task: Task, method: str) -> None:
    lr = best_rate(read(path), task.name, method)
    key = {"task": task.name, "method": f"{MEMBERS} x {method}", "lr": lr, "seed": 1}
    key |= {"steps": task.steps, "kind": "test"}
    add(path, key, lambda: ensemble(task, method, lr))


def run_cost(path: Path, task: Task, methods: Sequence[str], rounds: int, size: int) -> None:
    """Seconds of a step in each round, of blocks that take turns, at a rate of the grid."""
    task = replace(task, steps=(rounds + 1) * size)

    def timed() -> Record:
        torch.manual_seed(0)
        steps = {  # `table` has "adam" as its reference
            "adam" if method == "adamw" else method:
            METHODS[method](task, sorted(RATES[method][task.net])[1]).step
            for method in ("adamw", *(method for method in methods if method != "adamw"))
        }
        times = measure(steps, task.batches(0), rounds, size)
        print(f"{task.net}: adam is AdamW here", table(times, {}), sep="\n", flush=True)
        return {"times": {"adamw": times.pop("adam"), **times}}

    key = {"task": task.net, "method": " ".join(methods), "lr": None, "seed": 0}
    add(path, {**key, "steps": task.steps, "kind": "cost"}, timed)


# ---- tables -------------------------------------------------------------------------------------


def costs(records: Sequence[Record], net: str) -> dict[str, str]:
    """Of each method the median over the rounds of its step as a multiple of AdamW's."""
    found = {}
    for record in records:
        if (record["task"], record["kind"]) == (net, "cost"):
            for method, times in record["times"].items():
                ratios = [a / b for a, b in zip(times, record["times"]["adamw"], strict=True)]
                low, high = torch.tensor(ratios).quantile(torch.tensor([0.25, 0.75])).tolist()
                found[method] = f"{median(ratios):.2f} ({low:.2f}-{high:.2f})"
    return {**found, **({"adamw": "1"} if found else {})}


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def three(found: dict[str, float]) -> str:
    return f"{found['accuracy']:.2f} / {found['NLL']:.4f} / {found['ECE']:.2f}"


def result_rows(records: Sequence[Record], task: str, method: str, cost: str) -> Iterator[str]:
    """A row for each predictive: validation at the best rate, the mean over the test seeds."""
    tested = [r for r in records if (r["task"], r["method"], r["kind"]) == (task, method, "test")]
    chosen = min(grid(records, task, method), key=final_nll, default=None)
    source = chosen["val"]["end"] if chosen else tested[0]["test"]
    for number, predictive in enumerate(source):
        name = f"{method}, {predictive}" if len(source) > 1 else method
        lr = f"{(chosen or tested[0])['lr']:g}"
        val = [
            f"{chosen['val'][part][predictive]['NLL']:.4f}" if chosen else "" for part in PARTS
        ]
        ours = [record["test"][predictive] for record in tested]
        test = [f"{mean(one[key] for one in ours):.2f}" if ours else ""
                for key in ("accuracy", "ECE")]
        nlls = ", ".join(f"{one['NLL']:.4f}" for one in ours)
        yield row(name, lr, *val, test[0], nlls, test[1], "" if number else cost)


def report(records: Sequence[Record]) -> str:
    """Markdown tables of the tasks that have runs."""
    lines = []
    for task in TASKS:
        mine = [record for record in records if record["task"] == task]
        if not mine:
            continue
        known = {record["method"] for record in mine}
        methods = [m for m in (*METHODS, *(f"{MEMBERS} x {m}" for m in ENSEMBLES)) if m in known]
        cost = costs(records, task.split("-")[0])
        lines += [f"### {task}, {mine[0]['steps']} steps", "", row(
            "method", "learning rate", *(f"validation NLL, {part}" for part in PARTS),
            "test accuracy %", f"test NLL, seeds {' and '.join(map(str, TEST_SEEDS))}",
            "test ECE %", "step, x AdamW",
        ), "|" + 9 * "---|"]
        for method in methods:
            lines += result_rows(mine, task, method, cost.get(method, ""))
        lines += ["", "Validation accuracy / NLL / ECE at the end, by learning rate:", "",
                  row("method", "", "", ""), "|" + 4 * "---|"]
        for method in methods:
            runs = grid(mine, task, method)
            cells = [
                f"{run['lr']:g}: "
                f"{three(run['val']['end'].get('samples', run['val']['end']['mean']))}"
                for run in runs
            ]
            lines += [row(method, *cells)] if runs else []
        lines.append("")
    return "\n".join(lines)


# ---- command line -------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--out", type=Path, default=Path("optimizers.jsonl"), help="the file of results")
    option("--tasks", nargs="+", choices=TASKS, default=TASKS)
    option("--methods", nargs="+", choices=METHODS,
           default=[method for method in METHODS if method not in VARIANTS])
    option("--lrs", nargs="+", type=float, help="learning rates in place of the grid")
    option("--data-root", default="data", help="folder of FashionMNIST/raw")
    option("--test", action="store_true", help="train at the best rates, and score the test data")
    option("--cost", action="store_true", help="time the steps")
    option("--rounds", type=int, default=10, help="of the timing")
    option("--ensembles", action="store_true", help="of five networks, for --tasks resnet")
    option("--report", action="store_true", help="only print the tables of the file")
    option("--smoke", action="store_true", help="everything, on a little made-up data")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.report:
        print(report(read(args.out)))
        return
    torch.set_num_threads(1)
    keep_memory()
    methods = [m for m in args.methods if m not in PEERS or PEERS[m] is not None]
    if missing := [method for method in args.methods if method not in methods]:
        print(f"left out: {', '.join(missing)}; they need pyrocurv[peers]")
    torch.manual_seed(0)
    tasks = made_up_tasks(args.tasks) if args.smoke else load_tasks(args.tasks, args.data_root)
    is_grid = args.smoke or not (args.test or args.cost or args.ensembles)
    for task in tasks:
        for method in methods:
            if is_grid:
                rates = args.lrs or RATES[method][task.net][: 1 if args.smoke else None]
                run_grid(args.out, task, method, rates)
                if not (args.lrs or args.smoke):
                    extend_grid(args.out, task, method)
            if args.test or args.smoke:
                run_test(args.out, task, method)
            if method in ENSEMBLES and task.name == "resnet" and (args.ensembles or args.smoke):
                run_ensemble(args.out, task, method)
        if args.cost or args.smoke:
            rounds, size = (2, 1) if args.smoke else (args.rounds, CYCLE)
            run_cost(args.out, task, methods, rounds, size)


if __name__ == "__main__":
    main()
