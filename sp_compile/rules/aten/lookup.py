"""Values looked up in others, and dimensions read along a diagonal."""

from __future__ import annotations

import torch

from ..dims import fit, plain, wrap
from ..op_call import OpCall
from ..registry import rule
from ..rule import Dim, OpShardingRule

aten = torch.ops.aten

_ALL = "every value is compared with all boundaries"


@rule(aten.bucketize.Tensor, because=_ALL)
def bucketize_rule(call: OpCall) -> OpShardingRule | None:
    """`..., t! -> ...`"""
    dims = plain(call.operands[0].shape)
    return fit(call, [dims, plain(call.operands[1].shape, "t")], [dims], need_replication=frozenset({"t0"}))


@rule(aten.searchsorted.Tensor, because=_ALL)
def searchsorted_rule(call: OpCall) -> OpShardingRule | None:
    """`... t!, ... v -> ... v`; boundaries of one dimension serve all values."""
    boundaries, values = (spec.shape for spec in call.operands[:2])
    lead = plain(values)[:-1] if len(boundaries) > 1 else []
    table: list[Dim] = [*lead, ("t",) if boundaries[-1] != 1 else ()]
    tables = [table] * (len(call.operands) - 1)
    return fit(call, [tables[0], plain(values), *tables[1:]], [plain(values)], need_replication=frozenset("t"))


@rule(aten.take.default, because="an index counts through all dimensions")
def take_rule(call: OpCall) -> OpShardingRule | None:
    """`v! …, ... -> ...`"""
    source, index = plain(call.operands[0].shape, "v"), plain(call.operands[1].shape)
    whole = frozenset(f"v{at}" for at in range(len(source)))
    return fit(call, [source, index], [index], need_replication=whole)


@rule(aten.diagonal.default, aten.diag_embed.default, because="a row meets the column of its own index")
def diagonal_rule(call: OpCall) -> OpShardingRule | None:
    """`... a! b! -> ... c!`, or back."""
    result = call.results[0]
    assert result is not None
    embeds = call.target is aten.diag_embed.default
    square, flat = (result, call.operands[0]) if embeds else (call.operands[0], result)
    ndim = len(square.shape)
    first, second = (dim % ndim for dim in (call["dim1"], call["dim2"]))
    dims = plain(square.shape)
    rest = [dim for at, dim in enumerate(dims) if at not in (first, second)]
    line: list[Dim] = [*rest, ("c",) if flat.shape[-1] != 1 else ()]
    whole = frozenset({f"d{first}", f"d{second}", "c"})
    return fit(call, [line if embeds else dims], [dims if embeds else line], need_replication=whole)


@rule(aten.renorm.default, because="the norm is of all but one dimension", until="a sum of powers over the ranks")
def renorm_rule(call: OpCall) -> OpShardingRule | None:
    """`c d! -> c d!`"""
    dims = plain(call.operands[0].shape)
    (kept,) = wrap((call["dim"],), len(dims))
    return fit(call, [dims], [dims], need_replication=frozenset(f"d{at}" for at in range(len(dims)) if at != kept))
