"""Ranks that part, on real ones: what each is told, how soon, and that it can go on to its end."""

from __future__ import annotations

import ast
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from sp_compile import (
    destroy_sequence_parallel,
    guard,
    init_sequence_parallel,
    sp_backend,
)

from .gloo_pool import GlooPool, RankDied
from .test_passes import Block

pytestmark = pytest.mark.slow

TIMEOUT = 2.0
"""Seconds, of the guard."""


def compiled(model: nn.Module, **options: Any) -> Callable[..., Tensor]:
    given = {"inner_backend": "eager", "guard_timeout": TIMEOUT, **options}
    made: Callable[..., Tensor] = torch.compile(model, backend=partial(sp_backend, options=given), dynamic=False)
    return made


def told(steps: Callable[[], Any]) -> tuple[str, str, float]:
    """What `steps` raises, and after how many seconds; then the groups end and no thread is left."""
    started = time.monotonic()
    try:
        steps()
    except Exception as error:
        name, text = type(error).__name__, str(error)
    else:
        name, text = "nothing", ""
    seconds = time.monotonic() - started
    destroy_sequence_parallel()
    ends = time.monotonic() + 2
    while any(thread.name == "sp_compile guard" for thread in threading.enumerate()) and time.monotonic() < ends:
        time.sleep(0.02)
    assert not any(thread.name == "sp_compile guard" for thread in threading.enumerate())
    return name, text, seconds


def x_of(length: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(1, length, 12, generator=torch.Generator().manual_seed(seed))


def another_length() -> Any:
    return told(lambda: compiled(Block())(x_of(7 + 2 * dist.get_rank())))


def another_length_later() -> Any:
    """One that rank 1 has to compile anew."""
    model = compiled(Block())
    model(x_of())
    return told(lambda: model(x_of(7 + 2 * dist.get_rank())))


def another_length_that_both_know() -> Any:
    """33 and 34 tokens are 17 a rank: every collective fits, and the result would be wrong in silence."""
    model = compiled(Block())
    model(x_of(33)), model(x_of(34))
    return told(lambda: model(x_of(33 + dist.get_rank())))


def another_length_found_before_the_call_ends() -> Any:
    """The thread has seen that ranks differ, and ended what there was to end, when the wrong result comes out."""

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            out = gm(*args)
            time.sleep(10 * guard.TICK)
            return out

        return run

    model = compiled(Block(), inner_backend=inner)
    model(x_of(33)), model(x_of(34))
    return told(lambda: model(x_of(33 + dist.get_rank())))


def another_length_of_a_dynamic_graph() -> Any:
    options = {"inner_backend": "eager", "guard_timeout": TIMEOUT}
    model = torch.compile(Block(), backend=partial(sp_backend, options=options), dynamic=True)
    model(x_of(33))
    return told(lambda: model(x_of(33 + dist.get_rank())))


def another_batch() -> Any:
    return told(lambda: compiled(Block())(x_of(seed=dist.get_rank())))


def another_order_later() -> Any:
    """With `debug`, at any call."""
    model = compiled(Block(), guards="debug")
    model(x_of())
    return told(lambda: model(x_of().flip(1) if dist.get_rank() else x_of()))


def another_parameter() -> Any:
    model = Block()
    if dist.get_rank():
        with torch.no_grad():
            next(model.parameters())[1, 2] += 1e-6
    return told(lambda: compiled(model)(x_of()))


def another_seed() -> Any:
    model = nn.Sequential(Block(), nn.Dropout(0.5))
    torch.manual_seed(dist.get_rank())
    return told(lambda: compiled(model)(x_of()))


class TwoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if dist.get_rank():
            torch._dynamo.graph_break()
        out: Tensor = self.second(x)
        return out


def an_extra_graph_break() -> Any:
    return told(lambda: compiled(TwoBlocks())(x_of()))


def other_options() -> Any:
    attention = "all_gather_kv" if dist.get_rank() else "auto"
    return told(lambda: compiled(Block(), attention=attention)(x_of()))


def a_call_too_few() -> Any:
    model = compiled(Block())
    model(x_of())
    return told(lambda: time.sleep(TIMEOUT + 2) if dist.get_rank() else model(x_of()))


def never_compiled() -> Any:
    return told(lambda: time.sleep(TIMEOUT + 1) if dist.get_rank() else compiled(Block())(x_of()))


def a_backward_too_few() -> Any:
    model = compiled(Block(), inner_backend="aot_eager")
    model(x_of()).sum().backward()

    def step() -> None:
        loss = model(x_of()).sum()
        if dist.get_rank() == 0:
            loss.backward()
        model(x_of())

    return told(step)


def a_rank_that_raises() -> Any:
    """Its exception is its own; the other is told of it when it has left."""

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            if dist.get_rank():
                raise ValueError("out of tokens")
            return gm(*args)

        return run

    model = compiled(Block(), inner_backend=inner)

    return told(lambda: model(x_of()))


PARTINGS = [
    (another_length, "Input x is f32[1, 7, 12] on rank 0 and f32[1, 9, 12] on rank 1", "compiles"),
    (another_length_later, "Input x is f32[1, 7, 12] on rank 0 and f32[1, 9, 12] on rank 1", "calls .* compiles"),
    (
        another_length_that_both_know,
        "Input x is f32[1, 33, 12] on rank 0 and f32[1, 34, 12] on rank 1",
        "calls",
    ),
    (another_length_found_before_the_call_ends, "x is f32[1, 33, 12] on rank 0 and f32[1, 34, 12]", "calls"),
    (another_length_of_a_dynamic_graph, "is f32[1, 33, 12] on rank 0 and f32[1, 34, 12] on rank 1", "calls"),
    (another_batch, "Input x, f32[1, 7, 12], has other values on rank 1 than on rank 0", "calls"),
    (another_order_later, "Input x, f32[1, 7, 12], has other values on rank 1 than on rank 0", "calls"),
    (another_parameter, "Parameter self.", "calls"),
    (another_seed, "The random numbers of cpu are in another state on rank 1 than on rank 0", "calls"),
    (an_extra_graph_break, "Their graphs differ first in line", "compiles"),
    (other_options, "Option 'attention' is 'auto' on rank 0 and 'all_gather_kv' on rank 1", "compiles"),
    (
        a_call_too_few,
        "rank 1 of the SP group did not come within 2 s to where rank 0 waited",
        "calls .* is elsewhere, last",
    ),
    (
        never_compiled,
        "rank 1 of the SP group did not come within 2 s to where rank 0 waited",
        "rank 0: compiles .* rank 1: has compiled no graph",
    ),
    (a_backward_too_few, "the ranks of the SP group do not agree", "runs the backward of .* calls"),
]


@pytest.mark.parametrize(("parting", "expected", "places"), PARTINGS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_rank_is_told_how_they_part(gloo2: GlooPool, parting: Any, expected: str, places: str) -> None:
    ranks = gloo2.run(parting, timeout=60.0)
    for name, text, seconds in ranks:
        print(f"{name} after {seconds:.1f} s: {text}")
    here = ranks[:1] if parting in (a_call_too_few, never_compiled) else ranks
    for name, text, seconds in here:
        assert name == "RankMismatchError" and expected in text
        assert re.search(places, text.replace("\n", " "))
        assert seconds < TIMEOUT + 6


def test_a_rank_that_comes_too_late_is_told_so(gloo2: GlooPool) -> None:
    for name, text, _ in gloo2.run(first_call_too_late, timeout=60.0):
        assert name == "RankMismatchError" and "rank 1 of the SP group did not come within 2 s" in text


def first_call_too_late() -> Any:
    time.sleep(dist.get_rank() * (TIMEOUT + 3))
    return told(lambda: compiled(Block())(x_of()))


def test_a_rank_that_raises_is_named(gloo2: GlooPool) -> None:
    (name, text, _), (own, _, _) = gloo2.run(a_rank_that_raises, timeout=60.0)
    assert (name, own) == ("RankRaisedError", "ValueError")
    assert text.startswith("rank 1 of the SP group raised ValueError: out of tokens (test_guard_gloo.py:")
    assert "rank 1: raised ValueError where it calls graph_" in text


def killed(folder: str, at: str) -> None:
    """Rank 1 is killed; what the others raise goes to a file each."""
    guard.GRACE = 1.0

    def compiler(part: str) -> Any:
        def compile_part(gm: torch.fx.GraphModule, inputs: Any) -> Any:
            calls = itertools.count(1)

            def run(*args: Any) -> Any:
                if at == f"in {part}" and dist.get_rank() == 1 and next(calls) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return gm(*args)

            return make_boxed_func(run)

        return compile_part

    model = compiled(
        Block(), inner_backend=aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    )
    rank = dist.get_rank()
    model(x_of()).sum().backward()

    def another_step() -> None:
        if at == "before a step" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        model(x_of()).sum().backward()

    result = told(another_step)
    Path(folder, f"rank {rank}").write_text(repr(result))


@pytest.mark.parametrize(("ranks", "at"), [(2, "in forward"), (2, "in backward"), (3, "before a step")])
def test_a_killed_rank_is_named(tmp_path: Path, ranks: int, at: str, request: Any) -> None:
    pool: GlooPool = request.getfixturevalue(f"gloo{ranks}")
    with pytest.raises(RankDied):
        pool.run(killed, str(tmp_path), at, timeout=60.0)
    for rank in {*range(ranks)} - {1}:
        name, text, seconds = ast.literal_eval((tmp_path / f"rank {rank}").read_text())
        print(f"{name} after {seconds:.1f} s: {text}")
        assert name == "RankLostError" and seconds < TIMEOUT + 6
        assert text.startswith("rank 1 of the SP group ended, or left the group, while others needed it:")


def an_ordinary_run() -> tuple[str, str, float]:
    """What loops do on all ranks alike: they accumulate, evaluate, meet new lengths, wait, and catch exceptions."""
    model = Block()
    call = compiled(model, inner_backend="aot_eager")

    def steps() -> None:
        for step in range(2):
            losses = [call(x_of(seed=seed)).sum() for seed in range(3)]  # accumulated, all forward before all backward
            losses[0].backward(retain_graph=True)
            for loss in losses:
                loss.backward()
            with torch.no_grad():
                call(x_of(9))
            model.train(step == 1)
            with torch.inference_mode():
                call(x_of(11))
            model.zero_grad()
            checkpoint(call, x_of(), use_reentrant=False).sum().backward()
            torch.autograd.grad(call(x_of()).sum(), model.q.weight)  # type: ignore[call-overload]
            call(x_of())  # a loss that nobody asked the gradient of
            with suppress(RuntimeError):
                call(x_of()[..., :5])
            time.sleep(0.5 * TIMEOUT * dist.get_rank())

    return told(steps)


def test_nothing_is_raised_of_ranks_that_go_together(gloo2: GlooPool) -> None:
    for name, text, _ in gloo2.run(an_ordinary_run, timeout=120.0):
        assert name == "nothing", text


SCRIPT = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist
from sp_compile import init_sequence_parallel, sp_backend
from tests.test_guard_gloo import compiled, x_of
from tests.test_passes import Block

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
init_sequence_parallel()
torch.manual_seed(0)
model = compiled(Block(), inner_backend="aot_eager", guard_timeout=60)
for step in range(3):
    model(x_of()).sum().backward()
    if step == 1 and rank == 1:
        raise ValueError("out of tokens")
"""


def test_processes_end_where_one_raises(tmp_path: Path) -> None:
    """They end without a word to the library, and rank 0 with an error."""
    command = [sys.executable, "-c", SCRIPT]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert "RankLostError: rank 1 of the SP group ended, or left the group" in errors[0]
    assert "ValueError: out of tokens" in errors[1]


def many_calls() -> tuple[int, int, int]:
    """Two groups of the same ranks, each with its own guard; calls leave no keys behind."""
    world = dist.group.WORLD
    models = [compiled(Block()), compiled(Block(), group=world, guards="shapes")]
    for model in models:
        model(x_of())
    assert world is not None
    before, threads = world.get_group_store().num_keys(), threading.active_count()
    for _ in range(20):
        for model in models:
            model(x_of())
    assert len({id(each) for each in guard._guards.values()}) == 2
    after = world.get_group_store().num_keys()
    init_sequence_parallel()
    compiled(Block())(x_of())
    time.sleep(0.2)
    return before, after, threading.active_count() - threads


def test_groups_have_guards_of_their_own(gloo2: GlooPool) -> None:
    for before, after, threads in gloo2.run(many_calls):
        assert before == after and threads == 0
