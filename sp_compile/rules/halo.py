"""Halos: rows of the neighbouring ranks, that the windows of a convolution read, or blocks that begin elsewhere hold.

    10 rows on 2 ranks, windows of 3 around each row     rank 0 has 0 1 2 3 4, reads . 0 1 2 3 4 5
                                                         rank 1 has 5 6 7 8 9, reads 4 5 6 7 8 9 .

Each rank sends the rows at its two ends to all, a few rows times P; where windows reach further than a neighbour, all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from ..placement.placements import Rows, Sharded, held_rows, rows_beside, whole_layout
from .local_op import LocalGraph, LocalOp
from .rule import Halo

aten = torch.ops.aten


def rows_read(local: LocalOp, halo: Halo) -> fx.Node:
    """The rows of operand 0 that the windows of a rank read, those of padded windows too; 0 where there are none."""
    placement, made = local.operands[0], local.results[0]
    assert isinstance(placement, Sharded) and isinstance(made, Sharded)
    wanted, operand, size = halo.read(made.layout, local.parts), local.call.operands[0], int(placement.layout.size)
    rows = neighbouring_rows(local, local.operand(0), placement, [wanted], operand.device)
    if wanted.first >= 0 and wanted.of(local.parts - 1).stop <= size:
        return rows
    index = _count_from(local, wanted.first, wanted.count, wanted.step, local.rank(), operand.device)
    outside = local.emit(
        aten.logical_or.default, local.emit(aten.lt.Scalar, index, 0), local.emit(aten.ge.Scalar, index, size)
    )
    others = [1] * (len(operand.shape) - placement.dim - 1)
    return local.emit(aten.masked_fill.Scalar, rows, local.emit(aten.reshape.default, outside, [-1, *others]), 0)


def neighbouring_rows(
    graph: LocalGraph, x: fx.Node, placement: Sharded, wanted: Sequence[Rows], device: torch.device
) -> fx.Node:
    """The rows of a sharded value that each rank wants, end to end; any rows in place of those that do not exist."""
    dim, beside = placement.dim, rows_beside(placement.layout, wanted, graph.parts)
    if beside is None:
        size = int(placement.layout.size)
        x, here = graph.gather(x, placement, "all_gather"), [Rows(0, 0, size, range(size))]
    else:
        held = held_rows(placement.layout, graph.parts)
        assert held is not None
        x = _with_neighbours(graph, x, dim, [rows.count for rows in held], beside, device)
        here = [
            replace(rows, first=rows.first - before, count=before + rows.count + after)
            for rows, (before, after) in zip(held, beside, strict=True)
        ]
    parts = [_rows_of(graph, x, dim, here, each, device) for each in wanted]
    return parts[0] if len(parts) == 1 else graph.emit(aten.cat.default, parts, dim)


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:at]) for at in range(len(sizes))]


def _rows_of(
    graph: LocalGraph, x: fx.Node, dim: int, here: Sequence[Rows], wanted: Rows, device: torch.device
) -> fx.Node:
    """The rows that are wanted of those that are here, of one stream after the other."""
    if len(here) == 1:
        (rows,) = here
        first = wanted.first - rows.first
        if wanted.step == rows.step and 0 <= first <= rows.count - wanted.count:
            return graph.emit(aten.slice.Tensor, x, dim, first, first + wanted.count)
    index = None
    for position, rows in zip(_starts([rows.count for rows in here]), here, strict=True):
        first, step = wanted.first - rows.first + position, wanted.step - rows.step
        found = _count_from(graph, first, wanted.count, step, graph.rank(), device)
        if index is not None:
            numbers = _count_from(graph, wanted.first, wanted.count, wanted.step, graph.rank(), device)
            theirs = graph.emit(aten.ge.Scalar, numbers, rows.real.start)
            found = graph.emit(aten.where.self, theirs, found, index)
        index = found
    last = sum(rows.count for rows in here) - 1
    return graph.emit(aten.index_select.default, x, dim, graph.emit(aten.clamp.default, index, 0, last))


def _with_neighbours(
    graph: LocalGraph,
    x: fx.Node,
    dim: int,
    blocks: Sequence[int],
    beside: Sequence[tuple[int, int]],
    device: torch.device,
) -> fx.Node:
    """My block of each stream, the last rows of that of the previous rank before it and the first of the next after."""
    sent = [
        (start + low, start + high)
        for start, block, (before, after) in zip(_starts(blocks), blocks, beside, strict=True)
        for low, high in ((0, after), (block - before, block))
        if low < high
    ]
    count = sum(high - low for low, high in sent)
    if not count:
        return x
    ends = [graph.emit(aten.slice.Tensor, x, dim, *end) for end in sent]
    mine = ends[0] if len(ends) == 1 else graph.emit(aten.cat.default, ends, dim)
    of_all = graph.gather(mine, Sharded(dim, whole_layout(graph.parts * count)), "halo")

    def received(neighbour: int, first: int, rows: int) -> list[fx.Node]:
        """`rows` of the ends that a neighbour sent; where there is none, some of my own, which are not real."""
        if not rows:
            return []
        rank = graph.emit(aten.add.Scalar, graph.rank(), neighbour)
        rank = graph.emit(aten.clamp.default, rank, 0, graph.parts - 1)
        index = _count_from(graph, first, rows, count, rank, device)
        return [graph.emit(aten.index_select.default, of_all, dim, index)]

    rows, at = [], 0
    for start, block, (before, after) in zip(_starts(blocks), blocks, beside, strict=True):
        own = x if len(blocks) == 1 else graph.emit(aten.slice.Tensor, x, dim, start, start + block)
        rows += [*received(-1, at + after, before), own, *received(1, at, after)]
        at += before + after
    return graph.emit(aten.cat.default, rows, dim)


def _count_from(graph: LocalGraph, first: int, count: int, step: int, rank: fx.Node, device: torch.device) -> fx.Node:
    """`count` numbers from `first + rank * step` on, int64."""
    numbers = graph.emit(aten.arange.start, first, first + count, dtype=torch.int64, device=device)
    return graph.emit(aten.add.Tensor, numbers, graph.emit(aten.mul.Scalar, rank, step)) if step else numbers
