"""What guards compare, and what they say, without processes."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sp_compile import RankLostError, RankMismatchError, rewritten_graphs, sp_backend
from sp_compile.accounts import explain_accounts
from sp_compile.checksums import CHUNK, checksum, checksums_of
from sp_compile.guarded_graph import _draws
from sp_compile.simulation import simulate

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
    assert "no word of rank 2" in text


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
