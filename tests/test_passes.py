"""Each pass alone, on programs of five lines: what it finds, what it plans, what it writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sp_compile import rewritten_graphs, sp_backend
from sp_compile.capture.capture import capture
from sp_compile.config import SequenceParallelConfig
from sp_compile.ir.effects import SDPA_BACKENDS, has_effect
from sp_compile.ir.graph import GraphRules
from sp_compile.ir.plan import ShardingPlan
from sp_compile.passes import find_attention, find_mixers, insert_collectives, outline_experts, propagate
from sp_compile.passes.insert_collectives.conversions import Conversions
from sp_compile.placement.placements import REPLICATED, Sharded, whole_layout
from sp_compile.rules import stays_whole
from sp_compile.tools.simulation import fake_world, on_rank, simulate

from .equivalence import assert_equivalent, compared, tokens, unsummed
from .programs import Parts
from .programs.experts import USES, ends_of, grouped, routed

B, H, S, D = 2, 3, 7, 4


def rules_of(function: Callable[..., Any], *args: Tensor) -> tuple[fx.GraphModule, GraphRules]:
    """The captured graph of a function or module."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(capture(gm, inputs, stays_whole).graph_module)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*args)
    return graphs[0], GraphRules(graphs[0].graph)


def plan_of(function: Callable[..., Any], *args: Tensor, parts: int = 2, attention: str = "auto") -> ShardingPlan:
    _, rules = rules_of(function, *args)
    return propagate(rules, find_attention(rules), (), parts, attention)


def heads(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.transpose(-1, -2) / 9) * 9
    return F.dropout(scores.masked_fill(scores > 8, -1e9).softmax(-1), 0.1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v)


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(B * H, S, D) for t in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v).view(B, H, S, D)


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.mT @ (k @ q.mT).softmax(-2)


@pytest.mark.parametrize("attention", [fused, written_out, softcapped, by_einsum, by_bmm, keys_first])
def test_attention_is_found_however_written(attention: Callable[..., Tensor]) -> None:
    _, rules = rules_of(attention, heads(B, H, S, D), heads(B, H, S, D), heads(B, H, S, D))
    (site,) = find_attention(rules)
    sizes = [rules.shape(rules.operands(end.node)[end.index])[end.dim] for end in (site.query, site.key, site.value)]
    assert sizes == [S, S, S]


def test_query_key_and_value_are_told_apart() -> None:
    _, rules = rules_of(written_out, heads(1, H, 5, D), heads(1, H, 7, D), heads(1, H, 7, 11))
    (site,) = find_attention(rules)
    shapes = [rules.shape(rules.operands(end.node)[end.index]) for end in (site.query, site.key, site.value)]
    assert shapes == [(1, H, 5, D), (1, H, D, 7), (1, H, 7, 11)]


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 11), nn.Linear(11, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (k.mT @ v)


def test_what_is_no_attention_is_not_found() -> None:
    assert not find_attention(rules_of(FeedForward(), heads(B, S, D))[1])
    assert not find_attention(rules_of(linear_attention, *(heads(B, H, S, D) for _ in range(3)))[1])


class Block(nn.Module):
    """Attention with `heads` query heads on `kv_heads` KV heads, repeated as `repeat` says."""

    def __init__(self, heads: int = 4, kv_heads: int | None = None, repeat: str = "expand", width: int = 4) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.repeat = heads, kv_heads or heads, repeat
        self.q = nn.Linear(12, heads * width)
        self.k = nn.Linear(12, self.kv_heads * width)
        self.v = nn.Linear(12, self.kv_heads * width)
        self.o = nn.Linear(heads * width, 12)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = (f(x).view(batch, length, self.kv_heads, -1).transpose(1, 2) for f in (self.k, self.v))
        times = self.heads // self.kv_heads
        if self.repeat == "expand":
            k, v = (t[:, :, None].expand(-1, -1, times, -1, -1).reshape(batch, self.heads, length, -1) for t in (k, v))
        elif self.repeat == "repeat_interleave":
            k, v = (t.repeat_interleave(times, 1) for t in (k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.repeat == "flag")
        return x + self.o(o.transpose(1, 2).reshape(batch, length, -1))


def test_the_stream_stays_home_and_only_the_site_moves() -> None:
    plan = plan_of(Block(), heads(1, 9, 12))
    home = Sharded(1, whole_layout(9))
    by_name = {node.name: node for node in plan.nodes}
    assert plan.placement(by_name["linear"]) == plan.placement(by_name["add"]) == home
    attention = plan.nodes[by_name["scaled_dot_product_attention"]]
    assert attention.results() == (Sharded(1, whole_layout(4)),)
    assert attention.delivered == (Sharded(2, whole_layout(9)),)
    assert not plan.fallbacks


@pytest.mark.parametrize(
    ("count", "parts", "attention", "strategy"),
    [
        (4, 2, "auto", "ulysses"),
        (3, 2, "auto", "ulysses"),
        (3, 8, "auto", "all_gather_kv"),
        (3, 8, "ulysses", "ulysses"),
        (4, 2, "all_gather_kv", "all_gather_kv"),
        (4, 2, "replicate", "replicate"),
    ],
)
def test_strategy(count: int, parts: int, attention: str, strategy: str) -> None:
    plan = plan_of(Block(count), heads(1, 9, 12), parts=parts, attention=attention)
    assert [site.strategy for site in plan.sites] == [strategy]


def test_short_memory_stays_whole() -> None:
    class Cross(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            memory = torch.arange(20.0).view(1, 1, 5, 4).expand(1, 3, 5, 4)
            return F.scaled_dot_product_attention(x.sin(), memory, memory)

    plan = plan_of(Cross(), heads(1, 3, 8, 4))
    assert [site.strategy for site in plan.sites] == ["local"]


@pytest.mark.parametrize(
    ("tokens", "memory", "parts", "strategy"),
    [(12, 5, 2, "local"), (12, 8, 2, "all_gather_kv"), (12, 8, 3, "ulysses"), (5, 12, 2, "ulysses")],
)
def test_memory_that_is_projected(tokens: int, memory: int, parts: int, strategy: str) -> None:
    """Whole if a rank then computes no more of it than of the queries; gathered if that moves less."""
    projection = nn.Linear(4, 4)

    def cross(x: Tensor, m: Tensor) -> Tensor:
        k = projection(m)
        return F.scaled_dot_product_attention(x.sin(), k, k)

    plan = plan_of(cross, heads(1, 3, tokens, 4), heads(1, 3, memory, 4), parts=parts)
    assert [site.strategy for site in plan.sites] == [strategy]


WIDE, TAPS = nn.Linear(5, 6), torch.randn(6, 1, 3)
TOKENS = nn.Parameter(torch.randn(7, 9))


def convolved(x: Tensor) -> Tensor:
    return F.conv1d(WIDE(x).mT, TAPS, padding=1, groups=6).mT


def summed_up(x: Tensor) -> Tensor:
    return WIDE(x).cumsum(1)


def outer_products(x: Tensor) -> Tensor:
    y = WIDE(x)
    return y @ (y.sigmoid().mT @ y)


def scanned(x: Tensor) -> Tensor:
    rows = WIDE(x).unbind(1)
    return torch.stack([rows[0], rows[0] + rows[1]], 1)


def dense(x: Tensor) -> Tensor:
    return F.conv1d(WIDE(x).mT, TAPS.expand(6, 6, 3), padding=1).mT


def fourier(x: Tensor) -> Tensor:
    return torch.fft.fft2(WIDE(x)).real


def row_by_row(x: Tensor) -> Tensor:
    return WIDE(F.layer_norm(x, (5,))).softmax(-1)


@pytest.mark.parametrize("mix", [convolved, dense, fourier, summed_up, outer_products, scanned])
def test_what_mixes_tokens_shards_them(mix: Callable[..., Any]) -> None:
    _, rules = rules_of(mix, heads(1, 9, 5))
    plan = propagate(rules, (), find_mixers(rules), 2, "auto")
    linear = next(node for node in plan.nodes if node.name == "linear")
    assert plan.placement(linear) == Sharded(1, whole_layout(9))


def test_rows_cut_out_of_a_longer_sequence_go_to_all_ranks() -> None:
    def long_convolution(x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(WIDE(x), n=18, dim=1) * torch.fft.rfft(TOKENS[:6].mT, n=18, dim=0)
        return F.layer_norm(torch.fft.irfft(spectrum, n=18, dim=1)[:, :9], (6,))

    _, rules = rules_of(long_convolution, heads(1, 9, 5))
    plan = propagate(rules, (), find_mixers(rules), 3, "auto")
    norm = next(node for node in plan.nodes if node.name == "layer_norm")
    assert plan.placement(norm) == Sharded(1, whole_layout(9))


def test_weights_mix_what_stands_beside_features() -> None:
    _, rules = rules_of(lambda x: F.linear(F.linear(WIDE(x).mT, TOKENS).relu(), TOKENS.mT), heads(1, 9, 5))
    assert [(end.node.name, end.dim) for end in find_mixers(rules)] == [("linear_1", 2), ("linear_2", 2)]


def test_where_nothing_is_mixed_nothing_is_found() -> None:
    _, rules = rules_of(row_by_row, heads(1, 9, 5))
    assert not find_mixers(rules)


class Scanned(nn.Module):
    """A cumulative sum over the tokens before attention, between norms that need the channels whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(12, 12), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(F.layer_norm(F.layer_norm(self.first(x), (12,)).cumsum(1), (12,)))


def test_an_op_that_needs_the_sequence_borrows_the_channels_and_returns() -> None:
    plan = plan_of(Scanned(), heads(1, 9, 12))
    placed = {node.name: own for node, own in plan.nodes.items()}
    tokens, channels = Sharded(1, whole_layout(9)), Sharded(2, whole_layout(12))
    assert placed["layer_norm"].results() == (tokens,)
    assert placed["cumsum"].operand(0) == channels == placed["cumsum"].results()[0]
    assert placed["layer_norm_1"].operand(0) == tokens
    assert not plan.fallbacks


def test_what_lies_between_two_borrowers_stays_away() -> None:
    def scans(x: Tensor, w: Tensor) -> Tensor:
        y = F.layer_norm(x, (12,), w)
        return F.linear((F.silu(y.cumsum(1)) * w).cumsum(1), w.diag())

    _, rules = rules_of(scans, heads(1, 9, 12).sin(), nn.Parameter(torch.randn(12)))
    plan = propagate(rules, (), find_mixers(rules), 2, "auto")
    placed = {node.name: plan.placement(node) for node in plan.nodes}
    channels, tokens = Sharded(2, whole_layout(12)), Sharded(1, whole_layout(9))
    assert [placed[name] for name in ("cumsum", "silu", "mul", "cumsum_1")] == [channels] * 4
    assert placed["layer_norm"] == placed["linear"] == tokens


def gate(m: Parts, y: Tensor) -> Tensor:
    return y.sigmoid()


def projected_gate(m: Parts, y: Tensor) -> Tensor:
    return m.q(y)


@pytest.mark.parametrize(("between", "launches"), [(gate, 2), (projected_gate, 3)])
def test_an_exchange_waits_for_pointwise_work_and_for_no_product(between: Callable[..., Tensor], launches: int) -> None:
    """The gate is made behind the first exchange, and sent with it or by itself; then the way home."""

    def gated(m: Parts, x: Tensor) -> Tensor:
        y, z = m.norm(x), m.norm2(x)
        return m.o((y.cumsum(1) * between(m, z)).cumsum(1))

    (graph,) = assert_equivalent(Parts(gated), [heads(1, 9, 12).double().detach()], parts=2)
    assert sum(each.op.startswith("all_to_all") for each in graph.collectives) == launches


def written(function: nn.Module, *args: Tensor, parts: int = 2, **options: Any) -> fx.GraphModule:
    module, rules = rules_of(function, *args)
    plan = propagate(rules, find_attention(rules), (), parts, "auto")
    with fake_world(parts):
        config = SequenceParallelConfig(**options)
        (returned,) = module.graph.output_node().args
        assert isinstance(returned, tuple)
        kinds = config.output_kinds(list(map(str, returned)))
        local = config.param_grads == "local"
        return insert_collectives(module, rules, plan, "0", kinds, rng=config.rng, local_gradients=local).graph_module


def counts(module: fx.GraphModule) -> Counter[str]:
    ops = (n.target for n in module.graph.nodes if isinstance(n.target, torch._ops.OpOverload))
    return Counter(op._opname for op in ops if op.namespace == "sp")


def test_what_is_written_for_a_block() -> None:
    module = written(Block(), heads(1, 9, 12))
    assert counts(module) == {"shard": 1, "all_to_all": 4, "all_gather": 1, "replicate": 8}
    names = [node.name for node in module.graph.nodes]
    exchanges = [f"gather_seq_scatter_heads_{role}" for role in "qkv"] + ["gather_heads_scatter_seq"]
    assert [name for name in names if name.startswith("gather_")] == [*exchanges, "gather_output_0"]
    assert names[-2:] == ["gather_output_0", "output"]


@pytest.mark.parametrize("repeat", ["expand", "repeat_interleave", "flag"])
@pytest.mark.parametrize(("parts", "grouped"), [(2, False), (4, True)])
def test_kv_heads_are_exchanged_before_they_are_repeated(repeat: str, parts: int, grouped: bool) -> None:
    module = written(Block(4, 2, repeat), heads(1, 9, 12), parts=parts)
    exchanged = [
        n for n in module.graph.nodes if n.name.startswith(("gather_seq_scatter_heads_k", "gather_seq_scatter_heads_v"))
    ]
    assert len(exchanged) == 2
    whole = repeat == "flag" and not grouped
    assert {n.target for n in exchanged} == {
        torch.ops.sp.all_to_all.default if whole else torch.ops.sp.all_to_all_kv.default
    }
    assert counts(module)["all_gather"] == 1


def test_a_graph_without_attention_is_not_sharded() -> None:
    assert not plan_of(FeedForward(), heads(B, S, D)).shards


def test_conversions_are_not_shared_across_grad_modes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.w = Block(), nn.Parameter(torch.randn(12))

        def forward(self, x: Tensor) -> Tensor:
            y = self.block(x)
            with torch.no_grad():
                z = y * self.w
            return y * self.w + z

    module = written(Twice(), heads(1, 9, 12))
    of_w = [n for n in module.graph.nodes if n.name.startswith("replicate_w")]
    assert len(of_w) == 2


def test_an_output_that_is_a_view_of_an_input_stays_one() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.block(x), x.transpose(0, 1)

    module = written(Viewed(), heads(1, 9, 12))
    (_, view) = module.graph.output_node().args[0]  # type: ignore[misc, union-attr]
    assert view.target is torch.ops.aten.transpose.int  # type: ignore[union-attr]
    assert view.args[0].op == "placeholder"  # type: ignore[union-attr]
    assert counts(module)["all_gather"] == 1


class Masked(nn.Module):
    """Attention under a causal mask that the model builds, written out or as one op."""

    def __init__(self, mask: str, eager: bool) -> None:
        super().__init__()
        self.qkv, self.mask, self.eager = nn.Linear(12, 36), mask, eager

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        rows = torch.arange(length)
        tril = torch.ones(length, length, dtype=torch.bool).tril()
        mask = tril if self.mask == "tril" else rows[:, None] >= rows
        if not self.eager:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = (q @ k.transpose(-1, -2)).masked_fill(~mask, -torch.inf).softmax(-1) @ v
        return out


def masks_of(mask: str, eager: bool, attention: str) -> set[tuple[int, ...]]:
    """The local shapes of all that is boolean and has two dimensions or more, of 14 rows on 2 ranks."""
    options = {"attention": attention, "inner_backend": "eager"}
    x, model = torch.randn(1, 14, 12), Masked(mask, eager)
    with simulate(2):
        out = torch.compile(model, backend=partial(sp_backend, options=options))(x)
        assert torch.allclose(on_rank(out, 1), model(x), atol=1e-5)
        values = [node.meta.get("val") for node in rewritten_graphs()[-1].rewritten.graph.nodes]
    masks = [value for value in values if isinstance(value, Tensor) and value.dtype == torch.bool and value.dim() > 1]
    return {tuple(each.shape) for each in masks}


@pytest.mark.parametrize("eager", [False, True])
def test_a_mask_of_positions_is_built_where_it_is_used(eager: bool) -> None:
    for mask in ("positions", "tril"):
        assert masks_of(mask, eager, "all_gather_kv") == {(7, 14)}
        # Each rank has heads of its own, and all pairs of rows.
        assert masks_of(mask, eager, "ulysses") == {(14, 14)}


def test_what_has_an_effect_stays_where_experts_are_outlined() -> None:
    """A draw that nobody reads moves the generator; a mode has no users."""

    def body(m: Parts, x: Tensor) -> Tensor:
        torch.rand(3)
        with sdpa_kernel(SDPBackend.MATH):
            tokens, weights, ids = routed(m, x)
        order = ids.argsort()
        rows = grouped(m, tokens[order // USES], ends_of(ids)) * weights[order, None]
        return tokens.index_add(0, order // USES, rows)

    module, rules = rules_of(Parts(body), torch.randn(2, 7, 12, dtype=torch.float64))
    before = [node.target for node in module.graph.nodes if has_effect(node)]
    assert torch.ops.aten.rand.default in before and SDPA_BACKENDS in before
    assert outline_experts(module, rules)
    (experts,) = module.graph.find_nodes(op="call_module", target="grouped_rows_0")
    assert [node.target for node in module.graph.nodes if has_effect(node) and node is not experts] == before


def test_an_edge_without_replicate_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    args = [tokens(1, 9, 12)]
    (graph,) = assert_equivalent(Parts(Parts.block), args, parts=2)
    assert not unsummed(graph)
    monkeypatch.setattr(Conversions, "_replicated", lambda self, value: self.convert(value, REPLICATED))
    _, (graph,) = compared(Parts(Parts.block), args, parts=2)
    broken = unsummed(graph)
    assert len(broken) == 16 and broken[0] == "norm_weight -> layer_norm"
