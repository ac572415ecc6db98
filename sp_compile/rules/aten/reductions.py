"""Reductions. Over a sharded dimension each rank reduces its own rows, and the ranks' results are reduced."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from ...placement.placements import Placement, product, size_of
from ..dims import fit, plain, wrap
from ..local_op import Body, LocalOp
from ..op_call import OpCall
from ..registry import rule
from ..rule import Dim, OpShardingRule

aten = torch.ops.aten

HALF = (torch.float16, torch.bfloat16)


def widened_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over the ranks are made in: float32 for half types."""
    return torch.float32 if dtype in HALF else dtype


def reduction_rule(call: OpCall, dims: Sequence[int], keepdim: bool, body: Body | None) -> OpShardingRule:
    """`... s -> ...`: without a body the reduced dimensions have to be whole."""
    named = plain(call.operands[0].shape)
    kept: list[Dim] = [() if at in dims else dim for at, dim in enumerate(named) if keepdim or at not in dims]
    whole = frozenset(f"d{at}" for at in (() if body else dims))
    bodies = {f"d{at}": body for at in dims} if body else {}
    return fit(call, [named], [kept] * len(call.results), need_replication=whole, bodies=bodies)


def masked_sum(
    local: LocalOp,
    value: fx.Node,
    placement: Placement,
    dims: Sequence[int],
    keepdim: bool,
    dtype: torch.dtype,
) -> fx.Node:
    """The sum over `dims`, one of them sharded, of what is not padding."""
    masked = local.mask_padding(value, placement, 0)
    return local.all_reduce(local.emit(aten.sum.dim_IntList, masked, list(dims), keepdim, dtype=dtype))


def _reduced(call: OpCall) -> tuple[tuple[int, ...], bool, torch.dtype]:
    """The reduced dimensions, whether they stay as 1, and the dtype of the result."""
    result = call.results[0]
    assert result is not None
    dims = wrap(call.arguments.get("dim"), len(call.operands[0].shape))
    return dims, bool(call.arguments.get("keepdim")), result.dtype


@rule(aten.sum.dim_IntList, aten.sum.default, aten.nansum.default, aten.mean.dim, aten.mean.default)
def sum_rule(call: OpCall) -> OpShardingRule | None:
    """Half types are summed in float32; a mean divides by the global count."""
    dims, keepdim, dtype = _reduced(call)
    wide = widened_dtype(dtype)
    mean = call.target in (aten.mean.dim, aten.mean.default)

    def body(local: LocalOp) -> fx.Node:
        value = local.operand(0)
        if call.target is aten.nansum.default:
            value = local.emit(aten.masked_fill.Scalar, value, local.emit(aten.isnan.default, value), 0)
        total = masked_sum(local, value, local.operands[0], dims, keepdim, wide)
        if mean:
            count = local.size(product([call.operands[0].shape[at] for at in dims]))
            total = local.emit(aten.div.Tensor, total, count)
        return local.emit(aten._to_copy.default, total, dtype=dtype) if wide != dtype else total

    return reduction_rule(call, dims, keepdim, body)


@rule(aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
def count_rule(call: OpCall) -> OpShardingRule | None:
    """A sum of what is not 0."""
    dims, keepdim, dtype = _reduced(call)

    def body(local: LocalOp) -> fx.Node:
        counted = local.emit(aten.ne.Scalar, local.operand(0), 0)
        return masked_sum(local, counted, local.operands[0], dims, keepdim, dtype)

    return reduction_rule(call, dims, keepdim, body)


@rule(aten.all.default, aten.all.dim, aten.all.dims, aten.any.default, aten.any.dim, aten.any.dims)
def truth_rule(call: OpCall) -> OpShardingRule | None:
    """A maximum, or a minimum, of 0 and 1."""
    dims, keepdim, dtype = _reduced(call)
    kind, reduce, fill = "min", aten.amin.default, 1
    if call.target in (aten.any.default, aten.any.dim, aten.any.dims):
        kind, reduce, fill = "max", aten.amax.default, 0

    def body(local: LocalOp) -> fx.Node:
        truth = local.emit(aten.to.dtype, local.emit(aten.ne.Scalar, local.operand(0), 0), torch.int32)
        truth = local.mask_padding(truth, local.operands[0], fill)
        return local.emit(aten.to.dtype, local.all_reduce(local.emit(reduce, truth, list(dims), keepdim), kind), dtype)

    return reduction_rule(call, dims, keepdim, body)


def _lowest(dtype: torch.dtype) -> float:
    return -float("inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def _highest(dtype: torch.dtype) -> float:
    return float("inf") if dtype.is_floating_point else torch.iinfo(dtype).max


@rule(
    aten.amax.default,
    aten.max.default,
    aten.amin.default,
    aten.min.default,
    until="a maximum of booleans over the ranks",
)
def extremum_rule(call: OpCall) -> OpShardingRule | None:
    dims, keepdim, dtype = _reduced(call)
    if dtype == torch.bool or dtype.is_complex:
        return reduction_rule(call, dims, keepdim, None)
    largest = call.target in (aten.amax.default, aten.max.default)
    reduce, beaten = (aten.amax.default, aten.lt.Tensor) if largest else (aten.amin.default, aten.gt.Tensor)
    fill = _lowest(dtype) if largest else _highest(dtype)

    def body(local: LocalOp) -> fx.Node:
        value = local.operand(0)
        padded = local.mask_padding(local.emit(aten.detach.default, value), local.operands[0], fill)
        extremum = local.all_reduce(local.emit(reduce, padded, dims, True), "max" if largest else "min")
        if dtype.is_floating_point:
            extremum = _with_gradient(local, value, extremum, beaten, dims)
        return extremum if keepdim else local.emit(aten.squeeze.dims, extremum, dims)

    return reduction_rule(call, dims, keepdim, body)


def _with_gradient(
    local: LocalOp,
    value: fx.Node,
    extremum: fx.Node,
    beaten: Callable[..., object],
    dims: Sequence[int],
) -> fx.Node:
    """`extremum`, whose gradient goes in equal parts to all rows that attain it, on whichever rank they are.

    Adds `sum(x - x.detach()) / count` over those rows: 0, or nan where there is a nan. An infinite row has no part.
    """
    placement = local.operands[0]
    frozen = local.emit(aten.detach.default, value)
    lost = local.emit(beaten, frozen, extremum)
    infinite = local.emit(aten.isinf.default, frozen)
    difference = local.emit(
        aten.masked_fill.Scalar,
        local.emit(aten.sub.Tensor, value, frozen),
        local.emit(aten.logical_or.default, lost, infinite),
        0,
    )
    total = local.emit(aten.sum.dim_IntList, local.mask_padding(difference, placement, 0), dims, True)
    attained = local.mask_padding(local.emit(aten.logical_not.default, lost), placement, 0)
    dtype = local.call.operands[0].dtype
    wide = widened_dtype(dtype)
    count = local.emit(aten.sum.dim_IntList, attained, dims, True, dtype=wide)
    sums = local.all_reduce(local.emit(aten.stack.default, [local.emit(aten.to.dtype, total, wide), count]))
    share = local.emit(
        aten.div.Tensor,
        local.emit(aten.select.int, sums, 0, 0),
        local.emit(aten.detach.default, local.emit(aten.select.int, sums, 0, 1)),
    )
    return local.emit(aten.add.Tensor, extremum, local.emit(aten.to.dtype, share, dtype))


def _root(local: LocalOp, variance: fx.Node) -> fx.Node:
    """The square root of what is not negative, with the gradient 0 at 0, as that of `std` is."""
    none = local.emit(aten.eq.Scalar, variance, 0)
    root = local.emit(aten.sqrt.default, local.emit(aten.masked_fill.Scalar, variance, none, 1))
    return local.emit(aten.masked_fill.Scalar, root, none, 0)


@rule(
    aten.var.correction,
    aten.std.correction,
    aten.var_mean.correction,
    aten.std_mean.correction,
    until="complex numbers: the square of an absolute value",
)
def variance_rule(call: OpCall) -> OpShardingRule | None:
    """The mean first, then the mean square of what differs from it: exact where `E[x^2] - E[x]^2` cancels."""
    dims, keepdim, dtype = _reduced(call)
    wide, size = widened_dtype(dtype), product([call.operands[0].shape[at] for at in dims])
    correction = 1 if call["correction"] is None else call["correction"]
    freedom = size - correction
    # Without degrees of freedom gradients are neither those of a formula nor alike from op to op.
    positive = freedom > 0 if isinstance(size, int) else correction in (0, 1)
    if call.operands[0].dtype.is_complex or not positive:
        return reduction_rule(call, dims, keepdim, None)
    roots = call.target in (aten.std.correction, aten.std_mean.correction)

    def body(local: LocalOp) -> fx.Node | tuple[fx.Node, ...]:
        value, placement = local.emit(aten.to.dtype, local.operand(0), wide), local.operands[0]
        total = masked_sum(local, value, placement, dims, True, wide)
        mean = local.emit(aten.div.Tensor, total, local.size(size))
        # The sum of `x - mean` is 0, and so is the mean's gradient by way of the squares: no rank sends its part.
        fixed = local.emit(aten.detach.default, mean)
        square = local.emit(aten.pow.Tensor_Scalar, local.emit(aten.sub.Tensor, value, fixed), 2)
        spread = masked_sum(local, square, placement, dims, keepdim, wide)
        # Where that gradient is differentiated again, this 0 has what is missing.
        shift = local.emit(aten.pow.Tensor_Scalar, local.emit(aten.sub.Tensor, mean, fixed), 2)
        shift = local.emit(
            aten.mul.Tensor, shift if keepdim else local.emit(aten.squeeze.dims, shift, dims), local.size(size)
        )
        spread = local.emit(aten.sub.Tensor, spread, shift)
        divisor = freedom if isinstance(size, int) else local.size(size_of(freedom))
        variance = local.emit(aten.div.Tensor, spread, divisor)
        made = local.emit(aten.to.dtype, _root(local, variance) if roots else variance, dtype)
        if len(call.results) == 1:
            return made
        kept = mean if keepdim else local.emit(aten.squeeze.dims, mean, dims)
        return made, local.emit(aten.to.dtype, kept, dtype)

    return reduction_rule(call, dims, keepdim, body)


@rule(
    aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim,
    until="a sum of other powers than 1 and 2 over the ranks, and its root",
)
def norm_rule(call: OpCall) -> OpShardingRule | None:
    """`sqrt(sum |x|^2)`, whose gradient at 0 is 0; or `sum |x|`."""
    dims, keepdim, dtype = _reduced(call)
    order = call.arguments.get("ord", call.arguments.get("p"))
    order = 2 if order is None else order
    if order not in (1, 2) or call.operands[0].dtype.is_complex:
        return reduction_rule(call, dims, keepdim, None)
    wide = widened_dtype(dtype)

    def body(local: LocalOp) -> fx.Node:
        value = local.emit(aten.to.dtype, local.operand(0), wide)
        if order == 1:
            total = masked_sum(local, local.emit(aten.abs.default, value), local.operands[0], dims, keepdim, wide)
        else:
            square = masked_sum(local, local.emit(aten.square.default, value), local.operands[0], dims, keepdim, wide)
            zero = local.emit(aten.eq.Scalar, square, 0)
            root = local.emit(aten.sqrt.default, local.emit(aten.masked_fill.Scalar, square, zero, 1))
            total = local.emit(aten.masked_fill.Scalar, root, zero, 0)
        return local.emit(aten.to.dtype, total, dtype)

    return reduction_rule(call, dims, keepdim, body)


@rule(aten.logsumexp.default, until="complex numbers, and integers, which become float")
def logsumexp_rule(call: OpCall) -> OpShardingRule | None:
    dims, keepdim, dtype = _reduced(call)
    wide = widened_dtype(dtype)
    if not call.operands[0].dtype.is_floating_point:
        return reduction_rule(call, dims, keepdim, None)

    def body(local: LocalOp) -> fx.Node:
        value, placement = local.emit(aten.to.dtype, local.operand(0), wide), local.operands[0]
        padded = local.mask_padding(local.emit(aten.detach.default, value), placement, -float("inf"))
        highest = local.all_reduce(local.emit(aten.amax.default, padded, dims, True), "max")
        shift = local.emit(aten.masked_fill.Scalar, highest, local.emit(aten.isinf.default, highest), 0)
        powers = local.emit(aten.exp.default, local.emit(aten.sub.Tensor, value, shift))
        total = masked_sum(local, powers, placement, dims, keepdim, wide)
        back = shift if keepdim else local.emit(aten.squeeze.dims, shift, dims)
        made = local.emit(aten.add.Tensor, local.emit(aten.log.default, total), back)
        return local.emit(aten.to.dtype, made, dtype)

    return reduction_rule(call, dims, keepdim, body)


@rule(
    aten.argmax.default,
    aten.argmin.default,
    aten.max.dim,
    aten.min.dim,
    aten.aminmax.default,
    until="the extremum over the ranks, and the first place of those that attain it",
)
@rule(aten.prod.default, aten.prod.dim_int, until="a product over the ranks")
@rule(aten.median.dim, aten.nanmedian.dim, aten.mode.default, aten.kthvalue.default, because="rows are ranked by value")
def whole_reduction_rule(call: OpCall) -> OpShardingRule | None:
    """What is reduced has to be whole."""
    dims, keepdim, _ = _reduced(call)
    return reduction_rule(call, dims, keepdim, None)


@rule(aten.cosine_similarity.default, until="three sums over the ranks: of x y, x x and y y")
def cosine_rule(call: OpCall) -> OpShardingRule | None:
    """`... c!, ... c! -> ...`, which broadcast."""
    result = call.results[0]
    assert result is not None
    ndim = max(len(spec.shape) for spec in call.operands)
    (at,) = wrap((call["dim"],), ndim)
    kept = plain(result.shape)
    dims: list[Dim] = [*kept[:at], ("c",), *kept[at:]]
    operands: list[list[Dim]] = []
    for spec in call.operands:
        own = dims[ndim - len(spec.shape) :]
        operands.append([() if size == 1 else dim for dim, size in zip(own, spec.shape, strict=True)])
    return fit(call, operands, [kept], need_replication=frozenset("c"))
