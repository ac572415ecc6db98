"""The whole road on simulated ranks: right on every rank, and moved what it should."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sp_compile import init_sequence_parallel, rewritten_graphs, sp_backend
from sp_compile.ops import sp_ops as ops
from sp_compile.ops.exchange import Exchange
from sp_compile.passes.insert_collectives import rewriter
from sp_compile.tools.simulation import fake_world

from .equivalence import (
    assert_equivalent,
    collectives,
    compared,
    differences,
    known_graphs,
    rewritten_since,
    run_simulated,
    step,
    tokens,
)
from .models import MODELS, gpt2, inputs_of, llama
from .programs import Parts
from .test_passes import Block

LAYER = ["gather_seq_scatter_heads_qkv", "gather_heads_scatter_seq"]


def kinds(graph: Any) -> list[str]:
    """The collectives of a graph without the numbers that tell layers apart."""
    return [name.rstrip("0123456789").rstrip("_") if name[-1].isdigit() else name for name in collectives(graph)]


@pytest.mark.parametrize(("parts", "length"), [(2, 8), (2, 33), (3, 7), (4, 6), (4, 5)])
@pytest.mark.parametrize("heads", [4, 3])
def test_a_block_is_right_and_moves_only_its_site(heads: int, parts: int, length: int) -> None:
    (graph,) = assert_equivalent(Block(heads, repeat="flag").double(), (tokens(1, length, 12),), parts=parts)
    assert collectives(graph) == [*LAYER, "gather_output_0"]


@pytest.mark.parametrize("length", [1, 3])
def test_fewer_tokens_than_ranks_are_nothing_to_shard(length: int) -> None:
    assert not assert_equivalent(Block().double(), (tokens(1, length, 12),), parts=4, must_shard=False)


@pytest.mark.parametrize("repeat", ["expand", "repeat_interleave", "flag"])
@pytest.mark.parametrize(("heads", "kv_heads", "parts"), [(4, 2, 2), (4, 1, 4), (6, 2, 4), (6, 3, 2), (12, 12, 8)])
def test_grouped_heads(repeat: str, heads: int, kv_heads: int, parts: int) -> None:
    module = Block(heads, kv_heads, repeat).double()
    (graph,) = assert_equivalent(module, (tokens(2, 9, 12),), parts=parts, options={"attention": "ulysses"})
    one_head = repeat == "flag" and kv_heads == 1  # every rank reads it: k and v are gathered, beside q
    assert collectives(graph) == ["all_to_all_packed" if one_head else LAYER[0], LAYER[1], "gather_output_0"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("parts", "length"), [(4, 32), (4, 33)])
def test_model(name: str, parts: int, length: int) -> None:
    model = MODELS[name]().double()
    (graph,) = assert_equivalent(model, (), inputs_of(name, length, torch.float64), parts=parts, tolerance=1e-6)
    moved = collectives(graph)
    assert len([m for m in moved if m.startswith(tuple(LAYER))]) == 4
    assert not [m for m in moved if m.startswith("all_gather")]
    assert not graph.plan.fallbacks


def test_the_loss_alone_moves_no_logits() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def forward(self, **inputs: Tensor) -> Tensor:
            loss: Tensor = self.model(use_cache=False, **inputs).loss
            return loss

    (graph,) = assert_equivalent(Loss().double(), (), inputs_of("llama", 33), parts=3, tolerance=1e-6)
    rest = [name for name in collectives(graph) if not name.startswith(tuple(LAYER))]
    assert rest == ["all_reduce_cross_entropy_loss"]
    (node,) = (n for n in graph.rewritten.graph.nodes if n.name == rest[0])
    assert node.meta["val"].numel() <= 2


@pytest.mark.parametrize(
    ("heads", "kv_heads", "parts", "length"),
    [(3, 3, 2, 9), (12, 12, 8, 9), (4, 1, 4, 9), (6, 2, 4, 9), (4, 2, 4, 5)],
)
def test_llama_heads(heads: int, kv_heads: int, parts: int, length: int) -> None:
    model = llama(heads, kv_heads).double()
    assert_equivalent(model, (), inputs_of("llama", length), parts=parts, tolerance=1e-6)


class Encoder(nn.Module):
    """`nn.TransformerEncoderLayer`, batch second, with a padding mask."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 3, 17, dropout=0.0, norm_first=norm_first)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        result: Tensor = self.layer(x, src_key_padding_mask=hidden)
        return result


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_layer(norm_first: bool) -> None:
    hidden = torch.zeros(2, 7, dtype=torch.bool)
    hidden[1, 4:] = True
    (graph,) = assert_equivalent(Encoder(norm_first).double(), (tokens(7, 2, 12), hidden), parts=3)
    assert collectives(graph) == [*LAYER, "gather_output_0"]


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = self.attention(x, x, x)
        return x + out, weights


def test_multihead_attention_with_weights() -> None:
    (graph,) = assert_equivalent(Weights().double(), (tokens(2, 7, 12),), parts=2)
    assert collectives(graph)[:1] == LAYER[:1]


@pytest.mark.parametrize("attention", ["ulysses", "all_gather_kv", "replicate"])
@pytest.mark.parametrize("heads", [4, 3])
def test_every_strategy_is_right(attention: str, heads: int) -> None:
    graphs = assert_equivalent(Block(heads).double(), (tokens(1, 7, 12),), parts=4, options={"attention": attention})
    assert [site.strategy for site in graphs[0].plan.sites] == [attention]


@pytest.mark.parametrize("lengths", [(8, 9, 13, 5)])
def test_one_dynamic_graph_serves_all_lengths(lengths: tuple[int, ...]) -> None:
    for length in lengths:
        (graph,) = assert_equivalent(Block(3).double(), (tokens(2, length, 12),), parts=3, dynamic=True)
        assert "floordiv" in str(graph)


class Chained(nn.Module):
    """The output of one attention is the query of the next, on the same K and V."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(12, 24), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (6, 4)).transpose(1, 2)
        k = self.kv(x).unflatten(-1, (2, 4)).transpose(1, 2).repeat_interleave(3, 1)
        return F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, k), k, k)


def test_attention_that_queries_with_an_attention() -> None:
    (graph,) = assert_equivalent(Chained().double(), (tokens(1, 7, 12),), parts=4)
    assert [site.strategy for site in graph.plan.sites] == ["ulysses", "ulysses"]


class Asserted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return y + F.one_hot(y.argmax(-1), 12) * torch.tensor([0.5, 2.0]).sum()


def test_asserts_and_constants_in_the_graph() -> None:
    assert_equivalent(Asserted().double(), (tokens(1, 7, 12),), parts=3)


class TwoHalves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y).tanh()


def test_two_graphs() -> None:
    graphs = assert_equivalent(TwoHalves().double(), (tokens(1, 7, 12),), parts=3)
    assert [collectives(graph) for graph in graphs] == [[*LAYER, "gather_output_0"]] * 2


class Mixture(nn.Module):
    """An expert for each token, by torch's own `grouped_mm`, which is of bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.up, self.router = Block(3).double(), nn.Linear(12, 16).double(), nn.Linear(12, 4).double()
        self.experts = nn.Parameter(torch.randn(4, 16, 16, dtype=torch.bfloat16) / 4)

    def forward(self, x: Tensor) -> Any:
        y = self.block(x).flatten(0, 1)
        ids = self.router(y).argmax(-1)
        order = ids.argsort()
        ends = torch.histc(ids.float(), bins=4, min=0, max=3).cumsum(0, dtype=torch.int32)
        rows = F.grouped_mm(self.up(y).bfloat16()[order], self.experts, offs=ends)
        return rows[order.argsort()].double().view(*x.shape[:2], 16)


@pytest.mark.parametrize("parts", [2, 3])
def test_grouped_mm_of_torch_runs_by_rows(parts: int) -> None:
    (graph,) = assert_equivalent(Mixture(), (tokens(2, 7, 12),), parts=parts, tolerance=2e-2)
    assert collectives(graph) == [*LAYER, "gather_output_0"] and not graph.plan.fallbacks


# Planted wrongs: each must be noticed by the comparison


class Shifted(nn.Module):
    """A block whose loss masks, sums over tokens, and uses a weight inside and outside of `no_grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.scale = Block(3), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        with torch.no_grad():
            z = y * self.scale
        return (y * self.scale + z).sum((0, 1)).tanh() * self.scale


def _no_sum(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


def _repeating(exchange: Exchange) -> Exchange:
    return Exchange(exchange.scatter, exchange.gather)


def _unmasked(x: Tensor, dim: int, keep: Tensor, fill: float = 0) -> Tensor:
    return x


@pytest.mark.parametrize(
    "mutant", ["replicate backward", "exchange backward", "padding mask", "shared across grad modes"]
)
def test_standing_controls_are_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutant == "replicate backward":
        monkeypatch.setattr(ops._Replicate, "backward", staticmethod(_no_sum))
    elif mutant == "exchange backward":
        monkeypatch.setattr(Exchange, "back", _repeating)
    elif mutant == "padding mask":
        monkeypatch.setattr(ops, "fill_rows", _unmasked)
    else:
        monkeypatch.setattr(rewriter, "has_value", lambda node: True)
    module = Shifted().double()
    args = (tokens(1, 7, 12),)
    got, _ = run_simulated(module, args, parts=4)
    errors = differences(step(module, module, args, {}), got, 4)
    assert max(errors.values()) > 1e-3


def test_the_controls_program_is_right() -> None:
    assert_equivalent(Shifted().double(), (tokens(1, 7, 12),), parts=4)


# Randomness


class Dropped(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.block, self.p = Block(), p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.block(x), self.p)


def test_exact_random_numbers_are_those_of_one_device() -> None:
    module = Dropped(0.5).double()
    args = (tokens(1, 7, 12),)
    torch.manual_seed(3)
    expected = step(module, module, args, {})
    torch.manual_seed(3)
    got, _ = run_simulated(module, args, parts=3, options={"rng": "exact"})
    assert max(differences(expected, got, 3).values()) < 1e-9


def dropped_weights(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(to(x)) for to in (m.q, m.k, m.v))
    return m.block(m.o(m.join(F.dropout((q @ k.mT / 2).softmax(-1), 0.3) @ v)))


def dropped_in_sdpa(m: Parts, x: Tensor) -> Any:
    return m.block(m.block(x, dropout_p=0.3), dropout_p=0.2, is_causal=True)


def dropped_everywhere(m: Parts, x: Tensor) -> Any:
    y = m.block(F.dropout(x, 0.2), dropout_p=0.3, attn_mask=torch.ones(13, 13, dtype=torch.bool).tril())
    return m.block(F.dropout(y, 0.1)).mean(1), m.o(y)


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("body", [dropped_weights, dropped_in_sdpa, dropped_everywhere])
def test_exact_dropout_in_attention_is_that_of_one_device(body: Callable[..., Any], parts: int) -> None:
    options = {"rng": "exact", "attention": "all_gather_kv" if parts == 3 else "ulysses"}
    (graph,) = assert_equivalent(Parts(body), (tokens(2, 13, 12),), parts=parts, options=options)
    assert [site.strategy for site in graph.plan.sites] == [options["attention"]] * 2 and not graph.plan.fallbacks


def test_parallel_dropout_in_attention_is_not_that_of_one_device() -> None:
    errors, _ = compared(Parts(dropped_in_sdpa), (tokens(2, 13, 12),), parts=2)
    assert errors["output 0"] > 0.1 and errors["grad q.weight"] > 0.1


def test_parallel_random_numbers_differ_between_ranks_and_keep_their_rate() -> None:
    class Ones(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout((self.block(x) * 0 + 1).repeat(1, 1, 4000), 0.3)

    got, graphs = run_simulated(Ones().double(), (tokens(1, 8, 12),), parts=2)
    assert any(node.target is torch.ops.sp.bernoulli.default for node in graphs[0].rewritten.graph.nodes)
    value = got.values["output 0"]
    rank0, rank1 = (value._local_tensors[rank] for rank in (0, 1))  # type: ignore[union-attr]
    assert torch.equal(rank0, rank1)
    kept = rank0[0] != 0
    assert abs(kept.double().mean() - 0.7) < 0.01
    assert not torch.equal(kept[:4], kept[4:])


def test_gpt2_with_dropout_stays_sharded() -> None:
    model = gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1).double()
    _, (graph,) = run_simulated(model, (), inputs_of("gpt2", 9), parts=2)
    assert not graph.plan.fallbacks
    assert [site.strategy for site in graph.plan.sites] == ["ulysses", "ulysses"]


# Options, printing


def test_derivatives_inside_a_graph_compile() -> None:
    """Forward over reverse, which simulated ranks cannot run: on one rank of a world that does nothing."""

    block, known = Block(), known_graphs()

    def curvature(x: Tensor) -> Tensor:
        y = block(x)
        product: Tensor = torch.func.jvp(torch.func.grad(lambda z: z.tanh().sum()), (y,), (y,))[1]
        return product

    with fake_world(2):
        torch._dynamo.reset()
        init_sequence_parallel()
        call = torch.compile(curvature, backend=partial(sp_backend, options={"inner_backend": "eager"}))
        assert call(torch.randn(1, 8, 12)).shape == (1, 8, 12)
    torch._dynamo.reset()
    (graph,) = rewritten_since(known)
    assert [site.strategy for site in graph.plan.sites] == ["ulysses"]


def test_a_graph_with_nothing_to_shard_goes_to_the_inner_backend_as_it_is() -> None:
    seen: list[Any] = []

    def inner(gm: Any, inputs: Any) -> Any:
        seen.append(gm)
        return gm.forward

    model = nn.Linear(3, 5)
    with fake_world(1):
        torch._dynamo.reset()
        torch.compile(model, backend=lambda gm, x: sp_backend(gm, x, options={"inner_backend": inner}))(
            torch.ones(2, 3)
        )
    assert not [node for node in seen[0].graph.nodes if "sp." in str(node.target)]
    graphs = assert_equivalent(model.double(), (tokens(2, 3),), must_shard=False)
    assert not graphs


def test_dump_and_rewritten_graphs(tmp_path: Path) -> None:
    run_simulated(Block().double(), (tokens(1, 7, 12),), parts=2, options={"dump": str(tmp_path)})
    names = sorted(path.name.split(".", 1)[1] for path in tmp_path.iterdir())
    passes = ["0_capture", "1_find_attention", "2_propagate", "3_insert_collectives", "4_pack_exchanges"]
    assert names == [f"{each}.{kind}" for each in passes for kind in ("diff", "txt")]
    captured, found, planned, rewritten, packed = (path.read_text() for path in sorted(tmp_path.glob("*.diff")))
    assert "-q = transpose(view, 1, 2)" in captured and "+transpose: f64[1, 4, 7, 4] = aten.transpose" in captured
    assert "+scaled_dot_product_attention: f64[1, 4, 7, 4] = aten." in found and "  # site 0" in found
    assert "+linear: f64[1, 7, 16] = aten.linear(x, q_weight, bias=q_bias)  # S(1: 7)" in planned
    assert "+slice_x: f64[1, 4 of 7, 12] = sp.shard(x, S(1: 7))" in rewritten
    assert "+gather_seq_scatter_heads_q: f64[1, 2 of 4, 7, 4] = getitem(gather_seq_scatter_heads_qkv, 0)" in packed
    text = str(rewritten_graphs()[-1])
    assert "4 of 7" in text and "gather_seq_scatter_heads_q" in text and "test_passes.py" in text


def test_a_dump_without_attention_says_what_mixes_the_sequence(tmp_path: Path) -> None:
    run_simulated(Block().double(), (tokens(1, 7, 12),), parts=2, options={"dump": str(tmp_path / "attention")})
    assert not [*(tmp_path / "attention").glob("*find_mixers*")]
    model = nn.Sequential(nn.Linear(12, 6), Cumsum(), nn.Linear(6, 12)).double()
    run_simulated(model, (tokens(1, 7, 12),), parts=2, options={"dump": str(tmp_path)})
    (text,), (difference,) = ([*tmp_path.glob(f"*.2_find_mixers.{kind}")] for kind in ("txt", "diff"))
    assert text.read_text().startswith("cumsum: linear (dim 1)  # test_backend.py:")
    assert "+cumsum: f64[1, 7, 6] = aten.cumsum(linear, 1)  # mixes dim 1 of linear" in difference.read_text()


class Cumsum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


def test_one_line_of_information_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sp_compile"):
        run_simulated(Block().double(), (tokens(1, 8, 12),), parts=2)
        run_simulated(nn.Linear(12, 12).double(), (tokens(1, 1, 12),), parts=2)
    sharded, plain = [each.getMessage() for each in caplog.records if each.levelno == logging.INFO]
    assert "on 2 ranks: attention sites: 1 ulysses; 3 collectives, " in sharded
    assert "bytes received per rank, forward; 100.0% of FLOPs sharded; 0 fallbacks; planned in " in sharded
    assert "attention sites: none; 0 collectives, 0 bytes" in plain and "0.0% of FLOPs sharded" in plain
    assert len(caplog.records) == 2
