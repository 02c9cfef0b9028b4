"""How many data there are in all, step by step, which should be the same."""

from __future__ import annotations

from pyrocurv.notice import notice


class Sizes:
    """Notices, once, a model whose data in all are as many as happen to be in the batch."""

    def __init__(self) -> None:
        self._seen: list[float] = []  # two at most

    def note(self, num_data: float) -> None:
        """One step's N."""
        if num_data in self._seen or len(self._seen) > 1:
            return
        if self._seen:
            notice(
                f"the model had {self._seen[0]:g} data in all, and has {num_data:g} now: the "
                "posterior is that of so many. A plate says how many there are, of which a call "
                'has a batch: pyro.plate("data", N, subsample=torch.arange(len(x)))'
            )
        self._seen.append(num_data)
