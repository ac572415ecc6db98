"""Convolutions: `n (g i) l!, (g o) i k!, +(g o) -> n (g o) m!`.

Where the windows lie side by side (kernel = stride, no padding: a patch embedding, or a kernel of 1) the spatial
dimensions pass as well, `l` as `(m k!)`; so do those of such a transposed convolution, `l -> (l k!)`. Windows that
overlap read a few rows of the neighbouring ranks, where lengths are static: `n (g i) l, ... -> n (g o) m`, with a halo.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from ...placement.placements import Sharded, Size, exact_quotient, size_of
from ..dims import factors, fit, local_count, with_arguments
from ..halo import rows_read
from ..local_op import Body, LocalOp
from ..op_call import OpCall
from ..registry import rule
from ..rule import Dim, Halo, OpShardingRule
from .contractions import sum_over_ranks

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

    def halo(self, source: str) -> Halo | None:
        """The rows that a window reads, of the factor `source`; None if they depend on a symbol."""
        reach = size_of((self.kernel - 1) * self.dilation + 1)
        if not isinstance(reach, int) or not isinstance(self.stride, int) or not isinstance(self.padding, int):
            return None
        return Halo(source, reach, self.stride, self.padding)

    def side_by_side(self, length: Size, count: Size) -> bool:
        """Whether `count` windows cover `length` rows exactly, without overlap."""
        apart = self.stride == self.kernel and self.padding == 0 and (self.dilation == 1 or self.kernel == 1)
        return apart and length == count * self.kernel


def _windows(call: OpCall, kernel: Sequence[Size]) -> list[Windows]:
    count = len(kernel)
    stride, dilation = (per_dim(call[name], count) for name in ("stride", "dilation"))
    padding = call["padding"]
    if padding == "valid":
        before: list[Size] = [0] * count
    elif padding == "same":
        before = [size_of(d * (k - 1) // 2) for k, d in zip(kernel, dilation, strict=True)]
    else:
        before = per_dim(padding, count)
    return [Windows(*each) for each in zip(kernel, stride, before, dilation, strict=True)]


@rule(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
    because="the taps of a kernel that strides over its own length stay together",
    until="a halo where lengths are symbols, and for transposed convolutions",
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
    halos = {} if transposed else _halos(call, windows, ends, apart)
    return _fit_convolution(call, sizes, transposed, apart, halos)


def _halos(
    call: OpCall, windows: Sequence[Windows], ends: Sequence[tuple[Size, Size]], apart: Sequence[bool]
) -> dict[str, Halo]:
    """The spatial dimensions whose windows overlap, where all sizes are known: made factor to what it reads."""
    lopsided = [call["padding"] == "same" and w.dilation * (w.kernel - 1) % 2 != 0 for w in windows]
    found = {}
    for at, window in enumerate(windows):
        halo = window.halo(f"l{at}")
        known = all(isinstance(size, int) and size > 1 for size in ends[at])
        # The other dimensions are padded by the op, which has one number for both ends.
        if halo and known and not apart[at] and not any(lopsided[:at] + lopsided[at + 1 :]):
            found[f"m{at}"] = halo
    return found


def _fit_convolution(
    call: OpCall, sizes: dict[str, Size], transposed: bool, apart: Sequence[bool], halos: Mapping[str, Halo]
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
        whole |= set() if aligned or f"m{at}" in halos else {f"l{at}", f"m{at}"}
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
    for at in range(spatial):
        if halo := halos.get(f"m{at}"):
            bodies |= dict.fromkeys((f"m{at}", halo.source), partial(_with_halo, halo, at))
    return fit(
        call,
        operands[: len(call.operands)],
        [made],
        sizes,
        need_replication=frozenset(whole),
        additive=frozenset({2}) if len(call.operands) == 3 else frozenset(),
        bodies=bodies,
        halos=halos,
    )


def _fewer_groups(local: LocalOp) -> fx.Node:
    groups = local.call["groups"]
    depth = exact_quotient(local.call.operands[1].shape[0], groups)
    assert depth is not None
    return with_arguments(local, groups=local_count(local, local.operands[1], groups, depth))


_OF_EACH_SIZE = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


def _with_halo(halo: Halo, at: int, local: LocalOp) -> fx.Node:
    """The convolution without padding in spatial dimension `at`, on the rows that a rank's windows read."""
    kernel = local.call.operands[1].shape[2:]
    windows = _windows(local.call, kernel)
    padding = [0 if each == at else window.padding for each, window in enumerate(windows)]
    stride, dilation = [window.stride for window in windows], [window.dilation for window in windows]
    bias = local.operand(2) if len(local.call.operands) > 2 else None
    given = rows_read(local, halo), local.operand(1), bias, stride, padding, dilation, local.call["groups"]
    made = local.emit(_OF_EACH_SIZE[len(kernel)], *given)
    placement = local.results[0]
    assert isinstance(placement, Sharded)
    return made if placement.layout.is_even(local.parts) else local.refill_padding(made, placement)


def _without_bias(local: LocalOp, operands: Sequence[fx.Node]) -> fx.Node:
    arguments = {**local.call.arguments, "input": operands[0], "weight": operands[1], "bias": None}
    return local.emit(local.call.target, *arguments.values())


def _add_bias(local: LocalOp, total: fx.Node) -> fx.Node:
    if len(local.call.operands) < 3:
        return total
    spatial = len(local.call.operands[1].shape) - 2
    bias = local.emit(aten.reshape.default, local.operand(2), [-1, *[1] * spatial])
    return local.emit(aten.add.Tensor, total, bias)
