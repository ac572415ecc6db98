"""Norms whose statistics run over rows: batch norm, which instance norm becomes, and group norm.

Over a sharded dimension the mean is reduced first and then the mean square of what differs from it, both in float32 for
half types: `E[x^2] - E[x]^2` would cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem

import torch
from torch import fx

from ...placement.placements import Placement, Sharded, Size, exact_quotient, product, size_of
from ..dims import factors, fit, local_count, plain, with_arguments
from ..local_op import Body, LocalOp
from ..op_call import OpCall
from ..registry import rule
from ..rule import Dim, OpShardingRule, factors_of
from .reductions import masked_sum, widened_dtype

aten = torch.ops.aten


def _normalised(
    local: LocalOp, value: fx.Node, placement: Placement, dims: Sequence[int], count: Size, eps: float
) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
    """`(x - mean) / sqrt(var + eps)`; and mean, `count * var` and `1 / sqrt(var + eps)`, with `dims` as 1."""
    dtype = local.call.operands[0].dtype
    wide = widened_dtype(dtype)
    x = local.emit(aten.to.dtype, value, wide)
    total = masked_sum(local, x, placement, dims, True, wide)
    mean = local.replicate(local.emit(aten.div.Tensor, total, local.size(count)))
    centred = local.emit(aten.sub.Tensor, x, mean)
    square = local.emit(aten.pow.Tensor_Scalar, centred, 2)
    spread = masked_sum(local, square, placement, dims, True, wide)
    variance = local.emit(aten.div.Tensor, spread, local.size(count))
    scale = local.replicate(local.emit(aten.rsqrt.default, local.emit(aten.add.Scalar, variance, eps)))
    made = local.emit(aten.mul.Tensor, centred, scale)
    return made, local.emit(aten.detach.default, mean), spread, scale


def _affine(local: LocalOp, value: fx.Node, behind: int) -> fx.Node:
    """`value * weight + bias`, channels at the dimension with `behind` others behind it, as the op's dtype."""
    for name, combine in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
        if name in local.call.operand_names:
            vector = local.operand(local.call.operand_names.index(name))
            value = local.emit(combine, value, local.emit(aten.reshape.default, vector, [-1, *[1] * behind]))
    result = local.call.results[0]
    assert result is not None
    return local.emit(aten.to.dtype, value, result.dtype)


@rule(
    aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_no_training.default,
)
def batch_norm_rule(call: OpCall) -> OpShardingRule | None:
    """`n c …, c, c, c, c -> n c …, c, c, c, c`: in training, the statistics are those of all ranks' rows."""
    shape = call.operands[0].shape
    dims = plain(shape)
    per_channel = [[dims[1]] if spec and spec.shape == shape[1:2] else [()] for spec in call.results[1:]]
    # Without training there are no statistics to make, and what stands for them is empty.
    training = call.arguments.get("training", False)
    bodies: dict[str, Body] = {f"d{at}": _batch_norm for at in range(len(dims)) if at != 1}
    bodies = bodies if training else {factor: _in_evaluation for dim in dims for factor in factors_of(dim)}
    return fit(call, [dims, *[[dims[1]]] * (len(call.operands) - 1)], [dims, *per_channel], bodies=bodies)


def _in_evaluation(local: LocalOp) -> tuple[fx.Node, ...]:
    """The op on local rows: contiguous, and so is the gradient, as that of a slice. Where a rank has but one row, the
    backward on the CPU (torch 2.13) may take one order in memory for another."""
    made = with_arguments(local, input=local.emit(aten.contiguous.default, local.operand(0)))
    value, *others = (local.emit(getitem, made, index) for index in range(len(local.call.results)))
    return local.emit(aten.slice.Tensor, value), *others


def _batch_norm(local: LocalOp) -> tuple[fx.Node, ...]:
    call, shape = local.call, local.call.operands[0].shape
    others = [at for at in range(len(shape)) if at != 1]
    count = product([shape[at] for at in others])
    made, mean, spread, scale = _normalised(local, local.operand(0), local.operands[0], others, count, call["eps"])
    unbiased = local.emit(aten.div.Tensor, spread, local.size(size_of(count - 1)))
    statistics = [mean, scale, mean, unbiased][: len(call.results) - 1]
    results = [_affine(local, made, len(shape) - 2)]
    for position, (statistic, spec) in enumerate(zip(statistics, call.results[1:], strict=True)):
        assert spec is not None
        new = local.emit(aten.squeeze.dims, local.emit(aten.detach.default, statistic), others)
        if position >= 2:
            old = local.operand(call.operand_names.index(("running_mean", "running_var")[position - 2]))
            kept = local.emit(aten.mul.Scalar, old, 1 - call["momentum"])
            new = local.emit(aten.add.Tensor, kept, local.emit(aten.mul.Scalar, new, call["momentum"]))
        results.append(local.emit(aten.to.dtype, new, spec.dtype))
    return tuple(results)


@rule(
    aten.group_norm.default,
    because="the channels of a group are normalised together",
)
def group_norm_rule(call: OpCall) -> OpShardingRule | None:
    """`n (g c!) …, (g c!), (g c!) -> n (g c!) …`: groups pass, rows have their statistics reduced."""
    shape, groups = call.operands[0].shape, size_of(call["num_groups"])
    depth = exact_quotient(shape[1], groups)
    if depth is None:
        return None
    dims = plain(shape)
    sizes: dict[str, Size] = {"g": groups, "c": depth}
    dims[1] = factors(sizes, "g", "c")

    def fewer_groups(local: LocalOp) -> fx.Node:
        return with_arguments(local, num_groups=local_count(local, local.operands[0], groups, depth))

    bodies: dict[str, Body] = {f"d{at}": _group_norm for at in range(2, len(dims))}
    return fit(
        call,
        [dims, *[[dims[1]]] * (len(call.operands) - 1)],
        [dims],
        sizes,
        need_replication=frozenset("c"),
        bodies={**bodies, "g": fewer_groups},
    )


def _group_norm(local: LocalOp) -> fx.Node:
    call, shape = local.call, local.call.operands[0].shape
    groups, placement = call["num_groups"], local.operands[0]
    assert isinstance(placement, Sharded)
    grouped = local.emit(aten.unflatten.int, local.operand(0), 1, [groups, -1])
    rows = Sharded(placement.dim + 1, placement.layout)
    count = exact_quotient(product(shape[1:]), groups)
    assert count is not None
    made, *_ = _normalised(local, grouped, rows, range(2, len(shape) + 1), count, call["eps"])
    return _affine(local, local.emit(aten.flatten.using_ints, made, 1, 2), len(shape) - 2)


@rule(
    aten.native_group_norm.default,
    until="a body that tells it the local batch and length, and reduces its statistics, as `group_norm` has",
)
def native_group_norm_rule(call: OpCall) -> OpShardingRule | None:
    """`n! c! …, c!, c! -> n! c! …, n! g!, n! g!`"""
    dims = plain(call.operands[0].shape)
    statistics: list[list[Dim]] = [
        [dims[0], ("g",) if spec.shape[1] != 1 else ()] for spec in call.results[1:] if spec is not None
    ]
    whole = frozenset({"g", *(f"d{at}" for at in range(len(dims)))})
    vectors = [[dims[1]]] * (len(call.operands) - 1)
    return fit(call, [dims, *vectors], [dims, *statistics], need_replication=whole)
