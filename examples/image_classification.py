"""Classify images with a network that knows what it does not know, by any of ten methods.

    python examples/image_classification.py                      # digits, in a minute
    python examples/image_classification.py --dataset fashion-mnist --download --report out.html
    python examples/image_classification.py --dataset cifar10 --model resnet20 --method ngvi
    torchrun --standalone --nproc_per_node 4 examples/image_classification.py \\
        --dataset imagenet --data-root /data/imagenet --model resnet50 --amp --workers 8

Trains a network by one method, scores it on the test images, on images of another kind and on
corrupted ones, prints a table, and writes an HTML page with pictures (--report). Settings that the
command line leaves open are in `vision/settings.py`. Needs `pip install "pyrocurv[examples]"`.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import product
from typing import get_args

import pyro
import torch
import tyro

from resuming import Refusal
from vision import datasets, evaluation, training
from vision.config import Config, Method
from vision.methods import METHODS, Problem
from vision.networks import input_channels, make_network
from vision.processes import Process, process_group, rank_0_first
from vision.result import Result
from vision.settings import SMOKE_TEST, UNSEEN, resolve
from vision.tables import tables
from vision.transforms import pipelines
from vision.unseen import unseen_images

SMOKE_MODELS = ("lenet5", "small-cnn", "resnet20", "vit-tiny", "resnet18", "resnet50")


def run(config: Config, process: Process) -> Result:
    """Read, train, evaluate."""
    settings = resolve(config)
    torch.manual_seed(config.seed)
    pyro.clear_param_store()
    channels = input_channels(config.model, len(settings.data.mean))
    with rank_0_first(process.rank):
        data = datasets.load(
            config.dataset, config.data_root, pipelines(settings.data, channels),
            download=config.download, train_size=settings.train_size,
            test_size=SMOKE_TEST if config.smoke else None,
            validation=config.evaluate_on == "validation",
        )
    network = partial(
        make_network, config.model, channels, len(data.classes), settings.data.size,
        config.pretrained,
    )
    steps = training.num_steps(len(data.train), settings, process.size)
    trainer = METHODS[config.method](Problem(
        lambda: network().to(process.device), len(data.train), steps, config, settings
    ))
    weights = sum(p.numel() for p in network().parameters())
    history = training.fit(trainer, data, settings, config, process)
    predict = partial(
        training.log_probabilities, trainer, settings=settings, config=config, process=process
    )
    start = time.perf_counter()
    test = evaluation.collect(predict(data.test, label="test"), len(data.test))
    seconds = time.perf_counter() - start
    name = settings.data.unseen if config.ood == "auto" else config.ood
    limit = SMOKE_TEST if config.smoke else UNSEEN
    kinds = unseen_images(data, name, config.data_root, settings.data.size, limit)
    unseen = {
        kind: evaluation.collect(predict(images, label=kind), len(images))
        for kind, images in kinds.items()
    }
    scores = evaluation.scores(test)
    scores["train s"] = history.seconds
    scores["ms / image"] = 1000 * seconds / len(data.test) * process.size
    detection = {kind: evaluation.detection(test, found) for kind, found in unseen.items()}
    return Result(
        config, settings, weights, data, history, test, unseen, scores, detection
    )


def smoke_all(config: Config) -> int:
    """A few batches of each model with each method; 1 if one has failed."""
    failed = 0
    print(f"{'model':<12}{'method':<14}{'seconds':>8}  result", flush=True)
    for model, method in product(SMOKE_MODELS, get_args(Method)):
        one = replace(config, model=model, method=method, smoke=True, smoke_all=False)
        start = time.perf_counter()
        try:
            with process_group(config.device) as process:
                found = run(one, process)
            outcome = f"NLL {found.scores['NLL']:.2f} nats"
        except Exception as error:
            outcome, failed = f"FAILED: {type(error).__name__}: {error}".splitlines()[0], 1
        seconds = time.perf_counter() - start
        print(f"{model:<12}{method:<14}{seconds:>8.1f}  {outcome}", flush=True)
    return failed


def main(argv: list[str] | None = None) -> int:
    config = tyro.cli(
        Config, args=argv, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
    )
    try:
        if config.resume and config.checkpoint is None:
            raise Refusal("--resume goes on from a file: pass --checkpoint FILE too")
        if config.smoke_all:
            return smoke_all(config)
        with process_group(config.device) as process:
            result = run(config, process)
            if process.rank == 0:
                finish(result)
    except Refusal as refusal:
        print(f"image_classification.py: {refusal}", file=sys.stderr)
        return 2
    return 0


def finish(result: Result) -> None:
    """Print the tables, and write what is asked for."""
    print(tables(result))
    config = result.config
    for path in (config.out, config.report):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if config.out is not None:
        config.out.write_text(json.dumps(result.as_json(), indent=1) + "\n")
    if config.report is not None:
        from vision.report import page

        config.report.write_text(page(result), encoding="utf-8")
        print(f"report: {config.report}")


if __name__ == "__main__":
    sys.exit(main())
