"""Are steps slower, or larger, than at another commit?

    python benchmarks/step_ratio.py 8029d8b
    python benchmarks/step_ratio.py 8029d8b --cases mlp:kfac lenet:second-order --rounds 20

Two processes of one thread, with the package of COMMIT and with that of the working tree, take
turns: in each round both run the same block of steps, whole cycles of the curvature, and the CPU
time of the new block is divided by that of the old one in the same round, so that a loaded machine
slows both sides alike. Printed are the medians, the quartiles of the ratio over the rounds, and the
peak of the resident set of each process.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from statistics import median

import torch

from nets import BATCH, IMAGES, NETS
from step_cost import batches, blobs, keep_memory, make_step, run

ROOT = Path(__file__).resolve().parents[1]
CASES = ("mlp:kfac", "mlp:diagonal", "mlp:second-order", "lenet:kfac", "lenet:ekfac",
         "lenet:diagonal", "lenet:second-order", "resnet18:kfac")


def serve(case: str, size: int) -> None:
    """Run a block of steps for every line on standard input; print CPU seconds and peak MiB."""
    torch.set_num_threads(1)
    keep_memory()
    torch.manual_seed(0)
    name, method = case.split(":")
    step = make_step(method, NETS[name]())
    source = batches(*blobs(IMAGES[name]), BATCH[name])
    for _ in sys.stdin:
        seconds = run(step, list(islice(source, size)))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(seconds, peak, flush=True)


def start(case: str, size: int, package: Path) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(package), str(ROOT / "benchmarks")])
    return subprocess.Popen(
        [sys.executable, __file__, "-", "--serve", case, "--steps", str(size)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )


def ask(worker: subprocess.Popen[str]) -> tuple[float, float]:
    """CPU seconds per step of one more block, and the peak so far."""
    if worker.stdin is None or worker.stdout is None:
        raise RuntimeError("the worker has no pipes")
    print("go", file=worker.stdin, flush=True)
    seconds, peak = map(float, worker.stdout.readline().split())
    return seconds, peak


def with_networks(package: Path) -> None:
    """Give a package from before `pyrocurv.nn.networks` the networks of this one."""
    for name in ("nn/networks.py", "runtime/validation.py"):
        file = package / "pyrocurv" / name
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / "pyrocurv" / name, file)


def compare(case: str, rounds: int, size: int, packages: tuple[Path, Path]) -> str:
    """A line of the table."""
    workers = [start(case, size, package) for package in packages]
    try:
        for worker in workers:
            ask(worker)  # the warm-up
        times = []
        for number in range(rounds):
            order = workers if number % 2 else workers[::-1]
            found = {id(worker): ask(worker) for worker in order}
            times.append([found[id(worker)] for worker in workers])
    finally:
        for worker in workers:
            worker.kill()
    old, new = ([row[side][0] for row in times] for side in (0, 1))
    ratios = torch.tensor([b / a for a, b in zip(old, new, strict=True)])
    low, high = ratios.quantile(torch.tensor([0.25, 0.75])).tolist()
    peaks = [row[1] for row in times[-1]]
    return (
        f"{case:<18}{1e3 * median(old):>9.2f}{1e3 * median(new):>9.2f}{ratios.median():>8.3f}"
        f"{f'{low:.3f}-{high:.3f}':>14}{peaks[0]:>10.1f}{peaks[1]:>10.1f}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="NET:METHOD")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20, help="of a block")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(args.serve, args.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = ["git", "-C", str(ROOT), "archive", args.commit, "pyrocurv"]
        packed = subprocess.run(archive, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=packed, check=True)
        with_networks(Path(folder))
        print(f"{'case':<18}{'old ms':>9}{'new ms':>9}{'ratio':>8}{'quartiles':>14}"
              f"{'old MiB':>10}{'new MiB':>10}")
        for case in args.cases:
            line = compare(case, args.rounds, args.steps, (Path(folder), ROOT))
            print(line, flush=True)


if __name__ == "__main__":
    main()
