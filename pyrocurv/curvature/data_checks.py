"""Warnings about the data of a run."""

from __future__ import annotations

from pyrocurv.runtime.user_warnings import warn_user


class DatasetSizeCheck:
    """Warns, once, if N changes from step to step, as without a plate of the full size."""

    def __init__(self) -> None:
        self._sizes: list[float] = []  # two at most

    def note(self, num_data: float) -> None:
        """N of one step."""
        if num_data in self._sizes or len(self._sizes) > 1:
            return
        if self._sizes:
            warn_user(
                f"the model had {self._sizes[0]:g} data in total, and now has {num_data:g}, of "
                "which the posterior is. A plate gives the total, of which each call has a batch: "
                'pyro.plate("data", N, subsample=torch.arange(len(x)))'
            )
        self._sizes.append(num_data)
