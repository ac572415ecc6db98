"""Normalisations: the normalised dimensions have to be whole, the others pass."""

from __future__ import annotations

import torch

from ..dims import fit, plain
from ..op_call import OpCall
from ..registry import rule
from ..rule import OpShardingRule
from .views import one_whole_dim_rule

aten = torch.ops.aten


@rule(
    aten.layer_norm.default,
    aten.native_layer_norm.default,
    aten.rms_norm.default,
    aten._fused_rms_norm.default,
    until="statistics summed over the ranks, as `group_norm` has them",
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


rule(
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    aten._safe_softmax.default,
    because="it mixes all rows; what lies between it and the next contraction is an attention site",
    until="the greatest row and the sum of powers over the ranks, outside attention",
)(one_whole_dim_rule)


@rule(aten._weight_norm_interface.default, because="a row is divided by its own norm")
def weight_norm_rule(call: OpCall) -> OpShardingRule | None:
    """`o i!, o -> o i!, o`"""
    dims = plain(call.operands[0].shape)
    whole = frozenset(f"d{at}" for at in range(len(dims)) if at != call["dim"] % len(dims))
    thin = [
        [dim if size != 1 else () for dim, size in zip(dims, spec.shape, strict=True)]
        for spec in (call.operands[1], call.results[1])
        if spec is not None
    ]
    return fit(call, [dims, thin[0]], [dims, thin[1]], need_replication=whole)
