"""What a rewritten graph moves: its collectives, in order, with the bytes that each rank receives.

Own block and padding excluded, for a value of `n` bytes in all on P ranks (DESIGN, "What a layer moves"):

    all_to_all                  n (P - 1) / P^2      from one dimension to another
    all_to_all_kv               m n / G (P - 1) / P  m of G KV heads, as many as the neediest rank reads
    all_gather                  n (P - 1) / P
    all_reduce, select_rows     2 n (P - 1) / P      the ring of Rabenseifner (2004): reduce-scatter and all-gather
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

# The position of the first argument of the layout along which the value is whole before or after.
_SHARDED = {"all_to_all": 1, "all_to_all_kv": 2, "all_gather": 2}
_SUMMED = ("all_reduce", "select_rows")


@dataclass(frozen=True)
class Collective:
    """One collective of a rewritten graph, forward."""

    name: str
    """The node, called by its role: `gather_seq_scatter_heads_q`."""
    op: str
    source: str
    """The node that it moves."""
    bytes: int
    """What each rank receives, own block and padding excluded; symbolic sizes as they were at compile time."""


def collectives(graph: fx.Graph, parts: int) -> tuple[Collective, ...]:
    """The collectives of a graph that `insert_collectives` wrote for P = `parts`, in order."""
    found = []
    for node in graph.nodes:
        op = node.target._opname if getattr(node.target, "namespace", "") == "sp" else ""
        if op in _SHARDED or op in _SUMMED:
            found.append(Collective(node.name, op, str(node.args[0]), _received(node, op, parts)))
    return tuple(found)


def _received(node: fx.Node, op: str, parts: int) -> int:
    others = (parts - 1) / parts
    if op in _SUMMED:
        return round(2 * _bytes(node.meta["val"]) * others)
    args: Any = node.args
    dim, outer, sizes = args[_SHARDED[op] :][:3]
    local = args[0].meta["val"]
    whole = _bytes(local) * _int(outer) * sum(map(_int, sizes)) // max(_int(local.shape[dim]), 1)
    if op == "all_gather":
        return round(whole * others)
    if op == "all_to_all":
        return round(whole * others / parts)
    head_dim, query_heads = args[6:8]
    heads = _int(local.shape[head_dim])
    return round(whole * _heads_read(query_heads, heads, parts) / heads * others)


def _heads_read(query_heads: int, kv_heads: int, parts: int) -> int:
    """The most KV heads that the query heads of one rank read."""
    block, shared = -(-query_heads // parts), query_heads // kv_heads
    read = [{min(h, query_heads - 1) // shared for h in range(r * block, (r + 1) * block)} for r in range(parts)]
    return max(map(len, read))


def _bytes(value: torch.Tensor) -> int:
    size = value.element_size()
    for each in value.shape:
        size *= _int(each)
    return size


def _int(size: Any) -> int:
    """A size as it was at compile time; a node stands for the symbol that it computes."""
    if isinstance(size, fx.Node):
        size = size.meta["val"]
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
