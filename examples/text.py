"""Train a character GPT, write text with it, and see where it is unsure.

    python examples/text.py                                   # Python's own source, some minutes
    python examples/text.py --report out.html --prompt "class Queue:\\n"
    python examples/text.py --method adam --text book.txt --steps 3000

Prints text that the network writes during and after training, and scores on text that was held out,
in nats per character. The report colors each character by how uncertain its prediction was, and by
how much of that the samples of the posterior disagree about. Needs
`pip install "pyrocurv[examples]"`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import pyro
import torch
import tyro
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from language.config import Config
from language.corpus import ALPHABET, WINDOW, batches, corpus, decode, own_corpus
from language.methods import Method, make_method
from language.posterior import WARM_UP, falling
from language.prediction import Reading, Scores, read, scores, write
from pyrocurv import checkpoint
from pyrocurv.nn.networks import GPT
from resuming import Refusal, load_run

IDENTITY = ("method", "text", "train_size", "layers", "width", "heads", "context", "steps",
            "batch", "lr", "kl_temperature", "seed")
PASSAGES, PASSAGE = 3, 600  # of held-out text in the report, and their characters
POINTS = 100  # of the training curve


@dataclass(frozen=True)
class Result:
    """What a run has found."""

    config: Config
    weights: int
    characters: dict[str, int]  # by the part of the text
    curve: list[tuple[int, float]]  # step, mean loss since the one before, in nats per character
    seconds: float  # of training
    scores: dict[str, Scores]  # of the held-out text, by what predicts
    readings: list[Reading]


# ---- training -----------------------------------------------------------------------------------


def train(config: Config, method: Method, text: torch.Tensor) -> tuple[list[Any], float]:
    """Up to the last step, from the checkpoint if there is one and `--resume`."""
    warm_up = min(WARM_UP, config.steps // 4 + 1)
    schedules = [LambdaLR(o, falling(config.steps, warm_up)) for o in method.optimizers]
    objects = {**method.objects, **{f"schedule {k}": s for k, s in enumerate(schedules)}}
    identity = {name: str(getattr(config, name)) for name in IDENTITY}
    state = {"step": 0, "curve": [], "seconds": 0.0, "pending": [], "settings": identity}
    if config.checkpoint is not None and config.checkpoint.exists():
        state = resumed(config, objects, identity)
    first, curve, pending = state["step"], state["curve"], state["pending"]
    start = time.perf_counter() - state["seconds"]
    interval = max(1, config.steps // POINTS)
    stream = batches(text, config.steps, config.seed, config.batch, config.context, first)
    bar = tqdm(stream, config.method, config.steps, initial=first, disable=None)
    for step, (x, y) in enumerate(bar, start=first + 1):
        pending.append(method.step(x.to(config.device), y.to(config.device)))
        for schedule in schedules:
            schedule.step()
        if step % interval == 0:
            curve.append((step, sum(pending) / len(pending)))
            pending.clear()
            bar.set_postfix_str(f"{curve[-1][1]:.3f} nats per character", refresh=False)
        if step % config.show_every == 0 and step < config.steps:
            tqdm.write(f"---- step {step} ----\n{writing(config, method)}\n", file=sys.stdout)
        if config.checkpoint is not None and (
            step % config.show_every == 0 or step == config.steps
        ):
            seconds = time.perf_counter() - start
            checkpoint.save(config.checkpoint, {
                **objects, "step": step, "curve": curve, "seconds": seconds, "pending": pending,
                "settings": identity,
            })
    return curve, time.perf_counter() - start


def resumed(config: Config, objects: dict[str, Any], identity: dict[str, str]) -> dict[str, Any]:
    """What the checkpoint says; the objects have its states."""
    path = config.checkpoint
    assert path is not None
    saved = load_run(path, config.resume, objects)
    if saved["settings"] != identity:
        raise Refusal(f"--resume: {path} is of a run with other settings: {saved['settings']}")
    return saved


def writing(config: Config, method: Method) -> str:
    """A text of the posterior's mean, or of the network."""
    with torch.random.fork_rng():
        prompt = config.prompt.replace("\\n", "\n")
        return write(
            method.networks(0), prompt, config.length, config.temperature, config.context,
            config.seed,
        )


# ---- results ------------------------------------------------------------------------------------


def run(config: Config) -> Result:
    """Read, train, evaluate."""
    if config.text is None:
        text = corpus(config.train_size)
    elif config.text.is_file():
        text = own_corpus(config.text, min(WINDOW, 16 * config.context))
    else:
        raise Refusal(f"--text {config.text}: there is no such file")
    torch.manual_seed(config.seed)
    pyro.clear_param_store()
    net = GPT(len(ALPHABET), config.context, config.width, config.heads, config.layers)
    weights = sum(p.numel() for p in net.parameters())
    method = make_method(config, net.to(config.device), len(text["train"]))
    curve, seconds = train(config, method, text["train"])
    torch.manual_seed(config.seed)
    test = text["test"][:2, : 8 * config.context] if config.smoke else text["test"]
    posterior = config.method == "ngvi"
    networks = method.networks(config.samples)
    found = {}
    if posterior:
        found["mean weights"] = scores(method.networks(0), test, config.context)
    name = f"mean of {config.samples} samples" if posterior else "network"
    found[name] = scores(networks, test, config.context)
    prompt = config.prompt.replace("\\n", "\n")
    written = write(
        networks, prompt, config.length, config.temperature, config.context, config.seed
    )
    passages = [decode(part[: min(PASSAGE, 8 * config.context)]) for part in test[:PASSAGES]]
    readings = [read(networks, "What the network writes", written, config.context)] + [
        read(networks, f"Held-out text {number}", passage, config.context)
        for number, passage in enumerate(passages, start=1)
    ]
    sizes = {"training": len(text["train"]), "held-out": test.numel()}
    return Result(config, weights, sizes, curve, seconds, found, readings)


def table(result: Result) -> str:
    """The scores, and the mean uncertainty of a character."""
    config = result.config
    lines = [
        f"{config.method}: {result.weights:,} weights, {config.steps:,} steps of "
        f"{config.batch * config.context:,} characters of {result.characters['training']:,}, "
        f"{result.seconds:.0f} s",
        f"{result.characters['held-out']:,} held-out characters; the error is over their files", "",
        f"{'':<20}{'nats / character':>18}{'+-':>9}{'accuracy %':>12}",
    ]
    for name, found in result.scores.items():
        lines.append(
            f"{name:<20}{found.nll:>18.4f}{found.error:>9.4f}{100 * found.accuracy:>12.2f}"
        )
    held_out = result.readings[1:]
    total, epistemic = (
        torch.cat([getattr(one.uncertainty, name) for one in held_out]).mean()
        for name in ("total", "epistemic")
    )
    lines += ["", f"uncertainty of a character: {total:.3f} nats, {epistemic:.4f} of it epistemic"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    config = tyro.cli(
        Config, args=argv, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
    ).resolved()
    try:
        if config.resume and config.checkpoint is None:
            raise Refusal("--resume goes on from a file: pass --checkpoint FILE too")
        for path in (config.checkpoint, config.report):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
        result = run(config)
    except (Refusal, ValueError) as refusal:
        print(f"text.py: {refusal}", file=sys.stderr)
        return 2
    print(f"---- step {config.steps} ----\n{result.readings[0].text}\n")
    print(table(result))
    if config.report is not None:
        from language.report import page

        config.report.write_text(page(result), encoding="utf-8")
        print(f"report: {config.report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
