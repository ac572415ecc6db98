"""Op sharding rules: the loop factors of an op, and which dimension of each operand and result each one is.

A rule reads like einsum (after Shardy's `OpShardingRule`):

    linear                          "... i, o i, +o -> ... o"
    scaled_dot_product_attention    "b h q d!, b h k! d!, b h k! v -> b h q v"
    reshape [B, S, 12] to [B, S, 3, 4]    "b s (h d) -> b s h d"

A factor on both sides is *pass-through*: shard it, and every rank runs the op on its rows. A factor on the left only
is a *reduction*: the ranks hold terms of a sum. `!` is *need-replication*: the factor must be whole for the op to be
right. `+` marks an additive operand, which a sum over ranks counts once; `~` one of which only dtype and device matter.
A dimension may be several factors, `(g r)`, outermost first, or streams laid end to end, `[t | i]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..placement.placements import (
    REPLICATED,
    GroupedHeads,
    Layout,
    Placement,
    Rows,
    Segment,
    Sharded,
    Size,
    exact_quotient,
    held_rows,
    product,
    received_rows,
    whole_layout,
)
from .local_op import Body

Factors = tuple[str, ...]


@dataclass(frozen=True)
class Joined:
    """A dimension made of streams laid end to end: what `cat` makes, and `split` and `slice` undo."""

    streams: Factors


Dim = Factors | Joined


@dataclass(frozen=True)
class Halo:
    """Row j of a factor of the result reads `reach` rows of an operand's factor, from row `j * stride - padding` on.

    The operand is the first. Rows that are not there are 0.
    """

    source: str
    reach: int
    stride: int
    padding: int

    def read(self, made: Layout, parts: int) -> Rows:
        """The rows that each rank reads to make its rows of a layout that `layout` gave."""
        held = held_rows(made, parts)
        assert held is not None
        (rows,) = held
        first, last = (self._first(row) for row in (rows.real.start, rows.real.stop - 1))
        count = (rows.count - 1) * self.stride + self.reach
        return Rows(self._first(rows.first), rows.step * self.stride, count, range(first, last + self.reach))

    def _first(self, window: int) -> int:
        return window * self.stride - self.padding

    def layout(self, rows: Layout, size: Size, made: bool) -> Layout | None:
        """How the `size` windows of some rows lie, or for windows that are `made` their rows; None if not in blocks.

        As near to their middle rows as they fit beside the longest stream of the rows, else in blocks of their own;
        where rows lie in granules, as many windows as stride over one.
        """
        held = held_rows(rows, 1)
        if held is None or not isinstance(size, int) or (made and len(held) > 1):
            return None
        at = max(range(len(held)), key=lambda each: held[each].count)
        segment, span = rows.segments[at], int(rows.segments[at].span)
        if self.stride == 1 and size <= span:
            middle = (self.reach - 1) // 2 - self.padding
            before = (-middle if made else middle) - held[at].first
            before = min(max(before, 0), span - size)
            if segment.granule == 1 or (before, size) == (segment.before, segment.size):
                return Layout((Segment(size, segment.granule, before, span - size - before),))
        if all(each.granule == 1 for each in rows.segments):
            return whole_layout(size)
        granule = segment.granule * self.stride if made else exact_quotient(segment.granule, self.stride)
        fits = size == span * self.stride if made else size * self.stride == span
        return whole_layout(size, granule) if granule and fits and span == rows.size else None


Cut = dict[str, Layout]
"""The layout of each factor that is sharded: one, or all streams of one dimension."""


@dataclass(frozen=True)
class OpSharding:
    """An op run on shards of one factor: what it takes and what it makes."""

    factor: str
    operands: tuple[Sharded | GroupedHeads | None, ...]
    """None: the operand lacks the factor and is needed whole."""
    results: tuple[Placement, ...]


@dataclass(frozen=True)
class OpShardingRule:
    """The factors of one op call. See the module's docstring."""

    operands: tuple[tuple[Dim, ...], ...]
    results: tuple[tuple[Dim, ...], ...]
    sizes: Mapping[str, Size]
    need_replication: frozenset[str] = frozenset()
    additive: frozenset[int] = frozenset()
    metadata: frozenset[int] = frozenset()
    movement: bool = False
    """The op only moves rows: a view, an `expand`, a `repeat_interleave`."""
    shape_argument: str | None = None
    """The argument that repeats the shape of the result, and becomes local with it."""
    bodies: Mapping[str, Body] = field(default_factory=dict)
    """How the op runs on one rank when a factor is sharded, where calling it as it is would be wrong."""
    windows: Mapping[str, tuple[str, Size, Size]] = field(default_factory=dict)
    """A factor of the result that is one of an operand without some first and some last rows, which stay in place."""
    halos: Mapping[str, Halo] = field(default_factory=dict)
    """A factor of the result whose rows read some rows of the first operand's, a few of which other ranks have."""
    rather: OpShardingRule | None = None
    """Another reading of the op, with factors of other names, that is followed where the shards allow it."""
    otherwise: OpShardingRule | None = None
    """Another reading of the op, that is followed where this one cannot be."""

    def __str__(self) -> str:
        def text(dims: tuple[Dim, ...]) -> str:
            words: list[str] = []
            for dim in dims:
                names = [f"{each}!" if each in self.need_replication else each for each in factors_of(dim)]
                if isinstance(dim, Joined):
                    words.append(f"[{' | '.join(names)}]")
                else:
                    words.append(names[0] if len(names) == 1 else f"({' '.join(names)})" if names else "1")
            return " ".join(words)

        signs = ["+" * (at in self.additive) + "~" * (at in self.metadata) for at in range(len(self.operands))]
        left = ", ".join(sign + text(dims) for sign, dims in zip(signs, self.operands, strict=True))
        return f"{left} -> {', '.join(map(text, self.results))}"

    def follow(self, operand: int, placements: Sequence[Placement]) -> OpSharding | None:
        """The op on the shards that operand `operand` comes in, or None if it cannot run so."""
        preferred = self.rather.follow(operand, placements) if self.rather else None
        sharding = preferred or self.run_on(self._cut(self.operands[operand], placements[operand], placements))
        return sharding or (self.otherwise.follow(operand, placements) if self.otherwise else None)

    def body(self, sharding: OpSharding) -> Body | None:
        """How the op runs on one rank, if it cannot be called as it is."""
        readings = [each for each in (self, self.rather, self.otherwise) if each is not None]
        return next((each.bodies[sharding.factor] for each in readings if sharding.factor in each.bodies), None)

    def follow_result(self, result: int, placement: Placement, placements: Sequence[Placement]) -> OpSharding | None:
        """The op that makes result `result` with that placement, or None."""
        return self.run_on(self._cut(self.results[result], placement, placements))

    def shard_factor(self, factor: str, granule: Size = 1) -> OpSharding | None:
        """The op on plain shards of one factor, `granule` rows staying together."""
        return self.run_on(self._with_neighbours(factor, whole_layout(self.sizes[factor], granule), ()))

    def carry(self, operand: int, placements: Sequence[Placement]) -> tuple[Placement, ...]:
        """Where the results would sit had the op kept its operand's placement, need-replication or not.

        A whole dimension that changes its size in its place, as a length does in a convolution, is still the sequence.
        """
        cut = self._mark(self.operands[operand], placements[operand], placements)
        return tuple((cut and self._place(dims, cut)) or REPLICATED for dims in self.results)

    def carry_back(self, result: int, placement: Placement) -> tuple[Sharded | None, ...]:
        """Where each operand would sit for the result to have that placement, need-replication or not."""
        cut = self._mark(self.results[result], placement, ())
        return tuple(self._place(dims, cut) if cut else None for dims in self.operands)

    def borrowable(self, operand: int) -> tuple[tuple[str, int], ...]:
        """The (factor, dimension) pairs of an operand that pass through, each the only one to pass in its dimension."""
        found = []
        for index, dim in enumerate(self.operands[operand]):
            passing = [each for each in factors_of(dim) if each not in self.need_replication and self._made(each)]
            if isinstance(dim, tuple) and len(passing) == 1:
                found.append((passing[0], index))
        return tuple(found)

    def _made(self, factor: str) -> bool:
        return any(factor in factors_of(dim) for dims in self.results for dim in dims)

    def run_on(self, cut: Cut | None) -> OpSharding | None:
        """The op on the shards that a cut makes, or None if a rank's rows are not enough to run it."""
        if not cut or not self.need_replication.isdisjoint(cut):
            return None
        factor = next(iter(cut))
        for made, (source, low, high) in self.windows.items():
            window = cut[source].cropped(low, high) if source in cut else None
            if window is None:
                return None
            cut = {**cut, made: window}
        with_halos = self._with_halos(cut)
        if with_halos is None:
            return None
        cut = with_halos
        operands = tuple(self._place(dims, cut) for dims in self.operands)
        results = tuple(self._place(dims, cut) for dims in self.results)
        # A result without the factor is a sum over ranks, or made by each: its gradient is not that of one device.
        if not all(results) and not any(each in self.bodies for each in cut):
            return None
        return OpSharding(factor, operands, tuple(result or REPLICATED for result in results))

    def _with_halos(self, cut: Cut) -> Cut | None:
        """With the windows of the rows that are cut, and the rows of windows; None if they would not lie in blocks."""
        for made, halo in self.halos.items():
            for given, wanted in ((halo.source, made), (made, halo.source)):
                if given in cut and wanted not in cut:
                    layout = halo.layout(cut[given], self.sizes[wanted], given == made)
                    if layout is None:
                        return None
                    cut = {**cut, wanted: layout}
        return cut

    def received_share(self, sharding: OpSharding, parts: int) -> float:
        """What share of its first operand each of `parts` ranks receives for the windows that it makes."""
        source, result = sharding.operands[0], sharding.results[0]
        for made, halo in self.halos.items():
            if sharding.factor in (made, halo.source) and isinstance(source, Sharded) and isinstance(result, Sharded):
                return received_rows(source.layout, [halo.read(result.layout, parts)], parts) / int(source.layout.size)
        return 0.0

    @cached_property
    def mixed(self) -> frozenset[str]:
        """The factors of which the op reads more than one row to make one."""
        return self.need_replication | self.halos.keys() | {halo.source for halo in self.halos.values()}

    def _cut(self, dims: tuple[Dim, ...], placement: Placement, placements: Sequence[Placement]) -> Cut | None:
        """The factors that a placement of a tensor with these dimensions shards, each with its own layout."""
        if not isinstance(placement, Sharded):
            return None
        dim = dims[placement.dim]
        if isinstance(dim, Joined):
            layouts = divide(placement.layout, [self.sizes[stream] for stream in dim.streams])
            return dict(zip(dim.streams, layouts, strict=True)) if layouts else None
        for at, factor in enumerate(dim):
            layout = placement.layout.within(self._product(dim[:at]), self.sizes[factor], self._product(dim[at + 1 :]))
            if layout is not None:
                return self._with_neighbours(factor, layout, placements)
        return None

    def _mark(self, dims: tuple[Dim, ...], placement: Placement, placements: Sequence[Placement]) -> Cut | None:
        """As `_cut`; streams whose boundaries are not those of the placement's segments are cut plainly."""
        cut = self._cut(dims, placement, placements)
        if cut is None and isinstance(placement, Sharded):
            dim = dims[placement.dim]
            if isinstance(dim, Joined):
                return {stream: whole_layout(self.sizes[stream]) for stream in dim.streams}
        if not cut:
            return cut
        cut = self._with_halos(cut) or cut
        resized = {self._resized[factor] for factor in cut if factor in self._resized} - cut.keys()
        return {**cut, **{factor: whole_layout(self.sizes[factor]) for factor in resized}}

    @cached_property
    def _resized(self) -> Mapping[str, str]:
        """Whole dimensions of the first operand and a result in the same place, `l! -> m!`, both ways."""
        pairs: dict[str, str] = {}
        first = self.operands[0] if self.operands else ()
        for result in self.results:
            for before, after in zip(first, result, strict=False):
                both = (*factors_of(before), *factors_of(after))
                if len(set(both)) == 2 == len(both) and self.mixed.issuperset(both):
                    pairs |= {both[0]: both[1], both[1]: both[0]}
        return pairs

    def _with_neighbours(self, factor: str, layout: Layout, placements: Sequence[Placement]) -> Cut | None:
        """Streams of one dimension are cut together: each as it comes, or plainly."""
        cut = {factor: layout}
        for dims in (*self.operands, *self.results):
            for dim in dims:
                if isinstance(dim, Joined) and factor in dim.streams:
                    cut |= {each: whole_layout(self.sizes[each]) for each in dim.streams if each != factor}
        for dims, placement in zip(self.operands, placements, strict=False):
            if len(cut) > 1 and isinstance(placement, Sharded):
                dim = dims[placement.dim]
                if isinstance(dim, tuple) and len(dim) == 1 and dim[0] in cut:
                    cut[dim[0]] = placement.layout
        if len(cut) > 1 and any(each.outer != 1 for each in cut.values()):
            return None
        return cut

    def _place(self, dims: tuple[Dim, ...], cut: Cut) -> Sharded | None:
        for index, dim in enumerate(dims):
            if isinstance(dim, Joined):
                if all(stream in cut for stream in dim.streams):
                    return Sharded(index, Layout(tuple(s for each in dim.streams for s in cut[each].segments)))
                continue
            for at, factor in enumerate(dim):
                if factor in cut:
                    scaled = cut[factor].scaled(self._product(dim[:at]), self._product(dim[at + 1 :]))
                    return Sharded(index, scaled)
        return None

    def layout_within(self, dim: Factors, layout: Layout) -> Layout:
        """The layout of a dimension whose last factor has this one."""
        return layout.scaled(self._product(dim[:-1]), 1)

    def _product(self, factors: Factors) -> Size:
        return product([self.sizes[factor] for factor in factors])


def divide(layout: Layout, sizes: Sequence[Size]) -> list[Layout] | None:
    """Deal the segments of a layout to streams of these sizes; None where a boundary falls inside a segment."""
    if not isinstance(layout.outer, int):
        return None
    streams, left = [], list(layout.segments * layout.outer)
    for size in sizes:
        taken: list[Segment] = []
        while Layout(tuple(taken)).size != size:
            if not left:
                return None
            taken.append(left.pop(0))
        streams.append(Layout(tuple(taken)))
    return None if left else streams


def factors_of(dim: Dim) -> Factors:
    """The factors of a dimension, streams included."""
    return dim.streams if isinstance(dim, Joined) else dim


def all_factors(tensors: Iterable[Iterable[Dim]]) -> set[str]:
    """The factors of some tensors."""
    return {factor for dims in tensors for dim in dims for factor in factors_of(dim)}
