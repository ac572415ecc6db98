"""Rows written where an index says: `v! c, i! c, i! c -> v! c`. Dimensions that the index does not choose from pass.

What is added up may also be sharded along the index: every rank adds its rows to zeros, and the ranks' sums are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...placement.placements import Size
from ..dims import broadcast_factors, fit, plain, wrap
from ..local_op import Body, LocalOp
from ..op_call import OpCall
from ..registry import rule
from ..rule import Dim, OpShardingRule
from .contractions import sum_over_ranks

aten = torch.ops.aten

_CHOSEN = "a row may be written to any place"
_IN_ORDER = "rows written to one place overwrite or combine in order"


def _add_to_self(local: LocalOp, total: fx.Node) -> fx.Node:
    return local.emit(aten.add.Tensor, local.operand(0), total)


def _sum_of_rows(local: LocalOp, operands: Sequence[fx.Node]) -> fx.Node:
    """The op on zeros in place of `self`."""
    zeros = local.emit(aten.zeros_like.default, operands[0])
    arguments = {**local.call.arguments, **dict(zip(local.call.operand_names, [zeros, *operands[1:]], strict=True))}
    alpha = {"alpha": arguments.pop("alpha")} if "alpha" in arguments else {}
    return local.emit(local.call.target, *arguments.values(), **alpha)


@rule(
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter.reduce,
    aten.scatter.value_reduce,
    aten.scatter_reduce.two,
    aten.scatter_add.default,
    because=f"{_CHOSEN}; {_IN_ORDER}",
)
def scatter_rule(call: OpCall) -> OpShardingRule | None:
    """`b v!, b i!, b i! -> b v!`; a dimension that `index` covers in part has to be whole."""
    shapes = [spec.shape for spec in call.operands]
    if len({len(shape) for shape in shapes}) > 1 or not shapes[0]:
        return None
    (dim,) = wrap((call["dim"],), len(shapes[0]))
    adds = call.target is aten.scatter_add.default and shapes[1] == shapes[2]
    whole = {f"d{dim}"}
    operands: list[list[Dim]] = [[], [], []]
    for at in range(len(shapes[0])):
        names = ["d", "d", "d"]
        if at == dim:
            names = ["d", "i", "i"] if adds or shapes[1] == shapes[-1] else ["d", "i", "s"]
        elif len({shape[at] for shape in shapes}) > 1:
            names = ["d", "i", "s"]
        if len(set(names)) > 1:
            whole |= {f"{name}{at}" for name in names}
        for dims, name, shape in zip(operands, names, shapes, strict=False):
            dims.append((f"{name}{at}",) if shape[at] != 1 else ())
    bodies: dict[str, Body] = {}
    if adds:
        whole.remove(f"i{dim}")
        bodies = {f"i{dim}": sum_over_ranks(_sum_of_rows, _add_to_self)}
    return fit(
        call,
        operands[: len(shapes)],
        [operands[0]],
        need_replication=frozenset(whole),
        additive=frozenset({0}) if adds else frozenset(),
        bodies=bodies,
    )


@rule(
    aten.index_add.default,
    aten.index_copy.default,
    aten.index_reduce.default,
    because=f"{_CHOSEN}; {_IN_ORDER}",
)
def index_add_rule(call: OpCall) -> OpShardingRule | None:
    """`v! c, i!, i! c -> v! c`"""
    dims, rows = plain(call.operands[0].shape), call.operands[2].shape
    if not dims or len(rows) != len(dims):
        return None
    (at,) = wrap((call["dim"],), len(dims))
    index: Dim = ("i",) if rows[at] != 1 else ()
    adds = call.target is aten.index_add.default
    return fit(
        call,
        [dims, [index] if call.operands[1].shape else [], [*dims[:at], index, *dims[at + 1 :]]],
        [dims],
        need_replication=frozenset({f"d{at}"} if adds else {f"d{at}", "i"}),
        additive=frozenset({0}) if adds else frozenset(),
        bodies={"i": sum_over_ranks(_sum_of_rows, _add_to_self)} if adds else {},
    )


@rule(
    aten.index_fill.int_Scalar,
    aten.index_fill.int_Tensor,
    because=_CHOSEN,
    until="a mask made of the local positions",
)
def index_fill_rule(call: OpCall) -> OpShardingRule | None:
    """`v! c, i! -> v! c`"""
    dims = plain(call.operands[0].shape)
    if not dims:
        return None
    (at,) = wrap((call["dim"],), len(dims))
    index = plain(call.operands[1].shape, "i")
    whole = frozenset({f"d{at}", *(f"i{axis}" for axis in range(len(index)))})
    values: list[list[Dim]] = [[] for _ in call.operands[2:]]
    return fit(call, [dims, index, *values], [dims], need_replication=whole)


@rule(aten.index_put.default, aten._unsafe_index_put.default, because=f"{_CHOSEN}; {_IN_ORDER}")
def index_put_rule(call: OpCall) -> OpShardingRule | None:
    """`v! c, i!, i! c -> v! c`; one boolean mask chooses row by row: `b s c, b s, c -> b s c`."""
    given: list[Any] = list(call["indices"])
    at = [dim for dim, index in enumerate(given) if index is not None]
    dims, (*indices, values) = plain(call.operands[0].shape), call.operands[1:]
    if not indices:
        return None
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        return _masked_put_rule(call, at[0])
    common = broadcast_shape([index.shape for index in indices])
    kept = [dim for position, dim in enumerate(dims) if position not in at]
    start = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    names: list[Dim] = [(f"i{axis}",) if size != 1 else () for axis, size in enumerate(common)]
    whole = frozenset({*(f"d{dim}" for dim in at), *(f"i{axis}" for axis in range(len(common)))})
    looked_up = [_aligned(names, index.shape) for index in indices]
    return fit(
        call,
        [dims, *looked_up, _aligned([*kept[:start], *names, *kept[start:]], values.shape)],
        [dims],
        need_replication=whole,
    )


def _masked_put_rule(call: OpCall, start: int) -> OpShardingRule | None:
    """One boolean mask, and the same values for every row that it chooses; a value for each needs the mask whole."""
    dims, (mask, *rest) = plain(call.operands[0].shape), call.operands[1:]
    end = start + len(mask.shape)
    if len(rest) != 1 or mask.dtype != torch.bool:
        return None
    (values,) = rest
    behind = len(dims) - end
    own = len(values.shape) > behind and values.shape[-behind - 1] != 1
    chosen: Dim = ("n",) if own else ()
    placed = _aligned([*dims[:start], chosen, *dims[end:]], values.shape)
    whole = frozenset({"n", *(f"d{at}" for at in range(start, end))}) if own else frozenset()
    return fit(call, [dims, dims[start:end], placed], [dims], need_replication=whole)


def _aligned(dims: Sequence[Dim], shape: Sequence[Size]) -> list[Dim]:
    """The dimensions of a value that broadcasts to these."""
    return [dim if size != 1 else () for dim, size in zip(dims[len(dims) - len(shape) :], shape, strict=True)]


def broadcast_shape(shapes: Sequence[Sequence[Size]]) -> list[Size]:
    """The shape that these broadcast to; of sizes other than 1 the first."""
    ndim = max(map(len, shapes))
    ends = [[1] * (ndim - len(shape)) + list(shape) for shape in shapes]
    return [next((size for size in sizes if size != 1), 1) for sizes in zip(*ends, strict=True)]


@rule(
    aten.masked_scatter.default,
    because="the source is read in the order of the mask",
    until="a count of what the ranks before have taken",
)
def masked_scatter_rule(call: OpCall) -> OpShardingRule | None:
    """`...!, ...!, s! -> ...!`"""
    self, mask, source = call.operands
    result = call.results[0]
    assert result is not None
    operands = [broadcast_factors(spec.shape, result.shape) for spec in (self, mask)]
    known = [dims for dims in operands if dims is not None]
    if len(known) < 2:
        return None
    own = plain(source.shape, "s")
    whole = frozenset({*(f"d{at}" for at in range(len(result.shape))), *(f"s{at}" for at in range(len(own)))})
    return fit(call, [*known, own], [plain(result.shape)], need_replication=whole)
