"""Normalisations: the normalised dimensions have to be whole, the others pass."""

from __future__ import annotations

import torch

from ..rule import OpCall, OpShardingRule
from .dims import fit, plain
from .registry import rule
from .views import one_whole_dim_rule

aten = torch.ops.aten


@rule(
    aten.layer_norm.default,
    aten.native_layer_norm.default,
    aten.rms_norm.default,
    aten._fused_rms_norm.default,
)
def last_dims_rule(call: OpCall) -> OpShardingRule | None:
    """`... d!, d!, d! -> ... d!, ... 1, ... 1`: weight and bias span the last dimensions, statistics have them as 1."""
    dims, count = plain(call.operands[0].shape), len(call["normalized_shape"])
    first = len(dims) - count
    results = [
        [dim if at < first or spec.shape[at] != 1 else () for at, dim in enumerate(dims)]
        for spec in call.results
        if spec is not None
    ]
    whole = frozenset(f"d{at}" for at in range(first, len(dims)))
    return fit(call, [dims, *[dims[first:]] * (len(call.operands) - 1)], results, need_replication=whole)


@rule(aten.group_norm.default, aten.native_group_norm.default)
def group_norm_rule(call: OpCall) -> OpShardingRule | None:
    """`n c! …, c!, c! -> n c! …, n g!, n g!`

    For the native one, which is told the batch size, the batch has to be whole as well.
    """
    dims = plain(call.operands[0].shape)
    results = [
        dims if len(spec.shape) == len(dims) and index == 0 else [dims[0], ("g",) if spec.shape[1] != 1 else ()]
        for index, spec in enumerate(call.results)
        if spec is not None
    ]
    whole = {"g", *(f"d{at}" for at in range(1, len(dims)))}
    if call.target is aten.native_group_norm.default:
        whole.add("d0")
    return fit(call, [dims, *[[dims[1]]] * (len(call.operands) - 1)], results, need_replication=frozenset(whole))


rule(
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    aten._safe_softmax.default,
)(one_whole_dim_rule)
