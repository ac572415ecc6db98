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

A layout is `dim, outer, sizes, granules`, as in `sharding.Sharded`, and `windows` of rows that are
gone: `[before, after, ...]`, two for each segment, or none. Sizes are global and may be symbolic:
nothing here asks whether P divides one of them, unless they are plain ints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _get_group_size_by_name

from sp_compile.errors import SequenceParallelError
from sp_compile.sharding import block_rows

LOWERING_VERSION = 7
"""Part of every compile cache key: raise it whenever what an op lowers to changes, or what is in `inductor`."""

_collectives = torch.ops._c10d_functional
_library = torch.library.Library("sp", "DEF")
_Kernel = TypeVar("_Kernel", bound=Callable[..., "Tensor | list[Tensor]"])
Sizes: TypeAlias = Sequence[int]

# What every transport takes, gloo too; anything else travels as a view of its bytes.
_INTEGERS = {torch.uint8, torch.int8, torch.int32, torch.int64}
_HALVES = {torch.float16, torch.bfloat16}
_FLOATS = {torch.float32, torch.float64, *_HALVES}
_TRANSPORTED = {*_INTEGERS, *_FLOATS}


class ShardedDim(NamedTuple):
    """Dimension `dim` read as `(outer, s)`; s is a row of segments, each cut in P blocks."""

    dim: int
    outer: int
    sizes: Sizes
    granules: Sizes
    windows: Sizes = ()

    @staticmethod
    def read(numbers: Iterator[int]) -> ShardedDim:
        """The layout that `written` wrote."""
        dim, outer, segments, windows = (next(numbers) for _ in range(4))
        sizes, granules, gone = ([next(numbers) for _ in range(n)] for n in (segments, segments, windows))
        return ShardedDim(dim, outer, sizes, granules, gone)

    def written(self) -> list[int]:
        """As one row of numbers, for a list of layouts among the arguments of an op."""
        counts = [self.dim, self.outer, len(self.sizes), len(self.windows)]
        return [*counts, *self.sizes, *self.granules, *self.windows]

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    @property
    def before(self) -> Sizes:
        return self.windows[::2] or [0] * len(self.sizes)

    def blocks(self, parts: int) -> list[int]:
        after = self.windows[1::2] or [0] * len(self.sizes)
        segments = zip(self.before, self.sizes, after, self.granules, strict=True)
        return [block_rows(low + size + high, granule, parts) for low, size, high, granule in segments]

    def local(self, parts: int) -> int:
        return sum(self.blocks(parts))

    def each_rank_has_rows(self, parts: int) -> bool:
        """Whether it is known that every rank has a real row of every segment."""
        segments = [*zip(self.sizes, self.before, self.blocks(parts), strict=True)]
        if not all(isinstance(x, int) for segment in segments for x in segment):
            return False
        last = parts - 1
        return all(before < block and before + size > last * block for size, before, block in segments)

    def is_even(self, parts: int) -> bool:
        """One segment, known to need no padding: its blocks laid end to end are the whole."""
        size, granule = self.sizes[0], self.granules[0]
        known = len(self.sizes) == 1 and not self.windows and isinstance(size, int) and isinstance(granule, int)
        return known and size % (granule * parts) == 0

    def is_a_run(self) -> bool:
        """One segment of known size: its real rows are a run of the blocks laid end to end."""
        return (
            len(self.sizes) == 1
            and all(isinstance(n, int) for n in (self.outer, *self.sizes, *self.windows))
            and (self.outer == 1)
        )


class _Function(torch.autograd.Function):
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


def _group_size(group: str) -> int:
    return _get_group_size_by_name(GroupName(group))


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


def _owned_rows(layout: ShardedDim, ranks: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """The global row of each local row of `ranks` `[n]`, and if it is real: `[n * outer * local]`."""
    rows: list[Tensor] = []
    real: list[Tensor] = []
    start = 0
    segments = zip(layout.sizes, layout.granules, layout.before, layout.blocks(parts), strict=True)
    for size, granule, before, block in segments:
        row = ranks.view(-1, 1, 1) * block + torch.arange(block, device=ranks.device) - before
        last = (size - granule + (row - size) % granule).clamp(min=0)
        padded = torch.where(row < size, (row % granule).clamp(max=size - 1), last) if layout.windows else last
        is_real = (row >= 0) & (row < size) if layout.windows else row < size
        rows.append(torch.where(is_real, row, padded) + start)
        real.append(is_real)
        start = start + size
    outer = torch.arange(layout.outer, device=ranks.device).unsqueeze(1)
    within = torch.cat(real, 2).expand(-1, layout.outer, -1)
    return (outer * layout.rows + torch.cat(rows, 2)).flatten(), within.flatten()


def _nearest_real(layout: ShardedDim, rank: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """For each local row of `rank` the nearest real one in its segment, and if there is one: `[local]`."""
    index: list[Tensor] = []
    present: list[Tensor] = []
    start = 0
    for size, before, block in zip(layout.sizes, layout.before, layout.blocks(parts), strict=True):
        first, last = before - rank * block, before + size - 1 - rank * block
        row = torch.arange(block, device=rank.device)
        nearest = torch.minimum(torch.maximum(row, first), last).clamp(0, block - 1)
        index.append(nearest + start)
        present.append(((last >= 0) & (first < block)).expand(block))
        start = start + block
    return torch.cat(index), torch.cat(present)


def _stored_rows(layout: ShardedDim, parts: int, device: torch.device) -> Tensor:
    """Where each global row lies in the local rows of all ranks end to end, `[outer * s]`."""
    if len(layout.sizes) == 1 and isinstance(layout.outer, int) and layout.outer == 1:
        return torch.arange(layout.rows, device=device) + layout.before[0]
    stored: list[Tensor] = []
    outer = torch.arange(layout.outer, device=device).unsqueeze(1)
    start, local = 0, layout.local(parts)
    for size, before, block in zip(layout.sizes, layout.before, layout.blocks(parts), strict=True):
        row = torch.arange(size, device=device) + before
        # Not `row // block`: torch 2.13's Inductor splits a loop over such rows by `block` and, on CPU, drops the rest.
        owner = (row.unsqueeze(1) >= torch.arange(1, parts, device=device) * block).sum(1)
        stored.append((owner * layout.outer + outer) * local + row - owner * block + start)
        start = start + block
    return torch.cat(stored, 1).flatten()


def _split(x: Tensor, dim: int, *sizes: int) -> Tensor:
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def _fill(x: Tensor, dim: int, keep: Tensor, fill: float = 0) -> Tensor:
    """`x` where `keep` `[rows]`, else `fill`; never a product, which would keep infinities."""
    return x.masked_fill(~keep.view(-1, *[1] * (x.dim() - dim - 1)), fill)


def _cut(x: Tensor, layout: ShardedDim, ranks: Tensor, parts: int, zero: bool) -> Tensor:
    """`[.., outer * s, ..]` -> `[.., n * outer * local, ..]`: the parts of `ranks` `[n]`."""
    rows, real = _owned_rows(layout, ranks, parts)
    x = x.index_select(layout.dim, rows)
    return _fill(x, layout.dim, real) if zero and not layout.is_even(parts) else x


def _cut_for_all(x: Tensor, layout: ShardedDim, parts: int, zero: bool) -> Tensor:
    """`[.., outer * s, ..]` -> `[P, .., outer * local, ..]`: the parts of all ranks."""
    dim, local = layout.dim, layout.local(parts)
    if layout.is_even(parts):
        x = _split(x, dim, layout.outer, parts, local).movedim(dim + 1, 0)
        return x.flatten(dim + 1, dim + 2)
    x = _cut(x, layout, torch.arange(parts, device=x.device), parts, zero)
    return _split(x, dim, parts, layout.outer * local).movedim(dim, 0)


def _join(pieces: Tensor, layout: ShardedDim, parts: int) -> Tensor:
    """`[P, .., outer * local, ..]` -> `[.., outer * s, ..]`: the real rows of all parts."""
    dim, local = layout.dim, layout.local(parts)
    if layout.is_even(parts):
        x = _split(pieces, dim + 1, layout.outer, local).movedim(0, dim + 1)
        return x.flatten(dim, dim + 2)
    x = pieces.movedim(0, dim).flatten(dim, dim + 1)
    return x.index_select(dim, _stored_rows(layout, parts, x.device))


def _gather(x: Tensor, layout: ShardedDim, group: str) -> Tensor:
    parts = _group_size(group)
    # A new first dimension of 1: ranks are laid end to end along it.
    gathered = _collectives.all_gather_into_tensor(x.unsqueeze(0).contiguous(), parts, group)
    return _join(_collectives.wait_tensor(gathered), layout, parts)


def _start_exchange(x: Tensor, scatter: ShardedDim, group: str, zero: bool) -> Tensor:
    """Whole along `scatter` -> `[P, ..]`, a piece from every rank; to be waited for."""
    parts = _group_size(group)
    sent, ones = _cut_for_all(x, scatter, parts, zero).contiguous(), [1] * parts
    received: Tensor = _collectives.all_to_all_single(sent, ones, ones, group)
    return received


def _sent_together(pieces: Sequence[Tensor], group: str) -> list[Tensor]:
    """`[P, ..]` each, a piece for every rank, or `[1, ..]`, the same for all -> `[P, ..]`, a piece from every rank.

    One launch for each dtype.
    """
    parts = _group_size(group)
    ones = [1] * parts
    alike = {x.dtype: [at for at, other in enumerate(pieces) if other.dtype == x.dtype] for x in pieces}
    started = []
    for members in alike.values():
        to_each = max(pieces[at].shape[0] for at in members)
        rows = [pieces[at].expand(to_each, *pieces[at].shape[1:]).flatten(1) for at in members]
        sent = torch.cat(rows, 1) if len(rows) > 1 else rows[0].contiguous()
        if to_each == 1:
            packed = _collectives.all_gather_into_tensor(sent, parts, group)
        else:
            packed = _collectives.all_to_all_single(sent, ones, ones, group)
        started.append((members, [row.shape[1] for row in rows], packed))
    received = list(pieces)
    for members, widths, packed in started:
        rows = _collectives.wait_tensor(packed).split(widths, 1)
        for at, row in zip(members, rows, strict=True):
            received[at] = row.view(parts, *pieces[at].shape[1:])
    return received


def as_transported(x: Tensor) -> Tensor:
    """`x`, or a view of its bytes, a new last dimension, if transports refuse it."""
    if x.dtype in _TRANSPORTED:
        return x
    # A lazy conjugate or negative has no bytes of its own.
    return x.resolve_conj().resolve_neg().unsqueeze(-1).view(torch.uint8)


def _as_before(data: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `as_transported`."""
    return data if dtype in _TRANSPORTED else data.contiguous().view(dtype).squeeze(-1)


def _moved(move: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return _as_before(move(as_transported(x)), x.dtype)


def _all_reduce(x: Tensor, kind: str, group: str) -> Tensor:
    result: Tensor = _collectives.wait_tensor(_collectives.all_reduce(x.contiguous(), kind, group))
    return result


def _reduced(x: Tensor, kind: str, group: str) -> Tensor:
    """The sum, max or min over ranks; of half types in float32, where 131072 ones are finite."""
    if kind == "sum" and x.is_complex():
        return torch.view_as_complex(_reduced(torch.view_as_real(x.resolve_conj()), kind, group))
    if x.dtype in _HALVES:
        return _all_reduce(x.float(), kind, group).to(x.dtype)
    if x.dtype == torch.bool and kind != "sum":
        return _all_reduce(x.to(torch.uint8), kind, group).to(x.dtype)
    if x.dtype not in _TRANSPORTED:
        raise SequenceParallelError(
            f"transports cannot reduce {x.dtype} over ranks ({kind}): convert the tensor to "
            "float32 or int64 before the operator that is reduced, and back after it"
        )
    return _all_reduce(x, kind, group)


def _sum_rows(x: Tensor, dim: int, index: Tensor, rows: int) -> Tensor:
    """`y[k]` is the sum of the rows of `x` whose index is k, in float32 for half types."""
    wide = x.float() if x.dtype in _HALVES else x
    zeros = wide.new_zeros([*x.shape[:dim], rows, *x.shape[dim + 1 :]])
    return zeros.index_add(dim, index, wide).to(x.dtype)


class _Shard(_Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: Tensor, layout: ShardedDim, group: str, zero: bool = False) -> Tensor:
        ctx.save_for_backward(rank)
        ctx.layout, ctx.group, parts = layout, group, _group_size(group)
        return _moved(lambda t: _cut(t, layout, rank, parts, zero), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _AllGather.run(grad, *ctx.saved_tensors, ctx.layout, ctx.group), *[None] * 4


class _AllGather(_Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: Tensor, layout: ShardedDim, group: str) -> Tensor:
        ctx.save_for_backward(rank)
        ctx.layout, ctx.group = layout, group
        return _moved(lambda t: _gather(t, layout, group), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Shard.run(grad, *ctx.saved_tensors, ctx.layout, ctx.group, True), *[None] * 3


class Exchange(NamedTuple):
    """Local along `gather`, whole along `scatter` -> the reverse, by equal parts."""

    gather: ShardedDim
    scatter: ShardedDim
    zero: bool = False
    """Pad with zeros, as gradients are."""

    def cut(self, x: Tensor, rank: Tensor | None, parts: int) -> Tensor:
        """`[P, g, ..]`: pieces with their rows of the gathered dimension first, to be laid end to end as they come."""
        return _cut_for_all(as_transported(x), self.scatter, parts, self.zero).movedim(self.gather.dim + 1, 1)

    def join(self, pieces: Tensor, rank: Tensor | None, parts: int, dtype: torch.dtype) -> Tensor:
        """The real rows of the gathered dimension: where they are a run a view of the pieces, no copy."""
        gather = self.gather
        if gather.is_a_run():
            rows = pieces.flatten(0, 1).narrow(0, gather.before[0], gather.sizes[0]).movedim(0, gather.dim)
        else:
            rows = _join(pieces.movedim(1, gather.dim + 1), gather, parts)
        return _as_before(rows, dtype)

    def back(self) -> Exchange:
        return Exchange(self.scatter, self.gather, True)


class _AllToAll(_Function):
    """Some exchanges at once. What has no gradient, or takes none, is not sent in backward."""

    @classmethod
    def of(
        cls, exchanges: Sequence[AnyExchange | _KVReturn], rank: Tensor | None, group: str, *xs: Tensor
    ) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = cls.apply(exchanges, rank, group, *xs)  # type: ignore[no-untyped-call]
        return results

    @staticmethod
    def forward(
        ctx: Any, exchanges: Sequence[Any], rank: Tensor | None, group: str, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rank)
        ctx.exchanges, ctx.group, parts = exchanges, group, _group_size(group)
        ctx.set_materialize_grads(False)
        pairs = [*zip(exchanges, tensors, strict=True)]
        received = _sent_together([each.cut(x, rank, parts) for each, x in pairs], group)
        results = [each.join(pieces, rank, parts, x.dtype) for (each, x), pieces in zip(pairs, received, strict=True)]
        trained = ctx.needs_input_grad[3:]
        ctx.mark_non_differentiable(*(y for y, needed in zip(results, trained, strict=True) if not needed))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (rank,) = ctx.saved_tensors
        at = [index for index, grad in enumerate(grads) if grad is not None]
        sent: list[Tensor | None] = [None] * len(grads)
        if at:
            back = tuple(ctx.exchanges[index].back() for index in at)
            returned = _AllToAll.of(back, rank, ctx.group, *(grad for grad in grads if grad is not None))
            for index, grad in zip(at, returned, strict=True):
                sent[index] = grad
        return None, None, None, *sent


class _StartAllToAll(_Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter: ShardedDim, group: str, zero: bool = False) -> Tensor:
        ctx.scatter, ctx.group = scatter, group
        return _start_exchange(as_transported(x), scatter, group, zero)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ReturnPieces.run(grad, ctx.scatter, ctx.group), *[None] * 3


class _ReturnPieces(_Function):
    """`[P, ..]` -> whole along `scatter`: each piece back to the rank that cut it."""

    @staticmethod
    def forward(ctx: Any, pieces: Tensor, scatter: ShardedDim, group: str) -> Tensor:
        ctx.scatter, ctx.group, parts = scatter, group, _group_size(group)
        ones = [1] * parts
        received = _collectives.all_to_all_single(pieces.contiguous(), ones, ones, group)
        return _join(_collectives.wait_tensor(received), scatter, parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pieces = _StartAllToAll.run(grad, ctx.scatter, ctx.group, True)
        return _collectives.wait_tensor(pieces), None, None


class _Sum(_Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _reduced(x, "sum", group)

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
        result = _reduced(x, kind, group)
        ctx.save_for_backward(x, result)
        ctx.group = group
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, result = ctx.saved_tensors
        wins = x == result
        winners = _reduced(wins.to(torch.int32), "sum", ctx.group)
        share = _Replicate.run(grad, ctx.group) / winners
        return share.masked_fill(~wins, 0), None, None


class _SelectRows(_Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, row: Tensor, mine: Tensor, group: str) -> Tensor:
        ctx.save_for_backward(row, mine)
        ctx.dim, ctx.rows, ctx.group = dim, x.shape[dim], group
        # A row has one owner and the other ranks add zeros: exact in every dtype, or its bytes.
        return _moved(lambda t: _all_reduce(_fill(t.index_select(dim, row), dim, mine), "sum", group), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        row, mine = ctx.saved_tensors
        owned = _fill(_Replicate.run(grad, ctx.group), ctx.dim, mine)
        return _sum_rows(owned, ctx.dim, row, ctx.rows), *[None] * 4


class _KVHeads(NamedTuple):
    """Which of G KV heads each of P ranks needs for its `per_rank = ceil(H / P)` query heads.

    Query head h reads KV head `h // (H / G)`, so a rank needs a run of neighbours. Each is sent
    `width` of them, what the neediest needs. With H = 6, G = 2, P = 4 they need `[0]`, `[0, 1]`,
    `[1]`, `[1]`: width 2. Arithmetic on ranks, for a table would be a constant of the graph.
    """

    kv_heads: int
    query_heads: int
    parts: int

    @property
    def per_rank(self) -> int:
        return block_rows(self.query_heads, 1, self.parts)

    @property
    def width(self) -> int:
        share, last = self.query_heads // self.kv_heads, self.query_heads - 1
        firsts = [min(rank * self.per_rank, last) for rank in range(self.parts)]
        return max(min(h + self.per_rank - 1, last) // share - h // share + 1 for h in firsts)

    def layout(self, dim: int) -> ShardedDim:
        """The heads as they are sent: `width` to each rank."""
        return ShardedDim(dim, 1, [self.parts * self.width], [self.width])

    def query(self, rank: Tensor) -> Tensor:
        """The query heads of `rank`, padding included, `[per_rank]`."""
        return rank * self.per_rank + torch.arange(self.per_rank, device=rank.device)

    def read_by(self, query: Tensor) -> Tensor:
        return query.clamp(max=self.query_heads - 1) // (self.query_heads // self.kv_heads)

    def sent(self, device: torch.device) -> Tensor:
        """The KV heads sent to each rank in turn, `[P * width]`."""
        first = self.read_by(torch.arange(self.parts, device=device) * self.per_rank)
        run = first.unsqueeze(1) + torch.arange(self.width, device=device)
        return run.clamp(max=self.kv_heads - 1).flatten()

    def received(self, rank: Tensor) -> Tensor:
        """Where each of my query heads finds its KV head among the `width` sent, `[per_rank]`."""
        return self.read_by(self.query(rank)) - self.read_by(rank * self.per_rank)

    def without_padding(self, x: Tensor, dim: int, rank: Tensor) -> Tensor:
        """`x` with zeros in the query heads of `rank` that are padding."""
        return _fill(x, dim, self.query(rank) < self.query_heads)


class KVExchange(NamedTuple):
    """Local along `gather`, whole KV heads along `dim` -> the whole of `gather`, the KV head of each query head."""

    gather: ShardedDim
    dim: int
    heads: _KVHeads
    zero: bool = False

    def cut(self, x: Tensor, rank: Tensor | None, parts: int) -> Tensor:
        sent = _moved(lambda t: t.index_select(self.dim, self.heads.sent(t.device)), x)
        return Exchange(self.gather, self.heads.layout(self.dim)).cut(sent, rank, parts)

    def join(self, pieces: Tensor, rank: Tensor | None, parts: int, dtype: torch.dtype) -> Tensor:
        assert rank is not None
        received = Exchange(self.gather, self.heads.layout(self.dim)).join(pieces, rank, parts, dtype)
        heads = _moved(lambda t: t.index_select(self.dim, self.heads.received(rank)), received)
        return self.heads.without_padding(heads, self.dim, rank) if self.zero else heads

    def back(self) -> _KVReturn:
        return _KVReturn(self.gather, self.dim, self.heads)


class _KVReturn(NamedTuple):
    """The way back: gradients of my query heads -> those of all KV heads, summed over the query heads of each."""

    gather: ShardedDim
    dim: int
    heads: _KVHeads

    @property
    def exchange(self) -> Exchange:
        return Exchange(self.heads.layout(self.dim), self.gather, True)

    def cut(self, grad: Tensor, rank: Tensor | None, parts: int) -> Tensor:
        assert rank is not None
        grad = self.heads.without_padding(grad, self.dim, rank)
        return self.exchange.cut(_sum_rows(grad, self.dim, self.heads.received(rank), self.heads.width), rank, parts)

    def join(self, pieces: Tensor, rank: Tensor | None, parts: int, dtype: torch.dtype) -> Tensor:
        sent = self.exchange.join(pieces, rank, parts, dtype)
        return _sum_rows(sent, self.dim, self.heads.sent(sent.device), self.heads.kv_heads)

    def back(self) -> KVExchange:
        return KVExchange(self.gather, self.dim, self.heads, True)


class GatherExchange(NamedTuple):
    """Local along `gather` -> whole on every rank, on its way into sharded work."""

    gather: ShardedDim

    def cut(self, x: Tensor, rank: Tensor | None, parts: int) -> Tensor:
        return as_transported(x).movedim(self.gather.dim, 0).unsqueeze(0)

    def join(self, pieces: Tensor, rank: Tensor | None, parts: int, dtype: torch.dtype) -> Tensor:
        return Exchange(self.gather, self.gather).join(pieces, rank, parts, dtype)

    def back(self) -> _GatherReturn:
        return _GatherReturn(self.gather)


class _GatherReturn(NamedTuple):
    """The way back, a reduce-scatter: the gradients that all ranks have of my rows, summed; 0 at padding."""

    gather: ShardedDim

    def cut(self, grad: Tensor, rank: Tensor | None, parts: int) -> Tensor:
        return _cut_for_all(as_transported(grad), self.gather, parts, True)

    def join(self, pieces: Tensor, rank: Tensor | None, parts: int, dtype: torch.dtype) -> Tensor:
        terms = _as_before(pieces, dtype)
        return (terms.float() if dtype in _HALVES else terms).sum(0).to(dtype)

    def back(self) -> GatherExchange:
        return GatherExchange(self.gather)


AnyExchange: TypeAlias = Exchange | KVExchange | GatherExchange
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
    layout = _layout(x, dim, outer, sizes, granules, windows, _group_size(group))
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
    parts = _group_size(group)
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
    return _as_before(_join(_collectives.wait_tensor(pieces), gather, _group_size(group)), dtype)


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
    parts = _group_size(group)
    layout = _layout(x, dim, outer, sizes, granules, windows, parts)
    _, real = _owned_rows(layout, rank, parts)
    return _fill(x, layout.dim, real, fill)


@_op(f"refill_padding(Tensor x, Tensor rank, {_LAYOUT}, str group, {_WINDOWS}) -> Tensor")
def refill_padding(
    x: Tensor, rank: Tensor, dim: int, outer: int, sizes: Sizes, granules: Sizes, group: str, windows: Sizes = ()
) -> Tensor:
    """`[B, ceil(S/P), C]` with a real row of the same segment in place of padding that holds rows which are gone.

    `y_r = x_r` at real rows, else the nearest real one of mine; or, where a rank may have none, the first of all, which
    costs an all-reduce of a row. Backward g at real rows, for the gradient of padding is 0. One `outer` only.
    """
    parts = _group_size(group)
    layout = _layout(x, dim, outer, sizes, granules, windows, parts)
    mine, present = _nearest_real(layout, rank, parts)
    nearest = x.index_select(layout.dim, mine)
    if layout.each_rank_has_rows(parts):
        return nearest
    starts, blocks = [sum(layout.sizes[:at]) for at in range(len(layout.sizes))], layout.blocks(parts)
    # Sizes may be symbolic: no tensor is made from a list of them.
    first = torch.cat([torch.full((1,), start, device=x.device, dtype=torch.int64) for start in starts])
    rows = select_rows(x, rank, dim, outer, sizes, granules, first, group, windows)
    segment = torch.cat([torch.full((n,), at, device=x.device, dtype=torch.int64) for at, n in enumerate(blocks)])
    remote = rows.index_select(layout.dim, segment)
    return torch.where(present.view(-1, *[1] * (x.dim() - layout.dim - 1)), nearest, remote)


@_op(f"positions(Tensor rank, SymInt outer, SymInt[] sizes, SymInt[] granules, str group, {_WINDOWS}) -> Tensor")
def positions(rank: Tensor, outer: int, sizes: Sizes, granules: Sizes, group: str, windows: Sizes = ()) -> Tensor:
    """The global row of each local row, int64 `[outer * local]`; padding repeats as in `shard`."""
    return _owned_rows(ShardedDim(0, outer, sizes, granules, windows), rank, _group_size(group))[0]


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
    parts = _group_size(group)
    layout = _layout(x, dim, outer, sizes, granules, windows, parts)
    wrapped = torch.where(index < 0, index + outer * layout.rows, index)
    stored = _stored_rows(layout, parts, x.device).index_select(0, wrapped)
    mine = stored // x.shape[layout.dim] == rank
    row = torch.where(mine, stored % x.shape[layout.dim], 0)
    return _SelectRows.run(x, layout.dim, row, mine, group)


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
    parts = _group_size(group)
    gather = _layout(x, gather_dim, gather_outer, gather_sizes, gather_granules, gather_windows, parts)
    dim = _dimension(x, head_dim)
    _check_distinct(x, gather.dim, dim)
    heads = _KVHeads(x.shape[dim], query_heads, parts)
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
    layout = _layout(x, dim, outer, sizes, granules, windows, _group_size(group))
    (result,) = _AllToAll.of((GatherExchange(layout),), None, group, x)
    return result


PACKED = ("all_to_all", "all_to_all_kv", "all_gather")
"""The ops that `all_to_all_packed` stands for, by number; an `all_gather` that `replicate` follows."""


@_op("all_to_all_packed(Tensor[] tensors, Tensor rank, SymInt[] exchanges, str group) -> Tensor[]")
def all_to_all_packed(tensors: Sequence[Tensor], rank: Tensor, exchanges: Sizes, group: str) -> list[Tensor]:
    """Several exchanges of one moment in one launch (one for each dtype), backward too: `all_to_all`, `all_to_all_kv`
    and `all_gather_replicate`.

    `exchanges` has for each tensor what `packed_exchange` wrote. Backward sends the gradients that there are, of
    tensors that take one.
    """
    numbers, parts = iter(exchanges), _group_size(group)
    moves = [read_exchange(numbers, x, parts) for x in tensors]
    return list(_AllToAll.of(moves, rank, group, *tensors))


def packed_exchange(op: torch._ops.OpOverload, arguments: Mapping[str, Any]) -> list[Any]:
    """The arguments of an exchange as numbers among those of `all_to_all_packed`."""

    def layout(side: str) -> ShardedDim:
        dim, outer, sizes, granules = (arguments[f"{side}{name}"] for name in ("dim", "outer", "sizes", "granules"))
        return ShardedDim(dim, outer, sizes, granules, arguments.get(f"{side}windows", ()))

    kind = PACKED.index(op._opname)
    if op is torch.ops.sp.all_gather.default:
        return [kind, *layout("").written()]
    if op is torch.ops.sp.all_to_all_kv.default:
        return [kind, *layout("gather_").written(), arguments["head_dim"], arguments["query_heads"]]
    return [kind, *layout("gather_").written(), *layout("scatter_").written()]


def read_exchange(numbers: Iterator[int], x: Tensor, parts: int) -> AnyExchange:
    """What `packed_exchange` wrote, of one tensor."""
    kind, gather = PACKED[next(numbers)], ShardedDim.read(numbers)
    if kind == "all_gather":
        return GatherExchange(gather)
    if kind == "all_to_all_kv":
        dim, query_heads = next(numbers), next(numbers)
        return KVExchange(gather, dim, _KVHeads(x.shape[dim], query_heads, parts))
    return Exchange(gather, ShardedDim.read(numbers))


MOVING_OPS = frozenset(
    getattr(torch.ops.sp, name).default
    for name in (*PACKED, "all_to_all_packed", "all_gather_replicate", "all_reduce", "select_rows")
)
"""The ops that launch a collective forward."""
