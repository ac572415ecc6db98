"""A sharded dimension: which rows a rank owns, where they lie when all parts lie end to end, cuts and joins.

Sizes are global and may be symbolic: nothing here asks whether P divides one of them, unless they are plain ints. Rank
is data, an int64 tensor, so that what is computed with it is the same program on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .placements import block_rows

Sizes: TypeAlias = Sequence[int]


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

    def owned_rows(self, ranks: Tensor, parts: int) -> tuple[Tensor, Tensor]:
        """The global row of each local row of `ranks` `[n]`, and if it is real: `[n * outer * local]`."""
        rows: list[Tensor] = []
        real: list[Tensor] = []
        start = 0
        segments = zip(self.sizes, self.granules, self.before, self.blocks(parts), strict=True)
        for size, granule, before, block in segments:
            row = ranks.view(-1, 1, 1) * block + torch.arange(block, device=ranks.device) - before
            last = (size - granule + (row - size) % granule).clamp(min=0)
            padded = torch.where(row < size, (row % granule).clamp(max=size - 1), last) if self.windows else last
            is_real = (row >= 0) & (row < size) if self.windows else row < size
            rows.append(torch.where(is_real, row, padded) + start)
            real.append(is_real)
            start = start + size
        outer = torch.arange(self.outer, device=ranks.device).unsqueeze(1)
        within = torch.cat(real, 2).expand(-1, self.outer, -1)
        return (outer * self.rows + torch.cat(rows, 2)).flatten(), within.flatten()

    def nearest_real(self, rank: Tensor, parts: int) -> tuple[Tensor, Tensor]:
        """For each local row of `rank` the nearest real one in its segment, and if there is one: `[local]`."""
        index: list[Tensor] = []
        present: list[Tensor] = []
        start = 0
        for size, before, block in zip(self.sizes, self.before, self.blocks(parts), strict=True):
            first, last = before - rank * block, before + size - 1 - rank * block
            row = torch.arange(block, device=rank.device)
            nearest = torch.minimum(torch.maximum(row, first), last).clamp(0, block - 1)
            index.append(nearest + start)
            present.append(((last >= 0) & (first < block)).expand(block))
            start = start + block
        return torch.cat(index), torch.cat(present)

    def stored_rows(self, parts: int, device: torch.device) -> Tensor:
        """Where each global row lies in the local rows of all ranks end to end, `[outer * s]`."""
        if len(self.sizes) == 1 and isinstance(self.outer, int) and self.outer == 1:
            return torch.arange(self.rows, device=device) + self.before[0]
        stored: list[Tensor] = []
        outer = torch.arange(self.outer, device=device).unsqueeze(1)
        start, local = 0, self.local(parts)
        for size, before, block in zip(self.sizes, self.before, self.blocks(parts), strict=True):
            row = torch.arange(size, device=device) + before
            # Not `row // block`: torch 2.13's Inductor splits a loop over such rows by `block` and, on CPU, drops the
            # rest.
            owner = (row.unsqueeze(1) >= torch.arange(1, parts, device=device) * block).sum(1)
            stored.append((owner * self.outer + outer) * local + row - owner * block + start)
            start = start + block
        return torch.cat(stored, 1).flatten()

    def cut(self, x: Tensor, ranks: Tensor, parts: int, zero: bool) -> Tensor:
        """`[.., outer * s, ..]` -> `[.., n * outer * local, ..]`: the parts of `ranks` `[n]`."""
        rows, real = self.owned_rows(ranks, parts)
        if self.windows and not any(isinstance(size, int) and size > 0 for size in self.sizes):
            # There may be no row to pad with: blocks have the rows, too, that a window leaves out.
            x = torch.cat([x, x.new_zeros(*x.shape[: self.dim], 1, *x.shape[self.dim + 1 :])], self.dim)
        x = x.index_select(self.dim, rows.clamp(min=0) if self.windows else rows)
        return fill_rows(x, self.dim, real) if zero and not self.is_even(parts) else x

    def cut_for_all(self, x: Tensor, parts: int, zero: bool) -> Tensor:
        """`[.., outer * s, ..]` -> `[P, .., outer * local, ..]`: the parts of all ranks."""
        dim, local = self.dim, self.local(parts)
        if self.is_even(parts):
            x = _split(x, dim, self.outer, parts, local).movedim(dim + 1, 0)
            return x.flatten(dim + 1, dim + 2)
        x = self.cut(x, torch.arange(parts, device=x.device), parts, zero)
        return _split(x, dim, parts, self.outer * local).movedim(dim, 0)

    def join(self, pieces: Tensor, parts: int) -> Tensor:
        """`[P, .., outer * local, ..]` -> `[.., outer * s, ..]`: the real rows of all parts."""
        dim, local = self.dim, self.local(parts)
        if self.is_even(parts):
            x = _split(pieces, dim + 1, self.outer, local).movedim(0, dim + 1)
            return x.flatten(dim, dim + 2)
        x = pieces.movedim(0, dim).flatten(dim, dim + 1)
        return x.index_select(dim, self.stored_rows(parts, x.device))


def _split(x: Tensor, dim: int, *sizes: int) -> Tensor:
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def fill_rows(x: Tensor, dim: int, keep: Tensor, fill: float = 0) -> Tensor:
    """`x` where `keep` `[rows]`, else `fill`; never a product, which would keep infinities."""
    return x.masked_fill(~keep.view(-1, *[1] * (x.dim() - dim - 1)), fill)
