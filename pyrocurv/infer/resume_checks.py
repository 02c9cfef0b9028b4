"""What a saved state of `NGVI` must have in common with the `NGVI` that continues from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from pyrocurv.guides.families import Family
from pyrocurv.layers.block import Block
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.structures.serialization import check_version


class RunSignature(NamedTuple):
    """The update rule of a run, and the sum of each block's mean."""

    is_joint: bool
    means: Sequence[float]

    @staticmethod
    def of(is_joint: bool, families: Iterable[Family]) -> RunSignature:
        """The signature of a run that trains these families."""
        return RunSignature(is_joint, [float(f.raw_loc.detach().double().sum()) for f in families])


def check_state(state: Mapping[str, Any], average: bool) -> None:
    """Raise ValueError unless it is the state of an `NGVI` with this `average`."""
    if missing := {"optimizer", "auxiliary", "posterior"} - state.keys():
        raise ValueError(
            f"the state is not of an NGVI: it lacks {', '.join(sorted(missing))}, and has "
            f"{', '.join(list(state)[:5])}"
        )
    check_version(state, "NGVI")
    if state["posterior"] is not None and state["average"] != average:
        raise ValueError(
            f"the state is of average={state['average']}, this NGVI has average={average}"
        )


def check_blocks(saved: Sequence[Block], current: Sequence[Block]) -> None:
    """Raise ValueError that names the first block which differs."""
    for before, now in zip_longest(saved, current):
        if before != now:
            raise ValueError(
                f"the state is of another guide: it has {_description(before)} where this one has "
                f"{_description(now)}"
            )


def check_signature(saved: RunSignature, current: RunSignature) -> None:
    """Raise ValueError for another update rule; warn if the guide has other means."""
    if saved.is_joint != current.is_joint:
        raise ValueError(
            f"the state is of steps {_rule(saved)}, this NGVI steps {_rule(current)}: give it the "
            "curvature that the state was saved with"
        )
    if not all(
        math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3)
        for a, b in zip(saved.means, current.means, strict=True)
    ):
        warn_user(
            "the guide has other means than when this state of NGVI was saved: load the guide's "
            "own state too, guide.load_state_dict(...)"
        )


def _rule(signature: RunSignature) -> str:
    return "over all latents jointly" if signature.is_joint else "layer by layer"


def _description(block: Block | None) -> str:
    if block is None:
        return "no block"
    return f"{block.name} ({block.structure!r} over {block.size} weights {list(block.tensors)})"


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
