"""Convolutions: `n (g i) l!, (g o) i k!, +(g o) -> n (g o) m!`.

Where the windows lie side by side (kernel = stride, no padding: a patch embedding, or a kernel of 1) the spatial
dimensions pass as well, `l` as `(m k!)`; so do those of such a transposed convolution, `l -> (l k!)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..rule import Body, Dim, LocalOp, OpCall, OpShardingRule
from ..sharding import Size, exact_quotient, size_of
from .contractions import sum_over_ranks
from .dims import factors, fit, local_count, with_arguments
from .registry import rule

aten = torch.ops.aten

HALO = "a halo: the rows that a window reads of the neighbouring ranks"


def per_dim(given: Any, count: int) -> list[Size]:
    """An argument such as a stride, for each spatial dimension: one number, or none given for the default, is all."""
    values = [given] if isinstance(given, int) else list(given)
    return [size_of(value) for value in (values * count if len(values) == 1 else values)]


@dataclass(frozen=True)
class Windows:
    """How one spatial dimension is read in windows."""

    kernel: Size
    stride: Size
    padding: Size
    dilation: Size

    def side_by_side(self, length: Size, count: Size) -> bool:
        """Whether `count` windows cover `length` rows exactly, without overlap."""
        apart = self.stride == self.kernel and self.padding == 0 and (self.dilation == 1 or self.kernel == 1)
        return apart and length == count * self.kernel


def _windows(call: OpCall, kernel: Sequence[Size]) -> list[Windows]:
    count = len(kernel)
    padding = call["padding"]
    if isinstance(padding, str):
        known: list[Size] = [0 if padding == "valid" or size == 1 else -1 for size in kernel]
    else:
        known = per_dim(padding, count)
    rest = (per_dim(call[name], count) for name in ("stride", "dilation"))
    return [Windows(k, s, p, d) for k, p, s, d in zip(kernel, known, *rest, strict=True)]


@rule(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
    because="the taps of a kernel that strides over its own length stay together",
    until=HALO,
)
def convolution_rule(call: OpCall) -> OpShardingRule | None:
    """A depthwise one has `g` channels, and passes them; input channels are summed over the ranks."""
    (x, weight), result = call.operands[:2], call.results[0]
    assert result is not None
    transposed, groups, spatial = bool(call.arguments.get("transposed")), call["groups"], len(weight.shape) - 2
    depth = exact_quotient(weight.shape[0], groups)
    if not isinstance(groups, int) or depth is None:
        return None
    sizes: dict[str, Size] = {"g": groups, "i": weight.shape[1], "o": depth}
    if transposed:
        sizes |= {"i": depth, "o": weight.shape[1]}
    windows = _windows(call, weight.shape[2:])
    lengths = zip(x.shape[-spatial:], result.shape[-spatial:], strict=True)
    ends = [(long, short) if not transposed else (short, long) for long, short in lengths]
    apart = [window.side_by_side(*end) for window, end in zip(windows, ends, strict=True)]
    return _fit_convolution(call, sizes, transposed, apart)


def _fit_convolution(
    call: OpCall, sizes: dict[str, Size], transposed: bool, apart: Sequence[bool]
) -> OpShardingRule | None:
    (x, weight), result = call.operands[:2], call.results[0]
    assert result is not None
    spatial = len(apart)
    whole = {f"k{at}" for at in range(spatial)}
    fine: list[Dim] = []
    coarse: list[Dim] = []
    many, few = (result, x) if transposed else (x, result)
    for at, aligned in enumerate(apart):
        sizes |= {f"l{at}": many.shape[at - spatial], f"m{at}": few.shape[at - spatial], f"k{at}": weight.shape[2 + at]}
        fine.append(factors(sizes, f"m{at}", f"k{at}") if aligned else factors(sizes, f"l{at}"))
        coarse.append(factors(sizes, f"m{at}"))
        whole |= set() if aligned else {f"l{at}", f"m{at}"}
    taps: list[Dim] = [factors(sizes, f"k{at}") for at in range(spatial)]
    batch: list[Dim] = []
    if len(x.shape) == spatial + 2:
        sizes["b"] = x.shape[0]
        batch = [factors(sizes, "b")]
    inputs, outputs = factors(sizes, "g", "i"), factors(sizes, "g", "o")
    weights: list[Dim] = [inputs, factors(sizes, "o")] if transposed else [outputs, factors(sizes, "i")]
    rows = (coarse, fine) if transposed else (fine, coarse)
    operands: list[list[Dim]] = [[*batch, inputs, *rows[0]], [*weights, *taps], [outputs]]
    made: list[Dim] = [*batch, outputs, *rows[1]]
    bodies: dict[str, Body] = {"g": _fewer_groups, "i": sum_over_ranks(_without_bias, _add_bias)}
    return fit(
        call,
        operands[: len(call.operands)],
        [made],
        sizes,
        need_replication=frozenset(whole),
        additive=frozenset({2}) if len(call.operands) == 3 else frozenset(),
        bodies=bodies,
    )


def _fewer_groups(local: LocalOp) -> fx.Node:
    groups = local.call["groups"]
    depth = exact_quotient(local.call.operands[1].shape[0], groups)
    assert depth is not None
    return with_arguments(local, groups=local_count(local, local.operands[1], groups, depth))


def _without_bias(local: LocalOp, operands: Sequence[fx.Node]) -> fx.Node:
    arguments = {**local.call.arguments, "input": operands[0], "weight": operands[1], "bias": None}
    return local.emit(local.call.target, *arguments.values())


def _add_bias(local: LocalOp, total: fx.Node) -> fx.Node:
    if len(local.call.operands) < 3:
        return total
    spatial = len(local.call.operands[1].shape) - 2
    bias = local.emit(aten.reshape.default, local.operand(2), [-1, *[1] * spatial])
    return local.emit(aten.add.Tensor, total, bias)
