"""Waiting for ranks that have ended, or that do not come: how long, in which call, and what is said."""

from __future__ import annotations

import ast
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from sp_compile import (
    destroy_sequence_parallel,
    get_sequence_parallel_group,
    init_sequence_parallel,
    measure_links,
    sharded_input,
    sp_backend,
)
from sp_compile.data import check_same_inputs, sync_data, sync_inputs
from sp_compile.distributed import group
from sp_compile.tools.doctor import self_test

from . import gloo_pool
from .gloo_pool import GlooPool, RankDied
from .test_passes import Block

pytestmark = pytest.mark.slow

TIMEOUT = 1.5
"""Seconds, of the groups."""


def compiled() -> Callable[[], Any]:
    """A step whose collectives are not guarded."""
    model, x = Block(), torch.randn(1, 7, 12)
    call = torch.compile(model, backend=partial(sp_backend, options={"inner_backend": "eager", "guards": "off"}))
    call(x)
    return lambda: call(x)


def examined() -> object:
    alive = get_sequence_parallel_group()
    assert alive is not None
    return self_test(alive, torch.device("cpu"))


CALLS: dict[str, Callable[[], object]] = {
    "sync_inputs": lambda: list(sync_inputs({"x": torch.ones(2)})),
    "check_same_inputs": lambda: check_same_inputs(torch.ones(2)),
    "sync_data": lambda: sync_data("x", 1),
    "sharded_input": lambda: sharded_input(torch.ones(1, 4), 1),
    "doctor": examined,
    "measure_links": measure_links,
}


def said_without_rank_1(timeout: float, kill: bool) -> dict[str, tuple[str, str, float]]:
    """What each call raises where rank 1 does not come, in groups of its own, and after how many seconds."""
    states = {}
    with patch.object(group, "destroy_sequence_parallel"):  # the groups of all calls exist side by side
        for name in (*CALLS, "in a loop", "compiled"):
            init_sequence_parallel(timeout=timeout)
            states[name] = group._state
    step = compiled()
    loop = sync_inputs(torch.ones(2))
    group._state = states["in a loop"]
    next(loop)
    dist.barrier()
    if kill and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    said = {}
    for name, call in {**CALLS, "in a loop": lambda: list(loop), "compiled": step}.items():
        if dist.get_rank() != 1:
            group._state, started = states[name], time.monotonic()
            try:
                call()
                kind, text = "nothing", ""
            except Exception as error:
                kind, text = type(error).__name__, str(error)
            said[name] = kind, text, time.monotonic() - started
    if not kill:
        dist.barrier()
    for state in states.values():
        group._state = state
        destroy_sequence_parallel()
    return said


def killed(folder: str) -> None:
    Path(folder, str(dist.get_rank())).write_text(repr(said_without_rank_1(120.0, kill=True)))


def test_a_rank_that_was_killed_is_named_within_seconds(
    gloo3: GlooPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gloo_pool, "SECONDS_AFTER_A_FAILURE", 60.0)
    with pytest.raises(RankDied):
        gloo3.run(killed, str(tmp_path), timeout=100.0)
    for rank in (0, 2):
        for name, (kind, text, seconds) in ast.literal_eval((tmp_path / str(rank)).read_text()).items():
            print(f"rank {rank}, {name}: {kind} after {seconds:.1f} s: {text}")
            assert seconds < 6
            if name != "compiled":
                assert kind == "RankLostError" and text.startswith("rank 1 of the SP group ended, or left the group")
            else:
                assert kind == "RuntimeError" and "gloo" in text


def test_nothing_waits_longer_than_the_timeout(gloo3: GlooPool) -> None:
    for name, (kind, text, seconds) in gloo3.run(said_without_rank_1, TIMEOUT, False, timeout=100.0)[0].items():
        print(f"{name}: {kind} after {seconds:.1f} s: {text}")
        assert TIMEOUT - 0.1 < seconds < TIMEOUT + 2
        if name != "compiled":
            assert kind == "DataError" and "in 0:00:01.5" in text
