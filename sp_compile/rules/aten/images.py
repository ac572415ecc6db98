"""Images taken to patches, patches to channels, and edges padded by what is there."""

from __future__ import annotations

import torch
from torch import fx

from ...placement.placements import Size, exact_quotient
from ..dims import factors, fit, local_count, plain, with_arguments
from ..local_op import Body, LocalOp
from ..op_call import OpCall
from ..registry import rule, rules_from_text
from ..rule import Dim, OpShardingRule
from .convolutions import HALO, Windows, per_dim
from .pooling import local_output_size

aten = torch.ops.aten


# Padding by what is there


@rule(
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
    until="the ends made by the ranks that have them, as streams laid to both sides",
)
def edge_pad_rule(call: OpCall) -> OpShardingRule | None:
    """`l! -> p!` for a padded dimension; others pass."""
    dims, result = plain(call.operands[0].shape), call.results[0]
    assert result is not None
    made, whole, pads = list(dims), set[str](), list(call["padding"])
    for at in range(len(dims) - len(pads) // 2, len(dims)):
        pair = pads[2 * (len(dims) - 1 - at) :][:2]
        if any(amount != 0 for amount in pair):
            made[at] = (f"p{at}",) if result.shape[at] != 1 else ()
            whole |= {f"d{at}", f"p{at}"}
    return fit(call, [dims], [made], need_replication=frozenset(whole))


# Patches and channels


@rule(aten.im2col.default, aten.col2im.default, because="the pixels of one window stay together", until=HALO)
def patches_rule(call: OpCall) -> OpShardingRule | None:
    """`n c (p k!) (q l!) -> n (c k! l!) (p q)` or back, for windows side by side; else only batch and channels pass."""
    folds, result = call.target is aten.col2im.default, call.results[0]
    assert result is not None
    image, columns = (result, call.operands[0]) if folds else (call.operands[0], result)
    kernels, lead = per_dim(call["kernel_size"], 2), plain(image.shape[:-3])
    arguments = (per_dim(call[name], 2) for name in ("stride", "padding", "dilation"))
    sizes: dict[str, Size] = {"c": image.shape[-3], "k": kernels[0], "l": kernels[1]}
    apart = True
    for name, kernel, length, *rest in zip("pq", kernels, image.shape[-2:], *arguments, strict=True):
        sizes[name] = exact_quotient(length, kernel) or 1
        apart = apart and Windows(kernel, *rest).side_by_side(length, sizes[name])
    whole = frozenset("kl")
    rows: list[Dim] = [factors(sizes, "p", "k"), factors(sizes, "q", "l")]
    count: Dim = factors(sizes, "p", "q")
    if not apart:
        sizes |= {"h": image.shape[-2], "w": image.shape[-1], "m": columns.shape[-1]}
        rows, count = [factors(sizes, "h"), factors(sizes, "w")], factors(sizes, "m")
        whole |= frozenset("hwm")
    pixels: list[Dim] = [*lead, factors(sizes, "c"), *rows]
    patches: list[Dim] = [*lead, factors(sizes, "c", "k", "l"), count]

    def fold(local: LocalOp) -> fx.Node:
        return with_arguments(local, output_size=local_output_size(local, 2))

    bodies: dict[str, Body] = {"p": fold, "q": fold} if folds else {}
    ends = (patches, pixels) if folds else (pixels, patches)
    return fit(call, [ends[0]], [ends[1]], sizes, need_replication=whole, bodies=bodies)


rules_from_text(
    {
        aten.pixel_shuffle.default: "... (c a! b!) h w -> ... c (h a!) (w b!)",
        aten.pixel_unshuffle.default: "... c (h a!) (w b!) -> ... (c a! b!) h w",
    },
    because="the pixels of one square stay together",
)


@rule(aten.channel_shuffle.default)
def channel_shuffle_rule(call: OpCall) -> OpShardingRule | None:
    """`n (g c) ... -> n (c g) ...`"""
    dims, groups = plain(call.operands[0].shape), call["groups"]
    depth = exact_quotient(call.operands[0].shape[1], groups)
    if depth is None:
        return None
    sizes: dict[str, Size] = {"g": groups, "c": depth}
    placed, made = list(dims), list(dims)
    placed[1], made[1] = factors(sizes, "g", "c"), factors(sizes, "c", "g")

    def shuffle(local: LocalOp) -> fx.Node:
        return with_arguments(local, groups=local_count(local, local.operands[0], groups, depth))

    return fit(call, [placed], [made], sizes, movement=True, bodies={"g": shuffle})
