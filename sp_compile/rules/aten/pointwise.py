"""Pointwise ops: every dimension passes, operands broadcast. Most are known by `torch.Tag.pointwise`."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..dims import broadcast_factors, fit, plain
from ..op_call import OpCall
from ..registry import rule
from ..rule import OpShardingRule

aten = torch.ops.aten


@rule(
    aten.add.Tensor,
    aten._to_copy.default,
    aten.to.dtype,
    aten.detach.default,
    aten.masked_fill.Tensor,
    aten.floor_divide.default,
    aten.hardswish.default,
    aten.threshold.default,
    aten._prelu_kernel.default,
    aten.complex.default,
    aten.polar.default,
    aten._conj.default,
    aten.log_sigmoid.default,
    aten.where.Scalar,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
)
def pointwise_rule(call: OpCall) -> OpShardingRule | None:
    """`... , ... -> ...` with broadcasting, for any number of operands."""
    result = call.results[0]
    if result is None or any(spec is None or spec.shape != result.shape for spec in call.results):
        return None
    operands = [broadcast_factors(spec.shape, result.shape) for spec in call.operands]
    known = [dims for dims in operands if dims is not None]
    if len(known) < len(operands):
        return None
    return fit(call, known, [plain(result.shape)] * len(call.results))


@rule(aten.clone.default, aten.contiguous.default, aten.alias.default)
def copy_rule(call: OpCall) -> OpShardingRule | None:
    """As pointwise, and moves rows only."""
    passed = pointwise_rule(call)
    return passed and replace(passed, movement=True)


@rule(
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.zero.default,
    aten.fill.Scalar,
    aten.fill.Tensor,
)
def like_rule(call: OpCall) -> OpShardingRule | None:
    """The shape of the operand matters, its values do not."""
    return pointwise_rule(call)


@rule(aten.zeros.default, aten.ones.default, aten.full.default)
def filled_rule(call: OpCall) -> OpShardingRule | None:
    """` -> ...`: a rank makes its rows."""
    (result,) = call.results
    return fit(call, [], [plain(result.shape)], shape_argument="size") if result is not None else None


@rule(
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    because="of the operand only dtype and device matter",
)
def new_rule(call: OpCall) -> OpShardingRule | None:
    """`~ -> ...`: only dtype and device of the operand matter; the result has the size that it is told."""
    (source,), result = call.operands, call.results[0]
    if result is None:
        return None
    return fit(
        call,
        [plain(source.shape, "s")],
        [plain(result.shape)],
        need_replication=frozenset(f"s{at}" for at in range(len(source.shape))),
        metadata=frozenset({0}),
        shape_argument="size",
    )


@rule(aten.isin.Tensor_Tensor, because="every value is compared with all tests")
def isin_rule(call: OpCall) -> OpShardingRule | None:
    """`..., t! -> ...`"""
    elements, tests = call.operands
    return fit(
        call,
        [plain(elements.shape), plain(tests.shape, "t")],
        [plain(elements.shape)],
        need_replication=frozenset(f"t{at}" for at in range(len(tests.shape))),
    )
