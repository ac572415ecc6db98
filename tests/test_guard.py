"""What guards compare, and what they say, without processes."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sp_compile import RankLostError, RankMismatchError, RankRaisedError, rewritten_graphs, sp_backend
from sp_compile.distributed.checksums import (
    CHUNK,
    WHOLE,
    checksum,
    checksums_of,
    integer_checksum,
    is_compared_whole,
    samples_of,
)
from sp_compile.distributed.peers import Beat
from sp_compile.distributed.samples import SAMPLES, LateSamples, Samples, are_close
from sp_compile.errors import in_words, raised_at
from sp_compile.guards.accounts import explain_accounts
from sp_compile.guards.event import Event, unseen
from sp_compile.guards.guarded_graph import _draws
from sp_compile.guards.watch import SILENT, Watch
from sp_compile.tools.simulation import simulate

from .tensor_kinds import KINDS, quantised
from .test_passes import Block

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.complex128], ids=str)
def test_a_checksum_is_of_bits(dtype: torch.dtype) -> None:
    x = torch.arange(2 * 35).reshape(2, 35).remainder(2 if dtype == torch.bool else 50).to(dtype)
    same = torch.stack([x, x], -1)[..., 0]
    assert not same.is_contiguous() and int(checksum(x)) == int(checksum(same))
    assert int(checksum(x[1:])) == int(checksum(x[1:].clone()))
    other = x.clone()
    other[1, 3] = x[0, 1]
    assert int(checksum(x)) != int(checksum(other))


def rows(*values: float) -> Tensor:
    return torch.tensor(values)


def one_at(index: int) -> Tensor:
    return torch.zeros(CHUNK + 1).index_fill(0, torch.tensor(index), 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (rows(1, 0, 0, 1), rows(0, 1, 1, 0)),
        (rows(1, 2, 3), rows(3, 2, 1)),
        (rows(1, 2, 3, 4), rows(1, -2, 3, -4)),
        (rows(0.0), rows(-0.0)),
        (torch.arange(CHUNK + 2), torch.arange(CHUNK + 2).roll(1)),
        (one_at(0), one_at(CHUNK)),
    ],
    ids=["pattern", "order", "signs", "zero", "chunks", "end"],
)  # fmt: skip
def test_changes_do_not_cancel(one: Tensor, other: Tensor) -> None:
    assert int(checksum(one)) != int(checksum(other))


def test_nan_equals_itself_and_what_is_no_dense_tensor_is_left_out() -> None:
    nan = rows(float("nan"), 1)
    first, second, *others = checksums_of([nan, nan.clone(), torch.empty(0), 3, None, torch.empty(2, device="meta")])
    assert first == second and others == [0, None, None, None]
    freed, fake = torch.ones(3), FakeTensorMode().from_tensor(torch.ones(3))
    freed.untyped_storage().resize_(0)
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    left_out = [freed, fake, ragged, TwoTensor(nan, nan), nan.to_sparse(), nan[None].to_sparse_csr(), nan.to_mkldnn()]
    assert checksums_of(left_out) == [None] * len(left_out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_checksum_is_of_tensors_of_every_kind(kind: str) -> None:
    """Bits that no arithmetic is for, lazy signs, and quantised integers, of which raw memory must not be read."""
    make, x = KINDS[kind], torch.tensor([[1, 2, 3, 0], [0, 3, 1, 2]])
    first, again, other = checksums_of([make(x), make(x.clone()), make(x.flip(0))])
    assert first == again != other and first is not None


def test_a_checksum_is_of_what_quantised_integers_stand_for() -> None:
    x = torch.tensor([[1, 2, 3, 0], [0, 3, 1, 2]])
    for kind in ("tensor", "channel", "packed"):
        first, other = checksums_of([quantised(x, 0.5, kind), quantised(x, 0.25, kind)])
        assert first != other


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint8, torch.bool, torch.uint16, torch.float8_e4m3fn, torch.complex32], ids=str
)
def test_a_change_of_one_whole_number_is_seen_at_every_call(dtype: torch.dtype) -> None:
    assert is_compared_whole(dtype) and not is_compared_whole(torch.bfloat16)
    x = torch.zeros(3, 5).to(dtype)
    known = int(integer_checksum(x))
    x.view(torch.uint8).view(3, 5, -1)[0, 4, 0] = 1
    assert int(integer_checksum(x)) != known
    assert int(integer_checksum(x.clone().t())) != int(integer_checksum(x))


def test_of_a_long_tensor_a_part_is_read() -> None:
    x = torch.zeros(3 * WHOLE + 7, dtype=torch.int32)
    known = int(integer_checksum(x))
    assert sum(int(integer_checksum(x.index_fill(0, torch.tensor(at), 1))) != known for at in range(40)) == 8
    assert int(integer_checksum(x.flip(0) + 1)) != known


def sampled(*tensors: Tensor) -> Samples:
    samples = Samples()
    counts = samples_of(tensors, samples.values)
    samples.parts = [(count, 1e-3) for count in counts]
    return samples


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_samples_tell_batches_apart_and_not_their_last_bits(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 9, 7).to(dtype), torch.randn(5).to(dtype)
    own = sampled(x, y, torch.empty(0))
    assert [count for count, _ in own.parts] == [10, 10, 0]
    assert own.are_close_to(sampled(x * (1 + 1e-5), y.clone(), torch.empty(0)).words.tolist())
    assert not own.are_close_to(sampled(x, torch.randn(5).to(dtype), torch.empty(0)).words.tolist())
    assert not own.are_close_to(sampled(torch.randn(2, 9, 7).to(dtype), y, torch.empty(0)).words.tolist())
    assert not own.are_close_to(sampled(x.flip(0), y, torch.empty(0)).words.tolist())


def test_more_tensors_than_samples() -> None:
    tensors = [torch.full((3,), float(number)) for number in range(2 * SAMPLES)]
    own = sampled(*tensors)
    assert [count for count, _ in own.parts] == [1] * SAMPLES + [0] * SAMPLES
    assert own.values.tolist() == list(range(SAMPLES))


@pytest.mark.parametrize(
    ("own", "other", "close"),
    [
        ([1.0, 100.0], [1.09, 100.0], True),
        ([1.0, 100.0], [1.11, 100.0], False),
        ([float("nan"), 1.0], [float("nan"), 1.0], True),
        ([float("nan")], [1.0], False),
        ([float("inf")], [float("inf")], True),
        ([float("inf")], [float("-inf")], False),
        ([0.0], [0.0], True),
        ([], [], True),
    ],
)
def test_close_is_meant_relative_to_the_largest(own: list[float], other: list[float], close: bool) -> None:
    assert are_close(own, other, 1e-3) is close


def test_what_an_accelerator_computes_is_read_later() -> None:
    values = torch.arange(SAMPLES, dtype=torch.float64)
    late = LateSamples([torch.tensor(3), torch.tensor(-4)], values, [(2, 0.5)], list)
    checksums, samples = late.read()
    assert checksums == [3, -4] and samples.values.tolist() == values.tolist() and samples.parts == [(2, 0.5)]


def test_the_users_modes_do_not_see_the_guard() -> None:
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(func)

    with Refuse(), torch.device("meta"), unseen():
        assert int(integer_checksum(torch.ones(3, dtype=torch.int64, device="cpu"))) != 0
        assert not torch.is_grad_enabled()


def test_what_draws_random_numbers() -> None:
    aten = torch.ops.aten
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    calls = [
        (aten.bernoulli.p, (node, 0.5)), (aten.dropout.default, (node, 0.5, True)), (aten.randint.low, (0, 9, [1])),
        (aten.scaled_dot_product_attention.default, (node, node, node, None, 0.1)),
        (aten.scaled_dot_product_attention.default, (node, node, node)), (aten.dropout.default, (node, 0.5, False)),
        (aten.dropout.default, (node, 0.0, True)), (aten.sin.default, (node,)),
    ]  # fmt: skip
    assert [_draws(graph.call_function(*call)) for call in calls] == [True] * 4 + [False] * 4


def account(number: int = 4, digest: int = 1, cause: str = "lost", **more: Any) -> dict[str, Any]:
    own = {"number": number, "digest": digest, "cause": cause, "text": "", "timeout": 5.0, "inside": True}
    return {**own, "does": "calls", "what": "calls graph_0", "plan": "", "values": [], **more}


def test_all_ranks_that_differ_are_named() -> None:
    with_x = [account(values=[["x", "input", "f32[2]", sum]], digest=sum) for sum in (7, 7, 8, 8)]
    kind, text = explain_accounts(dict(enumerate(with_x)), 4)
    assert kind is RankMismatchError
    assert "Input x, f32[2], has other values on ranks 2, 3 than on rank 0." in text
    assert "ranks 0, 1, 2, 3: calls graph_0" in text


def test_who_is_late_and_who_was_seen() -> None:
    known = {0: account(cause="late"), 1: account(3, 9, "told", inside=False), 3: account()}
    kind, text = explain_accounts(known, 4)
    assert kind is RankMismatchError
    assert text.startswith("ranks 1, 2 of the SP group did not come within 5 s to where ranks 0, 3 waited:")
    assert "rank 1: is elsewhere, last seen where it calls graph_0" in text
    assert "There is no word of rank 2: stopped, or guards are off there." in text


def raised(kind: str = "IndexError", launched: int = 0) -> dict[str, Any]:
    return {"kind": kind, "text": f"{kind}: out of range", "line": "train.py:3 in step", "launched": launched}


def test_who_raised() -> None:
    by_1 = account(5, 3, "told", what="raised IndexError where it calls graph_0", raised=raised())
    kind, text = explain_accounts({0: account(cause="told"), 1: by_1, 2: account(cause="told")}, 3)
    assert kind is RankRaisedError
    assert text.startswith(
        "rank 1 of the SP group raised IndexError: out of range (train.py:3 in step), and not all ranks did:"
    )
    assert "nothing of it is returned. The SP group cannot be used any more" in text


def test_who_raised_something_else_or_elsewhere() -> None:
    both = {rank: account(5, rank, raised=each) for rank, each in enumerate([raised(launched=3), raised(launched=2)])}
    assert explain_accounts(both, 2)[0] is RankRaisedError
    alike = {rank: account(5, 3, "lost", raised=raised()) for rank in range(2)}
    assert explain_accounts(alike, 2)[0] is RankLostError


def test_who_is_silent() -> None:
    kind, text = explain_accounts({0: account(cause="silent"), 2: account()}, 3)
    assert kind is RankLostError and text.startswith("rank 1 of the SP group gave no sign of life for 5 s")
    assert "stopped, by a signal or a debugger" in text


def test_of_what_a_process_ended() -> None:
    text = explain_accounts({0: account(), 1: account(cause="left", text="ended by ValueError: no (a.py:1)")}, 2)[1]
    assert "\nrank 1 ended by ValueError: no (a.py:1). Then start all ranks anew." in text


@pytest.mark.parametrize(
    ("one", "other", "more", "remedy"),
    [
        (
            ["ids", "input", "i64[2]", 1],
            ["ids", "input", "i64[2]", 2],
            {"is_first": True},
            "sp_compile.data.sp_sampler",
        ),
        (["ids", "input", "i64[2]", 1], ["ids", "input", "i64[2]", 2], {"is_first": False}, "has skipped a batch"),
        (["x", "input", "f32[2]", 1], ["x", "input", "f32[2]", 2], {"is_first": True}, "need the same generator"),
        (["x", "input", "f32[2]", None, [1.0], 0.1], ["x", "input", "f32[2]", None, [2.0], 0.1], {}, "Noise, latents"),
        (["w", "parameter", "f32[2]", 1], ["w", "parameter", "f32[2]", 2], {}, "load one checkpoint"),
        (
            ["m", "buffer", "f32[2]", 1],
            ["m", "buffer", "f32[2]", 2],
            {},
            "Load one checkpoint on every rank",
        ),
        (["x", "input", "f32[2]"], ["x", "input", "f32[3]"], {}, "takes batches of unequal shapes"),
        (["x", "input", "f32[2]"], ["x", "input", "bf16[2]"], {}, "the same dtype on every rank"),
    ],
    ids=["ids", "skipped", "latents", "samples", "parameter", "buffer", "length", "dtype"],
)
def test_the_remedy_is_that_of_what_differs(one: Any, other: Any, more: dict[str, Any], remedy: str) -> None:
    both = {0: account(digest=1, values=[one], **more), 1: account(digest=2, values=[other], **more)}
    kind, text = explain_accounts(both, 2)
    assert kind is RankMismatchError and remedy in text
    assert text.count("\n") == 3


def step(call: Any) -> None:
    call()


def test_the_line_is_the_users() -> None:
    try:
        step(lambda: torch.randn(2).view(3))
    except RuntimeError as error:
        assert raised_at(error).startswith("test_guard.py:") and "<lambda>: step(lambda" in raised_at(error)
        assert in_words(error).startswith("RuntimeError: shape '[3]' is invalid")


class Said:
    """Peers that say what a test has them say."""

    size = 2

    def __init__(self) -> None:
        self.flags: dict[str, str] = {}
        self.left: dict[int, tuple[int, int]] = {}
        self.other = Beat(0, 3, False, 0.1)

    def flag(self, name: str) -> str | None:
        return self.flags.get(name)

    def heard(self, key: str, ranks: Any) -> dict[int, Any]:
        return self.left

    def beat(self, number: int, compiles: bool, period: float) -> None:
        pass

    def beats(self) -> dict[int, Beat]:
        return {1: self.other}

    def forget_silence(self) -> None:
        self.other.heard = time.monotonic()


def inside(number: int, waited: float, agreed: bool = False, launched: int = 0) -> Event:
    event = Event(number, 0, dict, Samples(), 10.0)
    event.started, event.agreed, event.launched = time.monotonic() - waited, agreed, launched
    return event


def watched(peers: Said, event: Event | None, since: float = 100.0) -> str:
    watch = Watch(peers)  # type: ignore[arg-type]
    watch._waiting_since -= since
    return watch.look(event, None, 10.0)


def test_who_waits_knows_whom_it_waits_for() -> None:
    peers = Said()
    assert watched(peers, None) == watched(peers, inside(4, 9)) == ""
    assert watched(peers, inside(4, 11)) == "late"
    assert watched(peers, inside(3, 11)) == watched(peers, inside(4, 11, agreed=True)) == ""
    peers.other.compiles = True
    assert watched(peers, inside(4, 1000)) == ""
    peers.other.heard -= SILENT + 1
    assert watched(peers, inside(4, 1000)) == watched(peers, inside(3, 1000, agreed=True)) == "silent"
    peers.flags["failed"] = ""
    assert watched(peers, None) == "told"


def test_a_process_that_stood_still_itself_accuses_nobody() -> None:
    peers = Said()
    peers.other.heard -= 1000
    watch = Watch(peers)  # type: ignore[arg-type]
    watch._looked -= 1000
    assert watch.look(inside(4, 1000), None, 10.0) == ""


def test_who_needs_what_another_has_left() -> None:
    peers = Said()
    peers.flags["raised"], peers.left = "1", {1: (4, 2)}
    for number, launched, needs in ((4, 3, True), (4, 2, False), (5, 3, False)):
        event = inside(number, 0, agreed=True, launched=launched)
        assert (watched(peers, event) == "told") is needs
        assert (Watch(peers).look(None, event, 10.0) == "told") is needs  # type: ignore[arg-type]


def test_who_has_gone() -> None:
    kind, text = explain_accounts(
        {0: account(), 1: account(5, 3, "left", what="raised ValueError where it calls graph_0")}, 3
    )
    assert kind is RankLostError
    assert text.startswith("ranks 1, 2 of the SP group ended, or left the group, while others needed it:")
    kind, text = explain_accounts({0: account(text="a cable"), 1: account()}, 2)
    assert kind is RankLostError and "broke, though all its ranks are alive" in text and "a cable" in text


def test_without_the_store_nobody_is_accused() -> None:
    kind, text = explain_accounts({1: account()}, 3, store_answers=False)
    assert kind is RankLostError and "global rank 0, has ended" in text
    assert "What became of ranks 0, 2 cannot be said" in text


def test_one_process_that_plays_all_ranks_has_no_guard() -> None:
    with simulate(2):
        model = torch.compile(Block(), backend=partial(sp_backend, options={"inner_backend": "eager"}))
        model(torch.randn(1, 7, 12))
    assert rewritten_graphs() and not any(thread.name == "sp_compile guard" for thread in threading.enumerate())
