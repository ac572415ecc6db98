"""The `sp::` ops: how values move between the ranks of an SP group, and what their gradients do.

Each op is one composite function over aten and `_c10d_functional` ops, around an autograd Function
where autograd needs telling. It is fake kernel, autograd and lowering at once: a pre-dispatch graph
keeps the op whole, AOTAutograd sees collectives that Inductor knows, fuses around and overlaps,
eager runs the same code, and there is no decomposition table that a compile cache could miss. Rank
is data, an int64 tensor `[1]`, so that the compiled text is the same on every rank.

The gradient of a replicated value is the full gradient, the same on every rank. Values are padded
by repeating the last granule, gradients by zeros; a gradient that arrives at padding is dropped.
With x_r what rank r holds, g the gradient of the result y and g' that of the operand:

    op           forward                          backward
    shard        y_r = x[rows of r], padded       g' = cat_r(g_r) without padding
    all_gather   y = cat_r(x_r) without padding   g'_r = g[rows of r], 0 at padding
    all_to_all   y_r = cat_s(x_s[.., r])          the exchange back, 0 at padding
    all_reduce   y = sum_r(x_r)                   g'_r = g
    replicate    y = x                            g' = sum_r(g_r)

    all_gather_replicate, both in one             g'_r = sum_s(g_s)[rows of r], 0 at padding

The first two are conjugate, and the last two (Megatron's g and f: Korthikanti et al. 2022); an
all_to_all is that of the exchange back (DeepSpeed Ulysses: Jacobs et al. 2023). Each backward is
written in the conjugate op, and so can be differentiated again.

A layout is `dim, outer, sizes, granules`, as in `placements.Sharded`, and `windows` of rows that are
gone: `[before, after, ...]`, two for each segment, or none. Sizes are global and may be symbolic:
nothing here asks whether P divides one of them, unless they are plain ints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import SequenceParallelError
from ..placement.sharded_dim import ShardedDim, Sizes, fill_rows
from .exchange import (
    PACKED,
    AnyExchange,
    Exchange,
    GatherExchange,
    KVExchange,
    KVHeads,
    KVReturn,
    read_exchange,
    sum_rows,
)
from .transport import (
    all_reduced,
    apart,
    arrived,
    as_before,
    as_transported,
    group_size,
    moved,
    reduced,
    sent_together,
    start_exchange,
    start_gather,
)

LOWERING_VERSION = 11
"""Part of every compile cache key: raise it whenever what an op lowers to changes, or what is in `inductor`."""

_library = torch.library.Library("sp", "DEF")
_Kernel = TypeVar("_Kernel", bound=Callable[..., "Tensor | list[Tensor]"])


class _Function(torch.autograd.Function):
    """What gets no gradient gives none: the gradient of a weight that no loss depends on stays `None`, and is not 0."""

    def __init_subclass__(cls) -> None:
        forward, backward = cls.forward, cls.backward

        def forward_without_zeros(ctx: Any, *args: Any) -> Any:
            ctx.set_materialize_grads(False)
            return forward(ctx, *args)

        def backward_of_gradients(ctx: Any, *grads: Tensor | None) -> Any:
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            return backward(ctx, *grads)

        cls.forward, cls.backward = staticmethod(forward_without_zeros), staticmethod(backward_of_gradients)  # type: ignore[method-assign]

    @classmethod
    def run(cls, *args: Any) -> Tensor:
        result: Tensor = cls.apply(*args)  # type: ignore[no-untyped-call]
        return result


def _op(schema: str) -> Callable[[_Kernel], _Kernel]:
    """Define `sp::<schema>` with the decorated function as its composite kernel."""

    def register(kernel: _Kernel) -> _Kernel:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(kernel.__name__, kernel, "CompositeImplicitAutograd")
        return kernel

    return register


def _dimension(x: Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise SequenceParallelError(f"a tensor of shape {list(x.shape)} has no dimension {dim}")
    return dim % x.dim()


def _layout(
    x: Tensor, dim: int, outer: int, sizes: Sizes, granules: Sizes, windows: Sizes, parts: int | None = None
) -> ShardedDim:
    """The layout of dimension `dim`, of which `x` holds one of `parts`, padded; or the whole."""
    if len(sizes) != len(granules) or not sizes:
        raise SequenceParallelError(f"{len(sizes)} segment sizes, {len(granules)} granules: every segment needs both")
    layout = ShardedDim(_dimension(x, dim), outer, sizes, granules, windows)
    found, expected = x.shape[layout.dim], outer * (layout.rows if parts is None else layout.local(parts))
    # Symbolic sizes are not compared: that would be a guard.
    if isinstance(found, int) and isinstance(expected, int) and found != expected:
        raise SequenceParallelError(
            f"dimension {layout.dim} of {list(x.shape)} has {found} rows; one of {parts or 1} parts of "
            f"{outer} x segments {sizes} with granules {granules} has {expected}"
        )
    return layout


def _check_distinct(x: Tensor, gather_dim: int, scatter_dim: int) -> None:
    if gather_dim == scatter_dim:
        raise SequenceParallelError(
            f"dimension {gather_dim} of {list(x.shape)} is both gathered and scattered; "
            "an all-to-all moves the shard between two dimensions"
        )


class _Shard(_Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: Tensor, layout: ShardedDim, group: str, zero: bool = False) -> Tensor:
        ctx.save_for_backward(rank)
        ctx.layout, ctx.group, parts = layout, group, group_size(group)
        return moved(lambda t: layout.cut(t, rank, parts, zero), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _AllGather.run(grad, *ctx.saved_tensors, ctx.layout, ctx.group), *[None] * 4


class _AllGather(_Function):
    """The whole along `layout`; without one `[1, ..]` of each rank as `[P, ..]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: Tensor, layout: ShardedDim | None, group: str) -> Tensor:
        ctx.save_for_backward(rank)
        parts = group_size(group)
        ctx.layout, ctx.group = layout or ShardedDim(0, 1, [parts], [1]), group
        if layout is None:
            return moved(lambda t: arrived(start_gather(t, group)), x)
        # A new first dimension of 1: ranks are laid end to end along it.
        return apart(moved(lambda t: layout.join(arrived(start_gather(t.unsqueeze(0), group)), parts), x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Shard.run(grad, *ctx.saved_tensors, ctx.layout, ctx.group, True), *[None] * 3


class _AllToAll(_Function):
    """Some exchanges at once. What has no gradient, or takes none, is not sent in backward."""

    @classmethod
    def of(
        cls, exchanges: Sequence[AnyExchange | KVReturn], rank: Tensor | None, group: str, *xs: Tensor
    ) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = cls.apply(exchanges, rank, group, *xs)  # type: ignore[no-untyped-call]
        return results

    @staticmethod
    def forward(
        ctx: Any, exchanges: Sequence[Any], rank: Tensor | None, group: str, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rank)
        ctx.exchanges, ctx.group, parts = exchanges, group, group_size(group)
        pairs = [*zip(exchanges, tensors, strict=True)]
        received = sent_together([each.cut(x, rank, parts) for each, x in pairs], group)
        joined = [each.join(pieces, rank, parts, x.dtype) for (each, x), pieces in zip(pairs, received, strict=True)]
        results = [apart(x) for x in joined]
        trained = ctx.needs_input_grad[3:]
        ctx.mark_non_differentiable(*(y for y, needed in zip(results, trained, strict=True) if not needed))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (rank,) = ctx.saved_tensors
        at = [index for index, grad in enumerate(grads) if grad is not None]
        sent: list[Tensor | None] = [None] * len(grads)
        back = tuple(ctx.exchanges[index].back() for index in at)
        returned = _AllToAll.of(back, rank, ctx.group, *(grad for grad in grads if grad is not None))
        for index, grad in zip(at, returned, strict=True):
            sent[index] = grad
        return None, None, None, *sent


class _StartAllToAll(_Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter: ShardedDim, group: str, zero: bool = False) -> Tensor:
        ctx.scatter, ctx.group = scatter, group
        return start_exchange(scatter.cut_for_all(as_transported(x), group_size(group), zero), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ReturnPieces.run(grad, ctx.scatter, ctx.group), *[None] * 3


class _ReturnPieces(_Function):
    """`[P, ..]` -> whole along `scatter`: each piece back to the rank that cut it."""

    @staticmethod
    def forward(ctx: Any, pieces: Tensor, scatter: ShardedDim, group: str) -> Tensor:
        ctx.scatter, ctx.group = scatter, group
        return scatter.join(arrived(start_exchange(pieces, group)), group_size(group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pieces = _StartAllToAll.run(grad, ctx.scatter, ctx.group, True)
        return arrived(pieces), None, None


class _Sum(_Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return reduced(x, "sum", group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Replicate.run(grad, ctx.group), None


class _Replicate(_Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Sum.run(grad, ctx.group), None


class _ScaleGradient(_Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.factor, None


class _Extremum(_Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, group: str) -> Tensor:
        result = reduced(x, kind, group)
        ctx.save_for_backward(x, result)
        ctx.group = group
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, result = ctx.saved_tensors
        wins = x == result
        winners = reduced(wins.to(torch.int32), "sum", ctx.group)
        share = _Replicate.run(grad, ctx.group) / winners
        return share.masked_fill(~wins, 0), None, None


class _SelectRows(_Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, row: Tensor, mine: Tensor, group: str) -> Tensor:
        ctx.save_for_backward(row, mine)
        ctx.dim, ctx.rows, ctx.group = dim, x.shape[dim], group
        # A row has one owner and the other ranks add zeros: exact in every dtype, or its bytes.
        return moved(lambda t: all_reduced(fill_rows(t.index_select(dim, row), dim, mine), "sum", group), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        row, mine = ctx.saved_tensors
        owned = fill_rows(_Replicate.run(grad, ctx.group), ctx.dim, mine)
        return sum_rows(owned, ctx.dim, row, ctx.rows), *[None] * 4


_LAYOUT = "int dim, SymInt outer, SymInt[] sizes, SymInt[] granules"
_GATHER = "int gather_dim, SymInt gather_outer, SymInt[] gather_sizes, SymInt[] gather_granules"
_SCATTER = _GATHER.replace("gather", "scatter")
_WINDOWS = "SymInt[] windows=[]"


@_op(f"shard(Tensor x, Tensor rank, {_LAYOUT}, str group, {_WINDOWS}) -> Tensor")
def shard(
    x: Tensor, rank: Tensor, dim: int, outer: int, sizes: Sizes, granules: Sizes, group: str, windows: Sizes = ()
) -> Tensor:
    """My block of every segment, padded by repetition: `[B, S, C]` -> `[B, ceil(S/P), C]`.

    `y_r = x[rows of r]`, without communication; backward `cat_r(g_r)`, the padding dropped.
    """
    return _Shard.run(x, rank, _layout(x, dim, outer, sizes, granules, windows), group)


@_op(f"all_gather(Tensor x, Tensor rank, {_LAYOUT}, str group, {_WINDOWS}) -> Tensor")
def all_gather(
    x: Tensor, rank: Tensor, dim: int, outer: int, sizes: Sizes, granules: Sizes, group: str, windows: Sizes = ()
) -> Tensor:
    """The whole from every rank's part, without padding: `[B, ceil(S/P), C]` -> `[B, S, C]`.

    `y = cat_r(x_r)`; backward `g[rows of r]`, 0 at padding: g is the full gradient already.
    """
    parts = group_size(group)
    layout = _layout(x, dim, outer, sizes, granules, windows, parts)
    if layout.is_even(parts):
        # The join may be a view, and has to be one that autograd sees: it does not let a view be written to that a
        # custom Function returns, and loses what is written to views of it. Of one row a rank it would lie by ranks.
        return layout.join(_AllGather.run(x.unsqueeze(0), rank, None, group), parts).contiguous()
    return _AllGather.run(x, rank, layout, group)


@_op(
    f"all_to_all(Tensor x, {_GATHER}, {_SCATTER}, str group, SymInt[] gather_windows=[], SymInt[] scatter_windows=[])"
    " -> Tensor"
)
def all_to_all(
    x: Tensor,
    gather_dim: int,
    gather_outer: int,
    gather_sizes: Sizes,
    gather_granules: Sizes,
    scatter_dim: int,
    scatter_outer: int,
    scatter_sizes: Sizes,
    scatter_granules: Sizes,
    group: str,
    gather_windows: Sizes = (),
    scatter_windows: Sizes = (),
) -> Tensor:
    """Move the shard to another dimension: `[B, H, ceil(S/P), D]` -> `[B, ceil(H/P), S, D]`.

    `y_r = cat_s(x_s[.., r])` without the padding of the gathered dimension; the scattered one is
    padded by repetition. Backward is the exchange back, 0 at padding (Jacobs et al. 2023).
    """
    parts = group_size(group)
    gather = _layout(x, gather_dim, gather_outer, gather_sizes, gather_granules, gather_windows, parts)
    scatter = _layout(x, scatter_dim, scatter_outer, scatter_sizes, scatter_granules, scatter_windows)
    _check_distinct(x, gather.dim, scatter.dim)
    (result,) = _AllToAll.of((Exchange(gather, scatter),), None, group, x)
    return result


@_op(f"start_all_to_all(Tensor x, {_SCATTER}, str group) -> Tensor")
def start_all_to_all(
    x: Tensor, scatter_dim: int, scatter_outer: int, scatter_sizes: Sizes, scatter_granules: Sizes, group: str
) -> Tensor:
    """The first half of `all_to_all`: `[P, ..]`, a piece from every rank, that nothing may read before the other half.

    A dtype that transports refuse is sent as bytes, a last dimension. Backward: each piece of the
    gradient goes back to the rank that cut it, those of padding are dropped.
    """
    scatter = _layout(x, scatter_dim, scatter_outer, scatter_sizes, scatter_granules, ())
    return _StartAllToAll.run(x, scatter, group)


@_op(f"finish_all_to_all(Tensor pieces, {_GATHER}, ScalarType dtype, str group) -> Tensor")
def finish_all_to_all(
    pieces: Tensor,
    gather_dim: int,
    gather_outer: int,
    gather_sizes: Sizes,
    gather_granules: Sizes,
    dtype: torch.dtype,
    group: str,
) -> Tensor:
    """The second half of `all_to_all`: waits for the pieces of a tensor of `dtype`, lays them along `gather_dim >= 0`.

    Local, and so is backward: the pieces of the gradient, 0 at padding.
    """
    gather = ShardedDim(gather_dim, gather_outer, gather_sizes, gather_granules)
    return as_before(gather.join(arrived(pieces), group_size(group)), dtype)


@_op("all_reduce(Tensor x, str kind, str group) -> Tensor")
def all_reduce(x: Tensor, kind: str, group: str) -> Tensor:
    """The sum, max or min over ranks of tensors of one shape: a Partial made Replicated.

    Sum: `y = sum_r(x_r)`, in float32 for half types; backward `g` (Korthikanti et al. 2022). Max
    and min: backward `g / n` where `x_r = y`, else 0; n ranks have `x_r = y`. Refuses what no
    transport adds (int16, float8; a sum of bool).
    """
    if kind not in ("sum", "max", "min"):
        raise SequenceParallelError(f"unknown kind of reduction {kind!r}; use sum, max or min")
    return _Sum.run(x, group) if kind == "sum" else _Extremum.run(x, kind, group)


@_op("replicate(Tensor x, str group) -> Tensor")
def replicate(x: Tensor, group: str) -> Tensor:
    """A replicated value on its way into sharded work: `y = x`, a view.

    Backward `sum_r(g_r)`, in float32 for half types (Korthikanti et al. 2022).
    """
    return _Replicate.run(x, group)


@_op("scale_gradient(Tensor x, float factor) -> Tensor")
def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """A parameter on its way into sharded work whose gradient somebody else averages over ranks: `y = x`.

    Backward `P g_r` for `factor` P: the average over ranks is then what `replicate` would have summed.
    """
    return _ScaleGradient.run(x, factor)


@_op(f"mask_padding(Tensor x, Tensor rank, {_LAYOUT}, Scalar fill, str group, {_WINDOWS}) -> Tensor")
def mask_padding(
    x: Tensor,
    rank: Tensor,
    dim: int,
    outer: int,
    sizes: Sizes,
    granules: Sizes,
    fill: float,
    group: str,
    windows: Sizes = (),
) -> Tensor:
    """`[B, ceil(S/P), C]` with `fill` at the padding: the neutral element of what reduces it.

    `y_r = x_r` at real rows; backward g there and 0 at padding. No communication.
    """
    parts = group_size(group)
    layout = _layout(x, dim, outer, sizes, granules, windows, parts)
    _, real = layout.owned_rows(rank, parts)
    return fill_rows(x, layout.dim, real, fill)


@_op(f"refill_padding(Tensor x, Tensor rank, {_LAYOUT}, str group, {_WINDOWS}) -> Tensor")
def refill_padding(
    x: Tensor, rank: Tensor, dim: int, outer: int, sizes: Sizes, granules: Sizes, group: str, windows: Sizes = ()
) -> Tensor:
    """`[B, ceil(S/P), C]` with a real row of the same segment in place of padding that holds rows which are gone.

    `y_r = x_r` at real rows, else the nearest real one of mine; or, where a rank may have none, the first of all, which
    costs an all-reduce of a row. Backward g at real rows, for the gradient of padding is 0. One `outer` only.
    """
    parts = group_size(group)
    layout = _layout(x, dim, outer, sizes, granules, windows, parts)
    mine, present = layout.nearest_real(rank, parts)
    nearest = x.index_select(layout.dim, mine)
    if layout.each_rank_has_rows(parts):
        return nearest
    starts, blocks = [sum(layout.sizes[:at]) for at in range(len(layout.sizes))], layout.blocks(parts)
    # Sizes may be symbolic: no tensor is made from a list of them.
    first = torch.cat([torch.full((1,), start, device=x.device, dtype=torch.int64) for start in starts])
    # A last segment without a row starts where nothing is stored: any row does for its padding.
    stored = torch.cat([layout.stored_rows(parts, x.device), torch.zeros(1, device=x.device, dtype=torch.int64)])
    rows = _select_stored(x, rank, layout.dim, stored.index_select(0, first), group)
    segment = torch.cat([torch.full((n,), at, device=x.device, dtype=torch.int64) for at, n in enumerate(blocks)])
    remote = rows.index_select(layout.dim, segment)
    return torch.where(present.view(-1, *[1] * (x.dim() - layout.dim - 1)), nearest, remote)


@_op(f"positions(Tensor rank, SymInt outer, SymInt[] sizes, SymInt[] granules, str group, {_WINDOWS}) -> Tensor")
def positions(rank: Tensor, outer: int, sizes: Sizes, granules: Sizes, group: str, windows: Sizes = ()) -> Tensor:
    """The global row of each local row, int64 `[outer * local]`; padding repeats as in `shard`."""
    return ShardedDim(0, outer, sizes, granules, windows).owned_rows(rank, group_size(group))[0]


@_op(f"select_rows(Tensor x, Tensor rank, {_LAYOUT}, Tensor index, str group, {_WINDOWS}) -> Tensor")
def select_rows(
    x: Tensor,
    rank: Tensor,
    dim: int,
    outer: int,
    sizes: Sizes,
    granules: Sizes,
    index: Tensor,
    group: str,
    windows: Sizes = (),
) -> Tensor:
    """Some global rows, on every rank: `[B, ceil(S/P), C]` and int64 `[n]` -> `[B, n, C]`.

    `y = sum_r(x_r[row] if r owns it else 0)`: an all-reduce of n rows, never a gather. Negative
    indices count from the end. Backward: g added to the rows that I own, no communication.
    """
    parts = group_size(group)
    layout = _layout(x, dim, outer, sizes, granules, windows, parts)
    wrapped = torch.where(index < 0, index + outer * layout.rows, index)
    stored = layout.stored_rows(parts, x.device).index_select(0, wrapped)
    return _select_stored(x, rank, layout.dim, stored, group)


def _select_stored(x: Tensor, rank: Tensor, dim: int, stored: Tensor, group: str) -> Tensor:
    """The rows that `stored` numbers, as they lie in the local rows of all ranks end to end."""
    mine = stored // x.shape[dim] == rank
    row = torch.where(mine, stored % x.shape[dim], 0)
    return _SelectRows.run(x, dim, row, mine, group)


@_op(
    f"all_to_all_kv(Tensor x, Tensor rank, {_GATHER}, int head_dim, int query_heads, str group,"
    " SymInt[] gather_windows=[]) -> Tensor"
)
def all_to_all_kv(
    x: Tensor,
    rank: Tensor,
    gather_dim: int,
    gather_outer: int,
    gather_sizes: Sizes,
    gather_granules: Sizes,
    head_dim: int,
    query_heads: int,
    group: str,
    gather_windows: Sizes = (),
) -> Tensor:
    """The KV head of each of my query heads: `[B, G, ceil(S/P), D]` -> `[B, ceil(H/P), S, D]`.

    `y_r[j] = cat_s(x_s)[h // (H / G)]`, `h = min(r * ceil(H/P) + j, H - 1)`. Heads are repeated
    after the exchange, which moves as many to each rank as the neediest needs. Backward sums over
    the query heads of a KV head, padded ones dropped, and exchanges back with 0 at padding.
    """
    parts = group_size(group)
    gather = _layout(x, gather_dim, gather_outer, gather_sizes, gather_granules, gather_windows, parts)
    dim = _dimension(x, head_dim)
    _check_distinct(x, gather.dim, dim)
    heads = KVHeads(x.shape[dim], query_heads, parts)
    if query_heads % heads.kv_heads:
        raise SequenceParallelError(
            f"{query_heads} query heads cannot share the {heads.kv_heads} KV heads in dimension "
            f"{dim} of {list(x.shape)} evenly: give a multiple"
        )
    (result,) = _AllToAll.of((KVExchange(gather, dim, heads),), rank, group, x)
    return result


@_op(f"all_gather_replicate(Tensor x, {_LAYOUT}, str group, {_WINDOWS}) -> Tensor")
def all_gather_replicate(
    x: Tensor, dim: int, outer: int, sizes: Sizes, granules: Sizes, group: str, windows: Sizes = ()
) -> Tensor:
    """`all_gather` and then `replicate`: `[B, ceil(S/P), C]` -> `[B, S, C]`, on its way into sharded work.

    `y = cat_r(x_r)`; backward is one reduce-scatter, `sum_r(g_r)` at my rows, in float32 for half types, where the two
    would be an all-reduce of the whole and a cut.
    """
    layout = _layout(x, dim, outer, sizes, granules, windows, group_size(group))
    (result,) = _AllToAll.of((GatherExchange(layout),), None, group, x)
    return result


@_op("all_to_all_packed(Tensor[] tensors, Tensor rank, SymInt[] exchanges, str group) -> Tensor[]")
def all_to_all_packed(tensors: Sequence[Tensor], rank: Tensor, exchanges: Sizes, group: str) -> list[Tensor]:
    """Several exchanges of one moment in one launch (one for each dtype), backward too: `all_to_all`, `all_to_all_kv`
    and `all_gather_replicate`.

    `exchanges` has for each tensor what `packed_exchange` wrote. Backward sends the gradients that there are, of
    tensors that take one.
    """
    numbers, parts = iter(exchanges), group_size(group)
    moves = [read_exchange(numbers, x, parts) for x in tensors]
    return list(_AllToAll.of(moves, rank, group, *tensors))


MOVING_OPS = frozenset(
    getattr(torch.ops.sp, name).default
    for name in (
        *PACKED,
        "all_to_all_packed",
        "all_gather_replicate",
        "all_reduce",
        "select_rows",
        "refill_padding",
        "start_all_to_all",
        "finish_all_to_all",
    )
)
"""The ops that launch a collective forward, or may, or wait for one."""
