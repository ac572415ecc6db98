"""Exchanges, each in three steps: a rank cuts a piece for every rank, pieces travel, and what came is joined.

Several of one moment travel as one: their pieces are laid side by side. The way back of an exchange is an exchange. In
`all_to_all_packed` each is a row of numbers, which `packed_exchange` writes and `read_exchange` reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..placement.placements import block_rows
from ..placement.sharded_dim import ShardedDim, fill_rows
from .transport import HALVES, as_before, as_transported, moved


class Exchange(NamedTuple):
    """Local along `gather`, whole along `scatter` -> the reverse, by equal parts."""

    gather: ShardedDim
    scatter: ShardedDim
    zero: bool = False
    """Pad with zeros, as gradients are."""

    def cut(self, x: Tensor, rank: Tensor | None, parts: int) -> Tensor:
        """`[P, g, ..]`: pieces with their rows of the gathered dimension first, to be laid end to end as they come."""
        return self.scatter.cut_for_all(as_transported(x), parts, self.zero).movedim(self.gather.dim + 1, 1)

    def join(self, pieces: Tensor, rank: Tensor | None, parts: int, dtype: torch.dtype) -> Tensor:
        """The real rows of the gathered dimension: where they are a run a view of the pieces, no copy."""
        gather = self.gather
        if gather.is_a_run():
            rows = pieces.flatten(0, 1).narrow(0, gather.before[0], gather.sizes[0]).movedim(0, gather.dim)
        else:
            rows = gather.join(pieces.movedim(1, gather.dim + 1), parts)
        return as_before(rows, dtype)

    def back(self) -> Exchange:
        return Exchange(self.scatter, self.gather, True)


class KVHeads(NamedTuple):
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
        return fill_rows(x, dim, self.query(rank) < self.query_heads)


class KVExchange(NamedTuple):
    """Local along `gather`, whole KV heads along `dim` -> the whole of `gather`, the KV head of each query head."""

    gather: ShardedDim
    dim: int
    heads: KVHeads
    zero: bool = False

    def cut(self, x: Tensor, rank: Tensor | None, parts: int) -> Tensor:
        sent = moved(lambda t: t.index_select(self.dim, self.heads.sent(t.device)), x)
        return Exchange(self.gather, self.heads.layout(self.dim)).cut(sent, rank, parts)

    def join(self, pieces: Tensor, rank: Tensor | None, parts: int, dtype: torch.dtype) -> Tensor:
        assert rank is not None
        received = Exchange(self.gather, self.heads.layout(self.dim)).join(pieces, rank, parts, dtype)
        heads = moved(lambda t: t.index_select(self.dim, self.heads.received(rank)), received)
        return self.heads.without_padding(heads, self.dim, rank) if self.zero else heads

    def back(self) -> KVReturn:
        return KVReturn(self.gather, self.dim, self.heads)


class KVReturn(NamedTuple):
    """The way back: gradients of my query heads -> those of all KV heads, summed over the query heads of each."""

    gather: ShardedDim
    dim: int
    heads: KVHeads

    @property
    def exchange(self) -> Exchange:
        return Exchange(self.heads.layout(self.dim), self.gather, True)

    def cut(self, grad: Tensor, rank: Tensor | None, parts: int) -> Tensor:
        assert rank is not None
        grad = self.heads.without_padding(grad, self.dim, rank)
        return self.exchange.cut(sum_rows(grad, self.dim, self.heads.received(rank), self.heads.width), rank, parts)

    def join(self, pieces: Tensor, rank: Tensor | None, parts: int, dtype: torch.dtype) -> Tensor:
        sent = self.exchange.join(pieces, rank, parts, dtype)
        return sum_rows(sent, self.dim, self.heads.sent(sent.device), self.heads.kv_heads)

    def back(self) -> KVExchange:
        return KVExchange(self.gather, self.dim, self.heads, True)


class GatherExchange(NamedTuple):
    """Local along `gather` -> whole on every rank, on its way into sharded work."""

    gather: ShardedDim

    def cut(self, x: Tensor, rank: Tensor | None, parts: int) -> Tensor:
        return as_transported(x).movedim(self.gather.dim, 0).unsqueeze(0)

    def join(self, pieces: Tensor, rank: Tensor | None, parts: int, dtype: torch.dtype) -> Tensor:
        return Exchange(self.gather, self.gather).join(pieces, rank, parts, dtype)

    def back(self) -> GatherReturn:
        return GatherReturn(self.gather)


class GatherReturn(NamedTuple):
    """The way back, a reduce-scatter: the gradients that all ranks have of my rows, summed; 0 at padding."""

    gather: ShardedDim

    def cut(self, grad: Tensor, rank: Tensor | None, parts: int) -> Tensor:
        return self.gather.cut_for_all(as_transported(grad), parts, True)

    def join(self, pieces: Tensor, rank: Tensor | None, parts: int, dtype: torch.dtype) -> Tensor:
        terms = as_before(pieces, dtype)
        return (terms.float() if dtype in HALVES else terms).sum(0).to(dtype)

    def back(self) -> GatherExchange:
        return GatherExchange(self.gather)


AnyExchange: TypeAlias = Exchange | KVExchange | GatherExchange

PACKED = ("all_to_all", "all_to_all_kv", "all_gather")
"""The ops that `all_to_all_packed` stands for, by number; an `all_gather` that `replicate` follows."""


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
        return KVExchange(gather, dim, KVHeads(x.shape[dim], query_heads, parts))
    return Exchange(gather, ShardedDim.read(numbers))


def sum_rows(x: Tensor, dim: int, index: Tensor, rows: int) -> Tensor:
    """`y[k]` is the sum of the rows of `x` whose index is k, in float32 for half types."""
    wide = x.float() if x.dtype in HALVES else x
    zeros = wide.new_zeros([*x.shape[:dim], rows, *x.shape[dim + 1 :]])
    return zeros.index_add(dim, index, wide).to(x.dtype)
