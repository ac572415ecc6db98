"""Outputs that share memory and are written to afterwards, on real ranks: simulated ones do not share it likewise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sp_compile import sp_backend
from sp_compile.ops.sp_ops import all_gather, all_to_all
from sp_compile.passes.insert_collectives import outputs
from sp_compile.tools.comparison import relative_error

from .gloo_pool import GlooPool
from .programs import Parts

pytestmark = pytest.mark.slow

Body = Callable[[Parts, Tensor], tuple[Tensor, ...]]
Write = Callable[[tuple[Tensor, ...]], Any]


def alone(m: Parts, x: Tensor) -> tuple[Tensor, ...]:
    return (m.block(x) * 2,)


def a_view(m: Parts, x: Tensor) -> tuple[Tensor, ...]:
    y = m.block(x) * 2
    return y, y[:, :, :4]


def a_view_of_a_view(m: Parts, x: Tensor) -> tuple[Tensor, ...]:
    y = m.block(x) * 2
    return y.transpose(1, 2)[:, 1:], y.view(-1), y.unflatten(-1, (3, 4))[..., 0]


def views_without_their_base(m: Parts, x: Tensor) -> tuple[Tensor, ...]:
    y = m.block(x)
    return y[:, 1:4], y.flatten(0, 1)


def a_view_behind_other_work(m: Parts, x: Tensor) -> tuple[Tensor, ...]:
    y = m.block(x) * 2
    return m.block(y * 1), y[..., :4], y


def of_no_attention(m: Parts, x: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    return y, y[:, :, :4]


def the_input(m: Parts, x: Tensor) -> tuple[Tensor, ...]:
    return m.block(x * 2), x, x[:, 1:]


def detached(m: Parts, x: Tensor) -> tuple[Tensor, ...]:
    y = m.block(x)
    return y * 1, y.detach()


def the_same_twice(m: Parts, x: Tensor) -> tuple[Tensor, ...]:
    y = m.block(x) * 2
    return y, y


def transposed_in_memory(m: Parts, x: Tensor) -> tuple[Tensor, ...]:
    return (m.block(x).mT.contiguous().mT * 2,)


def the_same_twice_transposed_in_memory(m: Parts, x: Tensor) -> tuple[Tensor, ...]:
    (y,) = transposed_in_memory(m, x)
    return y, y.reshape(y.shape)


def behind_a_break(m: Parts, x: Tensor) -> tuple[Tensor, ...]:
    y = m.block(x) * 2
    z = y[:, :, :4]
    torch._dynamo.graph_break()
    z.mul_(3)
    return m.block(y * 1), y


def behind_a_break_without_attention(m: Parts, x: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    z = y[:, :, :4]
    torch._dynamo.graph_break()
    z.mul_(3)
    return (m.block(y),)


BODIES: list[Body] = [
    alone,
    a_view,
    a_view_of_a_view,
    views_without_their_base,
    a_view_behind_other_work,
    of_no_attention,
    the_input,
    detached,
    the_same_twice,
    transposed_in_memory,
    the_same_twice_transposed_in_memory,
    behind_a_break,
    behind_a_break_without_attention,
]


def written(body: Body, length: int, inner: str | None, outputs: str = "gather") -> list[Tensor | None]:
    """The outputs after the last of them was written to, and all gradients; `inner` None: on one device."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Parts(body)
    leaf = torch.randn(1, length, 12, dtype=torch.float64, requires_grad=True)
    x = leaf * 1
    call: Callable[..., Any] = model
    if inner is not None:
        options = {"inner_backend": inner, "outputs": outputs}
        call = torch.compile(model, backend=partial(sp_backend, options=options), dynamic=False)
    made = call(x)
    made[-1].mul_(3)
    made[-1][..., 0].add_(1)
    loss = sum((each * each).sum() * (at + 1) for at, each in enumerate(made)) + (x * x).sum() / 8
    assert isinstance(loss, Tensor)
    loss.backward()
    return [*(each.detach() for each in (*made, x)), leaf.grad, *(p.grad for p in model.parameters())]


def errors(inner: str, length: int, bodies: Sequence[str] = ()) -> dict[str, float]:
    found = {}
    for body in BODIES:
        if not bodies or body.__name__ in bodies:
            pairs = zip(written(body, length, None), written(body, length, inner), strict=True)
            found[body.__name__] = max(relative_error(a, b, 1e-2) for a, b in pairs)
    return found


@pytest.mark.parametrize("length", [7, 8])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_what_is_written_to_an_output_is_seen_in_the_others(gloo2: GlooPool, inner: str, length: int) -> None:
    """Of an even length the gather is a view of what was received; of an odd one it is a copy."""
    for found in gloo2.run(errors, inner, length):
        assert max(found.values()) < 1e-9, found


def errors_of_rows(inner: str, length: int) -> float:
    """Rows that stay on their rank are written to; gradients are those of the sum of the ranks' losses."""
    rows = written(alone, length, inner, "shard")
    whole = written(alone, length, None)
    local = whole[0].chunk(2, 1)[dist.get_rank()]  # type: ignore[union-attr]
    # The term of x is counted by each rank: left out of the gradients that are compared.
    pairs = [(local, rows[0]), *zip(whole[3:], rows[3:], strict=True)]
    return max(relative_error(a, b, 1e-2) for a, b in pairs)


@pytest.mark.parametrize("length", [7, 8])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_rows_that_stay_sharded_are_written_to(gloo2: GlooPool, inner: str, length: int) -> None:
    assert max(gloo2.run(errors_of_rows, inner, length)) < 1e-9


def without_memory_of_their_own() -> dict[str, float]:
    """The other outputs as views of a gathered value, whatever that is a view of."""
    with patch.object(outputs, "_in_memory_of_its_own", lambda writer, whole: whole):
        return errors("aot_eager", 8, ["of_no_attention"])


def test_views_of_what_is_a_view_itself_are_noticed(gloo2: GlooPool) -> None:
    assert all(max(found.values()) > 0.1 for found in gloo2.run(without_memory_of_their_own))


def gradients_of_written_results() -> list[float]:
    """What an op makes is written to, and so is a view of it; the largest error of the gradients on this rank."""
    group, rank = dist.group.WORLD, torch.tensor([dist.get_rank()])
    assert group is not None
    found = []
    for dtype in (torch.float64, torch.complex128):
        for op, layout in ((all_gather, (rank, 1, 1, [8], [1])), (all_to_all, (1, 1, [8], [1], 2, 1, [6], [1]))):
            x = torch.ones(1, 4, 6, dtype=dtype, requires_grad=True)
            made = op(x, *layout, group.group_name)
            made[:, :2].mul_(3)
            made.add_(1)
            (gradient,) = torch.autograd.grad(made.real.sum(), x)
            expected = torch.ones(1, 4, 6)
            expected[:, :2] = 3 if rank == 0 else 1
            found.append(float((gradient.real - expected).abs().max()))
    return found


def test_what_an_op_makes_is_written_to(gloo2: GlooPool) -> None:
    for found in gloo2.run(gradients_of_written_results):
        assert max(found) == 0.0
