"""Blocks of Flux, SD3 and Wan move by `sp_backend` no more than by hand (`tests/commands/blocks.py`)."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from .commands import blocks
from .commands.blocks import BLOCKS, CASES, HEAD, IMAGE, SD3, TEXT, Launch, Moved, inputs_of, moved_by_hand, moved_by_us
from .equivalence import step

ITEM = 8
PINNED = {
    **dict.fromkeys([("flux", 4, 2), ("flux_single", 4, 2), ("sd3", 4, 2)], (39_168, 39_424)),
    **dict.fromkeys([("flux", 4, 4), ("flux_single", 4, 4), ("sd3", 4, 4)], (29_376, 29_952)),
    **dict.fromkeys([("flux", 6, 4), ("flux_single", 6, 4), ("sd3", 6, 4)], (44_064, 59_904)),
    ("wan", 4, 2): (35_840, 35_840),
    ("wan", 4, 4): (26_880, 26_880),
    ("wan", 6, 4): (40_320, 53_760),
}
"""Bytes that a block moves, forward, by name, heads and P: without padding, and with it."""


def cases() -> list[Any]:
    """Every block, those on 4 ranks in `make test-all` alone."""
    return [
        pytest.param(name, heads, parts, marks=[pytest.mark.full] if parts > 2 else [])
        for name in BLOCKS
        for heads, parts in CASES
    ]


compare = cache(blocks.compare)


@pytest.mark.parametrize(("name", "heads", "parts"), cases())
def test_both_are_right(name: str, heads: int, parts: int) -> None:
    for each in compare(name, heads, parts):
        assert max(each.errors.values()) <= BLOCKS[name].tolerance


@pytest.mark.parametrize(("name", "heads", "parts"), cases())
def test_by_hand_a_block_is_one_exchange_and_one_back(name: str, heads: int, parts: int) -> None:
    _, by_hand = compare(name, heads, parts)
    q = sum(BLOCKS[name].streams) * heads * HEAD * ITEM
    assert by_hand.launches == {"all_to_all_single": 2}
    assert by_hand.bytes == 4 * q * (parts - 1) / parts**2
    assert (by_hand.bytes, by_hand.padded) == PINNED[name, heads, parts]
    assert by_hand.backward == by_hand.padded


def more(ours: Moved, by_hand: Moved) -> set[str]:
    """In what we move more; q, k and v travel in one launch by hand, in three by us."""
    sizes = ("bytes", "padded", "backward", "summed")
    found = {name for name in sizes if getattr(ours, name) > getattr(by_hand, name)}
    launches = sum(ours.launches.values()) > sum(by_hand.launches.values()) + 2
    return found | ({"launches"} if launches else set())


@pytest.mark.parametrize(("name", "heads", "parts"), cases())
def test_no_more_than_by_hand(name: str, heads: int, parts: int) -> None:
    ours, by_hand = compare(name, heads, parts)
    assert not more(ours, by_hand)
    assert ours.launches.keys() == {"all_to_all_single"}
    assert (ours.bytes, ours.padded) == PINNED[name, heads, parts]


# Planted wrongs


def test_more_would_be_noticed() -> None:
    """Keys and values gathered whole are more bytes on 4 ranks, where each holds a quarter."""
    torch.manual_seed(0)
    model = SD3(4).double()
    inputs = inputs_of(model)
    expected = step(model, model, inputs, {})
    gathered = moved_by_us(model, inputs, 4, expected, attention="all_gather_kv")
    assert more(gathered, moved_by_hand(model, inputs, 4, expected)) >= {"bytes", "padded"}


def test_padding_of_another_row_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 154 rows on two ranks the padded one ends the text of the second, and not the image."""
    rows = [(min(row, TEXT + IMAGE - 1), row < TEXT + IMAGE) for row in range(154)]
    monkeypatch.setattr(blocks.JointAttention, "_rows", lambda attention: rows)
    _, by_hand = blocks.compare("flux_single", 4, 2)
    assert min(by_hand.errors.values()) > 1e-3


def test_blocks_that_move_otherwise_are_told_apart() -> None:
    once, twice = Launch("all_to_all_single", 8), Launch("all_to_all_single", 16)
    assert blocks.of_one_block([once, twice] * 2) == [once, twice]
    for launches in ([once, twice], [once, once, once], [once, once, twice, once]):
        with pytest.raises(AssertionError, match="blocks differ"):
            blocks.of_one_block(launches)
