"""Settings and ranks that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Read when torch is first imported, here and in the processes of the gloo pools.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch

from tests.gloo_pool import GlooPool, collect_rarely


def pytest_collection_finish() -> None:
    collect_rarely()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def gloo2() -> Iterator[GlooPool]:
    """Two real ranks; `gloo2.run(function, *args)` gives the results of both."""
    pool = GlooPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def gloo3() -> Iterator[GlooPool]:
    """Three real ranks, as `gloo2`."""
    pool = GlooPool(3)
    yield pool
    pool.close()
