"""Rows looked up by index, and the few rows that a model takes out of a sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ...placement.placements import Sharded, Size, size_of
from ..dims import broadcast_factors, fit, plain, wrap
from ..local_op import LocalOp
from ..op_call import OpCall
from ..registry import rule
from ..rule import Dim, OpShardingRule
from .views import joined_slice, window_slice

aten = torch.ops.aten

_ANY_ROW = "an index may choose any row"

FEW_ROWS = 8
"""So many rows of a sharded value are summed over the ranks; more are cut, or gathered."""


@rule(aten.embedding.default, because=_ANY_ROW, until="rows that each rank has, summed (vocabulary-parallel)")
def embedding_rule(call: OpCall) -> OpShardingRule | None:
    """`v! c, ... -> ... c`"""
    weight, indices = call.operands
    if call["scale_grad_by_freq"] or call["sparse"]:
        return None  # the frequency of an index is counted over all ranks; a sparse gradient has no sum over them
    ids, channels = plain(indices.shape), plain(weight.shape, "c")[1]
    return fit(call, [[("v",), channels], ids], [[*ids, channels]], need_replication=frozenset("v"))


@rule(aten.index.Tensor, aten._unsafe_index.Tensor, because=_ANY_ROW)
def index_rule(call: OpCall) -> OpShardingRule | None:
    """`v! c, ... -> ... c`; the indices' dimensions come first if the indexed ones are not neighbours."""
    result = call.results[0]
    given: list[Any] = list(call["indices"])
    at = [dim for dim, index in enumerate(given) if index is not None]
    indices = call.operands[1:]
    if result is None or any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        return None
    dims = plain(call.operands[0].shape)
    kept = [dim for position, dim in enumerate(dims) if position not in at]
    ndim = max(len(index.shape) for index in indices)
    start = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    common = result.shape[start : start + ndim]
    looked_up = [broadcast_factors(index.shape, common) for index in indices]
    known = [[tuple(f"i{f}" for f in dim) for dim in index] for index in looked_up if index is not None]
    if len(known) < len(looked_up):
        return None
    made = [*kept[:start], *[(f"id{axis}",) if size != 1 else () for axis, size in enumerate(common)], *kept[start:]]
    return fit(call, [dims, *known], [made], need_replication=frozenset(f"d{dim}" for dim in at))


@rule(aten.index_select.default, because=_ANY_ROW)
def index_select_rule(call: OpCall) -> OpShardingRule | None:
    """`v! c, i -> i c`"""
    dims, index = plain(call.operands[0].shape), plain(call.operands[1].shape, "i")
    if not dims:
        return None
    (at,) = wrap(call["dim"], len(dims))
    made = [*dims[:at], index[0] if index else (), *dims[at + 1 :]]
    return fit(call, [dims, index], [made], need_replication=frozenset({f"d{at}"}))


@rule(aten.gather.default, because=_ANY_ROW)
def gather_rule(call: OpCall) -> OpShardingRule | None:
    """`b v!, b i -> b i`; a dimension that `index` covers in part has to be whole."""
    source, index = (spec.shape for spec in call.operands)
    if len(source) != len(index):
        return None
    (dim,) = wrap(call["dim"], len(source)) if len(source) == 1 else wrap((call["dim"],), len(source))
    looked_up: list[Dim] = []
    whole = {f"d{dim}"}
    for at, size in enumerate(index):
        own = at == dim or size != source[at]
        if at != dim and own:
            whole |= {f"d{at}", f"i{at}"}
        looked_up.append(() if size == 1 else (f"i{at}",) if own else (f"d{at}",))
    return fit(call, [plain(source), looked_up], [looked_up], need_replication=frozenset(whole))


@rule(aten.select.int)
def select_rule(call: OpCall) -> OpShardingRule | None:
    """`s -> `: one row, such as the class token's or the last, is a sum in which one rank has a term."""
    shape = call.operands[0].shape
    dims = plain(shape)
    (at,) = wrap((call["dim"],), len(dims))
    index = size_of(call["index"])

    def row(local: LocalOp) -> fx.Node:
        selected = _few_rows(local, at, index, 1)
        return local.emit(aten.select.int, selected, at, 0)

    bodies = {f"d{at}": row} if shape[at] != 1 else {}
    return fit(call, [dims], [[*dims[:at], *dims[at + 1 :]]], movement=True, bodies=bodies)


@rule(aten.slice.Tensor, until="the rows that change owner, sent to it")
def slice_rule(call: OpCall) -> OpShardingRule | None:
    """Streams are cut, few rows are summed, others stay where they are; a step needs the dimension whole."""
    result = call.results[0]
    assert result is not None
    shape, dims = call.operands[0].shape, plain(call.operands[0].shape)
    (at,) = wrap((call["dim"],), len(dims))
    size, kept = shape[at], result.shape[at]
    if kept == size and call["step"] == 1:
        return fit(call, [dims], [dims], movement=True, bodies=dict.fromkeys(_names(dims[at]), _whole))
    low = _start(call["start"], size)
    if call["step"] != 1 or low is None or kept == 0:
        made = [*dims[:at], ("t",) if kept != 1 else (), *dims[at + 1 :]]
        return fit(call, [dims], [made], need_replication=frozenset({f"d{at}", "t"}))
    high = size_of(size - low - kept)
    streams = joined_slice(call, at, low, kept, high)
    if not isinstance(kept, int) or kept > FEW_ROWS:
        return replace(streams, otherwise=window_slice(call, at, low, high))
    first, count = low, kept

    def rows(local: LocalOp) -> fx.Node:
        return _few_rows(local, at, first, count)

    made = [*dims[:at], (), *dims[at + 1 :]]
    few = fit(call, [dims], [made], movement=True, bodies={f"d{at}": rows})
    return replace(few, rather=streams)


def _names(dim: Dim) -> tuple[str, ...]:
    assert isinstance(dim, tuple)
    return dim


def _whole(local: LocalOp) -> fx.Node:
    return local.emit(aten.alias.default, local.operand(0))


def _start(start: Any, size: Size) -> Size | None:
    """Where a slice starts, counted from the beginning; None if the sign of a symbolic start is not known."""
    if start is None:
        return 0
    first = size_of(start)
    if isinstance(first, int):
        if first >= 0:
            return first
        return max(0, size + first) if isinstance(size, int) else size_of(size + first)
    return first if first.is_nonnegative else None


def _few_rows(local: LocalOp, dim: int, first: Size, count: int) -> fx.Node:
    """Rows `first` to `first + count` of dimension `dim`, on every rank."""
    placement, value = local.operands[0], local.operand(0)
    assert isinstance(placement, Sharded) and placement.dim == dim
    end = local.size(size_of(first + count))
    if isinstance(first, int) and first < 0 <= first + count:
        end = local.size(size_of(local.call.operands[0].shape[dim] + first + count))
        first = size_of(local.call.operands[0].shape[dim] + first)
    device = local.call.operands[0].device
    index = local.emit(aten.arange.start, local.size(first), end, dtype=torch.int64, device=device)
    return local.select_rows(value, placement, index)
