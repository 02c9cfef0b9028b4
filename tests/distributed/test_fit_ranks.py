"""`fit` on two ranks against one process that has the batches of both."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from test_evaluation import double
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from pyrocurv.curvature import Curvature
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI, fit
from pyrocurv.nn import Classifier, bayesianize

N, HELD_OUT, BATCH, EPOCHS = 24, 10, 6, 3


class Interleaved(torch.utils.data.Sampler[int]):
    """The data of both ranks, in batches that are the union of theirs."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.parts = [DistributedSampler(data, 2, rank) for rank in range(2)]

    def set_epoch(self, epoch: int) -> None:
        for part in self.parts:
            part.set_epoch(epoch)

    def __iter__(self) -> Any:
        first, second = ([*part] for part in self.parts)
        for start in range(0, N // 2, BATCH):
            yield from (*first[start:start + BATCH], *second[start:start + BATCH])

    def __len__(self) -> int:
        return N


def train(rank: int | None, folder: str, kills: bool = False) -> Any:
    with double():
        x = torch.randn(N + HELD_OUT, 4)
        data = TensorDataset(x[:N], (x[:N, 0] > 0).long() + (x[:N, 1] > 1).long())
        score = x[N:], (x[N:, 0] > 0).long()
        net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        model = Classifier(bayesianize(net), num_data=N)
        ngvi = NGVI(model, KFACGuide(model), curvature=Curvature("fisher", every=1, batch=None),
                    temperature=0.5)
        loader: Any = (
            DataLoader(data, 2 * BATCH, sampler=Interleaved(data)) if rank is None else
            DataLoader(data, BATCH, sampler=DistributedSampler(data, 2, rank))
        )
        rows = slice(rank, None, 2)
        held_out = [score] if rank is None else [(score[0][rows], score[1][rows])]
        path, text = Path(folder) / f"{rank is None}.pt", io.StringIO()

        def stop(epoch: Any) -> bool:  # one rank ends the run of both, to be resumed
            return kills and epoch.epoch == 2 and rank == 1

        with redirect_stderr(text):
            torch.manual_seed(3)
            history = fit(ngvi, loader, EPOCHS, held_out=held_out, num_samples=4, warmup=2,
                          progress=True, callbacks=[stop], checkpoint=path)
        means = {f.block.name: f.raw_loc.detach().clone() for f in ngvi.guide.blocks}
        return [*history], history.stopped_early, means, text.getvalue(), ngvi.loss_terms


def test_two_ranks_are_one_process(ranks: Any, tmp_path: Path) -> None:
    epochs, stopped, means, text, terms = train(None, str(tmp_path))
    assert text and not stopped and len(epochs) == EPOCHS
    for rank, (found, stopped, of_rank, bar, own) in enumerate(
        ranks(2).run(train, str(tmp_path))
    ):
        assert bool(bar) == (rank == 0) and not stopped
        for a, b in zip(found, epochs, strict=True):
            for name in ("step", "loss", "nll", "kl", "lr", "temperature", "held_out"):
                torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-9)
        for name, mean in means.items():
            torch.testing.assert_close(of_rank[name], mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(own.nll, terms.nll, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(own.kl, terms.kl, rtol=1e-9, atol=1e-9)
    (tmp_path / "False.pt").unlink()
    again = ranks(2).run(train, str(tmp_path), True)
    assert [(len(found), stopped) for found, stopped, *_ in again] == [(2, True)] * 2
