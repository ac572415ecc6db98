"""Some of `python -m tests.faults`: one of each kind that no other test has."""

from __future__ import annotations

import pytest

from .faults import complaints, outcomes_of

pytestmark = pytest.mark.slow

SELECTED = [
    "killed while planning",
    "stopped in backward",
    "interrupted in forward",
    "fewer batches",
    "full disk, dump",
    "groups made anew after an exception",
    "two groups, in another order",
]


@pytest.mark.parametrize("name", SELECTED)
def test_every_rank_is_told_of_a_fault(name: str) -> None:
    assert complaints(name, outcomes_of(name)) == []


def test_a_wrong_value_would_be_noticed() -> None:
    """Without guards ranks mix the rows of two batches, in silence."""
    found = outcomes_of("skipped batch", {"guards": "off"})
    assert {outcome.what for outcome in found} == {"wrong value"}
    assert len(complaints("skipped batch", found)) == len(found)
