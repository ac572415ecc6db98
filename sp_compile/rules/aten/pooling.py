"""Pooling and upsampling: the batch and the channels pass, and rows where windows lie side by side, `l` as `(m k!)`."""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem

import torch
from torch import fx

from ...placement.placements import Sharded, Size, exact_quotient, local_shape, product
from ..dims import factors, fit, plain, with_arguments
from ..local_op import Body, LocalOp
from ..op_call import OpCall
from ..registry import rule, rules_from_text
from ..rule import Dim, OpShardingRule
from .convolutions import HALO, Windows, per_dim

aten = torch.ops.aten


def local_output_size(local: LocalOp, spatial: int) -> list[int | fx.Node]:
    """The spatial dimensions of one rank's result."""
    spec = local.call.results[0]
    assert spec is not None
    return [local.size(size) for size in local_shape(spec.shape, local.results[0], local.parts)[-spatial:]]


# Pooling


@rule(
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten.max_pool2d_with_indices.default,
    aten.max_pool3d_with_indices.default,
    because="the rows of one window stay together",
    until=HALO,
)
def pooling_rule(call: OpCall) -> OpShardingRule | None:
    """`... l! -> ... m!`; `... (m k!) -> ... m` for windows side by side."""
    spatial = len(call.operands[0].shape) - len(_lead(call))
    kernel = per_dim(call["kernel_size"], spatial)
    stride = per_dim(call["stride"], spatial) if call["stride"] else kernel
    padding, dilation = per_dim(call["padding"], spatial), per_dim(call.arguments.get("dilation", 1), spatial)
    windows = [Windows(*each) for each in zip(kernel, stride, padding, dilation, strict=True)]
    return _pool(call, [windows[at].side_by_side(*ends) for at, ends in enumerate(_ends(call, spatial))], _pool_rows)


@rule(
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
    because="the rows of one window stay together",
    until="windows of unequal size, each on the rank that has most of it",
)
def adaptive_pooling_rule(call: OpCall) -> OpShardingRule | None:
    """`... (m k!) -> ... m` where the windows are equal, else `... l! -> ... m!`"""
    ends = _ends(call, len(call.operands[0].shape) - len(_lead(call)))
    return _pool(call, [exact_quotient(long, short) is not None for long, short in ends], _adaptive_rows)


def _lead(call: OpCall) -> Sequence[Size]:
    """The sizes of the dimensions that are not spatial."""
    volume = "3d" in call.overload._schema.name
    return call.operands[0].shape[: -3 if volume else -2]


def _ends(call: OpCall, spatial: int) -> list[tuple[Size, Size]]:
    result = call.results[0]
    assert result is not None
    return list(zip(call.operands[0].shape[-spatial:], result.shape[-spatial:], strict=True))


def _pool(call: OpCall, apart: Sequence[bool], body: Body) -> OpShardingRule:
    spatial = len(apart)
    lead = plain(_lead(call))
    sizes: dict[str, Size] = {}
    whole: set[str] = set()
    rows: list[Dim] = []
    made: list[Dim] = []
    for at, (long, short) in enumerate(_ends(call, spatial)):
        window = exact_quotient(long, short) or 1
        sizes |= {f"l{at}": long, f"m{at}": short, f"k{at}": window}
        rows.append(factors(sizes, f"m{at}", f"k{at}") if apart[at] else factors(sizes, f"l{at}"))
        made.append(factors(sizes, f"m{at}"))
        whole |= {f"k{at}"} if apart[at] else {f"l{at}", f"m{at}"}
    results = [[*lead, *made]] * len(call.results)
    bodies = {f"m{at}": body for at in range(spatial)}
    return fit(call, [[*lead, *rows]], results, sizes, need_replication=frozenset(whole), bodies=bodies)


def _pool_rows(local: LocalOp) -> fx.Node | tuple[fx.Node, ...]:
    return _with_global_indices(local, with_arguments(local))


def _adaptive_rows(local: LocalOp) -> fx.Node | tuple[fx.Node, ...]:
    spatial = len(local.call.operands[0].shape) - len(_lead(local.call))
    pooled = with_arguments(local, output_size=local_output_size(local, spatial))
    return _with_global_indices(local, pooled)


def _with_global_indices(local: LocalOp, pooled: fx.Node) -> fx.Node | tuple[fx.Node, ...]:
    """The second result of a maximum pool counts the rows of the whole image, through all spatial dimensions."""
    if len(local.call.results) == 1:
        return pooled
    placement, shape = local.operands[0], local.call.operands[0].shape
    assert isinstance(placement, Sharded)
    inner = product(shape[placement.dim + 1 :])
    # A local index is (outer, row, inner); the outer stride and the row are those of the whole.
    index = local.emit(getitem, pooled, 1)
    rest = local.emit(aten.remainder.Scalar, index, local.size(inner))
    row = local.emit(aten.floor_divide.Scalar, index, local.size(inner))
    block = local.size(placement.layout.local_size(local.parts))
    outer = local.emit(aten.floor_divide.Scalar, row, block)
    row = local.emit(aten.remainder.Scalar, row, block)
    row = local.emit(aten.index.Tensor, local.positions(placement), [row])
    row = local.emit(aten.add.Tensor, local.emit(aten.mul.Scalar, outer, local.size(shape[placement.dim])), row)
    return local.emit(getitem, pooled, 0), local.emit(
        aten.add.Tensor, local.emit(aten.mul.Scalar, row, local.size(inner)), rest
    )


# Upsampling


@rule(
    aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest3d.default,
    aten._upsample_nearest_exact1d.default,
    aten._upsample_nearest_exact2d.default,
    aten._upsample_nearest_exact3d.default,
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
    aten._upsample_nearest_exact1d.vec,
    aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact3d.vec,
    because="a row that is repeated by no whole number comes of positions in the whole image",
)
def nearest_rule(call: OpCall) -> OpShardingRule | None:
    """`n c l -> n c (l r!)` where rows are repeated a power of 2 times, which is exact in floating point."""
    dims, result = plain(call.operands[0].shape), call.results[0]
    assert result is not None
    made, sizes, whole = list(dims), dict[str, Size](), set[str]()
    spatial = len(dims) - 2
    scales = call.arguments.get("scale_factors") or [
        value for name, value in call.arguments.items() if name.startswith("scales")
    ]
    for at, scale in enumerate(scales or [None] * spatial, start=2):
        times = exact_quotient(result.shape[at], call.operands[0].shape[at])
        exact = isinstance(times, int) and times & (times - 1) == 0 and scale in (None, times)
        if times is not None and exact:
            sizes[f"r{at}"] = times
            own = dims[at]
            assert isinstance(own, tuple)
            made[at] = (*own, f"r{at}") if times != 1 else own
            whole.add(f"r{at}")
        else:
            made[at] = (f"u{at}",) if result.shape[at] != 1 else ()
            whole |= {f"d{at}", f"u{at}"}

    def repeat(local: LocalOp) -> fx.Node:
        if call.arguments["output_size"] is None:
            return with_arguments(local)
        return with_arguments(local, output_size=local_output_size(local, spatial))

    bodies: dict[str, Body] = {f"d{at}": repeat for at in range(2, len(dims))}
    return fit(call, [dims], [made], sizes, need_replication=frozenset(whole), bodies=bodies)


rules_from_text(
    {
        aten.upsample_linear1d.default: "n c l! -> n c x!",
        aten.upsample_bilinear2d.default: "n c h! w! -> n c y! x!",
        aten._upsample_bilinear2d_aa.default: "n c h! w! -> n c y! x!",
        aten.upsample_bicubic2d.default: "n c h! w! -> n c y! x!",
        aten._upsample_bicubic2d_aa.default: "n c h! w! -> n c y! x!",
        aten.upsample_trilinear3d.default: "n c d! h! w! -> n c z! y! x!",
    },
    until=HALO,
)

rules_from_text(
    {
        aten.grid_sampler_2d.default: "n c h! w!, n y x t! -> n c y x",
        aten.grid_sampler_3d.default: "n c d! h! w!, n z y x t! -> n c z y x",
    },
    because="a grid may point anywhere",
)
