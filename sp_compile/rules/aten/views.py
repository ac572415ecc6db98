"""Views, and what else only moves rows: `[B, S, (h d)] -> [B, S, h, d]` is `"b s (h d) -> b s h d"`."""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem

import torch
from torch import fx

from ...placement.placements import Layout, Sharded, Size, exact_quotient, product, size_of
from ..dims import broadcast_factors, factors, fit, plain, wrap
from ..local_op import Body, LocalOp
from ..op_call import OpCall, TensorSpec
from ..registry import READS_MEMORY, rule, rules_from_text
from ..rule import Dim, Joined, OpShardingRule, divide

aten = torch.ops.aten


def _specs(call: OpCall) -> list[TensorSpec]:
    return [spec for spec in call.results if spec is not None]


# One shape read as another

_NO_COMMON_FACTOR = "no block of rows of the one shape is a block of the other"


@rule(aten.reshape.default, because=_NO_COMMON_FACTOR)
def reshape_rule(call: OpCall) -> OpShardingRule | None:
    """The coarsest common refinement of two shapes; where neither size divides the other, both are whole."""
    return _refine(call, "shape")


@rule(aten.view.default, aten._unsafe_view.default, because=_NO_COMMON_FACTOR)
def view_rule(call: OpCall) -> OpShardingRule | None:
    return _refine(call, "size")


def _refine(call: OpCall, shape_argument: str) -> OpShardingRule | None:
    shapes = call.operands[0].shape, _specs(call)[0].shape
    dims: tuple[list[list[str]], list[list[str]]] = [[] for _ in shapes[0]], [[] for _ in shapes[1]]
    # What is left to name of each dimension, outermost first.
    source, target = ([(at, size) for at, size in enumerate(shape) if size != 1] for shape in shapes)
    sizes: dict[str, Size] = {}
    whole: set[str] = set()

    def name(size: Size, *places: list[str]) -> str:
        factor = f"f{len(sizes)}"
        sizes[factor] = size
        for place in places:
            place.append(factor)
        return factor

    while source and target:
        (i, left), (j, right) = source[0], target[0]
        rest, excess = exact_quotient(left, right), exact_quotient(right, left)
        if rest is None and excess is None:
            count = _common_end([size for _, size in source], [size for _, size in target])
            if count is None:
                return None
            whole |= {name(size, dims[0][at]) for at, size in source[: count[0]]}
            whole |= {name(size, dims[1][at]) for at, size in target[: count[1]]}
            del source[: count[0]], target[: count[1]]
            continue
        name(right if rest is not None else left, dims[0][i], dims[1][j])
        source[:1] = [] if rest in (None, 1) else [(i, rest)]
        target[:1] = [] if excess in (None, 1) else [(j, excess)]
    if source or target:
        return None
    return OpShardingRule(
        (tuple(map(tuple, dims[0])),),
        (tuple(map(tuple, dims[1])),),
        sizes,
        frozenset(whole),
        movement=True,
        shape_argument=shape_argument,
    )


def _common_end(source: Sequence[Size], target: Sequence[Size]) -> tuple[int, int] | None:
    """The fewest leading dimensions of both whose products agree."""
    for total in range(2, len(source) + len(target) + 1):
        for count in range(max(1, total - len(target)), min(total - 1, len(source)) + 1):
            if exact_quotient(product(source[:count]), product(target[: total - count])) == 1:
                return count, total - count
    return None


@rule(aten.unsqueeze.default)
def unsqueeze_rule(call: OpCall) -> OpShardingRule | None:
    dims = plain(call.operands[0].shape)
    (at,) = wrap(call["dim"], len(dims) + 1)
    return fit(call, [dims], [[*dims[:at], (), *dims[at:]]], movement=True)


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeeze_rule(call: OpCall) -> OpShardingRule | None:
    """A rank may hold one row of a dimension that is not 1, so the body says what to squeeze."""
    dims = plain(call.operands[0].shape)
    asked = wrap(call.arguments.get("dim"), len(dims))
    if call.arguments.get("dim") == []:
        asked = ()
    gone = [at for at in asked if dims and call.operands[0].shape[at] == 1]

    def squeeze(local: LocalOp) -> fx.Node:
        return local.emit(aten.squeeze.dims, local.operand(0), gone)

    kept = [dim for at, dim in enumerate(dims) if at not in gone]
    bodies = {factor: squeeze for dim in kept if isinstance(dim, tuple) for factor in dim}
    return fit(call, [dims], [kept], movement=True, bodies=bodies)


# Dimensions in another order


@rule(aten.permute.default)
def permute_rule(call: OpCall) -> OpShardingRule | None:
    dims = plain(call.operands[0].shape)
    order = wrap(call["dims"], len(dims))
    return fit(call, [dims], [[dims[at] for at in order]], movement=True)


@rule(aten.transpose.int)
def transpose_rule(call: OpCall) -> OpShardingRule | None:
    dims = plain(call.operands[0].shape)
    made = list(dims)
    if dims:
        first, second = wrap((call["dim0"], call["dim1"]), len(dims))
        made[first], made[second] = dims[second], dims[first]
    return fit(call, [dims], [made], movement=True)


@rule(aten.t.default)
def t_rule(call: OpCall) -> OpShardingRule | None:
    dims = plain(call.operands[0].shape)
    return fit(call, [dims], [dims[::-1]], movement=True)


rules_from_text(
    {aten.view_as_complex.default: "... c! -> ...", aten.view_as_real.default: "... -> ... c!"},
    because="the two halves of a number stay together",
)
READS_MEMORY.update({aten.view_as_complex.default, aten.view.dtype, aten._weight_norm_interface.default})


# Rows repeated


@rule(aten.expand.default)
def expand_rule(call: OpCall) -> OpShardingRule | None:
    result = _specs(call)[0].shape
    dims = broadcast_factors(call.operands[0].shape, result)
    if dims is None:
        return None
    return fit(call, [dims], [plain(result)], movement=True, shape_argument="size")


@rule(aten.repeat.default, because="a whole copy is laid after a whole copy")
def repeat_rule(call: OpCall) -> OpShardingRule | None:
    """`s -> (r s)`"""
    shape, repeats = call.operands[0].shape, [size_of(count) for count in call["repeats"]]
    dims, offset = plain(shape), len(repeats) - len(shape)
    made: list[Dim] = []
    sizes: dict[str, Size] = {}
    for at, count in enumerate(repeats):
        kept = dims[at - offset] if at >= offset else ()
        assert isinstance(kept, tuple)
        made.append((f"r{at}", *kept) if count != 1 else kept)
        sizes[f"r{at}"] = count
    return fit(call, [dims], [made], sizes, need_replication=frozenset(sizes), movement=True)


@rule(aten.repeat_interleave.self_int, because="the copies of a row stay together")
def repeat_interleave_rule(call: OpCall) -> OpShardingRule | None:
    """`g -> (g r)`"""
    dims = plain(call.operands[0].shape)
    if call["dim"] is None and len(dims) != 1:
        return None
    (at,) = wrap(call["dim"] or 0, len(dims))
    repeats, made, kept = size_of(call["repeats"]), list(dims), dims[at]
    assert isinstance(kept, tuple)
    made[at] = (*kept, "r") if repeats != 1 else kept

    def repeat(local: LocalOp) -> fx.Node:
        return local.emit(call.target, local.operand(0), local.size(repeats), at)

    bodies: dict[str, Body] = dict.fromkeys(kept, repeat)
    return fit(call, [dims], [made], {"r": repeats}, need_replication=frozenset("r"), movement=True, bodies=bodies)


# Streams laid end to end, and taken apart


def _streams(specs: Sequence[TensorSpec], at: int) -> list[tuple[str, ...]]:
    """What dimension `at` of each is: a stream of its own, or nothing if it has no rows."""
    return [(f"j{index}",) if spec.shape[at] != 0 else () for index, spec in enumerate(specs)]


@rule(aten.cat.default, takes_empty=True)
def cat_rule(call: OpCall) -> OpShardingRule | None:
    """`s, t -> [s | t]`: each rank lays its blocks end to end. What has no rows of its own is no stream."""
    (made,) = _specs(call)
    dims = plain(made.shape)
    (at,) = wrap(call["dim"], len(dims))
    # A vector without elements is laid to tensors of any shape.
    if any(len(spec.shape) != len(dims) for spec in call.operands) or 0 in made.shape:
        return None
    rows = _streams(call.operands, at)
    streams = [factor for dim in rows for factor in dim]
    operands = [[*dims[:at], dim, *dims[at + 1 :]] for dim in rows]
    joined = Joined(tuple(streams)) if len(streams) > 1 else (streams[0],)
    return fit(call, operands, [[*dims[:at], joined, *dims[at + 1 :]]], movement=True)


@rule(aten.stack.default, because="the operands are on every rank")
def stack_rule(call: OpCall) -> OpShardingRule | None:
    dims = plain(call.operands[0].shape)
    (at,) = wrap(call["dim"], len(dims) + 1)
    new = ("n",) if len(call.operands) > 1 else ()
    made = [*dims[:at], new, *dims[at:]]
    return fit(call, [dims] * len(call.operands), [made], need_replication=frozenset(new), movement=True)


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.unsafe_split.Tensor)
def split_rule(call: OpCall) -> OpShardingRule | None:
    """`[s | t] -> s, t`: local where the blocks were cut stream by stream."""
    dims = plain(call.operands[0].shape)
    (at,) = wrap(call["dim"], len(dims))
    rows = _streams(_specs(call), at)
    streams = [factor for dim in rows for factor in dim]
    if not streams:  # no rows to take apart
        return fit(call, [dims], [dims] * len(rows), need_replication=frozenset({f"d{at}"}), movement=True)

    def split(local: LocalOp) -> tuple[fx.Node, ...]:
        blocks = [p.layout.local_size(local.parts) if isinstance(p, Sharded) else 0 for p in local.results]
        sizes = [local.size(block) for block in blocks]
        pieces = local.emit(aten.split_with_sizes.default, local.operand(0), sizes, at)
        return tuple(local.emit(getitem, pieces, index) for index in range(len(blocks)))

    results = [[*dims[:at], dim, *dims[at + 1 :]] for dim in rows]
    operand = [*dims[:at], Joined(tuple(streams)) if len(streams) > 1 else (streams[0],), *dims[at + 1 :]]
    return fit(call, [operand], results, movement=True, bodies=dict.fromkeys(streams, split))


@rule(aten.unbind.int, because="every row is a value of its own")
def unbind_rule(call: OpCall) -> OpShardingRule | None:
    dims = plain(call.operands[0].shape)
    (at,) = wrap(call["dim"], len(dims))
    kept = [*dims[:at], *dims[at + 1 :]]
    return fit(call, [dims], [kept] * len(_specs(call)), need_replication=frozenset({f"d{at}"}), movement=True)


def joined_slice(call: OpCall, at: int, low: Size, kept: Size, high: Size) -> OpShardingRule:
    """`[lo | kept | hi] -> kept`: local where the slice is whole segments."""
    dims = plain(call.operands[0].shape)
    sizes = {name: size for name, size in (("lo", low), ("kept", kept), ("hi", high)) if size != 0}

    def cut(local: LocalOp) -> fx.Node:
        placement = local.operands[0]
        assert isinstance(placement, Sharded)
        streams = dict(zip(sizes, divide(placement.layout, list(sizes.values())) or (), strict=True))
        start = streams["lo"].local_size(local.parts) if "lo" in streams else 0
        end = size_of(start + streams["kept"].local_size(local.parts))
        return local.emit(aten.slice.Tensor, local.operand(0), at, local.size(start), local.size(end))

    operand = [*dims[:at], Joined(tuple(sizes)), *dims[at + 1 :]]
    made: list[Dim] = [*dims[:at], ("kept",), *dims[at + 1 :]]
    return fit(call, [operand], [made], sizes, movement=True, bodies=dict.fromkeys(sizes, cut))


def window_slice(call: OpCall, at: int, low: Size, high: Size) -> OpShardingRule:
    """`s -> w`: the rows that are kept stay on their ranks; the others become padding."""
    dims = plain(call.operands[0].shape)
    dims[at] = ("s",)

    def cut(local: LocalOp) -> fx.Node:
        (placement,), (window,) = local.operands, local.results
        assert isinstance(placement, Sharded) and isinstance(window, Sharded)
        found = placement.layout.crop(low, high)
        assert found is not None
        segments = placement.layout.segments
        start = Layout(segments[: found[0]]).local_size(local.parts)
        end = size_of(start + Layout(segments[found[0] : found[1]]).local_size(local.parts))
        rows = local.emit(aten.slice.Tensor, local.operand(0), at, local.size(start), local.size(end))
        return local.refill_padding(rows, window)

    made: list[Dim] = [*dims[:at], ("w",), *dims[at + 1 :]]
    return fit(call, [dims], [made], movement=True, bodies={"s": cut}, windows={"w": ("s", low, high)})


@rule(aten.constant_pad_nd.default, until="the rows that negative padding cuts off, as `slice`")
def pad_rule(call: OpCall) -> OpShardingRule | None:
    """`s -> [lo | s | hi]`: each rank makes its own block of the padding; negative padding needs the rows whole."""
    dims, pads = plain(call.operands[0].shape), [size_of(pad) for pad in call["pad"]]
    made, bodies, whole = list(dims), dict[str, Body](), set[str]()
    sizes: dict[str, Size] = {}
    for index in range(0, len(pads), 2):
        at, low, high = len(dims) - 1 - index // 2, pads[index], pads[index + 1]
        if low == 0 and high == 0:
            continue
        dims[at] = (f"d{at}",)
        if not all(isinstance(pad, int) and pad >= 0 for pad in (low, high)):
            made[at] = (f"p{at}",)
            whole |= {f"d{at}", f"p{at}"}
            continue
        streams = {f"lo{at}": low, f"d{at}": call.operands[0].shape[at], f"hi{at}": high}
        streams = {stream: size for stream, size in streams.items() if size != 0}
        sizes |= streams
        made[at] = Joined(tuple(streams))
        bodies |= dict.fromkeys(streams, _local_pad(call, pads, index, at, streams))
    return fit(call, [dims], [made], sizes, need_replication=frozenset(whole), bodies=bodies)


def _local_pad(call: OpCall, pads: Sequence[Size], index: int, at: int, streams: dict[str, Size]) -> Body:
    def pad(local: LocalOp) -> fx.Node:
        placement = local.results[0]
        assert isinstance(placement, Sharded)
        blocks: dict[str, Layout] = dict(
            zip(streams, divide(placement.layout, list(streams.values())) or (), strict=True)
        )
        amounts = list(pads)
        for offset, stream in enumerate((f"lo{at}", f"hi{at}")):
            amounts[index + offset] = blocks[stream].local_size(local.parts) if stream in blocks else 0
        sizes = [local.size(amount) for amount in amounts]
        return local.emit(aten.constant_pad_nd.default, local.operand(0), sizes, call["value"])

    return pad


# Dimensions that have to be whole


def whole_dims_rule(call: OpCall, dims: Sequence[int]) -> OpShardingRule:
    """Every result has the operand's dimensions; `dims` are needed whole, and may change size."""
    source = call.operands[0].shape
    named = plain(source)
    results: list[list[Dim]] = []
    whole = {f"d{at}" for at in dims}
    for spec in _specs(call):
        changed = [at for at in dims if spec.shape[at] != source[at]]
        whole |= {f"c{at}" for at in changed}
        results.append([(f"c{at}",) if at in changed else dim for at, dim in enumerate(named)])
    return fit(call, [named], results, need_replication=frozenset(whole))


@rule(
    aten.cumsum.default,
    aten.cumprod.default,
    aten.logcumsumexp.default,
    aten.cummax.default,
    aten.cummin.default,
    because="a row takes all rows before it",
    until="a scan of the ranks' totals",
)
@rule(aten.sort.default, aten.sort.stable, aten.topk.default, because="rows are ranked by value")
@rule(aten.glu.default, until="the two halves as streams")
def one_whole_dim_rule(call: OpCall) -> OpShardingRule | None:
    return whole_dims_rule(call, wrap(call["dim"], len(call.operands[0].shape)))


@rule(aten.flip.default, aten.roll.default, aten.rot90.default, until="the rows that change owner, sent to it")
def some_whole_dims_rule(call: OpCall) -> OpShardingRule | None:
    return whole_dims_rule(call, wrap(call["dims"], len(call.operands[0].shape)))


@rule(
    aten._fft_r2c.default,
    aten._fft_c2c.default,
    aten._fft_c2r.default,
    because="a frequency is made of all rows",
)
def fourier_rule(call: OpCall) -> OpShardingRule | None:
    """The transformed dimensions `!`, of which one may change its size."""
    source, result = call.operands[0], call.results[0]
    whole = wrap(call["dim"], len(source.shape))
    dims = plain(source.shape)
    if result is None:
        return None
    made: list[Dim] = [(f"k{at}",) if at in whole and size != 1 else dims[at] for at, size in enumerate(result.shape)]
    return fit(call, [dims], [made], need_replication=frozenset(f"{letter}{at}" for at in whole for letter in "dk"))


@rule(
    aten.unfold.default,
    because="the rows of one window stay together",
    until="a halo: the rows that a window reads of the neighbouring ranks",
)
def unfold_rule(call: OpCall) -> OpShardingRule | None:
    """`(w k!) -> w … k!` for windows side by side, else `s! -> w! … k!`."""
    dims, result = plain(call.operands[0].shape), _specs(call)[0].shape
    if not dims:
        return None
    (at,) = wrap((call["dimension"],), len(dims))
    size, step, length = call["size"], call["step"], call.operands[0].shape[at]
    sizes: dict[str, Size] = {"w": result[at], "k": size, f"d{at}": length}
    apart = size == step and exact_quotient(length, size) is not None
    read = factors(sizes, "w", "k") if apart else dims[at]
    made: list[Dim] = [*dims[:at], factors(sizes, "w"), *dims[at + 1 :], factors(sizes, "k")]
    whole = frozenset({"k"} if apart else {f"d{at}", "w", "k"})
    return fit(call, [[*dims[:at], read, *dims[at + 1 :]]], [made], sizes, need_replication=whole)


@rule(aten.slice_scatter.default, until="a mask made of the local positions")
def slice_scatter_rule(call: OpCall) -> OpShardingRule | None:
    dims = plain(call.operands[0].shape)
    (at,) = wrap(call["dim"], len(dims))
    written: list[Dim] = [*dims[:at], ("w",), *dims[at + 1 :]]
    return fit(call, [dims, written], [dims], need_replication=frozenset({f"d{at}", "w"}))


@rule(aten.select_scatter.default, until="a mask made of the local positions")
def select_scatter_rule(call: OpCall) -> OpShardingRule | None:
    dims = plain(call.operands[0].shape)
    (at,) = wrap(call["dim"], len(dims))
    return fit(call, [dims, [*dims[:at], *dims[at + 1 :]]], [dims], need_replication=frozenset({f"d{at}"}))
