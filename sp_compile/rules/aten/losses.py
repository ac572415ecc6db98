"""Losses. A mean over a sharded dimension is two sums, of the losses and of their weights, reduced together."""

from __future__ import annotations

import torch
from torch import fx

from ...placement.placements import Sharded, product
from ..dims import broadcast_factors, fit, plain
from ..local_op import Body, LocalOp
from ..op_call import OpCall
from ..registry import rule
from ..rule import Dim, OpShardingRule
from .reductions import HALF, widened_dtype

aten = torch.ops.aten

_NONE, _MEAN, _SUM = 0, 1, 2  # at::Reduction


@rule(
    aten.cross_entropy_loss.default,
    aten.nll_loss_nd.default,
    aten.nll_loss.default,
    until="sharded classes: the greatest score and a sum of powers over the ranks (vocabulary-parallel)",
)
def class_loss_rule(call: OpCall) -> OpShardingRule | None:
    """`n c! …, n …, c! -> n …`, or a scalar. Padded rows take `ignore_index` as their target."""
    scores, target = call.operands[0].shape, call.operands[1].shape
    dims = plain(scores)
    classes = 0 if len(dims) == 1 else 1
    positions = [dim for at, dim in enumerate(dims) if at != classes]
    indices = call.operands[1].dtype in (torch.int64, torch.uint8, torch.int32)
    if not indices and len(target) != len(scores):
        return None
    body = _class_index_body if indices else _probability_body
    reduction = call["reduction"]
    bodies: dict[str, Body] = {} if reduction == _NONE else {f: body for dim in positions for f in _names(dim)}
    return fit(
        call,
        [dims, positions if indices else dims, [dims[classes]]][: len(call.operands)],
        [positions if reduction == _NONE else []],
        need_replication=frozenset({f"d{classes}"}),
        bodies=bodies,
    )


def _names(dim: Dim) -> tuple[str, ...]:
    assert isinstance(dim, tuple)
    return dim


def _widened(local: LocalOp, value: fx.Node) -> fx.Node:
    half = local.call.operands[0].dtype in HALF
    return local.emit(aten._to_copy.default, value, dtype=torch.float32) if half else value


def _narrowed(local: LocalOp, value: fx.Node) -> fx.Node:
    """A widened loss in the dtype of the op's result, which under autocast is not that of the operand."""
    (result,) = local.call.results
    assert result is not None
    return local.emit(aten._to_copy.default, value, dtype=result.dtype) if result.dtype in HALF else value


def _class_index_body(local: LocalOp) -> fx.Node:
    call, weighted = local.call, "weight" in local.call.operand_names
    ignored = call["ignore_index"]
    target = local.emit(aten.to.dtype, local.operand(1), torch.int64)
    target = local.mask_padding(target, local.operands[1], ignored)
    scores = _widened(local, local.operand(0))
    weight = _widened(local, local.operand(2)) if weighted else None
    smoothing = [call["label_smoothing"]] if "label_smoothing" in call.arguments else []
    total = local.emit(call.target, scores, target, weight, _SUM, ignored, *smoothing)
    if call["reduction"] == _SUM:
        return _narrowed(local, local.all_reduce(total))
    counted = local.emit(aten.ne.Scalar, target, ignored)
    if weighted:
        clamped = local.emit(aten.masked_fill.Scalar, target, local.emit(aten.logical_not.default, counted), 0)
        weights = local.emit(aten.index.Tensor, weight, [clamped])
        counted = local.emit(aten.mul.Tensor, weights, counted)
    count = local.emit(aten.sum.default, local.emit(aten.to.dtype, counted, widened_dtype(call.operands[0].dtype)))
    sums = local.all_reduce(local.emit(aten.stack.default, [total, count]))
    mean = local.emit(aten.div.Tensor, *(local.emit(aten.select.int, sums, 0, index) for index in range(2)))
    return _narrowed(local, mean)


def _probability_body(local: LocalOp) -> fx.Node:
    """Targets are probabilities: a row of zeros has no loss, and a mean is over all rows."""
    call = local.call
    target = local.mask_padding(_widened(local, local.operand(1)), local.operands[1], 0)
    weight = _widened(local, local.operand(2)) if len(call.operands) == 3 else None
    scores = _widened(local, local.operand(0))
    losses = local.emit(call.target, scores, target, weight, _NONE, -100, call["label_smoothing"])
    placement = local.operands[0]
    assert isinstance(placement, Sharded)
    row = Sharded(placement.dim - (placement.dim > 1), placement.layout)
    # Label smoothing gives a row of zeros a loss again.
    total = local.all_reduce(local.emit(aten.sum.default, local.mask_padding(losses, row, 0)))
    if call["reduction"] == _MEAN:
        shape = call.operands[0].shape
        total = local.emit(aten.div.Tensor, total, local.size(product([*shape[:1], *shape[2:]])))
    return _narrowed(local, total)


@rule(
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.soft_margin_loss.default,
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_with_logits.default,
)
def elementwise_loss_rule(call: OpCall) -> OpShardingRule | None:
    """`..., ... -> ...`, or a scalar: the losses without their padding, summed over the ranks.

    Only weights may broadcast: torch itself gives other gradients than those of the broadcast operands.
    """
    if call.operands[0].shape != call.operands[1].shape:
        return None
    shape = call.operands[0].shape
    operands = [broadcast_factors(spec.shape, shape) for spec in call.operands]
    known = [dims for dims in operands if dims is not None]
    if len(known) < len(operands):
        return None
    reduction = call["reduction"]
    if reduction == _NONE:
        return fit(call, known, [plain(shape)])

    def body(local: LocalOp) -> fx.Node:
        arguments = {**call.arguments, "reduction": _NONE}
        arguments |= {name: _widened(local, local.operand(at)) for at, name in enumerate(call.operand_names)}
        losses = local.emit(call.target, *arguments.values())
        total = local.all_reduce(local.emit(aten.sum.default, local.mask_padding(losses, local.operands[0], 0)))
        if reduction == _MEAN:
            total = local.emit(aten.div.Tensor, total, local.size(product(shape)))
        return _narrowed(local, total)

    return fit(call, known, [[]], bodies={f: body for dim in plain(shape) for f in _names(dim)})
