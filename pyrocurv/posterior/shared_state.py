"""The state of a training whose processes have blocks of their own, as that of one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pyrocurv.layers.block import Block
from pyrocurv.runtime.workers import Workers
from pyrocurv.structures.serialization import from_state, to_state


def state_of_all(
    state: Mapping[str, Any], blocks: Sequence[Block], owners: Workers
) -> dict[str, Any]:
    """A state with the posterior and the moments of all owners, which all of them ask for.

    At rank 0; {} on the others.

    Args:
        state: this process's part; "posterior" and "update_state" are put together.
        blocks: those of all processes, in order.
        owners: the processes.
    """
    parts = owners.gather_objects((state["posterior"], state["update_state"]))
    if not parts:
        return {}
    posteriors = [from_state(posterior) for posterior, _ in parts]
    if posteriors[0] is None:  # before the first step
        return {**state}
    found = {s.block: s for posterior in posteriors for s in posterior.blocks}
    posterior = replace(posteriors[0], blocks=tuple(found[block] for block in blocks))
    moments = {name: value for _, one in parts for name, value in one.items()}
    return {**state, "posterior": to_state(posterior), "update_state": moments}
