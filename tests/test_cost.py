"""The bytes of a plan are those of the formulas (DESIGN, "What a layer moves")."""

from __future__ import annotations

import pytest

from .equivalence import run_simulated
from .test_backend import tokens
from .test_passes import Block

LENGTH, WIDTH, ITEM = 16, 4, 8


def site_bytes(block: Block, parts: int, attention: str = "auto") -> int:
    """What the one site of a block moves, forward; fp64."""
    options = {"attention": attention}
    _, (graph,) = run_simulated(block.double(), (tokens(1, LENGTH, 12),), parts=parts, options=options)
    return sum(each.bytes for each in graph.collectives if each.name != "gather_output_0")


@pytest.mark.parametrize("repeat", ["expand", "repeat_interleave", "flag"])
@pytest.mark.parametrize(("heads", "kv_heads", "parts"), [(4, 4, 2), (4, 2, 2), (8, 4, 4), (8, 2, 2)])
def test_ulysses_with_whole_kv_groups(repeat: str, heads: int, kv_heads: int, parts: int) -> None:
    local = LENGTH // parts * heads * WIDTH * ITEM
    expected = (2 + 2 * kv_heads / heads) * local * (parts - 1) / parts
    assert site_bytes(Block(heads, kv_heads, repeat), parts) == expected


@pytest.mark.parametrize("repeat", ["expand", "repeat_interleave", "flag"])
def test_ulysses_with_fewer_kv_heads_than_ranks(repeat: str) -> None:
    heads, kv_heads, parts = 8, 2, 4
    local = LENGTH // parts * heads * WIDTH * ITEM
    assert site_bytes(Block(heads, kv_heads, repeat), parts) == (2 + 2 * parts / heads) * local * (parts - 1) / parts


def test_all_gather_kv() -> None:
    heads, kv_heads, parts = 4, 2, 4
    local = LENGTH // parts * heads * WIDTH * ITEM
    moved = site_bytes(Block(heads, kv_heads, "flag"), parts, "all_gather_kv")
    assert moved == 2 * kv_heads / heads * local * (parts - 1)


def test_repeated_heads_that_are_moved_would_be_noticed() -> None:
    local = LENGTH // 2 * 4 * WIDTH * ITEM
    assert site_bytes(Block(4, 2), 2) < 4 * local / 2
