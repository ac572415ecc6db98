"""`sp_compile.data` on real ranks: what arrives, who waits for whom, and what is left behind."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import json
import os
import pickle
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from sp_compile import data, init_sequence_parallel, sharded_input
from sp_compile.data import SPDistForward, check_same_inputs, sync_data, sync_inputs
from sp_compile.distributed import words
from sp_compile.distributed.group import (
    get_data_group,
    get_sequence_parallel_group,
    get_sequence_parallel_rank,
    get_sequence_parallel_world_size,
)
from sp_compile.errors import DataError
from sp_compile.tools.doctor import self_test
from tests.gloo_pool import GlooPool, RankTimeout

pytestmark = pytest.mark.slow

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Sample:
    video: Tensor
    caption: str


def batch_of(rank: int) -> dict[str, Any]:
    """Another structure on every rank, reproducible on all."""
    generator = torch.Generator().manual_seed(rank)
    video = torch.randn(2, 3 + rank, generator=generator)
    return {
        "video": [video, (video.t(), video.expand(4, *video.shape)[:, :, ::2])],
        "pair": Pair(torch.tensor(7 + rank), torch.empty(0, 3 + rank)),
        "sample": Sample(torch.full((1,), float("nan")), f"caption {rank}" * (1 + 20_000 * (rank == 1))),
        "dtypes": [torch.arange(3 + rank).to(dtype) for dtype in DTYPES],
        "lengths": [3] * rank,
        "again": video,
        "none": None,
    }


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert found.is_contiguous() and not found.requires_grad
        assert expected.numel() == 0 or torch.equal(
            found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)
        )
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, Sample):
        assert_same(found.video, expected.video)
        assert found.caption == expected.caption
    else:
        assert found == expected


def everything_arrives() -> int:
    rank, steps = get_sequence_parallel_rank(), 0
    for steps, found in enumerate(sync_inputs(batch_of(rank)), start=1):
        assert_same(found, batch_of(steps - 1))
        assert found["again"] is found["video"][0]
    for step, found in enumerate(SPDistForward("equal", comm_shape=False)(torch.full((2,), float(rank)))):
        assert_same(found, torch.full((2,), float(step)))
    parameter = torch.nn.Parameter(torch.ones(3))
    for found in SPDistForward("placed", comm_shape=False, device="cpu")(parameter):
        assert_same(found, torch.ones(3))
    return steps


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gets_the_batch_of_each(request: pytest.FixtureRequest, size: int) -> None:
    pool: GlooPool = request.getfixturevalue(f"gloo{size}")
    assert pool.run(everything_arrives) == [size] * size


def two_loops_at_once() -> list[tuple[int, int]]:
    rank = get_sequence_parallel_rank()
    one, other = SPDistForward("one", comm_shape=True), SPDistForward("other", comm_shape=True)
    streams = one(torch.tensor(rank)), other(torch.tensor(10 + rank)), one(torch.tensor(20 + rank))
    return [tuple(int(value) for value in values) for values in zip(*streams, strict=True)]


def test_runs_share_no_state(gloo2: GlooPool) -> None:
    assert gloo2.run(two_loops_at_once) == [[(0, 10, 20), (1, 11, 21)]] * 2


def storages() -> set[int]:
    gc.collect()
    return {t.untyped_storage().data_ptr() for t in gc.get_objects() if isinstance(t, Tensor) and t.numel() > 999}


class Stop(Exception):
    pass


def leave(how: str, at: int) -> None:
    for step, batch in enumerate(sync_inputs({"x": torch.ones(1000 + get_sequence_parallel_rank())})):
        seen.append(StorageWeakRef(batch["x"].untyped_storage()))
        if step == at:
            if how == "raise":
                raise Stop
            if how == "break":
                break


seen: list[StorageWeakRef] = []
started: list[StorageWeakRef] = []


def nothing_is_left(how: str, at: int, keep: bool = False) -> list[int]:
    """Storages alive after a loop, those that were in flight included, threads, and words in the store."""
    seen.clear()
    started.clear()
    kept: list[Any] = []
    empty = torch.empty

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        started.append(StorageWeakRef(tensor.untyped_storage()))
        if keep:
            kept.append(tensor)
        return tensor

    before, threads = storages(), threading.active_count()
    torch.empty = recorded
    try:
        for _ in range(3):
            with contextlib.suppress(Stop):
                leave(how, at)
            if how == "close":
                stream = sync_inputs(torch.ones(1000))
                next(stream)
                stream.close()
    finally:
        torch.empty = empty
    # On gloo a work is let go by its thread, a moment after it is done.
    deadline = time.monotonic() + 5.0
    while not all(ref.expired() for ref in seen + started) and time.monotonic() < deadline and not keep:
        time.sleep(0.01)
    assert started
    alive = sum(not ref.expired() for ref in seen + started)
    words = max(len(meetings.keys) for meetings in data._meetings.values())
    check_same_inputs(torch.ones(2))
    return [alive, len(storages() - before), threading.active_count() - threads, int(words > 4)]


@pytest.mark.parametrize(
    ("how", "at"), [("end", 9), ("break", 0), ("break", 1), ("raise", 0), ("raise", 2), ("close", 9)]
)
def test_nothing_is_left_behind(gloo3: GlooPool, how: str, at: int) -> None:
    assert gloo3.run(nothing_is_left, how, at, timeout=30.0) == [[0, 0, 0, 0]] * 3


def test_a_kept_buffer_is_counted(gloo3: GlooPool) -> None:
    assert min(alive for alive, *_ in gloo3.run(nothing_is_left, "end", 9, True)) > 0


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except (DataError, Stop) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def leave_alone(how: str, at: int) -> tuple[str, float]:
    """Rank 1 leaves, the others do not; then all go on together."""
    begin = time.monotonic()
    text = error_of(lambda: leave(how if get_sequence_parallel_rank() == 1 else "end", at))
    seconds = time.monotonic() - begin
    assert all(int(x) == i for i, x in enumerate(sync_inputs(torch.tensor(get_sequence_parallel_rank()))))
    return text, seconds


@pytest.mark.parametrize("how", ["break", "raise"])
def test_a_rank_that_leaves_alone(gloo3: GlooPool, how: str) -> None:
    for at, other in [(0, "DataError: rank 1 of the SP group left SPDistForward('sync_inputs'"), (1, "no error")]:
        results = gloo3.run(leave_alone, how, at, timeout=30.0)
        assert all(results[rank][0].startswith(other) for rank in (0, 2)), results
        assert results[1][0] == ("Stop: " if how == "raise" else "no error")
        assert max(seconds for _, seconds in results) < 5.0
    assert "leave the loop at the same step on every rank" in gloo3.run(leave_alone, how, 0)[0][0]


def leave_without_a_word() -> None:
    say = data._say
    data._say = lambda *args: "" if data._Status.LEFT in args else say(*args)
    leave("break" if get_sequence_parallel_rank() == 1 else "end", 0)
    dist.barrier(group=get_data_group())


def test_without_the_word_of_the_leaver_ranks_hang(gloo3: GlooPool) -> None:
    with pytest.raises(RankTimeout):
        gloo3.run(leave_without_a_word, timeout=8.0)


def meet_wrongly(case: str) -> str:
    rank = get_sequence_parallel_rank()
    odd = rank == get_sequence_parallel_world_size() - 1
    strict = SPDistForward("strict", comm_shape=False)
    calls: dict[str, Callable[[], object]] = {
        "shape": lambda: list(strict([torch.ones(2), torch.ones(2, 3 + odd)])),
        "dtype": lambda: list(strict(torch.ones(2, dtype=torch.int16 if odd else torch.int8))),
        "number": lambda: list(strict([torch.ones(2)] * 2 if odd else [torch.ones(2), torch.ones(3)])),
        "pickle": lambda: list(sync_inputs({"x": torch.ones(2), "f": (lambda: 0) if odd else 1})),
        "sparse": lambda: list(sync_inputs(torch.eye(2).to_sparse() if odd else torch.eye(2))),
        "meta": lambda: list(sync_inputs(torch.ones(2, device="meta"))),
        "name": lambda: list((strict if odd else sync_inputs)(torch.ones(2))),
        "call": lambda: list(sync_inputs(torch.ones(2))) if odd else sync_data(1, 0),
        "source": lambda: sync_data(1, int(odd)),
        "sent": lambda: sync_data((lambda: 0), 1),
        "checked": lambda: check_same_inputs(torch.ones(1), 3 if odd else torch.ones(1)),  # type: ignore[arg-type]
    }
    text = error_of(calls[case])
    check_same_inputs(torch.ones(2))  # the group is as good as before
    return text


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            "shape",
            "tensor 1 is float32[2, 3] on cpu on rank 0 and float32[2, 4] on cpu on rank 1. Pass comm_shape=True",
        ),
        ("dtype", "tensor 0 is int8[2] on cpu on rank 0 and int16[2] on cpu on rank 1."),
        ("number", "tensor 1 is float32[3] on cpu on rank 0 and missing on rank 1."),
        ("pickle", "rank 1 of the SP group cannot send its data: "),
        ("sparse", "a Tensor of layout torch.sparse_coo on cpu cannot be sent to other ranks"),
        ("meta", "rank 0 of the SP group cannot send its data: TypeError: a Tensor of layout torch.strided on meta"),
        (
            "name",
            "rank 0 at SPDistForward('sync_inputs', comm_shape=True) at its start, rank 1 at SPDistForward('strict'",
        ),
        (
            "call",
            "rank 0 at sync_data(sp_idx=0), rank 1 at SPDistForward('sync_inputs', comm_shape=True) at its start.",
        ),
        ("source", "rank 0 at sync_data(sp_idx=0), rank 1 at sync_data(sp_idx=1)"),
        ("sent", "sync_data(sp_idx=1): rank 1 of the SP group cannot send its data: "),
        ("checked", "rank 1 of the SP group cannot send its data: TypeError: a tensor was expected, not a int"),
    ],
)
def test_every_rank_hears_of_an_error(gloo2: GlooPool, case: str, words: str) -> None:
    texts = gloo2.run(meet_wrongly, case, timeout=30.0)
    assert texts[0] == texts[1] and words in texts[0], texts


def come_alone() -> str:
    init_sequence_parallel(timeout=1.5)
    text = error_of(lambda: get_sequence_parallel_rank() == 0 and check_same_inputs(torch.ones(1)))
    dist.barrier()
    return text


def test_a_rank_that_does_not_come(gloo2: GlooPool) -> None:
    assert "ranks [1] of the SP group did not come to check_same_inputs in 0:00:01.5" in gloo2.run(come_alone)[0]


def objects() -> list[Any]:
    rank = get_sequence_parallel_rank()
    mine = {"rank": rank, "x": torch.full((2,), rank), "text": "x" * 100_000, 3: None}
    received = [sync_data(mine, source) for source in range(get_sequence_parallel_world_size())]
    assert received[rank] is mine
    return [(found["rank"], found["x"].tolist(), len(found["text"]), found[3]) for found in received]


def test_sync_data(gloo3: GlooPool) -> None:
    assert gloo3.run(objects) == [[(r, [r, r], 100_000, None) for r in range(3)]] * 3


def differ(case: str) -> str:
    rank = get_sequence_parallel_rank()
    same = [torch.empty(0), torch.tensor(float("nan")), torch.arange(6).view(2, 3).t(), torch.ones(2).to(DTYPES[-1])]
    x = torch.zeros(2, 3)
    if case == "one value" and rank == 2:
        x[1, 1] = 4
    if case == "half" and rank == 1:
        x = x.half()
    if case == "shape" and rank > 0:
        x = x.view(3, 2)
    if case == "zero" and rank == 1:
        x[0, 2] = -0.0
    if case == "rank 0" and rank == 0:
        x[0, 0] = float("nan")
    return error_of(lambda: check_same_inputs(*same, x, x))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("same", "no error"),
        (
            "one value",
            "tensor 4, float32[2, 3] on cpu: its element 4, in flat order, is 0.0 on rank 0 and 4.0 on rank 2.",
        ),
        ("half", "tensor 4 is float32[2, 3] on cpu on rank 0 and float16[2, 3] on cpu on rank 1."),
        ("shape", "tensor 4 is float32[2, 3] on cpu on rank 0 and float32[3, 2] on cpu on rank 1."),
        ("zero", "element 2, in flat order, is 0.0 on rank 0 and -0.0 on rank 1."),
        ("rank 0", "element 0, in flat order, is nan on rank 0 and 0.0 on rank 1."),
    ],
)
def test_check_same_inputs(gloo3: GlooPool, case: str, words: str) -> None:
    texts = gloo3.run(differ, case)
    assert len(set(texts)) == 1 and words in texts[0], texts


class Payload:
    """To unpickle it makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def a_pickle(folder: str, value: Any) -> bytes:
    """In place of the JSON that reaches the others."""
    is_part_of_a_word = not isinstance(value, list) or not isinstance(value[0], str | int | dict)
    return json.dumps(value).encode() if is_part_of_a_word else pickle.dumps(Payload(folder))


def a_structure(said: list[Any], classes: list[str], folder: str, value: Any) -> bytes:
    """A batch that the rank does not have."""
    is_batch = isinstance(value, list) and isinstance(value[0], list)
    return json.dumps([[*said, folder], [], [], classes] if is_batch else value).encode()


MALICIOUS: dict[str, Callable[[str, Any], bytes]] = {
    "a pickle": a_pickle,
    "a class": partial(a_structure, ["object", "os.mkdir()"], []),
    "a class that it admits": partial(a_structure, ["object", "os.mkdir()"], ["os.mkdir()"]),
    "a class of another kind": partial(a_structure, ["namedtuple", "os.mkdir()"], []),
    "a maker": partial(a_structure, ["mkdir"], []),
    "an array of objects": partial(a_structure, ["array", "O", [1]], []),
}

READERS: dict[str, Callable[[], object]] = {
    "sync_inputs": lambda: list(sync_inputs({"x": torch.ones(2)})),
    "check_same_inputs": lambda: check_same_inputs(torch.ones(2)),
    "sharded_input": lambda: sharded_input(torch.ones(1, 4), 1),
    "doctor": lambda: self_test(cast(dist.ProcessGroup, get_sequence_parallel_group()), torch.device("cpu")),
}


def attacked(reader: str, how: str, folder: str) -> str:
    """What this rank raises where rank 1 says something else than it should; the groups are made anew."""
    try:
        with contextlib.ExitStack() as patches:
            if get_sequence_parallel_rank() == 1:
                for module in (data, words):
                    patches.enter_context(patch.object(module, "as_json", partial(MALICIOUS[how], folder)))
            READERS[reader]()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        init_sequence_parallel()
    return "no error"


def attacks(folder: str) -> list[tuple[str, str, str]]:
    """Of each call by a pickle, and of `sync_inputs` by everything else: the call, the attack, and what was raised."""
    cases = [(reader, "a pickle") for reader in READERS] + [("sync_inputs", how) for how in MALICIOUS]
    return [(reader, how, attacked(reader, how, folder)) for reader, how in cases]


def test_nothing_that_a_rank_says_is_executed(gloo2: GlooPool, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    for reader, how, text in gloo2.run(attacks, str(folder))[0]:
        print(f"{reader}, {how}: {text}")
        assert text.startswith("DataError: ") and "rank 1" in text, (reader, how, text)
    assert not folder.exists()


def unpickled(folder: str) -> str:
    payload = Payload(folder)
    texts = error_of(lambda: list(sync_inputs({"x": [torch.ones(2), payload]})))
    assert not Path(folder).exists()
    with contextlib.suppress(FileExistsError):
        sync_data(payload, 1)
    return texts


def test_sync_data_alone_unpickles(gloo2: GlooPool, tmp_path: Path) -> None:
    """So the payload is one."""
    for text in gloo2.run(unpickled, str(tmp_path / "made")):
        assert "rank 0 of the SP group cannot send its data: TypeError: batch['x'][1] is a tests.test_data_g" in text
        assert "send it with sync_data, which pickles" in text
    assert (tmp_path / "made").exists()


class Folder(dict[str, Any]):
    """A mapping with an attribute, and one that cannot be sent."""

    def __init__(self, items: Any = (), **more: Any) -> None:
        super().__init__(items, **more)
        self._cache = open


def loaded(rank: int) -> dict[str, Any]:
    """What loaders give, without tensors at the top."""
    folder = Folder({"x": torch.full((2,), rank), 3: None})
    folder.task = f"task {rank}"  # type: ignore[attr-defined]
    counts = collections.defaultdict(list, {"a": [rank]})
    ordered = collections.OrderedDict([("b", 1), ("a", 2)])
    numbers = [rank, -0.0, 1e300, 2**70, True, None, float("inf"), 1 + 2j]
    texts = ["é\ud800", "", "a" * 3]
    arrays = [np.arange(6.0).reshape(2, 3).T + rank, np.zeros((0, 2)), np.array(["a", "bc"]), np.array(3)]
    encoding = BatchEncoding({"input_ids": torch.arange(3 + rank)}, n_sequences=1)
    others = [torch.bfloat16, torch.device("cpu"), torch.Size([2, rank]), {1, 2}, b"\0bytes", b"", (), [], {}]
    output = BaseModelOutput(last_hidden_state=torch.ones(rank + 1))
    return {
        "folder": folder,
        "counts": counts,
        "ordered": ordered,
        "numbers": [*numbers, np.float32(1), Odd(rank)],
        "texts": texts,
        "arrays": arrays,
        "encoding": encoding,
        "others": others,
        "output": output,
    }


@dataclasses.dataclass(frozen=True, slots=True)
class Odd:
    number: int
    later: list[int] = dataclasses.field(default_factory=list)


def every_kind_arrives() -> str:
    for rank, found in enumerate(sync_inputs(loaded(get_sequence_parallel_rank()))):
        expected = loaded(rank)
        assert str(found) == str(expected)
        for name in expected:
            assert type(found[name]) is type(expected[name])
        assert found["folder"].task == f"task {rank}" and found["folder"]._cache is open
        assert found["counts"]["new"] == [] and found["encoding"].n_sequences == 1
        for one, other in zip(found["arrays"], expected["arrays"], strict=True):
            assert type(one) is type(other) and one.dtype == other.dtype and one.shape == other.shape
        found["arrays"][0][0] = 5
    batch = {"x": torch.ones(1), "sample": Odd(1)} if get_sequence_parallel_rank() else {"x": torch.ones(1)}
    return error_of(lambda: list(sync_inputs(batch)))


def test_what_loaders_give_arrives(gloo2: GlooPool) -> None:
    for text in gloo2.run(every_kind_arrives):
        assert "the batch of rank 1 has a tests.test_data_gloo.Odd(number, later), that of rank 0 has none" in text


@dataclasses.dataclass
class SlowWork:
    """A broadcast over a link that takes `seconds` for each, one after the other."""

    work: Any
    arrives: float

    def wait(self, timeout: timedelta | None = None) -> None:
        self.work.wait()
        time.sleep(max(0.0, self.arrives - time.monotonic()))


def slow_steps(runs: int, seconds: float, prefetch: bool) -> float:
    """Seconds per step, each of which works for `seconds`, as long as a broadcast takes."""
    broadcast, free_at = dist.broadcast, 0.0
    rank = get_sequence_parallel_rank()

    def slow(*args: Any, **kwargs: Any) -> SlowWork:
        nonlocal free_at
        free_at = max(free_at, time.monotonic()) + seconds
        late = SlowWork(broadcast(*args, **kwargs), free_at)
        if not prefetch:
            late.wait()
        return late

    dist.barrier(group=get_data_group())
    dist.broadcast = slow
    try:
        begin, steps = time.monotonic(), 0
        for _ in range(runs):
            for step, x in enumerate(sync_inputs(torch.full((1000,), rank))):
                assert x[0] == step
                time.sleep(seconds)
                steps += 1
        return (time.monotonic() - begin - runs * seconds) / steps  # the first broadcast has no step to hide behind
    finally:
        dist.broadcast = broadcast


def test_the_next_broadcast_runs_while_the_caller_works(gloo3: GlooPool) -> None:
    hidden = max(gloo3.run(slow_steps, 4, 0.05, True))
    summed = min(gloo3.run(slow_steps, 4, 0.05, False))
    assert 0.045 < hidden < 0.075, f"{hidden * 1e3:.0f} ms a step; the longer of the two is 50 ms, the sum 100 ms"
    assert summed > 0.08, (
        f"{summed * 1e3:.0f} ms: a loop that waits for each broadcast was to be told from one that does not"
    )
