"""A short `python -m tests.commands.soak`."""

from __future__ import annotations

import pytest

from .commands.soak import growth, long_run
from .gloo_pool import GlooPool

pytestmark = pytest.mark.slow


def test_a_long_run_stays_as_it_is(gloo2: GlooPool) -> None:
    for found in gloo2.run(long_run, 500, "aot_eager"):
        grown = growth(found, 300)
        print(grown)
        assert grown.pop("resident_mb") < 4
        assert not any(grown.values())
