"""The training loop, the same for every method: bar, schedule, checkpoints, curves.

Each epoch starts from random numbers of its own, so that a run that goes on from a checkpoint is
the same, bit for bit, as one that was never interrupted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler
from tqdm import tqdm

from pyrocurv import checkpoint
from resuming import Refusal, load_run
from vision.config import Config
from vision.datasets import ImageData, Images
from vision.methods.trainer import Batch, Metrics, Trainer
from vision.processes import Process, average_statistics_, is_parallel
from vision.settings import Settings

POINTS = 100  # of the training curves
Row = dict[str, float]


@dataclass
class History:
    """The training curves, and the seconds of training."""

    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    epochs: int = 0


# ---- data ---------------------------------------------------------------------------------------


def num_steps(num_data: int, settings: Settings, size: int) -> int:
    """Steps of the run: a last batch that is not full is left out where there is a full one."""
    own, batch = ceil(num_data / size), max(1, settings.batch // size)
    return settings.epochs * max(1, own // batch)


def training_loader(
    data: ImageData, settings: Settings, config: Config, process: Process
) -> DataLoader[Any]:
    """Augmented images in a new order each epoch, each process with its share of a batch."""
    sampler: DistributedSampler[Any] = DistributedSampler(
        data.train, process.size, process.rank, seed=config.seed
    )
    batch = max(1, settings.batch // process.size)
    return DataLoader(
        data.train, batch, sampler=sampler, num_workers=config.workers,
        drop_last=len(sampler) >= batch, pin_memory=process.device.type == "cuda",
    )  # workers start anew in each epoch, from its random numbers


def plain_loader(images: Images, batch: int, config: Config, process: Process) -> DataLoader[Any]:
    """This process's part of the images, once, in order."""
    part = Subset(images, range(process.rank, len(images), process.size))
    return DataLoader(
        part, batch, num_workers=config.workers, pin_memory=process.device.type == "cuda"
    )


@dataclass(frozen=True)
class OnDevice:
    """A loader whose batches are on a device; it can be iterated again."""

    loader: Iterable[Batch]
    device: torch.device

    def __iter__(self) -> Any:
        for x, y in self.loader:
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# ---- the loop -----------------------------------------------------------------------------------


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 where the network runs, with `--amp`."""
    return torch.autocast(device.type, torch.bfloat16) if config.amp else nullcontext()


def reseed(config: Config, epoch: int, rank: int) -> None:
    """The random numbers of an epoch: of augmentation, dropout and samples."""
    torch.manual_seed((config.seed * 100_003 + epoch) * 1009 + rank)


def fit(
    trainer: Trainer, data: ImageData, settings: Settings, config: Config, process: Process
) -> History:
    """Train up to the last epoch, from the checkpoint if there is one and `--resume`."""
    loader = training_loader(data, settings, config, process)
    steps = settings.epochs * len(loader)
    factor = warmed_up(trainer.schedule, settings.warm_up, steps)
    schedules = [LambdaLR(optimizer, factor) for optimizer in trainer.optimizers]
    objects = {**trainer.objects, **{f"schedule {k}": s for k, s in enumerate(schedules)}}
    history = History()
    identity = signature(config, settings)
    if config.checkpoint is not None:
        history = _resumed(config, objects, identity)
    write = log_writer(config, process)
    with tqdm(
        desc=config.method, total=settings.epochs * len(data.train), unit=" images",
        initial=history.epochs * len(data.train), disable=None if process.rank == 0 else True,
    ) as bar:
        while history.epochs < settings.epochs:
            loader.sampler.set_epoch(history.epochs)
            reseed(config, history.epochs, process.rank)
            start = time.perf_counter()
            rows = run_epoch(
                trainer, OnDevice(loader, process.device), schedules, steps // POINTS or 1,
                autocast(config, process.device), lambda rows: show(bar, rows),
                lambda count: bar.update(count * process.size),
            )
            history.seconds += time.perf_counter() - start
            for row in rows:
                row["epoch"] = history.epochs + row["epoch"] / len(loader)
                write(row, len(history.rows) + 1)
                history.rows.append(row)
            history.epochs += 1
            if config.checkpoint is not None:
                plain = {"rows": history.rows, "seconds": history.seconds, "epochs": history.epochs}
                checkpoint.save(config.checkpoint, {**objects, **plain, "settings": identity})
    start = time.perf_counter()
    torch.manual_seed(config.seed)
    trainer.train(False)
    for module in trainer.modules:
        average_statistics_(module)
    plain_images = plain_loader(data.plain, settings.batch, config, process)
    trainer.finish(OnDevice(plain_images, process.device))
    history.seconds += time.perf_counter() - start
    return history


def run_epoch(
    trainer: Trainer, batches: Iterable[Batch], schedules: list[LambdaLR], interval: int,
    context: AbstractContextManager[Any], shown: Callable[[Row], None],
    counted: Callable[[int], None],
) -> list[Row]:
    """One pass; the means of the metrics over each `interval` of steps."""
    trainer.train()
    rows: list[Row] = []
    pending: list[Metrics] = []
    step = 0
    for step, (x, y) in enumerate(batches, start=1):
        with context:
            pending.append(trainer.train_step(x, y))
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        for schedule in schedules:
            schedule.step()
        if step % interval == 0:
            rows.append({"epoch": float(step), **means(pending), "lr": lr})
            pending = []
            shown(rows[-1])
        counted(len(y))
    if pending:
        rows.append({"epoch": float(step), **means(pending), "lr": lr})
        shown(rows[-1])
    return rows


def means(metrics: list[Metrics]) -> Row:
    """Of each metric over the steps and processes; the values stay on the device until here."""
    totals = [
        torch.stack([torch.as_tensor(m[name], dtype=torch.float32) for m in metrics]).mean()
        for name in metrics[0]
    ]
    values = torch.stack([total.detach() for total in totals])
    if is_parallel():
        dist.all_reduce(values.div_(dist.get_world_size()))
    return dict(zip(metrics[0], values.tolist(), strict=True))


def warmed_up(
    schedule: Callable[[float], float], warm_up: float, steps: int
) -> Callable[[int], float]:
    """The factor of the learning rate at a step."""
    first = int(warm_up * steps)

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / (first + 1))
        return rise * schedule(max(0, step - first) / max(1, steps - first))

    return factor


# ---- what is shown and kept ---------------------------------------------------------------------


def show(bar: tqdm[Any], row: Row) -> None:
    bar.set_postfix_str(
        f"loss {row['loss']:.3f}, accuracy {100 * row['accuracy']:.1f} %", refresh=False
    )


def log_writer(config: Config, process: Process) -> Callable[[Row, int], None]:
    """Write curves for TensorBoard, if they are wanted."""
    if config.tensorboard is None or process.rank > 0:
        return lambda row, number: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise Refusal("--tensorboard needs a package: pip install tensorboard") from None
    writer = SummaryWriter(str(config.tensorboard))

    def write(row: Row, number: int) -> None:
        for name, value in row.items():
            writer.add_scalar(f"train/{name}", value, number)
        writer.flush()

    return write


def signature(config: Config, settings: Settings) -> dict[str, str]:
    """What has to be the same for a run that goes on."""
    own = (
        "dataset", "model", "method", "seed", "guide", "curvature", "layers", "temperature",
        "update", "prior_scale", "members", "dropout", "evaluate_on", "train_size", "image_size",
        "amp",
    )
    names = ("epochs", "batch", "lr", "weight_decay")
    return {
        **{name: str(getattr(config, name)) for name in own},
        **{name: str(getattr(settings, name)) for name in names},
    }


def _resumed(config: Config, objects: dict[str, Any], identity: dict[str, str]) -> History:
    """What the checkpoint says, or an empty history where there is none."""
    path = config.checkpoint
    assert path is not None
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return History()
    saved = load_run(path, config.resume, objects)
    differing = [
        f"{name.replace('_', '-')} {value}, not {identity[name]}"
        for name, value in saved["settings"].items() if identity[name] != value
    ]
    if differing:
        raise Refusal(f"--resume: {path} is of a run with {'; '.join(differing)}")
    print(f"going on from {path}, after epoch {saved['epochs']}", file=sys.stderr)
    return History(saved["rows"], saved["seconds"], saved["epochs"])


def log_probabilities(
    trainer: Trainer, images: Images, settings: Settings, config: Config, process: Process,
    label: str,
) -> Iterable[tuple[Tensor, Tensor]]:
    """(log probabilities [S, B, classes], classes [B]) of this process's part of the images."""
    loader = plain_loader(images, settings.batch, config, process)
    trainer.train(False)
    bar = tqdm(
        OnDevice(loader, process.device), label, len(loader), leave=False,
        disable=None if process.rank == 0 else True,
    )
    for x, y in bar:
        with torch.no_grad(), autocast(config, process.device):
            yield trainer.predict(x), y
