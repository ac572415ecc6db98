"""Small programs, each on one device and on P simulated ranks: outputs, all gradients and buffers, on every rank.

Lengths, heads and widths that P does not divide; sizes that are equal where nothing says so (batch == length). Every
program has to shard. Doing nothing is right everywhere, so each also says what it moves: nothing is gathered whole,
except outputs and what `whole` excuses, and `moves` counts the collectives of one forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sp_compile import RewrittenGraph, rewritten_graphs, sp_backend
from sp_compile.runtime.records import unsharded_graphs
from sp_compile.tools.simulation import simulate

from .commands.mutants import MUTANTS
from .equivalence import assert_equivalent, compared, differences, known_graphs, step, tokens
from .programs import PROGRAMS, Parts, Program, moved, wasted


def right_on_every_rank(case: Program, parts: int, must_shard: bool) -> list[RewrittenGraph]:
    return assert_equivalent(
        case.module(),
        case.inputs(),
        parts=parts,
        dynamic=case.dynamic,
        must_shard=must_shard,
        options={"attention": case.attention},
        tolerance=case.tolerance,
    )


@pytest.mark.parametrize("case", PROGRAMS, ids=lambda case: case.name)
def test_program_is_right_on_every_rank(case: Program) -> None:
    graphs = right_on_every_rank(case, case.parts, case.shards)
    total = sum(map(moved, graphs), Counter[str]())
    if not case.whole:
        assert not [str(fallback.node) for graph in graphs for fallback in graph.plan.fallbacks]
        assert total["all_gather"] == case.moves.get("all_gather", 0)
    assert not [move for graph in graphs for move in wasted(graph)]
    if case.moves:
        assert total == case.moves


def a_token_written_to_a_cache(m: Parts, x: Tensor, keys: Tensor, values: Tensor) -> Any:
    at = torch.tensor([5])
    keys.index_copy_(2, at, m.split(m.k(x)))
    values.index_copy_(2, at, m.split(m.v(x)))
    seen = (torch.arange(29) <= at)[None, None, None]
    return m.o(m.join(F.scaled_dot_product_attention(m.split(m.q(x)), keys, values, attn_mask=seen)))


@pytest.mark.parametrize("attention", ["auto", "ulysses", "all_gather_kv"])
@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_of_generation_moves_no_cache(parts: int, attention: str) -> None:
    """Sharded it would be as right, and would move the whole cache for one token."""
    keys, values = torch.randn(2, 1, 3, 29, 4, dtype=torch.float64)
    given = tokens(1, 1, 12).detach(), keys.clone(), values.clone()
    with torch.no_grad():
        graphs = assert_equivalent(
            Parts(a_token_written_to_a_cache), given, parts=parts, options={"attention": attention}, must_shard=False
        )
    assert not graphs


OTHERS = [
    pytest.param(case, parts, id=f"{case.name}-{parts}")
    for case in PROGRAMS
    for parts in (2, 3, 4)
    if parts != case.parts
]


@pytest.mark.full
@pytest.mark.parametrize(("case", "parts"), OTHERS)
def test_program_on_other_numbers_of_ranks(case: Program, parts: int) -> None:
    right_on_every_rank(case, parts, must_shard=False)


def two_blocks(m: Parts, x: Tensor) -> Any:
    return m.block(m.block(x, is_causal=True)).sum(1) / x.shape[1]


def class_token(m: Parts, x: Tensor) -> Any:
    y = m.block(torch.cat([m.cls.expand(x.shape[0], -1, -1), x], 1))
    return m.head(y[:, 0]), y[:, 1:].mean(1)


def shifted_loss(m: Parts, x: Tensor) -> Any:
    lg = m.head(m.block(x + m.table(torch.arange(x.shape[1]))))
    target = (torch.arange(3 * x.shape[1]) % 17).view(3, -1).roll(-1, 1)
    target = target.masked_fill(torch.arange(x.shape[1]) == x.shape[1] - 1, -100)
    return F.cross_entropy(lg.flatten(0, 1), target.flatten())


def grouped_and_masked(m: Parts, x: Tensor) -> Any:
    at = torch.arange(x.shape[1])
    return m.attend(x, attn_mask=(at[:, None] - at).abs() < 4), m.block(x, attn_mask=m.bias.view(3, 1, 1) * at)


def mixed_tokens(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    y = y + F.conv1d(y.mT, m.mat[:, :3].unsqueeze(1), padding=1, groups=12).mT
    return m.norm(y.cumsum(1)) * y.amax(1, keepdim=True), y[:, -1]


def joint_streams(m: Parts, x: Tensor) -> Any:
    t = x.flip(1) * m.w
    a, b = m.block(torch.cat([x, t], 1)).split([x.shape[1], t.shape[1]], 1)
    return a - b.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (two_blocks, 2),
        (two_blocks, 4),
        (class_token, 3),
        (shifted_loss, 4),
        (grouped_and_masked, 2),
        (mixed_tokens, 3),
        (joint_streams, 4),
    ],
)
def test_one_graph_serves_all_lengths(body: Callable[..., Any], parts: int) -> None:
    known = known_graphs()
    for length, errors in errors_of_lengths(body, parts, (13, 7, 16, 5, 3, 29, 40, 12, 6, 2)):
        assert max(errors.values()) < 1e-9, length
    (graph,) = (graph for graph in (*rewritten_graphs(), *unsharded_graphs()) if graph.name not in known)
    assert isinstance(graph, RewrittenGraph)


def errors_of_lengths(
    body: Callable[..., Any], parts: int, lengths: Sequence[int]
) -> Iterator[tuple[int, dict[str, float]]]:
    """Of each length through one compiled model, which compiles once."""
    alone, module = Parts(body), Parts(body)
    module.load_state_dict(alone.state_dict())
    with simulate(parts):
        compiled = torch.compile(module, backend=partial(sp_backend, options={"inner_backend": "eager"}), dynamic=True)
        for length in lengths:
            x = torch.randn(3, length, 12, dtype=torch.float64, requires_grad=True)
            with torch._dynamo.config.patch(error_on_recompile=length != lengths[0]):
                got = step(compiled, module, [x], {})
            yield length, differences(step(alone, alone, [x], {}), got, parts)


@pytest.mark.parametrize(
    ("mutant", "body"),
    [
        ("padded rows not zeroed in the backward of an all-to-all", two_blocks),
        ("cross_entropy: padded rows have class 0", shifted_loss),
    ],
)
def test_a_wrong_of_some_lengths_is_noticed(mutant: str, body: Callable[..., Any]) -> None:
    """Where P divides a length there is no padding, and nothing to notice."""
    with MUTANTS[mutant]():
        found = {length: max(errors.values()) for length, errors in errors_of_lengths(body, 4, (8, 13))}
    assert found[13] > 1e-3 and found[8] < 1e-9, found


@pytest.mark.parametrize("mutant", ["no replicate after an all-reduce", "softmax of local rows"])
def test_a_wrong_outside_of_the_table_is_noticed(mutant: str) -> None:
    def body(m: Parts, x: Tensor, n: Tensor) -> Any:
        y = m.block(x)
        return y * y.mean(1, keepdim=True) * m.w * y.sum().item(), y.softmax(1)

    x = torch.randn(1, 13, 12, dtype=torch.float64, requires_grad=True)
    with torch._dynamo.config.patch(capture_scalar_outputs=True), MUTANTS[mutant]():
        errors, graphs = compared(Parts(body), (x, torch.tensor([5])), parts=3)
    assert max(errors.values()) > 1e-3 and graphs


@pytest.mark.parametrize("parts", [3, 4])
def test_a_loss_outside_the_compiled_region(parts: int) -> None:
    """The compiled model gives logits; the loss, its shift and its ignored labels are eager code."""
    target = torch.randint(0, 17, (2, 13))
    target[:, 2:5] = -100

    def run(call: Callable[..., Any], module: Parts, x: Tensor) -> Any:
        logits, hidden = call(x)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())
        return loss + logits.logsumexp(-1).square().mean() + (hidden * module.w).amax(1).sum()

    def body(m: Parts, x: Tensor) -> Any:
        y = m.block(x, is_causal=True)
        return m.head(y), y

    alone, module = Parts(body), Parts(body)
    module.load_state_dict(alone.state_dict())
    x = torch.randn(2, 13, 12, dtype=torch.float64, requires_grad=True)
    expected = step(partial(run, alone, alone), alone, [x], {})
    with simulate(parts):
        compiled = torch.compile(module, backend=partial(sp_backend, options={"inner_backend": "eager"}))
        got = step(partial(run, compiled, module), module, [x], {})
    assert max(differences(expected, got, parts).values()) < 1e-9


def scaled_by_an_item(m: Parts, x: Tensor, n: Tensor) -> Any:
    y = m.block(x)
    return m.block(y * y.mean().item()), y.sum().item(), n.item()


def cut_at_an_item(m: Parts, x: Tensor, n: Tensor) -> Any:
    y, length = m.block(x), n.item()
    torch._check(0 <= length <= 13)
    return y[:, :length].sum(1), y * length, y * (torch.arange(13) < length)[:, None]


def as_many_as_are_positive(m: Parts, x: Tensor, n: Tensor) -> Any:
    y = m.block(x)
    rows = (y[0, :, 0] > 0).nonzero()[:, 0]
    return y[y > 0].sum(), y[0][rows].sum(0) * m.w, rows.shape[0]


def positions_up_to_an_item(m: Parts, x: Tensor, n: Tensor) -> Any:
    length = (x[..., 0].detach() > -9).sum().item()
    return m.block(x) + m.table(torch.arange(length))


def positions_of_pieces(m: Parts, x: Tensor, n: Tensor) -> Any:
    sizes = torch.cat([n, 13 - n]).tolist()
    y = m.block(x) + torch.cat([torch.arange(each) for each in sizes])[None, :, None]
    first, second = y.split(sizes, 1)
    return y, first * 2, second.sum()


def a_grid_of_two_items(m: Parts, x: Tensor, n: Tensor) -> Any:
    height, width = torch.cat([n, n + 3]).tolist()
    return m.block(x) + (torch.arange(height)[:, None] * torch.arange(width)[None]).sum()


def moved_by_an_item(m: Parts, x: Tensor, n: Tensor) -> Any:
    first = n.item()
    torch._check(0 <= first <= 9)
    return m.block(x.roll(first, 1)).narrow(1, first, 4), m.block(x, attn_mask=torch.ones(13, 13).tril(first).bool())


@pytest.mark.parametrize("parts", [3, 4])
@pytest.mark.parametrize(
    "body",
    [
        scaled_by_an_item,
        cut_at_an_item,
        as_many_as_are_positive,
        positions_up_to_an_item,
        positions_of_pieces,
        a_grid_of_two_items,
        moved_by_an_item,
    ],
)
def test_sizes_that_are_read_from_tensors(body: Callable[..., Any], parts: int) -> None:
    """Dynamo may be told to go on where a number is read; what has such a size, which may be 0, runs whole."""
    x = torch.randn(1, 13, 12, dtype=torch.float64, requires_grad=True)
    going_on = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
    with torch._dynamo.config.patch(**going_on):
        (graph,) = assert_equivalent(Parts(body), (x, torch.tensor([5])), parts=parts)
    assert moved(graph)["all_to_all"] >= 4
    assert all(each.reason == "a size is read from a tensor" for each in graph.plan.fallbacks)


class Recurrent(nn.Module):
    """Blocks around a recurrence, which Dynamo leaves out of its graphs, or a hand-written one, which it unrolls."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.before, self.after = Parts(Parts.block), Parts(Parts.block)
        self.cell: nn.Module = nn.GRUCell(12, 12) if kind == "cell" else getattr(nn, kind)(12, 12, batch_first=True)
        self.double()

    def forward(self, x: Tensor) -> Any:
        y = self.before(x)
        if isinstance(self.cell, nn.GRUCell):
            states = [y[:, 0] * 0]
            for at in range(y.shape[1]):
                states.append(self.cell(y[:, at], states[-1]))
            y = torch.stack(states[1:], 1)
        else:
            y = self.cell(y)[0]
        return self.after(y)


@pytest.mark.parametrize(("kind", "parts"), [("GRU", 3), ("LSTM", 4), ("cell", 2)])
def test_a_recurrence_between_blocks(kind: str, parts: int) -> None:
    assert_equivalent(Recurrent(kind), (torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True),), parts=parts)
