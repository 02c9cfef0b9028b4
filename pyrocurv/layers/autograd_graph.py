"""Walks over the graph that autograd has recorded; no gradient is taken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node


def ancestors(value: Tensor) -> Iterator[Node]:
    """The nodes of the graph that a value depends on, each once."""
    visited: set[Node] = set()
    ahead = [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        yield node
        ahead += [before for before, _ in node.next_functions]


def consumers(value: Tensor) -> Mapping[Node, Sequence[Node]]:
    """For each node that a value depends on, the nodes that read its output on the way there."""
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node in ancestors(value):
        for before, _ in node.next_functions:
            if before is not None:
                readers[before].append(node)
    return readers


def sequence_number(node: Node) -> int:
    """The position of a node among all nodes that its thread has created."""
    return node._sequence_nr()


@torch.compiler.disable
def next_sequence_number() -> int:
    """The sequence number of the next node that this thread will create."""
    return torch.autograd._get_sequence_nr()
