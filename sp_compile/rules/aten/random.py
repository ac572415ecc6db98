"""Dropout. A mask drawn alike on every rank would be a silent flaw: each rank draws for its own rows."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from ...ops import random_ops
from ...placement.placements import Sharded
from ..local_op import LocalOp
from ..op_call import OpCall
from ..registry import rule
from ..rule import OpShardingRule
from .pointwise import pointwise_rule

aten = torch.ops.aten


@rule(aten.dropout.default)
def dropout_rule(call: OpCall) -> OpShardingRule | None:
    """`... -> ...`; `rng="exact"` draws the mask of the whole value on every rank, and cuts it."""
    passed, p = pointwise_rule(call), call["p"]
    if passed is None or not call["train"] or p == 0 or p == 1:
        return passed

    def drop(local: LocalOp) -> fx.Node:
        value, placement = local.operand(0), local.operands[0]
        assert isinstance(placement, Sharded)
        spec = call.operands[0]
        if local.rng == "exact":
            shape = [local.size(size) for size in spec.shape]
            whole = local.emit(aten.empty.memory_format, shape, dtype=spec.dtype, device=spec.device)
            kept = local.shard(local.emit(aten.bernoulli.p, whole, 1 - p), placement)
        else:
            seed = local.emit(aten.randint.low, 0, 2**62, [1], dtype=torch.int64, device=spec.device)
            like = local.emit(aten.detach.default, value)
            kept = local.emit(random_ops.bernoulli, like, seed, local.rank(), 1 - p)
        noise = local.emit(aten.div.Scalar, kept, 1 - p)
        return local.emit(aten.mul.Tensor, value, noise)

    return replace(passed, bodies=dict.fromkeys(passed.sizes, drop))
