"""Every eager function on two real ranks: what the simulator cannot see, and compiled for real."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from sp_compile import functional as F
from sp_compile.distributed.group import get_sequence_parallel_rank
from sp_compile.errors import SequenceParallelError
from tests.commands.mutants import MUTANTS
from tests.gloo_pool import GlooPool
from tests.test_examples import run
from tests.test_functional import DTYPES, SIZES, Call, calls, leaves, whole_model
from tests.test_ops import assert_same

pytestmark = pytest.mark.slow


def check_call(call: Call) -> None:
    r, x = get_sequence_parallel_rank(), torch.randn(call.shape)
    inputs, cotangents, outputs, grads = call.expected(x, 2, torch.randn_like(call.whole(x)))
    local = inputs[r].clone().requires_grad_()
    found = call.call(local)
    found.backward(cotangents[r])
    assert_same(found.detach(), outputs[r])
    assert_close(local.grad, grads[r])


def check_calls() -> None:
    for size in SIZES.values():
        for call in calls(*size):
            check_call(call)


def broken(mutant: str) -> set[str]:
    """The calls that are not right on this rank."""
    found = set()
    with MUTANTS[mutant]():
        for call in calls(7, 5):
            try:
                check_call(call)
            except AssertionError:
                found.add(call.name)
    return found


def check_dtypes() -> None:
    r = get_sequence_parallel_rank()
    for dtype in DTYPES:
        for call in calls(7, 5):
            x = torch.randint(0, 2, call.shape).to(dtype)
            inputs, _, outputs, _ = call.expected(x, 2)
            assert_same(call.call(inputs[r]), outputs[r])


def check_model(backend: str | None) -> None:
    """The average over ranks of each gradient is that of one device."""
    alone, mine = leaves(), leaves()
    expected = whole_model(*alone[:2], alone[2:], sp=False)
    expected.backward()

    def program(*tensors: torch.Tensor) -> torch.Tensor:
        return whole_model(*tensors[:2], list(tensors[2:]), sp=True)

    run: Any = program if backend is None else torch.compile(program, backend=backend, fullgraph=True)
    found = run(*mine)
    found.backward()
    assert_close(found, expected)
    for one, other in zip(alone, mine, strict=True):
        assert other.grad is not None
        dist.all_reduce(other.grad)
        assert_close(other.grad / 2, one.grad)


def check_pending(backend: str | None) -> None:
    """Two exchanges under way at a time, finished in the other order, with work in between."""

    def program(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        first = F.seq_all_to_all(x, 1, 0, async_op=True)
        second = F.seq_all_to_all(y, 1, 0, async_op=True)
        work = (x @ y).sum()
        return (second.wait() * 3 + first.wait().cos()).sum() + work

    def again(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        exchange = lambda x: F.seq_all_to_all(x, 1, 0)  # noqa: E731
        return (exchange(y) * 3 + exchange(x).cos()).sum() + (x @ y).sum()

    torch.manual_seed(get_sequence_parallel_rank())
    x, y = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    expected = torch.autograd.grad(again(x, y), (x, y))
    run: Any = program if backend is None else torch.compile(program, backend=backend, fullgraph=True)
    assert_close(torch.autograd.grad(run(x, y), (x, y)), expected)


def check_all() -> None:
    check_calls()
    check_dtypes()
    for backend in (None, "aot_eager", "inductor"):
        torch._dynamo.reset()
        check_model(backend)
        check_pending(backend)
    x = torch.randn(5, 2)
    assert F.slice_inputs(x, 0, padding=False).shape[0] == (3, 2)[get_sequence_parallel_rank()]
    with pytest.raises(SequenceParallelError, match=r"'meta', but the group of 2 ranks moves tensors on .*cpu"):
        F.gather_heads(x.to("meta"), 0)


def test_the_hand_written_example_is_the_compiled_one() -> None:
    lines = run("hand_written_mmdit.py").splitlines()
    assert lines[:2] == ["sp_backend, attention: ulysses"] * 2
    differences = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines[4:]}
    assert list(differences) == ["video", "text", "loss", "gradients"]
    assert max(max(row) for row in differences.values()) <= 2e-5


def test_a_planted_wrong_is_noticed(gloo2: GlooPool) -> None:
    for names in gloo2.run(broken, "a rank's block off by one granule"):
        assert {"slice_inputs", "scatter_heads"} <= names


def test_on_two_ranks(gloo2: GlooPool) -> None:
    gloo2.run(check_all)
