"""Block arithmetic against its specification: rows as lists, cut and laid end to end in Python."""

from __future__ import annotations

from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import sympy
import torch
from hypothesis import given, settings
from torch import Tensor

from sp_compile.placement.placements import Layout, Segment, block_rows, block_size
from sp_compile.placement.sharded_dim import ShardedDim


@dataclass(frozen=True)
class Blocks:
    """What a sharded dimension means, written out row by row."""

    dim: int
    sizes: tuple[int, ...]
    granules: tuple[int, ...] = ()
    outer: int = 1
    windows: tuple[int, ...] = ()

    @property
    def args(self) -> tuple[int, int, list[int], list[int]]:
        return self.dim, self.outer, list(self.sizes), list(self.layout.granules)

    @property
    def layout(self) -> ShardedDim:
        granules = self.granules or (1,) * len(self.sizes)
        return ShardedDim(self.dim, self.outer, list(self.sizes), list(granules), list(self.windows))

    def rows(self, parts: int) -> list[list[tuple[int, bool]]]:
        """For each rank, for each of its rows in order: the global row, and whether it is real."""
        owned: list[list[tuple[int, bool]]] = [[] for _ in range(parts)]
        start = 0
        before, after = self.windows[::2] or (0,) * len(self.sizes), self.windows[1::2] or (0,) * len(self.sizes)
        segments = [*zip(self.sizes, self.layout.granules, before, after, strict=True)]
        for size, granule, low, high in segments * self.outer:
            # Rows that are gone, and padding, repeat the nearest granule.
            rows = [(start + min((i - low) % granule, size - 1), False) for i in range(low)]
            rows += [(start + i, True) for i in range(size)]
            while len(rows) < low + size + high or len(rows) % (granule * parts):
                beyond = len(rows) - low - size
                rows.append((start + max(size - granule + beyond % granule, 0), False))
            block = len(rows) // parts
            for rank in range(parts):
                owned[rank] += rows[rank * block : (rank + 1) * block]
            start += size
        return owned

    def cut(self, whole: Tensor, parts: int, padding: float | None = None) -> list[Tensor]:
        """The part of each rank; padding repeats, unless it is given."""
        pieces = []
        for rows in self.rows(parts):
            piece = whole.index_select(self.dim, torch.tensor([row for row, _ in rows]).long())
            if padding is not None:
                for i, (_, real) in enumerate(rows):
                    if not real:
                        piece.select(self.dim, i).fill_(padding)
            pieces.append(piece)
        return pieces

    def join(self, pieces: list[Tensor]) -> Tensor:
        """The whole of all ranks' parts."""
        shape = list(pieces[0].shape)
        shape[self.dim] = sum(self.sizes) * self.outer
        whole = pieces[0].new_empty(shape)
        for piece, rows in zip(pieces, self.rows(len(pieces)), strict=True):
            for i, (row, real) in enumerate(rows):
                if real:
                    whole.select(self.dim, row).copy_(piece.select(self.dim, i))
        return whole


@st.composite
def blocks(draw: st.DrawFn) -> Blocks:
    segments = draw(st.integers(1, 3))
    granules = draw(st.lists(st.integers(1, 4), min_size=segments, max_size=segments))
    # A window may begin and end inside a granule; blocks are cut of whole ones.
    steps = draw(st.sampled_from([granules, [1] * segments]))
    counts = draw(st.lists(st.integers(1, 9), min_size=segments, max_size=segments))
    sizes = (count * step for count, step in zip(counts, steps, strict=True))
    gone = draw(st.one_of(st.just([]), st.lists(st.integers(0, 9), min_size=2 * segments, max_size=2 * segments)))
    windows = tuple(rows * steps[at // 2] for at, rows in enumerate(gone))
    return Blocks(0, tuple(sizes), tuple(granules), draw(st.integers(1, 3)), windows)


def check(spec: Blocks, parts: int) -> None:
    """The index arithmetic of the ops says what the specification says."""
    expected = spec.rows(parts)
    for rank in range(parts):
        rows, real = spec.layout.owned_rows(torch.tensor([rank]), parts)
        assert [*zip(rows.tolist(), real.tolist(), strict=True)] == expected[rank]
    every, _ = spec.layout.owned_rows(torch.arange(parts), parts)
    assert every.tolist() == [row for rows in expected for row, _ in rows]
    flat = [row if real else None for rows in expected for row, real in rows]
    stored = spec.layout.stored_rows(parts, torch.device("cpu"))
    assert stored.tolist() == [flat.index(row) for row in range(spec.outer * sum(spec.sizes))]


@given(blocks(), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_each_row_has_one_owner_and_keeps_its_order(spec: Blocks, parts: int) -> None:
    owned = spec.rows(parts)
    real = [[row for row, is_real in rows if is_real] for rows in owned]
    assert sorted(row for rows in real for row in rows) == list(range(spec.outer * sum(spec.sizes)))
    assert all(rows == sorted(rows) for rows in real)
    before, after = spec.windows[::2] or [0] * len(spec.sizes), spec.windows[1::2] or [0] * len(spec.sizes)
    segments = zip(spec.sizes, spec.layout.granules, before, after, strict=True)
    layout = Layout(tuple(Segment(*segment) for segment in segments), spec.outer)
    assert {len(rows) for rows in owned} == {layout.local_size(parts)}
    assert layout.local_size(parts) == spec.outer * spec.layout.local(parts)


@given(blocks(), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_indices_are_those_of_the_specification(spec: Blocks, parts: int) -> None:
    check(spec, parts)


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize(
    "spec",
    [Blocks(0, (5,), (7,)), Blocks(0, (10,), (4,)), Blocks(0, (0, 3)), Blocks(0, (4,), (), 0)],
    ids=["granule longer than segment", "partial granule", "empty segment", "empty outer"],
)
def test_edges(spec: Blocks, parts: int) -> None:
    check(spec, parts)


def test_padding_repeats_the_last_granule() -> None:
    # [S, B, C] -> [S * B, C] with S = 3, B = 2: the granule is the two rows of one token.
    last = Blocks(0, (6,), (2,)).rows(2)[1]
    assert last == [(4, True), (5, True), (4, False), (5, False)]


def test_a_granule_is_not_a_size() -> None:
    # S = 5, B = 3, P = 2: a rank has 9 rows, where ceil(15 / 2) says 8.
    assert block_rows(15, 3, 2) == 9
    assert block_rows(15, 1, 2) == 8


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 8))
def test_symbolic_sizes_agree_with_ints(count: int, granule: int, parts: int) -> None:
    size, step = sympy.symbols("s g", positive=True, integer=True)
    values = {size: count * granule, step: granule}
    expected = block_rows(count * granule, granule, parts)
    assert sympy.sympify(block_size(size, step, parts)).subs(values) == expected
    assert sympy.sympify(block_size(3 * size, granule, parts)).subs(values) == block_rows(
        3 * count * granule, granule, parts
    )
    layout = Layout((Segment(size, step), Segment(7)), outer=2)
    local = sympy.sympify(layout.local_size(parts))
    assert local.subs(values) == 2 * (expected + block_rows(7, 1, parts))


@given(blocks(), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_specification_puts_back_what_it_cuts(spec: Blocks, parts: int) -> None:
    whole = torch.randn(spec.outer * sum(spec.sizes), 2)
    assert torch.equal(spec.join(spec.cut(whole, parts, padding=float("nan"))), whole)


@given(blocks(), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_padding_is_refilled_with_a_real_row_of_its_segment(spec: Blocks, parts: int) -> None:
    spec = replace(spec, outer=1)
    for rank, rows in enumerate(spec.rows(parts)):
        nearest, present = spec.layout.nearest_real(torch.tensor([rank]), parts)
        start = 0
        for block in spec.layout.blocks(parts):
            mine = rows[start : start + block]
            real = [start + at for at, (_, is_real) in enumerate(mine) if is_real]
            for at in range(start, start + block):
                assert bool(present[at]) == bool(real)
                if real:
                    assert int(nearest[at]) == min(real, key=lambda row: abs(row - at))
            start += block
    everywhere = all(spec.layout.nearest_real(torch.tensor([rank]), parts)[1].all() for rank in range(parts))
    assert spec.layout.each_rank_has_rows(parts) == everywhere
