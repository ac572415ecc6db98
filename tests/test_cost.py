"""The bytes of a plan are those of the formulas in docs/design.md; its FLOPs and its memory those counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from sp_compile.ir.graph import GraphRules
from sp_compile.planning.cost import contraction_flops, flops, is_uncounted, peak_activation_bytes, planned_flops
from sp_compile.runtime.records import unsharded_graphs

from .equivalence import known_graphs, rewritten_since, run_simulated, tokens
from .test_passes import Block

LENGTH, WIDTH, ITEM = 16, 4, 8


def site_bytes(block: Block, parts: int, attention: str = "auto") -> int:
    """What the one site of a block moves, forward; fp64."""
    options = {"attention": attention}
    _, (graph,) = run_simulated(block.double(), (tokens(1, LENGTH, 12),), parts=parts, options=options)
    return sum(each.bytes for each in graph.collectives if each.name != "gather_output_0")


@pytest.mark.parametrize("repeat", ["expand", "repeat_interleave", "flag"])
@pytest.mark.parametrize(("heads", "kv_heads", "parts"), [(4, 4, 2), (4, 2, 2), (8, 4, 4), (8, 2, 2)])
def test_ulysses_with_whole_kv_groups(repeat: str, heads: int, kv_heads: int, parts: int) -> None:
    local = LENGTH // parts * heads * WIDTH * ITEM
    expected = (2 + 2 * kv_heads / heads) * local * (parts - 1) / parts
    assert site_bytes(Block(heads, kv_heads, repeat), parts, "ulysses") == expected


@pytest.mark.parametrize("repeat", ["expand", "repeat_interleave", "flag"])
def test_ulysses_with_fewer_kv_heads_than_ranks(repeat: str) -> None:
    heads, kv_heads, parts = 8, 2, 4
    local = LENGTH // parts * heads * WIDTH * ITEM
    assert site_bytes(Block(heads, kv_heads, repeat), parts) == (2 + 2 * parts / heads) * local * (parts - 1) / parts


def test_all_gather_kv() -> None:
    heads, kv_heads, parts = 4, 2, 4
    local = LENGTH // parts * heads * WIDTH * ITEM
    moved = site_bytes(Block(heads, kv_heads, "flag"), parts, "all_gather_kv")
    assert moved == 2 * kv_heads / heads * local * (parts - 1)


def test_repeated_heads_that_are_moved_would_be_noticed() -> None:
    local = LENGTH // 2 * 4 * WIDTH * ITEM
    assert site_bytes(Block(4, 2), 2) < 4 * local / 2


# Floating-point operations


def graph_of(call: Callable[..., Any], *args: Any) -> torch.fx.Graph:
    """The ATen graph of a call, composite ops whole, with fake values."""
    with torch.no_grad():
        return make_fx(call, tracing_mode="fake", pre_dispatch=True)(*args).graph


B, H, Q, K, D, V = 2, 3, 5, 7, 11, 13


@pytest.mark.parametrize(
    ("call", "shapes", "expected"),
    [
        (torch.matmul, [(B, Q, K), (K, D)], 2 * B * Q * K * D),
        (F.linear, [(B, Q, K), (D, K), (D,)], 2 * B * Q * K * D),
        (F.scaled_dot_product_attention, [(B, H, Q, D), (B, H, K, D), (B, H, K, V)], 2 * B * H * Q * K * (D + V)),
        (F.conv1d, [(B, H, 9), (D, H, 3)], 2 * B * H * D * 3 * 7),
        (lambda x: F.softmax(x, -1), [(B, Q)], 5 * B * Q),
        (lambda x, w: F.layer_norm(x, (Q,), w), [(B, Q), (Q,)], 5 * B * Q),
        (lambda x: x.sum(1), [(B, Q)], B * Q),
        (lambda x: x.cumsum(1), [(B, Q)], B * Q),
        (lambda x, y: x * y, [(B, Q, 1), (K,)], B * Q * K),
        (lambda x: x.transpose(0, 1).reshape(-1), [(B, Q)], 0),
        (lambda x: x.to(torch.float64).clone(), [(B, Q)], 0),
        (lambda x: x > 0, [(B, Q)], 0),
    ],
    ids=["matmul", "linear", "sdpa", "conv", "softmax", "norm", "sum", "cumsum", "mul", "views", "casts", "compare"],
)
def test_flops(call: Callable[..., Any], shapes: list[tuple[int, ...]], expected: int) -> None:
    graph = graph_of(call, *(torch.randn(shape) for shape in shapes))
    assert sum(map(flops, graph.nodes)) == expected


def test_flops_of_grouped_heads_are_those_of_the_query_heads() -> None:
    query, key = torch.randn(1, 4, Q, D), torch.randn(1, 2, K, D)
    graph = graph_of(lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), query, key)
    assert sum(map(contraction_flops, graph.nodes)) == 4 * 4 * Q * K * D


def test_flops_of_symbolic_sizes_are_those_of_compile_time() -> None:
    _, (graph,) = run_simulated(Block().double(), (tokens(1, LENGTH, 12),), dynamic=True)
    _, (static,) = run_simulated(Block().double(), (tokens(1, LENGTH, 12),))
    assert sum(map(flops, graph.captured.graph.nodes)) == sum(map(flops, static.captured.graph.nodes)) > 0


def test_a_plan_that_shards_everything_covers_everything() -> None:
    _, (graph,) = run_simulated(Block().double(), (tokens(1, LENGTH, 12),))
    planned = planned_flops(GraphRules(graph.captured.graph), graph.plan)
    assert planned.coverage == 1
    assert planned.sharded == sum(map(flops, graph.captured.graph.nodes))
    on_rank = sum(flops(node) for node in graph.rewritten.graph.nodes)
    assert on_rank == planned.sharded / 2


class Sorted(nn.Module):
    """What comes behind the block has no rule that shards it."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.linear = Block(), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        y = y.put(torch.zeros(1, dtype=torch.int64), y.new_ones(1))
        result: Tensor = self.linear(y)
        return result


def test_what_runs_whole_is_not_covered() -> None:
    _, (graph,) = run_simulated(Sorted().double(), (tokens(1, LENGTH, 12),))
    planned = planned_flops(GraphRules(graph.captured.graph), graph.plan)
    assert planned.whole == 2 * LENGTH * 12 * 12
    assert 0 < planned.coverage < 1


# Memory


def test_peak_of_a_chain() -> None:
    def chain(x: Tensor) -> Tensor:
        y = x + 1  # 40 bytes
        z = y.view(2, 5) * 2  # and 40 more, of a view
        del y
        return (z @ z.t()).relu()  # 16, then 16 more with z freed

    assert peak_activation_bytes(graph_of(chain, torch.randn(10))) == 80


def test_peak_counts_what_is_used_again_and_no_inputs() -> None:
    def reuse(x: Tensor) -> Tensor:
        y = x + 1
        return x.exp() * x.sin() + y  # y, exp, sin and their product at once

    assert peak_activation_bytes(graph_of(reuse, torch.randn(10))) == 160
    assert peak_activation_bytes(graph_of(lambda x: x.view(2, 5).t(), torch.randn(10))) == 0


def test_a_rank_holds_its_share() -> None:
    _, (graph,) = run_simulated(Block(4, repeat="flag").double(), (tokens(1, LENGTH, 12),), parts=4)
    on_rank = peak_activation_bytes(graph.rewritten.graph)
    alone = peak_activation_bytes(graph.captured.graph)
    assert on_rank < 0.5 * alone


# Graphs that are not rewritten are kept too


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x)
        return result


class OwnGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 2


class NotCaptured(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y.register_hook(lambda gradient: gradient * 2)
        result: Tensor = y * 1
        return result


@pytest.mark.parametrize(("module", "captured"), [(Scaled, True), (NotCaptured, False)])
def test_unsharded_graphs_say_why(module: type[nn.Module], captured: bool) -> None:
    known = known_graphs()
    run_simulated(module().double(), (tokens(1, 1, 12),))  # one token
    (found,) = [each for each in unsharded_graphs() if each.name not in known]
    assert not rewritten_since(known)
    if captured:
        assert found.plan is not None and not found.plan.shards
        assert planned_flops(GraphRules(found.graph_module.graph), found.plan).coverage == 0
    else:
        assert found.plan is None
        assert "hook" in found.reason


def attention_node(query: torch.dtype, value: torch.dtype) -> fx.Node:
    graph = fx.Graph()
    operands = [graph.placeholder(name) for name in "qkv"]
    for operand, dtype in zip(operands, (query, query, value), strict=True):
        operand.meta["val"] = torch.empty(1, 2, 7, 4, dtype=dtype, device="meta")
    node = graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, tuple(operands))
    node.meta["val"] = operands[0].meta["val"]
    return node


def test_what_autocast_brings_to_one_dtype_is_counted_outside_of_it() -> None:
    mixed = attention_node(torch.float32, torch.bfloat16)
    assert contraction_flops(mixed) == contraction_flops(attention_node(torch.float64, torch.float64)) == 4 * 2 * 49 * 4


def test_what_cannot_be_counted_is_unknown_and_no_error() -> None:
    graph = fx.Graph()
    left, right = graph.placeholder("left"), graph.placeholder("right")
    left.meta["val"], right.meta["val"] = torch.empty(7, 4, device="meta"), torch.empty(4, 5, device="meta")
    node = graph.call_function(torch.ops.aten.matmul.default, (left, right))
    node.meta["val"] = torch.empty(7, 5, device="meta")
    assert not is_uncounted(node) and contraction_flops(node) == 2 * 7 * 4 * 5
    right.meta["val"] = torch.empty(3, 5, device="meta")  # of another width: the op raises
    assert is_uncounted(node) and contraction_flops(node) == flops(node) == 0
