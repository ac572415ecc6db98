"""Placements: what each rank of a sequence-parallel group holds of one value; and their block arithmetic.

`Sharded(dim, Layout(segments, outer))` reads dimension `dim` as `(outer, s)`, where `s` is a row of segments.
Each segment is cut in P blocks of `granule * ceil(size / (granule * P))` rows and a rank holds its block of every
segment, in order. Five rows on two ranks, granule 1 (`.` is padding, a repetition of the last granule):

    global    0 1 2 3 4
    rank 0    0 1 2
    rank 1    3 4 .

After `[S, B, C] -> [S*B, C]` the granule is B, for the B rows of one token stay together; after `[B, S, C] -> [B*S, C]`
`outer` is B. Two streams laid end to end by `cat` are two segments, and stay where they were. `x[:, 1:]` of such rows
stays where it was, too: a *window* of them, one row after the first, whose blocks are those of the five rows.

Sizes are ints, or sympy expressions of Dynamo's symbols: nothing here ever asks whether P divides a size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

Size: TypeAlias = int | sympy.Expr


def size_of(value: int | torch.SymInt | sympy.Expr) -> Size:
    """The size as a plain int, or as a sympy expression if it is symbolic; comparing those adds no guard."""
    if isinstance(value, int):
        return value
    expr = value.node.expr if isinstance(value, torch.SymInt) else value
    if expr.has(FloorDiv):
        expr = expr.replace(FloorDiv, _without_floor)
    return int(expr) if expr.is_Integer else expr


def _without_floor(size: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    """`s * 12 // s` is 12: one size has one expression, so that sizes may be compared as they are written."""
    quotient = sympy.cancel(size / divisor)
    return quotient if quotient.is_integer else FloorDiv(size, divisor)


def product(sizes: Sequence[Size]) -> Size:
    """The product of some sizes; 1 for none."""
    total: Size = 1
    for size in sizes:
        total = size_of(total * size)
    return total


def exact_quotient(size: Size, divisor: Size) -> Size | None:
    """`size / divisor` if it is known to be whole for every value of the symbols, else None."""
    if isinstance(size, int) and isinstance(divisor, int):
        return size // divisor if divisor and size % divisor == 0 else None
    quotient = sympy.cancel(sympy.sympify(size) / sympy.sympify(divisor))
    if not quotient.is_integer:
        return None
    return size_of(quotient)


def block_rows(size: int, granule: int, parts: int) -> int:
    """Rows of a segment that one of `parts` ranks holds, padding included: `granule * ceil(size / (granule * parts))`.

    Takes ints and `torch.SymInt`s alike, without a guard.
    """
    return granule * ((size + granule * parts - 1) // (granule * parts))


def longest_share(count: int, parts: int) -> float:
    """How many times an equal share the first of `parts` ranks holds of `count` rows.

    >>> longest_share(5, 4)
    1.6
    """
    return block_rows(count, 1, parts) * parts / count


def block_size(size: Size, granule: Size, parts: int) -> Size:
    """`block_rows` on the planner's sizes."""
    if isinstance(size, int) and isinstance(granule, int):
        return block_rows(size, granule, parts)
    return size_of(granule * FloorDiv(size + granule * parts - 1, granule * parts))


@dataclass(frozen=True)
class Segment:
    """One stream along a sharded dimension: `size` rows, of which `granule` in a row stay on one rank.

    A window has `before` and `after` rows that are no longer there, but had their place when blocks were cut.
    """

    size: Size
    granule: Size = 1
    before: Size = 0
    after: Size = 0

    @property
    def span(self) -> Size:
        """The rows that blocks are cut of."""
        return size_of(self.before + self.size + self.after)

    def cropped(self, low: Size, high: Size) -> Segment:
        """Without its first `low` and last `high` rows."""
        size = size_of(self.size - low - high)
        return Segment(size, self.granule, size_of(self.before + low), size_of(self.after + high))

    def __str__(self) -> str:
        rows = str(self.size) if self.granule == 1 else f"{self.size}/{self.granule}"
        return rows if self.span == self.size else f"{rows}[{self.before}:-{self.after}]"


def _fields(segment: Segment) -> tuple[Size, Size, Size, Size]:
    return segment.size, segment.granule, segment.before, segment.after


@dataclass(frozen=True)
class Layout:
    """How the rows of one dimension (or of one factor of it) lie on the ranks: `(outer, segments end to end)`."""

    segments: tuple[Segment, ...]
    outer: Size = 1

    @property
    def size(self) -> Size:
        """The global size, `outer` included."""
        return product([self.outer, sum(s.size for s in self.segments)])

    def local_size(self, parts: int) -> Size:
        """The size on each of `parts` ranks, padding included."""
        blocks = [block_size(segment.span, segment.granule, parts) for segment in self.segments]
        return product([self.outer, sum(blocks)])

    def is_even(self, parts: int) -> bool:
        """Whether it is known that no rank holds padding."""
        blocks = [block_size(segment.span, segment.granule, parts) for segment in self.segments]
        return all(s.size == block * parts == s.span for s, block in zip(self.segments, blocks, strict=True))

    def is_chunked(self, parts: int) -> bool:
        """Whether the rows of rank r are chunk r of `torch.chunk`, as `Shard` of a DTensor has them."""
        first, *others = self.segments
        plain = self.outer == 1 and not others and first.span == first.size
        return plain and self.local_size(parts) == block_size(first.size, 1, parts)

    def real_rows(self, rank: int, parts: int) -> list[tuple[int, int]]:
        """(local, global) index of each row of `rank` that is no padding; the sizes have to be ints."""
        rows, sizes = [], [(int(s.size), int(s.before), int(s.span), int(s.granule)) for s in self.segments]
        blocks = [block_rows(span, granule, parts) for _, _, span, granule in sizes]
        for outer in range(int(self.outer)):
            here, there = outer * sum(blocks), outer * sum(size for size, *_ in sizes)
            for (size, before, _, _), block in zip(sizes, blocks, strict=True):
                at = [(row, rank * block + row - before) for row in range(block)]
                rows += [(here + low, there + high) for low, high in at if 0 <= high < size]
                here, there = here + block, there + size
        return rows

    def scaled(self, left: Size, right: Size) -> Layout:
        """The layout of `(left this right)`, this being one factor of a larger dimension."""
        if left == right == 1:
            return self
        segments = (Segment(*(product([x, right]) for x in _fields(s))) for s in self.segments)
        return Layout(tuple(segments), product([left, self.outer]))

    def within(self, left: Size, size: Size, right: Size) -> Layout | None:
        """The inverse of `scaled`: the layout of the middle factor, or None where block boundaries do not agree."""
        outer = exact_quotient(self.outer, left)
        if outer is None:
            return None
        segments = []
        for segment in self.segments:
            fields = [quotient for x in _fields(segment) if (quotient := exact_quotient(x, right)) is not None]
            if len(fields) < 4:
                return None
            segments.append(Segment(*fields))
        layout = Layout(tuple(segments), outer)
        return layout if layout.size == size else None

    def cropped(self, low: Size, high: Size) -> Layout | None:
        """Without the first `low` and last `high` rows; None if it is not known in which segments they lie."""
        found = self.crop(low, high)
        if found is None:
            return None
        first, last, low, high = found
        kept = list(self.segments[first:last])
        kept[0] = kept[0].cropped(low, 0)
        kept[-1] = kept[-1].cropped(0, high)
        return Layout(tuple(kept))

    def crop(self, low: Size, high: Size) -> tuple[int, int, Size, Size] | None:
        """The first and last (excluded) segment that are left, and how many rows to cut off those."""
        front, back = _whole_segments(self.segments, low), _whole_segments(self.segments[::-1], high)
        if self.outer != 1 or front is None or back is None or front[0] + back[0] >= len(self.segments):
            return None
        return front[0], len(self.segments) - back[0], front[1], back[1]

    def __str__(self) -> str:
        rows = "+".join(map(str, self.segments))
        return rows if self.outer == 1 else f"{self.outer}x({rows})"


def _whole_segments(segments: Sequence[Segment], rows: Size) -> tuple[int, Size] | None:
    """How many whole segments the first `rows` rows are, and how many rows of the next; None if it is not known."""
    for at, segment in enumerate(segments):
        if rows == 0:
            return at, 0
        if rows == segment.size:
            rows = 0
        elif at == len(segments) - 1:
            return at, rows
        elif not isinstance(rows, int) or not isinstance(segment.size, int):
            return None
        elif rows < segment.size:
            return at, rows
        else:
            rows -= segment.size
    return len(segments), 0


def whole_layout(size: Size, granule: Size = 1) -> Layout:
    """The plain layout: one segment."""
    return Layout((Segment(size, granule),))


@dataclass(frozen=True)
class Rows:
    """Some rows in a row on each rank: `count` of them, from global row `first + rank * step` on.

    Those that are not among the `real` ones, such as padding, may be any.
    """

    first: int
    step: int
    count: int
    real: range

    def of(self, rank: int) -> range:
        """The global rows of a rank."""
        first = self.first + rank * self.step
        return range(first, first + self.count)


def held_rows(layout: Layout, parts: int) -> tuple[Rows, ...] | None:
    """The rows that a layout has on each rank, padding included, of each segment; None if a size is symbolic."""
    if layout.outer != 1 or not all(isinstance(size, int) for segment in layout.segments for size in _fields(segment)):
        return None
    found, start = [], 0
    for segment in layout.segments:
        block = block_rows(int(segment.span), int(segment.granule), parts)
        end = start + int(segment.size)
        found.append(Rows(start - int(segment.before), block, block, range(start, end)))
        start = end
    return tuple(found)


def rows_beside(layout: Layout, wanted: Sequence[Rows], parts: int) -> list[tuple[int, int]] | None:
    """How many rows before and after its block of each segment a rank wants, at most.

    None if it wants rows that neither it nor its neighbours hold.
    """
    held = held_rows(layout, parts)
    if held is None:
        return None
    found = []
    for rows in held:
        before = after = 0
        for rank, other in itertools.product(range(parts), wanted):
            mine, theirs = rows.of(rank), other.of(rank)
            low = max(theirs.start, rows.real.start, other.real.start)
            high = min(theirs.stop, rows.real.stop, other.real.stop)
            if low < high:
                before, after = max(before, mine.start - low), max(after, high - mine.stop)
        if max(before, after) > rows.count:
            return None
        found.append((before, after))
    return found


def received_rows(layout: Layout, wanted: Sequence[Rows], parts: int) -> float:
    """How many rows a rank receives for those that it wants: its neighbours send theirs to all, or all send all."""
    beside = rows_beside(layout, wanted, parts)
    if beside is None:
        return int(layout.size) * (parts - 1) / parts
    return sum(map(sum, beside)) * (parts - 1)


def moved_rows(source: Layout, target: Layout, parts: int) -> float | None:
    """How many rows a rank receives for another layout, of its neighbours; None if those do not have what it wants.

    >>> moved_rows(whole_layout(4096), Layout((Segment(4096, after=3),)), 4)
    9
    """
    wanted = held_rows(target, parts)
    if wanted is None or rows_beside(source, wanted, parts) is None:
        return None
    received = received_rows(source, wanted, parts)
    return received if received < int(source.size) * (parts - 1) / parts else None


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole value, and the same one."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True)
class Sharded:
    """Each rank holds its block of every segment of dimension `dim`, padded by repeating the last granule."""

    dim: int
    layout: Layout

    def __str__(self) -> str:
        return f"S({self.dim}: {self.layout})"


@dataclass(frozen=True)
class GroupedHeads:
    """Each rank holds one KV head for every query head of its block (`dim` has `query_heads` heads in all).

    What a site needs of K and V whose heads do not fall into P equal groups: 6 query heads on 2 KV heads and 4 ranks
    read the KV heads `[0 0] [0 1] [1 1] [1 .]`.
    """

    dim: int
    query_heads: int

    def __str__(self) -> str:
        return f"G({self.dim}: {self.query_heads})"


Placement: TypeAlias = Replicated | Sharded | GroupedHeads
REPLICATED = Replicated()


def local_shape(shape: Sequence[Size], placement: Placement, parts: int) -> tuple[Size, ...]:
    """The shape on each of `parts` ranks of a value of global `shape`."""
    sizes = list(shape)
    if isinstance(placement, Sharded):
        sizes[placement.dim] = placement.layout.local_size(parts)
    elif isinstance(placement, GroupedHeads):
        sizes[placement.dim] = block_size(placement.query_heads, 1, parts)
    return tuple(sizes)
