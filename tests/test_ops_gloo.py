"""Each sp:: op on three real ranks equals its specification: gloo binds what simulation cannot."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sp_compile.distributed.group import get_sequence_parallel_rank
from tests import test_ops
from tests.commands.mutants import MUTANTS
from tests.gloo_pool import GlooPool
from tests.test_ops import CASES, DTYPES, MOVES, Checked, assert_same, group_name

pytestmark = pytest.mark.slow
sp = torch.ops.sp


def check_case(name: str, wrap: Callable[..., Any]) -> None:
    """Values and gradients; all ranks draw the same inputs and cotangents."""
    case, r = CASES[name], get_sequence_parallel_rank()
    x = torch.randn(case.shape)
    inputs, cotangents, outputs, grads = case.run(x, 3, torch.randn_like(case.function(x)))
    local = inputs[r].clone().requires_grad_()
    found = wrap(case.op)(local, torch.tensor([r]), group_name())
    found.backward(cotangents[r])
    assert_same(found.detach(), outputs[r])
    torch.testing.assert_close(local.grad, grads[r])


def run_eager() -> None:
    for name in CASES:
        check_case(name, lambda op: op)


def run_broken(name: str, mutant: str) -> bool:
    """Whether the check sees on this rank what is broken."""
    with MUTANTS[mutant]() if mutant else nullcontext():
        try:
            check_case(name, lambda op: op)
        except AssertionError:
            return True
    return False


def run_inductor(names: list[str]) -> None:
    for name in names:
        torch._dynamo.reset()
        check_case(name, torch.compile)


def run_inductor_lengths(lengths: list[int]) -> None:
    """One graph for all lengths, there and back, with values and gradients."""
    group, rank = group_name(), torch.tensor([get_sequence_parallel_rank()])

    def program(x: Tensor) -> Tensor:
        rows, heads = (1, [x.shape[2]], [1]), (1, [5], [1])
        x = sp.shard(x, rank, 2, *rows, group)
        x = sp.all_to_all(x, 2, *rows, 1, *heads, group).sin()
        return sp.all_gather(x, rank, 1, *heads, group)

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(program, backend=counter)
    for length in lengths:
        x = torch.randn(2, 5, length, 3, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 2)
        found, weight = compiled(x), torch.randn(2, 5, length, 3)
        found.backward(weight)
        torch.testing.assert_close(found, x.sin())
        torch.testing.assert_close(x.grad, weight * x.cos())
    assert counter.frame_count == 1


def run_dtypes(backend: str | None, dtypes: list[torch.dtype], names: list[str]) -> None:
    r = get_sequence_parallel_rank()
    for name in names:
        for dtype in dtypes:
            torch._dynamo.reset()
            x = torch.randint(0, 2, CASES[name].shape).to(dtype)
            inputs, _, outputs, _ = CASES[name].run(x, 3)
            op = CASES[name].op
            op = torch.compile(op, backend=backend) if backend else op
            assert_same(op(inputs[r], torch.tensor([r]), group_name()), outputs[r])


def run_reductions() -> None:
    group, rank = group_name(), get_sequence_parallel_rank()
    for dtype in DTYPES:
        terms = torch.tensor([[0, 1], [1, 1], [1, 0]]).to(dtype)
        if dtype in (torch.int16, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2):
            continue
        if dtype is not torch.bool:
            total = sp.all_reduce(terms[rank], "sum", group)
            assert_same(total, torch.tensor([2, 2]).to(dtype))
        if not dtype.is_complex:
            assert sp.all_reduce(terms[rank], "max", group).tolist() == [1, 1]
            assert sp.all_reduce(terms[rank], "min", group).tolist() == [0, 0]
    weight = torch.ones(2, requires_grad=True)
    sp.replicate(weight, group).mul(rank + 1).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [6, 6]
    tied = torch.tensor([1.0, rank], requires_grad=True)
    sp.all_reduce(tied, "max", group).sum().backward()
    expected = torch.tensor([1 / 3, float(rank == 2)])
    torch.testing.assert_close(tied.grad, expected)


def run_opcheck() -> None:
    test_ops.sp = Checked("test_aot_dispatch_dynamic")
    try:
        for name in ["shard", "gather", "exchange", "mask with zero", "select", "KV 6:2"]:
            case, r = CASES[name], get_sequence_parallel_rank()
            x = torch.randn(case.shape)
            x = case.source.cut(x, 3)[r] if case.source else x
            case.op(x.requires_grad_(), torch.tensor([r]), group_name())
    finally:
        test_ops.sp = torch.ops.sp


COMPILED = [
    "shard outer, segments, granules",
    "gather",
    "exchange packed heads",
    "mask with zero",
    "select",
    "KV 6:2",
    "gather replicate",
    "packed",
]


def test_eager(gloo3: GlooPool) -> None:
    gloo3.run(run_eager)


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("gather", "padded rows not zeroed in the backward of an all-gather"),
        ("exchange", "padded rows not zeroed in the backward of an all-to-all"),
        ("select", "few rows come from every rank"),
    ],
)
def test_a_broken_op_is_noticed(name: str, mutant: str, gloo3: GlooPool) -> None:
    assert any(gloo3.run(run_broken, name, mutant)) and not any(gloo3.run(run_broken, name, ""))


def test_dtypes(gloo3: GlooPool) -> None:
    gloo3.run(run_dtypes, None, DTYPES, MOVES)


def test_reductions(gloo3: GlooPool) -> None:
    gloo3.run(run_reductions)


def test_opcheck(gloo3: GlooPool) -> None:
    gloo3.run(run_opcheck)


def test_inductor(gloo3: GlooPool) -> None:
    gloo3.run(run_inductor, COMPILED)


def test_inductor_serves_all_lengths(gloo3: GlooPool) -> None:
    gloo3.run(run_inductor_lengths, [7, 9, 32, 4])


def test_inductor_moves_bytes(gloo3: GlooPool) -> None:
    dtypes = [torch.int16, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.bfloat16]
    gloo3.run(run_dtypes, "inductor", dtypes, ["exchange"])
