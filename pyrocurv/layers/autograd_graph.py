"""Autograd's graph, read node by node; no gradient is taken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node


def ancestors(value: Tensor) -> Iterator[Node]:
    """The nodes of the graph that a value hangs on, each once."""
    seen, ahead = set(), [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        ahead += [before for before, _ in node.next_functions]


def consumers(value: Tensor) -> Mapping[Node, Sequence[Node]]:
    """For each node that a value hangs on, those that read it on the way there."""
    found: dict[Node, list[Node]] = defaultdict(list)
    for node in ancestors(value):
        for before, _ in node.next_functions:
            if before is not None:
                found[before].append(node)
    return found


def sequence_number(node: Node) -> int:
    """The position of a node among all nodes that its thread has created."""
    return node._sequence_nr()


@torch.compiler.disable
def next_sequence_number() -> int:
    """The sequence number of the next node that this thread will create."""
    return torch.autograd._get_sequence_nr()
