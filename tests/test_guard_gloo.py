"""Ranks that part, on real ones: what each is told, how soon, and that it can go on to its end."""

from __future__ import annotations

import ast
import itertools
import logging
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

from sp_compile import backend, destroy_sequence_parallel, init_sequence_parallel, sharded_input, sp_backend
from sp_compile.guards import groups as guards
from sp_compile.guards import guard
from sp_compile.guards.guarded_graph import GuardedGraph

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


def another_size_that_both_know(inner: str) -> Any:
    """17 and 41 tokens: the collectives do not fit, of which gloo would end the process."""
    model = compiled(Block(), inner_backend=inner)
    model(x_of(17)), model(x_of(41))
    return told(lambda: model(x_of(41 if dist.get_rank() else 17)))


def another_size_backward(inner: str) -> Any:
    model = compiled(Block(), inner_backend=inner)
    short, long = model(x_of(17)).sum(), model(x_of(41)).sum()
    return told((long if dist.get_rank() else short).backward)


def another_output_backward() -> Any:
    """Of one graph; with the inner backend "eager" the ranks then launch other collectives."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Block(4), Block(2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), self.other(x)

    outputs: Any = compiled(Two())(x_of(17))
    return told(outputs[dist.get_rank()].sum().backward)


def another_graph_that_both_know() -> Any:
    models = [compiled(Block(4)), compiled(Block(2))]
    for model in models:
        model(x_of())
    return told(lambda: models[dist.get_rank()](x_of()))


def another_length_found_before_the_call_ends() -> Any:
    """The thread has seen that ranks differ, and ended what there was to end, when the wrong result comes out."""

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            out = gm(*args)
            time.sleep(1.0)
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


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(50, 12), Block()

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.block(self.embed(ids))
        return out


IDS = torch.arange(16)[None]


def a_skipped_batch() -> Any:
    """Rank 1 takes the next batch, of equal shape, at its third call."""
    model = compiled(Embedded())
    model(IDS), model(IDS + 1)
    return told(lambda: model(IDS + 2 + dist.get_rank()))


def a_skipped_batch_of_numbers() -> Any:
    """As before, of floats, which are sampled."""
    model = compiled(Block())
    model(x_of()), model(x_of(seed=1))
    return told(lambda: model(x_of(seed=2 + dist.get_rank())))


def a_skipped_batch_on_an_accelerator() -> Any:
    """Its values are read one event later, here at backward: nobody waits for them before."""
    make = GuardedGraph.__init__

    def on_accelerator(self: GuardedGraph, *args: Any) -> None:
        make(self, *args)
        self._device = torch.device("cpu")

    GuardedGraph.__init__ = on_accelerator  # type: ignore[method-assign]
    try:
        model = compiled(Embedded(), inner_backend="aot_eager")
        for step in range(2):
            model(IDS + step).sum().backward()
        loss = model(IDS + 2 + dist.get_rank()).sum()
        return told(loss.backward)
    finally:
        GuardedGraph.__init__ = make  # type: ignore[method-assign]


def another_random_state_later() -> Any:
    """Rank 1 draws a number more, where the graph draws some."""
    model = compiled(nn.Sequential(Block(), nn.Dropout(0.5)))
    model(x_of())
    torch.rand(dist.get_rank())
    return told(lambda: model(x_of()))


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
    (partial(another_size_that_both_know, "eager"), "Input x is f32[1, 17, 12] on rank 0 and f32[1, 41, 12]", "calls"),
    (partial(another_size_that_both_know, "aot_eager"), "is f32[1, 17, 12] on rank 0 and f32[1, 41, 12]", "calls"),
    (partial(another_size_backward, "eager"), "the ranks of the SP group do not agree", r"launches .*\[2, 21, 8\]"),
    (partial(another_size_backward, "aot_eager"), "Their graphs differ first in line 1", "runs the backward of"),
    (another_output_backward, "the ranks of the SP group do not agree", "launches"),
    (another_graph_that_both_know, "The ranks call different models, or have built one in different ways", "calls"),
    (a_skipped_batch, "Input ids, i64[1, 16], has other values on rank 1 than on rank 0. They agreed before", "calls"),
    (a_skipped_batch_of_numbers, "Input x, f32[1, 7, 12], has other values on rank 1 than on rank 0. They", "calls"),
    (a_skipped_batch_on_an_accelerator, "Input ids, i64[1, 16], has other values", "runs the backward of"),
    (another_random_state_later, "The random numbers of cpu are in another state on rank 1 than on rank 0", "calls"),
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


def title(value: Any) -> str:
    if isinstance(value, partial):
        return f"{value.func.__name__} {value.args[0]}"
    return getattr(value, "__name__", "")


@pytest.mark.parametrize(("parting", "expected", "places"), PARTINGS, ids=title)
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


def an_id_out_of_range(inner: str) -> list[tuple[str, str]]:
    """Among the rows of rank 1, in a loop that catches it and goes on: what comes of that step and of two more."""
    model, bad = compiled(Embedded(), inner_backend=inner), IDS.clone()
    bad[0, 12] = 99
    model(IDS)
    said = []
    for ids in (bad, IDS + 1, IDS + 2):
        try:
            model(ids).sum().backward()
            said.append(("nothing", ""))
        except Exception as error:
            said.append((type(error).__name__, str(error)))
    return said


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_nothing_is_returned_of_what_a_rank_did_not_finish(gloo2: GlooPool, inner: str) -> None:
    told_0, told_1 = gloo2.run(an_id_out_of_range, inner)
    assert [name for name, _ in told_0] == ["RankRaisedError"] * 3
    assert [name for name, _ in told_1] == ["IndexError", "RankRaisedError", "RankRaisedError"]
    for _, text in (*told_0, *told_1[1:]):
        assert text.startswith("rank 1 of the SP group raised IndexError: index out of range in self (test_guard_gloo")
        assert "init_sequence_parallel() on all ranks" in text and "TORCHDYNAMO" not in text
    assert "  rank 0: calls graph_" in told_0[0][1] and "  rank 0: calls graph_" not in told_0[1][1]


def exceptions_alike(after: tuple[int, int]) -> list[str]:
    """What each step gives where every other raises, on rank r after so many of its nodes as `after` says."""
    at = after[dist.get_rank()]

    class Halfway(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            if step % 2 and list(self.module.graph.nodes).index(n) >= len(self.module.graph.nodes) * at // 10:
                raise torch.OutOfMemoryError("too much")
            return super().run_node(n)

    model = compiled(Block(), inner_backend=lambda gm, inputs: Halfway(gm).run)
    said = []
    for step in range(4):  # noqa: B007
        try:
            said.append(f"{float(model(x_of()).detach().sum()):.3f}")
        except Exception as error:
            said.append(type(error).__name__)
    return said


def test_ranks_that_raise_alike_go_on(gloo2: GlooPool) -> None:
    """A step that all ranks give up at the same place leaves the group as it was; at another it does not."""
    first, second = gloo2.run(exceptions_alike, (5, 5))
    assert first == second and first[1::2] == ["OutOfMemoryError"] * 2 and first[0] == first[2]
    for said in gloo2.run(exceptions_alike, (1, 9)):
        assert said[1] in ("OutOfMemoryError", "RankRaisedError") and said[2:] == ["RankRaisedError"] * 2


def a_rank_that_is_busy_elsewhere() -> tuple[list[str], tuple[str, str, float]]:
    """Rank 0 is, while rank 1 waits for it: what its guard logs meanwhile, and what it raises after."""
    logged: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(record.getMessage())

    handler = Keep()
    guard.log.addHandler(handler)
    try:
        model = compiled(Block())
        model(x_of())
        time.sleep(0 if dist.get_rank() else 2 * TIMEOUT + 2 * guard.GRACE)
        return logged, told(lambda: model(x_of()))
    finally:
        guard.log.removeHandler(handler)


def test_each_text_is_said_once_on_a_rank(gloo2: GlooPool) -> None:
    """It is logged where nobody may come to raise it."""
    (logged, (_, text, _)), (others, (_, its_text, _)) = gloo2.run(a_rank_that_is_busy_elsewhere, timeout=60.0)
    assert others == [] and its_text.count("did not come within 2 s to where rank 1 waited:\n  rank 0: ") == 1
    assert logged == [its_text] and "\n  rank 0" not in text and text.startswith(its_text.partition("\n")[0])


def unwritable_dump() -> tuple[str, str, float]:
    options = {"dump": "/proc/nowhere"} if dist.get_rank() else {}
    return told(lambda: compiled(Block(), guard_timeout=600, **options)(x_of()))


def slow_planning() -> tuple[str, str, float]:
    """Rank 1 plans for longer than others may be late."""
    plan_graph = backend.plan_graph

    def plan_slowly(*args: Any) -> Any:
        time.sleep(dist.get_rank() * 2 * TIMEOUT)
        return plan_graph(*args)

    backend.plan_graph = plan_slowly
    try:
        return told(lambda: compiled(Block())(x_of()))
    finally:
        backend.plan_graph = plan_graph


def test_before_the_first_graph(gloo2: GlooPool) -> None:
    (name, text, seconds), (own, its_text, _) = gloo2.run(unwritable_dump, timeout=60.0)
    assert name == "RankRaisedError" and seconds < 30
    assert "rank 1 of the SP group raised FileNotFoundError" in text and "'/proc/nowhere'" in text
    assert own == "BackendCompilerFailed" and "FileNotFoundError" in its_text
    assert [name for name, _, _ in gloo2.run(slow_planning, timeout=60.0)] == ["nothing", "nothing"]


def values_that_may_differ() -> list[str]:
    """Last bits of floats, at a later call; other values with `shapes`; rows of which each rank has its own."""
    rank = dist.get_rank()
    model = compiled(Block())
    model(x_of())
    said = [told_only(lambda: model(x_of() * (1 + rank * 1e-6)))]
    model = compiled(Embedded(), guards="shapes")
    model(IDS)
    said.append(told_only(lambda: model(IDS + rank)))
    model = compiled(Embedded())
    for step in range(3):
        said.append(told_only(lambda: model(sharded_input(IDS[:, 8 * rank : 8 * rank + 8] + step, 1))))  # noqa: B023
    return said


def told_only(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    return ""


def test_values_that_may_differ_do(gloo2: GlooPool) -> None:
    assert gloo2.run(values_that_may_differ) == [[""] * 5] * 2


def two_threads() -> list[str]:
    models = [compiled(Block(4)), compiled(Block(2))]
    for model in models:
        model(x_of())
    said: list[str] = []

    def call(model: Callable[..., Tensor]) -> None:
        for _ in range(500):
            said.append(told_only(lambda: model(x_of())))
            if said[-1]:
                return

    threads = [threading.Thread(target=call, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [text for text in said if text]


def test_two_threads_are_refused(gloo2: GlooPool) -> None:
    for said in gloo2.run(two_threads, timeout=60.0):
        assert len(said) == 2 and all("two threads were in compiled models of one SP group" in text for text in said)


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
import os, sys
import torch, torch.distributed as dist
from sp_compile import init_sequence_parallel, sp_backend
from sp_compile.errors import ConfigurationError
from tests.test_guard_gloo import compiled, x_of
from tests.test_passes import Block

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
init_sequence_parallel()
torch.manual_seed(0)
model = compiled(Block(), inner_backend="aot_eager", guard_timeout=60)
model(x_of()).sum().backward()

child = os.fork()
if child == 0:
    for length in (7, 9):  # what is compiled, and what is not
        try:
            model(x_of(length))
        except Exception as error:
            refused = "forked from a rank of the SP group" in str(error)
    print("refused" if refused else "not refused", flush=True)
    sys.exit(0)
print("child", os.waitpid(child, 0)[1], flush=True)

for step in range(3):
    model(x_of()).sum().backward()
    if step == 1 and rank == 1:

        raise ValueError("out of tokens")
"""


def test_processes_end_where_one_raises(tmp_path: Path) -> None:
    """They end without a word to the library, and rank 0 with an error; a forked child of each, before, with none."""
    file = tmp_path / "train.py"
    file.write_text(SCRIPT)
    processes = [
        subprocess.Popen(
            [sys.executable, str(file), str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    for out, _ in printed:
        assert out.split() == ["refused", "child", "0"]
    (_, first), (_, second) = printed
    assert first.count("RankLostError: rank 1 of the SP group ended, or left the group") == 1
    assert first.count("rank 1 ended by ValueError: out of tokens (train.py:31 in <module>: raise ValueError(") == 1
    assert first.count("ended, or left the group") == 1 and "TORCHDYNAMO" not in first
    assert "ValueError: out of tokens" in second


def many_calls() -> tuple[int, int, int]:
    """Two groups of the same ranks, each with its own guard; calls leave no keys behind."""
    world = dist.group.WORLD
    models = [compiled(Block()), compiled(Block(), group=world, guards="shapes")]
    for model in models:
        model(x_of())
    assert world is not None
    before, threads = _keys_of_all_ranks(world), threading.active_count()
    for _ in range(20):
        for model in models:
            model(x_of())
    assert len({id(each) for each in guards._guards.values()}) == 2
    after = _keys_of_all_ranks(world)
    init_sequence_parallel()
    compiled(Block())(x_of())
    time.sleep(0.2)
    return before, after, threading.active_count() - threads


def _keys_of_all_ranks(world: dist.ProcessGroup) -> int:
    """How many keys the store has while no rank writes any."""
    dist.barrier()
    found = world.get_group_store().num_keys()
    dist.barrier()
    return found


def test_groups_have_guards_of_their_own(gloo2: GlooPool) -> None:
    for before, after, threads in gloo2.run(many_calls):
        assert before == after and threads == 0
