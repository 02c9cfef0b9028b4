"""What a saved state of `NGVI` must have in common with the `NGVI` that continues from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from pyrocurv.guides import StructuredGuide
from pyrocurv.guides.owned_blocks import check_part
from pyrocurv.infer.update_rule import UpdateRule
from pyrocurv.layers.block import Block
from pyrocurv.optim.mean_updates import check_update
from pyrocurv.posterior.state import Posterior
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.runtime.validation import check_state_dict
from pyrocurv.structures.serialization import check_version

STATE_KEYS = (
    "optimizer", "auxiliary", "stream", "skipped", "average", "temperature", "means", "posterior",
    "update", "update_state", "kl_warmup",
)


class RunSignature(NamedTuple):
    """The update rule of a run, and the sum of each block's mean."""

    is_joint: bool
    means: Sequence[float]

    @staticmethod
    def of(rule: UpdateRule | None, guide: StructuredGuide) -> RunSignature:
        """The signature of a run that trains a guide; no rule has been chosen before a step."""
        means = [float(family.raw_loc.detach().double().sum()) for family in guide.blocks]
        return RunSignature(rule is not None and rule.is_joint, means)


def check_state(state: Mapping[str, Any], average: bool, update: str) -> None:
    """Raise ValueError unless it is the state of an `NGVI` with this `average` and `update`."""
    check_state_dict(state, "NGVI")
    if missing := {*STATE_KEYS} - state.keys():
        raise ValueError(
            f"the state is not of an NGVI: it lacks {', '.join(sorted(missing))}, and has "
            f"{', '.join(list(state)[:5])}"
        )
    check_version(state, "NGVI")
    if state["posterior"] is not None and state["average"] != average:
        raise ValueError(
            f"the state is of average={state['average']}, this NGVI has average={average}"
        )
    check_update(state["update"], update, "NGVI")


def check_ranks(state: Mapping[str, Any], guide: StructuredGuide) -> None:
    """Raise ValueError for what another rank of a sharded network has, or one of another number."""
    saved = state.get("sharding")
    here = (guide.workers.rank, guide.workers.size)
    if guide.ownership is None and guide.is_shared_out and saved is not None:
        if here == (saved["rank"], saved["size"]):
            return  # `check_blocks` follows once the guide has blocks
    check_part(saved, guide.ownership, "NGVI.full_state_dict()")


def check_blocks(saved: Posterior, current: Sequence[Block]) -> None:
    """Raise ValueError that names the first block which differs."""
    for before, now in zip_longest([state.block for state in saved.blocks], current):
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
